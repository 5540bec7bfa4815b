//! The contents of the lease: the object `<root>.meta/lease`, as JSON. Pure.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::growth::{self, GrowthRequest};
use super::host;
use super::state::Liveness;
use crate::base::stored_text;
use crate::base::volume_id::VolumeId;

/// The process that holds a lease, described so that another process on the same machine can find out whether it still
/// runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Name of its machine.
    #[serde(deserialize_with = "stored_text::printable")]
    pub host: String,
    /// Id of the machine's boot, as the kernel names it; empty when it is not known.
    #[serde(deserialize_with = "stored_text::printable")]
    pub boot_id: String,
    /// The process namespace to which [`Self::pid`] belongs; empty when it is not known.
    #[serde(deserialize_with = "stored_text::printable")]
    pub pid_namespace: String,
    /// Its process number in that namespace.
    pub pid: u32,
    /// When the process began, in clock ticks since the boot. That distinguishes it from a later process with the same
    /// number.
    pub started_ticks: u64,
    /// The program's name, for people.
    #[serde(deserialize_with = "stored_text::printable")]
    pub program: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {}) on {}", self.program, self.pid, self.host)
    }
}

/// Whether a lease is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseState {
    /// The holder may be writing.
    Held,
    /// The holder closed the volume. None of its requests to the container is in flight any more.
    Released,
    /// The holder ended without knowing whether its last requests arrived. Some may still be in flight.
    Abandoned,
}

/// The stored lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// Whether it is in force.
    pub state: LeaseState,
    /// The owner's epoch, which is higher than that of every earlier owner.
    #[serde(deserialize_with = "crate::base::counters::epoch")]
    pub epoch: u64,
    /// A random token, new each time the lease is taken. It says whose lease it is.
    #[serde(deserialize_with = "stored_text::printable")]
    pub token: String,
    /// Counts the renewals, so that each one changes the object.
    pub renewals: u64,
    /// How long the lease must be seen unchanged before another owner may take it, in milliseconds.
    pub duration_ms: u64,
    /// The id of the volume, as the holder knows it.
    pub volume_id: VolumeId,
    /// Who holds it.
    pub holder: Holder,
    /// When the lease was taken, in milliseconds since 1970-01-01 UTC, by the holder's clock. It is for people; no
    /// decision depends on it.
    pub taken_ms: u64,
    /// Directory of the holder's buffer file, on the holder's machine. It is for people, and for a warning.
    #[serde(
        default,
        deserialize_with = "stored_text::printable_option",
        skip_serializing_if = "Option::is_none"
    )]
    pub write_buffer_dir: Option<String>,
    /// Path of the socket on which it is told what to do, on its machine.
    #[serde(
        default,
        deserialize_with = "stored_text::printable_option",
        skip_serializing_if = "Option::is_none"
    )]
    pub control: Option<String>,
    /// An earlier owner may still run, and not know yet that it is none any more. Once so, it stays so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub older_may_run: bool,
    /// The request that its holder grows the volume, and what became of it. Releases that do not know it drop it with their next renewal.
    #[serde(
        default,
        deserialize_with = "growth::readable",
        skip_serializing_if = "Option::is_none"
    )]
    pub growth: Option<GrowthRequest>,
}

/// The longest duration that a server may be configured with, because others may have to wait that long for the lease.
pub(super) const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);

impl LeaseRecord {
    /// Decodes a lease.
    ///
    /// # Errors
    /// A text that says what is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        let record: Self = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        match record.duration_ms <= DURATION_MAX.as_millis() as u64 {
            true => Ok(record),
            false => Err(format!("it runs for {} ms", record.duration_ms)),
        }
    }

    /// The directory with the buffer file of a holder on this machine, in whichever container, that did not end cleanly. The file
    /// holds the changes that were answered and not published.
    pub fn left_buffer(&self) -> Option<&str> {
        let is_left = self.state != LeaseState::Released && self.holder.is_of_this_boot();
        self.write_buffer_dir.as_deref().filter(|_| is_left)
    }

    /// The socket on which its holder is told what to do, if that is a server of this machine.
    pub fn control_here(&self) -> Option<&str> {
        let is_here = self.is_held() && self.holder.is_on_this_machine();
        self.control.as_deref().filter(|_| is_here)
    }

    /// Whether it is in force.
    pub fn is_held(&self) -> bool {
        self.state == LeaseState::Held
    }

    /// Whether the process that holds it is known to have ended without giving it back: it ran on this machine, and was killed.
    pub fn is_of_killed(&self) -> bool {
        self.is_held() && host::liveness(self, &host::this_process()) == Liveness::Ended
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

    #[test]
    fn a_buffer_that_was_left_in_another_container_is_known() {
        let mut left = record("token", 1);
        left.write_buffer_dir = Some("/run/buffer".into());
        left.holder = super::super::host::this_process();
        left.holder.host = "another".into();
        left.holder.pid_namespace = "pid:[1]".into();
        assert_eq!(left.left_buffer(), Some("/run/buffer"));
        left.holder.boot_id = "an earlier one".into();
        assert_eq!(left.left_buffer(), None);
        left.holder.boot_id = String::new();
        assert_eq!(left.left_buffer(), None);
    }

    #[test]
    fn a_record_that_names_no_volume_is_none() {
        let good = serde_json::to_string(&record("token", 1)).unwrap();
        assert_eq!(
            serde_json::from_str::<LeaseRecord>(&good).unwrap(),
            record("token", 1)
        );
        let id = record("token", 1).volume_id.to_string();
        for wrong in ["", "../x", "/etc"] {
            let text = good.replace(&id, wrong);
            assert!(serde_json::from_str::<LeaseRecord>(&text).is_err(), "{wrong:?}");
        }
    }
}
