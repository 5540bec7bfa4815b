//! What is attached: a file for each device below `/run/hypernbd/attach`, in lines of KEY=VALUE that udev can read.

use std::fs::{self, DirBuilder};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::device;
use crate::error::{AttachError, at};
use crate::locks::Lock;

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
    /// The lock that the relay has, below the directory: a number of a process may belong to another one by now.
    pub(crate) lock: String,
    /// The task that made the device, by which the kernel tells it from a later one of the same name.
    pub(crate) made_by: Option<u32>,
    /// When it was attached, in seconds since 1970.
    pub since: u64,
    /// Why it has no link to its server, if it has none.
    pub lost: Option<String>,
    /// When it got or lost its link, in seconds since 1970.
    pub link_since: u64,
    /// How many bytes the device has; none if its relay, of an earlier release, does not say.
    pub size: Option<u64>,
    /// How many the export has, in whole blocks: more than the device until that has grown.
    pub export_size: Option<u64>,
    /// Why the device has not grown to that, or why it is not known what the export has.
    pub not_grown: Option<String>,
    /// How often the export's size was asked for since the device was made.
    pub(crate) looks: u64,
    /// Whether the relay was there when this was read.
    pub(crate) has_relay: bool,
}

impl Attached {
    /// Whether the relay is there, and the device is the one that it made. Without it the device fails every request.
    pub fn is_alive(&self) -> bool {
        let maker = device::index(&self.device).ok().and_then(device::maker);
        self.has_relay && self.is_made(maker)
    }

    /// Whether the device that this task made is the one that is meant here.
    pub(crate) fn is_made(&self, maker: Option<u32>) -> bool {
        maker.is_some() && maker == self.made_by
    }

    /// Notes how the link is. Another reason is no other time.
    pub(crate) fn note_link(&mut self, lost: Option<&str>, now: u64) {
        if self.lost.is_some() != lost.is_some() {
            self.link_since = now;
        }
        self.lost = lost.map(in_one_line);
    }

    fn text(&self) -> String {
        let number = |number: Option<u64>| number.map(|number| number.to_string()).unwrap_or_default();
        let values = [
            ("DEVICE", self.device.clone()),
            ("URI", self.uri.clone()),
            ("NAME", self.name.clone().unwrap_or_default()),
            ("PID", self.pid.to_string()),
            ("LOCK", self.lock.clone()),
            (
                "MADE_BY",
                self.made_by.map(|task| task.to_string()).unwrap_or_default(),
            ),
            ("SINCE", self.since.to_string()),
            ("LOST", self.lost.clone().unwrap_or_default()),
            ("LINK_SINCE", self.link_since.to_string()),
            ("SIZE", number(self.size)),
            ("EXPORT_SIZE", number(self.export_size)),
            (
                "NOT_GROWN",
                self.not_grown.as_deref().map(in_one_line).unwrap_or_default(),
            ),
            ("LOOKS", self.looks.to_string()),
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
        let number = |key: &str| value(key).and_then(|text| text.parse().ok());
        Some(Self {
            device: some("HYPERNBD_DEVICE")?,
            uri: some("HYPERNBD_URI")?,
            name: some("HYPERNBD_NAME"),
            pid: value("HYPERNBD_PID")?.parse().ok()?,
            lock: some("HYPERNBD_LOCK").filter(|name| !name.contains('/'))?,
            made_by: value("HYPERNBD_MADE_BY").and_then(|task| task.parse().ok()),
            since: value("HYPERNBD_SINCE")?.parse().ok()?,
            lost: some("HYPERNBD_LOST"),
            link_since: value("HYPERNBD_LINK_SINCE")?.parse().ok()?,
            size: number("HYPERNBD_SIZE"),
            export_size: number("HYPERNBD_EXPORT_SIZE"),
            not_grown: some("HYPERNBD_NOT_GROWN"),
            looks: number("HYPERNBD_LOOKS").unwrap_or_default(),
            has_relay: false,
        })
    }
}

fn in_one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
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

    /// A lock for this relay, and its name. No other one has that name, ever.
    pub(crate) fn relay_lock(&self) -> Result<(String, Lock), AttachError> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let name = format!("relay-{}-{}", process::id(), since.as_nanos());
        let taken = Lock::take(&self.path(&name), &process::id().to_string())?;
        let taken = taken.ok_or_else(|| AttachError::Background(format!("{name} is locked")))?;
        Ok((name, taken))
    }

    /// Whether the relay of a device is there.
    pub(crate) fn has_relay(&self, attached: &Attached) -> bool {
        Lock::is_held(&self.path(&attached.lock))
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
        let _ = fs::remove_file(self.path(&attached.lock));
        let file = self.file(attached);
        let found = self.find(&attached.device);
        if found.is_some_and(|found| found.lock != attached.lock) {
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
                read.map(|one| Attached {
                    has_relay: self.has_relay(&one),
                    ..one
                })
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
        // A relay that was killed leaves its file, with the name and the URI of one that may live.
        let meant = self.list().into_iter().filter(is_meant);
        meant.min_by_key(|one| !one.has_relay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one() -> Attached {
        Attached {
            device: "/dev/nbd7".to_owned(),
            uri: "nbd+unix:///?socket=/run/disk.sock".to_owned(),
            name: Some("disk".to_owned()),
            // A process that is there, whatever it is.
            pid: process::id(),
            lock: "relay-of-one".to_owned(),
            made_by: Some(77),
            since: 5,
            link_since: 5,
            size: Some(1 << 20),
            export_size: Some(1 << 21),
            not_grown: Some("it is busy".to_owned()),
            looks: 3,
            ..Attached::default()
        }
    }

    #[test]
    fn what_was_written_is_listed_and_found() {
        let root = tempfile::tempdir().unwrap();
        let dir = Directory::open(root.path().join("run/attach")).unwrap();
        let mut one = one();
        let other = Attached {
            device: "/dev/nbd10".to_owned(),
            name: None,
            uri: "nbd://h".to_owned(),
            made_by: None,
            lock: "relay-of-other".to_owned(),
            size: None,
            export_size: None,
            not_grown: None,
            ..one.clone()
        };
        one.note_link(Some("it is\ngone"), 6);
        dir.write(&other).unwrap();
        dir.write(&one).unwrap();
        assert_eq!(dir.list(), [one.clone(), other.clone()]);
        assert_eq!(one.lost.as_deref(), Some("it is gone"));
        for what in ["disk", "nbd7", "/dev/nbd7", "nbd+unix:///?socket=/run/disk.sock"] {
            assert_eq!(dir.find(what), Some(one.clone()), "{what}");
        }
        assert_eq!(dir.find("nbd1"), None);
        // A later relay has the device.
        dir.remove(&Attached {
            lock: "relay-before".to_owned(),
            ..one.clone()
        });
        assert_eq!(dir.list().len(), 2);
        dir.remove(&one);
        assert_eq!(dir.list(), [other]);
    }

    /// The file of a relay that was killed stays, and the number of its process comes again.
    #[test]
    fn a_relay_is_there_as_long_as_it_has_its_lock_and_not_while_some_process_has_its_number() {
        let root = tempfile::tempdir().unwrap();
        let dir = Directory::open(root.path()).unwrap();
        let (name, lock) = dir.relay_lock().unwrap();
        let (later, _) = dir.relay_lock().unwrap();
        assert_ne!(name, later);
        let attached = Attached { lock: name, ..one() };
        dir.write(&attached).unwrap();
        assert!(dir.list()[0].has_relay);
        drop(lock);
        assert!(!dir.list()[0].has_relay);
        dir.write(&Attached {
            lock: "../x".to_owned(),
            ..attached
        })
        .unwrap();
        assert_eq!(dir.list(), []);
    }

    #[test]
    fn a_device_is_told_from_a_later_one_of_its_name() {
        assert!(one().is_made(Some(77)));
        assert!(!one().is_made(Some(78)) && !one().is_made(None));
        assert!(
            !Attached {
                made_by: None,
                ..one()
            }
            .is_made(None)
        );
    }

    #[test]
    fn a_link_is_lost_since_it_was_lost_however_often_the_reason_changes() {
        let mut one = one();
        for (lost, now, since) in [
            (None, 6, 5),
            (Some("a"), 7, 7),
            (Some("b"), 8, 7),
            (None, 9, 9),
            (None, 10, 9),
        ] {
            one.note_link(lost, now);
            assert_eq!((one.lost.as_deref(), one.link_since), (lost, since));
        }
    }
}
