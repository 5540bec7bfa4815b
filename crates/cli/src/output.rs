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
}
