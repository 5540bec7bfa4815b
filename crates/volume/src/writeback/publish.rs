//! One attempt to publish a frozen generation, and to record that it is published.

use std::sync::Arc;

use futures::FutureExt;
use futures::future::{Either, select};
use parking_lot::Mutex;

use super::complete::{complete_ahead, complete_partial_blocks};
use super::overlay::{Frozen, Overlay};
use super::state::GenerationId;
use crate::catalogue::Recorder;
use crate::engine::{Checkpoint, Engine};
use crate::error::VolumeError;

/// Publishes generations, one at a time.
pub(super) struct Publisher {
    engine: Arc<dyn Engine>,
    recorder: Arc<dyn Recorder>,
    overlay: Arc<Overlay>,
    /// What is published while its record is still missing: the next attempt has only that to do.
    unrecorded: Mutex<Option<(GenerationId, Option<Checkpoint>)>>,
}

impl Publisher {
    pub fn new(engine: Arc<dyn Engine>, recorder: Arc<dyn Recorder>, overlay: Arc<Overlay>) -> Self {
        Self {
            engine,
            recorder,
            overlay,
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
                let engine = self.engine.as_ref();
                complete_partial_blocks(engine, &frozen).await?;
                let publish = engine.publish(frozen, None);
                let ahead = complete_ahead(engine, &self.overlay).boxed();
                let checkpoint = match select(publish, ahead).await {
                    Either::Left((published, _)) => published?,
                    Either::Right(((), publish)) => publish.await?,
                };
                *self.unrecorded.lock() = Some((generation, checkpoint));
                checkpoint
            }
        };
        self.recorder.published(generation.0, checkpoint).await?;
        *self.unrecorded.lock() = None;
        Ok(())
    }
}
