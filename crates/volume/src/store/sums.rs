//! Check values of objects that are uploaded in parts: `<root>.meta/sums/<object>`, put beside the upload.
//!
//! An object that is put in one piece carries its values itself (`interceptors/window_checksums.rs`). One uploaded in parts cannot,
//! because they would have to be known before its first byte is sent: so they are one object of their own. They name the very write
//! they are of, and its length, and say nothing of any other. Whoever reads an object that carries no values looks for them, once.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use super::frames::Frames;
use super::interceptors::window_checksums::{CheckValues, METADATA_KEY, is_narrow};
use super::{ObjectInfo, Store};
use crate::base::store_error::{StoreError, StoreErrorKind};

/// The engine's mark of a write, in an object's metadata.
pub(super) const WRITE_KEY: &str = "hf-write";
/// Where they are, below the volume's `.meta/`.
const SUMS: &str = "sums/";
const VERSION: u32 = 1;
/// Bytes of check values that are remembered; past it, all are forgotten. These are the values of 32 GiB.
const REMEMBERED_MAX_BYTES: usize = 8 << 20;

/// The check values of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sums {
    /// The write of it.
    pub write: String,
    /// Its length.
    pub object_bytes: u64,
    /// The values of all of it.
    pub values: CheckValues,
}

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    version: u32,
    write: String,
    object_bytes: u64,
    crc32c: String,
}

impl Sums {
    /// As they are stored.
    pub fn encode(&self) -> Vec<u8> {
        let stored = Stored {
            version: VERSION,
            write: self.write.clone(),
            object_bytes: self.object_bytes,
            crc32c: self.values.encode(),
        };
        // Text and numbers always are JSON.
        serde_json::to_vec(&stored).unwrap_or_default()
    }

    /// Reads them.
    ///
    /// # Errors
    /// What is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        let stored: Stored = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        if stored.version != VERSION {
            return Err(format!(
                "they have version {}, and {VERSION} is known",
                stored.version
            ));
        }
        Ok(Self {
            write: stored.write,
            object_bytes: stored.object_bytes,
            values: CheckValues::decode(&stored.crc32c)?,
        })
    }
}

/// Where they are of a container's object of this name.
pub(crate) fn key(store: &Store, name: &str) -> String {
    store.meta_key(&format!("{SUMS}{name}"))
}

/// Which write of an object it is: by the mark that its writer gave it, which copies keep, or else by its ETag.
pub(crate) fn write_of(info: &ObjectInfo) -> String {
    match info.metadata.get(WRITE_KEY) {
        Some(mark) => mark.clone(),
        None => format!("etag {}", info.etag.0),
    }
}

/// Whether an object has the mark of its writer. One that was downloaded and uploaded again by other tools may have lost it.
pub(crate) fn has_mark(info: &ObjectInfo) -> bool {
    info.metadata.contains_key(WRITE_KEY)
}

/// Whether one is known to be a copy of the other: the mark of a write stays with its copies, and no two writes share one.
pub(crate) fn is_copy(one: &ObjectInfo, other: &ObjectInfo) -> bool {
    is_same_mark(one, other) && one.size_bytes == other.size_bytes
}

/// Whether both have the mark of one write; how much is left of either is not looked at.
fn is_same_mark(one: &ObjectInfo, other: &ObjectInfo) -> bool {
    let mark = one.metadata.get(WRITE_KEY);
    mark.is_some() && mark == other.metadata.get(WRITE_KEY)
}

/// Whether two objects with this name can be one write, of which one is a copy: they are as long as each other, and say nothing else of
/// their writes, nor of what is in them.
pub(crate) fn may_be_copies(one: &ObjectInfo, other: &ObjectInfo) -> bool {
    let agree = |key: &str, comparable: fn(&str, &str) -> bool| {
        let both = one.metadata.get(key).zip(other.metadata.get(key));
        both.is_none_or(|(a, b)| a == b || !comparable(a, b))
    };
    one.size_bytes == other.size_bytes
        && agree(WRITE_KEY, |_, _| true)
        // A copy may have got values of other windows.
        && agree(METADATA_KEY, |a, b| a.len() == b.len())
}

/// Whether two objects with this name can be one write, also if one of them was cut short: that one says by its mark alone which it was.
pub(crate) fn may_be_one_write(one: &ObjectInfo, other: &ObjectInfo) -> bool {
    is_same_mark(one, other) || may_be_copies(one, other)
}

/// Whether this is the name of an object that data are in: ten digits, and perhaps a part.
fn is_of_data(name: &str) -> bool {
    let (number, part) = name.split_once('.').unwrap_or((name, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    number.len() == 10 && is_number(number) && is_number(part)
}

type Known = Arc<OnceCell<Option<Arc<Sums>>>>;

/// Check values that were read. Each is fetched once, however many reads want it.
#[derive(Debug, Default)]
pub(super) struct Remembered(Mutex<(HashMap<String, Known>, usize)>);

impl Remembered {
    fn of(&self, key: &str) -> Known {
        let mut known = self.0.lock();
        if known.1 > REMEMBERED_MAX_BYTES {
            *known = Default::default();
        }
        known.0.entry(key.to_owned()).or_default().clone()
    }

    fn took(&self, len_bytes: usize) {
        self.0.lock().1 += len_bytes;
    }

    /// Forgets what is remembered of this object.
    pub fn forget(&self, key: &str) {
        self.0.lock().0.remove(key);
    }
}

impl Store {
    /// Checks bytes of an object that carries no check values, by those beside the container. Where they are missing, or are of
    /// another write, the bytes are taken as they are.
    ///
    /// # Errors
    /// The outer one when the values cannot be read; the inner one is what is wrong with the bytes.
    pub(super) async fn verify_apart(
        &self,
        key: &str,
        info: &ObjectInfo,
        offset_bytes: u64,
        bytes: &Frames,
    ) -> Result<Result<(), String>, StoreError> {
        let sums = self.sums_of(key, info).await?;
        Ok(sums.map_or(Ok(()), |sums| {
            sums.values.verify(offset_bytes, bytes, info.size_bytes)
        }))
    }

    /// The check values beside the container of this write of an object, if there are any.
    ///
    /// # Errors
    /// When the store fails. Damaged ones are none.
    pub(crate) async fn sums_of(
        &self,
        key: &str,
        info: &ObjectInfo,
    ) -> Result<Option<Arc<Sums>>, StoreError> {
        let name = key.rsplit('/').next().unwrap_or_default();
        if !is_of_data(name) || key != self.data_key(name) || is_narrow(info) {
            return Ok(None);
        }
        let cell = self.remembered.of(key);
        let sums_key = self::key(self, name);
        let fetch = async {
            // Boxed: the values themselves are read in the same way as what they are of.
            let decoded = match Box::pin(self.get(&sums_key)).await {
                Ok(None) => return Ok(None),
                Ok(Some((body, _))) => {
                    self.remembered.took(body.len());
                    Sums::decode(&body).map_err(|reason| self.corrupt(&sums_key, reason))
                }
                // They carry check values of their own.
                Err(e) if e.kind == StoreErrorKind::Corrupt => Err(e),
                Err(e) => return Err(e),
            };
            match decoded {
                Ok(sums) => Ok(Some(Arc::new(sums))),
                Err(damaged) => {
                    log::warn!(
                        "{damaged}; the object {name} is read without check values until hypernbd check --data --write gives it \
                         others"
                    );
                    Ok(None)
                }
            }
        };
        let sums = cell.get_or_try_init(|| fetch).await?.clone();
        let is_of_write =
            |sums: &Arc<Sums>| sums.write == write_of(info) && sums.object_bytes == info.size_bytes;
        match sums {
            Some(sums) if is_of_write(&sums) => Ok(Some(sums)),
            Some(_) => {
                self.remembered.forget(key);
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// Puts check values of an object beside the container, where there are none yet.
    ///
    /// # Errors
    /// `PreconditionFailed` when there are others; when the store fails.
    pub(super) async fn put_new_sums(&self, name: &str, sums: &Sums) -> Result<(), StoreError> {
        self.put_create_only(&self::key(self, name), sums.encode())
            .await?;
        self.remembered.forget(&self.data_key(name));
        Ok(())
    }

    /// The check values beside the container under the name of an object, of whatever write of it they are; `None` for none, and for what
    /// cannot be read.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn stored_sums(&self, name: &str) -> Result<Option<Sums>, StoreError> {
        match self.get(&self::key(self, name)).await {
            Ok(there) => Ok(there.and_then(|(body, _)| Sums::decode(&body).ok())),
            Err(e) if e.kind == StoreErrorKind::Corrupt => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Forgets what is remembered of the check values of an object, which were put by its [`key`].
    pub(crate) fn forget_sums(&self, name: &str) {
        self.remembered.forget(&self.data_key(name));
    }

    /// Puts check values of an object beside the container, whatever is there.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn put_sums(&self, name: &str, sums: &Sums) -> Result<(), StoreError> {
        self.put(&self::key(self, name), sums.encode()).await?;
        self.forget_sums(name);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_read_as_they_were_written() {
        let sums = Sums {
            write: "w".into(),
            object_bytes: 40_000,
            values: CheckValues::of(&Frames::take(&[7; 40_000][..])),
        };
        assert_eq!(Sums::decode(&sums.encode()), Ok(sums));
        assert!(Sums::decode(br#"{"version":2,"write":"w","object_bytes":1,"crc32c":""}"#).is_err());
        assert!(is_of_data("0000000001.0") && is_of_data("0000000001"));
        assert!(!is_of_data("inode") && !is_of_data("0000000001.") && !is_of_data("000000001.0"));
    }
}
