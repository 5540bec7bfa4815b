//! One attempt to publish a frozen generation and to record the published checkpoint.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::future::{Either, select};
use log::{info, warn};
use parking_lot::Mutex;
use tokio::sync::{RwLock, oneshot};

use super::fill_partial::{complete_ahead, complete_partial_blocks};
use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::VolumeError;
use crate::base::ids::GenerationId;
use crate::engine::{Beside, Engine, Relocated};
use crate::index::relocation::Relocation;
use crate::meta::checkpoint_list::Recorder;
use crate::metrics::Metrics;
use crate::metrics::work::Phase;
use crate::write_buffer::overlay::{Frozen, Overlay};

/// What becomes of a checkpoint without client data that could not be recorded: it stays, as one whose server was killed here. What reads
/// the list goes from the checkpoint before to the one after.
///
/// # Errors
/// [`VolumeError::Fenced`], as it came.
fn only_if_fenced(
    recorded: Result<(), VolumeError>,
    checkpoint: Checkpoint,
    what: &str,
) -> Result<(), VolumeError> {
    match recorded {
        Err(e) if !matches!(e, VolumeError::Fenced { .. }) => {
            warn!(
                "checkpoint {}, {what}, is published, but could not be entered in the checkpoint list: {}",
                checkpoint.id.cno,
                e.chain()
            );
            Ok(())
        }
        recorded => recorded,
    }
}

/// Publishes generations, in the order of their numbers.
pub(super) struct Publisher {
    engine: Arc<dyn Engine>,
    recorder: Arc<dyn Recorder>,
    overlay: Arc<Overlay>,
    metrics: Metrics,
    /// What is published while its record is still missing: the next attempt has only that to do.
    unrecorded: Mutex<Option<(GenerationId, Option<Checkpoint>)>>,
    /// Held by the one publish that completes blocks ahead.
    ahead: tokio::sync::Mutex<()>,
    /// Publishes share it, a relocation has it alone. In the order of asking, so neither waits for more than the other's next.
    turn: RwLock<()>,
    /// The generation of the newest record.
    recorded: AtomicU64,
}

impl Publisher {
    /// `recorded` is the generation that the newest checkpoint's record has.
    pub fn new(
        engine: Arc<dyn Engine>,
        recorder: Arc<dyn Recorder>,
        overlay: Arc<Overlay>,
        metrics: Metrics,
        recorded: u64,
    ) -> Self {
        Self {
            engine,
            recorder,
            overlay,
            metrics,
            unrecorded: Mutex::default(),
            ahead: tokio::sync::Mutex::default(),
            turn: RwLock::default(),
            recorded: AtomicU64::new(recorded),
        }
    }

    /// Publishes a relocation, alone, and records it. Its record has the generation of the one before: it holds nothing more.
    pub async fn relocate(&self, relocation: Arc<Relocation>) -> Result<Option<Relocated>, VolumeError> {
        let _turn = self.turn.write().await;
        self.ensure_recorded("relocating")?;
        let relocated = self.engine.relocate(relocation).await;
        // A growth whose answer was lost may be found here.
        self.overlay.grow(self.engine.geometry());
        let Some(relocated) = relocated? else {
            return Ok(None);
        };
        let generation = self.recorded.load(Ordering::Acquire);
        let recorded = self.recorder.relocated(generation, relocated.checkpoint).await;
        only_if_fenced(recorded, relocated.checkpoint, "a relocation")?;
        Ok(Some(relocated))
    }

    /// Publishes another size, alone, and records it.
    pub async fn grow(&self, size_bytes: u64) -> Result<(), VolumeError> {
        let _turn = self.turn.write().await;
        // Another growth may have come before this one.
        let grows = self.engine.geometry().grows_to(size_bytes);
        if !grows.map_err(VolumeError::InvalidInput)? {
            self.overlay.grow(self.engine.geometry());
            return Ok(());
        }
        self.ensure_recorded("growing")?;
        let grown = self.engine.grow(size_bytes).await;
        // What is stored has that size by now, also where the checkpoint is not recorded.
        self.overlay.grow(self.engine.geometry());
        let checkpoint = grown?;
        let generation = self.recorded.load(Ordering::Acquire);
        let recorded = self.recorder.published(generation, Some(checkpoint)).await;
        only_if_fenced(recorded, checkpoint, "of another size")?;
        self.overlay.rebase();
        info!("grown to {size_bytes} bytes in checkpoint {}", checkpoint.id.cno);
        Ok(())
    }

    /// Refuses while the newest publish has no record: the record of what follows would have the generation of the one before that,
    /// although it holds this one, and an opening after a crash would take what the log has of it for unpublished.
    fn ensure_recorded(&self, operation: &str) -> Result<(), VolumeError> {
        match *self.unrecorded.lock() {
            Some((generation, _)) => Err(VolumeError::engine(
                operation,
                std::io::Error::other(format!(
                    "generation {} is published and not in the list yet",
                    generation.0
                )),
            )),
            None => Ok(()),
        }
    }

    /// Resolves once no relocation is under way that was asked for before.
    pub async fn settled(&self) {
        drop(self.turn.read().await);
    }

    /// Publishes and records. `attempt` is above 0 after a failure of the same generation.
    pub async fn publish(
        &self,
        frozen: Arc<Frozen>,
        generation: GenerationId,
        attempt: u32,
        mut beside: Beside,
    ) -> Result<(), VolumeError> {
        let _turn = self.turn.read().await;
        let counted = &self.metrics.publishes;
        if attempt > 0 {
            counted.retries.one();
        }
        let published = self.unrecorded.lock().filter(|(id, _)| *id == generation);
        let checkpoint = match published {
            Some((_, checkpoint)) => checkpoint,
            None => {
                // The other bytes of a partly written block may be in the previous generation, whose publish must end
                // first.
                let is_whole = frozen.with(|g| g.partial_blocks().is_empty());
                if !is_whole || attempt > 0 {
                    Beside::wait(beside.before.take()).await?;
                }
                if attempt > 0 {
                    counted.time(Phase::Recover, self.engine.recover()).await?;
                    // A growth whose answer was lost may have been stored.
                    self.overlay.grow(self.engine.geometry());
                }
                let engine = self.engine.as_ref();
                let (all_begun, may_read) = oneshot::channel();
                let publish = async {
                    // The receiver lives as long as this future, so a failed send means nothing.
                    let all_begun = || _ = all_begun.send(());
                    let complete = complete_partial_blocks(engine, &self.overlay, &frozen, all_begun);
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
        self.recorded.fetch_max(generation.0, Ordering::AcqRel);
        *self.unrecorded.lock() = None;
        Ok(())
    }
}

#[cfg(test)]
#[path = "publisher_tests.rs"]
mod tests;
