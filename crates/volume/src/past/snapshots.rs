//! Names of checkpoints: one small object each, `<root>.meta/snapshots/<name>`.

use std::fmt;
use std::str::FromStr;

use futures::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use super::list::{Point, find};
use super::{At, AtError};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::base::url::VolumeUrl;
use crate::options::StoreOptions;
use crate::store::{self, Store};

/// Where they are, below the volume's `.meta/`.
const SNAPSHOTS: &str = "snapshots/";
/// The longest name, in bytes.
const NAME_MAX_BYTES: usize = 100;
/// Objects read at once.
const READS_AT_ONCE: usize = 32;

/// The name of a snapshot: letters, digits, `.`, `_` and `-`, 100 at most, the first a letter, no `..`. So it is never a number or a
/// time, and is part of a key as it stands.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotName(String);

impl FromStr for SnapshotName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        let is_name = text.len() <= NAME_MAX_BYTES
            && text.as_bytes().first().is_some_and(u8::is_ascii_alphabetic)
            && text.bytes().all(is_known)
            // Stands between two checkpoints.
            && !text.contains("..");
        match is_name {
            true => Ok(Self(text.to_owned())),
            false => Err(format!(
                "a snapshot's name has letters, digits, '.', '_' and '-', {NAME_MAX_BYTES} at most, and begins with a letter"
            )),
        }
    }
}

impl TryFrom<String> for SnapshotName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<SnapshotName> for String {
    fn from(name: SnapshotName) -> Self {
        name.0
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name on a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name.
    pub name: SnapshotName,
    /// The checkpoint, which it is of alone: of another one with that number it says nothing.
    pub checkpoint: CheckpointId,
    /// When the checkpoint was published, in milliseconds since 1970-01-01 UTC, by its server's clock.
    pub published_ms: u64,
    /// When the name was given, in the same way.
    pub named_ms: u64,
}

impl Snapshot {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|e| e.to_string())
    }
}

fn key(store: &Store, name: &SnapshotName) -> String {
    store.meta_key(&format!("{SNAPSHOTS}{name}"))
}

/// The snapshot of this name, if there is one.
///
/// # Errors
/// When the store fails, or what is stored is damaged.
pub(super) async fn load(store: &Store, name: &SnapshotName) -> Result<Option<Snapshot>, VolumeError> {
    let key = key(store, name);
    let Some((body, _)) = store.get(&key).await? else {
        return Ok(None);
    };
    let snapshot = Snapshot::decode(&body).and_then(|snapshot| match snapshot.name == *name {
        true => Ok(snapshot),
        false => Err(format!("it is of the name {}", snapshot.name)),
    });
    snapshot.map(Some).map_err(|reason| VolumeError::Corrupt {
        what: format!("the snapshot {key}"),
        reason,
    })
}

/// All names, in their order.
///
/// # Errors
/// As [`load`].
pub(super) async fn load_all(store: &Store) -> Result<Vec<Snapshot>, VolumeError> {
    let prefix = store.meta_key(SNAPSHOTS);
    let listed = store.list(&prefix).await?;
    let names = listed
        .iter()
        // What is no name is somebody else's object.
        .filter_map(|object| object.key.strip_prefix(&prefix)?.parse().ok());
    let names: Vec<SnapshotName> = names.collect();
    let loaded = stream::iter(names).map(|name| async move { load(store, &name).await });
    let loaded: Vec<Option<Snapshot>> = loaded.buffered(READS_AT_ONCE).try_collect().await?;
    Ok(loaded.into_iter().flatten().collect())
}

/// Gives a checkpoint a name. `None` when the name is taken.
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
    };
    let body = serde_json::to_vec(&snapshot).map_err(|e| VolumeError::Internal(e.to_string()))?;
    match store.put_create_only(&key(store, name), body).await {
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => {
            // The answer to an earlier sending may have been lost.
            Ok(load(store, name).await?.filter(|there| *there == snapshot))
        }
        other => Ok(other.map(|_| Some(snapshot))?),
    }
}

/// A name that begins so and that nobody has used.
///
/// # Errors
/// When it is no name.
pub(crate) fn free_name(start: &str) -> Result<SnapshotName, VolumeError> {
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%S%3fZ");
    let name = format!("{start}{now}").parse();
    name.map_err(VolumeError::Internal)
}

/// Gives a name to a checkpoint: the newest published when `at` is `None`.
///
/// # Errors
/// [`VolumeError::NoCheckpoint`] when there is no such checkpoint, [`VolumeError::InvalidInput`] when the name is taken.
pub async fn create(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    name: &SnapshotName,
    at: Option<&At>,
) -> Result<Snapshot, VolumeError> {
    let store = store::connect(url, store_options).await?;
    let point = find(&store, at).await?;
    put(&store, name, &point).await?.ok_or_else(|| {
        VolumeError::InvalidInput(format!(
            "{url} has a snapshot {name} already: choose another name, or delete that one with hypernbd snapshot delete \
             {url} {name}"
        ))
    })
}

/// The snapshots of a volume, in the order of their names.
///
/// # Errors
/// When the store fails.
pub async fn snapshots(url: &VolumeUrl, store_options: &StoreOptions) -> Result<Vec<Snapshot>, VolumeError> {
    let store = store::connect(url, store_options).await?;
    // That there is a volume.
    crate::format::inode::load(&store).await?;
    load_all(&store).await
}

/// Takes a name away; the checkpoint stays.
///
/// # Errors
/// [`VolumeError::NoCheckpoint`] when there is no such name.
pub async fn delete(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    name: &SnapshotName,
) -> Result<(), VolumeError> {
    let store = store::connect(url, store_options).await?;
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
