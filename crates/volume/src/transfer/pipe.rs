//! A pipe that is read, and can be left at any moment.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::TransferError;

/// How often a reader that waits for bytes looks whether the copy is over.
const LOOK: Duration = Duration::from_millis(100);

/// The reading end of a pipe, or anything else that is read from its start to its end.
#[derive(Debug)]
pub struct PipeReader {
    file: std::fs::File,
    name: String,
}

impl PipeReader {
    /// Reads what this descriptor gives. `name` is for messages.
    pub fn new(fd: OwnedFd, name: impl Into<String>) -> Self {
        Self {
            file: fd.into(),
            name: name.into(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads until `out` is full or the pipe ends. Returns how many bytes.
    ///
    /// # Errors
    /// When the pipe cannot be read; [`TransferError::Stopped`] once `is_over` says so, whether anything comes or not.
    pub(super) fn fill(
        &mut self,
        out: &mut [u8],
        is_over: &dyn Fn() -> bool,
    ) -> Result<usize, TransferError> {
        let mut got = 0;
        while got < out.len() {
            match self.read_some(&mut out[got..], is_over)? {
                0 => break,
                n => got += n,
            }
        }
        Ok(got)
    }

    fn read_some(&mut self, out: &mut [u8], is_over: &dyn Fn() -> bool) -> Result<usize, TransferError> {
        let look = Timespec::try_from(LOOK).map_err(|_| {
            TransferError::io("waiting for a pipe", io::Error::from(io::ErrorKind::InvalidInput))
        })?;
        let failed = |e: io::Error| TransferError::io(format!("cannot read {}", self.name), e);
        loop {
            if is_over() {
                return Err(TransferError::Stopped);
            }
            let mut waited = [PollFd::from_borrowed_fd(self.file.as_fd(), PollFlags::IN)];
            match poll(&mut waited, Some(&look)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => continue,
                Ok(_) => {}
                Err(e) => return Err(failed(e.into())),
            }
            match (&self.file).read(out) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                read => return read.map_err(failed),
            }
        }
    }
}
