//! What a child tells this process without a directory: a disk that is full, and whoever tidies directories up, keep no note back.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::Pid;

/// A file in memory that children inherit.
pub struct Note(OwnedFd);

impl Note {
    /// An empty one; the name is for who looks at this process's descriptors.
    ///
    /// # Errors
    /// When the system has no descriptor left.
    pub fn new(name: &str) -> Result<Self> {
        // Before Linux 6.3 nobody knows the flag, and a system may insist on it since.
        let file = memfd_create(name, MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| memfd_create(name, MemfdFlags::empty()))
            .context("cannot make a file in memory, by which nbdkit tells what becomes of it")?;
        Ok(Self(file))
    }

    /// Where it is, for this process and for each that it starts.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }

    /// Whether anything was written to it. What cannot be read may have been.
    pub fn is_written(&self) -> bool {
        fs::metadata(self.path()).map_or(true, |metadata| metadata.len() > 0)
    }
}

/// Where a file is for this process that another one names, be it a note of that process or any other file.
pub fn of_process(pid: Pid, named: &Path) -> PathBuf {
    let process = PathBuf::from(format!("/proc/{}", pid.as_raw_nonzero()));
    match named.strip_prefix("/proc/self") {
        Ok(note) => process.join(note),
        Err(_) => process.join("cwd").join(named),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_child_writes_and_this_process_reads() {
        let note = Note::new("note").unwrap();
        assert!(!note.is_written());
        let script = r#"echo first >"$0" && echo second >"$0""#;
        let status = Command::new("sh")
            .args(["-c", script])
            .arg(note.path())
            .status()
            .unwrap();
        assert!(status.success() && note.is_written());
        assert_eq!(fs::read_to_string(note.path()).unwrap(), "second\n");
    }

    #[test]
    fn a_note_of_another_process_is_found_by_its_name_there() {
        let note = Note::new("note").unwrap();
        let mut child = Command::new("sh")
            .args(["-c", r#"echo told >"$0"; read -r line"#])
            .arg(note.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&child);
        let path = note.path();
        // From here on only the child has it.
        drop(note);
        let found = of_process(pid, &path);
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while fs::read_to_string(&found).unwrap_or_default() != "told\n" {
            assert!(
                std::time::Instant::now() < end,
                "{} was not found",
                found.display()
            );
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[test]
    fn any_other_file_is_found_from_its_directory_or_by_its_whole_path() {
        let pid = rustix::process::getpid();
        let dir = std::env::current_dir().unwrap();
        assert_eq!(of_process(pid, Path::new("/run/pid")), Path::new("/run/pid"));
        let relative = of_process(pid, Path::new("Cargo.toml"));
        assert_eq!(relative.canonicalize().unwrap(), dir.join("Cargo.toml"));
    }
}
