//! How far durability is behind, for whoever watches the server.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::overlay::Overlay;

/// How much is not yet where it is to be, and since when.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Memory of what is not published, in bytes.
    pub unpublished_bytes: u64,
    /// Age of the oldest write that is not published.
    pub unpublished_age: Option<Duration>,
    /// About how many bytes of changes neither log nor checkpoint has, in bytes.
    pub unflushed_bytes: u64,
    /// Bytes of log records that a replay would need.
    pub log_bytes: u64,
    /// Age of the oldest of them.
    pub log_age: Option<Duration>,
}

/// Since when there is what [`Backlog`] tells of.
#[derive(Debug, Default)]
pub(crate) struct Since {
    pub active: Option<Instant>,
    /// Of each frozen generation, oldest first.
    pub frozen: VecDeque<Option<Instant>>,
    pub log_bytes: u64,
    pub log: Option<Instant>,
}

impl Since {
    pub fn backlog(&self, overlay: &Overlay, has_log: bool) -> Backlog {
        let unpublished_bytes = overlay.total_bytes();
        let oldest = self.frozen.iter().copied().flatten().next().or(self.active);
        Backlog {
            unpublished_bytes,
            unpublished_age: oldest.map(|at| at.elapsed()),
            unflushed_bytes: if has_log {
                overlay.unlogged_bytes()
            } else {
                unpublished_bytes
            },
            log_bytes: self.log_bytes,
            log_age: self.log.map(|at| at.elapsed()),
        }
    }
}
