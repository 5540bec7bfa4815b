//! Counters of a volume that are kept on its store: where they end. What is read is bounded here, so that no sum of it with
//! what an owner adds can wrap.

use serde::{Deserialize, Deserializer, de::Error};

/// The largest epoch. Names of objects have ten digits for it, and sort as numbers only while all have as many.
pub(crate) const EPOCH_MAX: u64 = 9_999_999_999;
/// The largest generation that is believed. A volume comes nowhere near it: at a million flushes a second it takes 146
/// thousand years, and a history that is left costs 2^32 of them.
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
