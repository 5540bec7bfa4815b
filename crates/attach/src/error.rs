//! What can go wrong with attaching.

use std::io;
use std::path::PathBuf;

/// Why something was not attached or detached: what was wrong, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// A URI that is none, or none that can be attached.
    #[error("{uri:?} cannot be attached: {why}")]
    Uri {
        /// What was given.
        uri: String,
        /// What is wrong with it.
        why: String,
    },
    /// A device that is none of the kernel's NBD devices.
    #[error("{0:?} is no NBD device: say /dev/nbd0, or nothing for the next one that is free")]
    Device(String),
    /// A name that cannot be a file's, or is a device's.
    #[error(
        "the name {0:?} cannot be used: letters, digits, dots, dashes and underscores only, no dot first, and not a device's own, such as \
         nbd1"
    )]
    Name(String),
    /// The caller may not do this.
    #[error("only root may give devices to the kernel: run this as root")]
    NotRoot,
    /// The kernel has no NBD driver.
    #[error("the kernel has no NBD driver: run 'modprobe nbd'{0}")]
    NoDriver(String),
    /// The kernel refused.
    #[error("the kernel does not {what}: {why}")]
    Kernel {
        /// What was asked of it.
        what: String,
        /// Its answer, and what to do.
        why: String,
    },
    /// The server could not be reached, or refused.
    #[error("cannot attach {uri}: {error}")]
    Server {
        /// Where it was looked for.
        uri: String,
        /// What it said.
        error: io::Error,
    },
    /// What TLS takes cannot be used.
    #[error("{} cannot be used for TLS: {why}", path.display())]
    Tls {
        /// The directory, or a file in it.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The export does not fit the kernel's driver.
    #[error("cannot attach {uri}: {why}")]
    Export {
        /// Which.
        uri: String,
        /// What does not fit.
        why: String,
    },
    /// There is such a device already.
    #[error("{what} is attached already, as {device}: detach that first, or choose another")]
    Attached {
        /// A URI, a device or a name.
        what: String,
        /// The device.
        device: String,
    },
    /// Another relay has the export.
    #[error(
        "{what} is attached already, by {by}: detach that first ('hypernbd attached' lists what is attached), or end that process if it \
         still waits for its server"
    )]
    SameExport {
        /// The place, or what is served there.
        what: String,
        /// Who has it.
        by: String,
    },
    /// There is no such device.
    #[error("nothing is attached as {0:?}: 'hypernbd attached' lists what is")]
    NotAttached(String),
    /// Somebody uses the device.
    #[error(
        "{0} is in use: unmount it, and close what is above it (LVM, RAID, dm-crypt, swap), or wait for another 'hypernbd detach'; then \
         detach it"
    )]
    InUse(String),
    /// What was not flushed would be lost.
    #[error(
        "the server of {device} does not answer ({why}), and what it has not flushed would be lost: bring it back, or detach with --force"
    )]
    LinkLost {
        /// The device.
        device: String,
        /// How the link was lost.
        why: String,
    },
    /// The server is there, and answers nothing.
    #[error(
        "the server of {device} has answered nothing for {seconds} s, while what was written was to be flushed: see what it does, wait for it \
         longer (--wait), or detach with --force, which fails every request and loses what was not flushed"
    )]
    Silent {
        /// The device.
        device: String,
        /// For how long it was waited for.
        seconds: u64,
    },
    /// The device has not the size of its export, or nobody knows whether it has.
    #[error("{device} has not grown: {why}")]
    Look {
        /// The device.
        device: String,
        /// What hinders it, and what to do.
        why: String,
    },
    /// A file or a socket.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What happened.
        error: io::Error,
    },
    /// The relay in the background did not begin.
    #[error("{0}")]
    Background(String),
}

/// Names the file in an error.
pub(crate) fn at(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> AttachError {
    let path = path.into();
    |error| AttachError::File { path, error }
}
