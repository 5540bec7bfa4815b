//! A directory of objects: every change is on disk before it is answered, whole or not at all, and conditional writes
//! have one winner, within the process and between processes.
//!
//! What is in the directory stands in `layout`.
//!
//! A write goes to a temporary file, which is synced, then renamed over the object's name under the lock, then
//! `objects/` is synced, then the answer is given. So a reader sees the old object or the new one, a process killed at
//! any step leaves either, and what was answered survives the machine. Readers take no lock.
//!
//! If syncing `objects/` fails, what is on disk is not known any more: every later change through this handle is
//! refused, so that no retry can mistake the half-done change for a finished one.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use s3s::{S3Error, S3ErrorCode, S3Result, s3_error};

use super::layout::{self, MARKER, MARKER_TEXT, OBJECTS, OBJECTS_MARKER};
use super::object_file::{ObjectHeader, key_of_name, name_of_key};
use super::scratch::{Scratch, TempFile};
use crate::disk::{Disk, remove_dirs};

/// The code of an object whose file is damaged; no code of S3's.
pub(crate) const DAMAGED: &str = "DamagedObject";
/// Its status, which is all that a HEAD gets.
pub(crate) const DAMAGED_STATUS: u16 = 422;

/// What must hold for a write to take place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Nothing.
    None,
    /// No such object (`If-None-Match: *`).
    Absent,
    /// The object is the one with this ETag (`If-Match`).
    Matches(String),
}

/// An object found: its file, open, and its header. Later writes and deletes do not affect it.
#[derive(Debug)]
pub(crate) struct OpenObject {
    pub file: File,
    pub header: ObjectHeader,
}

/// A piece of a listing.
#[derive(Debug)]
pub(crate) struct Page {
    /// The objects, in the order of their keys.
    pub found: Vec<(String, ObjectHeader)>,
    /// If there are more: the key to go on after. It is the last one looked at, which need not exist any more.
    pub next: Option<String>,
}

/// A store in a directory. All calls block; share it by `Arc`.
pub(crate) struct ObjectDir {
    root: PathBuf,
    disk: Box<dyn Disk>,
    /// Made at the first change, so that reading needs no permission to write.
    scratch: Mutex<Option<Arc<Scratch>>>,
    /// Syncing `objects/` has failed.
    broken: AtomicBool,
    /// Nothing is changed through this handle any more.
    is_ended: AtomicBool,
    /// `objects/` has its marker; that of a store of an earlier release gets it at the first change.
    is_marked: AtomicBool,
    /// Made by this handle.
    is_new: bool,
    /// Directories that were made for the store, its own among them: the innermost last.
    made: Vec<PathBuf>,
}

/// Whether the directory of a store goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Directory {
    /// It is removed, if nothing else is in it.
    Removed,
    /// It stays as it was found: what was not made for this store is kept.
    AsFound,
}

impl ObjectDir {
    /// Opens a store that exists.
    ///
    /// # Errors
    /// `NotFound` when the directory does not exist or is not a store, `InvalidData` for a layout of another version.
    pub fn open(root: &Path, disk: Box<dyn Disk>) -> io::Result<Self> {
        let text = match fs::read_to_string(root.join(MARKER)) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound && root.is_dir() => {
                return Err(io::Error::new(
                    ErrorKind::NotFound,
                    "the directory holds no hypernbd store",
                ));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(io::Error::new(
                    ErrorKind::NotFound,
                    "the directory does not exist",
                ));
            }
            Err(error) => return Err(error),
        };
        if text != MARKER_TEXT {
            let what = format!(
                "{MARKER} is not of layout 1: another release of hypernbd made it, or it was changed"
            );
            return Err(io::Error::new(ErrorKind::InvalidData, what));
        }
        Ok(Self {
            root: root.to_path_buf(),
            disk,
            scratch: Mutex::new(None),
            broken: AtomicBool::new(false),
            is_ended: AtomicBool::new(false),
            is_marked: AtomicBool::new(root.join(OBJECTS).join(OBJECTS_MARKER).exists()),
            is_new: false,
            made: Vec::new(),
        })
    }

    /// Makes the directory (and its parents) a store, durably, unless it is one already, and opens it.
    ///
    /// # Errors
    /// `DirectoryNotEmpty` when the directory holds anything else than a store; `Unsupported` when its file system is not
    /// fit for one, and then nothing is left of it.
    pub fn create(root: &Path, disk: Box<dyn Disk>) -> io::Result<Self> {
        let made = layout::make(root, &*disk)?;
        let opened = Self::open(root, disk)?;
        Ok(Self {
            is_new: made.is_some(),
            made: made.unwrap_or_default(),
            ..opened
        })
    }

    /// Tries whether the file system of the directory does what a store rests on. Leaves nothing behind.
    ///
    /// # Errors
    /// `Unsupported` when it does not.
    pub fn try_out(&self) -> io::Result<()> {
        layout::try_out(&self.root, &*self.disk)
    }

    /// Removes the store from the disk if it holds no objects; the directory too, as asked for, if nothing else is in it.
    /// Whether it was removed.
    pub fn remove_if_empty(&self, directory: Directory) -> S3Result<bool> {
        drop(self.scratch.lock().take());
        let removed = layout::remove(&self.root, |is_empty| {
            is_empty && (directory == Directory::Removed || self.is_new)
        });
        let error = |error| disk_error("remove the store in", &self.root, error);
        if !removed.map_err(error)? {
            return Ok(false);
        }
        let root = [self.root.clone()];
        let goes = match directory {
            Directory::Removed => &root[..],
            Directory::AsFound => &self.made,
        };
        remove_dirs(goes).map_err(error)?;
        Ok(true)
    }

    /// Whether the store's directory is there, and not an empty place where it is mounted, or another one.
    ///
    /// # Errors
    /// `ServiceUnavailable` when it is not: nothing can be told of any object then.
    fn check_present(&self) -> S3Result<()> {
        let is_root = fs::read(self.root.join(MARKER)).is_ok_and(|text| text == MARKER_TEXT.as_bytes());
        let is_marked = || {
            !self.is_marked.load(Ordering::Acquire) || self.root.join(OBJECTS).join(OBJECTS_MARKER).exists()
        };
        if is_root && is_marked() {
            return Ok(());
        }
        let what = format!(
            "the store in {} is away: its directory was unmounted, moved or removed",
            self.root.display()
        );
        Err(S3Error::with_message(S3ErrorCode::ServiceUnavailable, what))
    }

    /// What an object's absence means.
    fn absent(&self) -> S3Error {
        match self.check_present() {
            Ok(()) => s3_error!(NoSuchKey),
            Err(away) => away,
        }
    }

    /// Opens an object for reading.
    ///
    /// # Errors
    /// `NoSuchKey`; [`DAMAGED`] for a file that is damaged; `ServiceUnavailable` while the directory is away.
    pub fn get(&self, key: &str) -> S3Result<OpenObject> {
        let path = self.path(key)?;
        match File::open(&path) {
            Ok(file) => {
                let header = ObjectHeader::read(&file).map_err(|error| disk_error("read", &path, error))?;
                Ok(OpenObject { file, header })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Err(self.absent()),
            Err(error) => Err(disk_error("open", &path, error)),
        }
    }

    /// Writes an object of the data that `fill` puts into the file (its length in bytes is what it returns).
    ///
    /// # Errors
    /// `PreconditionFailed`, `NoSuchKey` (a condition on an absent object), `InternalError` for what the disk says.
    pub fn put(
        &self,
        key: &str,
        metadata: HashMap<String, String>,
        condition: &Condition,
        fill: impl FnOnce(&mut File) -> io::Result<u64>,
    ) -> S3Result<ObjectHeader> {
        let target = self.path(key)?;
        let scratch = self.scratch()?;
        let mut temp =
            TempFile::create(scratch.dir()).map_err(|error| disk_error("write in", scratch.dir(), error))?;
        let fail = |error| disk_error("write", &target, error);
        let data_len_bytes = fill(&mut temp.file).map_err(fail)?;
        let header = ObjectHeader::new(data_len_bytes, metadata);
        temp.file
            .write_all(&header.encode().map_err(fail)?)
            .map_err(fail)?;
        self.disk.sync_file(&temp.file).map_err(fail)?;
        {
            let _exclusive = scratch
                .exclusive()
                .map_err(|error| disk_error("lock", &self.root, error))?;
            self.check(key, condition)?;
            temp.rename(&target).map_err(fail)?;
        }
        self.sync_objects(&scratch)?;
        Ok(header)
    }

    /// Removes an object; nothing happens where there is none.
    ///
    /// # Errors
    /// `PreconditionFailed` when the object is another one than the condition says.
    pub fn delete(&self, key: &str, condition: &Condition) -> S3Result<()> {
        let target = self.path(key)?;
        let scratch = self.scratch()?;
        {
            let _exclusive = scratch
                .exclusive()
                .map_err(|error| disk_error("lock", &self.root, error))?;
            if *condition != Condition::None {
                self.check(key, condition)?;
            }
            match fs::remove_file(&target) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(disk_error("remove", &target, error));
                }
                Err(_) => self.check_present()?,
                Ok(()) => {}
            }
        }
        self.sync_objects(&scratch)
    }

    /// The objects with a prefix, above the key `after`, at most `limit`.
    pub fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> S3Result<Page> {
        let mut keys: Vec<String> = self
            .names()?
            .filter_map(|name| key_of_name(&name))
            .filter(|key| key.starts_with(prefix) && after.is_none_or(|after| key.as_str() > after))
            .collect();
        keys.sort_unstable();
        let more = keys.len() > limit;
        keys.truncate(limit);
        let next = keys.last().filter(|_| more).cloned();
        let mut found = Vec::with_capacity(keys.len());
        for key in keys {
            match self.get(&key) {
                Ok(object) => found.push((key, object.header)),
                // Deleted since the directory was read.
                Err(error) if *error.code() == S3ErrorCode::NoSuchKey => {}
                // What is damaged must be seen, to be deleted.
                Err(error) => match self.damaged(&key) {
                    Some(header) => found.push((key, header)),
                    None => return Err(error),
                },
            }
        }
        Ok(Page { found, next })
    }

    /// What can be told of an object whose file is there and cannot be one: its length, and an ETag that matches none.
    fn damaged(&self, key: &str) -> Option<ObjectHeader> {
        let file = File::open(self.path(key).ok()?).ok()?;
        let is_damaged = ObjectHeader::read(&file).is_err_and(|error| error.kind() == ErrorKind::InvalidData);
        let len_bytes = file.metadata().ok()?.len();
        is_damaged.then(|| ObjectHeader::new(len_bytes, Default::default()))
    }

    /// Ends all changes through this handle, and gives back what it has of its own in the directory.
    pub fn end_changes(&self) {
        let mut slot = self.scratch.lock();
        self.is_ended.store(true, Ordering::Release);
        drop(slot.take());
    }

    /// Where this process keeps its temporary files and uploads; refused once the disk has failed.
    pub fn scratch(&self) -> S3Result<Arc<Scratch>> {
        if self.broken.load(Ordering::Acquire) {
            let what = "an earlier change could not be made durable; check the disk, then restart";
            return Err(S3Error::with_message(S3ErrorCode::InternalError, what));
        }
        let mut slot = self.scratch.lock();
        if self.is_ended.load(Ordering::Acquire) {
            return Err(S3Error::with_message(
                S3ErrorCode::InternalError,
                "the store is closed",
            ));
        }
        if let Some(scratch) = &*slot {
            return Ok(scratch.clone());
        }
        let made = Scratch::open(&self.root, &*self.disk)
            .map_err(|error| disk_error("write in", &self.root, error))?;
        if !self.is_marked.load(Ordering::Acquire) {
            self.check_present()?;
            layout::mark_objects(&self.root, &*self.disk)
                .map_err(|error| disk_error("mark", &self.root, error))?;
            self.is_marked.store(true, Ordering::Release);
        }
        Ok(slot.insert(Arc::new(made)).clone())
    }

    fn check(&self, key: &str, condition: &Condition) -> S3Result<()> {
        // Another thread's failure may have come between.
        self.scratch()?;
        let is_met = match condition {
            Condition::None => true,
            Condition::Absent => {
                let path = self.path(key)?;
                let exists = path.try_exists();
                let is_absent = !exists.map_err(|error| disk_error("look at", &path, error))?;
                if is_absent {
                    self.check_present()?;
                }
                is_absent
            }
            Condition::Matches(etag) => self.get(key)?.header.etag == *etag,
        };
        if is_met {
            Ok(())
        } else {
            Err(s3_error!(PreconditionFailed))
        }
    }

    fn sync_objects(&self, scratch: &Scratch) -> S3Result<()> {
        self.disk.sync_dir(scratch.objects()).map_err(|error| {
            self.broken.store(true, Ordering::Release);
            disk_error("sync", &self.root.join(OBJECTS), error)
        })
    }

    fn path(&self, key: &str) -> S3Result<PathBuf> {
        let name = name_of_key(key).ok_or_else(|| s3_error!(KeyTooLongError))?;
        Ok(self.root.join(OBJECTS).join(name))
    }

    fn names(&self) -> S3Result<impl Iterator<Item = String>> {
        let dir = self.root.join(OBJECTS);
        let entries: Vec<_> = fs::read_dir(&dir)
            .and_then(Iterator::collect::<io::Result<_>>)
            .map_err(|error| disk_error("list", &dir, error))?;
        self.check_present()?;
        Ok(entries
            .into_iter()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| !layout::is_no_object(name)))
    }
}

/// Reads `len` bytes at `at` of a file that has them.
pub(crate) fn read_at(file: &File, at: u64, len: usize) -> io::Result<Bytes> {
    let mut buffer = vec![0; len];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut buffer, at)?;
    Ok(buffer.into())
}

/// Writes the pieces one after another; how many bytes they are.
pub(crate) fn write_all(file: &mut File, pieces: &[Bytes]) -> io::Result<u64> {
    let mut len_bytes = 0;
    for piece in pieces {
        file.write_all(piece)?;
        len_bytes += piece.len() as u64;
    }
    Ok(len_bytes)
}

/// Copies all of `from`, which must be `len_bytes` long. The kernel does it, without bytes passing through here.
pub(crate) fn copy_exactly(mut from: impl io::Read, to: &mut File, len_bytes: u64) -> io::Result<u64> {
    let copied = io::copy(&mut from, to)?;
    if copied != len_bytes {
        return Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "a file of the store was cut off",
        ));
    }
    Ok(copied)
}

/// What the disk says, as S3 says it.
pub(crate) fn disk_error(verb: &str, path: &Path, error: io::Error) -> S3Error {
    let what = format!("cannot {verb} {}: {error}", path.display());
    // Logged here, because the engine's own messages give the code alone.
    log::error!("{what}");
    if error.kind() != ErrorKind::InvalidData {
        return S3Error::with_message(S3ErrorCode::InternalError, what);
    }
    let mut damaged = S3Error::with_message(S3ErrorCode::Custom(DAMAGED.into()), what);
    if let Ok(status) = DAMAGED_STATUS.try_into() {
        damaged.set_status_code(status);
    }
    damaged
}
