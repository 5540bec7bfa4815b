//! From failures to what the client gets to see.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use hypernbd_volume::{ErrorKind, VolumeError};
use nbdkit::Error;

/// Runs a callback's body. A panic becomes EIO for this one request, and nbdkit logs it like every failure; unhindered
/// it would end nbdkit and every other client's connection.
pub fn guard<T>(callback: &str, body: impl FnOnce() -> nbdkit::Result<T>) -> nbdkit::Result<T> {
    // Nothing of the body's state is used after a panic but the shared volume, whose locks guard whole states.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        Err(error(
            libc::EIO,
            format!("internal error in {callback}: {}", panic_text(&*panic)),
        ))
    })
}

/// The text of a panic, where it has one.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&str>().copied();
    literal
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("panic without a text")
}

/// A volume's failure with its errno.
pub fn in_errno(failure: VolumeError) -> Error {
    error(errno(failure.kind()), failure.chain())
}

/// As [`in_errno`], of a failure that several share.
pub fn of(failure: &VolumeError) -> Error {
    error(errno(failure.kind()), failure.chain())
}

/// A failure with this errno. The binding panics on a NUL in the text.
pub fn error(errno: i32, text: impl Into<String>) -> Error {
    Error::new(errno, text.into().replace('\0', "\\0"))
}

/// The errno of a failure. Of those that NBD carries (EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP,
/// ESHUTDOWN; nbdkit sends the rest as EINVAL) this uses what is true for the client:
/// <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md#error-values>
fn errno(kind: ErrorKind) -> i32 {
    match kind {
        // The request itself is at fault.
        ErrorKind::OutOfRange | ErrorKind::InvalidInput => libc::EINVAL,
        // Not EOPNOTSUPP: from a write-zeroes nbdkit would take it for "use write instead".
        ErrorKind::Unsupported => libc::EINVAL,
        // A write to a read-only export; sent as EPERM.
        ErrorKind::ReadOnly => libc::EROFS,
        // The server is going away; a client may connect to the next one.
        ErrorKind::Closed => libc::ESHUTDOWN,
        // The client may do all it does, the server may not: no EPERM, which would blame the client.
        ErrorKind::AccessDenied | ErrorKind::Unauthenticated | ErrorKind::Fenced | ErrorKind::Busy => {
            libc::EIO
        }
        // The volume is missing where it was, or where it should not be yet: nothing a request can mend.
        ErrorKind::NotFound | ErrorKind::AlreadyExists => libc::EIO,
        ErrorKind::Store | ErrorKind::Timeout | ErrorKind::Corrupt | ErrorKind::Internal => libc::EIO,
        // There is no room for another checkpoint, and there never will be.
        ErrorKind::Exhausted => libc::ENOSPC,
        // Not ENOSPC: the volume has room, its store is not taking it. File systems would report a full disk.
        ErrorKind::BufferFull => libc::EIO,
        // Full or broken cannot be told apart here, and of the two only EIO claims nothing that may be false.
        ErrorKind::LocalDisk => libc::EIO,
    }
}
