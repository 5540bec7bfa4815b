//! The wall clock. Its time is for people, and for when the next scrub is due; nothing that a volume reads as depends on it.

use std::time::{SystemTime, UNIX_EPOCH};

/// The current time, in milliseconds since 1970-01-01 UTC; 0 when the clock is before that.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}
