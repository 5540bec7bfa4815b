//! A file that is made whole or not at all: written under another name beside its own, and renamed at the end.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use super::TransferError;

/// Ends the name of a file that is being written.
const SUFFIX: &str = ".hypernbd-part";
/// Mode of a new file, before the umask.
const MODE: u32 = 0o666;
/// Mode of one that replaces another, until it has that one's.
const PRIVATE_MODE: u32 = 0o600;

/// A file that is being made. Dropped before [`NewFile::finish`], it is gone.
#[derive(Debug)]
pub struct NewFile {
    file: File,
    part: PathBuf,
    path: PathBuf,
    replaces: bool,
    is_finished: bool,
}

impl NewFile {
    /// Begins the file that `path` is to name. One that is there stays until the end, and is refused unless `replaces`. What a killed
    /// process left of an earlier one is used anew.
    ///
    /// # Errors
    /// When there is a file, the directory is missing or not writable, or another process is making the same file.
    pub fn begin(path: &Path, replaces: bool) -> Result<Self, TransferError> {
        let path = match path.canonicalize() {
            Ok(there) if replaces => there,
            Ok(_) => return Err(exists(path)),
            // A symbolic link to nothing is something, too.
            Err(_) if path.symlink_metadata().is_ok() => return Err(exists(path)),
            Err(_) => path.to_owned(),
        };
        let Some(name) = path.file_name() else {
            return Err(TransferError::Refused(format!(
                "{} names no file",
                path.display()
            )));
        };
        let mut part = std::ffi::OsString::from(".");
        part.push(name);
        part.push(SUFFIX);
        let part = path.with_file_name(part);
        let file = take(&part)?;
        let made = Self {
            file,
            part,
            path,
            replaces,
            is_finished: false,
        };
        // Nobody reads it who may not read what it replaces.
        let private = match made.replaced() {
            Some(_) => made.file.set_permissions(Permissions::from_mode(PRIVATE_MODE)),
            None => Ok(()),
        };
        private
            .and_then(|()| made.file.set_len(0))
            .map_err(|e| TransferError::io(format!("cannot write {}", made.part.display()), e))?;
        Ok(made)
    }

    /// What is known of the file that it replaces, if there is one.
    fn replaced(&self) -> Option<Metadata> {
        let there = self.replaces.then(|| self.path.metadata())?.ok();
        there.filter(Metadata::is_file)
    }

    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is until the end.
    pub fn part_path(&self) -> &Path {
        &self.part
    }

    /// Gives it its name, durably. It must be synced already.
    ///
    /// # Errors
    /// When there is a file of that name by now, which is not to be replaced.
    pub fn finish(mut self) -> Result<(), TransferError> {
        let failed =
            |e: io::Error| TransferError::io(format!("cannot give {} its name", self.path.display()), e);
        if let Some(there) = self.replaced() {
            // Only root gives files away: one that cannot is the owner, whom the mode is for as well.
            let _ = fchown(&self.file, Some(there.uid()), Some(there.gid()));
            self.file.set_permissions(there.permissions()).map_err(failed)?;
        }
        let renamed = match self.replaces {
            true => std::fs::rename(&self.part, &self.path),
            false => match renameat_with(CWD, &self.part, CWD, &self.path, RenameFlags::NOREPLACE) {
                Err(Errno::EXIST) => return Err(exists(&self.path)),
                // A file system that does not know of it.
                Err(Errno::INVAL | Errno::NOSYS) if !self.path.exists() => {
                    std::fs::rename(&self.part, &self.path)
                }
                Err(Errno::INVAL | Errno::NOSYS) => return Err(exists(&self.path)),
                renamed => renamed.map_err(io::Error::from),
            },
        };
        renamed.map_err(failed)?;
        self.is_finished = true;
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = File::open(dir.unwrap_or(Path::new("."))).map_err(failed)?;
        dir.sync_all().map_err(failed)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.is_finished
            && let Err(e) = std::fs::remove_file(&self.part)
        {
            log::warn!("{} is left: {e}", self.part.display());
        }
    }
}

fn exists(path: &Path) -> TransferError {
    TransferError::Refused(format!(
        "there is a file {} already: add --overwrite to replace it, or name another one",
        path.display()
    ))
}

/// Opens and locks the file at this path, made if it is missing.
fn take(part: &Path) -> Result<File, TransferError> {
    let failed = |e: io::Error| TransferError::io(format!("cannot make the file {}", part.display()), e);
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(MODE)
            .custom_flags(libc::O_NOFOLLOW)
            .open(part)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(TransferError::Refused(format!(
                    "another process is writing {}: wait for its end, or name another file",
                    part.display()
                )));
            }
            Err(e) => return Err(failed(e.into())),
        }
        // The one who had it may have renamed or removed it meanwhile.
        let ours = file.metadata().map_err(failed)?;
        if std::fs::symlink_metadata(part)
            .is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino()))
        {
            return Ok(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn names(dir: &Path) -> Vec<String> {
        let names = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<String> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn it_is_there_at_the_end_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let new = NewFile::begin(&path, false).unwrap();
        new.file().write_all(b"half").unwrap();
        assert!(!path.exists());
        drop(new);
        assert_eq!(names(dir.path()), Vec::<String>::new());

        // What a killed process left is used anew.
        std::fs::write(dir.path().join(".image.hypernbd-part"), "left over").unwrap();
        let new = NewFile::begin(&path, false).unwrap();
        new.file().write_all(b"whole").unwrap();
        new.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert_eq!(names(dir.path()), ["image"]);
    }

    #[test]
    fn another_file_is_replaced_only_on_purpose_and_only_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, "old").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let error = NewFile::begin(&path, false).unwrap_err().to_string();
        assert!(error.contains("--overwrite"), "{error}");
        let new = NewFile::begin(&path, true).unwrap();
        new.file().write_all(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(new.part_path()), 0o600);
        new.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(mode(&path), 0o640);
    }

    #[test]
    fn one_that_came_meanwhile_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let new = NewFile::begin(&path, false).unwrap();
        std::fs::write(&path, "faster").unwrap();
        assert!(new.finish().is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"faster");
        assert_eq!(names(dir.path()), ["image"]);
    }

    #[test]
    fn two_do_not_make_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let first = NewFile::begin(&path, false).unwrap();
        first.file().write_all(b"first").unwrap();
        let error = NewFile::begin(&path, false).unwrap_err().to_string();
        assert!(error.contains("another process"), "{error}");
        first.finish().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
    }
}
