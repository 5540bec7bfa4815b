//! The numbers of a container that can be used up.
//!
//! A block pointer has 64 bits: 30 name a checkpoint, 14 a part of it, and 18 a place in the part in units of 4 KiB
//! (hyperfile 0.14.0, `meta_format.rs`). The engine silently masks larger numbers, so every publish checks them first.

use std::sync::atomic::{AtomicU64, Ordering};

use hyperfile::meta_format::BLOCK_PTR_MAX_CHECKPOINT;

use crate::base::counters::Counter;
use crate::base::error::VolumeError;

/// The largest checkpoint number that a block pointer can name.
pub const CHECKPOINT_NUMBER_MAX: u64 = BLOCK_PTR_MAX_CHECKPOINT;
/// Numbers that are kept for publishing the writes that were accepted before writes are refused.
const KEPT_FOR_FLUSHES: u64 = 1024;
/// Numbers that no publish uses: a resize needs some, and an open may use up two that a killed server left.
const KEPT: u64 = 64;
/// The counter of checkpoint numbers.
pub(crate) const CHECKPOINT_NUMBERS: Counter = Counter {
    name: "checkpoint numbers",
    max: CHECKPOINT_NUMBER_MAX,
    advice: "near the end writes are refused; copy it into a new volume in time",
};

/// How many checkpoint numbers a container has used. The owner thread updates it, and every user of the engine reads
/// it.
#[derive(Debug, Default)]
pub(super) struct CheckpointNumbers(AtomicU64);

impl CheckpointNumbers {
    /// Notes that this is the newest number used.
    pub fn note(&self, newest: u64) {
        let before = self.0.fetch_max(newest, Ordering::Relaxed);
        CHECKPOINT_NUMBERS.note(before, newest);
    }

    /// Checks whether writes may be accepted.
    ///
    /// # Errors
    /// [`VolumeError::CountersExhausted`] near the end.
    pub fn check_write(&self) -> Result<(), VolumeError> {
        self.check(KEPT + KEPT_FOR_FLUSHES)
    }

    /// Checks whether a checkpoint may be made.
    ///
    /// # Errors
    /// [`VolumeError::CountersExhausted`] at the end.
    pub fn check_publish(&self) -> Result<(), VolumeError> {
        self.check(KEPT)
    }

    fn check(&self, kept: u64) -> Result<(), VolumeError> {
        if self.0.load(Ordering::Relaxed) < CHECKPOINT_NUMBER_MAX - kept {
            return Ok(());
        }
        Err(CHECKPOINT_NUMBERS.exhausted())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::error::ErrorKind;

    #[test]
    fn writes_end_before_flushes_do_and_both_before_the_last_number() {
        let numbers = CheckpointNumbers::default();
        assert!(numbers.check_write().is_ok());
        numbers.note(CHECKPOINT_NUMBER_MAX - KEPT - KEPT_FOR_FLUSHES - 1);
        assert!(numbers.check_write().is_ok());
        numbers.note(CHECKPOINT_NUMBER_MAX - KEPT - KEPT_FOR_FLUSHES);
        let refused = numbers.check_write().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Exhausted);
        assert!(numbers.check_publish().is_ok(), "what was taken in is published");
        numbers.note(CHECKPOINT_NUMBER_MAX - KEPT);
        assert!(numbers.check_publish().is_err());
        numbers.note(7);
        assert!(numbers.check_publish().is_err(), "it never goes back");
    }
}
