//! `hypernbd restart URL|SOCKET`.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hypernbd_volume::admin;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::url::VolumeUrl;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, Signal, kill_process};

use super::nbdkit_args::NbdkitArgs;
use super::note;
use crate::output;

/// How long the end of the old server is waited for; the store may take `REACH_MAX` of `hypernbd serve` to answer before.
const END_MAX: Duration = Duration::from_secs(30);
/// How long the next one is waited for.
const NEXT_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(10);

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume that the server on this machine serves, or the path of its socket
    pub server: String,
}

/// Has `hypernbd serve` start its nbdkit anew.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let nbdkit = match args.server.contains("://") {
        true => holder(&VolumeUrl::parse(&args.server)?, store).await?,
        false => listener(Path::new(&args.server))?,
    };
    if nbdkit == Pid::INIT {
        bail!(
            "systemd holds this socket: kill the server with systemctl kill --signal=KILL and its unit, which starts the next one"
        );
    }
    let words = fs::read(format!("/proc/{}/cmdline", nbdkit.as_raw_nonzero()))
        .with_context(|| format!("process {} cannot be looked at", nbdkit.as_raw_nonzero()))?;
    let words: Vec<_> = words
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect();
    if !words
        .iter()
        .any(|word| word.replace('-', "_").starts_with("write_buffer_dir="))
    {
        bail!(
            "the server has no write_buffer_dir, so what it has answered and not flushed would be lost: stop it and start it \
             again, with its clients disconnected"
        );
    }
    let serve = parent(nbdkit).filter(|parent| name(*parent).as_deref() == Some("hypernbd"));
    let Some(serve) = serve else {
        bail!(
            "the server was not started by hypernbd serve: kill it (SIGKILL, process {}), and whatever started it may start it \
             again",
            nbdkit.as_raw_nonzero()
        );
    };
    let pid_file = NbdkitArgs::new(&words).pid_file;
    let pid_file = pid_file.context("its command line names no file for its process number")?;
    let pid_file = note::of_process(serve, &pid_file);
    kill_process(serve, Signal::USR1).context("hypernbd serve cannot be told")?;
    let told = Instant::now();
    loop {
        if parent(nbdkit) != Some(serve) && next_listens(&pid_file, nbdkit, serve) {
            return output::line("restarted: clients that connect again find everything that was answered");
        }
        if name(serve).is_none() {
            bail!("hypernbd serve has ended: see its log, and start it again");
        }
        let runs_on = parent(nbdkit) == Some(serve);
        if runs_on && told.elapsed() >= END_MAX {
            bail!("the server was not restarted, and runs on: hypernbd serve says why");
        }
        if told.elapsed() >= NEXT_MAX {
            bail!(
                "the server was ended, and the next one does not listen yet: hypernbd serve says why, and goes on starting it"
            );
        }
        thread::sleep(POLL);
    }
}

/// Whether a server after `old` says that it listens.
fn next_listens(pid_file: &Path, old: Pid, serve: Pid) -> bool {
    let text = fs::read_to_string(pid_file).unwrap_or_default();
    let pid = text.trim().parse().ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| pid != old && parent(pid) == Some(serve))
}

/// The process that holds the volume's lease, if it is on this machine.
async fn holder(url: &VolumeUrl, store: &StoreOptions) -> Result<Pid> {
    let info = admin::info(url, store).await?;
    let lease = info.lease.filter(|lease| lease.is_held());
    let lease = lease.with_context(|| {
        format!("no server holds {url}: one without clients gives it back, and is named by its socket")
    })?;
    if !lease.holder.is_on_this_machine() {
        bail!("{url} is held by {}, which is not on this machine", lease.holder);
    }
    i32::try_from(lease.holder.pid)
        .ok()
        .and_then(Pid::from_raw)
        .context("the lease names no process")
}

/// The process that listens on the socket.
fn listener(socket: &Path) -> Result<Pid> {
    let stream = std::os::unix::net::UnixStream::connect(socket)
        .with_context(|| format!("no server listens on {}", socket.display()))?;
    Ok(socket_peercred(&stream)?.pid)
}

/// What the kernel says of a process, from its state on: proc_pid_stat(5).
fn stat(pid: Pid) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    Some(text.rsplit_once(')')?.1.to_owned())
}

fn parent(pid: Pid) -> Option<Pid> {
    Pid::from_raw(stat(pid)?.split_whitespace().nth(1)?.parse().ok()?)
}

fn name(pid: Pid) -> Option<String> {
    let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).ok()?;
    Some(name.trim_end().to_owned())
}
