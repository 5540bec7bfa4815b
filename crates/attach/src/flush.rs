//! Flushing a device before it is taken away, in a process of its own. The kernel lets nobody go who waits for a device, not even to die,
//! and its server may never answer.

use std::fs;
use std::io::{self, BufRead, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use crate::attach::must_be_root;
use crate::device;
use crate::error::AttachError;

const CLAIMED: &str = "claimed\n";
const FLUSH: &str = "flush\n";
const FLUSHED: &str = "flushed\n";
const POLL: Duration = Duration::from_millis(100);
/// After so long it is said what is waited for.
const SAID_AFTER: Duration = Duration::from_secs(5);

/// What [`Claim::of`] runs: claims a device and says so, flushes it when it is told to and says so, and keeps it until its standard
/// input ends.
///
/// # Errors
/// Where the device is in use, or the flush fails.
pub fn hold_flushed(device: &str) -> Result<(), AttachError> {
    must_be_root()?;
    let file = device::claim(device::index(device)?)?;
    let failed = |error| AttachError::File {
        path: device.into(),
        error,
    };
    let say = |word: &str| {
        let mut output = io::stdout();
        output.write_all(word.as_bytes()).and_then(|()| output.flush())
    };
    say(CLAIMED).map_err(failed)?;
    let (mut input, mut told) = (io::stdin().lock(), String::new());
    if input.read_line(&mut told).is_ok_and(|read| read > 0) {
        file.sync_all().map_err(failed)?;
        say(FLUSHED).map_err(failed)?;
        let _ = input.read_to_end(&mut Vec::new());
    }
    Ok(())
}

/// How many requests the device's driver has seen answered: reads, writes, trims and flushes of `/sys/block/nbd0/stat`.
fn answered(stat: &str) -> u64 {
    let fields: Vec<u64> = stat
        .split_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    [0, 4, 11, 15].iter().filter_map(|at| fields.get(*at)).sum()
}

/// A device that nobody else uses, as long as this is there.
pub(crate) struct Claim<Progress> {
    device: String,
    child: Child,
    input: Option<ChildStdin>,
    output: ChildStdout,
    silence_max: Duration,
    progress: Progress,
}

/// Claims a device. A server that answers nothing for `silence_max` is not waited for any longer, now and later.
pub(crate) fn claim(index: u32, silence_max: Duration) -> Result<Claim<impl FnMut() -> u64>, AttachError> {
    let device = device::path(index);
    // This program, though its file may have been replaced since.
    let mut command = Command::new("/proc/self/exe");
    command.args(["detach", "--hold-flushed", &device]);
    let stat = format!("/sys/block/nbd{index}/stat");
    let progress = move || fs::read_to_string(&stat).as_deref().map_or(0, answered);
    Claim::of(device, &mut command, silence_max, progress)
}

impl<Progress: FnMut() -> u64> Claim<Progress> {
    fn of(
        device: String,
        command: &mut Command,
        silence_max: Duration,
        progress: Progress,
    ) -> Result<Self, AttachError> {
        let failed = |error| AttachError::File {
            path: "'hypernbd detach'".into(),
            error,
        };
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().map_err(failed)?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed(io::ErrorKind::BrokenPipe.into()));
        };
        let mut claim = Self {
            device,
            child,
            input: Some(input),
            output,
            silence_max,
            progress,
        };
        claim.wait_for(CLAIMED)?;
        Ok(claim)
    }

    /// Waits until what was written to the device is flushed.
    pub(crate) fn flush(&mut self) -> Result<(), AttachError> {
        let told = self.input.as_mut().map(|input| input.write_all(FLUSH.as_bytes()));
        // What is the matter is told instead of the word.
        drop(told);
        self.wait_for(FLUSHED)
    }

    /// Waits for a word, as long as anything is answered meanwhile.
    fn wait_for(&mut self, word: &str) -> Result<(), AttachError> {
        let began = Instant::now();
        let (mut silent_since, mut seen, mut is_said) = (began, (self.progress)(), false);
        let mut said = Vec::new();
        while said != word.as_bytes() {
            let mut output = [PollFd::new(&self.output, PollFlags::IN)];
            let timeout = POLL.try_into().ok();
            if poll(&mut output, timeout.as_ref()).is_ok_and(|ready| ready > 0) {
                let mut byte = [0];
                match self.output.read(&mut byte) {
                    Ok(1) => said.push(byte[0]),
                    _ => return Err(self.failure()),
                }
                continue;
            }
            let answered = (self.progress)();
            if answered != seen {
                (seen, silent_since) = (answered, Instant::now());
            } else if silent_since.elapsed() >= self.silence_max {
                return Err(AttachError::Silent {
                    device: self.device.clone(),
                    seconds: self.silence_max.as_secs(),
                });
            }
            if !is_said && began.elapsed() >= SAID_AFTER {
                is_said = true;
                log::warn!(
                    "waiting for the server of {} to take and flush what was written; 'hypernbd detach --force' does not wait, and loses \
                     what was not flushed",
                    self.device
                );
            }
        }
        Ok(())
    }

    /// It ended instead of saying its word.
    fn failure(&mut self) -> AttachError {
        let mut said = String::new();
        if let Some(stderr) = &mut self.child.stderr {
            let _ = stderr.read_to_string(&mut said);
        }
        let _ = self.child.wait();
        let said = said.trim_end();
        let said = said.rsplit_once("hypernbd: ").map_or(said, |(_, error)| error);
        AttachError::Background(match said.is_empty() {
            true => format!(
                "{} could not be claimed and flushed, and nothing says why",
                self.device
            ),
            false => said.to_owned(),
        })
    }
}

impl<Progress> Drop for Claim<Progress> {
    /// Lets the device go. It is not waited for: if it waits for the device, it ends when the kernel lets it.
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.kill();
        let _ = self.child.try_wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    fn of(
        script: &str,
        silence_max: Duration,
        progress: impl FnMut() -> u64,
    ) -> Result<Claim<impl FnMut() -> u64>, AttachError> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Claim::of("/dev/nbd0".to_owned(), &mut command, silence_max, progress)
    }

    #[test]
    fn a_device_is_claimed_then_flushed() {
        let mut claim = of(
            "echo claimed; read told; [ $told = flush ] && echo flushed; cat",
            LONG,
            || 0,
        )
        .unwrap();
        claim.flush().unwrap();
    }

    #[test]
    fn what_went_wrong_is_told_instead() {
        let Err(error) = of("echo 'hypernbd: it is in use' >&2; exit 1", LONG, || 0) else {
            panic!("claimed")
        };
        assert_eq!(error.to_string(), "it is in use");
        let mut claim = of(
            "echo claimed; read told; echo 'hypernbd: no space' >&2; exit 1",
            LONG,
            || 0,
        )
        .unwrap();
        assert_eq!(claim.flush().unwrap_err().to_string(), "no space");
    }

    #[test]
    fn a_server_that_answers_nothing_is_not_waited_for_and_one_that_answers_something_is() {
        let Err(error) = of("read never", Duration::ZERO, || 0) else {
            panic!("claimed")
        };
        let said = error.to_string();
        assert!(
            said.contains("--force") && said.contains("answered nothing"),
            "{said}"
        );
        // It goes on as soon as enough was answered, and not before.
        let root = tempfile::tempdir().unwrap();
        let gate = root.path().join("gate");
        let script = format!(
            "while ! [ -e {} ]; do sleep 0.01; done; echo claimed; cat",
            gate.display()
        );
        let mut number = 0;
        let progress = move || {
            number += 1;
            if number == 5 {
                fs::write(&gate, "").unwrap();
            }
            number
        };
        assert!(of(&script, Duration::from_nanos(1), progress).is_ok());
    }

    #[test]
    fn what_was_answered_is_counted_and_time_is_not() {
        let stat = "  1 0 8 3   20 0 160 9   2 77 88   300 0 0 0   4000 5\n";
        assert_eq!(answered(stat), 4321);
        assert_eq!(answered("1 0 8 3 20 0 160 9 2 77 88"), 21);
        assert_eq!(answered(""), 0);
    }
}
