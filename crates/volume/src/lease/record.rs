//! What a lease says: the object `<root>.meta/lease`, as JSON. Pure.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::base::stored_text;
use crate::base::volume_id::VolumeId;

/// The process that holds a lease, told so that another one on the same machine can see whether it still runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Name of its machine.
    #[serde(deserialize_with = "stored_text::printable")]
    pub host: String,
    /// The machine's boot, as the kernel names it; empty where that is not known.
    #[serde(deserialize_with = "stored_text::printable")]
    pub boot_id: String,
    /// The process namespace, in which [`Self::pid`] counts; empty where that is not known.
    #[serde(deserialize_with = "stored_text::printable")]
    pub pid_namespace: String,
    /// Its process number there.
    pub pid: u32,
    /// When the process began, in clock ticks since the boot: tells it from a later one with its number.
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
    /// The holder closed the volume: nothing of it is on its way to the container any more.
    Released,
    /// The holder ended without knowing what of its last requests arrived: some may be on their way still.
    Abandoned,
}

/// A lease as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// Whether it is in force.
    pub state: LeaseState,
    /// Counts the owners of the volume: each one's is higher than every one's before it.
    #[serde(deserialize_with = "crate::base::counters::epoch")]
    pub epoch: u64,
    /// Random, one a taking: tells whose lease it is.
    #[serde(deserialize_with = "stored_text::printable")]
    pub token: String,
    /// Counts the renewals, so that each one changes the object.
    pub renewals: u64,
    /// How long the lease must be seen unchanged before another may take it, in milliseconds.
    pub duration_ms: u64,
    /// The holder's id of the volume.
    pub volume_id: VolumeId,
    /// Who holds it.
    pub holder: Holder,
    /// When it was taken, in milliseconds since 1970-01-01 UTC, by the holder's clock. For people; nothing is decided
    /// by it.
    pub taken_ms: u64,
    /// Directory of its write buffer's file, on its machine. For people, and for a warning.
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
}

/// The longest duration that a server may be given: a lease is waited for so long.
pub(super) const DURATION_MAX: Duration = Duration::from_secs(24 * 3600);

impl LeaseRecord {
    /// Reads a lease.
    ///
    /// # Errors
    /// What is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        let record: Self = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        match record.duration_ms <= DURATION_MAX.as_millis() as u64 {
            true => Ok(record),
            false => Err(format!("it runs for {} ms", record.duration_ms)),
        }
    }

    /// The directory in which a server of this machine that did not end cleanly keeps what it had answered and not published.
    pub fn left_buffer(&self) -> Option<&str> {
        let is_left = self.state != LeaseState::Released && self.holder.is_on_this_machine();
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
}

#[cfg(test)]
mod tests {
    use super::super::tests::record;
    use super::*;

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
