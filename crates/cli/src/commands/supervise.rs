//! The life of the nbdkit that `hypernbd serve` runs: its start, the signals for it, its restarts, its end.

use std::io::Write;
use std::path::Path;
use std::pin::Pin;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Child;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

/// How often to look whether nbdkit is ready, while it starts.
const READY_POLL: Duration = Duration::from_millis(20);
/// Waits between attempts to start it again, the first and the longest.
const AGAIN_MIN: Duration = Duration::from_millis(500);
const AGAIN_MAX: Duration = Duration::from_secs(15);

/// An answer to whether a restart can succeed.
pub type Checked<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// What is run, and how.
pub struct Supervised<'a> {
    /// Starts nbdkit.
    pub start: &'a mut dyn FnMut() -> Result<Child>,
    /// Whether what would be started now could take over from what runs.
    pub check: &'a dyn Fn() -> Checked<'a>,
    /// Where nbdkit writes its process number, once it listens.
    pub pid_file: &'a Path,
    /// What to print then.
    pub announcement: &'a str,
    /// A killed server's answered writes are found by the next one, so that it may be killed to be restarted.
    pub can_restart: bool,
}

impl Supervised<'_> {
    /// Announces the server once it listens, passes signals on to it, restarts it at SIGUSR1, and waits for its end. A second
    /// signal ends a server that is waiting for its clients. Once one has listened, one that is to follow it and ends before it listens
    /// is started again: what an earlier one had answered waits for it.
    pub async fn run(self) -> Result<ExitStatus> {
        let mut interrupts = signal(SignalKind::interrupt())?;
        let mut terminations = signal(SignalKind::terminate())?;
        let mut restarts = signal(SignalKind::user_defined1())?;
        let mut hangups = match is_ignored(Signal::HUP) {
            true => None,
            false => Some(signal(SignalKind::hangup())?),
        };
        let mut child = Some((self.start)()?);
        let mut ended = ExitStatus::default();
        let mut ready_poll = tokio::time::interval(READY_POLL);
        let mut announced = false;
        // While a server that is to follow another one does not listen yet: how long to wait should it end.
        let mut again: Option<Duration> = None;
        let mut start_at = Instant::now();
        let mut asked_to_stop = false;
        let mut checking: Option<Checked<'_>> = None;
        loop {
            let pid = child.as_ref().map(pid_of).transpose()?;
            let stop = tokio::select! {
                status = end_of(&mut child) => {
                    ended = status?;
                    let Some(wait) = again.filter(|_| !asked_to_stop) else {
                        return Ok(ended);
                    };
                    say(&format!("the next server did not start ({ended}), and is started again in {wait:?}: see its log"));
                    (child, start_at, again) = (None, Instant::now() + wait, Some(AGAIN_MAX.min(wait * 2)));
                    continue;
                }
                () = tokio::time::sleep_until(start_at), if child.is_none() => {
                    match (self.start)() {
                        Ok(started) => child = Some(started),
                        Err(error) => {
                            let wait = again.unwrap_or(AGAIN_MIN);
                            say(&format!("the next server cannot be started, which is tried again in {wait:?}: {error:#}"));
                            (start_at, again) = (Instant::now() + wait, Some(AGAIN_MAX.min(wait * 2)));
                        }
                    }
                    continue;
                }
                _ = interrupts.recv() => Signal::INT,
                _ = terminations.recv() => Signal::TERM,
                _ = restarts.recv() => {
                    match self.can_restart && !asked_to_stop && child.is_some() {
                        true => checking = Some((self.check)()),
                        false => say("not restarted: that takes write_buffer_dir, and a server that runs and is not stopping"),
                    }
                    continue;
                }
                checked = answer_of(&mut checking) => {
                    checking = None;
                    match (checked, child.as_mut().filter(|_| !asked_to_stop)) {
                        (Err(error), _) => say(&format!("not restarted: {error:#}")),
                        (Ok(()), None) => say("not restarted: no server runs that is not stopping"),
                        (Ok(()), Some(running)) => {
                            // Killed and not asked to end: its clients must see a broken connection, and come back, not an error.
                            running.kill().await?;
                            ended = running.wait().await?;
                            (child, start_at, again) = (None, Instant::now(), Some(AGAIN_MIN));
                        }
                    }
                    continue;
                }
                () = hang_up(&mut hangups) => {
                    // One terminal's end may bring several of them: from the kernel, and from the shell.
                    if asked_to_stop {
                        continue;
                    }
                    Signal::TERM
                }
                _ = ready_poll.tick(), if !announced || again.is_some() => {
                    if pid.is_some_and(|pid| names_process(self.pid_file, pid)) {
                        if !announced {
                            announced = true;
                            // A server goes on without a reader of its output.
                            let _ = std::io::stdout().write_all(self.announcement.as_bytes());
                        }
                        if again.take().is_some() {
                            say("restarted");
                        }
                    }
                    continue;
                }
            };
            let Some(pid) = pid else {
                return Ok(ended);
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

/// Waits for an answer; for ever where nothing was asked.
async fn answer_of(checking: &mut Option<Checked<'_>>) -> Result<()> {
    match checking {
        Some(checking) => checking.await,
        None => std::future::pending().await,
    }
}

/// Waits for the end of nbdkit; for ever while there is none.
async fn end_of(child: &mut Option<Child>) -> std::io::Result<ExitStatus> {
    match child {
        Some(child) => child.wait().await,
        None => std::future::pending().await,
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
