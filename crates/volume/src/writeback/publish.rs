//! One attempt to publish a frozen generation, and to record that it is published.

use std::sync::Arc;

use parking_lot::Mutex;

use super::complete::complete_partial_blocks;
use super::overlay::Frozen;
use super::state::GenerationId;
use crate::catalogue::Recorder;
use crate::engine::{Checkpoint, Engine};
use crate::error::VolumeError;

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
