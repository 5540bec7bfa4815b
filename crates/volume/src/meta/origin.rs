//! Where a clone comes from: `<root>.meta/origin`.
//!
//! It lists, for each volume that the clone has inherited objects of, the last number of a checkpoint that is that volume's, and
//! where the volume is. A label says that there is one ([`Label::is_clone`](super::label::Label::is_clone)), so that a plain volume costs no request for it.
//!
//! What it says is another's word; `engine/parents.rs` believes it once it has looked.

use serde::{Deserialize, Serialize};

use super::children::Child;
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::store::Store;

/// Its name below the volume's `.meta/`.
pub(crate) const NAME: &str = "origin";
const VERSION: u32 = 1;
/// The largest number of a checkpoint: pointers have 30 bits for it.
const NUMBER_MAX: u64 = (1 << 30) - 1;
/// Clones of clones: each costs three requests at an opening.
pub(crate) const PARTS_MAX: usize = 16;

/// A place as it is stored: a URL in the one form that is shown.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Address(pub VolumeUrl);

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let url = VolumeUrl::parse(&text).map_err(|e| e.reason)?;
        match url.to_string() == text {
            true => Ok(Self(url)),
            false => Err("a place is not written as one is".to_owned()),
        }
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.0.to_string()
    }
}

/// A volume that a clone has inherited objects of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Parent {
    /// The last number of a checkpoint whose objects are that volume's.
    pub up_to: u64,
    /// Where it is.
    pub url: Address,
    /// Its id.
    pub volume_id: VolumeId,
    /// The checkpoint of it that the clone, or the next volume in the list, began as.
    pub checkpoint: CheckpointId,
}

/// Where a clone comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    version: u32,
    /// Where the clone was made. In another place it is a copy, which no parent knows of.
    pub url: Address,
    /// Its id.
    pub volume_id: VolumeId,
    /// The volumes that it has inherited objects of, the oldest first; the last one is its parent.
    pub parents: Vec<Parent>,
}

impl Origin {
    /// Of a clone with this id, to be made at `url`.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] when it makes no sense.
    pub fn new(url: &VolumeUrl, volume_id: VolumeId, parents: Vec<Parent>) -> Result<Self, VolumeError> {
        let origin = Self {
            version: VERSION,
            url: Address(url.clone()),
            volume_id,
            parents,
        };
        origin.check().map_err(VolumeError::InvalidInput)?;
        Ok(origin)
    }

    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        let origin: Self = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        origin.check()?;
        Ok(origin)
    }

    fn check(&self) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("it has version {}, and {VERSION} is known", self.version));
        }
        if self.parents.is_empty() || self.parents.len() > PARTS_MAX {
            return Err(format!(
                "a clone has 1 to {PARTS_MAX} volumes before it, and this one has {}: end its parent's sharing first, with \
                 hypernbd clone --flatten",
                self.parents.len()
            ));
        }
        let mut before = 0;
        for parent in &self.parents {
            let is_sound = before < parent.checkpoint.cno
                && parent.checkpoint.cno <= parent.up_to
                && parent.up_to < NUMBER_MAX;
            if !is_sound {
                return Err("its numbers do not ascend".to_owned());
            }
            before = parent.up_to;
        }
        let places: Vec<&VolumeUrl> = self.places().collect();
        for (at, place) in places.iter().enumerate() {
            if !is_same_kind(place, &self.url.0) {
                return Err("it names volumes in stores of two kinds".to_owned());
            }
            if places[..at].contains(place) {
                return Err(format!("it names {place} twice"));
            }
        }
        Ok(())
    }

    fn places(&self) -> impl Iterator<Item = &VolumeUrl> {
        let parents = self.parents.iter().map(|parent| &parent.url.0);
        parents.chain([&self.url.0])
    }

    /// The volume that it is a clone of. There is one.
    pub fn parent(&self) -> &Parent {
        &self.parents[self.parents.len() - 1]
    }

    /// The clone as its parent knows it.
    pub fn child(&self) -> Child {
        Child {
            checkpoint: self.parent().checkpoint,
            volume_id: self.volume_id,
        }
    }

    /// Each volume with what it must know: the clone that was made of it.
    pub fn known_by(&self) -> impl Iterator<Item = (&Parent, Child)> {
        let ids = self.parents[1..].iter().map(|parent| parent.volume_id);
        let children = ids.chain([self.volume_id]);
        self.parents.iter().zip(children).map(|(parent, volume_id)| {
            let checkpoint = parent.checkpoint;
            (
                parent,
                Child {
                    checkpoint,
                    volume_id,
                },
            )
        })
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>, VolumeError> {
        serde_json::to_vec(self).map_err(|e| VolumeError::Internal(e.to_string()))
    }
}

fn is_same_kind(a: &VolumeUrl, b: &VolumeUrl) -> bool {
    matches!(
        (a, b),
        (VolumeUrl::S3 { .. }, VolumeUrl::S3 { .. }) | (VolumeUrl::File { .. }, VolumeUrl::File { .. })
    )
}

/// The origin of a clone, if there is one.
///
/// # Errors
/// When the store fails, or what is there is none.
pub(crate) async fn load(store: &Store) -> Result<Option<Origin>, VolumeError> {
    let key = store.meta_key(NAME);
    let Some((body, _)) = store.get(&key).await? else {
        return Ok(None);
    };
    let origin = Origin::decode(&body).map_err(|reason| VolumeError::Corrupt {
        what: format!("the origin of a clone, {key}"),
        reason,
    })?;
    Ok(Some(origin))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;

    fn url(text: &str) -> VolumeUrl {
        VolumeUrl::parse(text).unwrap()
    }

    fn parent(name: &str, checkpoint: u64, up_to: u64) -> Parent {
        Parent {
            up_to,
            url: Address(url(name)),
            volume_id: VolumeId::random(),
            checkpoint: CheckpointId {
                cno: checkpoint,
                check: InodeCheck::from_bits(checkpoint),
            },
        }
    }

    fn of(parents: Vec<Parent>) -> Result<Origin, VolumeError> {
        Origin::new(&url("s3://bucket/child/"), VolumeId::random(), parents)
    }

    #[test]
    fn an_origin_is_read_as_it_was_written() {
        let origin = of(vec![
            parent("s3://bucket/old/", 3, 5),
            parent("s3://other/parent/", 9, 9),
        ])
        .unwrap();
        assert_eq!(Origin::decode(&origin.encode().unwrap()), Ok(origin.clone()));
        assert_eq!(origin.parent().checkpoint.cno, 9);
        let known: Vec<_> = origin.known_by().collect();
        assert_eq!(known[0].1.volume_id, origin.parents[1].volume_id);
        assert_eq!(known[1].1, origin.child());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let last = NUMBER_MAX;
        for parents in [
            vec![],
            vec![parent("s3://bucket/p/", 0, 5)],
            vec![parent("s3://bucket/p/", 6, 5)],
            vec![parent("s3://bucket/p/", 5, last)],
            vec![parent("s3://bucket/p/", 3, 5), parent("s3://bucket/q/", 5, 9)],
            vec![parent("s3://bucket/p/", 3, 5), parent("s3://bucket/q/", 6, 5)],
            vec![parent("s3://bucket/p/", 3, 5), parent("s3://bucket/p/", 6, 7)],
            vec![parent("s3://bucket/child/", 3, 5)],
            vec![parent("file:///etc/x/", 3, 5)],
            (1..=PARTS_MAX as u64 + 1)
                .map(|n| parent(&format!("s3://bucket/p{n}/"), n, n))
                .collect(),
        ] {
            assert!(of(parents.clone()).is_err(), "{parents:?}");
        }
        let good = of(vec![parent("s3://bucket/p/", 3, 5)]).unwrap();
        let text = String::from_utf8(good.encode().unwrap()).unwrap();
        for (from, to) in [
            ("\"version\":1", "\"version\":2"),
            ("s3://bucket/p/", "s3://bucket/p"),
            ("s3://bucket/p/", "s3://bucket/../p/"),
            ("s3://bucket/p/", "file://./p/"),
            ("\"up_to\":5", "\"up_to\":18446744073709551615"),
            ("\"up_to\":5", "\"up_to\":-1"),
        ] {
            assert!(text.contains(from));
            assert!(
                Origin::decode(text.replacen(from, to, 1).as_bytes()).is_err(),
                "{to}"
            );
        }
    }
}
