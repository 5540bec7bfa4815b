//! What says whose a journal's directory is, and the lock on it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::VolumeError;

pub(super) const LABEL: &str = "journal.json";
pub(super) const LABEL_VERSION: u32 = 1;
pub(super) const NEW_LABEL: &str = "journal.json.new";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Label {
    pub version: u32,
    pub volume_id: String,
    pub journal_id: String,
}

pub(super) fn failed(path: &Path, doing: &str, error: &io::Error) -> VolumeError {
    VolumeError::Journal {
        path: path.display().to_string(),
        reason: format!("{doing}: {error}"),
    }
}

/// Locks the directory for as long as `dir` is open.
pub(super) fn lock(path: &Path, dir: &File) -> Result<(), VolumeError> {
    dir.try_lock().map_err(|e| match e {
        fs::TryLockError::WouldBlock => VolumeError::Journal {
            path: path.display().to_string(),
            reason: "another server has it open".into(),
        },
        fs::TryLockError::Error(e) => failed(path, "locking the directory", &e),
    })
}

pub(super) fn make_label(path: &Path, dir: &File, volume_id: Uuid) -> io::Result<Label> {
    for other in fs::read_dir(path)? {
        let name = other?.file_name();
        // A server may have been killed while it made the label; a disk's root has its own directory.
        if name != NEW_LABEL && name != "lost+found" {
            let text = format!("it holds other files ({})", name.display());
            return Err(io::Error::other(text));
        }
    }
    let label = Label {
        version: LABEL_VERSION,
        volume_id: volume_id.to_string(),
        journal_id: Uuid::new_v4().to_string(),
    };
    let temporary = path.join(NEW_LABEL);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(&serde_json::to_vec(&label)?)?;
    file.sync_all()?;
    fs::rename(&temporary, path.join(LABEL))?;
    dir.sync_all()?;
    Ok(label)
}
