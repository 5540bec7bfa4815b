//! The contents of directories of buffer files, for people.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::dir::{FILE, LOCK, SET_ASIDE, lock, unusable};
use super::file::{entries, find};
use super::format::Header;
use crate::base::error::VolumeError;
use crate::base::volume_id::VolumeId;

/// The contents of one buffer file, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Left {
    /// The file.
    pub path: PathBuf,
    /// Whether the file was set aside. No server will apply a file that was.
    pub is_set_aside: bool,
    /// The volume it belongs to; `None` when the file cannot be read.
    pub volume_id: Option<VolumeId>,
    /// The URL of that volume.
    pub url: Option<String>,
    /// Number of changes that were answered and not published.
    pub changes: u64,
    /// Bytes that they write or zero.
    pub bytes: u64,
    /// Why the file cannot be read.
    pub damage: Option<String>,
}

/// Lists the files in a directory of buffer files: those of servers that are gone, and those that were set aside. If a
/// server uses the directory now, its current file is listed too.
///
/// # Errors
/// [`VolumeError::BufferFile`].
pub fn look(path: &Path) -> Result<Vec<Left>, VolumeError> {
    left_in(path).map_err(|e| unusable(path, &e))
}

fn left_in(path: &Path) -> io::Result<Vec<Left>> {
    let mut left = Vec::new();
    for name in names(path)? {
        let file = path.join(&name);
        let Some(found) = find(&file)? else { continue };
        let set_aside = name != FILE;
        left.push(describe(&file, &found.file, &found.header, set_aside));
    }
    Ok(left)
}

/// Whether the server that uses the directory has its changes in a file there, so that the next one finds them after a kill. A server
/// that cannot write its file goes on without one. Where no server uses the directory there is nothing to be found.
///
/// # Errors
/// [`VolumeError::BufferFile`] when the directory cannot be looked at.
pub fn is_kept(path: &Path) -> Result<bool, VolumeError> {
    let looked = || match File::open(path.join(LOCK)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(e),
        Ok(file) => match file.try_lock_shared() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => fs::exists(path.join(FILE)),
            Err(TryLockError::Error(e)) => Err(e),
        },
    };
    looked().map_err(|e| unusable(path, &e))
}

/// Removes the buffer files in a directory. Returns what they held.
///
/// # Errors
/// [`VolumeError::BufferFile`] when a server uses the directory.
pub fn discard(path: &Path) -> Result<Vec<Left>, VolumeError> {
    let discarded = || -> io::Result<Vec<Left>> {
        // Looked at under the lock: a server that comes and goes before it leaves other files.
        let _lock = lock(path)?;
        let left = left_in(path)?;
        left.iter().try_for_each(|left| fs::remove_file(&left.path))?;
        Ok(left)
    };
    discarded().map_err(|e| unusable(path, &e))
}

/// The names of the buffer files in the directory.
fn names(path: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        if let Ok(name) = entry?.file_name().into_string()
            && (name == FILE || name.starts_with(SET_ASIDE))
        {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

pub(super) fn describe(
    path: &Path,
    file: &File,
    header: &Result<Header, String>,
    is_set_aside: bool,
) -> Left {
    let read = match header {
        Ok(header) => entries(file, header).map_err(|e| e.to_string()),
        Err(damage) => Err(damage.clone()),
    };
    let entries = read.as_deref().unwrap_or_default();
    Left {
        path: path.to_owned(),
        is_set_aside,
        volume_id: header.as_ref().ok().map(|header| header.volume_id),
        url: header.as_ref().ok().map(|header| header.url.clone()),
        changes: entries.len() as u64,
        bytes: entries.iter().map(|(_, entry)| entry.len_bytes).sum(),
        damage: read.err(),
    }
}
