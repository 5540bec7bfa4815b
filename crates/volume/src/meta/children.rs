//! The clones of a volume: one object each, `<root>.meta/children/<checkpoint>-<check value>-<id of the clone>`.
//!
//! Such an entry is a pin that never runs out: what the checkpoint needs stays until the entry is removed. It is put before a
//! clone is made, and removed after the clone has given up what it shares; a clone without its entry is not opened. The name
//! alone tells the checkpoint, so that whoever removes checkpoints needs one listing, and no entry can be too damaged to hold.

use futures::stream::{self, StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};

use crate::base::checkpoint_id::{CheckpointId, InodeCheck};
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::stored_text;
use crate::base::volume_id::VolumeId;
use crate::store::Store;

/// Where they are, below the volume's `.meta/`.
pub(super) const CHILDREN: &str = "children/";
const READS_AT_ONCE: usize = 32;
const NUMBER_DIGITS: usize = 10;

/// A clone, as its parent knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Child {
    /// The parent's checkpoint that it began as.
    pub checkpoint: CheckpointId,
    /// Its id.
    pub volume_id: VolumeId,
}

impl Child {
    /// The name of its entry.
    pub fn name(&self) -> String {
        let CheckpointId { cno, check } = self.checkpoint;
        format!("{cno:0NUMBER_DIGITS$}-{check}-{}", self.volume_id)
    }

    /// The child of an entry of this name.
    pub fn of_name(name: &str) -> Option<Self> {
        let mut words = name.splitn(3, '-').map(str::to_owned);
        let (cno, check, id) = (words.next()?, words.next()?, words.next()?);
        let child = Self {
            checkpoint: CheckpointId {
                cno: cno.parse().ok()?,
                check: InodeCheck::try_from(check).ok()?,
            },
            volume_id: VolumeId::try_from(id).ok()?,
        };
        // A number may be written in several ways, of which one is a name.
        (child.name() == name).then_some(child)
    }

    pub(crate) fn key(&self, parent: &Store) -> String {
        parent.meta_key(&format!("{CHILDREN}{}", self.name()))
    }
}

/// What an entry says for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ChildRecord {
    /// Where the clone is.
    #[serde(deserialize_with = "stored_text::printable")]
    pub url: String,
    /// When it was begun, in milliseconds since 1970-01-01 UTC.
    pub made_ms: u64,
}

impl ChildRecord {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|e| e.to_string())
    }
}

/// Puts the entry of a clone that is about to be made at `url`. The caller looks at the plan, and at the checkpoint's entry,
/// afterwards.
///
/// # Errors
/// When the store fails; the entry may be there then.
pub(crate) async fn put(parent: &Store, child: &Child, url: &str) -> Result<(), VolumeError> {
    let record = ChildRecord {
        url: url.to_owned(),
        made_ms: now_ms(),
    };
    let body = serde_json::to_vec(&record).map_err(|e| VolumeError::Internal(e.to_string()))?;
    parent.put(&child.key(parent), body).await?;
    Ok(())
}

/// Whether the parent knows of this clone.
///
/// # Errors
/// When the store fails.
pub(crate) async fn is_known(parent: &Store, child: &Child) -> Result<bool, VolumeError> {
    Ok(parent.head(&child.key(parent)).await?.is_some())
}

/// Takes the entry away: from here on the parent keeps nothing for this clone.
///
/// # Errors
/// When the store fails.
pub(crate) async fn remove(parent: &Store, child: &Child) -> Result<(), VolumeError> {
    parent.delete(&child.key(parent)).await?;
    Ok(())
}

/// The clones of a volume, with one listing.
///
/// # Errors
/// When the store fails, or something among the entries is none: what it holds must not go.
pub(crate) async fn list(store: &Store) -> Result<Vec<Child>, VolumeError> {
    let prefix = store.meta_key(CHILDREN);
    let listed = store.list(&prefix).await?;
    let children = listed.iter().map(|object| {
        let name = object.key.strip_prefix(&prefix).unwrap_or_default();
        Child::of_name(name).ok_or_else(|| VolumeError::Corrupt {
            what: format!("the entry of a clone {}", object.key),
            reason:
                "its name is none that an entry has; nothing of the volume is removed unless you delete it"
                    .into(),
        })
    });
    children.collect()
}

/// The clones of a volume, with what their entries say; nothing where that cannot be read.
///
/// # Errors
/// As [`list`].
pub(crate) async fn load_all(store: &Store) -> Result<Vec<(Child, Option<ChildRecord>)>, VolumeError> {
    let children = list(store).await?;
    let loaded = stream::iter(children).map(|child| async move {
        let got = store.get(&child.key(store)).await?;
        let record = got.and_then(|(body, _)| ChildRecord::decode(&body).ok());
        Ok::<_, VolumeError>((child, record))
    });
    loaded.buffered(READS_AT_ONCE).try_collect().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_told_by_its_name_alone() {
        let child = Child {
            checkpoint: CheckpointId {
                cno: 17,
                check: InodeCheck::from_bits(255),
            },
            volume_id: VolumeId::random(),
        };
        let name = child.name();
        assert!(name.starts_with("0000000017-00000000000000ff-"), "{name}");
        assert_eq!(Child::of_name(&name), Some(child));
        for wrong in [
            String::new(),
            "17".to_owned(),
            name.replacen("00000000", "", 1),
            name.replacen('-', "_", 1),
            name.to_uppercase(),
            format!("{name}x"),
            format!("+{}", &name[1..]),
        ] {
            assert_eq!(Child::of_name(&wrong), None, "{wrong}");
        }
    }
}
