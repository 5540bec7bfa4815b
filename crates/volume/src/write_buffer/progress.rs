//! When the publish of a generation last got further, so that one that is slow is told from one that stands still.

use parking_lot::Mutex;
use tokio::time::Instant;

/// How far the publish of one generation has come. An attempt that only repeats what one before it did is no progress, so
/// a publish that fails at the same step for ever comes to its deadline.
#[derive(Debug, Default)]
pub struct Progress(Mutex<Furthest>);

#[derive(Debug, Default)]
struct Furthest {
    steps: u64,
    at: Option<Instant>,
}

impl Progress {
    /// An attempt has done `steps` of its work by now: bytes read for the upload, or entries of the index looked at. One
    /// generation takes the same steps at each attempt.
    pub fn reached(&self, steps: u64) {
        let mut furthest = self.0.lock();
        if steps > furthest.steps {
            *furthest = Furthest {
                steps,
                at: Some(Instant::now()),
            };
        }
    }

    /// Something was done that no later attempt has to do again.
    pub fn advanced(&self) {
        self.0.lock().at = Some(Instant::now());
    }

    /// When it got further last; `None` before the first step.
    pub fn last(&self) -> Option<Instant> {
        self.0.lock().at
    }
}

#[cfg(test)]
#[path = "progress_tests.rs"]
mod tests;
