//! The write-ahead log: a flush in one PUT, or in one fdatasync.
//!
//! * [`record`] (pure): framing of record groups.
//! * [`replay`] (pure): what is applied when a volume is opened, and where the end of a log is sealed.
//! * [`group_commit`] (pure): which flush is made durable by which group.
//! * [`s3`], [`journal`]: where groups are kept, behind the trait [`LogStore`].

use async_trait::async_trait;
use bytes::Bytes;
use uuid::Uuid;

use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;

pub mod group_commit;
pub mod journal;
mod journal_label;
mod journal_segments;
pub mod record;
pub mod replay;
pub mod s3;
pub(crate) mod unchanged;

/// Changes of more than this many bytes are not logged: bulk data would be written twice.
pub const LOG_BULK_BYTES: u64 = 8 << 20;

/// A group as it is stored.
#[derive(Debug, Clone)]
pub struct EncodedGroup {
    /// Its number.
    pub sequence: u64,
    /// The highest generation in it.
    pub newest_generation: u64,
    /// The record.
    pub bytes: Bytes,
}

/// Name of a group in a log: owner's epoch, then number. Ordered as the groups are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct GroupId {
    /// The epoch of the owner that wrote it.
    pub epoch: u64,
    /// Its number.
    pub sequence: u64,
}

impl std::fmt::Display for GroupId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of epoch {}", self.sequence, self.epoch)
    }
}

/// Why a group was not appended.
#[derive(Debug)]
pub enum AppendError {
    /// Another owner sealed the log; the text says what was seen.
    Fenced(String),
    /// It may be tried again.
    Failed(VolumeError),
}

/// Where the groups of one volume are kept, opened by its owner.
#[async_trait]
pub trait LogStore: Send + Sync {
    /// What older owners left, ascending, seals included, as found at the opening. They can add nothing more.
    fn found(&self) -> &[GroupId];

    /// Whether something damaged lies where this group should not have come after it. That is no harm when it is published:
    /// then it may be what is left of before.
    fn is_suspect(&self, _id: GroupId) -> bool {
        false
    }

    /// The number of the first group of this owner.
    fn first_sequence(&self) -> u64;

    /// Appends that may be under way at once.
    fn depth(&self) -> usize;

    /// The size beyond which flushes go by checkpoints, in bytes as told by [`Self::stored_bytes`].
    fn capacity_bytes(&self) -> u64;

    /// What a group of this length takes, in bytes.
    fn stored_bytes(&self, len_bytes: u64) -> u64 {
        len_bytes
    }

    /// A group found at the opening.
    ///
    /// # Errors
    /// [`VolumeError::Corrupt`] when it is none any more.
    async fn read(&self, id: GroupId) -> Result<record::Group, VolumeError>;

    /// Makes a group durable. Trying again after an error is safe: the same number then has the same bytes.
    ///
    /// # Errors
    /// [`AppendError`]; whether the group is stored is not known then.
    async fn append(&self, group: &EncodedGroup) -> Result<(), AppendError>;

    /// Removes groups with nothing above this generation. Those after `acknowledged`, the last number below which
    /// nothing is missing, stay, and so does what tells the next owner where the log ends.
    ///
    /// # Errors
    /// When not all could be removed; the next call tries again.
    async fn trim(&self, generation: u64, acknowledged: u64) -> Result<(), VolumeError>;

    /// Removes what was found at the opening, unread; not the seals that shut older owners out.
    ///
    /// # Errors
    /// When not all could be removed.
    async fn remove_found(&self) -> Result<(), VolumeError>;

    /// Removes everything of this owner and older ones; but for the seals that shut those out, if one of them may still
    /// be alive.
    ///
    /// # Errors
    /// When not all could be removed.
    async fn clear(&self, is_older_alive: bool) -> Result<(), VolumeError>;
}

/// The error for a log that belongs to another volume.
pub fn foreign_log(url: &VolumeUrl, there: Uuid, this: Uuid) -> VolumeError {
    VolumeError::InvalidInput(format!(
        "the log at {url} belongs to volume {there}, this is volume {this}; give each volume a log URL of its own"
    ))
}
