//! When the volume is looked at, and how many relocations may follow each other. Pure: what clients have published and the time, in;
//! decisions, out.
//!
//! The buffer file and the records of a WAL name the checkpoint of the clients' last publish. It has to stay, however many relocations
//! follow it, so it has to be among the newest, which are always kept.

use std::time::Duration;

use crate::retention::NEWEST_KEPT;

/// A look is made this long after the last one though less was published: what history held may have been let go of.
const LOOK_AT_LATEST: Duration = Duration::from_secs(3600);
/// Relocations after one look. A look is made only once clients have published since the one before, so no more than those of two
/// looks follow their last publish.
const IN_A_ROW_MAX: usize = (NEWEST_KEPT - 1) / 2;

/// What follows from what was found and done so far.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// What clients had published at the last look.
    looked_at_bytes: u64,
    /// What they publish at least before the next one.
    look_after_bytes: u64,
    /// Relocations since the last look.
    in_a_row: usize,
    is_over: bool,
    flipped_as: u64,
}

impl Schedule {
    /// For a volume to which clients had published so much when it was opened.
    pub fn new(published_bytes: u64) -> Self {
        Self {
            looked_at_bytes: published_bytes,
            ..Self::default()
        }
    }

    /// Whether a look is due, so long after the last one.
    pub fn is_look_due(&self, published_bytes: u64, since_last: Duration) -> bool {
        let published = published_bytes.saturating_sub(self.looked_at_bytes);
        published > 0 && (since_last >= LOOK_AT_LATEST || published >= self.look_after_bytes)
    }

    /// A look begins.
    pub fn look(&mut self, published_bytes: u64) {
        *self = Self {
            look_after_bytes: self.look_after_bytes,
            ..Self::new(published_bytes)
        };
    }

    /// A relocation was made as this checkpoint, or made none: 0. What it was to change is not needed any more then, and the table
    /// tells that later.
    pub fn relocated(&mut self, checkpoint: u64) {
        self.in_a_row += 1;
        self.is_over = checkpoint == 0 || self.in_a_row == IN_A_ROW_MAX;
        self.flipped_as = self.flipped_as.max(checkpoint);
    }

    /// Nothing that is not published is made upon a checkpoint before the newest one any more.
    pub fn settled(&mut self) {
        (self.in_a_row, self.is_over) = (0, false);
    }

    /// Whether nothing more is relocated before the next look.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// The checkpoint that must be accounted before victims are chosen again.
    pub fn flipped_as(&self) -> u64 {
        self.flipped_as
    }

    /// The look ended. The next one is due once so much is published.
    pub fn looked(&mut self, look_after_bytes: u64) {
        self.look_after_bytes = look_after_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random publishes and relocations, as many as may be: the clients' last publish stays among the checkpoints that are always kept.
    #[test]
    fn the_last_publish_of_clients_is_always_among_the_newest() {
        let mut most = 0;
        for seed in 0..200 {
            let mut rng = fastrand::Rng::with_seed(seed);
            let (mut bytes, mut since_publish, mut checkpoint) = (0, 0, 0);
            let mut schedule = Schedule::new(bytes);
            for _ in 0..200 {
                let since_last = [Duration::ZERO, LOOK_AT_LATEST][rng.usize(..2)];
                if rng.u8(..3) == 0 {
                    (bytes, since_publish, checkpoint) = (bytes + 1, 0, checkpoint + 1);
                }
                if rng.u8(..10) == 0 {
                    // Somebody asks: however many follow, each comes after what was written is published.
                    schedule.look(bytes);
                    for _ in 0..rng.usize(..3 * NEWEST_KEPT) {
                        schedule.settled();
                        (since_publish, checkpoint) = (1, checkpoint + 1);
                        schedule.relocated(checkpoint);
                        assert!(!schedule.is_over());
                    }
                }
                if !schedule.is_look_due(bytes, since_last) {
                    continue;
                }
                schedule.look(bytes);
                while !schedule.is_over() {
                    // A publish may come between any two of them.
                    if rng.u8(..9) == 0 {
                        (bytes, since_publish, checkpoint) = (bytes + 1, 0, checkpoint + 1);
                    }
                    // A look may end by an error, too.
                    if rng.u8(..30) == 0 {
                        break;
                    }
                    (since_publish, checkpoint) = (since_publish + 1, checkpoint + 1);
                    schedule.relocated(checkpoint);
                    most = most.max(since_publish);
                    assert!(
                        since_publish < NEWEST_KEPT,
                        "seed {seed}: {since_publish} in a row"
                    );
                }
                schedule.looked(rng.u64(..2));
            }
        }
        assert_eq!(most, 2 * IN_A_ROW_MAX, "as many as may be");
    }

    #[test]
    fn a_relocation_that_changes_nothing_ends_the_look() {
        let mut schedule = Schedule::new(7);
        assert!(!schedule.is_look_due(7, LOOK_AT_LATEST), "nothing was published");
        assert!(schedule.is_look_due(8, Duration::ZERO));
        schedule.look(8);
        schedule.relocated(5);
        assert!(!schedule.is_over());
        schedule.relocated(0);
        assert!(schedule.is_over());
        assert_eq!(schedule.flipped_as(), 5);
        schedule.looked(100);
        assert!(!schedule.is_look_due(107, Duration::ZERO));
        assert!(schedule.is_look_due(107, LOOK_AT_LATEST) && schedule.is_look_due(108, Duration::ZERO));
    }
}
