//! Which records are applied when a volume is opened, and which numbers a new owner seals (pure).
//!
//! *Invariant L2*: applying the records with generations above the watermark, in order, to the published state restores
//! every flushed write and replaces no write by an older one:
//!
//! * A record holds the bytes as they were at its snapshot. So a later record has the newer bytes.
//! * A record is removed only when the watermark covers it, and generations never fall from one record to the next. So
//!   the remaining records hold all changes after the published state, and perhaps unflushed ones besides.
//! * Applying a record twice has the same result as applying it once.
//! * A record that is gone without having been published is noticed. The record after it names the highest generation
//!   before it, and how many of the records before it may be missing because they were not acknowledged. Only the end
//!   of the WAL has no record after it; there stands a seal if older owners had a record.

use super::RecordId;
use super::record::{Entry, NONE_ACKNOWLEDGED, Record};

/// The highest number of appends that an owner has in flight at once. It is part of the format, because the next owner
/// seals every number that may still arrive.
pub const IN_FLIGHT_MAX: u64 = 8;

/// The numbers to seal so that nothing that an older owner still sends can be acknowledged: the gaps among the numbers
/// that the owner may have in flight, and the number after the last. `found` holds the stored numbers, ascending.
pub fn numbers_to_seal(found: &[u64]) -> Vec<u64> {
    let (Some(first), Some(last)) = (found.first(), found.last()) else {
        return vec![1];
    };
    let from = (last + 1).saturating_sub(IN_FLIGHT_MAX).max(*first);
    (from..=last + 1)
        .filter(|n| found.binary_search(n).is_err())
        .collect()
}

/// How a WAL contradicts itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// The records were not given in order.
    #[error("record {sequence} of epoch {epoch} comes after a later one")]
    OutOfOrder {
        /// The record's epoch.
        epoch: u64,
        /// The record's number.
        sequence: u64,
    },
    /// A later record has an older generation.
    #[error(
        "record {sequence} of epoch {epoch} is of generation {generation}, the one before it of a later one"
    )]
    GenerationFell {
        /// The record's epoch.
        epoch: u64,
        /// The record's number.
        sequence: u64,
        /// The record's newest generation.
        generation: u64,
    },
    /// Records with unpublished changes were removed or damaged.
    #[error("what comes before record {sequence} of epoch {epoch} is missing, and not published")]
    Missing {
        /// The epoch of the record after the gap.
        epoch: u64,
        /// Its number.
        sequence: u64,
    },
}

/// A replay in progress.
#[derive(Debug)]
pub struct Replay {
    watermark: u64,
    last: Option<RecordId>,
    /// The last that is an owner's own: a record, or the seal that begins its part.
    last_own: Option<RecordId>,
    /// The first number that is missing and not published. The record may never have been acknowledged.
    torn: Option<u64>,
    newest_generation: u64,
}

impl Replay {
    /// Begins a replay on a published state that holds every generation up to `watermark`.
    pub fn new(watermark: u64) -> Self {
        Self {
            watermark,
            last: None,
            last_own: None,
            torn: None,
            newest_generation: watermark,
        }
    }

    /// Takes the next record or seal, which is stored as `id`, and returns the changes to apply.
    ///
    /// # Errors
    /// [`ReplayError`]: no record of the WAL may then be trusted.
    pub fn next(&mut self, id: RecordId, group: Record) -> Result<Vec<Entry>, ReplayError> {
        let RecordId { epoch, sequence } = id;
        if self.last.is_some_and(|before| before >= id) {
            return Err(ReplayError::OutOfOrder { epoch, sequence });
        }
        self.last = Some(id);
        // A later owner's seal says only that no record was there when it was put. Whether there ever was one is told by the
        // records after it.
        if group.is_seal && group.epoch != epoch {
            return Ok(Vec::new());
        }
        let before = self.last_own.replace(id);
        if group.is_seal {
            return Ok(Vec::new());
        }
        let of_same_owner = before.filter(|b| b.epoch == epoch);
        let next = of_same_owner.map_or(0, |b| b.sequence.saturating_add(1));
        if next != sequence && group.after_generation > self.watermark {
            self.torn.get_or_insert(next);
        }
        // All records before the unacknowledged ones were durable.
        let unacknowledged = match group.unacknowledged {
            NONE_ACKNOWLEDGED => sequence,
            count => u64::from(count),
        };
        let is_missing = |torn: u64| torn.saturating_add(unacknowledged) < sequence;
        if self.torn.is_some_and(is_missing) {
            return Err(ReplayError::Missing { epoch, sequence });
        }
        let generation = group.newest_generation();
        if generation > self.watermark && generation < self.newest_generation {
            return Err(ReplayError::GenerationFell {
                epoch,
                sequence,
                generation,
            });
        }
        self.newest_generation = self.newest_generation.max(generation);
        let watermark = self.watermark;
        let mut entries = group.entries;
        entries.retain(|e| e.generation > watermark);
        Ok(entries)
    }

    /// The highest generation seen so far; at least the watermark.
    pub fn newest_generation(&self) -> u64 {
        self.newest_generation
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::wal::record::Content;

    fn next(replay: &mut Replay, group: Record) -> Result<Vec<Entry>, ReplayError> {
        let (epoch, sequence) = (group.epoch, group.sequence);
        replay.next(RecordId { epoch, sequence }, group)
    }

    fn group(epoch: u64, sequence: u64, generations: &[u64]) -> Record {
        let entries = generations.iter().map(|&generation| Entry {
            generation,
            offset_bytes: sequence * 100,
            content: Content::Zero { len_bytes: 1 },
        });
        Record {
            is_seal: false,
            entries: entries.collect(),
            ..Record::seal(Uuid::nil(), epoch, sequence)
        }
    }

    #[test]
    fn only_generations_above_the_watermark_are_applied() {
        let mut replay = Replay::new(4);
        let mut generations = |g| -> Vec<u64> {
            let entries = next(&mut replay, g).unwrap();
            entries.into_iter().map(|e| e.generation).collect()
        };
        assert_eq!(generations(group(1, 7, &[3, 4])), [0u64; 0]);
        assert_eq!(generations(group(1, 8, &[4, 5])), [5]);
        assert_eq!(generations(group(1, 9, &[])), [0u64; 0], "nothing");
        assert_eq!(generations(group(2, 1, &[6])), [6]);
        assert_eq!(replay.newest_generation(), 6);
    }

    #[test]
    fn a_log_out_of_order_is_refused() {
        let mut replay = Replay::new(0);
        next(&mut replay, group(2, 3, &[5])).unwrap();
        let (epoch, sequence) = (2, 3);
        assert_eq!(
            next(&mut replay, group(2, 3, &[5])),
            Err(ReplayError::OutOfOrder { epoch, sequence })
        );
        let error = next(&mut replay, group(2, 4, &[4])).unwrap_err();
        assert!(error.to_string().contains("record 4 of epoch 2"), "{error}");
    }

    /// Record 3, of generation 5, is gone. That is harmless when generation 5 is published, or when record 4 says that 3 was
    /// not acknowledged. A later owner's seal with the number 3 changes nothing: it is put wherever no record is seen.
    #[test]
    fn a_missing_group_is_noticed_unless_it_was_published() {
        let after = |sequence, after_generation, unacknowledged| Record {
            after_generation,
            unacknowledged,
            ..group(1, sequence, &[6])
        };
        for (watermark, is_sealed, unacknowledged, is_refused) in [
            (4, false, 0, true),
            (4, false, 1, false),
            (5, false, 0, false),
            (4, true, 0, true),
            (4, true, 1, false),
            (5, true, 0, false),
            (6, false, 0, false),
        ] {
            let mut replay = Replay::new(watermark);
            next(&mut replay, group(1, 2, &[5])).unwrap();
            if is_sealed {
                let (epoch, sequence) = (1, 3);
                let seal = Record::seal(Uuid::nil(), 2, sequence);
                assert_eq!(replay.next(RecordId { epoch, sequence }, seal), Ok(Vec::new()));
            }
            let refused = ReplayError::Missing {
                epoch: 1,
                sequence: 4,
            };
            let first = next(&mut replay, after(4, 5, unacknowledged));
            assert_eq!(
                first.as_ref().err(),
                is_refused.then_some(&refused),
                "{watermark} {is_sealed} {unacknowledged}"
            );
        }
        // The same holds for the first records.
        assert!(next(&mut Replay::new(4), after(2, 5, 0)).is_err());
        assert!(next(&mut Replay::new(4), after(2, 4, 0)).is_ok());
        // The seal that begins a part is its owner's own.
        let mut replay = Replay::new(4);
        next(&mut replay, Record::seal(Uuid::nil(), 1, 1)).unwrap();
        assert!(next(&mut replay, after(2, 5, 0)).is_ok());
    }

    #[test]
    fn seals_close_the_gaps_that_may_still_be_filled() {
        assert_eq!(numbers_to_seal(&[]), [1]);
        assert_eq!(numbers_to_seal(&[1]), [2]);
        assert_eq!(numbers_to_seal(&[1, 2, 4, 6]), [3, 5, 7]);
        assert_eq!(numbers_to_seal(&[10, 100, 102]), [95, 96, 97, 98, 99, 101, 103]);
        assert_eq!(numbers_to_seal(&[98, 100]), [99, 101]);
    }

    /// A crash may leave any subset of the records in flight. A record that was made after another one was acknowledged
    /// says so.
    #[test]
    fn a_group_nobody_was_told_of_may_be_missing() {
        let of = |sequence, unacknowledged| Record {
            after_generation: if unacknowledged == 0 && sequence == 2 {
                0
            } else {
                5
            },
            unacknowledged,
            ..group(1, sequence, &[5])
        };
        let missing = |groups: &[(u64, u32)]| {
            let mut replay = Replay::new(4);
            groups.iter().any(|&(sequence, count)| {
                let next = next(&mut replay, of(sequence, count));
                next.is_err_and(|e| e == ReplayError::Missing { epoch: 1, sequence })
            })
        };
        // The first record of all is missing.
        assert!(!missing(&[(3, NONE_ACKNOWLEDGED)]));
        assert!(!missing(&[(3, NONE_ACKNOWLEDGED), (4, NONE_ACKNOWLEDGED)]));
        assert!(missing(&[(3, NONE_ACKNOWLEDGED), (4, 1)]), "2 was durable");
        // Record 3 is missing.
        assert!(!missing(&[(2, 0), (4, 1)]));
        assert!(!missing(&[(2, 0), (4, 2), (5, 2), (6, 3)]));
        assert!(missing(&[(2, 0), (4, 0)]), "3 was durable before 4 was made");
        assert!(
            missing(&[(2, 0), (4, 1), (5, 1)]),
            "3 was durable before 5 was made"
        );
        // Records 3 and 4 are missing.
        assert!(!missing(&[(2, 0), (5, 2)]));
        assert!(missing(&[(2, 0), (5, 1)]));
        // Records 3 and 5 are missing.
        assert!(!missing(&[(2, 0), (4, 1), (6, 3)]));
        assert!(
            missing(&[(2, 0), (4, 1), (6, 1)]),
            "3 was durable before 6 was made"
        );
    }
}
