//! What a running import records beside the volume, `<root>.meta/import`: its source, and how far it has come.
//!
//! The record is written before the first byte of data. At the end it says that the copy was verified. It is not
//! removed then, because a user who may import need not be allowed to delete. So a volume whose record does not say
//! that is half made, and an import of the same source can continue it.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use crate::base::error::VolumeError;
use crate::base::stored_text::printable;
use crate::store::Store;

/// Its name below the volume's `.meta/`.
pub(crate) const NAME: &str = "import";

/// Identifies a file in the state it had, so that a change of the file is noticed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Its absolute path.
    #[serde(deserialize_with = "printable")]
    pub path: String,
    /// Size in bytes of the file, or of the image in it.
    pub size_bytes: u64,
    /// When the file was changed, in nanoseconds since 1970-01-01 UTC. 0 for a device, which has no such time.
    pub modified_ns: i128,
    /// Its inode number.
    pub inode: u64,
}

impl FileId {
    /// For a file or device at this path, with this size.
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

/// A running or finished import.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportRecord {
    /// The source; `None` for a pipe, whose import cannot be continued.
    pub source: Option<FileId>,
    /// Everything before this offset, in bytes, is in the volume and was flushed.
    pub written_bytes: u64,
    /// The epoch of the lease under which it was written. A later epoch means that another server has had the volume
    /// since then.
    pub epoch: u64,
    /// Whether the import created the volume.
    pub is_new: bool,
    /// Whether the import has finished.
    #[serde(default)]
    pub is_finished: bool,
}

impl ImportRecord {
    /// The name of its source in messages.
    pub fn source_name(&self) -> &str {
        self.source.as_ref().map_or("a pipe", |source| &source.path)
    }

    /// Decodes what [`Self::put`] wrote.
    ///
    /// # Errors
    /// A text that says what is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(bytes).map_err(|e| e.to_string())
    }

    /// Loads the record of the volume, if an import of it is unfinished.
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

    /// Stores the record. Only the holder of the volume's lease may do this.
    pub(crate) async fn put(&self, store: &Store) -> Result<(), VolumeError> {
        let body =
            serde_json::to_vec(self).map_err(|e| VolumeError::Internal(format!("noting an import: {e}")))?;
        store.put(&store.meta_key(NAME), body).await?;
        Ok(())
    }

    /// Removes the record of a volume that could not be created.
    pub(crate) async fn remove(store: &Store) -> Result<(), VolumeError> {
        store.delete(&store.meta_key(NAME)).await?;
        Ok(())
    }

    /// Records that the import has finished.
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
