//! Reads the blocks of data that are needed, and compares them with the check values of their objects.

use std::collections::{BTreeSet, HashSet};
use std::ops::Range;

use futures::stream::{self, StreamExt, TryStreamExt};
use rangemap::RangeSet;

use super::needed::Needed;
use super::report::{Findings, Kind};
use super::{Looker, Stored, stopped};
use crate::base::control::Phase;
use crate::base::error::VolumeError;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::format::object_names::{cno_of, name_of};
use crate::index::checksums::OfIndex;
use crate::store::interceptors::window_checksums::{CheckValues, WIDE_WINDOW_BYTES};
use crate::store::sums::{self, Sums};
use crate::store::verify::{READ_BYTES, Verified};
use crate::store::{Frames, Store};

/// Requests under way at once.
const READS_AT_ONCE: usize = 16;

/// How much was read, in bytes.
#[derive(Debug, Default)]
pub(super) struct Read {
    pub verified_bytes: u64,
    pub unverified_bytes: u64,
    /// Objects without check values, by number.
    pub unchecked: BTreeSet<u64>,
}

/// A part of an object, whole windows of it as far as it reaches.
#[derive(Debug, Clone)]
struct Piece {
    object: u64,
    bytes: Range<u64>,
}

/// What came of reading a piece.
struct Outcome {
    piece: Piece,
    is_checked: bool,
    /// What cannot be used of it, and why.
    bad: Vec<(Range<u64>, Kind, String)>,
}

/// Reads everything that is needed and there.
///
/// # Errors
/// When the store fails, or the check is to stop.
pub(super) async fn read(
    looker: &Looker<'_>,
    needed: &Needed,
    stored: &Stored,
    findings: &mut Findings,
) -> Result<Read, VolumeError> {
    let pieces = pieces(needed, stored);
    let total_bytes = pieces
        .iter()
        .map(|piece| piece.bytes.end - piece.bytes.start)
        .sum();
    looker.control.begin(Phase::Checking, total_bytes);
    let outcomes = stream::iter(pieces).map(|piece| async move {
        stopped(looker.control)?;
        outcome(looker, piece).await
    });
    let mut outcomes = outcomes.buffer_unordered(READS_AT_ONCE);
    let (mut read, mut done) = (Read::default(), 0);
    while let Some(outcome) = outcomes.try_next().await? {
        let Outcome {
            piece,
            is_checked,
            bad,
        } = outcome;
        let len = piece.bytes.end - piece.bytes.start;
        done += len;
        looker.control.add_data(len);
        looker.control.settle(done);
        let bad_bytes: u64 = bad.iter().map(|(bytes, ..)| bytes.end - bytes.start).sum();
        match is_checked {
            true => read.verified_bytes += len.saturating_sub(bad_bytes),
            false => {
                read.unverified_bytes += len.saturating_sub(bad_bytes);
                read.unchecked.insert(piece.object);
            }
        }
        for (bytes, kind, reason) in bad {
            let (_, key) = looker.place(piece.object);
            findings.add_place(kind, piece.object, key, bytes, reason);
        }
    }
    Ok(read)
}

/// Puts check values of objects that have none, and that nothing is wrong with as far as that can be told. Returns how many got some.
///
/// # Errors
/// When the store fails, or the check is to stop.
pub(super) async fn add_check_values(
    looker: &Looker<'_>,
    read: &Read,
    stored: &Stored,
    findings: &mut Findings,
) -> Result<u64, VolumeError> {
    // Whatever it is: check values of damage would make the damage valid.
    let found: HashSet<String> = findings
        .found
        .iter()
        .map(|finding| finding.object.clone())
        .collect();
    let mut added = 0;
    for object in read
        .unchecked
        .iter()
        // What is inherited is another volume's to write beside.
        .filter(|object| !looker.store.lineage().inherits(cno_of(**object)))
    {
        let (_, key) = looker.place(*object);
        let Some(&len_bytes) = stored.get(object).filter(|_| !found.contains(&key)) else {
            continue;
        };
        stopped(looker.control)?;
        match add_to(looker.store, *object, len_bytes).await? {
            Added::Yes => added += 1,
            Added::Changed => {}
            Added::Damaged { bytes, reason } => {
                findings.add_place(Kind::Damaged, *object, key, bytes, reason)
            }
        }
    }
    Ok(added)
}

/// What became of an object that has no check values.
enum Added {
    Yes,
    /// It is not the same all along.
    Changed,
    /// Its index is not what earlier releases remembered of it. Without a need for it nobody has looked at it before.
    Damaged {
        bytes: Range<u64>,
        reason: String,
    },
}

/// Reads an object whole and puts its check values beside the container.
async fn add_to(store: &Store, object: u64, len_bytes: u64) -> Result<Added, VolumeError> {
    let name = &name_of(object);
    let key = store.data_key(name);
    let of_index = match OfIndex::load(store, object).await {
        Ok(of) => of,
        // Told of where what lies beside the container was read.
        Err(e) if e.kind == StoreErrorKind::Corrupt => return Ok(Added::Changed),
        Err(e) => return Err(e.into()),
    };
    let Some((first, has_mark)) = values_of(store, &key, len_bytes, &of_index).await? else {
        return Ok(Added::Changed);
    };
    let first = match first {
        Ok(first) => first,
        Err((bytes, reason)) => return Ok(Added::Damaged { bytes, reason }),
    };
    // An object that was uploaded anew lost what says which write it is, and what lies beside the container may still be of it.
    if !has_mark
        && let Some(there) = store.stored_sums(name).await?
        && (there.object_bytes, &there.values) != (first.object_bytes, &first.values)
    {
        return Ok(Added::Damaged {
            bytes: 0..len_bytes,
            reason: "it is not what the check values beside the container are of, and has lost the mark of its writer".into(),
        });
    }
    // An answer that was changed on its way would be made valid, and the object damage.
    match values_of(store, &key, len_bytes, &of_index).await? {
        Some((Ok(second), _)) if second == first => {}
        _ => return Ok(Added::Changed),
    }
    store.put_sums(name, &first).await?;
    Ok(Added::Yes)
}

/// The check values of an object, read whole, and whether it has the mark of its writer; `None` for one that is not the same all along,
/// and where and why for one whose index is damaged.
async fn values_of(
    store: &Store,
    key: &str,
    len_bytes: u64,
    of_index: &OfIndex,
) -> Result<Option<(Result<Sums, (Range<u64>, String)>, bool)>, VolumeError> {
    let starts = (0..len_bytes).step_by(READ_BYTES as usize);
    let reads = stream::iter(starts).map(|start| async move {
        let read = store
            .get_within_info(key, start, READ_BYTES.min(len_bytes - start))
            .await?;
        Ok::<_, StoreError>((start, read))
    });
    let mut reads = reads.buffered(READS_AT_ONCE);
    let mut parts = Vec::new();
    let mut write = None;
    while let Some((start, read)) = reads.try_next().await? {
        let Some((bytes, info)) = read else {
            return Ok(None);
        };
        let of = (sums::write_of(&info), sums::has_mark(&info));
        if write.get_or_insert_with(|| of.clone()) != &of || info.size_bytes != len_bytes {
            return Ok(None);
        }
        let len = bytes.len() as u64;
        if let Err(reason) = of_index.check(&info.etag, start, &bytes) {
            return Ok(Some((Err((start..start + len, reason)), of.1)));
        }
        parts.push((CheckValues::of(&Frames::take(bytes)), len));
    }
    let joined = CheckValues::joined(parts.iter().map(|(values, len)| (values, *len)));
    let (Some((values, object_bytes)), Some((write, has_mark))) = (joined, write) else {
        return Ok(None);
    };
    let sums = Sums {
        write,
        object_bytes,
        values,
    };
    Ok((object_bytes == len_bytes).then_some((Ok(sums), has_mark)))
}

/// What is read: the windows that have something of what is needed, as far as the objects reach.
fn pieces(needed: &Needed, stored: &Stored) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (&object, ranges) in &needed.data {
        let Some(&len) = stored.get(&object) else { continue };
        let window = |range: &Range<u64>| {
            let start = range.start - range.start % WIDE_WINDOW_BYTES;
            start..range.end.next_multiple_of(WIDE_WINDOW_BYTES).min(len)
        };
        let windows: RangeSet<u64> = ranges
            .iter()
            .map(window)
            .filter(|range| !range.is_empty())
            .collect();
        for run in windows.iter() {
            let starts = (run.start..run.end).step_by(READ_BYTES as usize);
            pieces.extend(starts.map(|start| Piece {
                object,
                bytes: start..run.end.min(start + READ_BYTES),
            }));
        }
    }
    pieces
}

/// Reads one piece.
async fn outcome(looker: &Looker<'_>, piece: Piece) -> Result<Outcome, VolumeError> {
    let (store, key) = looker.place(piece.object);
    let Verified { is_checked, bad } = store.verify(&key, &piece.bytes).await?;
    let bad = bad
        .into_iter()
        .map(|part| (part.bytes, Kind::from(part.wrong), part.reason));
    Ok(Outcome {
        piece,
        is_checked,
        bad: bad.collect(),
    })
}
