//! A raw image: a regular file or a block device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, seek};
use rustix::io::Errno;

use super::{Image, Port, Run, TransferError};

/// Zeros that are written where a device cannot make any itself, at a time.
const ZEROS_BYTES: usize = 1 << 20;

/// A regular file or a block device, byte for byte.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    path: PathBuf,
    size_bytes: u64,
    is_device: bool,
}

impl RawImage {
    /// Opens a file or device to be read.
    ///
    /// # Errors
    /// When it is missing, cannot be read, or is neither.
    pub fn open(path: &Path) -> Result<Self, TransferError> {
        let failed = |e| TransferError::io(format!("cannot read {}", path.display()), e);
        let file = File::open(path).map_err(failed)?;
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(TransferError::Refused(format!(
                "{} is neither a file nor a block device: name one, or - for a pipe",
                path.display()
            )));
        }
        Self::of(file, path)
    }

    /// An open file or device; `path` is for messages.
    ///
    /// # Errors
    /// When its size cannot be told.
    pub fn of(file: File, path: &Path) -> Result<Self, TransferError> {
        let failed = |e| TransferError::io(format!("cannot tell the size of {}", path.display()), e);
        let is_device = file.metadata().map_err(failed)?.file_type().is_block_device();
        let size_bytes = (&file).seek(SeekFrom::End(0)).map_err(failed)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            size_bytes,
            is_device,
        })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// Makes everything that was written durable, and forgets what is in memory of it, so that it is read from its disk again.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn sync(&self) -> Result<(), TransferError> {
        let failed = |e| TransferError::io(format!("cannot write {} to its disk", self.path.display()), e);
        self.file.sync_all().map_err(failed)?;
        // Best effort: what stays in memory is read from there.
        let _ = rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed);
        Ok(())
    }
}

impl Image for RawImage {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn run_at(&self, offset_bytes: u64) -> Result<Run, TransferError> {
        let all = |is_data| Run {
            end_bytes: self.size_bytes,
            is_data,
        };
        let data = match seek(&self.file, rustix::fs::SeekFrom::Data(offset_bytes)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(all(false)),
            // A file system, or a device, that cannot tell.
            Err(_) => return Ok(all(true)),
        };
        if data > offset_bytes {
            return Ok(Run {
                end_bytes: data,
                is_data: false,
            });
        }
        match seek(&self.file, rustix::fs::SeekFrom::Hole(offset_bytes)) {
            Ok(hole) if hole > offset_bytes => Ok(Run {
                end_bytes: hole,
                is_data: true,
            }),
            _ => Ok(all(true)),
        }
    }

    fn port(&self) -> Result<Box<dyn Port + '_>, TransferError> {
        Ok(Box::new(RawPort(self)))
    }
}

struct RawPort<'a>(&'a RawImage);

impl RawPort<'_> {
    fn failed(&self, verb: &str) -> impl FnOnce(io::Error) -> TransferError {
        let what = format!("cannot {verb} {}", self.0.path.display());
        move |e| TransferError::io(what, e)
    }

    fn write_zeros(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let zeros = vec![0; ZEROS_BYTES.min(len_bytes as usize)];
        let (mut at, end) = (offset_bytes, offset_bytes + len_bytes);
        while at < end {
            let len = (end - at).min(zeros.len() as u64);
            self.0.file.write_all_at(&zeros[..len as usize], at)?;
            at += len;
        }
        Ok(())
    }
}

impl Port for RawPort<'_> {
    fn read(&mut self, offset_bytes: u64, out: &mut [u8]) -> Result<(), TransferError> {
        let read = self.0.file.read_exact_at(out, offset_bytes);
        read.map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => TransferError::Refused(format!(
                "{} became shorter while it was read: stop whatever writes to it",
                self.0.path.display()
            )),
            _ => self.failed("read")(e),
        })
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), TransferError> {
        let written = self.0.file.write_all_at(bytes, offset_bytes);
        written.map_err(self.failed("write"))
    }

    fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), TransferError> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        // A device zeroes itself; where it cannot, the kernel may.
        let zeroed = match fallocate(&self.0.file, flags, offset_bytes, len_bytes) {
            Ok(()) => Ok(()),
            Err(_) => self.write_zeros(offset_bytes, len_bytes),
        };
        zeroed.map_err(self.failed("write"))
    }
}
