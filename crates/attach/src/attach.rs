//! Attaching: from a URI to a device, and the relay's life.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_send_buffer_size_force;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::background;
use crate::device;
use crate::dial::{Dialled, Dialler, Server, until_there};
use crate::error::{AttachError, at};
use crate::locks::Locks;
use crate::nbd::handshake;
use crate::netlink::{Device, Driver};
use crate::owner::{DeviceOwner, STACK_BYTES, SocketOwner};
use crate::protect;
use crate::relay::{Owner, Relay, Signals};
use crate::state::{Attached, DIR, Directory, now};
use crate::uri::Uri;

/// What the kernel's socket holds of either direction.
const SOCKET_BYTES: usize = 1 << 20;

/// What is to be attached, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The export.
    pub uri: Uri,
    /// `/dev/nbd3`; the next that is free if none.
    pub device: Option<String>,
    /// What it is called below `/dev/hypernbd`.
    pub name: Option<String>,
    /// The device's block size; the export's if none.
    pub block_size: Option<u32>,
    /// How much of what the server has answered and not flushed is held. With 0 nothing is, which is right for a server that
    /// loses nothing when it is killed.
    pub hold_bytes: usize,
    /// How long there may be no link before requests fail; for ever if none.
    pub dead_after: Option<Duration>,
    /// How long a server that is not there is waited for.
    pub wait: Duration,
    /// Instead of a device: whoever connects to this socket is the kernel. It is greeted in the oldstyle protocol, for tests.
    pub kernel_socket: Option<PathBuf>,
}

/// Attaches, says so on standard output once the device is ready, and relays until it is detached.
pub fn attach(options: &Options) -> Result<(), AttachError> {
    background::leave_terminal();
    background::end_with_parent()?;
    signal_hook::flag::register(SIGHUP, Arc::new(AtomicBool::new(false)))
        .map_err(at("a handler of signals"))?;
    match &options.kernel_socket {
        Some(path) => attach_socket(options, path),
        None => attach_device(options),
    }
}

/// What can be read from once the process is told something. Until this is called it ends at once when it is told to, which is right
/// while there is no device.
fn signals() -> Result<Signals, AttachError> {
    let told_by = |signals: &[i32]| {
        let (here, there) = UnixStream::pair().map_err(at("a pair of sockets"))?;
        for signal in signals {
            let pipe = there.try_clone().map_err(at("a pair of sockets"))?;
            signal_hook::low_level::pipe::register(*signal, pipe).map_err(at("a handler of signals"))?;
        }
        Ok(here)
    };
    Ok(Signals {
        look: told_by(&[SIGHUP])?,
        terminate: told_by(&[SIGTERM, SIGINT])?,
    })
}

fn attach_device(options: &Options) -> Result<(), AttachError> {
    must_be_root()?;
    let index = options.device.as_deref().map(device::index).transpose()?;
    let name = options.name.as_deref().map(checked_name).transpose()?;
    let dir = Directory::open(DIR)?;
    refuse_what_is_there(&dir, options, index)?;
    let driver = driver()?;
    // TLS has a thread with the first link.
    protect::against_its_own_device();
    // Given back last: until then others take this relay for one that is there.
    let (lock_name, _relay_lock) = dir.relay_lock()?;
    let (server, dialled, mut locks) = first_link(options, &dir)?;
    if let Some(name) = &name {
        locks.take(&format!("the name {name:?}"))?;
    }
    let signals = signals()?;
    let export = dialled.1.clone();
    let block_size = device::block_size(export.blocks, export.size, options.block_size).map_err(|why| {
        AttachError::Export {
            uri: options.uri.to_string(),
            why,
        }
    })?;
    let (kernels, ours) = UnixStream::pair().map_err(at("a pair of sockets"))?;
    for end in [&kernels, &ours] {
        let _ = set_socket_send_buffer_size_force(end, SOCKET_BYTES);
    }
    let owner = DeviceOwner::new(dir.clone(), export.size, block_size, Arc::new(resize));
    let known = owner.clone();
    // The kernel may ask for data before it has answered: the relay must be going by then.
    let backend = options.uri.to_string();
    let connecting = thread::Builder::new()
        .name("connect".to_owned())
        .stack_size(STACK_BYTES);
    // From here on that thread ends the process with who waits for the device, and takes that back when it says that it is ready.
    background::outlive_parent();
    let connecting = connecting.spawn(move || {
        background::end_with_parent()?;
        let (size, flags, backend) = (export.size, export.flags, &*backend);
        let asked = Device {
            index,
            size: size - size % block_size,
            block_size,
            flags,
            backend,
        };
        let made = driver
            .connect(&asked, kernels.as_fd())
            .map_err(|error| refused(index, &error))?;
        if !device::settle(made, true) {
            log::warn!("{} has not appeared yet", device::path(made));
        }
        let attached = Attached {
            device: device::path(made),
            uri: backend.to_owned(),
            name,
            pid: process::id(),
            lock: lock_name,
            made_by: device::maker(made),
            since: now(),
            link_since: now(),
            size: Some(asked.size),
            ..Attached::default()
        };
        // The kernel keeps its end of the socket, so a device that nobody would know of has to be taken away.
        if let Err(error) = owner.begin(attached.clone()) {
            let _ = driver.disconnect(made);
            return Err(error);
        }
        device::announce(made);
        log::info!(
            "{backend} is {}: {size} bytes, blocks of {block_size}",
            attached.device
        );
        background::ready(&attached.device);
        Ok(attached)
    });
    let connecting = connecting.map_err(at("a thread"))?;
    let relayed = relay(options, server, ours, dialled, signals, known.clone());
    let attached = connecting
        .join()
        .unwrap_or_else(|_| Err(AttachError::Background("a thread panicked".to_owned())))?;
    let made = device::index(&attached.device)?;
    // It was told to end before it knew its device, or could not go on: nobody is behind it any more.
    let is_detached = matches!(relayed, Ok(true));
    if !is_detached
        && attached.is_made(device::maker(made))
        && let Err(error) = self::driver()?.disconnect(made)
    {
        log::error!("{} stays, and fails every request: {error}", attached.device);
    }
    // Before anybody can see that the device is gone, and attach its export anew.
    drop(locks);
    known.end();
    dir.remove(&attached);
    device::announce(made);
    relayed.map(drop)
}

fn attach_socket(options: &Options, path: &Path) -> Result<(), AttachError> {
    let beside = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let dir = Directory::open(beside.unwrap_or(Path::new(".")))?;
    let (server, dialled, _locks) = first_link(options, &dir)?;
    let signals = signals()?;
    let listener = UnixListener::bind(path).map_err(at(path))?;
    let file = SocketFile(path);
    background::ready(&path.display().to_string());
    let Some(mut kernel) = accept(&listener, &signals.terminate).map_err(at(path))? else {
        return Ok(());
    };
    drop(file);
    io::Write::write_all(&mut kernel, &handshake::old_hello(&dialled.1)).map_err(at(path))?;
    relay(options, server, kernel, dialled, signals, SocketOwner).map(drop)
}

/// The file of a socket, which goes with this.
struct SocketFile<'a>(&'a Path);

impl Drop for SocketFile<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.0);
    }
}

/// Waits for somebody to connect; none if this is told to end before.
fn accept(listener: &UnixListener, terminate: &UnixStream) -> io::Result<Option<UnixStream>> {
    listener.set_nonblocking(true)?;
    loop {
        let mut sockets = [terminate.as_fd(), listener.as_fd()]
            .map(|socket| PollFd::from_borrowed_fd(socket, PollFlags::IN));
        match poll(&mut sockets, None) {
            Err(Errno::INTR) => continue,
            done => done?,
        };
        if !sockets[0].revents().is_empty() {
            return Ok(None);
        }
        match listener.accept() {
            Ok((kernel, _)) => return Ok(Some(kernel)),
            // Who connected has left again.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted
                ) => {}
            Err(error) => return Err(error),
        }
    }
}

/// The first link, and the locks that keep others from the export as long as they are there.
fn first_link(options: &Options, dir: &Directory) -> Result<(Server, Dialled, Locks), AttachError> {
    let uri = &options.uri;
    let mut locks = Locks::new(dir.clone(), uri);
    locks.take_places(uri)?;
    let server = Server::new(uri)?;
    let dialled = until_there(&server, Instant::now() + options.wait);
    let dialled = dialled.map_err(|error| AttachError::Server {
        uri: uri.to_string(),
        error,
    })?;
    // Its name may have become known meanwhile.
    locks.take_places(uri)?;
    locks.take_volume(&dialled.1)?;
    Ok((server, dialled, locks))
}

/// Relays to the end; whether the kernel has given the device up.
fn relay(
    options: &Options,
    server: Server,
    kernel: UnixStream,
    dialled: Dialled,
    signals: Signals,
    owner: impl Owner,
) -> Result<bool, AttachError> {
    let dialler = Dialler::new(server).map_err(at("a pair of sockets"))?;
    let limits = (options.hold_bytes, options.dead_after);
    let relay = Relay::new(kernel, dialled, dialler, limits, signals, owner);
    relay.and_then(Relay::run).map_err(at("the relay's sockets"))
}

/// Refuses what a file could not be called, and what a device is: 'detach' could mean either.
fn checked_name(name: &str) -> Result<String, AttachError> {
    let is_fit = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    let is_file = !name.is_empty() && !name.starts_with('.') && name.chars().all(is_fit);
    match is_file && device::number(name).is_none() {
        true => Ok(name.to_owned()),
        false => Err(AttachError::Name(name.to_owned())),
    }
}

fn refuse_what_is_there(dir: &Directory, options: &Options, index: Option<u32>) -> Result<(), AttachError> {
    let uri = options.uri.to_string();
    let device = index.map(device::path);
    for what in [Some(uri), options.name.clone(), device].into_iter().flatten() {
        if let Some(found) = dir.find(&what).filter(Attached::is_alive) {
            return Err(AttachError::Attached {
                what,
                device: found.device,
            });
        }
    }
    Ok(())
}

pub(crate) fn must_be_root() -> Result<(), AttachError> {
    match rustix::process::geteuid().is_root() {
        true => Ok(()),
        false => Err(AttachError::NotRoot),
    }
}

/// The kernel's driver, loaded where it is not yet.
pub(crate) fn driver() -> Result<Driver, AttachError> {
    if let Ok(driver) = Driver::open() {
        return Ok(driver);
    }
    let loaded = Command::new("modprobe").arg("nbd").output();
    Driver::open().map_err(|error| {
        let said = match loaded {
            Ok(output) if !output.status.success() => {
                String::from_utf8_lossy(&output.stderr).trim().to_owned()
            }
            Ok(_) => error.to_string(),
            Err(error) => format!("modprobe cannot be run: {error}"),
        };
        AttachError::NoDriver(format!(" ({said})"))
    })
}

/// Gives a device a size, and sees whether it has it then.
fn resize(attached: &Attached, size: u64) -> Result<(), String> {
    let index = device::index(&attached.device).map_err(|error| error.to_string())?;
    if !attached.is_made(device::maker(index)) {
        return Err("it is gone, or another one by now".to_owned());
    }
    let driver = driver().map_err(|error| error.to_string())?;
    driver
        .resize(index, size, &attached.uri)
        .map_err(|error| format!("the kernel refuses it ({error}); detach it, and attach it anew"))?;
    match device::size(index) {
        Some(now) if now == size => Ok(()),
        now => Err(format!(
            "the kernel takes it and leaves the device with {} bytes; detach it, and attach it anew",
            now.unwrap_or_default()
        )),
    }
}

fn refused(index: Option<u32>, error: &io::Error) -> AttachError {
    let device = index.map_or_else(|| "a device".to_owned(), device::path);
    let why = match error.kind() {
        io::ErrorKind::ResourceBusy => {
            "it is in use; choose another, or name none for the next that is free".to_owned()
        }
        io::ErrorKind::PermissionDenied => "it takes CAP_SYS_ADMIN, in the first user namespace".to_owned(),
        _ => error.to_string(),
    };
    AttachError::Kernel {
        what: format!("attach {device}"),
        why,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_files_names() {
        assert_eq!(checked_name("disk-1.a_B").unwrap(), "disk-1.a_B");
        for name in ["", "..", ".a", "a/b", "a b", "a\n"] {
            assert!(checked_name(name).is_err(), "{name:?}");
        }
        for name in ["nbd1", "nbd007"] {
            let refused = checked_name(name).unwrap_err().to_string();
            assert!(refused.contains("a device's own"), "{refused}");
        }
        assert_eq!(checked_name("nbd-data").unwrap(), "nbd-data");
    }
}
