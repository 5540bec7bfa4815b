//! The label that says which volume a journal belongs to, and the locks on the journal's directory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::base::error::VolumeError;
use crate::base::volume_id::VolumeId;
use crate::disk::fitness::{self, is_unfit, sync_dir, sync_file};
use crate::disk::{Disk, check_writable, make_dirs, remove_dirs};

pub(super) const LABEL: &str = "journal.json";
pub(super) const LABEL_VERSION: u32 = 1;
pub(super) const NEW_LABEL: &str = "journal.json.new";
const IN_USE: &str = "another server has it open";
const MISSING: &str = "there is no journal in it";
const ANOTHER: &str = "it is not the journal that the volume was last written with";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Label {
    pub version: u32,
    pub volume_id: VolumeId,
    pub journal_id: String,
}

/// The directory of a journal, locked against every other server.
#[derive(Debug)]
pub(super) struct Claimed {
    /// The directory, open and locked.
    pub dir: File,
    pub journal_id: String,
    /// The label's file, open and locked. A lock on a directory may hold on this machine only where a lock on a file
    /// holds for all machines.
    pub label_file: File,
}

/// Locks the journal's directory for the volume, and makes the journal where there is none. `expected` is the id of a
/// journal that must be there.
///
/// # Errors
/// [`VolumeError::Journal`]. Nothing is made on a file system that cannot hold a journal.
pub(super) fn claim(
    path: &Path,
    volume_id: VolumeId,
    expected: Option<&str>,
    disk: &dyn Disk,
) -> Result<Claimed, VolumeError> {
    let mut made = Vec::new();
    try_claim(path, volume_id, expected, disk, &mut made).map_err(|e| {
        if is_unfit(&e)
            && let Err(e) = remove_dirs(&made)
        {
            log::warn!("a directory that was made for a journal is left: {e}");
        }
        unusable(path, &e)
    })
}

fn try_claim(
    path: &Path,
    volume_id: VolumeId,
    expected: Option<&str>,
    disk: &dyn Disk,
    made: &mut Vec<PathBuf>,
) -> io::Result<Claimed> {
    if expected.is_none() && !path.join(LABEL).exists() {
        make_dirs(path, disk, made).map_err(doing("making the directory"))?;
    }
    let dir = lock_dir(path, disk)?;
    sync_dir(disk, &dir, path).map_err(doing("syncing the directory"))?;
    let read = match fs::read(path.join(LABEL)) {
        Err(e) if e.kind() == ErrorKind::NotFound && expected.is_none() => {
            make_label(path, &dir, volume_id, disk).map_err(doing("making the journal"))?;
            fs::read(path.join(LABEL))
        }
        Err(e) if e.kind() == ErrorKind::NotFound => return refuse(MISSING),
        read => read,
    };
    let text = read.map_err(doing("reading the label"))?;
    let label: Label =
        serde_json::from_slice(&text).map_err(|e| io::Error::other(format!("{LABEL}: {e}")))?;
    if label.version != LABEL_VERSION {
        return refuse(format!(
            "its format version is {}; this release reads version {LABEL_VERSION}",
            label.version
        ));
    }
    if label.volume_id != volume_id {
        return refuse(format!(
            "it belongs to volume {}, this is volume {volume_id}; give each volume a journal of its own",
            label.volume_id
        ));
    }
    if expected.is_some_and(|id| id != label.journal_id) {
        return refuse(ANOTHER);
    }
    let label_file = lock_label(path, disk)?;
    sync_file(disk, &label_file, path).map_err(doing("syncing the label"))?;
    Ok(Claimed {
        dir,
        label_file,
        journal_id: label.journal_id,
    })
}

/// Checks that the journal with this id is there. Changes and locks nothing.
///
/// # Errors
/// [`VolumeError::Journal`].
pub(super) fn check_is(path: &Path, journal_id: &str) -> Result<(), VolumeError> {
    let looked = || match fs::read(path.join(LABEL)) {
        Err(e) if e.kind() == ErrorKind::NotFound => refuse(MISSING),
        read => {
            let text = read.map_err(doing("reading the label"))?;
            match serde_json::from_slice::<Label>(&text) {
                Ok(label) if label.journal_id != journal_id => refuse(ANOTHER),
                // The opening says what is wrong with it.
                _ => Ok(()),
            }
        }
    };
    looked().map_err(|e| unusable(path, &e))
}

/// Checks whether other servers and the file system would let the journal be claimed. Changes nothing. If the journal
/// is yet to be made, the nearest directory above it that exists is checked.
///
/// # Errors
/// [`VolumeError::Journal`] when another server has the journal open, or when no journal can be there.
pub(super) fn check_claimable(path: &Path, disk: &dyn Disk) -> Result<(), VolumeError> {
    let looked = || {
        let Some(place) = path.ancestors().find(|place| place.is_dir()) else {
            return Ok(());
        };
        check_writable(place)?;
        // The opening reports every other fault.
        let (Ok(dir), Ok(second)) = (File::open(place), File::open(place)) else {
            return Ok(());
        };
        if !fitness::try_lock(disk, &dir, &second, place).map_err(doing("locking the directory"))?
            && place == path
        {
            return refuse(IN_USE);
        }
        if path.join(LABEL).exists() {
            lock_label(path, disk)?;
        }
        sync_dir(disk, &dir, place).map_err(doing("syncing the directory"))
    };
    looked().map_err(|e| unusable(path, &e))
}

fn lock_dir(path: &Path, disk: &dyn Disk) -> io::Result<File> {
    let open = || File::open(path).map_err(doing("opening the directory"));
    let (dir, second) = (open()?, open()?);
    match fitness::try_lock(disk, &dir, &second, path).map_err(doing("locking the directory"))? {
        true => Ok(dir),
        false => refuse(IN_USE),
    }
}

fn lock_label(path: &Path, disk: &dyn Disk) -> io::Result<File> {
    let name = path.join(LABEL);
    // Opened for writing, because network file systems lock only files that are.
    let open = || OpenOptions::new().read(true).write(true).open(&name);
    let (file, second) = open()
        .and_then(|file| Ok((file, open()?)))
        .map_err(doing("opening the label"))?;
    let is_locked = fitness::try_lock(disk, &file, &second, path).map_err(doing("locking the label"))?;
    let inode = |found: io::Result<fs::Metadata>| found.ok().map(|found| (found.dev(), found.ino()));
    // Whoever removes a journal removes its label while the label is locked.
    match is_locked && inode(file.metadata()) == inode(fs::metadata(&name)) {
        true => Ok(file),
        false => refuse(IN_USE),
    }
}

fn make_label(path: &Path, dir: &File, volume_id: VolumeId, disk: &dyn Disk) -> io::Result<()> {
    for other in fs::read_dir(path)? {
        let name = other?.file_name();
        // A server may have been killed while it made the label, and the root of a file system has a directory
        // `lost+found`.
        if name != NEW_LABEL && name != "lost+found" {
            let text = format!("it holds other files ({})", name.display());
            return Err(io::Error::other(text));
        }
    }
    let label = Label {
        version: LABEL_VERSION,
        volume_id,
        journal_id: Uuid::new_v4().to_string(),
    };
    let temporary = path.join(NEW_LABEL);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    let named = file
        .write_all(&serde_json::to_vec(&label)?)
        .and_then(|()| sync_file(disk, &file, path))
        .and_then(|()| fitness::rename(disk, &temporary, &path.join(LABEL)));
    if named.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    named?;
    sync_dir(disk, dir, path)
}

fn refuse<T>(reason: impl Into<String>) -> io::Result<T> {
    Err(io::Error::other(reason.into()))
}

/// Adds what was being done to an error. The error of an unfit file system stays as it is, because it says enough.
fn doing(what: &'static str) -> impl Fn(io::Error) -> io::Error {
    move |e| match is_unfit(&e) {
        true => e,
        false => io::Error::new(e.kind(), format!("{what}: {e}")),
    }
}

fn unusable(path: &Path, reason: &io::Error) -> VolumeError {
    VolumeError::Journal {
        path: path.display().to_string(),
        reason: reason.to_string(),
    }
}

pub(super) fn failed(path: &Path, what: &str, error: &io::Error) -> VolumeError {
    VolumeError::Journal {
        path: path.display().to_string(),
        reason: format!("{what}: {error}"),
    }
}
