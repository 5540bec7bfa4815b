//! Where a volume's write-ahead log (WAL) is, as parameters and the WAL marker name it.

use std::fmt;
use std::str::FromStr;

use super::url::{UrlError, VolumeUrl};

/// The word for [`WalPlace::Beside`].
const AUTO: &str = "auto";

/// The place of a volume's WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalPlace {
    /// Beside the volume's container, in the same store. Whoever copies or moves the volume takes it along, so its name says
    /// nothing of where the volume is.
    Beside,
    /// A place of its own.
    At(VolumeUrl),
}

impl WalPlace {
    /// The URL of a WAL in a place of its own.
    pub fn url(&self) -> Option<&VolumeUrl> {
        match self {
            Self::Beside => None,
            Self::At(url) => Some(url),
        }
    }
}

/// `auto`, or the URL.
impl fmt::Display for WalPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Beside => f.write_str(AUTO),
            Self::At(url) => url.fmt(f),
        }
    }
}

impl FromStr for WalPlace {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        match text {
            AUTO => Ok(Self::Beside),
            url => VolumeUrl::parse(url).map(Self::At),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_reads_back() {
        for text in ["auto", "s3://bucket/log/", "file:///srv/journal/"] {
            let place: WalPlace = text.parse().unwrap();
            assert_eq!(place.to_string(), text);
            assert_eq!(place.url().is_none(), text == "auto");
        }
        assert!("beside".parse::<WalPlace>().is_err());
    }
}
