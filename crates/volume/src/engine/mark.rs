//! Telling our own published states from a foreign writer's.

use hyperfile::ondisk::InodeRaw;

use super::container::Container;

/// What tells one published state of the container from any other: its checkpoint number and the time of its last
/// change, to the nanosecond, by the writer's clock. Two writers that publish the same number differ in the time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Number of the newest checkpoint; 0 before the first.
    pub cno: u64,
    mtime_s: i64,
    mtime_ns: i64,
}

impl Mark {
    /// Of a stored inode.
    pub(crate) fn of_inode(raw: &InodeRaw) -> Self {
        Self {
            cno: raw.i_last_cno,
            mtime_s: raw.i_mtime as i64,
            mtime_ns: i64::from(raw.i_mtime_nsec),
        }
    }

    /// Of an open container, with the changes applied to it.
    pub(super) fn of_container(c: &Container) -> Self {
        let stat = c.stat();
        Self {
            cno: c.last_cno(),
            mtime_s: stat.st_mtime,
            mtime_ns: stat.st_mtime_nsec,
        }
    }

    /// The same change, published under this number.
    pub(super) fn at(self, cno: u64) -> Self {
        Self { cno, ..self }
    }

    /// Whether both were last changed at the same moment.
    pub(super) fn has_time_of(&self, other: &Self) -> bool {
        (self.mtime_s, self.mtime_ns) == (other.mtime_s, other.mtime_ns)
    }
}
