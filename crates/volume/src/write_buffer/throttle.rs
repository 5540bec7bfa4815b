//! How long a writer is slowed as the write buffer fills (pure).
//!
//! Room comes back only when a publish ends. So the remaining room is spread over the time until then, which slows
//! writers gradually instead of stopping them at once. Below [`BufferPolicy::soft_bytes`] no write is slowed. As long as an
//! eighth of the buffer is free, no single write is slowed by more than [`DELAY_MAX`]. Above that a writer may have to
//! wait as long as the publish takes, but all writers wait alike instead of one waiting for the whole publish.

use std::time::Duration;

use super::policy::BufferPolicy;

/// The longest a write is slowed while an eighth of the buffer is free.
pub const DELAY_MAX: Duration = Duration::from_millis(40);
/// The drain rate that is assumed until a publish has been measured.
const DRAIN_BYTES_PER_S_START: f64 = 100e6;
/// Weight of the newest publish in the drain rate.
const DRAIN_WEIGHT: f64 = 0.3;

/// Back-pressure of one volume.
#[derive(Debug, Clone)]
pub struct Throttle {
    policy: BufferPolicy,
    drain_bytes_per_s: f64,
}

impl Throttle {
    /// For a write buffer with these thresholds.
    pub fn new(policy: BufferPolicy) -> Self {
        Self {
            policy,
            drain_bytes_per_s: DRAIN_BYTES_PER_S_START,
        }
    }

    /// How long a publish of `bytes` is expected to take.
    pub fn publish_estimate(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / self.drain_bytes_per_s)
    }

    /// Updates the drain rate with the speed of a publish.
    pub fn published(&mut self, bytes: u64, took: Duration) {
        // The time of a small publish is round trips and says nothing about bandwidth.
        if bytes >= 1 << 20 && !took.is_zero() {
            let rate = (bytes as f64 / took.as_secs_f64()).max(1e6);
            self.drain_bytes_per_s += DRAIN_WEIGHT * (rate - self.drain_bytes_per_s);
        }
    }

    /// How long all writers together are to be slowed for `added_bytes` at a fill of `buffered_bytes`, when room is
    /// expected back in `room_in`.
    pub fn delay(&self, added_bytes: u64, buffered_bytes: u64, room_in: Duration) -> Duration {
        if buffered_bytes <= self.policy.soft_bytes() || added_bytes == 0 {
            return Duration::ZERO;
        }
        let room = self
            .policy
            .capacity_bytes()
            .saturating_sub(buffered_bytes)
            .max(added_bytes);
        room_in.mul_f64(added_bytes as f64 / room as f64 * self.policy.delay_share(buffered_bytes))
    }

    /// The longest one writer is slowed at this fill.
    pub fn longest_wait(&self, buffered_bytes: u64, room_in: Duration) -> Duration {
        if self.policy.is_scarce(buffered_bytes) {
            room_in.max(DELAY_MAX)
        } else {
            DELAY_MAX
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM_IN: Duration = Duration::from_secs(1);

    #[test]
    fn nobody_is_slowed_below_the_mark_and_more_and_more_above_it() {
        let t = Throttle::new(BufferPolicy::new(512 << 20));
        assert_eq!(t.delay(1 << 20, t.policy.soft_bytes(), ROOM_IN), Duration::ZERO);
        let mut last = Duration::ZERO;
        for fill in (0..512u64).map(|m| m << 20) {
            let d = t.delay(4096, fill, ROOM_IN);
            assert!(d >= last, "fill {fill}: {last:?} then {d:?}");
            last = d;
        }
        assert!(last > Duration::ZERO);
    }

    #[test]
    fn the_room_lasts_until_more_of_it_is_expected() {
        let t = Throttle::new(BufferPolicy::new(512 << 20));
        let (mut fill, mut now) = (384u64 << 20, Duration::ZERO);
        while now < ROOM_IN && fill < 512 << 20 {
            now += t.delay(1 << 20, fill, ROOM_IN - now);
            fill += 1 << 20;
        }
        assert!(fill >= 511 << 20, "the room was used: {fill}");
        assert!(now >= ROOM_IN.mul_f64(0.95), "and lasted: {now:?}");
    }

    #[test]
    fn a_write_waits_briefly_while_there_is_room() {
        let t = Throttle::new(BufferPolicy::new(512 << 20));
        assert_eq!(t.longest_wait(448 << 20, Duration::from_secs(9)), DELAY_MAX);
        assert_eq!(
            t.longest_wait(500 << 20, Duration::from_secs(9)),
            Duration::from_secs(9)
        );
    }

    #[test]
    fn the_drain_rate_follows_the_publishes() {
        let mut t = Throttle::new(BufferPolicy::new(1 << 30));
        for _ in 0..50 {
            t.published(200_000_000, Duration::from_secs(1));
        }
        assert!((t.publish_estimate(100_000_000).as_secs_f64() - 0.5).abs() < 0.01);
    }
}
