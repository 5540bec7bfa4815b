//! A volume's label, `<root>.meta/volume.json`: its identity, and where it was made.
//!
//! The id is made when the volume is created, or at the first read-write open of a volume that was made elsewhere. So a
//! volume that is deleted and created again at the same URL never uses the caches or the WAL of its predecessor. A
//! label that names another place than the one where it is found belongs to a copy of the volume, or to a volume that
//! was moved: see [`Found`].

use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::lost_label;
use crate::base::checkpoint_id::InodeCheck;
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::base::stored_text;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::store::{ETag, Store};

/// The label's name below the volume's `.meta/`.
pub(crate) const NAME: &str = "volume.json";

/// The place of a volume. A copy does not share it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Location {
    /// A bucket and the prefix in it. The server's address may change.
    Bucket {
        /// Name of the bucket.
        bucket: String,
        /// Prefix of the volume's keys.
        prefix: String,
    },
    /// A directory, identified by properties that a copy does not keep, and that neither a rename nor another mount
    /// point changes.
    Directory {
        /// Its inode number.
        inode: u64,
        /// When it was made, in nanoseconds since 1970-01-01 UTC, if the file system says so.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        born_ns: Option<u64>,
    },
}

impl Location {
    /// The place of `store`.
    ///
    /// # Errors
    /// When its directory cannot be read.
    pub(crate) fn of(store: &Store) -> Result<Self, VolumeError> {
        match &store.url {
            VolumeUrl::S3 { bucket, prefix } => Ok(Self::Bucket {
                bucket: bucket.clone(),
                prefix: prefix.clone(),
            }),
            VolumeUrl::File { path } => {
                let looked = std::fs::metadata(path).map_err(|e| {
                    VolumeError::engine(format!("looking at the directory {}", path.display()), e)
                })?;
                let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok();
                Ok(Self::Directory {
                    inode: looked.ino(),
                    born_ns: looked.created().ok().and_then(since).map(|t| t.as_nanos() as u64),
                })
            }
        }
    }

    /// Whether both are the same place, as far as can be told.
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (
                Self::Directory {
                    inode: a,
                    born_ns: Some(born_a),
                },
                Self::Directory {
                    inode: b,
                    born_ns: Some(born_b),
                },
            ) => (a, born_a) == (b, born_b),
            (Self::Directory { inode: a, .. }, Self::Directory { inode: b, .. }) => a == b,
            (a, b) => a == b,
        }
    }
}

/// What stands in a clone's label where others have a number, so that a release which knows no clones says this instead of
/// taking the clone for a whole volume.
const CLONE: &str = "a clone, which takes hypernbd 0.3.0 or later";

/// The volume that a replica follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Original {
    /// Where it was when the replica was made, for people.
    #[serde(deserialize_with = "stored_text::printable")]
    pub url: String,
    /// Its id.
    pub volume_id: VolumeId,
}

/// The label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StoredLabel", into = "StoredLabel")]
pub struct Label {
    /// The volume's id.
    pub volume_id: VolumeId,
    /// When the label was made, in milliseconds since 1970-01-01 UTC.
    pub created_ms: u64,
    /// The check value of the container as it was made, before its first checkpoint. None in labels of earlier releases
    /// and of volumes made by other tools.
    pub origin: Option<InodeCheck>,
    /// Where the volume was when it got its id. None in labels of earlier releases, until the first open of this one.
    pub place: Option<Location>,
    /// The id of the volume that this one is a copy of.
    pub parent: Option<VolumeId>,
    /// A number that a deletion drew which is under way, or was interrupted before it removed anything.
    pub deletion: Option<u64>,
    /// Whether the volume is a clone, and shares objects of the volumes that its origin names.
    pub is_clone: bool,
    /// The volume that this one follows, as its replica. The first owner that writes to the replica takes this away.
    pub replica_of: Option<Original>,
}

/// A label as it is stored.
#[derive(Serialize, Deserialize)]
struct StoredLabel {
    volume_id: VolumeId,
    created_ms: CreatedMs,
    /// When the label of a clone was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    made_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    origin: Option<InodeCheck>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    place: Option<Location>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    parent: Option<VolumeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    deletion: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replica_of: Option<Original>,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum CreatedMs {
    At(u64),
    OfClone(String),
}

impl TryFrom<StoredLabel> for Label {
    type Error = String;

    fn try_from(stored: StoredLabel) -> Result<Self, String> {
        let (created_ms, is_clone) = match (stored.created_ms, stored.made_ms) {
            (CreatedMs::At(ms), None) => (ms, false),
            (CreatedMs::OfClone(text), Some(ms)) if text == CLONE => (ms, true),
            _ => return Err("when it was made is neither that of a volume nor of a clone".to_owned()),
        };
        Ok(Self {
            volume_id: stored.volume_id,
            created_ms,
            origin: stored.origin,
            place: stored.place,
            parent: stored.parent,
            deletion: stored.deletion,
            is_clone,
            replica_of: stored.replica_of,
        })
    }
}

impl From<Label> for StoredLabel {
    fn from(label: Label) -> Self {
        let (created_ms, made_ms) = match label.is_clone {
            false => (CreatedMs::At(label.created_ms), None),
            true => (CreatedMs::OfClone(CLONE.to_owned()), Some(label.created_ms)),
        };
        Self {
            volume_id: label.volume_id,
            created_ms,
            made_ms,
            origin: label.origin,
            place: label.place,
            parent: label.parent,
            deletion: label.deletion,
            replica_of: label.replica_of,
        }
    }
}

/// A label that was found, with the place where it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// The contents of the label.
    pub label: Label,
    version: ETag,
    here: Location,
}

impl Found {
    /// Whether the volume is a copy, or was moved. Objects elsewhere that carry its id may then belong to the original.
    pub fn is_elsewhere(&self) -> bool {
        self.label
            .place
            .as_ref()
            .is_some_and(|place| !place.is_same(&self.here))
    }
}

/// The check value of a container that has had no checkpoint since it was created.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unpublished(pub InodeCheck);

/// Whether this is the label of the volume with this id, written out; nothing when it cannot be read. A copy that gets an id of its own
/// goes on as what it is.
pub(crate) fn is_of(body: &[u8], volume_id: &str) -> Option<bool> {
    let is_it = |id: VolumeId| id.to_string() == volume_id;
    let label = Label::decode(body).ok()?;
    Some(is_it(label.volume_id) || label.parent.is_some_and(is_it))
}

/// Loads the label, if there is one.
///
/// # Errors
/// When the store fails or the object is not a valid label.
pub async fn load(store: &Store) -> Result<Option<Label>, VolumeError> {
    Ok(find(store).await?.map(|found| found.label))
}

/// As [`load`], with the place where the volume is now.
///
/// # Errors
/// As [`load`].
pub(crate) async fn find(store: &Store) -> Result<Option<Found>, VolumeError> {
    let key = store.meta_key(NAME);
    let Some((body, version)) = store.get(&key).await? else {
        return Ok(None);
    };
    let label = Label::decode(&body).map_err(|reason| VolumeError::Corrupt {
        what: format!("the label {key}"),
        reason,
    })?;
    Ok(Some(Found {
        label,
        version,
        here: Location::of(store)?,
    }))
}

/// Makes or updates the label of a volume that is about to be written to. A copy gets an id of its own, and keeps the
/// original's id as its parent. With `adopt` it keeps its id, as a volume that was moved, or as one that lost its label and whose clones
/// know it by that. `unpublished` is the check value of a container that has no checkpoint. If several servers make the label at once, one
/// succeeds, and all return that one's label.
///
/// # Errors
/// As [`load`]; [`VolumeError::Corrupt`] for a volume with clones that lost its label, without `adopt`.
pub(crate) async fn settle(
    store: &Store,
    found: Option<Found>,
    unpublished: Option<Unpublished>,
    adopt: bool,
) -> Result<Label, VolumeError> {
    let mut found = found;
    loop {
        let Some(there) = found.take() else {
            let new = Label::new(store, unpublished.map(|u| u.0))?;
            let label = match lost_label::id_to_keep(store, adopt).await? {
                Some(volume_id) => Label { volume_id, ..new },
                None => new,
            };
            match store
                .put_create_only(&store.meta_key(NAME), label.encode()?)
                .await
            {
                Ok(_) => return Ok(label),
                Err(e) if e.kind == StoreErrorKind::PreconditionFailed => {
                    found = find(store).await?;
                    continue;
                }
                Err(e) => return Err(e.into()),
            }
        };
        let label = there.brought_up(unpublished, adopt);
        if label == there.label {
            return Ok(label);
        }
        match store
            .put_if_match(&store.meta_key(NAME), label.encode()?, &there.version)
            .await
        {
            Ok(_) => {
                if label.volume_id != there.label.volume_id {
                    log::warn!(
                        "{} is a copy of volume {}, made elsewhere: it is volume {} from now on (adopt=yes says that it \
                         was moved)",
                        store.url,
                        there.label.volume_id,
                        label.volume_id
                    );
                }
                return Ok(label);
            }
            // Another server wrote the label first.
            Err(e) if e.kind == StoreErrorKind::PreconditionFailed => found = find(store).await?,
            Err(e) => return Err(e.into()),
        }
    }
}

impl Found {
    /// The label with all updates that it needs.
    fn brought_up(&self, unpublished: Option<Unpublished>, adopt: bool) -> Label {
        let mut label = self.label.clone();
        // The deletion that left its number here has removed nothing. Without the number it removes nothing later
        // either.
        label.deletion = None;
        // Other tools that create a container again do not know the label.
        if let Some(Unpublished(check)) = unpublished {
            label.origin = Some(check);
        }
        if self.is_elsewhere() && !adopt {
            label.parent = Some(std::mem::replace(&mut label.volume_id, VolumeId::random()));
            label.created_ms = now_ms();
            label.replica_of = None;
        }
        if label.place.is_none() || self.is_elsewhere() {
            label.place = Some(self.here.clone());
        }
        label
    }
}

/// This volume is no clone any more: it has all that it needs itself. For the owner of its lease. Since that looked at the lease another
/// volume may have been made at the place, which has none of the copies: its label stays.
///
/// # Errors
/// [`VolumeError::Interfered`] when somebody else changes the label, or it is another volume's.
pub(crate) async fn end_sharing(store: &Store, volume_id: VolumeId) -> Result<(), VolumeError> {
    let found = find(store).await?;
    let there = found.filter(|found| found.label.volume_id == volume_id);
    let there = there.ok_or_else(|| interfered(store))?;
    let label = Label {
        is_clone: false,
        ..there.label
    };
    replace(store, &label, &there.version).await
}

/// Puts a label in the place of the one that was read.
async fn replace(store: &Store, label: &Label, over: &ETag) -> Result<(), VolumeError> {
    match store
        .put_if_match(&store.meta_key(NAME), label.encode()?, over)
        .await
    {
        Ok(_) => Ok(()),
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Err(interfered(store)),
        Err(e) => Err(e.into()),
    }
}

/// What whoever makes or deletes a volume says when somebody else does so at its place.
pub(crate) fn interfered(store: &Store) -> VolumeError {
    VolumeError::Interfered {
        url: store.url.to_string(),
    }
}

/// The volume is no replica any more: nobody but its owner publishes to it from now on. For the owner of its lease, before it writes.
///
/// # Errors
/// [`VolumeError::Interfered`] when somebody else changes the label.
pub(crate) async fn end_replica(store: &Store) -> Result<(), VolumeError> {
    let Some(there) = find(store).await? else {
        return Ok(());
    };
    let Some(original) = &there.label.replica_of else {
        return Ok(());
    };
    let label = Label {
        replica_of: None,
        ..there.label.clone()
    };
    replace(store, &label, &there.version).await?;
    log::warn!(
        "{} was a replica of {}: it is a volume of its own from now on, and hypernbd replicate does not change it any more",
        store.url,
        original.url
    );
    Ok(())
}

/// Makes the label of a new volume. One that is there already is not believed.
///
/// # Errors
/// [`VolumeError::Leftovers`] when there is one; when the store fails.
pub(crate) async fn make(store: &Store, origin: InodeCheck) -> Result<Label, VolumeError> {
    make_this(store, Label::new(store, Some(origin))?).await
}

/// As [`make`], of this label.
///
/// # Errors
/// As [`make`].
pub(crate) async fn make_this(store: &Store, label: Label) -> Result<Label, VolumeError> {
    let key = store.meta_key(NAME);
    match store.put_create_only(&key, label.encode()?).await {
        Ok(_) => Ok(label),
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Err(VolumeError::Leftovers {
            url: store.url.to_string(),
            found: key,
        }),
        Err(e) => {
            // The label may have been stored, and only the answer lost.
            if let Err(left) = withdraw(store, &label).await {
                log::warn!("{key} may be left of a volume that could not be created: {left}");
            }
            Err(e.into())
        }
    }
}

/// Removes the label of a volume that could not be created. The label of another volume that was made there meanwhile
/// stays: without its label that volume would lose the id by which its WAL is found.
///
/// # Errors
/// When the store fails, or the object there is not a valid label.
pub(crate) async fn withdraw(store: &Store, label: &Label) -> Result<(), VolumeError> {
    if load(store).await?.as_ref() == Some(label) {
        store.delete(&store.meta_key(NAME)).await?;
    }
    Ok(())
}

impl Label {
    pub(crate) fn new(store: &Store, origin: Option<InodeCheck>) -> Result<Self, VolumeError> {
        Ok(Self {
            volume_id: VolumeId::random(),
            created_ms: now_ms(),
            origin,
            place: Some(Location::of(store)?),
            parent: None,
            deletion: None,
            is_clone: false,
            replica_of: None,
        })
    }

    /// The label of a replica of this volume, in a place where nothing is yet.
    pub(crate) fn of_replica(store: &Store, original: Original) -> Result<Self, VolumeError> {
        Ok(Self {
            parent: Some(original.volume_id),
            replica_of: Some(original),
            ..Self::new(store, None)?
        })
    }

    /// Decodes a label.
    ///
    /// # Errors
    /// A text that says what is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|e| e.to_string())
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>, VolumeError> {
        serde_json::to_vec(self).map_err(|e| VolumeError::Internal(e.to_string()))
    }
}

#[cfg(test)]
#[path = "label_tests.rs"]
mod tests;
