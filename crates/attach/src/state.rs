//! What is attached: a file for each device below `/run/hypernbd/attach`, in lines of KEY=VALUE that udev can read.

use std::fs::{self, DirBuilder};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::device;
use crate::error::{AttachError, at};

/// Where the files are.
pub(crate) const DIR: &str = "/run/hypernbd/attach";

/// A device that is attached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attached {
    /// `/dev/nbd0`
    pub device: String,
    /// Where its server listens.
    pub uri: String,
    /// The name below `/dev/hypernbd`, if it has one.
    pub name: Option<String>,
    /// The relay.
    pub pid: u32,
    /// When it was attached, in seconds since 1970.
    pub since: u64,
    /// Why it has no link to its server, if it has none.
    pub lost: Option<String>,
    /// When it got or lost its link, in seconds since 1970.
    pub link_since: u64,
}

impl Attached {
    /// Whether the relay's process is there.
    pub(crate) fn has_process(&self) -> bool {
        Path::new(&format!("/proc/{}/fd", self.pid)).exists()
    }

    /// Whether the relay is there. Without it the device fails every request.
    pub fn is_alive(&self) -> bool {
        self.has_process() && device::index(&self.device).is_ok_and(device::is_connected)
    }

    /// Notes how the link is.
    pub(crate) fn note_link(&mut self, lost: Option<&str>) {
        self.lost = lost.map(|why| why.replace(char::is_control, " "));
        self.link_since = now();
    }

    fn text(&self) -> String {
        let values = [
            ("DEVICE", self.device.clone()),
            ("URI", self.uri.clone()),
            ("NAME", self.name.clone().unwrap_or_default()),
            ("PID", self.pid.to_string()),
            ("SINCE", self.since.to_string()),
            ("LOST", self.lost.clone().unwrap_or_default()),
            ("LINK_SINCE", self.link_since.to_string()),
        ];
        // udev takes no empty values.
        let lines = values.iter().filter(|(_, value)| !value.is_empty());
        lines
            .map(|(key, value)| format!("HYPERNBD_{key}={value}\n"))
            .collect()
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        };
        let some = |key: &str| value(key).filter(|text| !text.is_empty()).map(str::to_owned);
        Some(Self {
            device: some("HYPERNBD_DEVICE")?,
            uri: some("HYPERNBD_URI")?,
            name: some("HYPERNBD_NAME"),
            pid: value("HYPERNBD_PID")?.parse().ok()?,
            since: value("HYPERNBD_SINCE")?.parse().ok()?,
            lost: some("HYPERNBD_LOST"),
            link_since: value("HYPERNBD_LINK_SINCE")?.parse().ok()?,
        })
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// The directory of the files.
#[derive(Debug, Clone)]
pub(crate) struct Directory(PathBuf);

impl Directory {
    /// Makes it where it is not there.
    pub(crate) fn open(path: impl Into<PathBuf>) -> Result<Self, AttachError> {
        let path = path.into();
        let parent = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(at(parent))?;
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(at(path)(error)),
            _ => Ok(Self(path)),
        }
    }

    /// A file in it.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn file(&self, attached: &Attached) -> PathBuf {
        self.path(attached.device.trim_start_matches("/dev/"))
    }

    /// Writes a device's file; readers see the old one or the new one.
    pub(crate) fn write(&self, attached: &Attached) -> Result<(), AttachError> {
        let part = self.path(&format!(".{}", process::id()));
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&part).map_err(at(&part))?;
        file.write_all(attached.text().as_bytes()).map_err(at(&part))?;
        fs::rename(&part, self.file(attached)).map_err(at(self.file(attached)))
    }

    /// Removes a device's file, and its log, if they are of this relay still.
    pub(crate) fn remove(&self, attached: &Attached) {
        let file = self.file(attached);
        if self
            .find(&attached.device)
            .is_some_and(|found| found.pid != attached.pid)
        {
            return;
        }
        let _ = fs::remove_file(file.with_extension("log"));
        let _ = fs::remove_file(file);
    }

    /// What is attached, by device; what cannot be read is left out, with a line in the log.
    pub(crate) fn list(&self) -> Vec<Attached> {
        let Ok(entries) = fs::read_dir(&self.0) else {
            return Vec::new();
        };
        let is_device = |path: &PathBuf| {
            let name = path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default();
            name.starts_with("nbd") && !name.contains('.')
        };
        let paths = entries.flatten().map(|entry| entry.path()).filter(is_device);
        let mut all: Vec<Attached> = paths
            .filter_map(|path| {
                let read = fs::read_to_string(&path)
                    .ok()
                    .and_then(|text| Attached::parse(&text));
                if read.is_none() {
                    log::warn!("{} cannot be read", path.display());
                }
                read
            })
            .collect();
        all.sort_by_key(|one| device::index(&one.device).ok());
        all
    }

    /// The one that is meant: by device, name or URI.
    pub(crate) fn find(&self, what: &str) -> Option<Attached> {
        let index = device::index(what).ok();
        let is_meant = |one: &Attached| {
            one.uri == what
                || one.name.as_deref() == Some(what)
                || (index.is_some() && device::index(&one.device).ok() == index)
        };
        self.list().into_iter().find(is_meant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_listed_and_found() {
        let root = tempfile::tempdir().unwrap();
        let dir = Directory::open(root.path().join("run/attach")).unwrap();
        let mut one = Attached {
            device: "/dev/nbd7".to_owned(),
            uri: "nbd+unix:///?socket=/run/disk.sock".to_owned(),
            name: Some("disk".to_owned()),
            pid: 1,
            since: 5,
            ..Attached::default()
        };
        let other = Attached {
            device: "/dev/nbd10".to_owned(),
            name: None,
            uri: "nbd://h".to_owned(),
            ..one.clone()
        };
        one.note_link(Some("it is\ngone"));
        dir.write(&other).unwrap();
        dir.write(&one).unwrap();
        assert_eq!(dir.list(), [one.clone(), other.clone()]);
        assert_eq!(one.lost.as_deref(), Some("it is gone"));
        for what in ["disk", "nbd7", "/dev/nbd7", "nbd+unix:///?socket=/run/disk.sock"] {
            assert_eq!(dir.find(what), Some(one.clone()), "{what}");
        }
        assert_eq!(dir.find("nbd1"), None);
        dir.remove(&one);
        assert_eq!(dir.list(), [other]);
    }
}
