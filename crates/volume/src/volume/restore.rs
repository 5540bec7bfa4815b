//! Applies the changes that an earlier server answered and did not publish to the volume that is being opened.

use std::sync::Arc;
use std::time::Duration;

use super::Volume;
use crate::base::checkpoint_id::{CheckpointId, NewestCheckpoint};
use crate::base::error::VolumeError;
use crate::base::units::format_size;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::buffer_file::{BufferDir, Kind, Recovered};
use crate::engine::checkpoint_stored;
use crate::lease::{self, Lease};
use crate::options::{LeaseOptions, VolumeOptions};
use crate::store::Store;

/// The longest time for closing a volume that could not be restored.
const CLOSE_MAX: Duration = Duration::from_secs(10);

/// The directory of the buffer file, claimed before the lease is taken; `None` without one.
pub(super) struct Claim {
    dir: Option<BufferDir>,
    /// The token that the lease will have.
    token: String,
}

impl Claim {
    /// Claims the directory, if one is configured.
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

    /// The options for a lease that has this token and names the directory.
    pub fn lease_options(&self, options: &VolumeOptions) -> LeaseOptions {
        let dir = options.write_buffer_dir.as_ref();
        LeaseOptions {
            token: Some(self.token.clone()),
            write_buffer_dir: dir.map(|dir| dir.display().to_string()),
            ..options.lease.clone()
        }
    }

    /// Called before the lease is put; see [`BufferDir::about_to_replace`].
    ///
    /// # Errors
    /// As [`BufferDir::about_to_replace`].
    pub fn about_to_replace(&mut self, predecessor: Option<&str>) -> Result<(), VolumeError> {
        match &mut self.dir {
            Some(dir) => dir.about_to_replace(predecessor),
            None => Ok(()),
        }
    }

    /// The changes to apply, now that the lease is taken.
    ///
    /// # Errors
    /// As [`BufferDir::settle`].
    pub fn settle(&mut self, lease: &Lease) -> Result<Option<Recovered>, VolumeError> {
        match &mut self.dir {
            Some(dir) => dir.settle(lease.predecessor()),
            None => Ok(None),
        }
    }

    /// Applies the recovered changes, publishes them, and from then on keeps the volume's changes in the buffer file.
    ///
    /// # Errors
    /// When that fails. The volume is then closed, and the recovered changes are still in the file.
    pub async fn keep(
        self,
        store: &Store,
        volume: &Arc<Volume>,
        newest: NewestCheckpoint,
        recovered: Option<Recovered>,
    ) -> Result<(), VolumeError> {
        let Some(mut dir) = self.dir else { return Ok(()) };
        let has_base = match &recovered {
            Some(recovered) => has(store, newest.get(), recovered.base()).await,
            None => Ok(true),
        };
        let volume = volume.clone();
        // The volume's requests block their calling thread.
        let kept = tokio::task::spawn_blocking(move || {
            let kept = has_base.and_then(|has_base| match recovered {
                Some(recovered) if has_base => volume.restore(&recovered),
                Some(recovered) => dir.refuse(recovered),
                None => Ok(()),
            });
            let kept = kept.and_then(|()| dir.begin(newest));
            match kept {
                Ok(kept) => {
                    let kept = Arc::new(kept);
                    volume.overlay.keep_in(kept.clone());
                    let _ = volume.kept.set(kept);
                    Ok(())
                }
                Err(e) => {
                    // The file is still needed: what is done with the volume until it was applied must find that out.
                    if let Some(lease) = &volume.lease {
                        volume.runtime.block_on(lease.release(false));
                    }
                    // Some of the changes may have been applied. Published without the others, they would take back what a log
                    // had that was replayed before (B2).
                    volume.close_unpublished(CLOSE_MAX);
                    Err(e)
                }
            }
        });
        kept.await
            .map_err(|e| VolumeError::Internal(format!("restoring the write buffer: {e}")))?
    }
}

/// Whether a container with the newest checkpoint `newest` has the checkpoint `base`. The checkpoint list may lack it,
/// because without a WAL its entries are written later.
async fn has(
    store: &Store,
    newest: Option<CheckpointId>,
    base: Option<CheckpointId>,
) -> Result<bool, VolumeError> {
    let (Some(newest), Some(base)) = (newest, base) else {
        return Ok(false);
    };
    if base.cno >= newest.cno {
        return Ok(base == newest);
    }
    // Checkpoint 0 is the volume as it was created, before all others.
    Ok(base.cno == 0 || checkpoint_stored(store, base.cno).await? == Some(base))
}

/// How often a checkpoint of what was left is waited for, as long as a flush may take each time.
const PUBLISH_TRIES: u32 = 4;

impl Volume {
    fn restore(&self, recovered: &Recovered) -> Result<(), VolumeError> {
        let (changes, bytes) = recovered.amount();
        self.engine.check_write()?;
        // A damaged change is found before any is applied.
        recovered.each(|change| self.check_range(change.offset_bytes, change.len_bytes))?;
        // The driver hears of none of them, so that all of them come into one checkpoint. The older ones may take back what a
        // log had that is published by now, and the newer ones bring it again: nothing in between may ever be a checkpoint (B2).
        recovered.each(|change| {
            match change.kind {
                Kind::Write => self.overlay.write(change.offset_bytes, &change.data),
                Kind::Zero => self.overlay.zero(change.offset_bytes, change.len_bytes),
                Kind::Trim => self.overlay.trim(change.offset_bytes, change.len_bytes),
            };
            Ok(())
        })?;
        let mut published = self.runtime.block_on(self.driver.publish_all());
        for _ in 1..PUBLISH_TRIES {
            // Given up, it would be applied and published from the start by the next opening, which is no faster.
            if matches!(published, Err(VolumeError::Timeout { .. })) {
                published = self.runtime.block_on(self.driver.publish_all());
            }
        }
        published?;
        // This is a warning because the previous server did not end cleanly.
        log::warn!(
            "recovered {changes} changes of {} that the server before this one had answered and not published",
            format_size(bytes)
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::geometry::Geometry;
    use crate::engine::Engine;
    use crate::testing::memory_engine::MemoryEngine;
    use crate::volume::Parts;

    /// A change that can no longer be read ends the restoring in the middle.
    #[test]
    fn half_of_what_was_left_is_never_published() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .unwrap();
        let _entered = runtime.enter();
        for publishes in [false, true] {
            let engine = MemoryEngine::new(Geometry::new(1 << 20, 4096));
            let options = VolumeOptions::default();
            let volume = Volume::with_parts(Arc::new(engine.clone()), Parts::default(), &options);
            volume.overlay.write(0, &[7; 4096]);
            match publishes {
                true => volume.close(CLOSE_MAX).unwrap(),
                false => volume.close_unpublished(CLOSE_MAX),
            }
            let mut out = [1; 4096];
            runtime.block_on(engine.read(0, &mut out)).unwrap();
            assert_eq!(out == [7; 4096], publishes);
        }
    }
}
