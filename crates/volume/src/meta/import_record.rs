//! What an import that is under way notes beside the volume, `<root>.meta/import`: from what, and how far it is.
//!
//! It is there from before the first byte is written, and says at the end that the copy was verified. It is not removed then: who may
//! import need not be able to delete. So a volume with one that does not say so is half made, and what has the same source can go on
//! where that was.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use crate::base::error::VolumeError;
use crate::base::stored_text::printable;
use crate::store::Store;

/// Its name below the volume's `.meta/`.
const NAME: &str = "import";

/// Which file, as it was: what tells whether it is still the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Its absolute path.
    #[serde(deserialize_with = "printable")]
    pub path: String,
    /// Size in bytes of the file, or of the image in it.
    pub size_bytes: u64,
    /// When it was changed, in nanoseconds since 1970-01-01 UTC. Of a device 0: nothing tells.
    pub modified_ns: i128,
    /// Its inode number.
    pub inode: u64,
}

impl FileId {
    /// Of a file or device at this path, with this size.
    pub fn new(path: &std::path::Path, size_bytes: u64, found: &Metadata) -> Self {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let modified_ns = match found.is_file() {
            true => i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec()),
            false => 0,
        };
        Self {
            path: path.display().to_string(),
            size_bytes,
            modified_ns,
            inode: found.ino(),
        }
    }
}

/// An import under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportRecord {
    /// What is imported; nothing of a pipe, which cannot be taken up.
    pub source: Option<FileId>,
    /// Everything before this offset, in bytes, is in the volume, and was flushed.
    pub written_bytes: u64,
    /// The epoch of the lease that it was written under: a later one means that somebody else had the volume since then.
    pub epoch: u64,
    /// The import made the volume.
    pub is_new: bool,
    /// It came to its end.
    #[serde(default)]
    pub is_finished: bool,
}

impl ImportRecord {
    /// What to call its source.
    pub fn source_name(&self) -> &str {
        self.source.as_ref().map_or("a pipe", |source| &source.path)
    }

    /// Reads what [`Self::put`] wrote.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|e| e.to_string())
    }

    /// The volume's, if an import of it is unfinished.
    pub(crate) async fn load(store: &Store) -> Result<Option<Self>, VolumeError> {
        let key = store.meta_key(NAME);
        let Some((body, _)) = store.get(&key).await? else {
            return Ok(None);
        };
        let record = Self::decode(&body).map(|record| Some(record).filter(|record| !record.is_finished));
        record.map_err(|reason| VolumeError::Corrupt {
            what: format!("the note of an import {key}"),
            reason,
        })
    }

    /// Notes it. Only for whoever holds the volume's lease.
    pub(crate) async fn put(&self, store: &Store) -> Result<(), VolumeError> {
        let body =
            serde_json::to_vec(self).map_err(|e| VolumeError::Internal(format!("noting an import: {e}")))?;
        store.put(&store.meta_key(NAME), body).await?;
        Ok(())
    }

    /// Notes that it came to its end.
    pub(crate) async fn finish(mut self, store: &Store) -> Result<(), VolumeError> {
        self.is_finished = true;
        self.put(store).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_is_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, "1234").unwrap();
        let of = || FileId::new(&path, 4, &std::fs::metadata(&path).unwrap());
        let first = of();
        assert_eq!(first, of());
        let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(later).unwrap();
        assert_ne!(first, of());
    }

    #[test]
    fn what_is_noted_is_read() {
        let record = ImportRecord {
            source: Some(FileId {
                path: "/a".into(),
                size_bytes: 5,
                modified_ns: 17,
                inode: 3,
            }),
            written_bytes: 4,
            epoch: 9,
            is_new: true,
            is_finished: false,
        };
        let body = serde_json::to_vec(&record).unwrap();
        assert_eq!(ImportRecord::decode(&body), Ok(record));
        assert!(ImportRecord::decode(b"{}").is_err());
    }
}
