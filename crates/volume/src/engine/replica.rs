//! The inode of a replica: put as a publish puts it, in the place of the very one that was read.
//!
//! It is that of a checkpoint of the original, but for the numbers that it says are used. These go up before any object with such a number
//! is put. So an opening looks for nothing above that inode among objects that are still being copied, and whoever writes to the replica
//! later never uses a number again of which a request may still be on its way.

use hyperfile::ondisk::InodeRaw;

use super::fence;
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::format::inode;
use crate::store::{ETag, Store};

/// An inode that was read, and the write of it.
pub(crate) type Adopted = (InodeRaw, ETag);

/// The inode of a checkpoint, in a container of which all numbers up to `used` may be used.
pub(crate) fn with_used(of: &InodeRaw, used: u64) -> InodeRaw {
    let mut raw = *of;
    raw.i_last_seq = raw.i_last_seq.max(used);
    // What the original's compaction attached is not for this container.
    raw.set_compacted(false);
    raw.set_compaction_pending(false);
    raw
}

/// The last number that an inode says is used.
pub(crate) fn used(raw: &InodeRaw) -> u64 {
    raw.i_last_seq
}

/// Says that all numbers up to `used` are used from now on. Nothing else of the inode changes but the time of its change.
///
/// # Errors
/// As [`replace`].
pub(crate) async fn reserve(store: &Store, there: &Adopted, used: u64) -> Result<(), VolumeError> {
    let (raw, etag) = there;
    if raw.i_last_seq >= used {
        return Ok(());
    }
    let raw = fence::changed_later(with_used(raw, used));
    replace(store, &raw, etag).await
}

/// Puts the inode in the place of the one that was read with this ETag.
///
/// # Errors
/// [`VolumeError::Fenced`] when another one is there.
pub(crate) async fn replace(store: &Store, raw: &InodeRaw, over: &ETag) -> Result<(), VolumeError> {
    let body = raw.as_u8_slice().to_vec();
    let put = store.put_if_match(&store.data_key(inode::NAME), body, over).await;
    put.map(drop).map_err(|e| match e.kind {
        StoreErrorKind::PreconditionFailed | StoreErrorKind::NotFound => VolumeError::Fenced {
            reason: format!("somebody else has written to the replica at {}", store.url),
        },
        _ => e.into(),
    })
}
