//! Taking a device away, and saying which there are.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::attach::{driver, must_be_root};
use crate::device;
use crate::error::{AttachError, at};
use crate::flush;
use crate::state::{Attached, DIR, Directory};

const RELAY_END_MAX: Duration = Duration::from_secs(5);
const RELAY_END_POLL: Duration = Duration::from_millis(20);

/// What is attached on this machine.
pub fn attached() -> Result<Vec<Attached>, AttachError> {
    match fs::read_dir(DIR) {
        Ok(_) => Ok(Directory::open(DIR)?.list()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(at(DIR)(error)),
    }
}

/// Detaches a device, named by itself, its name or its URI; gives the device. What is written to it is flushed before; a server that
/// answers nothing for `silence_max` meanwhile is an error. With `force` the device is taken away from whoever uses it, flushed or not.
pub fn detach(what: &str, force: bool, silence_max: Duration) -> Result<String, AttachError> {
    must_be_root()?;
    let dir = Directory::open(DIR)?;
    let mut found = dir.find(what);
    let device = found.as_ref().map_or(what, |found| &found.device);
    let unknown = || AttachError::NotAttached(what.to_owned());
    let index = device::index(device).map_err(|_| unknown())?;
    let maker = device::maker(index);
    // A relay that was killed leaves its file, and the device may be somebody else's by now.
    if let Some(dead) = found.take_if(|found| !found.is_made(maker)) {
        dir.remove(&dead);
        if maker.is_none() || device::index(what).is_err() {
            device::announce(index);
            return Ok(dead.device);
        }
    }
    if !device::is_connected(index) {
        return Err(unknown());
    }
    // Held until the device is gone, so that nobody mounts it in between.
    let mut claimed = None;
    // Without its relay it fails every request anyway.
    let is_dead = found.as_ref().is_some_and(|found| !found.has_relay);
    if !force && !is_dead {
        let mut claim = flush::claim(index, silence_max)?;
        if let Some(why) = found.as_ref().and_then(|found| found.lost.clone()) {
            return Err(AttachError::LinkLost {
                device: device::path(index),
                why,
            });
        }
        claim.flush()?;
        claimed = Some(claim);
    }
    driver()?.disconnect(index).map_err(|error| AttachError::Kernel {
        what: format!("detach {}", device::path(index)),
        why: match error.kind() {
            io::ErrorKind::InvalidInput => "it was not attached by netlink; use 'nbd-client -d'".to_owned(),
            _ => error.to_string(),
        },
    })?;
    drop(claimed);
    if !device::settle(index, false) {
        log::warn!(
            "{} is still held open by somebody, and goes when they close it",
            device::path(index)
        );
    }
    // The relay ends with its device, and takes its file away.
    if let Some(found) = found {
        let until = Instant::now() + RELAY_END_MAX;
        while dir.has_relay(&found) && Instant::now() < until {
            thread::sleep(RELAY_END_POLL);
        }
        if !is_dead && dir.has_relay(&found) {
            return Err(AttachError::Kernel {
                what: format!("end the relay of {}", found.device),
                why: format!(
                    "process {} goes on, and may still send the server what the device was given: end it (kill -9 {0}) before the \
                     volume is used elsewhere",
                    found.pid
                ),
            });
        }
        dir.remove(&found);
        if is_dead {
            device::announce(index);
        }
    }
    Ok(device::path(index))
}
