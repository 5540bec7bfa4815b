//! How the lease of a volume is taken.

use std::time::Duration;

use crate::lease::sighting::Sighting;

/// How the lease of a volume is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseOptions {
    /// How long it must be seen unchanged before another server may take it; it is renewed three times as often.
    pub duration: Duration,
    /// Take it at once, whoever holds it.
    pub takeover: bool,
    /// What [`crate::admin::check_servable`] saw: spares the open the look, and watching the lease once more.
    pub sighting: Option<Sighting>,
    /// The lease that is found may be that of the volume which this one is a copy of: its holder says nothing of this
    /// volume, and only whether it is renewed does.
    pub is_copied: bool,
    /// Its epoch is above this one: the newest that a log tells of which an earlier lease of this volume was used with.
    pub epoch_above: u64,
    /// What it says of the directory of the write buffer's file.
    pub write_buffer_dir: Option<String>,
    /// What it says of the socket on which its holder is told what to do.
    pub control: Option<String>,
    /// Its token, where somebody must know that before it is taken. Never one that was used before.
    pub token: Option<String>,
}

impl Default for LeaseOptions {
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(30),
            takeover: false,
            sighting: None,
            is_copied: false,
            epoch_above: 0,
            write_buffer_dir: None,
            control: None,
            token: None,
        }
    }
}
