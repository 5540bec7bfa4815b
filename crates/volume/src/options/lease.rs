//! How the lease of a volume is taken.

use std::time::Duration;

use crate::store::ETag;

/// How the lease of a volume is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseOptions {
    /// How long it must be seen unchanged before another server may take it; it is renewed three times as often.
    pub duration: Duration,
    /// Take it at once, whoever holds it.
    pub takeover: bool,
    /// A lease that was watched for its whole duration before, see [`crate::lease::probe`].
    pub known_expired: Option<ETag>,
}

impl Default for LeaseOptions {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(30),
            takeover: false,
            known_expired: None,
        }
    }
}
