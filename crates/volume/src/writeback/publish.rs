//! One attempt to publish a frozen generation, and to record that it is published.

use std::sync::Arc;

use futures::StreamExt;
use parking_lot::Mutex;

use super::overlay::Frozen;
use super::state::GenerationId;
use crate::catalogue::Recorder;
use crate::engine::{Checkpoint, Engine};
use crate::error::VolumeError;
use crate::geometry::Geometry;

/// Reads that complete partly written blocks, in flight at once.
const COMPLETIONS_IN_FLIGHT: usize = 64;

/// Publishes generations, one at a time.
pub(super) struct Publisher {
    engine: Arc<dyn Engine>,
    recorder: Arc<dyn Recorder>,
    /// What is published while its record is still missing: the next attempt has only that to do.
    unrecorded: Mutex<Option<(GenerationId, Option<Checkpoint>)>>,
}

impl Publisher {
    pub fn new(engine: Arc<dyn Engine>, recorder: Arc<dyn Recorder>) -> Self {
        Self {
            engine,
            recorder,
            unrecorded: Mutex::default(),
        }
    }

    /// Publishes and records. `attempt` is above 0 after a failure of the same generation.
    pub async fn publish(
        &self,
        frozen: Arc<Frozen>,
        generation: GenerationId,
        attempt: u32,
    ) -> Result<(), VolumeError> {
        let published = self.unrecorded.lock().filter(|(id, _)| *id == generation);
        let checkpoint = match published {
            Some((_, checkpoint)) => checkpoint,
            None => {
                if attempt > 0 {
                    self.engine.recover().await?;
                }
                complete_partial_blocks(self.engine.as_ref(), &frozen).await?;
                let checkpoint = self.engine.publish(frozen).await?;
                *self.unrecorded.lock() = Some((generation, checkpoint));
                checkpoint
            }
        };
        self.recorder.published(generation.0, checkpoint).await?;
        *self.unrecorded.lock() = None;
        Ok(())
    }
}

/// Reads what partly written blocks lack from the published state, many at once, so that whole blocks are published.
pub(crate) async fn complete_partial_blocks(engine: &dyn Engine, frozen: &Frozen) -> Result<(), VolumeError> {
    let geometry: Geometry = engine.geometry();
    let partial = frozen.with(|g| g.partial_blocks());
    let mut reads = futures::stream::iter(partial)
        .map(|(block, gap)| async move {
            let mut bytes = vec![0; gap.len()];
            let at = block.0 * u64::from(geometry.block_size()) + u64::from(gap.start);
            engine
                .read(at, &mut bytes)
                .await
                .map(|()| (block, gap.start, bytes))
        })
        .buffer_unordered(COMPLETIONS_IN_FLIGHT);
    while let Some(read) = reads.next().await {
        let (block, in_block, bytes) = read?;
        frozen.complete(block, in_block, &bytes);
    }
    Ok(())
}
