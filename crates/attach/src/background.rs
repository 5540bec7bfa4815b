//! Beginning in the background, and telling others that the device is ready.

use std::fs::{self, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};

use crate::attach::must_be_root;
use crate::error::{AttachError, at};
use crate::state::{DIR, Directory};

/// The variable by which the process in the background knows where its log is, and that somebody waits for its word.
pub const READY_VARIABLE: &str = "HYPERNBD_ATTACH_LOG";
/// The variable that names the process which waits for that word.
const PARENT_VARIABLE: &str = "HYPERNBD_ATTACH_PARENT";

/// Runs a command in the background, until it says that the device is ready; gives the device. The command must call
/// [`attach`](crate::attach()) and say on its standard error what went wrong.
pub fn in_background(command: &mut Command) -> Result<String, AttachError> {
    must_be_root()?;
    let path = Directory::open(DIR)?.path(&format!("begun-{}.log", process::id()));
    let mut options = OpenOptions::new();
    let log = options
        .append(true)
        .create(true)
        .mode(0o600)
        .open(&path)
        .map_err(at(&path))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .env(READY_VARIABLE, &path)
        .env(PARENT_VARIABLE, process::id().to_string());
    let mut child = command.spawn().map_err(at(command.get_program()))?;
    let mut said = String::new();
    if let Some(output) = child.stdout.take() {
        let _ = BufReader::new(output).read_line(&mut said);
    }
    if let Some(device) = said.strip_prefix("ready ") {
        return Ok(device.trim_end().to_owned());
    }
    let _ = child.wait();
    let said = fs::read_to_string(&path).unwrap_or_default();
    let _ = fs::remove_file(&path);
    // What the log says before its last word is of no use to who waits for that.
    let said = said.trim_end();
    let said = said.rsplit_once("hypernbd: ").map_or(said, |(_, error)| error);
    Err(AttachError::Background(match said.is_empty() {
        true => "the relay ended before the device was ready, and said nothing".to_owned(),
        false => said.to_owned(),
    }))
}

/// Leaves the terminal that it was begun at, if it is to run in the background.
pub(crate) fn leave_terminal() {
    if log_path().is_some() {
        // It fails for the leader of a group, which has left it already.
        let _ = rustix::process::setsid();
        // Nor does it keep a file system from being unmounted.
        let _ = std::env::set_current_dir("/");
    }
}

/// Has this thread end the process, as SIGTERM does, when whoever waits for the device has gone before it is ready: nobody would know
/// of a device that is attached later.
pub(crate) fn end_with_parent() -> Result<(), AttachError> {
    let parent = std::env::var(PARENT_VARIABLE).ok();
    let Some(parent) = parent.and_then(|parent| Pid::from_raw(parent.parse().ok()?)) else {
        return Ok(());
    };
    set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(|error| at("the signal of a parent's end")(error.into()))?;
    // It may have gone before that.
    match getppid() == Some(parent) {
        true => Ok(()),
        false => Err(AttachError::Background(
            "who waited for the device has gone, so it is not attached".to_owned(),
        )),
    }
}

/// Takes that back. It is each thread's own.
pub(crate) fn outlive_parent() {
    let _ = set_parent_process_death_signal(None);
}

fn log_path() -> Option<PathBuf> {
    std::env::var_os(READY_VARIABLE).map(PathBuf::from)
}

/// Says that the device is ready: to who began this process, and to systemd. Who hears it ends, and this process goes on.
pub(crate) fn ready(device: &str) {
    if let Some(log) = log_path() {
        outlive_parent();
        let name = Path::new(device).file_name().unwrap_or_default();
        let _ = fs::rename(&log, log.with_file_name(name).with_extension("log"));
        let mut output = io::stdout();
        let _ = writeln!(output, "ready {device}").and_then(|()| output.flush());
        // Who began it reads until the end.
        if let Ok(null) = OpenOptions::new().write(true).open("/dev/null") {
            let _ = rustix::stdio::dup2_stdout(null);
        }
    } else {
        let _ = writeln!(io::stdout(), "{device}");
    }
    if let Some(socket) = std::env::var_os("NOTIFY_SOCKET").and_then(|path| path.into_string().ok())
        && let Err(error) = notify(&socket, &format!("READY=1\nSTATUS={device}\n"))
    {
        log::warn!("systemd cannot be told that the device is ready: {error}");
    }
}

/// sd_notify(3).
fn notify(socket: &str, state: &str) -> io::Result<()> {
    let address = match socket.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(socket)?,
    };
    UnixDatagram::unbound()?
        .send_to_addr(state.as_bytes(), &address)
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_hears_of_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        notify(path.to_str().unwrap(), "READY=1\n").unwrap();
        let mut word = [0; 32];
        let got = socket.recv(&mut word).unwrap();
        assert_eq!(&word[..got], b"READY=1\n");
    }
}
