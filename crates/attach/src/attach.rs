//! Attaching: from a URI to a device, and the relay's life.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{self, Command};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_send_buffer_size_force;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::background;
use crate::device;
use crate::dial::{Dialled, Dialler, until_there};
use crate::error::{AttachError, at};
use crate::handshake;
use crate::netlink::{Device, Driver};
use crate::protect;
use crate::relay::{Owner, Relay};
use crate::state::{Attached, DIR, Directory, now};
use crate::uri::Uri;

/// What the kernel's socket holds of either direction.
const SOCKET_BYTES: usize = 1 << 20;
const STACK_BYTES: usize = 256 << 10;

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
    signal_hook::flag::register(SIGHUP, Arc::new(AtomicBool::new(false)))
        .map_err(at("a handler of signals"))?;
    match &options.kernel_socket {
        Some(path) => attach_socket(options, path),
        None => attach_device(options),
    }
}

/// What can be read from once the process is told to end. Until this is called it ends at once, which is right while there is no
/// device.
fn termination() -> Result<UnixStream, AttachError> {
    let (terminate, terminated) = UnixStream::pair().map_err(at("a pair of sockets"))?;
    for signal in [SIGTERM, SIGINT] {
        let pipe = terminated.try_clone().map_err(at("a pair of sockets"))?;
        signal_hook::low_level::pipe::register(signal, pipe).map_err(at("a handler of signals"))?;
    }
    Ok(terminate)
}

fn attach_device(options: &Options) -> Result<(), AttachError> {
    must_be_root()?;
    let index = options.device.as_deref().map(device::index).transpose()?;
    let name = options.name.as_deref().map(checked_name).transpose()?;
    let dir = Directory::open(DIR)?;
    refuse_what_is_there(&dir, options, index)?;
    let driver = driver()?;
    let dialled = first_link(options)?;
    let terminate = termination()?;
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
    protect::against_its_own_device();

    // The kernel may ask for data before it has answered: the relay must be going by then.
    let backend = options.uri.to_string();
    let connecting = thread::Builder::new()
        .name("connect".to_owned())
        .stack_size(STACK_BYTES);
    let connecting = connecting.spawn(move || {
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
            since: now(),
            lost: None,
            link_since: now(),
        };
        // The kernel keeps its end of the socket, so a device that nobody would know of has to be taken away.
        if let Err(error) = Directory::open(DIR).and_then(|dir| dir.write(&attached)) {
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
    let owner = DeviceOwner {
        dir: dir.clone(),
        is_known: false,
        device: None,
    };
    let relayed = relay(options, ours, dialled, terminate, owner);
    let attached = connecting
        .join()
        .unwrap_or_else(|_| Err(AttachError::Background("a thread panicked".to_owned())))?;
    let made = device::index(&attached.device)?;
    // It was told to end before it knew its device, or could not go on: nobody is behind it any more.
    if device::is_connected_by(made, process::id())
        && let Err(error) = self::driver()?.disconnect(made)
    {
        log::error!("{} stays, and fails every request: {error}", attached.device);
    }
    dir.remove(&attached);
    device::announce(made);
    relayed
}

fn attach_socket(options: &Options, path: &PathBuf) -> Result<(), AttachError> {
    let listener = UnixListener::bind(path).map_err(at(path))?;
    let dialled = first_link(options)?;
    let terminate = termination()?;
    background::ready(&path.display().to_string());
    let (mut kernel, _) = listener.accept().map_err(at(path))?;
    let _ = fs::remove_file(path);
    io::Write::write_all(&mut kernel, &handshake::old_hello(&dialled.1)).map_err(at(path))?;
    relay(options, kernel, dialled, terminate, SocketOwner)
}

fn first_link(options: &Options) -> Result<Dialled, AttachError> {
    until_there(&options.uri, Some(Instant::now() + options.wait)).map_err(|error| AttachError::Server {
        uri: options.uri.to_string(),
        error,
    })
}

fn relay(
    options: &Options,
    kernel: UnixStream,
    dialled: Dialled,
    terminate: UnixStream,
    owner: impl Owner,
) -> Result<(), AttachError> {
    let dialler = Dialler::new(options.uri.clone()).map_err(at("a pair of sockets"))?;
    let limits = (options.hold_bytes, options.dead_after);
    let relay = Relay::new(kernel, dialled, dialler, limits, terminate, owner);
    relay.and_then(Relay::run).map_err(at("the relay's sockets"))
}

/// Refuses what a file could not be called.
fn checked_name(name: &str) -> Result<String, AttachError> {
    let is_fit = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    match !name.is_empty() && !name.starts_with('.') && name.chars().all(is_fit) {
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

/// Keeps the file of a device, and detaches it when told to end.
struct DeviceOwner {
    dir: Directory,
    /// Whether the file is there: the link is up before it is.
    is_known: bool,
    device: Option<Attached>,
}

impl DeviceOwner {
    fn device(&mut self) -> Option<&mut Attached> {
        if !self.is_known {
            self.device = self.dir.list().into_iter().find(|one| one.pid == process::id());
            self.is_known = self.device.is_some();
        }
        self.device.as_mut()
    }
}

impl Owner for DeviceOwner {
    fn link(&mut self, lost: Option<&str>) {
        let dir = self.dir.clone();
        if let Some(attached) = self.device() {
            attached.note_link(lost);
            if let Err(error) = dir.write(attached) {
                log::warn!("{error}");
            }
        }
    }

    /// By a process of its own, since that reads and writes the device, which only this one makes possible.
    fn told_to_end(&mut self) -> bool {
        let Some(device) = self.device().map(|attached| attached.device.clone()) else {
            return true;
        };
        log::info!("told to end: detaching {device}");
        let told = thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
            // This program, though its file may have been replaced since.
            let detach = Command::new("/proc/self/exe").args(["detach", &device]).output();
            match detach {
                Ok(output) if output.status.success() => {}
                Ok(output) => {
                    log::error!(
                        "the relay stays: {}",
                        String::from_utf8_lossy(&output.stderr).trim()
                    );
                }
                Err(error) => log::error!("the relay stays: 'hypernbd detach' cannot be run: {error}"),
            }
        });
        if let Err(error) = told {
            log::error!("the relay stays: {error}");
        }
        false
    }
}

/// Has nothing to keep.
struct SocketOwner;

impl Owner for SocketOwner {
    fn link(&mut self, _lost: Option<&str>) {}

    fn told_to_end(&mut self) -> bool {
        true
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
    }
}
