//! Snapshots, that is names for checkpoints: create, list, delete.

use super::list::{Point, find};
use super::{At, AtError};
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::base::url::VolumeUrl;
use crate::engine::parents;
use crate::meta::snapshots::{Snapshot, SnapshotName, key, load, load_all};
use crate::options::StoreOptions;
use crate::retention::ensure_kept;
use crate::store::Store;

/// Gives a checkpoint a name. Returns `None` when the name is taken.
///
/// # Errors
/// When the store fails.
pub(crate) async fn put(
    store: &Store,
    name: &SnapshotName,
    point: &Point,
) -> Result<Option<Snapshot>, VolumeError> {
    let snapshot = Snapshot {
        name: name.clone(),
        checkpoint: point.id(),
        published_ms: point.published_ms,
        named_ms: now_ms(),
        is_copied: false,
    };
    let body = serde_json::to_vec(&snapshot).map_err(|e| VolumeError::Internal(e.to_string()))?;
    match store.put_create_only(&key(store, name), body).await {
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => {
            // The answer to an earlier attempt may have been lost.
            Ok(load(store, name).await?.filter(|there| *there == snapshot))
        }
        other => Ok(other.map(|_| Some(snapshot))?),
    }
}

/// A name with this prefix that nobody has used.
///
/// # Errors
/// When the result is not a valid name.
pub(crate) fn free_name(start: &str) -> Result<SnapshotName, VolumeError> {
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%3fZ");
    let name = format!("{start}{now}").parse();
    name.map_err(VolumeError::Internal)
}

/// Gives a name to a checkpoint, or to the newest published one when `at` is `None`.
///
/// # Errors
/// [`VolumeError::NoCheckpoint`] when there is no such checkpoint, [`VolumeError::InvalidInput`] when the name is taken.
pub async fn create(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    name: &SnapshotName,
    at: Option<&At>,
) -> Result<Snapshot, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let point = find(&store, at).await?;
    let snapshot = put(&store, name, &point).await?.ok_or_else(|| {
        VolumeError::InvalidInput(format!(
            "{url} has a snapshot {name} already: choose another name, or delete that one with hypernbd snapshot delete \
             {url} {name}"
        ))
    })?;
    // A removal of the checkpoint may have begun before it got its name.
    if let Err(e) = ensure_kept(&store, point.id()).await {
        store.delete(&key(&store, name)).await?;
        return Err(e);
    }
    Ok(snapshot)
}

/// The snapshots of a volume, in the order of their names.
///
/// # Errors
/// When the store fails.
pub async fn snapshots(url: &VolumeUrl, store_options: &StoreOptions) -> Result<Vec<Snapshot>, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    // That there is a volume.
    crate::format::inode::load(&store).await?;
    load_all(&store).await
}

/// Removes a name. The checkpoint stays.
///
/// # Errors
/// [`VolumeError::NoCheckpoint`] when there is no such name.
pub async fn delete(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    name: &SnapshotName,
) -> Result<(), VolumeError> {
    let store = parents::connect(url, store_options).await?;
    if load(&store, name).await?.is_none() {
        return Err(VolumeError::NoCheckpoint {
            url: url.to_string(),
            at: format!("@{name}"),
        });
    }
    store.delete(&key(&store, name)).await?;
    Ok(())
}

impl From<AtError> for VolumeError {
    fn from(error: AtError) -> Self {
        Self::InvalidInput(error.to_string())
    }
}
