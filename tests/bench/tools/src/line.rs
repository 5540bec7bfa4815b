//! A network line as arithmetic: bytes queue for a line of fixed rate, then travel for a fixed delay.

use std::time::{Duration, Instant};

/// One line shared by everything that crosses it, whatever the connection and the direction.
///
/// The line sends one piece after another at its rate; the delay comes on top and does not occupy the line, so
/// any number of pieces can be under way at once.
#[derive(Debug)]
pub struct Line {
    delay: Duration,
    bytes_per_s: Option<u64>,
    free_at: Instant,
}

/// When a piece handed to the line has been sent and when it arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passage {
    /// The line has sent the last byte and is free again.
    pub sent_at: Instant,
    /// The last byte reaches the other end.
    pub due_at: Instant,
}

impl Line {
    /// A line, idle at `now`, that sends `bytes_per_s` (`None`: no limit) and delivers after `delay`.
    ///
    /// A rate of zero counts as one byte per second.
    pub fn new(now: Instant, delay: Duration, bytes_per_s: Option<u64>) -> Line {
        Line {
            delay,
            bytes_per_s: bytes_per_s.map(|rate| rate.max(1)),
            free_at: now,
        }
    }

    /// Hands over `len_bytes` at `now`, behind everything handed over before.
    pub fn send(&mut self, now: Instant, len_bytes: usize) -> Passage {
        let start = self.free_at.max(now);
        let sent_at = match self.bytes_per_s {
            Some(rate) => start + Duration::from_secs_f64(len_bytes as f64 / rate as f64),
            None => start,
        };
        self.free_at = sent_at;
        Passage {
            sent_at,
            due_at: sent_at + self.delay,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_millis(10);

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn without_a_rate_only_the_delay_counts() {
        let t0 = Instant::now();
        let mut line = Line::new(t0, DELAY, None);
        for _ in 0..3 {
            assert_eq!(
                line.send(t0, 1 << 30),
                Passage {
                    sent_at: t0,
                    due_at: t0 + DELAY
                }
            );
        }
    }

    #[test]
    fn pieces_queue_for_the_rate_and_overlap_their_delay() {
        let t0 = Instant::now();
        let mut line = Line::new(t0, DELAY, Some(1_000_000));
        let first = line.send(t0, 5_000);
        let second = line.send(t0, 5_000);
        assert_eq!(first.due_at, t0 + ms(5) + DELAY);
        assert_eq!(second.sent_at, t0 + ms(10));
        assert_eq!(second.due_at, t0 + ms(10) + DELAY);
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let t0 = Instant::now();
        let mut line = Line::new(t0, DELAY, Some(1_000_000));
        line.send(t0, 1_000);
        let later = t0 + ms(500);
        assert_eq!(line.send(later, 1_000).sent_at, later + ms(1));
    }

    #[test]
    fn a_long_run_keeps_the_rate() {
        let t0 = Instant::now();
        let mut line = Line::new(t0, Duration::ZERO, Some(250_000_000));
        let mut last = t0;
        for _ in 0..4_000 {
            last = line.send(t0, 62_500).sent_at;
        }
        let elapsed_s = (last - t0).as_secs_f64();
        assert!((elapsed_s - 1.0).abs() < 1e-3, "250 MB took {elapsed_s} s");
    }
}
