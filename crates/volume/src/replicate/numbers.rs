//! The numbers of the original's checkpoints, as a round reads them off the list: once, however many steps the round takes.
//!
//! Entries are written in the order of their numbers, so that what comes later is listed after what is known. A store may carry out a write
//! late, so the last few are listed again. That some went since is found out by whoever looks for them.

use std::time::Duration;

use crate::base::error::VolumeError;
use crate::meta::checkpoint_list::{self, CatalogueEntry};
use crate::store::Store;

/// The last numbers that are known, which are listed again with what comes after them.
const LISTED_AGAIN: usize = 32;
/// The wait for entries that are on their way ...
const LOOK_WAIT: Duration = Duration::from_millis(500);
/// ... and how often it is begun again.
const LOOKS_MAX: u32 = 4;

/// Numbers of checkpoints that have entries, as far as the list was read.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// Those above this one are known.
    from: u64,
    /// Ascending.
    known: Vec<u64>,
}

/// What the list has after a number.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// How many there are.
    pub count: u64,
    /// The entry of the first one.
    pub first: Option<CatalogueEntry>,
    /// The last one.
    pub last: Option<u64>,
}

impl Numbers {
    /// The first numbers above `after`, `most` of them at most. The last is `newest`, which may have no entry yet; what is above that is
    /// of another history. Waits a moment where those before `newest` may have none yet either: whoever goes on from `newest` never
    /// comes back to them.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn some_after(
        &mut self,
        store: &Store,
        after: u64,
        newest: u64,
        most: usize,
    ) -> Result<Vec<u64>, VolumeError> {
        if !self.has(after, newest, most) {
            self.read_on(store, after).await?;
            for _ in 0..LOOKS_MAX {
                if !self.may_lag(after, newest, most) {
                    break;
                }
                tokio::time::sleep(LOOK_WAIT).await;
                self.read_on(store, after).await?;
            }
        }
        Ok(self.pick(after, newest, most))
    }

    /// What the list has after `after` now.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn ahead(&mut self, store: &Store, after: u64) -> Result<Ahead, VolumeError> {
        let mut ahead = self.look(store, after).await?;
        if ahead.first.is_none() && ahead.count > 0 {
            // It went since it was listed, and others may have gone with it.
            self.forget();
            ahead = self.look(store, after).await?;
        }
        Ok(ahead)
    }

    /// What is known is not to be used any more: some of it went.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    async fn look(&mut self, store: &Store, after: u64) -> Result<Ahead, VolumeError> {
        self.read_on(store, after).await?;
        let above = self.above(after);
        let first = match above.first() {
            Some(first) => checkpoint_list::load_entry(store, *first).await?,
            None => None,
        };
        Ok(Ahead {
            count: above.len() as u64,
            first,
            last: above.last().copied(),
        })
    }

    /// Whether the list need not be read for this.
    fn has(&self, after: u64, newest: u64, most: usize) -> bool {
        let is_all = self.known.last().is_some_and(|last| *last >= newest);
        self.from <= after && (is_all || self.above(after).len() >= most)
    }

    /// Whether `newest` would be picked without an entry, and numbers before it have none either. Its owner publishes before it writes the
    /// entries; or the numbers were never used, or removed.
    fn may_lag(&self, after: u64, newest: u64, most: usize) -> bool {
        let last = self.known.last().map_or(after, |last| after.max(*last));
        self.above(after).len() < most && newest > last + 1
    }

    fn pick(&self, after: u64, newest: u64, most: usize) -> Vec<u64> {
        let known = self.above(after).iter().copied();
        let mut some: Vec<u64> = known.take_while(|number| *number <= newest).take(most).collect();
        if some.len() < most && newest > after && some.last() != Some(&newest) {
            some.push(newest);
        }
        some
    }

    fn above(&self, after: u64) -> &[u64] {
        let at = self.known.partition_point(|number| *number <= after);
        &self.known[at..]
    }

    /// Lists the last few of what is known, with what comes after that; or anew where `after` lies before it.
    async fn read_on(&mut self, store: &Store, after: u64) -> Result<(), VolumeError> {
        if self.known.is_empty() || after < self.from {
            (self.from, self.known) = (after, Vec::new());
        }
        self.known.truncate(self.known.len().saturating_sub(LISTED_AGAIN));
        let last = self.known.last().copied().unwrap_or(self.from);
        let more = checkpoint_list::numbers_after(store, last).await?;
        self.known.extend(more);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ones_are_picked_and_the_newest_without_an_entry() {
        let numbers = Numbers {
            from: 2,
            known: vec![3, 5, 6, 9],
        };
        for (after, newest, most, expected) in [
            (2, 9, 2, vec![3, 5]),
            (5, 9, 2, vec![6, 9]),
            (5, 10, 3, vec![6, 9, 10]),
            (5, 10, 2, vec![6, 9]),
            (9, 10, 1, vec![10]),
            (9, 9, 32, vec![]),
            // The volume went back.
            (3, 5, 32, vec![5]),
            (5, 8, 32, vec![6, 8]),
            (5, 4, 32, vec![]),
        ] {
            let picked = numbers.pick(after, newest, most);
            assert_eq!(picked, expected, "{after}, {newest}, {most}");
        }
    }

    #[test]
    fn the_newest_alone_is_not_picked_before_what_may_be_on_its_way() {
        let numbers = Numbers {
            from: 2,
            known: vec![3, 5, 6, 9],
        };
        assert!(numbers.may_lag(6, 11, 32), "10 may have none yet either");
        for newest in [9, 10] {
            assert!(!numbers.may_lag(6, newest, 32), "none lies between");
        }
        assert!(!numbers.may_lag(10, 11, 32), "the replica has the one before it");
        assert!(!numbers.may_lag(2, 11, 4), "it is not picked");
        assert!(Numbers::default().may_lag(0, 2, 1) && !Numbers::default().may_lag(0, 1, 1));
    }

    #[test]
    fn the_list_is_read_where_what_is_known_does_not_do() {
        let numbers = Numbers {
            from: 2,
            known: vec![3, 5, 6, 9],
        };
        assert!(numbers.has(2, 9, 32), "all are known");
        assert!(numbers.has(3, 20, 3) && !numbers.has(3, 20, 4));
        assert!(!numbers.has(1, 9, 1), "some may lie before");
        assert!(!Numbers::default().has(0, 1, 1));
    }
}
