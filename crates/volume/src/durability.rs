//! What a successful flush promises, in words. One place for the log at start, `hypernbd info` and `--dump-plugin`.

use crate::url::VolumeUrl;

/// The durability class of a volume's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// Volume on S3, no log.
    S3,
    /// Volume in a local directory.
    LocalDirectory,
}

impl Durability {
    /// Every class, in the order of the documentation's table.
    pub const ALL: [Self; 2] = [Self::S3, Self::LocalDirectory];

    /// The class of a volume at this URL.
    pub fn of(url: &VolumeUrl) -> Self {
        match url {
            VolumeUrl::S3 { .. } => Self::S3,
            VolumeUrl::File { .. } => Self::LocalDirectory,
        }
    }

    /// Short name, fit for a key: `s3`, `file`.
    pub fn name(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::LocalDirectory => "file",
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
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_follows_the_scheme() {
        for (url, class) in [
            ("s3://bucket/vol/", Durability::S3),
            ("file:///vol/", Durability::LocalDirectory),
        ] {
            assert_eq!(Durability::of(&VolumeUrl::parse(url).unwrap()), class);
            assert!(url.starts_with(class.name()));
            assert!(class.sentence().starts_with("a flush or FUA reply means"));
        }
    }
}
