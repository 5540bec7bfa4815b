//! Locks that end with the process, whatever ends it: files that are locked (flock(2)) as long as a relay lives.
//!
//! Two devices over one export know nothing of each other: each file system on them would write over the other. So a relay locks where
//! its server listens before it connects, and what the server says that it serves before it is given to the kernel.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;

use sha2::{Digest, Sha256};

use crate::error::{AttachError, at};
use crate::nbd::Export;
use crate::state::Directory;
use crate::uri::{Place, Uri};

/// More links in a row are a circle.
const LINKS_MAX: usize = 40;

/// A file that is locked.
#[derive(Debug)]
pub(crate) struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes it, and says in it who has it; none if another process has.
    pub(crate) fn take(path: &Path, who: &str) -> Result<Option<Self>, AttachError> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        loop {
            let mut file = options.open(path).map_err(at(path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(at(path)(error)),
            }
            if is_at(&file, path) {
                file.set_len(0)
                    .and_then(|()| file.write_all(who.as_bytes()))
                    .map_err(at(path))?;
                let path = path.to_owned();
                return Ok(Some(Self { path, _file: file }));
            }
        }
    }

    /// Whether some process has it. While this looks, nobody can take it: for locks of which only their taker knows the name.
    pub(crate) fn is_held(path: &Path) -> bool {
        let opened = File::open(path);
        opened.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Still locked.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether a file is the one of this name. Who had the lock may have removed the file after it was opened, and another one may have made
/// and locked it anew.
fn is_at(file: &File, path: &Path) -> bool {
    let is_same =
        |one: fs::Metadata, other: fs::Metadata| (one.dev(), one.ino()) == (other.dev(), other.ino());
    let both = file.metadata().ok().zip(fs::metadata(path).ok());
    both.is_some_and(|(one, other)| is_same(one, other))
}

/// The locks of a relay.
#[derive(Debug)]
pub(crate) struct Locks {
    dir: Directory,
    who: String,
    taken: Vec<(String, Lock)>,
}

impl Locks {
    /// None yet.
    pub(crate) fn new(dir: Directory, uri: &Uri) -> Self {
        let who = format!("process {} as {uri}", process::id());
        Self {
            dir,
            who,
            taken: Vec::new(),
        }
    }

    /// Locks this, if it is not locked already; an error if another relay has it.
    pub(crate) fn take(&mut self, what: &str) -> Result<(), AttachError> {
        if self.taken.iter().any(|(taken, _)| taken == what) {
            return Ok(());
        }
        // Paths and names may be longer than a file's name, and hold what that cannot.
        let name: String = Sha256::digest(what)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let path = self.dir.path(&format!("lock-{name}"));
        match Lock::take(&path, &self.who)? {
            Some(lock) => self.taken.push((what.to_owned(), lock)),
            None => {
                let mut by = String::new();
                let _ = File::open(&path).and_then(|mut file| file.read_to_string(&mut by));
                let what = what.to_owned();
                return Err(AttachError::SameExport { what, by });
            }
        }
        Ok(())
    }

    /// Locks where a server listens.
    pub(crate) fn take_places(&mut self, uri: &Uri) -> Result<(), AttachError> {
        let places = match &uri.place {
            Place::Unix(path) => vec![canonical(path).display().to_string()],
            Place::Tcp(host, port) => {
                let mut places = vec![format!("{}:{port}", host.to_ascii_lowercase())];
                // A name that is not known yet may be, once the server is there.
                let addresses = (host.as_str(), *port).to_socket_addrs().into_iter().flatten();
                places.extend(addresses.map(one_spelling));
                places
            }
        };
        places.iter().try_for_each(|place| self.take_place(place, uri))
    }

    fn take_place(&mut self, place: &str, uri: &Uri) -> Result<(), AttachError> {
        match uri.export.is_empty() {
            true => self.take(place),
            false => self.take(&format!("{place}, export {:?}", uri.export)),
        }
    }

    /// Locks the volume that a server says it serves, if it can be written: the same server may listen at several addresses.
    pub(crate) fn take_volume(&mut self, export: &Export) -> Result<(), AttachError> {
        // Nobody writes to a checkpoint: what can be written above one (nbdkit's cow filter) is its server's own.
        let is_shared = |volume: &&str| !export.is_read_only() && !volume.contains(", checkpoint ");
        match export.volume().filter(is_shared) {
            Some(volume) => self.take(volume),
            None => Ok(()),
        }
    }
}

/// One spelling for what leads to one place on every machine.
fn one_spelling(address: SocketAddr) -> String {
    let ip = match address.ip().to_canonical() {
        ip if ip.is_unspecified() || ip == IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]) => {
            Ipv4Addr::LOCALHOST.into()
        }
        ip => ip,
    };
    SocketAddr::new(ip, address.port()).to_string()
}

/// Where a path leads, also if nothing is there yet.
fn canonical(path: &Path) -> PathBuf {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        if let Ok(there) = fs::canonicalize(&path) {
            return there;
        }
        let Ok(target) = fs::read_link(&path) else { break };
        path = path.parent().unwrap_or(Path::new("/")).join(target);
    }
    match (path.parent().map(fs::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    /// Whether a second relay is refused while a first one is there. The locks of one process are as good as those of two: each
    /// belongs to its own opening of the file.
    fn is_refused(dir: &Directory, first: &str, second: &str) -> bool {
        let mut one = Locks::new(dir.clone(), &uri(first));
        one.take_places(&uri(first)).unwrap();
        let mut other = Locks::new(dir.clone(), &uri(second));
        match other.take_places(&uri(second)) {
            Ok(()) => false,
            Err(error) => {
                let said = error.to_string();
                assert!(
                    said.contains(first) && said.contains(&process::id().to_string()),
                    "{said}"
                );
                true
            }
        }
    }

    #[test]
    fn a_second_relay_at_one_place_is_refused_however_it_is_spelt() {
        let root = tempfile::tempdir().unwrap();
        let dir = Directory::open(root.path().join("locks")).unwrap();
        let real = root.path().join("real");
        fs::create_dir(&real).unwrap();
        symlink(&real, root.path().join("link")).unwrap();
        // Nothing listens there yet.
        symlink("real/disk.sock", root.path().join("disk.sock")).unwrap();
        let at = |path: &str| format!("nbd+unix:///?socket={}/{path}", root.path().display());
        let sockets = [
            "real/disk.sock",
            "link/disk.sock",
            "disk.sock",
            "real/../real/./disk.sock",
        ];
        for (first, second) in sockets.iter().flat_map(|one| sockets.map(|other| (one, other))) {
            assert!(is_refused(&dir, &at(first), &at(second)), "{first} {second}");
        }
        assert!(!is_refused(&dir, &at("real/disk.sock"), &at("real/other.sock")));
        let hosts = [
            "127.0.0.1:10809",
            "[::1]",
            "127.0.0.1/",
            "0.0.0.0",
            "[::ffff:127.0.0.1]",
            "localhost",
            "LocalHost",
        ];
        for (first, second) in hosts.iter().flat_map(|one| hosts.map(|other| (one, other))) {
            let (first, second) = (format!("nbd://{first}"), format!("nbd://{second}"));
            assert!(is_refused(&dir, &first, &second), "{first} {second}");
        }
        assert!(!is_refused(&dir, "nbd://127.0.0.1", "nbd://127.0.0.1:7788"));
        assert!(!is_refused(&dir, "nbd://127.0.0.1", "nbd://127.0.0.1/@monday"));
        assert!(!is_refused(&dir, "nbd://127.0.0.1", "nbd://127.0.0.2"));
        let left = fs::read_dir(root.path().join("locks")).unwrap().count();
        assert_eq!(left, 0, "locks that are given up leave no files");
    }

    #[test]
    fn a_volume_that_is_written_is_attached_once_wherever_it_is_served() {
        let root = tempfile::tempdir().unwrap();
        let dir = Directory::open(root.path()).unwrap();
        let export = |flags, description: &str| Export {
            flags,
            description: description.to_owned(),
            ..Export::default()
        };
        let mut one = Locks::new(dir.clone(), &uri("nbd://a"));
        let mut other = Locks::new(dir, &uri("nbd://b"));
        let volume = export(1, "Hypernbd volume 423a30c5-ce77-40c3-9299-a143d31c733a");
        one.take_volume(&volume).unwrap();
        one.take_volume(&volume).unwrap();
        assert!(other.take_volume(&volume).is_err());
        other.take_volume(&export(3, &volume.description)).unwrap();
        other.take_volume(&export(1, "a disk")).unwrap();
        one.take_volume(&export(1, "a disk")).unwrap();
    }

    #[test]
    fn a_lock_on_a_file_that_was_removed_is_none() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("lock");
        let lock = Lock::take(&path, "a").unwrap().unwrap();
        let opened = File::open(&path).unwrap();
        assert!(Lock::is_held(&path) && Lock::take(&path, "b").unwrap().is_none() && is_at(&opened, &path));
        drop(lock);
        assert!(!Lock::is_held(&path) && !is_at(&opened, &path));
        let lock = Lock::take(&path, "c").unwrap().unwrap();
        assert!(!is_at(&opened, &path));
        assert_eq!(fs::read_to_string(&path).unwrap(), "c");
        drop(lock);
    }
}
