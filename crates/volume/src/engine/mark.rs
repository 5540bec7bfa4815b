//! Telling our own published states from a foreign writer's.

use hyperfile::ondisk::{BMapRawType, InodeRaw};

use super::container::Container;
use crate::base::checkpoint_id::{CheckpointId, InodeCheck};

/// What tells one published state of the container from any other: its checkpoint number, and when it was last written and
/// last changed, to the nanosecond, by the writer's clock. Two writers that publish the same number differ in the times; a
/// takeover changes the time of change alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Number of the newest checkpoint; 0 before the first.
    pub cno: u64,
    /// Seconds and nanoseconds since 1970-01-01 UTC.
    mtime: (i64, i64),
    ctime: (i64, i64),
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

    /// Of an open container, with the changes applied to it.
    pub(super) fn of_container(c: &Container) -> Self {
        let stat = c.stat();
        Self {
            cno: c.last_cno(),
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            ctime: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }

    /// The same change, published under this number.
    pub(super) fn at(self, cno: u64) -> Self {
        Self { cno, ..self }
    }

    /// Whether both were last changed at the same moment.
    pub(super) fn has_times_of(&self, other: &Self) -> bool {
        (self.mtime, self.ctime) == (other.mtime, other.ctime)
    }

    /// The checkpoint of this mark, in a container of this size with this root of its index.
    pub(super) fn id(&self, size_bytes: u64, root: &BMapRawType) -> CheckpointId {
        CheckpointId {
            cno: self.cno,
            check: InodeCheck::of_parts(self.cno, size_bytes, self.mtime, root),
        }
    }
}

impl CheckpointId {
    /// The checkpoint that an inode says is the newest.
    pub(crate) fn of_inode(raw: &InodeRaw) -> Self {
        Mark::of_inode(raw).id(raw.i_size, &raw.i_bmap)
    }
}
