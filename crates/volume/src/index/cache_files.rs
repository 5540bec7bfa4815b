//! The files of a node cache on a local disk: its directory, the lock on it, and which files in it belong to the cache.
//!
//! ```text
//! <path>/<volume id>/nodes.lock   flock(2) on it is held by the server that uses the cache
//! <path>/<volume id>/nodes/       the cache's file (`cache_file`), `checkpoint` (`cache_state`)
//! ```
//!
//! Earlier releases kept the same files directly in `<volume id>/`, where the read cache may have its own files. They recorded the
//! checkpoint at the end alone, and kept a file `open` until then.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use log::warn;

use crate::disk::cache_file::{self, is_of_cache};
use crate::disk::{Disk, fitness};
use crate::meta::cache_state;

/// The cache's directory inside the volume's directory.
const NODES_NAME: &str = "nodes";
const LOCK_NAME: &str = "nodes.lock";
/// This file is there where a server of an earlier release was killed. What is recorded then is older than the contents, so these
/// are not trusted.
const OPEN_MARKER: &str = "open";
/// The directory of a read cache. If it exists, files directly in the volume's directory may be the read cache's.
const PAGES_NAME: &str = "pages";

/// The locked directory of a node cache.
#[derive(Debug)]
pub(super) struct NodeFiles {
    dir: PathBuf,
    lock: File,
}

impl NodeFiles {
    /// Makes the volume's directory and locks the node cache in it. Returns `None`, with a warning, when the lock
    /// cannot be taken: only the holder of the lock may say whether the contents are whole.
    ///
    /// # Errors
    /// When the directory cannot be made or used.
    pub fn lock(of_volume: &Path, disk: &dyn Disk) -> io::Result<Option<Self>> {
        make_dir(of_volume)?;
        let path = of_volume.join(LOCK_NAME);
        let open = || {
            OpenOptions::new()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .open(&path)
                .map_err(|e| named(&path, &e))
        };
        let (lock, second) = (open()?, open()?);
        let reason = match fitness::try_lock(disk, &lock, &second, of_volume) {
            Ok(true) => {
                remove_earlier(of_volume)?;
                let dir = of_volume.join(NODES_NAME);
                return Ok(Some(Self { dir, lock }));
            }
            Ok(false) => "another server uses it".to_owned(),
            Err(e) if fitness::is_unfit(&e) => e.to_string(),
            Err(e) => return Err(named(&path, &e)),
        };
        warn!(
            "the node cache in {} is kept in memory only: {reason}",
            of_volume.display()
        );
        Ok(None)
    }

    /// The directory of the cache's files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the contents are those of a server of an earlier release that was killed.
    pub fn is_of_killed_earlier(&self) -> bool {
        self.dir.join(OPEN_MARKER).exists()
    }

    /// Makes the directory, where there is none.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn make(&self) -> io::Result<()> {
        make_dir(&self.dir)
    }

    /// Removes the cache's files, and no file that somebody else has put there.
    ///
    /// # Errors
    /// When one of them cannot be removed.
    pub fn empty(&self) -> io::Result<()> {
        let names = [cache_state::NAME, cache_state::NEW_NAME, OPEN_MARKER];
        remove_ours(&self.dir, &names)
    }

    /// Releases the lock, so that another server can use the cache.
    pub fn unlock(&self) {
        // This fails only for a handle that is not a file's.
        let _ = self.lock.unlock();
    }
}

/// Removes the files that an earlier release left directly in the volume's directory. Nothing reads them any more.
fn remove_earlier(of_volume: &Path) -> io::Result<()> {
    // One of its files shows that there was a cache. The file `open` was empty.
    let is_any = file_names(of_volume)?.iter().any(|name| is_of_cache(name));
    if !is_any {
        return Ok(());
    }
    let mut names = Vec::new();
    if fs::metadata(of_volume.join(OPEN_MARKER)).is_ok_and(|found| found.is_file() && found.len() == 0) {
        names.push(OPEN_MARKER);
    }
    if !of_volume.join(PAGES_NAME).exists() {
        names.extend([cache_state::NAME, cache_state::NEW_NAME]);
    }
    remove_ours(of_volume, &names)
}

/// Removes the cache's file, and the files with one of `names`.
fn remove_ours(dir: &Path, names: &[&str]) -> io::Result<()> {
    for name in file_names(dir)? {
        if is_of_cache(&name) || names.contains(&name.as_str()) {
            let path = dir.join(name);
            fs::remove_file(&path).map_err(|e| named(&path, &e))?;
        }
    }
    Ok(())
}

/// The names of the files in a directory; none when there is no directory.
fn file_names(dir: &Path) -> io::Result<Vec<String>> {
    cache_file::file_names(dir).map_err(|e| named(dir, &e))
}

fn make_dir(dir: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|e| named(dir, &e))
}

/// An error text that names the directory.
pub(super) fn named(dir: &Path, e: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("the node cache in {}: {e}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;
    use crate::disk::tests::{Lack, Lacking};

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn put(dir: &Path, all: &[&str]) {
        for name in all {
            fs::write(dir.join(name), "").unwrap();
        }
    }

    #[test]
    fn what_an_earlier_release_left_goes_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let ours = [
            "foyer-storage-direct-fs-00000000",
            "foyer-storage-direct-fs-00000001",
        ];
        put(dir.path(), &ours);
        put(
            dir.path(),
            &["open", "checkpoint", "notes", "foyer-storage-direct-fs-1.bak"],
        );
        fs::create_dir(dir.path().join("foyer-storage-direct-fs-00000002")).unwrap();
        let left = [
            "foyer-storage-direct-fs-00000002",
            "foyer-storage-direct-fs-1.bak",
            "nodes.lock",
            "notes",
        ];
        drop(NodeFiles::lock(dir.path(), &RealDisk).unwrap().unwrap());
        assert_eq!(names(dir.path()), left);

        // Without a cache these files belong to somebody else. Beside a read cache, `checkpoint` belongs to the read
        // cache.
        fs::write(dir.path().join("open"), "").unwrap();
        drop(NodeFiles::lock(dir.path(), &RealDisk).unwrap().unwrap());
        assert!(dir.path().join("open").exists());
        put(dir.path(), &ours);
        put(dir.path(), &["checkpoint"]);
        fs::write(dir.path().join("open"), "a text").unwrap();
        fs::create_dir(dir.path().join(PAGES_NAME)).unwrap();
        drop(NodeFiles::lock(dir.path(), &RealDisk).unwrap().unwrap());
        let kept = names(dir.path());
        assert!(
            ["checkpoint", "open"]
                .iter()
                .all(|name| kept.iter().any(|k| k == name)),
            "{kept:?}"
        );
        assert!(
            !kept.iter().any(|name| is_of_cache(name) && name != left[0]),
            "{kept:?}"
        );
    }

    #[test]
    fn emptying_leaves_what_is_not_the_caches() {
        let dir = tempfile::tempdir().unwrap();
        let files = NodeFiles::lock(dir.path(), &RealDisk).unwrap().unwrap();
        files.empty().unwrap();
        files.make().unwrap();
        put(
            files.dir(),
            &[
                OPEN_MARKER,
                "foyer-storage-direct-fs-00000000",
                cache_file::CACHE_FILE,
                "checkpoint",
                "checkpoint.new",
                "thesis.tex",
            ],
        );
        files.empty().unwrap();
        assert_eq!(names(files.dir()), ["thesis.tex"]);
    }

    #[test]
    fn a_disk_whose_locks_exclude_nobody_is_gone_without() {
        let dir = tempfile::tempdir().unwrap();
        let earlier = "foyer-storage-direct-fs-00000000";
        put(dir.path(), &[earlier]);
        for lack in [Lack::Exclusion, Lack::Locks] {
            assert!(
                NodeFiles::lock(dir.path(), &Lacking(lack)).unwrap().is_none(),
                "{lack:?}"
            );
        }
        let first = NodeFiles::lock(dir.path(), &RealDisk).unwrap();
        assert!(first.is_some() && NodeFiles::lock(dir.path(), &RealDisk).unwrap().is_none());
    }
}
