//! The ways in which people name a checkpoint. Pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::Timestamp;

use crate::base::units::{format_duration, parse_duration};
use crate::meta::snapshots::SnapshotName;

/// The longest text that can name a checkpoint, in bytes.
const TEXT_MAX_BYTES: usize = 128;

/// A checkpoint of a volume, as a person names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum At {
    /// `@17`: the checkpoint of this number.
    Number(u64),
    /// `@2026-11-22T10:00:00Z`: the newest checkpoint published at this time or before, in milliseconds since
    /// 1970-01-01 UTC.
    Time(u64),
    /// `@-15m`: the newest checkpoint that was published this long ago or longer.
    Ago(Duration),
    /// `@NAME`: the checkpoint with this name.
    Name(SnapshotName),
}

/// An earlier state that a client may read, as the client names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Past {
    /// `@17`: a checkpoint.
    At(At),
    /// `@17..25`: the bytes that read differently at the second checkpoint than at the first, as they are at the
    /// second. Everything else is a hole.
    Changes {
        /// The first.
        from: At,
        /// The second.
        to: At,
    },
}

impl FromStr for Past {
    type Err = AtError;

    fn from_str(text: &str) -> Result<Self, AtError> {
        let Some((from, to)) = text.split_once("..") else {
            return text.parse().map(Self::At);
        };
        let to = format!("@{}", to.strip_prefix('@').unwrap_or(to));
        match (parse(from), parse(&to)) {
            (Some(from), Some(to)) => Ok(Self::Changes { from, to }),
            _ => Err(AtError::new(text)),
        }
    }
}

impl fmt::Display for Past {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(at) => at.fmt(f),
            Self::Changes { from, to } => write!(f, "{from}..{to}"),
        }
    }
}

/// The text names no checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} names no checkpoint: write @ and a number, a time as in @2026-11-22T10:00:00Z or @-15m, or a snapshot's name"
)]
pub struct AtError {
    text: String,
}

impl FromStr for At {
    type Err = AtError;

    fn from_str(text: &str) -> Result<Self, AtError> {
        parse(text).ok_or_else(|| AtError::new(text))
    }
}

impl AtError {
    fn new(text: &str) -> Self {
        Self {
            text: text.chars().take(TEXT_MAX_BYTES).collect(),
        }
    }
}

fn parse(text: &str) -> Option<At> {
    if text.len() > TEXT_MAX_BYTES {
        return None;
    }
    let word = text.strip_prefix('@')?;
    if let Some(ago) = word.strip_prefix('-') {
        return parse_duration(ago).ok().map(At::Ago);
    }
    if !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit()) {
        return word.parse().ok().map(At::Number);
    }
    if let Ok(time) = word.parse::<Timestamp>() {
        return u64::try_from(time.as_millisecond()).ok().map(At::Time);
    }
    word.parse().ok().map(At::Name)
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => write!(f, "@{number}"),
            Self::Time(ms) => match Timestamp::from_millisecond(i64::try_from(*ms).unwrap_or(i64::MAX)) {
                Ok(time) => write!(f, "@{time}"),
                Err(_) => write!(f, "@{ms} ms"),
            },
            Self::Ago(ago) => write!(f, "@-{}", format_duration(*ago)),
            Self::Name(name) => write!(f, "@{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_read_and_shown_as_it_was_written() {
        for (text, at) in [
            ("@17", At::Number(17)),
            ("@-15m", At::Ago(Duration::from_secs(900))),
            ("@2026-11-22T10:00:00Z", At::Time(1_795_341_600_000)),
            ("@before-update.2", At::Name("before-update.2".parse().unwrap())),
        ] {
            assert_eq!(text.parse::<At>(), Ok(at.clone()), "{text}");
            assert_eq!(at.to_string(), text);
        }
        assert_eq!(
            "@2026-11-22T12:00:00+02:00".parse(),
            Ok(At::Time(1_795_341_600_000))
        );
    }

    #[test]
    fn a_difference_has_two_checkpoints() {
        let changes = |from: &str, to: &str| {
            let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
            Past::Changes { from, to }
        };
        assert_eq!("@17..25".parse(), Ok(changes("@17", "@25")));
        assert_eq!("@monday..@-0s".parse(), Ok(changes("@monday", "@-0s")));
        assert_eq!(changes("@a.1", "@b").to_string(), "@a.1..@b");
        assert_eq!("@17".parse(), Ok(Past::At(At::Number(17))));
        for text in ["17..25", "@17..", "@..17", "@1..2..3", "@..", ".."] {
            assert!(text.parse::<Past>().is_err(), "{text}");
        }
    }

    #[test]
    fn what_names_no_checkpoint_is_refused_in_few_words() {
        let long = format!("@{}", "x".repeat(65536));
        for text in [
            "",
            "@",
            "17",
            "@-",
            "@-x",
            "@../x",
            "@a/b",
            "@99999999999999999999999",
            "@\u{1b}[2J",
            "@-99999999999999999999h",
            "@1969-01-01T00:00:00Z",
            &long,
        ] {
            let error = text.parse::<At>().unwrap_err().to_string();
            assert!(
                error.len() < 1000 && !error.contains('\u{1b}'),
                "{text:?}: {error}"
            );
        }
    }
}
