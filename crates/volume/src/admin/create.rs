//! `create`: a new, empty volume.

use super::{VolumeInfo, delete, info, label};
use crate::engine::container;
use crate::error::VolumeError;
use crate::options::StoreOptions;
use crate::store;
use crate::url::VolumeUrl;

/// Block size of a volume unless another is asked for; chosen by measurement (docs/benchmarking.md).
pub const DEFAULT_BLOCK_SIZE_BYTES: u32 = 4096;
/// The format's smallest block.
const BLOCK_SIZE_MIN: u32 = 4 << 10;
/// A block larger than an NBD request cannot be written whole by any client.
const BLOCK_SIZE_MAX: u32 = 32 << 20;
/// NBD sizes are signed 64-bit numbers; a block device of the Linux kernel ends a sector below that.
const SIZE_MAX: u64 = i64::MAX as u64 - 511;

/// What to create.
#[derive(Debug, Clone, Copy)]
pub struct CreateOptions {
    /// Size of the volume in bytes; space is taken as data is written.
    pub size_bytes: u64,
    /// Size of a data block in bytes: a power of two from 4 KiB to 32 MiB, fixed for the volume's life.
    pub block_size_bytes: u32,
}

/// Checks a size and block size before anything is sent.
pub(super) fn check_size(size_bytes: u64, block_size_bytes: u32) -> Result<(), VolumeError> {
    let invalid = |text: String| Err(VolumeError::InvalidInput(text));
    if !block_size_bytes.is_power_of_two() || !(BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block_size_bytes) {
        return invalid(format!(
            "a block size of {block_size_bytes} bytes cannot be used: give a power of two from 4K to 32M"
        ));
    }
    if size_bytes > SIZE_MAX {
        return invalid(format!(
            "a size of {size_bytes} bytes is beyond what NBD can address ({SIZE_MAX})"
        ));
    }
    Ok(())
}

/// Creates a volume. Nothing is left behind when it fails.
///
/// # Errors
/// [`VolumeError::AlreadyExists`] when there is one at `url`; [`VolumeError::InvalidInput`] for a size that makes no
/// sense, before anything is written.
pub async fn create(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    options: &CreateOptions,
) -> Result<VolumeInfo, VolumeError> {
    check_size(options.size_bytes, options.block_size_bytes)?;
    let store = store::connect_for_create(url, store_options).await?;
    let size = options.size_bytes as usize;
    let block_size = options.block_size_bytes;
    let created = super::on_owner_thread({
        let store = store.clone();
        move || async move {
            let mut container = container::create(&store, block_size).await?;
            if size > 0 {
                container.truncate(size).await?;
            }
            Ok(())
        }
    })
    .await;
    match created {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(VolumeError::AlreadyExists { url: url.to_string() });
        }
        Err(e) => return Err(VolumeError::engine(format!("creating a volume at {url}"), e)),
    }
    if let Err(e) = label::ensure(&store).await {
        // Half a volume is worse than none.
        if let Err(undo) = delete::remove(&store, store_options, None).await {
            log::warn!("could not remove the half-made volume at {url}: {}", undo.chain());
        }
        return Err(e);
    }
    info(url, store_options).await
}
