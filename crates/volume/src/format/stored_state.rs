//! Distinguishes this server's own published states from those of another writer.

use hyperfile::ondisk::{BMapRawType, InodeRaw};

use crate::base::checkpoint_id::{CheckpointId, InodeCheck};

/// A state id: it distinguishes one published state of the container from any other. It is the checkpoint number, and
/// the times of the last write and of the last change, to the nanosecond, by the writer's clock. Two writers that
/// publish the same number differ in the times. A takeover changes only the time of the last change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateId {
    /// Number of the newest checkpoint; 0 before the first.
    pub cno: u64,
    /// Seconds and nanoseconds since 1970-01-01 UTC.
    pub(crate) mtime: (i64, i64),
    pub(crate) ctime: (i64, i64),
}

impl StateId {
    /// The state id of a stored inode.
    pub(crate) fn of_inode(raw: &InodeRaw) -> Self {
        Self {
            cno: raw.i_last_cno,
            mtime: (raw.i_mtime as i64, i64::from(raw.i_mtime_nsec)),
            ctime: (raw.i_ctime as i64, i64::from(raw.i_ctime_nsec)),
        }
    }

    /// When the state was published, as the inode says: milliseconds since 1970-01-01 UTC.
    pub(crate) fn modified_ms(&self) -> u64 {
        let (seconds, nanoseconds) = self.mtime;
        (seconds as u64).saturating_mul(1000) + nanoseconds as u64 / 1_000_000
    }

    /// The same times, published under this number.
    pub(crate) fn at(self, cno: u64) -> Self {
        Self { cno, ..self }
    }

    /// Whether both have the same times.
    pub(crate) fn has_times_of(&self, other: &Self) -> bool {
        (self.mtime, self.ctime) == (other.mtime, other.ctime)
    }

    /// The checkpoint with this state id, in a container with this size and this root of its index.
    pub(crate) fn id(&self, size_bytes: u64, root: &BMapRawType) -> CheckpointId {
        CheckpointId {
            cno: self.cno,
            check: InodeCheck::of_parts(self.cno, size_bytes, self.mtime, root),
        }
    }
}

/// The root of a container's index, as it is in the inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(align(8))]
pub(crate) struct Root(pub hyperfile::ondisk::BMapRawType);

/// A stored state, as its inode describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredState {
    /// The state id.
    pub state_id: StateId,
    pub(crate) root: Root,
    /// Size of the volume in this state, in bytes.
    pub(crate) size_bytes: u64,
}

impl StoredState {
    pub(crate) fn of_inode(raw: &InodeRaw) -> Self {
        Self {
            state_id: StateId::of_inode(raw),
            root: Root(raw.i_bmap),
            size_bytes: raw.i_size,
        }
    }

    /// Size of the volume in this state, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The newest checkpoint in this state.
    pub fn id(&self) -> CheckpointId {
        self.state_id.id(self.size_bytes, &self.root.0)
    }
}

impl CheckpointId {
    /// The newest checkpoint that an inode names.
    pub(crate) fn of_inode(raw: &InodeRaw) -> Self {
        StateId::of_inode(raw).id(raw.i_size, &raw.i_bmap)
    }
}
