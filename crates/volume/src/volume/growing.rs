//! Growth of a volume while it is open.

use std::sync::Arc;

use futures::FutureExt;

use super::Volume;
use crate::base::error::VolumeError;
use crate::lease::Grow;

/// Grows the volume for who asks through its lease, as long as it is open.
pub(super) fn grower(volume: &Arc<Volume>) -> Grow {
    let volume = Arc::downgrade(volume);
    Arc::new(move |size_bytes| {
        let volume = volume.clone();
        let grown = async move {
            let Some(volume) = volume.upgrade() else {
                return Err(VolumeError::Closed.to_string());
            };
            let grown = move || match volume.grow(size_bytes) {
                Ok(()) => Ok(volume.size_bytes()),
                Err(e @ VolumeError::Timeout { .. }) => Err(format!("{}; it may still come", e.chain())),
                Err(e) => Err(e.chain()),
            };
            let grown = tokio::task::spawn_blocking(grown).await;
            grown.unwrap_or_else(|e| Err(format!("it ended early: {e}")))
        };
        grown.boxed()
    })
}

impl Volume {
    /// Grows the volume to `size_bytes`, as a checkpoint of its own; what is unpublished is published first. Whoever asks for the size
    /// from then on is told the new one. Requests go on meanwhile. It goes on after a time-out, and may be asked for again. Blocks the
    /// calling thread; never call it on the runtime.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] for a smaller size, or where the volume does not end at a block's border: its last block is stored
    /// short then, and is made longer by `hypernbd resize` of a volume that is not served. [`VolumeError::ReadOnly`];
    /// [`VolumeError::Timeout`] after `io_timeout`; [`VolumeError::Fenced`].
    pub fn grow(&self, size_bytes: u64) -> Result<(), VolumeError> {
        if self.is_read_only {
            return Err(VolumeError::ReadOnly);
        }
        self.check_open()?;
        if !self
            .geometry()
            .grows_to(size_bytes)
            .map_err(VolumeError::InvalidInput)?
        {
            return Ok(());
        }
        self.engine.check_write()?;
        // What a log or the buffer file holds names the checkpoint that it was made upon, which is kept as long as few follow it.
        self.publish()?;
        let grown = async { tokio::time::timeout(self.io_timeout, self.driver.grow(size_bytes)).await };
        self.runtime.block_on(grown).unwrap_or_else(|_| {
            Err(VolumeError::Timeout {
                operation: "growing",
                waited: self.io_timeout,
                last: "none, the store is slow".to_owned(),
            })
        })
    }
}
