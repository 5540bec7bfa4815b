//! The contents of directories of buffer files, for people.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::dir::{FILE, SET_ASIDE, lock, unusable};
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
    let looked = || {
        let mut left = Vec::new();
        for name in names(path)? {
            let file = path.join(&name);
            let Some(found) = find(&file)? else { continue };
            let set_aside = name != FILE;
            left.push(describe(&file, &found.file, &found.header, set_aside));
        }
        Ok(left)
    };
    looked().map_err(|e| unusable(path, &e))
}

/// Removes the buffer files in a directory. Returns what they held.
///
/// # Errors
/// [`VolumeError::BufferFile`] when a server uses the directory.
pub fn discard(path: &Path) -> Result<Vec<Left>, VolumeError> {
    let left = look(path)?;
    let discarded = || {
        let _lock = lock(path)?;
        left.iter().try_for_each(|left| fs::remove_file(&left.path))
    };
    discarded().map_err(|e| unusable(path, &e))?;
    Ok(left)
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
