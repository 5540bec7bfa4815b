//! Growth of a volume while it is open.

use super::Volume;
use crate::base::error::VolumeError;

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
