//! Names of checkpoints, as they are stored: one object for each, `<root>.meta/snapshots/<name>`.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use futures::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::store::Store;

/// The prefix of the names, below the volume's `.meta/`.
const SNAPSHOTS: &str = "snapshots/";
/// The longest name, in bytes.
const NAME_MAX_BYTES: usize = 100;
/// Number of objects that are read at once.
const READS_AT_ONCE: usize = 32;

/// The name of a snapshot: at most 100 letters, digits, `.`, `_` and `-`, of which the first is a letter, without `..`.
/// So it is never a number or a time, and can be part of a key unchanged.
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
            // `..` separates two checkpoints.
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
    /// The checkpoint. The name says nothing of another checkpoint with the same number.
    pub checkpoint: CheckpointId,
    /// When the checkpoint was published, in milliseconds since 1970-01-01 UTC, by its server's clock.
    pub published_ms: u64,
    /// When the name was given, in milliseconds since 1970-01-01 UTC, by the clock of the machine that gave it.
    pub named_ms: u64,
    /// Whether a replica has it from its original, and follows that with it. One that was given to the replica is its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_copied: bool,
}

impl Snapshot {
    /// Decodes a snapshot.
    ///
    /// # Errors
    /// A text that says what is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|e| e.to_string())
    }
}

/// The key of the snapshot of this name.
pub(crate) fn key(store: &Store, name: &SnapshotName) -> String {
    store.meta_key(&format!("{SNAPSHOTS}{name}"))
}

/// The snapshot of this name, if there is one.
///
/// # Errors
/// When the store fails, or what is stored is damaged.
pub(crate) async fn load(store: &Store, name: &SnapshotName) -> Result<Option<Snapshot>, VolumeError> {
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

/// All snapshots, in the order of their names.
///
/// # Errors
/// As [`load`].
pub(crate) async fn load_all(store: &Store) -> Result<Vec<Snapshot>, VolumeError> {
    let prefix = store.meta_key(SNAPSHOTS);
    let listed = store.list(&prefix).await?;
    let names = listed
        .iter()
        // An object whose name is not a snapshot's belongs to somebody else.
        .filter_map(|object| object.key.strip_prefix(&prefix)?.parse().ok());
    let names: Vec<SnapshotName> = names.collect();
    let loaded = stream::iter(names).map(|name| async move { load(store, &name).await });
    let loaded: Vec<Option<Snapshot>> = loaded.buffered(READS_AT_ONCE).try_collect().await?;
    Ok(loaded.into_iter().flatten().collect())
}

/// The numbers of the checkpoints that have names.
///
/// # Errors
/// As [`load`].
pub(crate) async fn named(store: &Store) -> Result<BTreeSet<u64>, VolumeError> {
    let snapshots = load_all(store).await?.into_iter();
    Ok(snapshots.map(|snapshot| snapshot.checkpoint.cno).collect())
}
