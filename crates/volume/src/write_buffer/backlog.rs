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
    /// The part of it that takes no more writes and waits for its publish, or is published.
    pub frozen_bytes: u64,
    /// Age of the oldest write that is not published.
    pub unpublished_age: Option<Duration>,
    /// Age of the oldest write that neither log nor checkpoint has.
    pub undurable_age: Option<Duration>,
    /// About how many bytes of changes neither log nor checkpoint has, in bytes.
    pub unflushed_bytes: u64,
    /// Bytes of log records that a replay would need.
    pub log_bytes: u64,
    /// The number of these records.
    pub log_records: u64,
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
    pub log_records: u64,
    pub log: Option<Instant>,
    /// The oldest write that is on its way to the log, or was left out of it.
    pub unlogged: Option<Instant>,
}

impl Since {
    pub fn backlog(&self, overlay: &Overlay, has_log: bool) -> Backlog {
        let unpublished_bytes = overlay.total_bytes();
        let (active_bytes, _) = overlay.active();
        let oldest = self.frozen.iter().copied().flatten().next().or(self.active);
        let undurable = match (oldest, has_log) {
            // What the log lacked at first may be published since.
            (Some(oldest), true) => {
                let unlogged = [self.unlogged, overlay.unlogged_since()]
                    .into_iter()
                    .flatten()
                    .min();
                unlogged.map(|at| at.max(oldest))
            }
            _ => oldest,
        };
        Backlog {
            unpublished_bytes,
            frozen_bytes: unpublished_bytes.saturating_sub(active_bytes),
            undurable_age: undurable.map(|at| at.elapsed()),
            unpublished_age: oldest.map(|at| at.elapsed()),
            unflushed_bytes: if has_log {
                overlay.unlogged_bytes()
            } else {
                unpublished_bytes
            },
            log_bytes: self.log_bytes,
            log_records: self.log_records,
            log_age: self.log.map(|at| at.elapsed()),
        }
    }
}
