//! Shutting older writers out of a container: its inode is written anew.
//!
//! A writer publishes by replacing the inode that it has read, on condition that it is still that one (`If-Match`).
//! After a rewrite every writer that read the inode before is refused, whatever it is doing and whatever it believes.

use hyperfile::ondisk::InodeRaw;

use crate::error::VolumeError;
use crate::store::{Store, StoreErrorKind};

/// Publishes of the old owner that may come in between.
const ATTEMPTS_MAX: u32 = 20;
const NS_A_SECOND: u32 = 1_000_000_000;
/// User metadata that belongs to the inode: a compaction attached to it. The writer's own mark must go: by it the old
/// owner would take the inode for its own.
const METADATA_KEPT: &str = hyperfile::compaction::METADATA_KEY;

/// Writes the inode anew. Nothing in it changes but the time of its last change, by one nanosecond, so that the old
/// owner can tell it from what it wrote itself.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is none.
pub(crate) async fn rewrite_inode(store: &Store) -> Result<(), VolumeError> {
    let key = store.data_key("inode");
    for _ in 0..ATTEMPTS_MAX {
        let not_found = || VolumeError::NotFound {
            url: store.url.to_string(),
        };
        let info = store.head(&key).await?.ok_or_else(not_found)?;
        let (body, etag) = store.get(&key).await?.ok_or_else(not_found)?;
        if etag != info.etag {
            continue;
        }
        let body = later(&key, &body)?;
        let metadata = info
            .metadata
            .into_iter()
            .filter(|(name, _)| name == METADATA_KEPT)
            .collect();
        match store.put_if_match_with(&key, body, &etag, metadata).await {
            Ok(_) => return Ok(()),
            Err(e) if e.kind == StoreErrorKind::PreconditionFailed => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(VolumeError::Fenced {
        reason: format!("another server goes on publishing to {}", store.url),
    })
}

/// The inode with its time of change one nanosecond later.
fn later(key: &str, body: &[u8]) -> Result<Vec<u8>, VolumeError> {
    let mut raw = InodeRaw::default();
    let slot = raw.as_mut_u8_slice();
    if body.len() != slot.len() {
        return Err(VolumeError::Corrupt {
            what: format!("the volume's inode {key}"),
            reason: format!("it has {} bytes instead of {}", body.len(), slot.len()),
        });
    }
    slot.copy_from_slice(body);
    raw.i_mtime_nsec += 1;
    if raw.i_mtime_nsec >= NS_A_SECOND {
        raw.i_mtime_nsec = 0;
        raw.i_mtime += 1;
    }
    Ok(raw.as_u8_slice().to_vec())
}
