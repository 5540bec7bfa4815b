//! A limit to the rate of a copy.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Control;

/// How often a waiting thread looks whether the copy was stopped.
const LOOK: Duration = Duration::from_millis(50);

/// Lets so many bytes a second through, over all threads.
#[derive(Debug)]
pub struct Pace {
    bytes_a_second: u64,
    next: Mutex<Instant>,
}

impl Pace {
    /// At most `bytes_a_second`, at least 1.
    pub fn new(bytes_a_second: u64) -> Self {
        Self {
            bytes_a_second: bytes_a_second.max(1),
            next: Mutex::new(Instant::now()),
        }
    }

    /// Waits until `len_bytes` more may pass, or until the copy is stopped.
    pub(super) fn wait(&self, len_bytes: u64, control: &Control) {
        let mine = {
            let mut next = self.next.lock();
            let mine = (*next).max(Instant::now());
            *next = mine + Duration::from_secs_f64(len_bytes as f64 / self.bytes_a_second as f64);
            mine
        };
        loop {
            let left = mine.saturating_duration_since(Instant::now());
            if left.is_zero() || control.is_stopped() {
                return;
            }
            std::thread::sleep(left.min(LOOK));
        }
    }
}
