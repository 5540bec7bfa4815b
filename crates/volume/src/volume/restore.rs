//! What an earlier server answered and did not publish, applied to the volume that is opened.

use std::sync::Arc;
use std::time::Duration;

use super::Volume;
use crate::buffer_file::{BufferDir, Kind, Recovered};
use crate::error::VolumeError;
use crate::lease::{self, Lease};
use crate::options::VolumeOptions;
use crate::units::format_size;
use crate::url::VolumeUrl;
use crate::volume_id::VolumeId;

/// How long a volume that could not be restored may take to close.
const CLOSE_MAX: Duration = Duration::from_secs(10);

/// The directory of the buffer file, claimed before the lease is taken; `None` without one.
pub(super) struct Claim {
    dir: Option<BufferDir>,
    /// The token that the lease is to have.
    pub token: String,
}

impl Claim {
    /// Claims the directory, if there is to be one.
    ///
    /// # Errors
    /// As [`BufferDir::claim`].
    pub fn new(options: &VolumeOptions, volume_id: VolumeId, url: &VolumeUrl) -> Result<Self, VolumeError> {
        let token = lease::new_token();
        let dir = options.write_buffer_dir.as_ref();
        let url = url.to_string();
        let dir = dir.map(|path| BufferDir::claim(path, volume_id, &url, options.write_buffer_bytes, &token));
        Ok(Self {
            dir: dir.transpose()?,
            token,
        })
    }

    /// What is to be applied, now that the lease is taken.
    ///
    /// # Errors
    /// As [`BufferDir::settle`].
    pub fn settle(&mut self, lease: &Lease) -> Result<Option<Recovered>, VolumeError> {
        match &mut self.dir {
            Some(dir) => dir.settle(lease.predecessor()),
            None => Ok(None),
        }
    }

    /// Applies what was recovered, publishes it, and keeps the volume's changes from then on.
    ///
    /// # Errors
    /// When that fails; the volume is closed then, and what was recovered is still in the file.
    pub async fn keep(self, volume: &Arc<Volume>, recovered: Option<Recovered>) -> Result<(), VolumeError> {
        let Some(mut dir) = self.dir else { return Ok(()) };
        let volume = volume.clone();
        // The volume's requests block the thread that makes them.
        let kept = tokio::task::spawn_blocking(move || {
            let kept = recovered.map_or(Ok(()), |recovered| volume.restore(&recovered));
            let kept = kept.and_then(|()| dir.begin());
            match kept {
                Ok(kept) => {
                    let kept = Arc::new(kept);
                    volume.overlay.keep_in(kept.clone());
                    let _ = volume.kept.set(kept);
                    Ok(())
                }
                Err(e) => {
                    // Its first failure says what is wrong.
                    let _ = volume.close(CLOSE_MAX);
                    Err(e)
                }
            }
        });
        kept.await
            .map_err(|e| VolumeError::Internal(format!("restoring the write buffer: {e}")))?
    }
}

impl Volume {
    fn restore(&self, recovered: &Recovered) -> Result<(), VolumeError> {
        let (changes, bytes) = recovered.amount();
        recovered.each(|change| match change.kind {
            Kind::Write => self.write(change.offset_bytes, &change.data, false),
            Kind::Zero => self.zero(change.offset_bytes, change.len_bytes, false),
            Kind::Trim => self.trim(change.offset_bytes, change.len_bytes, false),
        })?;
        self.runtime.block_on(self.driver.publish_all())?;
        // Worth saying by default: the server before this one did not end cleanly.
        log::warn!(
            "recovered {changes} changes of {} that the server before this one had answered and not published",
            format_size(bytes)
        );
        Ok(())
    }
}
