//! What the scrub of a volume keeps beside it, `<root>.meta/scrub`: how far it is, and the damage that it found.
//!
//! The volume's owner alone writes the record, and only over its own last write of it. Nothing that the volume reads as depends on it:
//! where it is missing or damaged, the next pass makes another.

use std::fmt;

use log::warn;
use serde::{Deserialize, Serialize};

use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::stored_text::printable;
use crate::base::units::format_size;
use crate::base::volume_id::VolumeId;
use crate::store::{ETag, Store};

/// Its name below the volume's `.meta/`.
const NAME: &str = "scrub";
const VERSION: u32 = 1;
/// Damaged places that are kept, at most.
pub(crate) const PLACES_MAX: usize = 100;
/// Ranges of the volume that are told of one place, at most.
pub(crate) const RANGES_MAX: usize = 16;
/// Above the largest checkpoint number that there is.
const NUMBERS_END: u64 = 1 << 30;
/// Above anything that is counted here: what is added to it does not overflow.
const COUNT_END: u64 = 1 << 62;

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubRecord {
    version: u32,
    /// The volume that it is of. A copy begins with a record of its own.
    pub volume_id: VolumeId,
    /// The pass that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pass: Option<ScrubPass>,
    /// The last pass that came to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<EndedPass>,
    /// The damaged places that are known, ascending by object and offset.
    pub damage: Vec<DamagedPlace>,
    /// The number of places that were found beside these.
    pub more: u64,
}

/// A pass under way: all objects are read in the order of their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubPass {
    /// When it began, in milliseconds since 1970-01-01 UTC, by its server's clock.
    pub began_ms: u64,
    /// The newest checkpoint when it began: it reads no objects with a later number.
    pub up_to: u64,
    /// The number of the last object that was read; 0 before the first.
    pub after: u64,
    /// Objects that were read.
    pub objects: u64,
    /// Bytes that were read and are what was written.
    pub verified_bytes: u64,
    /// Bytes that were read and have no check values.
    pub unverified_bytes: u64,
}

impl ScrubPass {
    /// One that begins now, with this newest checkpoint.
    pub(crate) fn new(now_ms: u64, up_to: u64) -> Self {
        Self {
            began_ms: now_ms,
            up_to,
            after: 0,
            objects: 0,
            verified_bytes: 0,
            unverified_bytes: 0,
        }
    }
}

/// A pass that came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedPass {
    /// When it began, in milliseconds since 1970-01-01 UTC.
    pub began_ms: u64,
    /// When it ended, in milliseconds since 1970-01-01 UTC.
    pub ended_ms: u64,
    /// Objects that were read.
    pub objects: u64,
    /// Bytes that were read and are what was written.
    pub verified_bytes: u64,
    /// Bytes that were read and have no check values.
    pub unverified_bytes: u64,
}

/// A place in an object that some checkpoint needs and that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedPlace {
    /// The object: its key.
    #[serde(deserialize_with = "printable")]
    pub object: String,
    /// Where in the object it begins, in bytes.
    pub offset_bytes: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// What is wrong.
    #[serde(deserialize_with = "printable")]
    pub reason: String,
    /// Whether the newest checkpoint of then needs it; only earlier ones do otherwise.
    pub is_newest_affected: bool,
    /// What of the volume cannot be read because of it, the first ranges, ascending. None where no data is in it that is needed, but what
    /// says where that of an earlier checkpoint is: `reason` has that checkpoint's number then.
    pub ranges: Vec<DamagedRange>,
    /// The length of all its ranges together, in bytes; 0 where there are none.
    pub affected_bytes: u64,
    /// When it was found, in milliseconds since 1970-01-01 UTC.
    pub found_ms: u64,
}

impl fmt::Display for DamagedPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.object)?;
        if self.len_bytes > 0 {
            write!(f, " at {} ({})", self.offset_bytes, format_size(self.len_bytes))?;
        }
        if let Some(first) = self.ranges.first() {
            let whose = match self.is_newest_affected {
                true => "the volume",
                false => "earlier checkpoints",
            };
            let size = format_size(self.affected_bytes);
            write!(f, ", {size} of {whose} from {} on", first.offset_bytes)?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// A range of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedRange {
    /// Where it begins, in bytes.
    pub offset_bytes: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
}

impl ScrubRecord {
    /// Of this volume, of which nothing is known yet.
    pub(crate) fn new(volume_id: VolumeId) -> Self {
        Self {
            version: VERSION,
            volume_id,
            pass: None,
            last: None,
            damage: Vec::new(),
            more: 0,
        }
    }

    /// Decodes what [`Self::put`] wrote.
    ///
    /// # Errors
    /// A text that says what is wrong.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        let record: Self = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        if record.version != VERSION {
            return Err(format!(
                "it has version {}, and {VERSION} is known",
                record.version
            ));
        }
        if record.damage.len() > PLACES_MAX {
            return Err(format!("it tells of more than {PLACES_MAX} damaged places"));
        }
        let of_pass = record
            .pass
            .iter()
            .flat_map(|pass| [pass.objects, pass.verified_bytes, pass.unverified_bytes]);
        if of_pass.chain([record.more]).any(|count| count >= COUNT_END) {
            return Err("it counts more than there can be".to_owned());
        }
        // An object's number begins with that of its checkpoint.
        let is_sound = |pass: &ScrubPass| pass.up_to < NUMBERS_END && pass.after >> 32 <= pass.up_to;
        match record.pass.as_ref().is_none_or(is_sound) {
            true => Ok(record),
            false => Err("its pass is beyond the checkpoints that it goes up to".to_owned()),
        }
    }

    /// Loads the record of a volume; `None` where there is none, or none that can be read, with a warning.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn load(store: &Store) -> Result<Option<Self>, StoreError> {
        Ok(Self::load_with(store).await?.0)
    }

    /// As [`Self::load`], with the write of what is there.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn load_with(store: &Store) -> Result<(Option<Self>, Option<ETag>), StoreError> {
        let key = store.meta_key(NAME);
        let (decoded, write) = match store.get(&key).await {
            Ok(None) => return Ok((None, None)),
            Ok(Some((body, etag))) => (Self::decode(&body), Some(etag)),
            Err(e) if e.kind == StoreErrorKind::Corrupt => (Err(e.detail), Self::write_of(store).await),
            Err(e) => return Err(e),
        };
        match decoded {
            Ok(record) => Ok((Some(record), write)),
            Err(reason) => {
                warn!(
                    "the record of the scrub {key} cannot be read, and is made anew by the next pass: {reason}"
                );
                Ok((None, write))
            }
        }
    }

    /// The write of the record that is stored, as far as that can be told.
    pub(crate) async fn write_of(store: &Store) -> Option<ETag> {
        let info = store.head(&store.meta_key(NAME)).await.ok().flatten();
        info.map(|info| info.etag)
    }

    /// Stores the record over the write `before`, or where there is none. Only the holder of the volume's lease may do this.
    ///
    /// # Errors
    /// `PreconditionFailed` or `NotFound` when something else is there; when the store fails.
    pub(crate) async fn put(&self, store: &Store, before: Option<&ETag>) -> Result<ETag, StoreError> {
        let key = store.meta_key(NAME);
        // Text and numbers always are JSON.
        let body = serde_json::to_vec(self).unwrap_or_default();
        match before {
            Some(before) => store.put_if_match(&key, body, before).await,
            None => store.put_create_only(&key, body).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> ScrubRecord {
        ScrubRecord {
            pass: Some(ScrubPass {
                after: 7 << 32 | 1,
                objects: 3,
                ..ScrubPass::new(5, 9)
            }),
            last: Some(EndedPass {
                began_ms: 1,
                ended_ms: 2,
                objects: 3,
                verified_bytes: 4,
                unverified_bytes: 5,
            }),
            damage: vec![DamagedPlace {
                object: "vol/0000000001.0".into(),
                offset_bytes: 16384,
                len_bytes: 16384,
                reason: "damaged".into(),
                is_newest_affected: true,
                ranges: vec![DamagedRange {
                    offset_bytes: 4096,
                    len_bytes: 8192,
                }],
                affected_bytes: 8192,
                found_ms: 6,
            }],
            more: 2,
            ..ScrubRecord::new(VolumeId::random())
        }
    }

    #[test]
    fn what_is_kept_is_read() {
        let record = record();
        let body = serde_json::to_vec(&record).unwrap();
        assert_eq!(ScrubRecord::decode(&body), Ok(record));
    }

    #[test]
    fn what_no_scrub_keeps_is_refused() {
        type Change = fn(&mut ScrubRecord);
        let wrong: [(&str, Change); 5] = [
            ("there can be", |record| record.more = u64::MAX),
            ("version", |record| record.version = 2),
            ("more than", |record| {
                record.damage = vec![record.damage[0].clone(); PLACES_MAX + 1];
            }),
            ("beyond", |record| record.pass = Some(ScrubPass::new(1, 1 << 30))),
            ("beyond", |record| {
                record.pass = Some(ScrubPass {
                    after: 10 << 32,
                    ..ScrubPass::new(1, 9)
                });
            }),
        ];
        for (why, change) in wrong {
            let mut record = record();
            change(&mut record);
            let body = serde_json::to_vec(&record).unwrap();
            let refused = ScrubRecord::decode(&body).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn nothing_that_a_terminal_would_obey_is_kept() {
        let mut record = record();
        record.damage[0].object = "\u{1b}[2J".into();
        let body = serde_json::to_vec(&record).unwrap();
        let read = ScrubRecord::decode(&body).unwrap();
        assert!(!read.damage[0].object.contains('\u{1b}'));
    }

    #[test]
    fn a_place_is_told_in_a_line() {
        let place = record().damage.remove(0);
        assert_eq!(
            place.to_string(),
            "vol/0000000001.0 at 16384 (16 KiB), 8 KiB of the volume from 4096 on: damaged"
        );
        let of_object = DamagedPlace {
            len_bytes: 0,
            ranges: Vec::new(),
            ..place
        };
        assert_eq!(of_object.to_string(), "vol/0000000001.0: damaged");
    }

    /// An owner that was paused does not write over what a later one keeps.
    #[tokio::test(flavor = "multi_thread")]
    async fn it_is_written_over_its_own_last_write_alone() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("file://{}/vol/", dir.path().display());
        let url = crate::base::url::VolumeUrl::parse(&url).unwrap();
        let options = crate::store::options::StoreOptions::default();
        let store = crate::store::connect_for_create(&url, &options).await.unwrap();
        assert_eq!(ScrubRecord::load_with(&store).await.unwrap(), (None, None));
        let (older, newer) = (record(), record());
        let first = older.put(&store, None).await.unwrap();
        let refused = newer.put(&store, None).await.unwrap_err();
        assert_eq!(refused.kind, StoreErrorKind::PreconditionFailed);
        let second = newer.put(&store, Some(&first)).await.unwrap();
        assert!(older.put(&store, Some(&first)).await.is_err());
        assert_eq!(
            ScrubRecord::load_with(&store).await.unwrap(),
            (Some(newer), Some(second))
        );
        // What cannot be read is none, and is written over.
        store.put(&store.meta_key(NAME), "damaged").await.unwrap();
        let (none, write) = ScrubRecord::load_with(&store).await.unwrap();
        assert_eq!(none, None);
        older.put(&store, write.as_ref()).await.unwrap();
        assert_eq!(ScrubRecord::load(&store).await.unwrap(), Some(older));
    }
}
