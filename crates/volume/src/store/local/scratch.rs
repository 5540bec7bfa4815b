//! What one running process has of its own in a store's directory: temporary files and the parts of multipart uploads.
//!
//! `<root>/scratch/<id>/` holds them, beside a file `alive` that the process keeps locked as long as it lives. Whoever
//! makes a scratch directory first removes those whose `alive` is not locked: their processes are gone. So a process
//! killed at any moment leaves nothing behind for longer than until the next one writes.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;

use super::layout::{LOCK, OBJECTS, SCRATCH};
use crate::disk::{Disk, fitness};

const ALIVE: &str = "alive";

/// The scratch directory of this process.
pub(crate) struct Scratch {
    dir: PathBuf,
    /// The directory-wide lock. flock(2) keeps other processes out, the mutex other threads of this one.
    lock: Mutex<File>,
    objects: File,
    /// Multipart uploads begun here and not yet ended, by id.
    pub uploads: Mutex<HashMap<String, Upload>>,
    /// Locked as long as this lives.
    _alive: File,
}

/// A multipart upload in progress.
#[derive(Debug, Clone, Default)]
pub(crate) struct Upload {
    /// The key of the object to be.
    pub key: String,
    /// Its user metadata.
    pub metadata: HashMap<String, String>,
    /// What was uploaded last under each part number.
    pub parts: BTreeMap<i32, Part>,
}

/// A part of an upload, in a file of its own that holds the data alone.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// Different for every upload of a part; without quotes.
    pub etag: String,
    /// Length of the data.
    pub len_bytes: u64,
    /// The file.
    pub path: PathBuf,
}

impl Scratch {
    /// Makes a scratch directory in the store `root`, and removes those of processes that are gone.
    ///
    /// # Errors
    /// `Unsupported` where a lock excludes nobody: nothing is touched then.
    pub fn open(root: &Path, disk: &dyn Disk) -> io::Result<Self> {
        let open_lock = || File::options().append(true).open(root.join(LOCK));
        let (lock, second) = (open_lock()?, open_lock()?);
        let objects = File::open(root.join(OBJECTS))?;
        let all = root.join(SCRATCH);
        let dir = all.join(Uuid::new_v4().simple().to_string());
        // Under the lock, so that nobody finds the new directory before its `alive` is locked.
        fitness::lock(disk, &lock, &second, root)?;
        sweep(&all)?;
        fs::create_dir(&dir)?;
        let alive = File::create_new(dir.join(ALIVE))?;
        alive.lock()?;
        lock.unlock()?;
        Ok(Self {
            dir,
            lock: Mutex::new(lock),
            objects,
            uploads: Mutex::default(),
            _alive: alive,
        })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A handle of `objects/`, to sync it by.
    pub fn objects(&self) -> &File {
        &self.objects
    }

    /// Waits until nobody else, here or in another process, is between a check and a rename.
    pub fn exclusive(&self) -> io::Result<Exclusive<'_>> {
        let file = self.lock.lock();
        file.lock()?;
        Ok(Exclusive { file })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // The file that tells whose it is comes last, so that whoever removes the store meanwhile knows it. What cannot be removed now
        // is swept by the next process.
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            if entry.file_name() != ALIVE {
                let _ = fs::remove_file(entry.path());
            }
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The right to check and rename; given back when dropped.
pub(crate) struct Exclusive<'a> {
    file: MutexGuard<'a, File>,
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        // Fails only for a handle that is not a file's; closing it would release the lock as well.
        let _ = self.file.unlock();
    }
}

/// A new file in the scratch directory, removed unless it is renamed.
pub(crate) struct TempFile {
    path: Option<PathBuf>,
    /// Open for writing, at its end.
    pub file: File,
}

impl TempFile {
    /// Makes one with a name of its own.
    pub fn create(dir: &Path) -> io::Result<Self> {
        let path = dir.join(Uuid::new_v4().simple().to_string());
        let file = File::create_new(&path)?;
        Ok(Self {
            path: Some(path),
            file,
        })
    }

    /// Gives the file its final name, replacing what had it.
    pub fn rename(mut self, target: &Path) -> io::Result<()> {
        if let Some(path) = &self.path {
            fs::rename(path, target)?;
        }
        self.path = None;
        Ok(())
    }

    /// Keeps the file under the name it has, and tells it.
    pub fn keep(mut self) -> PathBuf {
        self.path.take().unwrap_or_default()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

/// Whether it is a scratch directory of some process: by its name, and by the file that each makes first.
fn is_ours(dir: &Path) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let is_named = Uuid::try_parse(&name).is_ok_and(|id| id.simple().to_string() == name);
    // One whose process was killed right after it made it is empty.
    let is_empty = || fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    is_named && (dir.join(ALIVE).is_file() || is_empty())
}

/// Removes the scratch directories of a store that goes, and the directory around them, unless something else is in it.
pub(crate) fn remove(all: &Path) -> io::Result<()> {
    for entry in fs::read_dir(all)? {
        let dir = entry?.path();
        if is_ours(&dir) {
            match fs::remove_dir_all(&dir) {
                // Its process ended, and removed it at the same time.
                Err(error) if error.kind() == ErrorKind::NotFound && !dir.exists() => {}
                removed => removed?,
            }
        }
    }
    match fs::remove_dir(all) {
        Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => Ok(()),
        other => other,
    }
}

/// Removes the scratch directories of processes that are gone.
fn sweep(all: &Path) -> io::Result<()> {
    for entry in fs::read_dir(all)? {
        let dir = entry?.path();
        if !is_ours(&dir) {
            continue;
        }
        // For writing: some network file systems lock no others.
        let alive = match File::options().append(true).open(dir.join(ALIVE)) {
            Ok(alive) => Some(alive),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => None,
            Err(error) => return Err(error),
        };
        if alive.is_none_or(|alive| alive.try_lock().is_ok()) {
            // Its owner may be removing it at this moment.
            let _ = fs::remove_dir_all(&dir).or_else(|_| fs::remove_file(&dir));
        }
    }
    Ok(())
}
