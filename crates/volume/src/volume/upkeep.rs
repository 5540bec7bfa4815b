//! Compaction and retention of a volume, and the end of a clone's sharing, while it is open, for who asks. Each is done by a task of its
//! own, which does one at a time.

use std::sync::Arc;
use std::time::Duration;

use super::Volume;
use crate::base::control::Control;
use crate::base::error::VolumeError;
use crate::compaction::Compacted;
use crate::flatten::Flattened;
use crate::retention::{self, Removed};

impl Volume {
    /// Copies what is live out of objects that are mostly dead, whatever gives back enough for it, of what there is now; also where the
    /// server does not do that by itself. Clients go first. What is unpublished is published before each checkpoint of it. `control` ends
    /// it between two of these. Blocks the calling thread; never call it on the runtime.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] where every checkpoint is kept, so that no space would come back, where the format has no parts, or
    /// while several wait for one already; [`VolumeError::ReadOnly`]; [`VolumeError::Fenced`]; [`VolumeError::Closed`] when the volume is
    /// closed meanwhile; when the store fails. What was moved until then is in place.
    pub fn compact(&self, control: &Arc<Control>) -> Result<Compacted, VolumeError> {
        let Some(compaction) = &self.compaction else {
            return Err(VolumeError::ReadOnly);
        };
        self.check_open()?;
        self.driver.check_fenced()?;
        self.runtime.block_on(async {
            self.check_retention().await?;
            compaction.ask(control.clone()).await
        })
    }

    /// Removes the checkpoints that the policy does not keep, and the objects that no other needs, as far as they have not been needed for
    /// [`Self::retention_grace`]; the rest counts from now at latest. With `only_if_automatic` nothing is done where the server does not do
    /// that by itself, and the answer is `None`. Blocks the calling thread; never call it on the runtime.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] where every checkpoint is kept, or while several wait for it already; else as [`Self::compact`].
    pub fn prune(&self, only_if_automatic: bool) -> Result<Option<Removed>, VolumeError> {
        let Some(retention) = &self.retention else {
            return Err(VolumeError::ReadOnly);
        };
        self.check_open()?;
        self.driver.check_fenced()?;
        self.runtime.block_on(async {
            self.check_retention().await?;
            retention.ask(only_if_automatic).await
        })
    }

    /// Ends the sharing of a clone: it gets copies of all that it has inherited, and its parent is told that it need keep nothing for it.
    /// Clients go first. `control` ends it while it copies; what is copied by then is found by the next attempt. Blocks the calling thread;
    /// never call it on the runtime.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] when the volume is no clone, has clones of its own, or is read by others, for whom its parent goes on
    /// keeping what they read; [`VolumeError::ReadOnly`]; [`VolumeError::Fenced`]; [`VolumeError::Closed`] when the volume is closed
    /// meanwhile, or `control` says so; when a store fails.
    pub fn flatten(&self, control: &Arc<Control>) -> Result<Flattened, VolumeError> {
        let Some(flatten) = &self.flatten else {
            return Err(VolumeError::ReadOnly);
        };
        self.check_open()?;
        self.driver.check_fenced()?;
        self.runtime.block_on(flatten.ask(control.clone()))
    }

    /// How long something must not have been needed before it is removed.
    pub fn retention_grace(&self) -> Duration {
        self.retention_grace
    }

    /// Refuses a volume of which nothing is ever removed.
    async fn check_retention(&self) -> Result<(), VolumeError> {
        let Some(store) = &self.store else {
            return Ok(());
        };
        match retention::load_policy(store).await? {
            Some(_) => Ok(()),
            None => Err(VolumeError::InvalidInput(format!(
                "every checkpoint of {0} is kept, so no space would come back: say which are with hypernbd retention set {0}",
                store.url
            ))),
        }
    }
}
