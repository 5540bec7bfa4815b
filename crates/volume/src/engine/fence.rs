//! Fences older writers: it rewrites the container's inode.
//!
//! A writer publishes by replacing the inode that it has read, on condition that the inode is still the same
//! (`If-Match`). After a rewrite, every writer that read the inode before is refused, whatever it does and whatever it
//! assumes.

use hyperfile::ondisk::InodeRaw;

use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::format::inode;
use crate::store::Store;

/// The highest number of attempts. An attempt fails when the old owner publishes in between.
const ATTEMPTS_MAX: u32 = 20;
const NS_A_SECOND: u32 = 1_000_000_000;
/// User metadata that stays with the inode: a compaction attached to it. The old owner's write mark must go, because by
/// that mark the old owner would recognise the inode as its own write.
const METADATA_KEPT: &str = hyperfile::compaction::METADATA_KEY;

/// Rewrites the inode. Only the time of its last change moves, by one nanosecond, so that the old owner can distinguish
/// it from its own writes. The time of the last write stays, because it is part of what identifies the checkpoint
/// ([`InodeCheck`](crate::base::checkpoint_id::InodeCheck)).
///
/// # Errors
/// [`VolumeError::NotFound`] when there is no inode.
pub(crate) async fn rewrite_inode(store: &Store) -> Result<(), VolumeError> {
    let key = store.data_key(inode::NAME);
    for _ in 0..ATTEMPTS_MAX {
        let (raw, info) = inode::load(store).await?;
        let body = changed_later(raw).as_u8_slice().to_vec();
        let metadata = info
            .metadata
            .into_iter()
            .filter(|(name, _)| name == METADATA_KEPT)
            .collect();
        match store.put_if_match_with(&key, body, &info.etag, metadata).await {
            Ok(_) => return Ok(()),
            Err(e) if e.kind == StoreErrorKind::PreconditionFailed => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(VolumeError::Fenced {
        reason: format!("another server goes on publishing to {}", store.url),
    })
}

/// The inode with a change time that is one nanosecond later.
pub(super) fn changed_later(mut raw: InodeRaw) -> InodeRaw {
    raw.i_ctime_nsec += 1;
    if raw.i_ctime_nsec >= NS_A_SECOND {
        raw.i_ctime_nsec = 0;
        raw.i_ctime += 1;
    }
    raw
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use hyperfile::config::HyperFileMetaConfig;

    use super::*;
    use crate::base::url::VolumeUrl;
    use crate::store;
    use crate::store::options::StoreOptions;

    async fn store_with_inode(raw: &InodeRaw, metadata: &[(&str, &str)]) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
        let store = store::connect_for_create(&url, &StoreOptions::default())
            .await
            .unwrap();
        let key = store.data_key(inode::NAME);
        let etag = store.put(&key, "").await.unwrap();
        let metadata = metadata
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect::<HashMap<_, _>>();
        let body = raw.as_u8_slice().to_vec();
        store
            .put_if_match_with(&key, body, &etag, metadata)
            .await
            .unwrap();
        (dir, store)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn only_the_time_of_change_and_the_writers_mark_are_others_afterwards() {
        for (ns, later_s, later_ns) in [(5, 1000, 6), (NS_A_SECOND - 1, 1001, 0)] {
            let mut raw = InodeRaw {
                i_size: 7,
                i_meta_config: HyperFileMetaConfig::default().as_u32(),
                i_last_seq: 3,
                i_last_cno: 3,
                i_mtime: 7,
                i_ctime: 1000,
                i_ctime_nsec: ns,
                ..InodeRaw::default()
            };
            let metadata = [(METADATA_KEPT, "1 2 3"), ("hf-write-mark", "the old owner's")];
            let (_dir, store) = store_with_inode(&raw, &metadata).await;
            let key = store.data_key(inode::NAME);
            let before = store.head(&key).await.unwrap().unwrap();
            rewrite_inode(&store).await.unwrap();
            let after = store.head(&key).await.unwrap().unwrap();
            assert_ne!(after.etag, before.etag);
            assert_eq!(
                after.metadata.get(METADATA_KEPT).map(String::as_str),
                Some("1 2 3")
            );
            assert!(!after.metadata.values().any(|v| v == "the old owner's"));
            (raw.i_ctime, raw.i_ctime_nsec) = (later_s, later_ns);
            let (body, _) = store.get(&key).await.unwrap().unwrap();
            assert!(body == raw.as_u8_slice());
            // The condition with which the old owner would publish.
            let stale = store.put_if_match(&key, "", &before.etag).await.unwrap_err();
            assert_eq!(stale.kind, StoreErrorKind::PreconditionFailed);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn no_inode_is_made() {
        let (_dir, store) = store_with_inode(&InodeRaw::default(), &[]).await;
        store.delete(&store.data_key(inode::NAME)).await.unwrap();
        let missing = rewrite_inode(&store).await.unwrap_err();
        assert!(matches!(missing, VolumeError::NotFound { .. }), "{missing}");
        assert!(store.list("").await.unwrap().is_empty());
    }
}
