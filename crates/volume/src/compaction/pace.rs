//! How fast to copy, and when to look again. Pure: what is owed and the time, in; waits, out.

use std::time::{Duration, Instant};

use crate::retention::Debt;

/// Bytes a second where there is hardly anything to do, and what each percent of urgency adds.
const LEAST_RATE: u64 = 8 << 20;
const RATE_PER_PERCENT: u64 = 1 << 20;
/// Bytes that are published at least before the next look: it lists every object.
const LOOK_BYTES: u64 = 64 << 20;

/// How many bytes a second are to be copied for this debt; `None` is as fast as the store takes it. `cap_rate` bounds it, 0 is no bound.
pub(super) fn rate(debt: &Debt, cap_rate: u64) -> Option<u64> {
    let by_debt = match debt.urgency_percent() {
        percent @ 0..100 => Some(LEAST_RATE + percent * RATE_PER_PERCENT),
        _ => None,
    };
    match (by_debt, cap_rate) {
        (rate, 0) => rate,
        (None, cap) => Some(cap),
        (Some(rate), cap) => Some(rate.min(cap)),
    }
}

/// Bytes to be published before the next look, after one that found this debt and nothing to do.
pub(super) fn look_after(debt: &Debt) -> u64 {
    // Each byte that is published makes one of another object dead, at most.
    let slack = debt.slack_bytes();
    LOOK_BYTES.max(slack / 2)
}

/// Lets so many bytes a second through.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    rate: Option<u64>,
    free_at: Option<Instant>,
}

impl Pace {
    /// So many bytes a second; `None` is without a bound.
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate, free_at: None }
    }

    /// How long to wait at `now` before this many bytes are copied.
    pub fn wait(&mut self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.rate else {
            return Duration::ZERO;
        };
        let begin = self.free_at.map_or(now, |at| at.max(now));
        // What was not used before is not made up for.
        self.free_at = Some(begin + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64));
        begin.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn debt(stored_mib: u64) -> Debt {
        Debt {
            stored_bytes: stored_mib * MIB,
            live_bytes: 1000 * MIB,
            history_bytes: 0,
        }
    }

    #[test]
    fn the_rate_follows_the_debt_and_stays_below_the_cap() {
        assert_eq!(rate(&debt(1443), 0), Some(LEAST_RATE));
        let half = rate(&debt(1499), 0).unwrap();
        assert!((50..60).contains(&(half / MIB)), "{half}");
        assert_eq!(rate(&debt(1557), 0), None);
        assert_eq!(rate(&debt(1557), 5), Some(5));
        assert_eq!(rate(&debt(1499), 5), Some(5));
        assert_eq!(rate(&debt(1443), u64::MAX), Some(LEAST_RATE));
    }

    #[test]
    fn looks_are_as_far_apart_as_nothing_can_come_of_them() {
        assert_eq!(look_after(&debt(1442)), LOOK_BYTES);
        assert_eq!(look_after(&debt(1000)), 442 * MIB / 2);
        assert_eq!(look_after(&debt(3000)), LOOK_BYTES);
    }

    #[test]
    fn bytes_are_let_through_at_the_rate() {
        let start = Instant::now();
        let mut pace = Pace::new(Some(1000));
        assert_eq!(pace.wait(500, start), Duration::ZERO);
        assert_eq!(pace.wait(1000, start), Duration::from_millis(500));
        let later = start + Duration::from_secs(1);
        assert_eq!(pace.wait(100, later), Duration::from_millis(500));
        // A pause is not made up for.
        let after = start + Duration::from_secs(100);
        assert_eq!(pace.wait(1000, after), Duration::ZERO);
        assert_eq!(pace.wait(1, after), Duration::from_secs(1));
        assert_eq!(Pace::new(None).wait(u64::MAX, start), Duration::ZERO);
    }
}
