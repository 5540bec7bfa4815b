//! The directory of the sockets on which servers are told what to do.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::listen::remove_dead;

/// Directory below the one for what lives as long as the machine is up.
const NAME: &str = "hypernbd";
/// What follows the number of the server's process in the name of its socket.
const ENDING: &str = "sock";

/// Where this process has its socket: in the directory of servers of this user. Sockets there that killed
/// servers left are removed.
///
/// # Errors
/// When there is no such directory, none can be made, or it is somebody else's.
pub fn socket() -> io::Result<PathBuf> {
    socket_in(&dir()?, rustix::process::geteuid().as_raw())
}

/// Where a server of this user with this number has its socket, if there is one.
pub fn socket_of(pid: u32) -> Option<PathBuf> {
    Some(dir().ok()?.join(name(pid))).filter(|path| path.exists())
}

fn name(pid: u32) -> String {
    format!("{pid}.{ENDING}")
}

/// The directory: `$XDG_RUNTIME_DIR/hypernbd`, or `/run/hypernbd` for root.
///
/// # Errors
/// When neither is there.
fn dir() -> io::Result<PathBuf> {
    let parent = match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
        Some(dir) => PathBuf::from(dir),
        None if rustix::process::geteuid().is_root() => PathBuf::from("/run"),
        None => {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                "XDG_RUNTIME_DIR is not set",
            ));
        }
    };
    Ok(parent.join(NAME))
}

fn socket_in(dir: &Path, uid: u32) -> io::Result<PathBuf> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let found = fs::symlink_metadata(dir)?;
    if !found.is_dir() || found.uid() != uid || found.mode() & 0o022 != 0 {
        let why = format!(
            "{} is not a directory that this user alone writes to",
            dir.display()
        );
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    sweep(dir);
    Ok(dir.join(name(std::process::id())))
}

/// Removes what killed servers left. One that is about to listen has a process still.
fn sweep(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let pid: Option<u32> = path.file_stem().and_then(|name| name.to_str()?.parse().ok());
        let is_socket = path.extension().is_some_and(|ending| ending == ENDING);
        if let (Some(pid), true) = (pid, is_socket)
            && !Path::new(&format!("/proc/{pid}")).exists()
        {
            let _ = remove_dead(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_killed_servers_socket_is_removed_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let (dir, uid) = (root.path().join("hypernbd"), rustix::process::geteuid().as_raw());
        let own = socket_in(&dir, uid).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        assert!(own.starts_with(&dir));
        // No process has so large a number.
        let (dead, living) = (dir.join("4999999.sock"), dir.join("4999998.sock"));
        drop(UnixListener::bind(&dead).unwrap());
        let _listening = UnixListener::bind(&living).unwrap();
        let starting = dir.join(format!("{}.sock", std::process::id()));
        drop(UnixListener::bind(&starting).unwrap());
        fs::write(dir.join("4999997.sock"), "mine").unwrap();
        fs::write(dir.join("notes"), "mine").unwrap();
        socket_in(&dir, uid).unwrap();
        assert!(!dead.exists() && living.exists() && starting.exists());
        assert!(dir.join("4999997.sock").exists() && dir.join("notes").exists());
    }

    #[test]
    fn a_directory_that_others_write_to_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let uid = rustix::process::geteuid().as_raw();
        assert!(socket_in(root.path(), uid + 1).is_err(), "somebody else's");
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(socket_in(root.path(), uid).is_err());
    }
}
