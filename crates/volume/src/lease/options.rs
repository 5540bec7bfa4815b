//! How the lease of a volume is taken.

use std::time::Duration;

use crate::lease::sighting::Sighting;

/// How the lease of a volume is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseOptions {
    /// How long the lease must be seen unchanged before another server may take it. It is renewed every third of this
    /// time.
    pub duration: Duration,
    /// Takes the lease at once, whoever holds it.
    pub takeover: bool,
    /// What [`crate::admin::check_servable`] saw. It spares the open one inspection, and watching the lease a second
    /// time.
    pub sighting: Option<Sighting>,
    /// An opening from the same sighting failed: what the store has by now is looked at first. Of the sighting counts that its lease
    /// had run out.
    pub is_retry: bool,
    /// The stored lease may be a copy of the one of the volume from which this volume was copied. Its holder then says
    /// nothing about this volume; only renewals of the lease do.
    pub is_copied: bool,
    /// The taken lease gets an epoch above this one: the newest epoch that the WAL shows for an earlier lease of this
    /// volume.
    pub epoch_above: u64,
    /// The directory of the buffer file, as the lease is to name it.
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
            is_retry: false,
            is_copied: false,
            epoch_above: 0,
            write_buffer_dir: None,
            control: None,
            token: None,
        }
    }
}
