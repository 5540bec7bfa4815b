//! `delete`: a volume and all that is kept beside it.

use futures::StreamExt;
use serde::Serialize;

use super::{info, label, wal};
use crate::error::{ErrorKind, VolumeError};
use crate::lease::{self, Lease};
use crate::options::{LeaseOptions, StoreOptions};
use crate::store::{self, ObjectEntry, Store};
use crate::url::VolumeUrl;

const INODE: &str = "inode";
const DELETIONS_IN_FLIGHT: usize = 16;

/// What a deletion destroys.
#[derive(Debug, Clone, Serialize)]
pub struct DeletePlan {
    /// The volume's URL.
    pub url: String,
    /// Its size in bytes, as clients see it.
    pub size_bytes: u64,
    /// Objects stored for it.
    pub objects: u64,
    /// Bytes stored for it.
    pub bytes: u64,
}

/// Says what [`delete`] would destroy.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is no volume.
pub async fn delete_plan(url: &VolumeUrl, store_options: &StoreOptions) -> Result<DeletePlan, VolumeError> {
    let store = store::connect(url, store_options).await?;
    plan(&store).await
}

async fn plan(store: &Store) -> Result<DeletePlan, VolumeError> {
    let size_bytes = match info::of_store(store).await {
        Ok(info) => info.size_bytes,
        // A deletion that was interrupted has taken the inode and left the label, which goes last.
        Err(VolumeError::NotFound { .. }) if label::load(store).await?.is_some() => 0,
        Err(e @ VolumeError::NotFound { .. }) => return Err(e),
        // A volume too damaged to be read can still be deleted.
        Err(e) => {
            log::warn!("the size of {} cannot be told: {}", store.url, e.chain());
            0
        }
    };
    let mut plan = DeletePlan {
        url: store.url.to_string(),
        size_bytes,
        objects: 0,
        bytes: 0,
    };
    for object in objects(store).await? {
        plan.objects += 1;
        plan.bytes += object.size_bytes;
    }
    Ok(plan)
}

/// Deletes the volume: its inode first, so that what an interruption leaves is no volume any more, its label last, so
/// that the deletion can be taken up again.
///
/// The write-ahead log that the volume was last served with goes too, where it can be reached. Objects below the root
/// that are not a container's are left alone.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is none, [`VolumeError::Held`] when a server has it open for writing.
pub async fn delete(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    lease_options: &LeaseOptions,
) -> Result<DeletePlan, VolumeError> {
    let store = store::connect(url, store_options).await?;
    let plan = plan(&store).await?;
    let lease = match super::take_lease(&store, store_options, lease_options).await {
        Ok(lease) => Some(lease),
        Err(e) if e.kind() == ErrorKind::Busy => return Err(e),
        // After a deletion that was interrupted there is no inode, and nothing to shut anybody out of.
        Err(e) if e.kind() == ErrorKind::NotFound => None,
        // A volume too damaged to be opened can still be deleted.
        Err(e) => {
            log::warn!(
                "it cannot be told whether a server holds {}: {}",
                store.url,
                e.chain()
            );
            None
        }
    };
    remove(&store, store_options, lease.as_deref()).await?;
    Ok(plan)
}

/// Removes what belongs to the volume.
pub(super) async fn remove(
    store: &Store,
    store_options: &StoreOptions,
    lease: Option<&Lease>,
) -> Result<(), VolumeError> {
    let inode = store.data_key(INODE);
    let label = store.meta_key(label::NAME);
    let lease_key = store.meta_key(lease::NAME);
    store.delete(&inode).await?;
    // While the marker and the label still tell which log it is.
    wal::remove_log(store, store_options, None).await;
    let rest = objects(store)
        .await?
        .into_iter()
        .filter(|o| ![&inode, &label, &lease_key].contains(&&o.key));
    let mut deletions = futures::stream::iter(rest)
        .map(|object| async move { store.delete(&object.key).await })
        .buffer_unordered(DELETIONS_IN_FLIGHT);
    while let Some(deleted) = deletions.next().await {
        deleted?;
    }
    // Held until nothing is left that another server could open.
    if let Some(lease) = lease {
        lease.forget();
    }
    store.delete(&lease_key).await?;
    store.delete(&label).await?;
    store.remove_if_empty().await?;
    Ok(())
}

/// Everything stored for the volume.
async fn objects(store: &Store) -> Result<Vec<ObjectEntry>, VolumeError> {
    let root = store.data_key("");
    let mut objects = store.list(&root).await?;
    objects.retain(|o| o.key.strip_prefix(&root).is_some_and(is_container_object));
    objects.extend(store.list(&store.meta_key("")).await?);
    Ok(objects)
}

/// Whether a name below the root is one the format uses: `inode`, `NNNNNNNNNN` or `NNNNNNNNNN.<part>`.
fn is_container_object(name: &str) -> bool {
    let is_number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let (segment, part) = name.split_once('.').unwrap_or((name, "0"));
    name == INODE || (segment.len() == 10 && is_number(segment) && is_number(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_formats_own_names_are_deleted() {
        for name in ["inode", "0000000001", "0000000001.0", "1073741823.16383"] {
            assert!(is_container_object(name), "{name}");
        }
        for name in [
            "",
            "inode.bak",
            "000000001",
            "0000000001.",
            "0000000001.x",
            "a/0000000001",
            "notes.txt",
        ] {
            assert!(!is_container_object(name), "{name}");
        }
    }
}
