//! The name of one volume among those below a URL.

use std::fmt;
use std::str::FromStr;

use super::url::{UrlError, VolumeUrl};

/// The longest name, in bytes: a file's, and far below what a client may ask for.
const NAME_MAX_BYTES: usize = 200;

/// The name of a volume directly below a URL: the last part of its own. It is no path, and has no `@`, which begins the name of a
/// checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VolumeName(String);

/// The text is no name of a volume.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no name of a volume: {reason}")]
pub struct NameError {
    text: String,
    reason: &'static str,
}

impl FromStr for VolumeName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let reason = match text {
            "" => "it is empty",
            "." | ".." => "it is a path",
            _ if text.len() > NAME_MAX_BYTES => "it is too long",
            _ if text.ends_with(".meta") => "such names are kept for what lies beside a volume",
            _ if text.chars().any(|c| c.is_control() || "/@?#".contains(c)) => {
                "it has none of /, @, ?, # and control characters"
            }
            _ => return Ok(Self(text.to_owned())),
        };
        Err(NameError {
            // What a client sends comes into the log.
            text: text.chars().take(NAME_MAX_BYTES).collect(),
            reason,
        })
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl VolumeName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl VolumeUrl {
    /// The URL of the volume of this name below this one.
    ///
    /// # Errors
    /// [`UrlError`] when it is too long.
    pub fn below(&self, name: &VolumeName) -> Result<Self, UrlError> {
        Self::parse(&format!("{self}{name}/"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_part_of_a_path() {
        for name in ["disk", "a", "a.b", "Größe", "with space", "..x", "meta", ".meta2"] {
            let parsed: VolumeName = name.parse().unwrap();
            assert_eq!(parsed.to_string(), name);
            for above in ["s3://bucket/all/", "file:///srv/all/"] {
                let url = VolumeUrl::parse(above).unwrap().below(&parsed).unwrap();
                assert_eq!(url.to_string(), format!("{above}{name}/"));
            }
        }
        let long = "x".repeat(NAME_MAX_BYTES + 1);
        for text in [
            "",
            ".",
            "..",
            "a/b",
            "/a",
            "a/",
            "../a",
            "a@1",
            "a?b",
            "a#b",
            "a\0",
            "\u{1b}[2J",
            "a.meta",
            &long,
        ] {
            let error = text.parse::<VolumeName>().unwrap_err().to_string();
            assert!(
                error.len() < 400 && !error.contains('\u{1b}'),
                "{text:?}: {error}"
            );
        }
    }
}
