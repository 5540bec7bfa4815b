//! What this project asks of the file systems that its directories are on: stores, journals and caches rest on it.
//!
//! [`Disk`] is those calls, so that tests can break each of them; [`fitness`] tries whether they do what they promise.

pub(crate) mod cache_file;
pub(crate) mod fitness;
mod mount;

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD};
use rustix::io::Errno;

/// The calls that must do what they promise. Their own code is the real thing.
pub(crate) trait Disk: Send + Sync {
    /// The file's data and length are on disk afterwards: fdatasync(2).
    fn sync_file(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    /// The directory's entries are on disk afterwards: fsync(2).
    fn sync_dir(&self, dir: &File) -> io::Result<()> {
        dir.sync_all()
    }

    /// Locks the file against all other descriptors, once they let it go: flock(2).
    fn lock(&self, file: &File) -> io::Result<()> {
        file.lock()
    }

    /// As [`Self::lock`], without waiting.
    fn try_lock(&self, file: &File) -> Result<(), TryLockError> {
        file.try_lock()
    }

    /// Gives a file another name, and replaces in one step what had it: rename(2).
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    /// Makes a file where there is none: open(2) with O_EXCL.
    fn create_new(&self, path: &Path) -> io::Result<File> {
        File::create_new(path)
    }
}

/// Checks that this process may make files in a directory, without making one.
///
/// # Errors
/// When it may not: the file system is mounted read-only, or the directory is another's.
pub(crate) fn check_writable(dir: &Path) -> io::Result<()> {
    let wanted = Access::WRITE_OK | Access::EXEC_OK;
    // As whom this process works, and with what it was given beyond that.
    match rustix::fs::accessat(CWD, dir, wanted, AtFlags::EACCESS) {
        // A kernel before 5.8 does not know this question.
        Ok(()) | Err(Errno::NOSYS | Errno::INVAL) => Ok(()),
        Err(e) => {
            let text = format!("{} cannot be written to ({e})", dir.display());
            Err(io::Error::new(io::Error::from(e).kind(), text))
        }
    }
}

/// The file system as it is.
pub(crate) struct RealDisk;

impl Disk for RealDisk {}

/// Makes the directory, for its owner's eyes only, and the parents that are missing, as any program makes them. `made` gets
/// those that were not there, the innermost last.
///
/// All of them are durable afterwards: a directory is found again after a power cut only if its name is on the disk, and
/// an earlier call may have made it and been killed before that. So the parents are synced whoever made them.
///
/// # Errors
/// What the file system says; [`fitness::Unfit`] when it cannot sync.
pub(crate) fn make_dirs(dir: &Path, disk: &dyn Disk, made: &mut Vec<PathBuf>) -> io::Result<()> {
    let missing: Vec<&Path> = above(dir).take_while(|path| !path.is_dir()).collect();
    for &path in missing.iter().rev() {
        // What is stored is in the clear.
        let mode = if path == dir { 0o700 } else { 0o777 };
        match DirBuilder::new().mode(mode).create(path) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
            Ok(()) => made.push(path.to_path_buf()),
        }
    }
    let device = fs::metadata(dir)?.dev();
    for parent in above(dir).skip(1) {
        // Where the file system is mounted is another one's to keep.
        if fs::metadata(parent)?.dev() != device {
            break;
        }
        let handle = match File::open(parent) {
            // Nothing of ours is new in it.
            Err(e)
                if e.kind() == ErrorKind::PermissionDenied
                    && !made.iter().any(|dir| above(dir).nth(1) == Some(parent)) =>
            {
                continue;
            }
            opened => opened?,
        };
        fitness::sync_dir(disk, &handle, parent)?;
    }
    Ok(())
}

/// Removes directories that were made, the innermost first, as far as nothing is in them.
///
/// # Errors
/// What the file system says.
pub(crate) fn remove_dirs(made: &[PathBuf]) -> io::Result<()> {
    for dir in made.iter().rev() {
        match fs::remove_dir(dir) {
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => break,
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// The directory and those above it, as they are reached from here.
fn above(dir: &Path) -> impl Iterator<Item = &Path> {
    dir.ancestors().map(|path| match path.as_os_str().is_empty() {
        true => Path::new("."),
        false => path,
    })
}

#[cfg(test)]
pub(crate) mod tests;
