//! Keeps the relay going when memory is short. Dirty pages of its own device are written through it: if it had to wait for
//! them to get memory, nothing would ever move again.

use std::fs;
use std::process;

use rustix::mm::{MlockAllFlags, mlockall};

/// Best effort, with a line in the log for what is refused. Called before any thread is started: they inherit it.
pub(crate) fn against_its_own_device() {
    // Nothing of it is swapped out, onto its own device perhaps.
    said(
        "stay in memory",
        mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE).map_err(Into::into),
    );
    // The kernel gives it memory without writing dirty pages first, and does not slow it down.
    said(
        "be told apart as one that writes dirty pages",
        rustix::process::configure_io_flusher_behavior(true).map_err(Into::into),
    );
    said(
        "be spared when memory runs out",
        fs::write(format!("/proc/{}/oom_score_adj", process::id()), "-1000"),
    );
}

fn said(what: &str, done: std::io::Result<()>) {
    if let Err(error) = done {
        log::warn!("the relay cannot {what} ({error}): when memory is short, the device may stand still");
    }
}
