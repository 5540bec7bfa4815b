//! Why data could not be moved.

use std::io;

use crate::base::error::VolumeError;

/// A failure of an import or an export.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// Something was asked for that cannot be done; the text says what, and what can.
    #[error("{0}")]
    Refused(String),
    /// A file, a device, a pipe or the program that reads an image failed.
    #[error("{what}: {cause}{}", advice(.cause))]
    Io {
        /// What was being done, and to what.
        what: String,
        /// Why it failed.
        cause: io::Error,
    },
    /// The volume failed.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// It was told to stop.
    #[error("stopped")]
    Stopped,
    /// What was written does not read as what it was written from.
    #[error(
        "{what} does not read as what was copied to it: its checksum is {found}, and {expected} was copied"
    )]
    Differs {
        /// What was written.
        what: String,
        /// The checksum of what it reads as.
        found: String,
        /// The checksum of what was read.
        expected: String,
    },
    /// It failed after it had begun to write.
    #[error("{}; {left}", chain(.cause))]
    Unfinished {
        /// Why.
        cause: Box<TransferError>,
        /// What that leaves, and what to do.
        left: String,
    },
}

impl TransferError {
    /// A failure of what was being done to a file.
    pub fn io(what: impl Into<String>, cause: impl Into<io::Error>) -> Self {
        Self::Io {
            what: what.into(),
            cause: cause.into(),
        }
    }

    /// Whether it was told to stop.
    pub fn is_stopped(&self) -> bool {
        match self {
            Self::Stopped => true,
            Self::Unfinished { cause, .. } => cause.is_stopped(),
            _ => false,
        }
    }
}

fn chain(error: &TransferError) -> String {
    match error {
        TransferError::Volume(e) => e.chain(),
        e => e.to_string(),
    }
}

fn advice(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; make room there, or choose another place"
        }
        io::ErrorKind::BrokenPipe => "; whoever read it has gone",
        _ => "",
    }
}
