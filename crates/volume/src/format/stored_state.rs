//! Telling our own published states from a foreign writer's.

use hyperfile::ondisk::{BMapRawType, InodeRaw};

use crate::base::checkpoint_id::{CheckpointId, InodeCheck};

/// What tells one published state of the container from any other: its checkpoint number, and when it was last written and
/// last changed, to the nanosecond, by the writer's clock. Two writers that publish the same number differ in the times; a
/// takeover changes the time of change alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Number of the newest checkpoint; 0 before the first.
    pub cno: u64,
    /// Seconds and nanoseconds since 1970-01-01 UTC.
    pub(crate) mtime: (i64, i64),
    pub(crate) ctime: (i64, i64),
}

impl Mark {
    /// Of a stored inode.
    pub(crate) fn of_inode(raw: &InodeRaw) -> Self {
        Self {
            cno: raw.i_last_cno,
            mtime: (raw.i_mtime as i64, i64::from(raw.i_mtime_nsec)),
            ctime: (raw.i_ctime as i64, i64::from(raw.i_ctime_nsec)),
        }
    }

    /// The same change, published under this number.
    pub(crate) fn at(self, cno: u64) -> Self {
        Self { cno, ..self }
    }

    /// Whether both were last changed at the same moment.
    pub(crate) fn has_times_of(&self, other: &Self) -> bool {
        (self.mtime, self.ctime) == (other.mtime, other.ctime)
    }

    /// The checkpoint of this mark, in a container of this size with this root of its index.
    pub(crate) fn id(&self, size_bytes: u64, root: &BMapRawType) -> CheckpointId {
        CheckpointId {
            cno: self.cno,
            check: InodeCheck::of_parts(self.cno, size_bytes, self.mtime, root),
        }
    }
}

/// The root of a container's index, as its inode holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(align(8))]
pub(crate) struct Root(pub hyperfile::ondisk::BMapRawType);

/// A state that was stored, as its inode says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredState {
    /// What tells it from any other.
    pub mark: Mark,
    pub(crate) root: Root,
    /// Size of the volume at it.
    pub(crate) size_bytes: u64,
}

impl StoredState {
    pub(crate) fn of_inode(raw: &InodeRaw) -> Self {
        Self {
            mark: Mark::of_inode(raw),
            root: Root(raw.i_bmap),
            size_bytes: raw.i_size,
        }
    }

    /// Size of the volume at it, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The checkpoint that was the newest.
    pub fn id(&self) -> CheckpointId {
        self.mark.id(self.size_bytes, &self.root.0)
    }
}

impl CheckpointId {
    /// The checkpoint that an inode says is the newest.
    pub(crate) fn of_inode(raw: &InodeRaw) -> Self {
        Mark::of_inode(raw).id(raw.i_size, &raw.i_bmap)
    }
}
