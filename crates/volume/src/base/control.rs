//! How far a long piece of work is, and the word to stop it: shared with whoever watches it.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing yet, or nothing that takes long.
    Preparing,
    /// Data is copied.
    Copying,
    /// What was copied is read again.
    Verifying,
    /// What is stored is read and compared with its check values.
    Checking,
}

/// Watches and stops one piece of work that copies or checks, from any thread.
#[derive(Debug, Default)]
pub struct Control {
    is_stopped: AtomicBool,
    phase: AtomicU8,
    total_bytes: AtomicU64,
    settled_bytes: AtomicU64,
    data_bytes: AtomicU64,
}

impl Control {
    /// Asks it to stop as soon as it can.
    pub fn stop(&self) {
        self.is_stopped.store(true, Ordering::Release);
    }

    /// Whether it was asked to stop.
    pub fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Acquire)
    }

    /// What is being done.
    pub fn phase(&self) -> Phase {
        match self.phase.load(Ordering::Acquire) {
            1 => Phase::Copying,
            2 => Phase::Verifying,
            3 => Phase::Checking,
            _ => Phase::Preparing,
        }
    }

    /// The size of what is copied, verified or checked, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes.load(Ordering::Acquire)
    }

    /// How much of it is done, in bytes: everything before this offset.
    pub fn settled_bytes(&self) -> u64 {
        self.settled_bytes.load(Ordering::Acquire)
    }

    /// How much data was read for that, in bytes.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes.load(Ordering::Acquire)
    }

    pub(crate) fn begin(&self, phase: Phase, total_bytes: u64) {
        self.settled_bytes.store(0, Ordering::Release);
        self.data_bytes.store(0, Ordering::Release);
        self.total_bytes.store(total_bytes, Ordering::Release);
        let phase = match phase {
            Phase::Preparing => 0,
            Phase::Copying => 1,
            Phase::Verifying => 2,
            Phase::Checking => 3,
        };
        self.phase.store(phase, Ordering::Release);
    }

    pub(crate) fn settle(&self, until_bytes: u64) {
        self.settled_bytes.store(until_bytes, Ordering::Release);
    }

    pub(crate) fn add_data(&self, bytes: u64) {
        self.data_bytes.fetch_add(bytes, Ordering::AcqRel);
    }
}
