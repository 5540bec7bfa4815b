//! The usage table of the retention, against a count of its own.

use super::Looker;
use super::beside::Beside;
use super::report::{Findings, Kind};
use crate::base::error::{ErrorKind, VolumeError};
use crate::retention::{TableCheck, check_table};

/// Differences told of, at most.
const TOLD_MAX: usize = 3;
/// Counts, where a server stores another table meanwhile.
const COUNTS_MAX: u32 = 3;

/// Counts what the table says, where there is one.
///
/// # Errors
/// When the store fails.
pub(super) async fn look(
    looker: &Looker<'_>,
    beside: &Beside,
    findings: &mut Findings,
) -> Result<(), VolumeError> {
    if beside.usage.is_none() {
        return Ok(());
    }
    if looker.checkpoints.newest.is_none() {
        findings.note("the usage table was not compared: the inode cannot be read");
        return Ok(());
    }
    for _ in 0..COUNTS_MAX {
        match check_table(looker.store, looker.cache).await {
            Ok(TableCheck::Same) => return Ok(()),
            Ok(TableCheck::Changed) => {}
            Ok(TableCheck::OtherHistory) => {
                findings.note("the usage table is of another history than the volume, and is made anew by the next round of the retention");
                return Ok(());
            }
            Ok(TableCheck::Different { key, differences }) => {
                let more = differences.len().saturating_sub(TOLD_MAX);
                let mut told = differences;
                told.truncate(TOLD_MAX);
                let more = match more {
                    0 => String::new(),
                    more => format!(", and {more} more"),
                };
                findings.tell(
                    Kind::Contradiction,
                    key,
                    format!(
                        "it does not say what the checkpoints need: {}{more}",
                        told.join("; ")
                    ),
                    "stop the server, delete the table, and start it again: it is counted anew; until then \
                     nothing should be removed (hypernbd retention unset)",
                );
                return Ok(());
            }
            // Told of where the index was read.
            Err(e)
                if e.kind() == ErrorKind::Corrupt
                    || e.kind() == ErrorKind::Store && has_bad_index(findings) =>
            {
                findings.note("the usage table was not compared: what it is counted from cannot be read");
                return Ok(());
            }
            Err(e) => return Err(e),
        }
    }
    findings.note("the usage table was not compared: a server stored others meanwhile");
    Ok(())
}

fn has_bad_index(findings: &Findings) -> bool {
    !findings.bad_nodes.is_empty() || !findings.bad.is_empty()
}
