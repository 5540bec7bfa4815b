//! Reads the blocks of data that are needed, and compares them with the check values of their objects.

use std::collections::BTreeSet;
use std::ops::Range;

use futures::stream::{self, StreamExt, TryStreamExt};
use rangemap::RangeSet;

use super::needed::Needed;
use super::report::{Findings, Kind};
use super::{Looker, Stored, stopped};
use crate::base::control::Phase;
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::format::object_names::{cno_of, name_of};
use crate::store::interceptors::window_checksums::{
    CheckValues, WIDE_WINDOW_BYTES, WINDOW_BYTES, has_checksums,
};
use crate::store::sums::{self, Sums};
use crate::store::{Frames, Store};

/// Bytes read with one request, whole windows.
const READ_BYTES: u64 = 32 * WIDE_WINDOW_BYTES;
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
    findings: &Findings,
) -> Result<u64, VolumeError> {
    let mut added = 0;
    for object in read
        .unchecked
        .iter()
        .filter(|object| !findings.bad.contains_key(*object))
        // What is inherited is another volume's to write beside.
        .filter(|object| !looker.store.lineage().inherits(cno_of(**object)))
    {
        let Some(&len_bytes) = stored.get(object) else {
            continue;
        };
        stopped(looker.control)?;
        added += u64::from(add_to(looker.store, &name_of(*object), len_bytes).await?);
    }
    Ok(added)
}

/// Reads an object whole and puts its check values beside the container. `false` when it is not the same all along.
async fn add_to(store: &Store, name: &str, len_bytes: u64) -> Result<bool, VolumeError> {
    let key = store.data_key(name);
    let starts = (0..len_bytes).step_by(READ_BYTES as usize);
    let reads = stream::iter(starts).map(|start| {
        let key = &key;
        async move {
            store
                .get_within_info(key, start, READ_BYTES.min(len_bytes - start))
                .await
        }
    });
    let mut reads = reads.buffered(READS_AT_ONCE);
    let mut parts = Vec::new();
    let mut write = None;
    while let Some(read) = reads.try_next().await? {
        let Some((bytes, info)) = read else {
            return Ok(false);
        };
        let of = sums::write_of(&info);
        if write.get_or_insert_with(|| of.clone()) != &of || info.size_bytes != len_bytes {
            return Ok(false);
        }
        let len = bytes.len() as u64;
        parts.push((CheckValues::of(&Frames::take(bytes)), len));
    }
    let joined = CheckValues::joined(parts.iter().map(|(values, len)| (values, *len)));
    let (Some((values, object_bytes)), Some(write)) = (joined, write) else {
        return Ok(false);
    };
    if object_bytes != len_bytes {
        return Ok(false);
    }
    let sums = Sums {
        write,
        object_bytes,
        values,
    };
    store.put_sums(name, &sums).await?;
    Ok(true)
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

/// Reads one piece; where something is wrong with it, window by window.
async fn outcome(looker: &Looker<'_>, piece: Piece) -> Result<Outcome, VolumeError> {
    let (is_checked, reason) = attempt(looker, piece.object, &piece.bytes).await?;
    let mut bad = Vec::new();
    // Objects of earlier releases have wide windows.
    for window_bytes in [WINDOW_BYTES, WIDE_WINDOW_BYTES] {
        if reason.is_none() || !bad.is_empty() {
            break;
        }
        for start in piece.bytes.clone().step_by(window_bytes as usize) {
            let window = start..piece.bytes.end.min(start + window_bytes);
            if let (_, Some((kind, reason))) = attempt(looker, piece.object, &window).await? {
                bad.push((window, kind, reason));
            }
        }
    }
    Ok(Outcome {
        piece,
        is_checked,
        bad: merged(bad),
    })
}

/// What is wrong with a range of an object, and whether it has check values.
async fn attempt(
    looker: &Looker<'_>,
    object: u64,
    bytes: &Range<u64>,
) -> Result<(bool, Option<(Kind, String)>), VolumeError> {
    let (store, key) = looker.place(object);
    match store
        .get_within_info(&key, bytes.start, bytes.end - bytes.start)
        .await
    {
        Ok(Some((got, info))) => {
            let is_whole = got.len() as u64 == bytes.end - bytes.start;
            let short = || {
                (
                    Kind::Short,
                    format!("it ends within the bytes {} to {}", bytes.start, bytes.end - 1),
                )
            };
            let is_checked = has_checksums(&info) || store.sums_of(&key, &info).await?.is_some();
            Ok((is_checked, (!is_whole).then(short)))
        }
        Ok(None) => Ok((false, Some((Kind::Missing, "it is not there".to_owned())))),
        Err(e) if e.kind == StoreErrorKind::Corrupt => Ok((true, Some((Kind::Damaged, e.detail)))),
        Err(e) => Err(e.into()),
    }
}

/// Neighbours that are damaged in one way as one.
fn merged(bad: Vec<(Range<u64>, Kind, String)>) -> Vec<(Range<u64>, Kind, String)> {
    let mut all: Vec<(Range<u64>, Kind, String)> = Vec::new();
    for (bytes, kind, reason) in bad {
        match all.last_mut() {
            Some((before, as_before, _)) if before.end == bytes.start && *as_before == kind => {
                before.end = bytes.end;
            }
            _ => all.push((bytes, kind, reason)),
        }
    }
    all
}
