//! Standard output and standard error, which may end before we do.

use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;

/// Writes `text` as it stands. A reader that has gone (`| head`) is no failure; a full disk is.
pub fn write(text: impl Display) -> Result<()> {
    write_to(std::io::stdout().lock(), text).context("cannot write to standard output")
}

/// The same to standard error, for what must not come into the data on standard output.
pub fn write_aside(text: impl Display) -> Result<()> {
    write_to(std::io::stderr().lock(), text).context("cannot write to standard error")
}

fn write_to(mut out: impl Write, text: impl Display) -> std::io::Result<()> {
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Writes `text` and the end of a line.
pub fn line(text: impl Display) -> Result<()> {
    write(format_args!("{text}\n"))
}

/// The time now, for people.
pub fn now() -> String {
    Timestamp::now().strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// The time now, in milliseconds since 1970-01-01 UTC; 0 when the clock is before that.
pub fn now_ms() -> u64 {
    u64::try_from(Timestamp::now().as_millisecond()).unwrap_or(0)
}

/// How long ago something was, for people: `ms` in milliseconds, in whole units.
pub fn ago(ms: u64) -> String {
    let s = ms / 1000;
    match s {
        0..120 => format!("{s} s ago"),
        120..7200 => format!("{} min ago", s / 60),
        7200..172_800 => format!("{} h ago", s / 3600),
        _ => format!("{} days ago", s / 86_400),
    }
}

/// A time in milliseconds since 1970-01-01 UTC, for people.
pub fn time(ms: u64) -> String {
    let time = i64::try_from(ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok());
    time.map_or_else(
        || "at an unknown time".to_owned(),
        // A time that is cut short would be before the checkpoint, and find the one before it.
        |time| time.strftime("%Y-%m-%d %H:%M:%S%.3f UTC").to_string(),
    )
}

/// Makes sure that the user wants it: by `is_said`, that they gave --yes, or by an answer on the terminal. `to` is what --yes is for.
///
/// # Errors
/// When there is no terminal to ask on; when the answer is another, with `nothing`, which says what was not done.
pub fn confirm(is_said: bool, question: &str, to: &str, nothing: &'static str) -> Result<()> {
    if is_said {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        bail!("there is no terminal to ask on: add --yes to {to}");
    }
    match is_answered_yes(question)? {
        true => Ok(()),
        false => bail!(nothing),
    }
}

/// Asks, and whether the answer read from standard input is "yes". The question is seen also where standard output goes to a file.
pub fn is_answered_yes(question: &str) -> Result<bool> {
    write_aside(format_args!("{question} Type yes: "))?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc_dates() {
        for (ms, expected) in [
            (0, "1970-01-01 00:00:00.000 UTC"),
            (951_782_400_000, "2000-02-29 00:00:00.000 UTC"),
            (4_107_542_400_999, "2100-03-01 00:00:00.999 UTC"),
            (u64::MAX, "at an unknown time"),
        ] {
            assert_eq!(time(ms), expected);
        }
    }

    #[test]
    fn how_long_ago_is_told_in_whole_units() {
        for (s, expected) in [
            (0, "0 s ago"),
            (119, "119 s ago"),
            (120, "2 min ago"),
            (7199, "119 min ago"),
            (7200, "2 h ago"),
            (172_800, "2 days ago"),
        ] {
            assert_eq!(ago(s * 1000 + 999), expected);
        }
    }
}
