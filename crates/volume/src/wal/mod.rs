//! The write-ahead log (WAL): it makes a flush durable with one PUT, or with one fdatasync.
//!
//! * [`record`] (pure): the format of records.
//! * [`replay`] (pure): which records are applied when a volume is opened, and which numbers are sealed.
//! * [`group_commit`] (pure): which record makes which flush durable.
//! * [`s3`], [`journal`]: where records are stored, behind the trait [`WalStore`].
//! * `place`: which of the two, and where.

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;

pub mod group_commit;
pub mod journal;
mod journal_label;
mod journal_segments;
pub(crate) mod place;
pub mod record;
pub mod replay;
pub mod s3;
pub(crate) mod unchanged;

/// A generation with more changed bytes than this is not written to the WAL: bulk data would be stored twice.
pub const LOG_BULK_BYTES: u64 = 8 << 20;

/// Number of records read at once. Each has at most a few MiB.
pub(crate) const READS_AT_ONCE: usize = 16;

/// A record, encoded.
#[derive(Debug, Clone)]
pub struct EncodedGroup {
    /// Its number.
    pub sequence: u64,
    /// The highest generation in it.
    pub newest_generation: u64,
    /// The record.
    pub bytes: Bytes,
}

/// Name of a record in the WAL: the owner's epoch, then the record's number. Names sort in the order of the records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RecordId {
    /// The epoch of the owner that wrote the record.
    pub epoch: u64,
    /// Its number.
    pub sequence: u64,
}

impl std::fmt::Display for RecordId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of epoch {}", self.sequence, self.epoch)
    }
}

/// Why a record was not appended.
#[derive(Debug)]
pub enum AppendError {
    /// Another owner sealed the WAL. The text says what was seen.
    Fenced(String),
    /// The append may be tried again.
    Failed(VolumeError),
}

/// Where the records of one volume are stored, opened by the volume's owner.
#[async_trait]
pub trait WalStore: Send + Sync {
    /// The records and seals of older owners that the opening found, ascending. Older owners can add no more.
    fn found(&self) -> &[RecordId];

    /// Whether this record follows a damaged one that should have been the last. That is harmless when this record is
    /// published: it may then be left over from an earlier use of the space.
    fn is_suspect(&self, _id: RecordId) -> bool {
        false
    }

    /// The number of this owner's first record.
    fn first_sequence(&self) -> u64;

    /// The highest number of appends in flight at once.
    fn depth(&self) -> usize;

    /// The size in bytes, as counted by [`Self::stored_bytes`], above which flushes wait for checkpoints instead.
    fn capacity_bytes(&self) -> u64;

    /// The space that a record of this length takes, in bytes.
    fn stored_bytes(&self, len_bytes: u64) -> u64 {
        len_bytes
    }

    /// Reads a record that the opening found.
    ///
    /// # Errors [`VolumeError::Corrupt`] when there is no longer a valid record.
    async fn read(&self, id: RecordId) -> Result<record::Record, VolumeError>;

    /// Makes a record durable. It is safe to try again after an error, because the same number then has the same bytes.
    ///
    /// # Errors [`AppendError`]. Whether the record is stored is then not known.
    async fn append(&self, group: &EncodedGroup) -> Result<(), AppendError>;

    /// Removes records whose generations are all at or below `generation`. `acknowledged` is the last number up to
    /// which no record is missing. The records after it stay, and so does what shows the next owner where the WAL ends.
    ///
    /// # Errors When some could not be removed. The next call tries them again.
    /// When not all could be removed; the next call tries again.
    async fn trim(&self, generation: u64, acknowledged: u64) -> Result<(), VolumeError>;

    /// Removes what the opening found, without reading it. The seals that shut older owners out stay.
    ///
    /// # Errors When some could not be removed.
    async fn remove_found(&self) -> Result<(), VolumeError>;

    /// Removes all records of this owner and of older ones. If an older owner may still be alive, the seals that shut
    /// it out stay.
    ///
    /// # Errors When some could not be removed.
    async fn clear(&self, is_older_alive: bool) -> Result<(), VolumeError>;
}

/// The error for a WAL that belongs to another volume.
pub fn foreign_wal(url: &VolumeUrl, there: Uuid, this: Uuid) -> VolumeError {
    VolumeError::InvalidInput(format!(
        "the log at {url} belongs to volume {there}, this is volume {this}; give each volume a log URL of its own"
    ))
}
