//! Whether a file system does what a directory of ours rests on: tried, not believed.
//!
//! A lock that excludes nobody lets two servers replace one object, or write one journal; a rename that does not replace
//! in one step tears objects; a sync that is refused keeps nothing through a power cut. Some network and FUSE file systems
//! are like that. They are found out before anything of worth is written, on files of our own.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::path::Path;

use super::Disk;
use super::mount::Mount;

const ADVICE: &str = "name a directory of another file system, such as ext4, XFS or Btrfs";
/// Bodies of the files that are tried with.
const BODIES: [&[u8]; 2] = [b"before", b"after it"];

const NO_RENAME: &str = "does not rename files as it is told";

/// A file system that lacks what a directory of ours rests on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the file system of {path} ({kind}) {lack}; {ADVICE}")]
pub(crate) struct Unfit {
    path: String,
    kind: String,
    lack: String,
}

/// Whether the error is an [`Unfit`].
pub(crate) fn is_unfit(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Unfit>())
}

/// The error for a file system that lacks something.
fn unfit(path: &Path, lack: impl Into<String>) -> io::Error {
    // Files that it was tried with come and go.
    let dir = path.ancestors().find(|dir| dir.is_dir()).unwrap_or(path);
    let unfit = Unfit {
        path: dir.display().to_string(),
        kind: mount_of(dir).map_or("of unknown type".to_owned(), |mount| mount.kind),
        lack: lack.into(),
    };
    io::Error::new(ErrorKind::Unsupported, unfit)
}

fn mount_of(path: &Path) -> Option<Mount> {
    let list = fs::read_to_string("/proc/self/mountinfo").ok()?;
    Mount::of(fs::canonicalize(path).ok()?.to_str()?, &list)
}

/// Tells a call that the file system does not have from one that failed.
fn of_call(path: &Path, lack: &str, error: io::Error) -> io::Error {
    let codes = [libc::EINVAL, libc::ENOSYS, libc::EOPNOTSUPP, libc::ENOLCK];
    match error.raw_os_error() {
        Some(code) if codes.contains(&code) => unfit(path, format!("{lack} ({error})")),
        _ => error,
    }
}

/// Syncs a directory.
///
/// # Errors
/// [`Unfit`] where that is not possible; what the disk says.
pub(crate) fn sync_dir(disk: &dyn Disk, dir: &File, path: &Path) -> io::Result<()> {
    let lack = "does not put the names in a directory on the disk";
    disk.sync_dir(dir).map_err(|e| of_call(path, lack, e))
}

/// Syncs a file.
///
/// # Errors
/// As [`sync_dir`].
pub(crate) fn sync_file(disk: &dyn Disk, file: &File, path: &Path) -> io::Result<()> {
    let lack = "does not put the data of a file on the disk";
    disk.sync_file(file).map_err(|e| of_call(path, lack, e))
}

/// Waits for the lock of a file of ours, and proves with `second`, another descriptor of it, that it excludes.
///
/// # Errors
/// [`Unfit`] where it does not; what the disk says.
pub(crate) fn lock(disk: &dyn Disk, file: &File, second: &File, path: &Path) -> io::Result<()> {
    disk.lock(file).map_err(|e| no_lock(path, e))?;
    check_excludes(disk, second, path)
}

/// As [`lock`], without waiting. `false` when somebody else has it.
///
/// # Errors
/// As [`lock`].
pub(crate) fn try_lock(disk: &dyn Disk, file: &File, second: &File, path: &Path) -> io::Result<bool> {
    match disk.try_lock(file) {
        Ok(()) => check_excludes(disk, second, path).map(|()| true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(e)) => Err(no_lock(path, e)),
    }
}

fn no_lock(path: &Path, error: io::Error) -> io::Error {
    of_call(path, "does not lock files", error)
}

fn check_excludes(disk: &dyn Disk, second: &File, path: &Path) -> io::Result<()> {
    match disk.try_lock(second) {
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(e)) => return Err(no_lock(path, e)),
        Ok(()) => return Err(unfit(path, "gives the lock of a file to two at once")),
    }
    match mount_of(path).as_ref().and_then(Mount::local_locks) {
        Some(option) => {
            let lack = format!("locks files for this machine alone, because it is mounted with {option}");
            Err(unfit(path, lack))
        }
        None => Ok(()),
    }
}

/// Renames a file, and makes sure that it has its new name and no other.
///
/// # Errors
/// As [`sync_dir`].
pub(crate) fn rename(disk: &dyn Disk, from: &Path, to: &Path) -> io::Result<()> {
    disk.rename(from, to).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => unfit(to, "renames no file over another"),
        ErrorKind::CrossesDevices => unfit(to, "is not that of the files which are renamed into it"),
        _ => of_call(to, NO_RENAME, e),
    })?;
    match to.exists() && !from.exists() {
        true => Ok(()),
        false => Err(unfit(to, NO_RENAME)),
    }
}

/// Tries, with files in `from`, whether one can be made only once, renamed over another in `to` in one step and read there,
/// and whether files and names are synced. `name` is what they are called; one in `to` is removed. Whoever calls it has
/// both directories to himself.
///
/// # Errors
/// [`Unfit`]; what the disk says.
pub(crate) fn check_files(disk: &dyn Disk, from: &Path, to: &Path, name: &str) -> io::Result<()> {
    let (source, target) = (from.join(name), to.join(name));
    let done = replace_twice(disk, &source, &target);
    for path in [&source, &target] {
        match fs::remove_file(path) {
            Err(e) if e.kind() != ErrorKind::NotFound && done.is_ok() => return Err(e),
            _ => {}
        }
    }
    done?;
    sync_dir(disk, &File::open(to)?, to)
}

fn replace_twice(disk: &dyn Disk, source: &Path, target: &Path) -> io::Result<()> {
    let mut replaced = None;
    for body in BODIES {
        let mut file = disk.create_new(source)?;
        match disk.create_new(source) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
            Ok(_) => return Err(unfit(source, "makes a file anew where there is one")),
        }
        file.write_all(body)?;
        if replaced.is_none() {
            sync_file(disk, &file, source)?;
        }
        rename(disk, source, target)?;
        if fs::read(target).ok().as_deref() != Some(body) {
            return Err(unfit(target, NO_RENAME));
        }
        replaced = replaced.or(Some(File::open(target)?));
    }
    let mut kept = Vec::new();
    if let Some(mut file) = replaced {
        file.read_to_end(&mut kept)?;
    }
    match kept == BODIES[0] {
        true => Ok(()),
        false => Err(unfit(
            target,
            "changes a file that is read when another is renamed over it",
        )),
    }
}
