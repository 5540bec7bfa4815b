//! What a successful flush promises, in words. One place for the log at start, `hypernbd info` and `--dump-plugin`.

use crate::base::url::VolumeUrl;
use crate::base::wal_place::WalPlace;

/// Environment variable that names a file. The plugin writes a line there, and makes the file where there is none, when a volume
/// cannot be closed with everything published; who started nbdkit learns of it so, as nbdkit's own exit status does not depend on
/// what its plugin's end came to.
pub const LOSS_FILE: &str = "HYPERNBD_LOSS_FILE";

/// The durability class of a volume's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Volume on S3, no log.
    S3,
    /// Volume in a local directory, no log.
    LocalDirectory,
    /// A log on S3.
    S3Wal,
    /// A journal on the server's machine.
    Journal,
}

impl Durability {
    /// Every class, in the order of the documentation's table.
    pub const ALL: [Self; 4] = [Self::S3, Self::S3Wal, Self::Journal, Self::LocalDirectory];

    /// The class of a volume at this URL, with this log.
    pub fn of(url: &VolumeUrl, wal: Option<&WalPlace>) -> Self {
        let log = match wal {
            Some(WalPlace::Beside) => Some(url),
            Some(WalPlace::At(url)) => Some(url),
            None => None,
        };
        match (url, log) {
            (_, Some(VolumeUrl::S3 { .. })) => Self::S3Wal,
            (_, Some(VolumeUrl::File { .. })) => Self::Journal,
            (VolumeUrl::S3 { .. }, None) => Self::S3,
            (VolumeUrl::File { .. }, None) => Self::LocalDirectory,
        }
    }

    /// Short name, fit for a key: `s3`, `file`, `s3_log`, `file_log`.
    pub fn name(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::LocalDirectory => "file",
            Self::S3Wal => "s3_log",
            Self::Journal => "file_log",
        }
    }

    /// What a reply to a flush, or to a write with FUA, means, and what is lost when the server or the machine is.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::S3 => {
                "a flush or FUA reply means a checkpoint published on S3; \
                 losing the server or its machine loses only writes after the last flush or checkpoint"
            }
            Self::LocalDirectory => {
                "a flush or FUA reply means data and names synced (fsync) in the local directory; \
                 killing the server loses only writes after the last flush or checkpoint, \
                 losing the machine's disk loses the volume"
            }
            Self::S3Wal => {
                "a flush or FUA reply means a log record, or a checkpoint, stored on S3; \
                 losing the server or its machine loses only writes after the last flush or checkpoint"
            }
            Self::Journal => {
                "a flush or FUA reply means a journal record synced (fdatasync) on this machine, or a checkpoint; \
                 killing the server loses only writes after the last flush or checkpoint, \
                 losing the machine's disk loses the writes after the last checkpoint"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_follows_the_schemes() {
        let (s3, file) = ("s3://bucket/vol/", "file:///vol/");
        for (url, wal, class) in [
            (s3, None, Durability::S3),
            (file, None, Durability::LocalDirectory),
            (s3, Some(s3), Durability::S3Wal),
            (file, Some(s3), Durability::S3Wal),
            (s3, Some(file), Durability::Journal),
            (s3, Some("auto"), Durability::S3Wal),
        ] {
            let wal = wal.map(|wal| wal.parse().unwrap());
            assert_eq!(
                Durability::of(&VolumeUrl::parse(url).unwrap(), wal.as_ref()),
                class
            );
            assert!(class.sentence().starts_with("a flush or FUA reply means"));
        }
    }

    #[test]
    fn the_documentation_has_every_class() {
        let page = include_str!("../../../../docs/durability.md");
        for class in Durability::ALL {
            assert!(page.contains(&format!("`{}`", class.name())), "{}", class.name());
        }
    }
}
