//! What a client asks for: which volume, and which state of it. Pure.

use super::{AtError, Past};
use crate::base::volume_name::{NameError, VolumeName};

/// What a client asks for by the name of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    /// The volume; `None` on a server of one.
    pub volume: Option<VolumeName>,
    /// The checkpoint, by the name that the client gave it; `None` for the volume as it is.
    pub at: Option<Past>,
}

/// There is no such export.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoExport {
    /// On a server of one volume.
    #[error("there is no such export: the volume is the one with the empty name, and {0}")]
    OfOne(AtError),
    /// On a server of many volumes, one must be named.
    #[error(
        "this server has many volumes, and the client names none: ask for one by its name, as in nbd://HOST/NAME; nbdinfo --list \
         shows them"
    )]
    Unnamed,
    /// No volume has such a name.
    #[error("there is no such export: {0}; nbdinfo --list shows what there is")]
    Name(#[from] NameError),
    /// The volume's name is followed by what names no checkpoint.
    #[error("there is no such export: {0}")]
    Past(#[from] AtError),
}

impl Export {
    /// Reads the name of an export: on a server of one volume `@AT` or nothing; on one of many `NAME`, `NAME@AT` or `NAME/@AT`.
    ///
    /// # Errors
    /// [`NoExport`]: a client that asks for something else must not get a volume.
    pub fn parse(text: &str, is_of_many: bool) -> Result<Self, NoExport> {
        if !is_of_many {
            let at = match text {
                "" => None,
                at => Some(at.parse().map_err(NoExport::OfOne)?),
            };
            return Ok(Self { volume: None, at });
        }
        let (name, at) = match text.find('@') {
            Some(begin) => {
                let (name, at) = text.split_at(begin);
                (name.strip_suffix('/').unwrap_or(name), Some(at))
            }
            None => (text, None),
        };
        if name.is_empty() {
            return Err(NoExport::Unnamed);
        }
        Ok(Self {
            volume: Some(name.parse()?),
            at: at.map(str::parse).transpose()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_volume_has_no_name() {
        assert_eq!(
            Export::parse("", false),
            Ok(Export {
                volume: None,
                at: None
            })
        );
        let at = Export::parse("@17", false).unwrap();
        assert_eq!((at.volume, at.at), (None, Some("@17".parse().unwrap())));
        for text in ["disk", "disk@17", "/", "@"] {
            assert!(
                matches!(Export::parse(text, false), Err(NoExport::OfOne(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn many_volumes_are_asked_for_by_name() {
        for (text, name, at) in [
            ("disk", "disk", None),
            ("disk@17", "disk", Some("@17")),
            ("disk/@-15m", "disk", Some("@-15m")),
            ("a.b@17..25", "a.b", Some("@17..25")),
            ("disk@monday..@friday", "disk", Some("@monday..@friday")),
        ] {
            let export = Export::parse(text, true).unwrap();
            assert_eq!(export.volume, Some(name.parse().unwrap()), "{text}");
            assert_eq!(export.at, at.map(|at| at.parse().unwrap()), "{text}");
        }
        for text in ["", "@17", "/@17"] {
            assert_eq!(Export::parse(text, true), Err(NoExport::Unnamed), "{text}");
        }
        for text in [
            "a/b", "../x", ".", "a//@17", "a.meta", "a.meta@1", "a\n", "disk@", "disk@/", "disk@a/b",
            "disk@@1",
        ] {
            assert!(Export::parse(text, true).is_err(), "{text}");
        }
    }
}
