//! Standard output, which may end before we do.

use std::fmt::Display;
use std::io::{ErrorKind, Write};

use anyhow::{Context, Result};

/// Writes `text` as it stands. A reader that has gone (`| head`) is no failure; a full disk is.
pub fn write(text: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match write!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// Writes `text` and the end of a line.
pub fn line(text: impl Display) -> Result<()> {
    write(format_args!("{text}\n"))
}

/// Asks on standard output, and whether the answer read from standard input is "yes".
pub fn is_answered_yes(question: &str) -> Result<bool> {
    write(format_args!("{question} Type yes: "))?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}
