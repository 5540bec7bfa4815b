//! The life of the nbdkit that `hypernbd serve` runs: its start, the signals for it, its restarts, its end.

use std::io::Write;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};

/// How often to look whether nbdkit is ready, while it starts.
const READY_POLL: Duration = Duration::from_millis(20);

/// What is run, and how.
pub struct Supervised<'a> {
    /// Starts nbdkit.
    pub start: &'a mut dyn FnMut() -> Result<Child>,
    /// Whether what would be started now could take over from what runs.
    pub check: &'a dyn Fn() -> Result<()>,
    /// Where nbdkit writes its process number, once it listens.
    pub pid_file: &'a Path,
    /// What to print then.
    pub announcement: &'a str,
    /// A killed server's answered writes are found by the next one, so that it may be killed to be restarted.
    pub can_restart: bool,
}

impl Supervised<'_> {
    /// Announces the server once it listens, passes signals on to it, restarts it at SIGUSR1, and waits for its end. A second
    /// signal ends a server that is waiting for its clients.
    pub async fn run(self) -> Result<ExitStatus> {
        let mut interrupts = signal(SignalKind::interrupt())?;
        let mut terminations = signal(SignalKind::terminate())?;
        let mut restarts = signal(SignalKind::user_defined1())?;
        let mut hangups = match is_ignored(Signal::HUP) {
            true => None,
            false => Some(signal(SignalKind::hangup())?),
        };
        let mut child = (self.start)()?;
        let mut ready_poll = tokio::time::interval(READY_POLL);
        let mut announced = false;
        let mut asked_to_stop = false;
        loop {
            let pid = pid_of(&child)?;
            let stop = tokio::select! {
                status = child.wait() => return Ok(status?),
                _ = interrupts.recv() => Signal::INT,
                _ = terminations.recv() => Signal::TERM,
                _ = restarts.recv() => {
                    if asked_to_stop || !self.can_restart {
                        say("not restarted: that takes write_buffer_dir, and a server that is not stopping");
                        continue;
                    }
                    if let Err(error) = (self.check)() {
                        say(&format!("not restarted: {error:#}"));
                        continue;
                    }
                    // Killed and not asked to end: its clients must see a broken connection, and come back, not an error.
                    child.kill().await?;
                    child = (self.start)()?;
                    say("restarted");
                    continue;
                }
                () = hang_up(&mut hangups) => {
                    // One terminal's end may bring several of them: from the kernel, and from the shell.
                    if asked_to_stop {
                        continue;
                    }
                    Signal::TERM
                }
                _ = ready_poll.tick(), if !announced => {
                    if names_process(self.pid_file, pid) {
                        announced = true;
                        // A server goes on without a reader of its output.
                        let _ = std::io::stdout().write_all(self.announcement.as_bytes());
                    }
                    continue;
                }
            };
            if asked_to_stop {
                // Failure means that it ended in this moment, which the next round sees.
                let _ = kill_process(pid, Signal::KILL);
                continue;
            }
            asked_to_stop = true;
            let _ = kill_process(pid, stop);
            say(
                "stopping, once connected clients have gone and their writes are published; \
                 again to stop at once and lose what was not flushed",
            );
        }
    }
}

fn pid_of(child: &Child) -> Result<Pid> {
    child
        .id()
        .and_then(|id| Pid::from_raw(id as i32))
        .context("nbdkit ended at once")
}

/// Says something on the terminal, which may be gone.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "hypernbd: {text}");
}

/// Whether the file names this process: the user's own may be left from an earlier server.
fn names_process(pid_file: &Path, pid: Pid) -> bool {
    let text = std::fs::read_to_string(pid_file).unwrap_or_default();
    text.trim().parse() == Ok(pid.as_raw_nonzero().get())
}

/// Waits for the next hangup; for ever where they are ignored.
async fn hang_up(hangups: &mut Option<tokio::signal::unix::Signal>) {
    match hangups {
        Some(hangups) => {
            hangups.recv().await;
        }
        None => std::future::pending().await,
    }
}

/// Whether this process was started with the signal ignored, as nohup(1) does: it is to stay so.
pub fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal.as_raw() - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_file_of_another_server_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pid");
        let pid = Pid::from_raw(1234).unwrap();
        for (text, ours) in [("", false), ("123\n", false), ("1234\n", true)] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(names_process(&file, pid), ours, "{text:?}");
        }
    }
}
