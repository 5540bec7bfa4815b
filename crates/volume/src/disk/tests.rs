//! File systems that lack something, one thing each.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use parking_lot::Mutex;

use super::fitness::*;
use super::*;

/// What a [`Lacking`] file system does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lack {
    /// A lock is given to everybody.
    Exclusion,
    /// There are no locks (ENOLCK), as on NFS without its lock manager.
    Locks,
    /// A file is not synced (EINVAL).
    FileSync,
    /// A directory is not synced (ENOSYS).
    DirSync,
    /// A file that is there is made anew.
    CreateOnly,
    /// Nothing is renamed over another.
    Replacing,
    /// A rename copies into the file that is there.
    Atomicity,
    /// A rename says that it is done, and is not.
    Renaming,
}

/// All of them.
pub(crate) const LACKS: [Lack; 8] = [
    Lack::Exclusion,
    Lack::Locks,
    Lack::FileSync,
    Lack::DirSync,
    Lack::CreateOnly,
    Lack::Replacing,
    Lack::Atomicity,
    Lack::Renaming,
];

/// A file system like that.
pub(crate) struct Lacking(pub Lack);

impl Lacking {
    fn is(&self, lack: Lack, code: i32) -> io::Result<()> {
        match self.0 == lack {
            true => Err(io::Error::from_raw_os_error(code)),
            false => Ok(()),
        }
    }
}

impl Disk for Lacking {
    fn sync_file(&self, file: &File) -> io::Result<()> {
        self.is(Lack::FileSync, libc::EINVAL)?;
        file.sync_data()
    }

    fn sync_dir(&self, dir: &File) -> io::Result<()> {
        self.is(Lack::DirSync, libc::ENOSYS)?;
        dir.sync_all()
    }

    fn lock(&self, file: &File) -> io::Result<()> {
        self.is(Lack::Locks, libc::ENOLCK)?;
        match self.0 {
            Lack::Exclusion => Ok(()),
            _ => file.lock(),
        }
    }

    fn try_lock(&self, file: &File) -> Result<(), TryLockError> {
        self.is(Lack::Locks, libc::ENOLCK).map_err(TryLockError::Error)?;
        match self.0 {
            Lack::Exclusion => Ok(()),
            _ => file.try_lock(),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self.0 {
            Lack::Replacing if to.exists() => Err(io::Error::from_raw_os_error(libc::EEXIST)),
            Lack::Atomicity => {
                fs::copy(from, to)?;
                fs::remove_file(from)
            }
            Lack::Renaming => Ok(()),
            _ => fs::rename(from, to),
        }
    }

    fn create_new(&self, path: &Path) -> io::Result<File> {
        match self.0 {
            Lack::CreateOnly => File::create(path),
            _ => File::create_new(path),
        }
    }
}

fn names(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// Locks and files, tried as a store does.
fn tried(dir: &Path, disk: &dyn Disk) -> io::Result<()> {
    let path = dir.join("lock");
    let open = || File::options().create(true).append(true).open(&path);
    lock(disk, &open()?, &open()?, &path)?;
    check_files(disk, dir, &dir.join("to"), "try")
}

#[test]
fn each_lack_is_found_and_named_with_the_place_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("to")).unwrap();
    tried(dir.path(), &RealDisk).unwrap();
    for lack in LACKS {
        let refused = tried(dir.path(), &Lacking(lack)).unwrap_err();
        assert!(is_unfit(&refused), "{lack:?}: {refused}");
        let text = refused.to_string();
        for part in [dir.path().to_str().unwrap(), "another file system"] {
            assert!(text.contains(part), "{lack:?}: {text}");
        }
        assert!(!text.contains("unknown type"), "{text}");
        assert_eq!(
            (names(dir.path()), names(&dir.path().join("to"))),
            (2, 0),
            "{lack:?}"
        );
    }
}

#[test]
fn a_lock_that_somebody_else_has_is_no_lack() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    let open = || File::options().create(true).append(true).open(&path).unwrap();
    let (other, file, second) = (open(), open(), open());
    other.lock().unwrap();
    assert!(!try_lock(&RealDisk, &file, &second, &path).unwrap());
    other.unlock().unwrap();
    assert!(try_lock(&RealDisk, &file, &second, &path).unwrap());
}

/// A disk with a bad block.
struct Failing;

impl Disk for Failing {
    fn sync_file(&self, _: &File) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
}

#[test]
fn a_call_that_fails_is_no_lack() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("to")).unwrap();
    let failed = tried(dir.path(), &Failing).unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(libc::EIO));
    assert!(!is_unfit(&failed));
}

/// Notes which directories are synced.
#[derive(Default, Clone)]
pub(crate) struct Noting(Arc<Mutex<Vec<u64>>>);

impl Noting {
    /// Whether this one was.
    pub fn has_synced(&self, dir: &Path) -> bool {
        self.0.lock().contains(&fs::metadata(dir).unwrap().ino())
    }
}

impl Disk for Noting {
    fn sync_dir(&self, dir: &File) -> io::Result<()> {
        self.0.lock().push(dir.metadata()?.ino());
        dir.sync_all()
    }
}

#[test]
fn parents_are_synced_whoever_made_them_and_made_as_usual() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("a/b/c");
    let expected = |noting: &Noting| {
        ["a/b", "a", ""]
            .iter()
            .all(|of| noting.has_synced(&dir.path().join(of)))
    };
    let (disk, mut made) = (Noting::default(), Vec::new());
    make_dirs(&inner, &disk, &mut made).unwrap();
    assert_eq!(made, ["a", "a/b", "a/b/c"].map(|of| dir.path().join(of)));
    assert!(expected(&disk));
    // An earlier call may have been killed between making one and syncing its name.
    let (again, mut none) = (Noting::default(), Vec::new());
    make_dirs(&inner, &again, &mut none).unwrap();
    assert!(none.is_empty() && expected(&again));

    let mode = |of: &str| fs::metadata(dir.path().join(of)).unwrap().permissions().mode() & 0o777;
    let usual = dir.path().join("usual");
    fs::create_dir(&usual).unwrap();
    assert_eq!(
        (mode("a"), mode("a/b"), mode("a/b/c")),
        (mode("usual"), mode("usual"), 0o700)
    );

    fs::write(dir.path().join("a/theirs"), "").unwrap();
    remove_dirs(&made).unwrap();
    assert!(!dir.path().join("a/b").exists() && dir.path().join("a/theirs").exists());
}
