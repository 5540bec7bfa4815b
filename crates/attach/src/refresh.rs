//! Having a relay look whether its export has grown.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::attach::must_be_root;
use crate::error::AttachError;
use crate::state::{Attached, DIR, Directory};

/// What is under way may take the server its `io_timeout`.
const LOOK_MAX: Duration = Duration::from_secs(120);
const LOOK_POLL: Duration = Duration::from_millis(20);

/// Has the relay of a device, named by itself, its name or its URI, ask its server for the export's size again, and waits until the device
/// has it. Gives what was before and what is.
pub fn refresh(what: &str) -> Result<(Attached, Attached), AttachError> {
    must_be_root()?;
    let dir = Directory::open(DIR)?;
    let unknown = || AttachError::NotAttached(what.to_owned());
    let before = dir.find(what).ok_or_else(unknown)?;
    if !before.is_alive() {
        return Err(not_grown(&before, "its relay is gone: detach it"));
    }
    let now = look(&dir, &before, || tell(&dir, &before), LOOK_MAX)?;
    Ok((before, now))
}

/// Sends the relay its signal.
fn tell(dir: &Directory, attached: &Attached) -> io::Result<()> {
    let pid = Pid::from_raw(attached.pid as i32).ok_or(io::ErrorKind::NotFound)?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    // Asked once this holds the process: a number alone may be another one's by now.
    if !dir.has_relay(attached) {
        return Err(io::ErrorKind::NotFound.into());
    }
    pidfd_send_signal(&process, Signal::HUP).map_err(Into::into)
}

/// Tells the relay, and waits until it has looked and the device has the size of then.
fn look(
    dir: &Directory,
    before: &Attached,
    tell: impl FnOnce() -> io::Result<()>,
    wait: Duration,
) -> Result<Attached, AttachError> {
    if before.size.is_none() {
        let why = "its relay is of an earlier release: detach it, and attach it anew";
        return Err(not_grown(before, why));
    }
    tell().map_err(|error| not_grown(before, &format!("its relay cannot be told: {error}")))?;
    let until = Instant::now() + wait;
    loop {
        let now = dir
            .find(&before.device)
            .filter(|now| now.has_relay && now.lock == before.lock)
            .ok_or_else(|| not_grown(before, "its relay has ended"))?;
        if now.looks > before.looks && now.lost.is_none() {
            if let Some(why) = &now.not_grown {
                return Err(not_grown(before, why));
            }
            if now.size >= now.export_size {
                return Ok(now);
            }
        }
        if Instant::now() >= until {
            let why = now.lost.map_or_else(
                || "the server or the kernel has not answered yet".to_owned(),
                |why| format!("its server is away ({why})"),
            );
            let why = format!("{why}; the device still grows once there is an answer");
            return Err(not_grown(before, &why));
        }
        thread::sleep(LOOK_POLL);
    }
}

fn not_grown(attached: &Attached, why: &str) -> AttachError {
    AttachError::Look {
        device: attached.device.clone(),
        why: why.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn attached(lock: &str) -> Attached {
        Attached {
            device: "/dev/nbd0".to_owned(),
            uri: "nbd://h".to_owned(),
            lock: lock.to_owned(),
            pid: std::process::id(),
            size: Some(512),
            export_size: Some(512),
            looks: 4,
            ..Attached::default()
        }
    }

    /// What a relay makes of being told, and what is said of that.
    fn said(after: impl Fn(&mut Attached), wait: Duration) -> Result<Attached, String> {
        let root = tempfile::tempdir().unwrap();
        let dir = Directory::open(root.path()).unwrap();
        let (name, _lock) = dir.relay_lock().unwrap();
        let before = attached(&name);
        dir.write(&before).unwrap();
        let tell = || {
            let mut now = before.clone();
            after(&mut now);
            dir.write(&now).map_err(io::Error::other)
        };
        look(&dir, &before, tell, wait).map_err(|error| error.to_string())
    }

    #[test]
    fn a_device_is_waited_for_that_has_the_size_of_a_later_look() {
        let now = said(
            |now| (now.looks, now.size, now.export_size) = (5, Some(1024), Some(1024)),
            LIMIT,
        );
        assert_eq!(now.unwrap().size, Some(1024));
        // Not larger: nothing to wait for.
        assert_eq!(said(|now| now.looks = 5, LIMIT).unwrap().size, Some(512));
        // No look since, a link that was lost again, a device that has not grown yet.
        let none = Duration::ZERO;
        let away = |now: &mut Attached| (now.looks, now.lost) = (5, Some("killed".to_owned()));
        assert!(said(|_| {}, none).unwrap_err().contains("has not answered"));
        assert!(said(away, none).unwrap_err().contains("away (killed)"));
        let smaller = |now: &mut Attached| (now.looks, now.export_size) = (5, Some(1024));
        assert!(said(smaller, none).unwrap_err().contains("has not answered"));
    }

    #[test]
    fn what_hinders_it_is_said() {
        let refused = |now: &mut Attached| {
            smaller(now);
            now.not_grown = Some("no".to_owned());
        };
        fn smaller(now: &mut Attached) {
            (now.looks, now.export_size) = (5, Some(1024));
        }
        let why = said(refused, LIMIT).unwrap_err();
        assert!(why.contains("/dev/nbd0") && why.ends_with(": no"), "{why}");
        let why = said(|now| now.lock = "relay-of-another".to_owned(), LIMIT).unwrap_err();
        assert!(why.contains("its relay has ended"), "{why}");
        let root = tempfile::tempdir().unwrap();
        let dir = Directory::open(root.path()).unwrap();
        let older = Attached {
            size: None,
            ..attached("relay")
        };
        let told = look(&dir, &older, || panic!("it would not understand"), LIMIT);
        assert!(told.unwrap_err().to_string().contains("earlier release"));
    }
}
