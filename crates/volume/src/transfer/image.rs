//! What can be copied from and to.

use super::TransferError;

/// A run of an image, from where it was asked for to `end_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Where it ends, in bytes from the image's start; past the image's end for "to its end".
    pub end_bytes: u64,
    /// Whether it may hold anything but zeros.
    pub is_data: bool,
}

/// Bytes at any offset.
pub trait Image: Send + Sync {
    /// Size in bytes.
    fn size_bytes(&self) -> u64;

    /// What is at `offset_bytes`, which is within the image, and how far that goes: at least a byte. Asked for in ascending order.
    ///
    /// # Errors
    /// When it cannot be found out.
    fn run_at(&self, offset_bytes: u64) -> Result<Run, TransferError>;

    /// A way to the bytes for one thread.
    ///
    /// # Errors
    /// When there is none.
    fn port(&self) -> Result<Box<dyn Port + '_>, TransferError>;
}

/// One thread's way to the bytes of an [`Image`]. A request stays within the image.
pub trait Port {
    /// Fills `out` with the bytes at `offset_bytes`.
    ///
    /// # Errors
    /// When they cannot be read.
    fn read(&mut self, offset_bytes: u64, out: &mut [u8]) -> Result<(), TransferError>;

    /// Writes `bytes` at `offset_bytes`.
    ///
    /// # Errors
    /// When they cannot be written.
    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), TransferError>;

    /// Makes `len_bytes` bytes at `offset_bytes` read as zeros.
    ///
    /// # Errors
    /// When that fails.
    fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), TransferError>;
}
