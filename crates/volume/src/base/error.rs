//! The errors of a volume, with enough context to act on them.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use crate::base::store_error::{StoreError, StoreErrorKind};

/// The classes of failure, for code that turns them into an errno or an exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A request reaches past the volume's end.
    OutOfRange,
    /// A value that makes no sense.
    InvalidInput,
    /// A write to a volume opened read-only.
    ReadOnly,
    /// No such volume.
    NotFound,
    /// There is a volume already.
    AlreadyExists,
    /// The store refused the permission.
    AccessDenied,
    /// The store does not accept the credentials. Others may be there a moment later.
    Unauthenticated,
    /// Another server holds the volume.
    Busy,
    /// Another writer took the volume over; this one must not write again.
    Fenced,
    /// The store failed or could not be reached.
    Store,
    /// Not done within the time allowed.
    Timeout,
    /// The write buffer is full and the store accepts no data.
    BufferFull,
    /// A local disk failed or is full.
    LocalDisk,
    /// Stored data is not valid.
    Corrupt,
    /// The volume is closed.
    Closed,
    /// A counter of the volume is used up: the volume can be read, and not written any more.
    Exhausted,
    /// Not supported.
    Unsupported,
    /// A defect in this program.
    Internal,
}

/// A failure of a volume operation.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A request reaches past the end.
    #[error("a request of {len_bytes} bytes at {offset_bytes} reaches past the volume's end at {size_bytes}")]
    OutOfRange {
        /// Start of the request.
        offset_bytes: u64,
        /// Its length.
        len_bytes: u64,
        /// Size of the volume.
        size_bytes: u64,
    },
    /// A value that makes no sense. The text says which value, and what would be valid.
    #[error("{0}")]
    InvalidInput(String),
    /// A write to a volume opened read-only.
    #[error("the volume is open read-only")]
    ReadOnly,
    /// No such volume.
    #[error("there is no volume at {url}; create one with: hypernbd create {url} --size SIZE")]
    NotFound {
        /// The volume's URL.
        url: String,
    },
    /// No such checkpoint.
    #[error("{url} has no checkpoint {at}; hypernbd checkpoints {url} lists those there are")]
    NoCheckpoint {
        /// The volume's URL.
        url: String,
        /// The checkpoint that was asked for.
        at: String,
    },
    /// There is a volume already.
    #[error("there is a volume at {url} already; delete it first, or choose another URL")]
    AlreadyExists {
        /// The volume's URL.
        url: String,
    },
    /// Objects of an earlier volume that an interrupted deletion, or another tool, left.
    #[error(
        "{found} is left of an earlier volume at {url}; hypernbd delete {url} ends a deletion that was interrupted; else \
         remove what is there, or choose another URL"
    )]
    Leftovers {
        /// The URL of the volume that was to be created.
        url: String,
        /// Key of an object that is there.
        found: String,
    },
    /// What a clone shares cannot be used.
    #[error("{url} is a clone, and is not used without what it shares: {reason}")]
    Parent {
        /// The clone's URL.
        url: String,
        /// What is wrong with its parent, or with what is known of that.
        reason: String,
    },
    /// Clones need the volume.
    #[error(
        "{url} stays while clones share its objects: {clones}; delete them first, or end the sharing with hypernbd clone \
         --flatten CLONE"
    )]
    HasClones {
        /// The volume's URL.
        url: String,
        /// The clones, and what is known of each.
        clones: String,
    },
    /// Another command deleted the volume, or made one there, while this one was deleting or making it.
    #[error(
        "what is at {url} was deleted, or made anew, meanwhile: another command is at work there; nothing more was done, look at what is \
         there and try again"
    )]
    Interfered {
        /// The volume's URL.
        url: String,
    },
    /// A counter of the format is used up.
    #[error(
        "the volume has used all but the last of its {limit} {counter}: it can be read, and no more be written; copy it into \
         a new volume"
    )]
    CountersExhausted {
        /// What is counted.
        counter: &'static str,
        /// The largest number there is.
        limit: u64,
    },
    /// Another writer took the volume over.
    #[error("this server is fenced: {reason}; it will not write to the volume again")]
    Fenced {
        /// What was seen.
        reason: String,
    },
    /// Another server holds the volume.
    #[error(
        "{url} is held by another server, {holder}: {why}; stop that server, or serve read-only (nbdkit -r), or, if it \
         must not go on, take the volume over with takeover=yes (--takeover)"
    )]
    Held {
        /// The volume's URL.
        url: String,
        /// The server that holds it.
        holder: String,
        /// How that server is known to be alive.
        why: String,
    },
    /// The store lacks a property that a volume needs.
    #[error(
        "{endpoint} is not safe for volumes: {failures}; use another store, or, where no second server can ever be \
         started by mistake, allow_unsafe_store=yes"
    )]
    UnsafeStore {
        /// The store.
        endpoint: String,
        /// The properties that it lacks.
        failures: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The container's engine failed.
    #[error("{operation}: {source}")]
    Engine {
        /// What was being done.
        operation: String,
        /// The engine's own error.
        source: std::io::Error,
    },
    /// Not done within the time allowed.
    #[error("{operation} was not done within {} s; the last failure was: {last}", waited.as_secs())]
    Timeout {
        /// What was being done.
        operation: &'static str,
        /// How long it was waited for.
        waited: Duration,
        /// The last failure seen, or that there was none.
        last: String,
    },
    /// The write buffer stayed full.
    #[error("the write buffer of {capacity_bytes} bytes stayed full for {} s: the store takes no data", waited.as_secs())]
    BufferFull {
        /// Its size.
        capacity_bytes: u64,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The local journal cannot be used.
    #[error("the journal in {path} cannot be used: {reason}")]
    Journal {
        /// Its directory.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The buffer file cannot be used.
    #[error("write_buffer_dir={path} cannot be used: {reason}")]
    BufferFile {
        /// Its directory, or the file.
        path: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The volume's WAL cannot be used, and must not be ignored.
    #[error("the write-ahead log {url} may hold flushed writes of this volume: {reason}; {advice}")]
    Wal {
        /// The URL of the WAL.
        url: String,
        /// Why it cannot be used.
        reason: String,
        /// What to do, and what is lost by it.
        advice: &'static str,
    },
    /// An owner with a later epoch than the volume's lease has wrote to the WAL: the lease was restored to an earlier
    /// state, and the WAL was not.
    #[error(
        "the write-ahead log {url} may hold flushed writes of this volume: servers up to the {newest}th of the volume have \
         written to it, and by the volume's lease this one is the {own}th: the volume was restored from a backup or rolled \
         back by another tool; put the volume back to the state that the log continues, or give up the writes flushed to \
         it since then with discard_wal=yes"
    )]
    WalAhead {
        /// The URL of the WAL.
        url: String,
        /// The newest epoch in the WAL.
        newest: u64,
        /// This owner's epoch.
        own: u64,
    },
    /// Stored data is not valid.
    #[error("{what} is corrupt: {reason}")]
    Corrupt {
        /// The object or structure.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A write changed a part of a block whose other bytes are damaged.
    #[error(
        "a part of the {len_bytes} bytes at {offset_bytes} of the volume was written, and the rest of them cannot be read: \
         before the server ends, write all of them, or trim them if its buffer is full, or bring the damaged object back with hypernbd \
         repair or from the bucket's versions"
    )]
    PartOfDamage {
        /// Where the block begins.
        offset_bytes: u64,
        /// Its length.
        len_bytes: u64,
        /// Why it cannot be read.
        source: Box<VolumeError>,
    },
    /// The failure of work for which several callers waited.
    #[error(transparent)]
    Shared(Arc<VolumeError>),
    /// The volume is closed.
    #[error("the volume is closed")]
    Closed,
    /// A defect in this program.
    #[error("internal error: {0}")]
    Internal(String),
}

impl VolumeError {
    /// The class of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::OutOfRange { .. } => ErrorKind::OutOfRange,
            Self::InvalidInput(_) => ErrorKind::InvalidInput,
            Self::ReadOnly => ErrorKind::ReadOnly,
            Self::NotFound { .. } | Self::NoCheckpoint { .. } => ErrorKind::NotFound,
            Self::AlreadyExists { .. } | Self::Leftovers { .. } => ErrorKind::AlreadyExists,
            Self::Fenced { .. } => ErrorKind::Fenced,
            Self::UnsafeStore { .. } => ErrorKind::Unsupported,
            Self::Held { .. } | Self::Interfered { .. } | Self::HasClones { .. } => ErrorKind::Busy,
            Self::Store(e) => match e.kind {
                StoreErrorKind::NotFound => ErrorKind::NotFound,
                StoreErrorKind::AccessDenied => ErrorKind::AccessDenied,
                StoreErrorKind::Unauthenticated => ErrorKind::Unauthenticated,
                StoreErrorKind::PreconditionFailed => ErrorKind::AlreadyExists,
                StoreErrorKind::Corrupt => ErrorKind::Corrupt,
                StoreErrorKind::Unreachable | StoreErrorKind::Refused | StoreErrorKind::Other => {
                    ErrorKind::Store
                }
            },
            Self::Engine { .. } => ErrorKind::Store,
            Self::Timeout { .. } => ErrorKind::Timeout,
            Self::BufferFull { .. } => ErrorKind::BufferFull,
            Self::Journal { .. } | Self::BufferFile { .. } => ErrorKind::LocalDisk,
            Self::Wal { .. } | Self::WalAhead { .. } => ErrorKind::InvalidInput,
            Self::Corrupt { .. } | Self::Parent { .. } | Self::PartOfDamage { .. } => ErrorKind::Corrupt,
            Self::CountersExhausted { .. } => ErrorKind::Exhausted,
            Self::Shared(e) => e.kind(),
            Self::Closed => ErrorKind::Closed,
            Self::Internal(_) => ErrorKind::Internal,
        }
    }

    /// The failure of an engine operation.
    pub(crate) fn engine(operation: impl Into<String>, source: std::io::Error) -> Self {
        Self::Engine {
            operation: operation.into(),
            source,
        }
    }

    /// This failure and its causes in one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = self.source();
        while let Some(cause) = next {
            let cause_text = cause.to_string();
            // Errors of the SDK often repeat their cause in their own text.
            if !text.contains(&cause_text) {
                text = format!("{text}: {cause_text}");
            }
            next = cause.source();
        }
        text
    }
}
