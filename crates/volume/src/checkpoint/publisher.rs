//! One attempt to publish a frozen generation, and to record that it is published.

use std::pin::pin;
use std::sync::Arc;

use futures::future::{Either, select};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::fill_partial::{complete_ahead, complete_partial_blocks};
use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::VolumeError;
use crate::base::ids::GenerationId;
use crate::engine::{Beside, Engine};
use crate::meta::checkpoint_list::Recorder;
use crate::metrics::Metrics;
use crate::metrics::work::Phase;
use crate::write_buffer::overlay::{Frozen, Overlay};

/// Publishes generations, in the order of their numbers.
pub(super) struct Publisher {
    engine: Arc<dyn Engine>,
    recorder: Arc<dyn Recorder>,
    overlay: Arc<Overlay>,
    metrics: Metrics,
    /// What is published while its record is still missing: the next attempt has only that to do.
    unrecorded: Mutex<Option<(GenerationId, Option<Checkpoint>)>>,
    /// Held by the publish that completes blocks ahead.
    ahead: tokio::sync::Mutex<()>,
}

impl Publisher {
    pub fn new(
        engine: Arc<dyn Engine>,
        recorder: Arc<dyn Recorder>,
        overlay: Arc<Overlay>,
        metrics: Metrics,
    ) -> Self {
        Self {
            engine,
            recorder,
            overlay,
            metrics,
            unrecorded: Mutex::default(),
            ahead: tokio::sync::Mutex::default(),
        }
    }

    /// Publishes and records. `attempt` is above 0 after a failure of the same generation.
    pub async fn publish(
        &self,
        frozen: Arc<Frozen>,
        generation: GenerationId,
        attempt: u32,
        mut beside: Beside,
    ) -> Result<(), VolumeError> {
        let counted = &self.metrics.publishes;
        if attempt > 0 {
            counted.retries.one();
        }
        let published = self.unrecorded.lock().filter(|(id, _)| *id == generation);
        let checkpoint = match published {
            Some((_, checkpoint)) => checkpoint,
            None => {
                // What lies below a partly written block may be in the generation before.
                let is_whole = frozen.with(|g| g.partial_blocks().is_empty());
                if !is_whole || attempt > 0 {
                    Beside::wait(beside.before.take()).await?;
                }
                if attempt > 0 {
                    counted.time(Phase::Recover, self.engine.recover()).await?;
                }
                let engine = self.engine.as_ref();
                let (all_begun, may_read) = oneshot::channel();
                let publish = async {
                    // Who waits for it is here as long as this is.
                    let all_begun = || _ = all_begun.send(());
                    let complete = complete_partial_blocks(engine, &frozen, all_begun);
                    counted.time(Phase::Complete, complete).await?;
                    // The one before is recorded by the time this one is published: at most one is not.
                    counted.time(Phase::Store, engine.publish(frozen, beside)).await
                };
                let ahead = async {
                    let _turn = self.ahead.lock().await;
                    complete_ahead(engine, &self.overlay, may_read).await;
                };
                let checkpoint = match select(pin!(publish), pin!(ahead)).await {
                    Either::Left((published, _)) => published?,
                    Either::Right(((), publish)) => publish.await?,
                };
                *self.unrecorded.lock() = Some((generation, checkpoint));
                checkpoint
            }
        };
        let record = self.recorder.published(generation.0, checkpoint);
        counted.time(Phase::Record, record).await?;
        *self.unrecorded.lock() = None;
        Ok(())
    }
}
