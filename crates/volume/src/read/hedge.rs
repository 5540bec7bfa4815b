//! Hedging: when a slow request is sent a second time (pure: no clock, no I/O).
//!
//! A second request is sent once the first has taken longer than the 95th percentile of recent requests. That cuts off
//! the long tail of a store's latency for a few percent more requests. See J. Dean and L. A. Barroso, "The Tail at
//! Scale", CACM 56(2), 2013.

use std::time::Duration;

/// Number of requests whose times are remembered.
const SAMPLES: usize = 256;
/// Number of requests after which the percentile is computed again.
const RENEWED_EVERY: usize = 32;
/// Second requests that each first request allows: 5 %.
const EARNED: f64 = 0.05;
/// The most second requests that may be saved up.
const SAVED_MAX: f64 = 8.0;
/// The shortest wait before a second request. A faster answer means that the store is not the cause of a delay.
const WAIT_LEAST: Duration = Duration::from_millis(5);

/// Records how long requests take, and decides on second requests.
#[derive(Debug, Default)]
pub struct Hedge {
    samples: Vec<Duration>,
    next: usize,
    since_renewed: usize,
    wait: Option<Duration>,
    saved: f64,
}

impl Hedge {
    /// Notes that a request begins. Returns how long to wait before a second one, or `None` when none is to be sent.
    pub fn begin(&mut self) -> Option<Duration> {
        self.saved = (self.saved + EARNED).min(SAVED_MAX);
        self.wait
    }

    /// Whether a second request may be sent now. If so, it is counted.
    pub fn take(&mut self) -> bool {
        let has_saved = self.saved >= 1.0;
        if has_saved {
            self.saved -= 1.0;
        }
        has_saved
    }

    /// Notes that a first request was answered.
    pub fn ended(&mut self, took: Duration) {
        if self.samples.len() < SAMPLES {
            self.samples.push(took);
        } else {
            self.samples[self.next % SAMPLES] = took;
        }
        self.next = (self.next + 1) % SAMPLES;
        self.since_renewed += 1;
        if self.since_renewed >= RENEWED_EVERY {
            self.since_renewed = 0;
            let mut sorted = self.samples.clone();
            sorted.sort_unstable();
            self.wait = Some(sorted[sorted.len() * 95 / 100].max(WAIT_LEAST));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_the_95th_percentile_and_asks_at_most_one_in_twenty_again() {
        let mut hedge = Hedge::default();
        assert_eq!(hedge.begin(), None, "nothing is known yet");
        for i in 0..200 {
            hedge.ended(Duration::from_millis(if i % 25 == 0 { 900 } else { 20 }));
        }
        assert_eq!(hedge.begin(), Some(Duration::from_millis(20)));
        let mut second = 0;
        for _ in 0..10_000 {
            hedge.begin();
            second += usize::from(hedge.take());
        }
        assert!((490..=510).contains(&second), "{second} of 10000");
    }

    #[test]
    fn a_store_that_becomes_slow_is_not_asked_twice_for_long() {
        let mut hedge = Hedge::default();
        for _ in 0..SAMPLES {
            hedge.ended(Duration::from_millis(20));
        }
        for _ in 0..SAMPLES {
            hedge.ended(Duration::from_millis(300));
        }
        assert_eq!(hedge.begin(), Some(Duration::from_millis(300)));
    }
}
