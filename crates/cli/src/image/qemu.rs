//! Images that are not raw, through qemu-nbd and qemu-img.
//!
//! qemu-nbd ends when its last client has gone, so it does not outlive this process however that ends: a first connection is kept until
//! the image is closed.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use hypernbd_attach::nbd::Client;
use hypernbd_volume::transfer::{Image, Port, Run, TransferError};
use serde::Deserialize;
use tempfile::TempDir;

use super::format::Format;

/// How often to look whether qemu-nbd listens, and how long that may take.
const READY_POLL: Duration = Duration::from_millis(10);
const READY_MAX: Duration = Duration::from_secs(60);
/// How long it may take to write the last of an image and end.
const END_MAX: Duration = Duration::from_secs(300);
/// A local program that answers nothing for so long hangs.
const ANSWER_MAX: Duration = Duration::from_secs(300);
const NBD: &str = "qemu-nbd";
const IMG: &str = "qemu-img";

/// What qemu-img says of a run of an image.
#[derive(Debug, Deserialize)]
struct Mapped {
    start: u64,
    length: u64,
    zero: bool,
}

/// An image of any format that QEMU knows, served by a qemu-nbd of our own.
#[derive(Debug)]
pub struct QemuImage {
    name: String,
    /// What holds data and what does not, from the start on; all of it data where nothing was asked.
    map: Vec<Run>,
    size_bytes: u64,
    /// The connection that keeps qemu-nbd running.
    first: Option<Client>,
    server: Child,
    dir: TempDir,
    said: File,
}

impl QemuImage {
    /// Opens an image to be read.
    pub fn open(path: &Path, format: Format) -> Result<Self> {
        let mut command = Command::new(IMG);
        command
            .args(["map", "--output=json", "-f", format.name()])
            .arg(whole(path)?);
        let text = run(command).with_context(|| format!("cannot read {}", path.display()))?;
        let mapped: Vec<Mapped> = serde_json::from_str(&text)
            .with_context(|| format!("{IMG} map says no JSON of {}", path.display()))?;
        let mut map: Vec<Run> = Vec::new();
        for run in mapped {
            // What it says nothing of is read.
            let known_to = map.last().map_or(0, |last| last.end_bytes);
            if run.start > known_to {
                map.push(Run {
                    end_bytes: run.start,
                    is_data: true,
                });
            }
            map.push(Run {
                end_bytes: run.start + run.length,
                is_data: !run.zero,
            });
        }
        let mut image = Self::serve(path, format, &["--read-only"])?;
        image.map = map;
        Ok(image)
    }

    /// Makes an image of this size in a file that is there, to be written.
    pub fn create(path: &Path, format: Format, size_bytes: u64) -> Result<Self> {
        let mut command = Command::new(IMG);
        command
            .args(["create", "-q", "-f", format.name()])
            .arg(whole(path)?);
        command.arg(size_bytes.to_string());
        run(command).with_context(|| format!("cannot make {}", path.display()))?;
        let image = Self::serve(path, format, &[])?;
        if image.size_bytes < size_bytes {
            bail!(
                "a {} image of {size_bytes} bytes cannot be made: it would have {}; use another format",
                format.name(),
                image.size_bytes
            );
        }
        Ok(image)
    }

    fn serve(path: &Path, format: Format, options: &[&str]) -> Result<Self> {
        let (dir, said) = temporary()?;
        let socket = dir.path().join("socket");
        let mut command = Command::new(NBD);
        command
            .arg(format!("--socket={}", socket.display()))
            .arg(format!("--format={}", format.name()))
            .arg("--shared=0")
            .args(options)
            .arg("--")
            .arg(whole(path)?)
            .stdin(Stdio::null())
            .stdout(said.try_clone()?)
            .stderr(said.try_clone()?)
            // Ctrl-C is for this process, which ends it in order.
            .process_group(0);
        let server = command.spawn().map_err(|e| cannot_run(NBD, e))?;
        let mut image = Self {
            name: path.display().to_string(),
            map: Vec::new(),
            size_bytes: 0,
            first: None,
            server,
            dir,
            said,
        };
        let first = image.connect_first(&socket)?;
        image.size_bytes = first.size_bytes();
        image.first = Some(first);
        Ok(image)
    }

    fn connect_first(&mut self, socket: &Path) -> Result<Client> {
        let until = Instant::now() + READY_MAX;
        loop {
            match Client::connect(socket, ANSWER_MAX) {
                Ok(client) => return Ok(client),
                Err(e) if Instant::now() > until => {
                    return Err(e).with_context(|| format!("{NBD} does not serve {}", self.name));
                }
                Err(_) => {}
            }
            if self.server.try_wait()?.is_some() {
                let said = self.said();
                bail!("cannot open {}: {said}", self.name);
            }
            std::thread::sleep(READY_POLL);
        }
    }

    /// What it wrote on its output.
    fn said(&mut self) -> String {
        let mut text = String::new();
        let read = self
            .said
            .seek(SeekFrom::Start(0))
            .and_then(|_| self.said.read_to_string(&mut text));
        match (read, text.trim()) {
            (Ok(_), text) if !text.is_empty() => text.replace('\n', "; "),
            _ => format!("{NBD} ended without a word"),
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// Makes what was written durable, and waits until the image is closed.
    pub fn close(mut self) -> Result<()> {
        let name = self.name.clone();
        if let Some(mut first) = self.first.take() {
            first
                .flush()
                .with_context(|| format!("cannot write {name} to its disk"))?;
        }
        let until = Instant::now() + END_MAX;
        loop {
            match self.server.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(_) => bail!("{NBD} could not close {name}: {}", self.said()),
                None if Instant::now() > until => bail!("{NBD} does not end, and may not have closed {name}"),
                None => std::thread::sleep(READY_POLL),
            }
        }
    }
}

impl Drop for QemuImage {
    fn drop(&mut self) {
        self.first = None;
        // Of one that was closed nothing is left to end.
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Image for QemuImage {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn run_at(&self, offset_bytes: u64) -> Result<Run, TransferError> {
        let at = self.map.partition_point(|run| run.end_bytes <= offset_bytes);
        Ok(self.map.get(at).copied().unwrap_or(Run {
            end_bytes: self.size_bytes,
            is_data: true,
        }))
    }

    fn port(&self) -> Result<Box<dyn Port + '_>, TransferError> {
        let client = Client::connect(&self.socket(), ANSWER_MAX);
        let client =
            client.map_err(|e| TransferError::io(format!("cannot reach the {NBD} of {}", self.name), e))?;
        Ok(Box::new(QemuPort {
            client,
            name: &self.name,
        }))
    }
}

struct QemuPort<'a> {
    client: Client,
    name: &'a str,
}

impl Port for QemuPort<'_> {
    fn read(&mut self, offset_bytes: u64, out: &mut [u8]) -> Result<(), TransferError> {
        let read = self.client.read(offset_bytes, out);
        read.map_err(|e| TransferError::io(format!("cannot read {}", self.name), e))
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), TransferError> {
        let written = self.client.write(offset_bytes, bytes);
        written.map_err(|e| TransferError::io(format!("cannot write {}", self.name), e))
    }

    fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), TransferError> {
        let zeros = vec![0; len_bytes.min(1 << 20) as usize];
        let (mut at, end) = (offset_bytes, offset_bytes + len_bytes);
        while at < end {
            let len = (end - at).min(zeros.len() as u64);
            self.write(at, &zeros[..len as usize])?;
            at += len;
        }
        Ok(())
    }
}

/// A path that QEMU's programs take for nothing else: a dash first is an option to them, and a word before a colon a protocol.
fn whole(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("{} is no usable path", path.display()))
}

/// Runs a program of QEMU's to its end, and returns what it says.
fn run(mut command: Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    command.stdin(Stdio::null());
    let done = command.output().map_err(|e| cannot_run(&program, e))?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr).trim().replace('\n', "; ");
        bail!("{program} says: {said}");
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// A directory for a socket of qemu-nbd, and a file for what it says.
fn temporary() -> Result<(TempDir, File)> {
    let made = || Ok((tempfile::tempdir()?, tempfile::tempfile()?));
    made().map_err(|error: std::io::Error| {
        anyhow!(
            "{NBD} needs a directory for its socket, and none can be made in {} ({error}): make room there, or set TMPDIR to a directory \
             that can be written",
            std::env::temp_dir().display()
        )
    })
}

fn cannot_run(program: &str, error: std::io::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::NotFound => anyhow::anyhow!(
            "images that are not raw are read and written by {program}, which is not installed: apt install qemu-utils"
        ),
        _ => anyhow::Error::new(error).context(format!("cannot start {program}")),
    }
}
