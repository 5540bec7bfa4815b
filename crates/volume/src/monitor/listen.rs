//! Where a server listens for who asks about it.

use std::fs;
use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

use crate::metrics::address::ListenAddress;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// A socket that listens. A Unix socket is removed at the end, unless another one is in its place.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: ListenAddress,
    file: Option<SocketFile>,
}

#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// The file of a Unix socket.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode);
        if is_ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Listens. A Unix socket is for its owner alone, and one that a killed server left is replaced.
    ///
    /// # Errors
    /// When the address cannot be had; the text says why.
    pub fn bind(address: &ListenAddress) -> io::Result<Self> {
        match address {
            ListenAddress::Tcp(at) => {
                let socket = TcpListener::bind(at)?;
                socket.set_nonblocking(true)?;
                Ok(Self {
                    address: ListenAddress::Tcp(socket.local_addr()?),
                    socket: Socket::Tcp(socket),
                    file: None,
                })
            }
            ListenAddress::Unix(path) => {
                remove_dead(path)?;
                let (socket, file) = bind_unix(path)?;
                Ok(Self {
                    address: address.clone(),
                    socket: Socket::Unix(socket),
                    file: Some(file),
                })
            }
        }
    }

    /// The socket, and what removes its file.
    pub(super) fn into_parts(self) -> (Socket, Option<SocketFile>) {
        (self.socket, self.file)
    }

    /// Where it listens; with the port that the system chose.
    pub fn address(&self) -> &ListenAddress {
        &self.address
    }
}

fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    let file = SocketFile {
        path: path.to_owned(),
        inode: fs::symlink_metadata(path)?.ino(),
    };
    // Before anybody can connect.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    listen(&socket, BACKLOG)?;
    Ok((UnixListener::from(socket), file))
}

/// Removes a socket that nobody listens at.
pub(super) fn remove_dead(path: &Path) -> io::Result<()> {
    let found = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !found.file_type().is_socket() {
        return Err(io::Error::new(
            ErrorKind::AlreadyExists,
            "there is a file that is no socket",
        ));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Err(io::Error::new(
            ErrorKind::AddrInUse,
            "another server listens there",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(dir: &tempfile::TempDir) -> ListenAddress {
        ListenAddress::Unix(dir.path().join("socket"))
    }

    #[test]
    fn a_socket_is_its_owners_and_goes_with_its_server() {
        let dir = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&at(&dir)).unwrap();
        let path = dir.path().join("socket");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        assert_eq!(
            Listener::bind(&at(&dir)).unwrap_err().kind(),
            ErrorKind::AddrInUse
        );
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn what_a_killed_server_left_is_replaced_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "as after a kill");
        let first = Listener::bind(&at(&dir)).unwrap();
        fs::remove_file(&path).unwrap();
        let second = Listener::bind(&at(&dir)).unwrap();
        drop(first);
        assert!(path.exists(), "the second one's");
        drop(second);
        fs::write(&path, "mine").unwrap();
        assert_eq!(
            Listener::bind(&at(&dir)).unwrap_err().kind(),
            ErrorKind::AlreadyExists
        );
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
}
