//! Counters of a volume that are kept in its store, and where they end. Values are bounded when they are read, so that
//! no sum of such a value and what an owner adds can wrap.

use serde::{Deserialize, Deserializer, Serialize, de::Error};

use crate::base::error::VolumeError;

/// A counter that has an end.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Counter {
    /// What is counted.
    pub name: &'static str,
    /// The largest number there is.
    pub max: u64,
    /// What to do when the end is near.
    pub advice: &'static str,
}

/// How much of a counter is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CounterUse {
    /// What is counted.
    pub name: &'static str,
    /// The newest number used.
    pub used: u64,
    /// The largest number there is.
    pub max: u64,
}

/// Servers that opened the volume for writing, counted by the epochs of its lease.
pub(crate) const OWNERS: Counter = Counter {
    name: "owners",
    max: EPOCH_MAX,
    advice: "at the end it can only be read; copy it into a new volume in time",
};
/// Records that one owner wrote to a WAL on S3. Their names have ten digits, as epochs have.
pub(crate) const LOG_RECORDS: Counter = Counter {
    name: "log records of one server",
    max: EPOCH_MAX,
    advice: "from the end on each flush is a checkpoint; a restart of the server begins anew",
};
/// Records of a journal during its whole life, and the numbers of its files.
pub(crate) const JOURNAL_NUMBERS: Counter = Counter {
    name: "numbers of a journal",
    max: u64::MAX - 1,
    advice: "name another directory for the log",
};

impl Counter {
    /// The error when the counter is used up.
    pub fn exhausted(&self) -> VolumeError {
        VolumeError::CountersExhausted {
            counter: self.name,
            limit: self.max,
        }
    }

    /// Whether 90 % of the numbers are used.
    pub fn is_near_end(&self, used: u64) -> bool {
        used >= self.max / 10 * 9
    }

    /// Logs a warning once, when 90 % of the numbers are used.
    pub fn note(&self, before: u64, used: u64) {
        if !self.is_near_end(before) && self.is_near_end(used) {
            log::warn!(
                "{used} of the volume's {} {} are used: {}",
                self.max,
                self.name,
                self.advice
            );
        }
    }

    /// The number after this one.
    ///
    /// # Errors
    /// [`VolumeError::CountersExhausted`] when there is none.
    pub fn after(&self, used: u64) -> Result<u64, VolumeError> {
        match used < self.max {
            true => Ok(used + 1),
            false => Err(self.exhausted()),
        }
    }

    /// How much of the counter is used.
    pub fn used(&self, used: u64) -> CounterUse {
        CounterUse {
            name: self.name,
            used,
            max: self.max,
        }
    }
}

impl CounterUse {
    /// The share that is used, in whole percent.
    pub fn percent(&self) -> u64 {
        (u128::from(self.used) * 100 / u128::from(self.max.max(1))) as u64
    }

    /// The counter that ends first, if all go on as before.
    pub(crate) fn nearest(all: impl IntoIterator<Item = Self>) -> Option<Self> {
        // By cross-multiplication: a share is a fraction.
        all.into_iter().max_by(|a, b| {
            let (a, b) = (
                u128::from(a.used) * u128::from(b.max),
                u128::from(b.used) * u128::from(a.max),
            );
            a.cmp(&b)
        })
    }
}

/// The largest epoch. Object names have ten digits for it, and sort as numbers only while all have equally many digits.
pub(crate) const EPOCH_MAX: u64 = 9_999_999_999;
/// The largest generation that is accepted. No volume comes near it: at a million flushes a second it takes 146
/// thousand years, and an abandoned history uses up 2^32 of them.
pub(crate) const GENERATION_MAX: u64 = 1 << 62;

/// Reads an epoch.
pub(crate) fn epoch<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    bounded(u64::deserialize(deserializer)?, EPOCH_MAX, "epoch")
}

/// Reads a generation.
pub(crate) fn generation<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    bounded(u64::deserialize(deserializer)?, GENERATION_MAX, "generation")
}

fn bounded<E: Error>(value: u64, max: u64, what: &str) -> Result<u64, E> {
    match value <= max {
        true => Ok(value),
        false => Err(E::custom(format!("{value} is no {what}: the largest is {max}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEN: Counter = Counter {
        name: "fingers",
        max: 10,
        advice: "",
    };

    #[test]
    fn a_counter_is_near_its_end_at_nine_tenths_and_ends_at_its_last() {
        assert!(!TEN.is_near_end(8) && TEN.is_near_end(9) && TEN.is_near_end(10));
        assert_eq!(TEN.after(9).unwrap(), 10);
        for wrong in [10, 11, u64::MAX] {
            assert!(matches!(
                TEN.after(wrong),
                Err(VolumeError::CountersExhausted { limit: 10, .. })
            ));
        }
        assert!(JOURNAL_NUMBERS.after(u64::MAX).is_err(), "no wrap");
    }

    #[test]
    fn the_nearest_end_is_that_of_the_largest_share() {
        let (a, b) = (TEN.used(5), OWNERS.used(OWNERS.max - 1));
        assert_eq!(CounterUse::nearest([a, b]), Some(b));
        assert_eq!(CounterUse::nearest([a, OWNERS.used(7)]), Some(a));
        assert_eq!((a.percent(), b.percent()), (50, 99));
        assert_eq!(CounterUse::nearest([]), None);
    }

    #[derive(Deserialize)]
    struct Stored {
        #[serde(default, deserialize_with = "epoch")]
        epoch: u64,
        #[serde(default, deserialize_with = "generation")]
        generation: u64,
    }

    #[test]
    fn what_is_beyond_the_end_is_no_counter() {
        let read =
            |name: &str, value: u64| serde_json::from_str::<Stored>(&format!("{{\"{name}\": {value}}}"));
        assert_eq!(read("epoch", EPOCH_MAX).unwrap().epoch, EPOCH_MAX);
        assert_eq!(
            read("generation", GENERATION_MAX).unwrap().generation,
            GENERATION_MAX
        );
        for wrong in [EPOCH_MAX + 1, u64::MAX] {
            assert!(read("epoch", wrong).is_err());
        }
        for wrong in [GENERATION_MAX + 1, u64::MAX] {
            assert!(read("generation", wrong).is_err());
        }
    }
}
