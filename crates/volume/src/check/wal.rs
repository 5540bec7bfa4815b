//! The records of a volume's log, where it is on S3: all that is not published is there.

use futures::stream::{self, StreamExt};

use super::beside::Beside;
use super::checkpoints::Checkpoints;
use super::report::{Findings, Kind};
use crate::base::error::{ErrorKind, VolumeError};
use crate::meta::checkpoint_list;
use crate::meta::wal_marker::{self, MarkerState};
use crate::options::StoreOptions;
use crate::store::Store;
use crate::wal::WalStore;
use crate::wal::place::{Located, locate};
use crate::wal::replay::Replay;
use crate::wal::s3::S3Wal;

/// Looks at a log that seems wrong: a server appends to it and removes what is published.
const LOOKS_MAX: u32 = 3;
/// Records read at once; each has at most a few MiB.
const READS_AT_ONCE: usize = 16;
const ADVICE: &str = "serve the volume with its log, if that can be put back; discard_wal=yes gives up what was flushed since the last checkpoint";

/// What a look at a log came to.
enum Look {
    Fine,
    /// A server changed it meanwhile.
    Changed,
    Wrong(String),
    /// It is a journal.
    Journal,
}

/// Reads the log that the marker names, unless it was closed.
///
/// # Errors
/// When the volume's store fails. A log that is not reached is noted.
pub(super) async fn look(
    store: &Store,
    store_options: &StoreOptions,
    beside: &Beside,
    checkpoints: &Checkpoints,
    findings: &mut Findings,
) -> Result<(), VolumeError> {
    let newest = checkpoints.newest.map_or(0, |id| id.cno);
    let mut marker = beside.marker.clone();
    let mut last = None;
    for _ in 0..LOOKS_MAX {
        let Some(there) = marker.take().filter(|marker| !marker.is_clean) else {
            return Ok(());
        };
        let url = there.address(store);
        match read(store, store_options, &there, newest).await {
            Ok(Look::Fine) => return Ok(()),
            Ok(Look::Journal) => {
                findings.note(format!(
                    "the journal {url} was not looked at: the server that opens it does that"
                ));
                return Ok(());
            }
            Ok(look) => last = Some((url, look)),
            Err(e) => {
                findings.note(format!("the log {url} was not looked at: {}", e.chain()));
                return Ok(());
            }
        }
        marker = wal_marker::load(store)
            .await
            .ok()
            .flatten()
            .map(|(marker, _)| marker);
    }
    match last {
        Some((url, Look::Wrong(reason))) => {
            findings.tell(Kind::Damaged, url, reason, ADVICE);
        }
        Some((url, _)) => findings.note(format!(
            "the log {url} was not compared: a server changed it meanwhile"
        )),
        None => {}
    }
    Ok(())
}

/// Reads the records as a replay does.
async fn read(
    store: &Store,
    store_options: &StoreOptions,
    marker: &MarkerState,
    newest: u64,
) -> Result<Look, VolumeError> {
    let place = marker.place()?;
    let at = match locate(&place, store, marker.volume_id, store_options).await? {
        Located::Objects(at) => at,
        Located::Journal(_) => return Ok(Look::Journal),
    };
    let wal = match S3Wal::peek(at, marker.volume_id.as_uuid()).await {
        Err(e) if is_of_wal(&e) => return Ok(Look::Wrong(e.chain())),
        Err(e) if is_removed(&e) => return Ok(Look::Changed),
        wal => wal?,
    };
    // After the records were listed: what was removed before that is published by this.
    let published = published(store, newest).await?;
    let mut replay = Replay::new(marker.watermark.max(published));
    let reads = wal.found().to_vec().into_iter().map(|id| {
        let wal = &wal;
        async move { (id, wal.read(id).await) }
    });
    let mut reads = stream::iter(reads).buffered(READS_AT_ONCE);
    while let Some((id, group)) = reads.next().await {
        let group = match group {
            Err(e) if is_of_wal(&e) || is_removed(&e) => {
                return Ok(match wal.list().await?.contains(&id) {
                    true => Look::Wrong(e.chain()),
                    false => Look::Changed,
                });
            }
            group => group?,
        };
        if let Err(e) = replay.next(id, group) {
            return Ok(Look::Wrong(e.to_string()));
        }
    }
    Ok(Look::Fine)
}

fn is_of_wal(e: &VolumeError) -> bool {
    matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::InvalidInput)
}

/// A record was listed, and is not there any more.
fn is_removed(e: &VolumeError) -> bool {
    e.kind() == ErrorKind::NotFound
}

/// The generation up to which everything is published, by the entries from this checkpoint on.
async fn published(store: &Store, cno: u64) -> Result<u64, VolumeError> {
    let numbers = checkpoint_list::numbers_after(store, cno.saturating_sub(1)).await?;
    let mut generation = 0;
    for number in numbers {
        let entry = checkpoint_list::load_entry(store, number).await.ok().flatten();
        generation = generation.max(entry.map_or(0, |entry| entry.generation));
    }
    Ok(generation)
}
