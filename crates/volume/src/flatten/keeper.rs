//! Ends the sharing of a clone that is served, for who asks.

use std::sync::Arc;

use log::{info, warn};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use super::{Ending, Flattened, origin_of};
use crate::base::asks::{Asking, Asks, asks};
use crate::base::control::Control;
use crate::base::error::VolumeError;
use crate::lease::Lease;
use crate::read::read_path::Reads;
use crate::retention::Rounds;
use crate::store::Store;

/// Waits for who asks, until it is dropped.
#[derive(Debug)]
pub(crate) struct Keeper {
    task: AbortHandle,
    /// With what ends it before the label is put.
    asks: Asks<Arc<Control>, Flattened>,
}

/// What a keeper works with.
pub(crate) struct Work {
    pub store: Store,
    pub lease: Arc<Lease>,
    pub rounds: Arc<Mutex<Rounds>>,
    pub reads: Reads,
}

impl Keeper {
    /// Starts on the current runtime.
    pub fn start(work: Work) -> Self {
        let (asks, asking) = asks("the end of the sharing");
        let task = tokio::spawn(work.run(asking)).abort_handle();
        Self { task, asks }
    }

    /// Ends the sharing, beside clients, who go first. `control` ends it before anything has changed but that copies are there, which the
    /// next attempt finds.
    ///
    /// # Errors
    /// As [`Ending::run`]. [`VolumeError::InvalidInput`] when the volume is no clone, or when too many wait already.
    pub async fn ask(&self, control: Arc<Control>) -> Result<Flattened, VolumeError> {
        self.asks.ask(control).await
    }

    /// Stops it wherever it is.
    pub fn stop(&self) {
        self.task.abort();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Work {
    async fn run(self, mut asking: Asking<Arc<Control>, Flattened>) {
        while let Some(asked) = asking.recv().await {
            let done = self.flatten(&asked.question).await;
            if let Err(e) = &done {
                warn!(
                    "the sharing of {} has not ended, which was asked for: {}",
                    self.store.url,
                    e.chain()
                );
            }
            asked.tell(done);
        }
    }

    async fn flatten(&self, control: &Control) -> Result<Flattened, VolumeError> {
        info!("told to end the sharing of {}", self.store.url);
        let origin = origin_of(&self.store).await?;
        let ending = Ending {
            store: &self.store,
            origin: &origin,
            lease: &self.lease,
            rounds: &self.rounds,
            beside: Some(&self.reads),
            control,
        };
        ending.run().await
    }
}
