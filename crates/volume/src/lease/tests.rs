//! The lease over a store in a directory: several takers in one process.

use super::record::{Holder, LeaseRecord, LeaseState};
use crate::base::volume_id::VolumeId;

/// A lease of a process on another machine.
pub fn record(token: &str, epoch: u64) -> LeaseRecord {
    LeaseRecord {
        state: LeaseState::Held,
        epoch,
        token: token.into(),
        renewals: 0,
        duration_ms: 300,
        volume_id: VolumeId::from_uuid(uuid::Uuid::from_u128(1)),
        holder: Holder {
            host: "elsewhere".into(),
            boot_id: "boot".into(),
            pid_namespace: "pid:[1]".into(),
            pid: 7,
            started_ticks: 1,
            program: "nbdkit".into(),
        },
        taken_ms: 0,
        write_buffer_dir: None,
        control: None,
        older_may_run: false,
        growth: None,
    }
}
