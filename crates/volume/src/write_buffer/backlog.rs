//! How far durability is behind the answered writes, for monitoring.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use super::overlay::Overlay;

/// How much data is not yet published or durable, and since when.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Memory that unpublished data takes, in bytes.
    pub unpublished_bytes: u64,
    /// The part of it that takes no more writes and waits for its publish, or is published.
    pub frozen_bytes: u64,
    /// Age of the oldest write that is not published.
    pub unpublished_age: Option<Duration>,
    /// Age of the oldest write that neither log nor checkpoint has.
    pub undurable_age: Option<Duration>,
    /// About how many bytes of changes neither log nor checkpoint has, in bytes.
    pub unflushed_bytes: u64,
    /// Bytes of WAL records that a replay would need.
    pub wal_bytes: u64,
    /// The number of these records.
    pub wal_records: u64,
    /// Age of the oldest of them.
    pub wal_age: Option<Duration>,
}

/// The times from which the ages in [`Backlog`] are counted.
#[derive(Debug, Default)]
pub(crate) struct Since {
    pub active: Option<Instant>,
    /// One time for each frozen generation, oldest first.
    pub frozen: VecDeque<Option<Instant>>,
    pub wal_bytes: u64,
    pub wal_records: u64,
    pub wal: Option<Instant>,
    /// The oldest write that is on its way to the log, or was left out of it.
    pub unlogged: Option<Instant>,
}

impl Since {
    pub fn backlog(&self, overlay: &Overlay, has_wal: bool) -> Backlog {
        let unpublished_bytes = overlay.total_bytes();
        let (active_bytes, _) = overlay.active();
        let oldest = self.frozen.iter().copied().flatten().next().or(self.active);
        let undurable = match (oldest, has_wal) {
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
            unflushed_bytes: if has_wal {
                overlay.unlogged_bytes()
            } else {
                unpublished_bytes
            },
            wal_bytes: self.wal_bytes,
            wal_records: self.wal_records,
            wal_age: self.wal.map(|at| at.elapsed()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::geometry::Geometry;

    const LONG_AGO: Duration = Duration::from_secs(1000);
    const LATER: Duration = Duration::from_secs(100);

    fn since(ago: Duration) -> Since {
        Since {
            active: Some(Instant::now() - ago),
            ..Since::default()
        }
    }

    fn overlay(has_wal: bool) -> Overlay {
        let geometry = Geometry::new(1 << 20, 4096);
        match has_wal {
            true => Overlay::with_wal(geometry, 1 << 20),
            false => Overlay::new(geometry),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_log_what_is_not_published_is_not_durable() {
        let overlay = overlay(false);
        assert_eq!(Since::default().backlog(&overlay, false).undurable_age, None);
        overlay.write(0, &[1; 4096]);
        let backlog = since(LONG_AGO).backlog(&overlay, false);
        assert_eq!(
            (backlog.undurable_age, backlog.unpublished_age),
            (Some(LONG_AGO), Some(LONG_AGO))
        );
        assert_eq!(backlog.frozen_bytes, 0);
        overlay.freeze();
        assert_eq!(
            since(LATER).backlog(&overlay, false).frozen_bytes,
            overlay.total_bytes()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn with_a_log_a_write_ages_until_the_log_has_it() {
        let overlay = overlay(true);
        overlay.write(0, &[1; 4096]);
        tokio::time::advance(LATER).await;
        let of = |since: Since| since.backlog(&overlay, true).undurable_age;
        assert_eq!(of(since(LATER)), Some(LATER));
        let taken = overlay.take_unlogged();
        assert_eq!(of(since(LATER)), None, "the log has it");
        let on_way = Since {
            unlogged: taken.since,
            ..since(LATER)
        };
        assert_eq!(of(on_way), Some(LATER), "it is on its way there");
        overlay.write(0, &[2; 4096]);
        assert_eq!(of(since(LATER)), Some(Duration::ZERO), "another, just now");
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_published_meanwhile_ages_no_more() {
        let overlay = overlay(true);
        overlay.write(0, &[1; 4096]);
        tokio::time::advance(LONG_AGO).await;
        let of = |since: Since| since.backlog(&overlay, true).undurable_age;
        assert_eq!(of(since(LATER)), Some(LATER), "no older than what is unpublished");
        assert_eq!(of(Since::default()), None, "everything is published");
    }
}
