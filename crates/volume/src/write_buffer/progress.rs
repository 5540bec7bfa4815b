//! When the publish of a generation last made progress. That tells a slow publish from one that has stopped.

use parking_lot::Mutex;
use tokio::time::Instant;

/// The progress of one generation's publish. An attempt that only repeats the steps of an earlier attempt makes no
/// progress. So a publish that always fails at the same step reaches its deadline.
#[derive(Debug, Default)]
pub struct Progress(Mutex<Furthest>);

#[derive(Debug, Default)]
struct Furthest {
    steps: u64,
    at: Option<Instant>,
}

impl Progress {
    /// Notes that an attempt has done `steps` of its work: bytes read for the upload, or index entries looked at. Every
    /// attempt for one generation takes the same steps.
    pub fn reached(&self, steps: u64) {
        let mut furthest = self.0.lock();
        if steps > furthest.steps {
            *furthest = Furthest {
                steps,
                at: Some(Instant::now()),
            };
        }
    }

    /// Notes that something was done that no later attempt has to repeat.
    pub fn advanced(&self) {
        self.0.lock().at = Some(Instant::now());
    }

    /// The time of the last progress; `None` before the first step.
    pub fn last(&self) -> Option<Instant> {
        self.0.lock().at
    }
}

#[cfg(test)]
#[path = "progress_tests.rs"]
mod tests;
