//! How long a writer is slowed as the write buffer fills (pure).
//!
//! Below [`Throttle::soft_bytes`] not at all. Above it, each buffered byte costs a growing share of the time the
//! store takes to drain one, reaching the whole of it half-way up and twice it at the top, so that the inflow meets
//! the drain rate before the buffer is full: a slope instead of a cliff.

use std::time::Duration;

/// The longest a single write is slowed while the buffer has room.
const DELAY_MAX: Duration = Duration::from_millis(40);
/// Assumed until a publish has been measured.
const DRAIN_BYTES_PER_S_START: f64 = 100e6;
/// Weight of the newest publish in the drain rate.
const DRAIN_WEIGHT: f64 = 0.3;

/// Back-pressure of one volume.
#[derive(Debug, Clone)]
pub struct Throttle {
    capacity_bytes: u64,
    drain_bytes_per_s: f64,
}

impl Throttle {
    /// For a write buffer of `capacity_bytes`.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            drain_bytes_per_s: DRAIN_BYTES_PER_S_START,
        }
    }

    /// The fill at which slowing begins, in bytes.
    pub fn soft_bytes(&self) -> u64 {
        self.capacity_bytes / 4 * 3
    }

    /// Takes the speed of a publish into account.
    pub fn published(&mut self, bytes: u64, took: Duration) {
        // Small publishes are round trips, not bandwidth.
        if bytes >= 1 << 20 && !took.is_zero() {
            let rate = bytes as f64 / took.as_secs_f64();
            self.drain_bytes_per_s += DRAIN_WEIGHT * (rate - self.drain_bytes_per_s);
        }
    }

    /// How long the writers as a whole are to be slowed for `added_bytes` at a fill of `buffered_bytes`.
    pub fn delay(&self, added_bytes: u64, buffered_bytes: u64) -> Duration {
        let soft = self.soft_bytes();
        if buffered_bytes <= soft || added_bytes == 0 {
            return Duration::ZERO;
        }
        let slope = (buffered_bytes - soft) as f64 / (self.capacity_bytes - soft).max(1) as f64;
        let seconds = added_bytes as f64 / self.drain_bytes_per_s.max(1e6) * 2.0 * slope.min(1.0);
        Duration::from_secs_f64(seconds).min(DELAY_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slope_is_continuous_and_bounded() {
        let t = Throttle::new(512 << 20);
        let mut last = Duration::ZERO;
        for fill in (0..=512u64).map(|m| m << 20) {
            let d = t.delay(1 << 20, fill);
            assert!(d >= last && d <= DELAY_MAX, "fill {fill}: {last:?} then {d:?}");
            assert!(
                d - last < Duration::from_millis(2),
                "no cliff at {fill}: {last:?} then {d:?}"
            );
            last = d;
        }
        assert_eq!(t.delay(1 << 20, t.soft_bytes()), Duration::ZERO);
        assert!(last > Duration::ZERO);
    }

    #[test]
    fn inflow_meets_the_drain_half_way_up() {
        let mut t = Throttle::new(1 << 30);
        for _ in 0..50 {
            t.published(200_000_000, Duration::from_secs(1));
        }
        let half_way = (t.soft_bytes() + (1 << 30)) / 2;
        let d = t.delay(200_000, half_way);
        assert!((d.as_secs_f64() - 0.001).abs() < 1e-4, "{d:?}");
    }
}
