//! Identifies the checkpoint of a stored state: by its number, and a check value of the inode that made it.
//!
//! The number alone is not enough: a restored backup, a rollback by another tool or a volume that was created again
//! reaches the same numbers with other data. So data outside the container (checkpoint list, WAL, caches) names its
//! checkpoint by both, and is used only by a container that has exactly that checkpoint.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crc_fast::{CrcAlgorithm, Digest};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// A check value over what a checkpoint fixes in its inode: number, size, time of the last write, and root of the
/// index. It does not cover what a takeover changes (the time of the last change), nor counters that move without a
/// checkpoint.
///
/// CRC-64/NVME (NVM Express, NVM Command Set Specification 1.0, section 5.2.1.3.4). It distinguishes writers but does
/// not stop forgers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InodeCheck(u64);

impl InodeCheck {
    /// Length of its text, in hexadecimal digits.
    const DIGITS: usize = 16;

    /// The check value of these parts of an inode. Times are in seconds and nanoseconds since 1970-01-01 UTC.
    pub(crate) fn of_parts(cno: u64, size_bytes: u64, mtime: (i64, i64), root: &[u8]) -> Self {
        let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
        digest.update(&cno.to_le_bytes());
        digest.update(&size_bytes.to_le_bytes());
        digest.update(&mtime.0.to_le_bytes());
        digest.update(&mtime.1.to_le_bytes());
        digest.update(root);
        Self(digest.finalize())
    }

    /// The value as it is stored in binary records.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// The value read from a binary record.
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl fmt::Display for InodeCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<InodeCheck> for String {
    fn from(check: InodeCheck) -> Self {
        check.to_string()
    }
}

impl TryFrom<String> for InodeCheck {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_hex = text.len() == Self::DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit());
        is_hex
            .then(|| u64::from_str_radix(&text, 16).ok())
            .flatten()
            .map(Self)
            .ok_or_else(|| "a check value has 16 hexadecimal digits".into())
    }
}

/// One checkpoint of one history.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct CheckpointId {
    /// Its number in the container; 0 is the volume as it was created.
    pub cno: u64,
    /// Distinguishes it from other checkpoints with that number.
    pub check: InodeCheck,
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.cno, self.check)
    }
}

/// A published checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Which checkpoint it is.
    pub id: CheckpointId,
    /// Size of the volume at the checkpoint, in bytes.
    pub size_bytes: u64,
    /// When it was published, as its inode says: milliseconds since 1970-01-01 UTC, by the publisher's clock.
    pub published_ms: u64,
}

/// The most checkpoints of this process that are remembered with their size and time.
pub(crate) const RECENT_MAX: usize = 4096;

/// The newest checkpoint that is published and recorded, for those that must name it, and the checkpoints recorded
/// before it. All clones share one state.
#[derive(Debug, Clone, Default)]
pub struct NewestCheckpoint(Arc<Mutex<Recorded>>);

#[derive(Debug, Default)]
struct Recorded {
    newest: Option<CheckpointId>,
    /// By number: the checkpoint, and when it was published, in milliseconds since 1970-01-01 UTC.
    recent: BTreeMap<u64, (Checkpoint, u64)>,
}

impl NewestCheckpoint {
    /// Begins with this checkpoint as the newest.
    pub fn new(id: CheckpointId) -> Self {
        let newest = Self::default();
        newest.set(id);
        newest
    }

    /// The newest checkpoint, once one is known.
    pub fn get(&self) -> Option<CheckpointId> {
        self.0.lock().newest
    }

    /// Notes that another checkpoint was recorded.
    pub fn set(&self, id: CheckpointId) {
        self.0.lock().newest = Some(id);
    }

    /// Notes that another checkpoint was recorded, which was published at this time, in milliseconds since 1970-01-01
    /// UTC.
    pub fn record(&self, checkpoint: Checkpoint, published_ms: u64) {
        let mut recorded = self.0.lock();
        recorded.newest = Some(checkpoint.id);
        recorded
            .recent
            .insert(checkpoint.id.cno, (checkpoint, published_ms));
        if recorded.recent.len() > RECENT_MAX {
            recorded.recent.pop_first();
        }
    }

    /// The `count` recorded last, the newest first, and when they were published.
    pub fn last(&self, count: usize) -> Vec<(Checkpoint, u64)> {
        self.0.lock().recent.values().rev().take(count).copied().collect()
    }

    /// The checkpoint of this number, and when it was published, if it was recorded here not long ago.
    pub fn recent(&self, cno: u64) -> Option<(Checkpoint, u64)> {
        self.0.lock().recent.get(&cno).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_an_inode_that_a_checkpoint_fixes_counts() {
        let root = [7; 56];
        let base = InodeCheck::of_parts(3, 4096, (5, 6), &root);
        let mut other_root = root;
        other_root[9] ^= 1;
        for other in [
            InodeCheck::of_parts(4, 4096, (5, 6), &root),
            InodeCheck::of_parts(3, 8192, (5, 6), &root),
            InodeCheck::of_parts(3, 4096, (6, 6), &root),
            InodeCheck::of_parts(3, 4096, (5, 7), &root),
            InodeCheck::of_parts(3, 4096, (5, 6), &other_root),
        ] {
            assert_ne!(base, other);
        }
        assert_eq!(base, InodeCheck::of_parts(3, 4096, (5, 6), &root));
    }

    #[test]
    fn the_text_of_a_check_value_is_read_back_and_nothing_else_is() {
        let check = InodeCheck(0x00ab_cdef_0123_4567);
        let text = serde_json::to_string(&check).unwrap();
        assert_eq!(text, "\"00abcdef01234567\"");
        assert_eq!(serde_json::from_str::<InodeCheck>(&text).unwrap(), check);
        for wrong in ["\"\"", "\"00abcdef0123456\"", "\"+0abcdef01234567\"", "7"] {
            assert!(serde_json::from_str::<InodeCheck>(wrong).is_err(), "{wrong}");
        }
    }
}
