//! The WAL in a local directory: the same records, with one fdatasync each.
//!
//! ```text
//! <dir>/                flock(2) on it, and on the label, is held by the server that has the journal open
//! <dir>/journal.json    which volume's it is, and an identity that the volume's marker repeats
//! <dir>/NNNNNNNNNN.log  segments of 16 MiB, written full of zeros once, so that a sync later changes no metadata
//! ```
//!
//! Records start at multiples of 4 KiB and are numbered without gaps over all segments. Several records may be written
//! and synced at once, each in a segment of its own: a segment has one writer at a time, and the numbers in it ascend.
//! A segment whose records are all published is written again from its start; whatever it still holds from its earlier
//! use is published. So after a crash only the last record of a segment can be torn, and that record was never
//! acknowledged and is not replayed. A valid record behind a damaged one, or behind one with a higher number, is
//! *suspect*: if it is published, it is left over from an earlier use of the segment; if it is not, it proves damage.
//! Each file has a single open file description and one sync at a time, so that each sync sees its own failure.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::journal_label::{Claimed, LABEL, check_claimable, check_is, claim, failed};
use super::journal_segments::{
    ALIGN_BYTES, APPENDS_AT_ONCE, SEGMENT_BYTES, SEGMENTS_MAX, SUFFIX, Segment, Segments,
};
use super::record::{HEADER_BYTES, Record, RecordError};
use super::{AppendError, EncodedGroup, RecordId, WalStore};
use crate::base::counters::JOURNAL_NUMBERS;
use crate::base::error::VolumeError;
use crate::base::volume_id::VolumeId;
use crate::disk::{Disk, RealDisk};

/// Where a record is.
#[derive(Debug, Clone, Copy)]
struct RecordPlace {
    segment: u64,
    offset_bytes: u64,
    len_bytes: usize,
    is_suspect: bool,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub path: PathBuf,
    /// Open, and locked.
    pub dir: File,
    /// Stays locked for the lifetime of this value.
    _label: File,
    volume_id: Uuid,
    pub segments: Mutex<Segments>,
    /// Signals that the write of a record ended, with or without success.
    pub appended: Condvar,
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    inner: Arc<Inner>,
    journal_id: String,
    places: BTreeMap<RecordId, RecordPlace>,
    found: Vec<RecordId>,
    first_sequence: u64,
}

impl Journal {
    /// Opens the journal in `path`, or makes one where there is none. `expected_id` is the identity that the WAL marker
    /// gives for an unfinished journal; with it no journal is made.
    ///
    /// # Errors
    /// [`VolumeError::Journal`] when it is another journal, is in use, or is corrupt.
    pub async fn open(
        path: &Path,
        volume_id: Uuid,
        expected_id: Option<String>,
    ) -> Result<Self, VolumeError> {
        let path = path.to_path_buf();
        off_runtime(move || Self::open_blocking(path, volume_id, expected_id, &RealDisk)).await
    }

    fn open_blocking(
        path: PathBuf,
        volume_id: Uuid,
        expected: Option<String>,
        disk: &dyn Disk,
    ) -> Result<Self, VolumeError> {
        let Claimed {
            dir,
            label_file,
            journal_id,
        } = claim(&path, VolumeId::from_uuid(volume_id), expected.as_deref(), disk)?;
        let inner = Inner {
            path,
            dir,
            _label: label_file,
            volume_id,
            segments: Mutex::default(),
            appended: Condvar::new(),
        };
        let places = inner.scan()?;
        let last_sequence = places.keys().map(|id| id.sequence).max().unwrap_or(0);
        let first_sequence = JOURNAL_NUMBERS.after(last_sequence)?;
        Ok(Self {
            inner: Arc::new(inner),
            journal_id,
            found: places.keys().copied().collect(),
            places,
            first_sequence,
        })
    }

    /// Checks whether other servers and the file system would let a journal in `path` be opened. Changes nothing.
    ///
    /// # Errors
    /// [`VolumeError::Journal`] when another server has the journal open, or when its file system is not fit for a
    /// journal.
    pub async fn check_claimable(path: &Path) -> Result<(), VolumeError> {
        let path = path.to_path_buf();
        off_runtime(move || check_claimable(&path, &RealDisk)).await
    }

    /// Checks, without changing anything, whether the journal with this id is there.
    ///
    /// # Errors
    /// [`VolumeError::Journal`] when it is not.
    pub async fn check_is(path: &Path, journal_id: String) -> Result<(), VolumeError> {
        let path = path.to_path_buf();
        off_runtime(move || check_is(&path, &journal_id)).await
    }

    /// The identity that the WAL marker repeats.
    pub fn id(&self) -> &str {
        &self.journal_id
    }

    async fn blocking<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<R, VolumeError> + Send + 'static,
    ) -> Result<R, VolumeError> {
        let inner = self.inner.clone();
        off_runtime(move || work(&inner)).await
    }
}

/// Does what blocks on a thread of its own.
async fn off_runtime<R: Send + 'static>(
    work: impl FnOnce() -> Result<R, VolumeError> + Send + 'static,
) -> Result<R, VolumeError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| VolumeError::Internal(e.to_string()))?
}

impl Inner {
    fn corrupt(&self, segment: u64, offset_bytes: u64, reason: impl ToString) -> VolumeError {
        VolumeError::Corrupt {
            what: format!(
                "the journal {}/{segment:010}.{SUFFIX} at byte {offset_bytes}",
                self.path.display()
            ),
            reason: reason.to_string(),
        }
    }

    /// Finds the records and opens the segments.
    fn scan(&self) -> Result<BTreeMap<RecordId, RecordPlace>, VolumeError> {
        let fail = |e: io::Error| failed(&self.path, "reading the journal", &e);
        let mut places = BTreeMap::new();
        let mut segments = self.segments.lock();
        for entry in fs::read_dir(&self.path).map_err(fail)? {
            let path = entry.map_err(fail)?.path();
            let is_segment = path.extension().is_some_and(|e| e == SUFFIX);
            let number = path.file_stem().and_then(|s| s.to_str()?.parse().ok());
            let (true, Some(number)) = (is_segment, number) else {
                continue;
            };
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .open(&path)
                .map_err(fail)?;
            let bytes = Bytes::from(fs::read(&path).map_err(fail)?);
            let (last_sequence, newest_generation) = self.scan_segment(number, &bytes, &mut places)?;
            segments.all.push(Segment {
                number,
                file: Arc::new(file),
                used_bytes: SEGMENT_BYTES,
                newest_generation,
                last_sequence,
                is_busy: false,
                // A segment that is too short belongs to a server that was killed while it made the segment.
                is_broken: (bytes.len() as u64) < SEGMENT_BYTES,
            });
        }
        segments.all.sort_unstable_by_key(|s| s.number);
        Ok(places)
    }

    /// Adds the valid records of a segment to `places`. Returns the highest number and the highest generation.
    fn scan_segment(
        &self,
        segment: u64,
        bytes: &Bytes,
        places: &mut BTreeMap<RecordId, RecordPlace>,
    ) -> Result<(u64, u64), VolumeError> {
        let (mut last_sequence, mut newest_generation) = (0, 0);
        let mut is_sound = true;
        let mut at = 0;
        while at + (HEADER_BYTES as u64) <= bytes.len() as u64 {
            let rest = bytes.slice(at as usize..);
            let (group, len) = match Record::decode_prefix(&rest) {
                Ok(found) => found,
                Err(e @ RecordError::Version(_)) if is_sound => {
                    return Err(self.corrupt(segment, at, e));
                }
                Err(_) => {
                    is_sound = false;
                    at += ALIGN_BYTES;
                    continue;
                }
            };
            if group.volume_id != self.volume_id {
                if is_sound {
                    return Err(self.corrupt(segment, at, "a record of another volume"));
                }
                // Part of a torn record's data may look like a header.
                at += ALIGN_BYTES;
                continue;
            }
            let place = RecordPlace {
                segment,
                offset_bytes: at,
                len_bytes: len,
                is_suspect: !is_sound || group.sequence <= last_sequence,
            };
            last_sequence = last_sequence.max(group.sequence);
            newest_generation = newest_generation.max(group.newest_generation());
            let id = RecordId {
                epoch: group.epoch,
                sequence: group.sequence,
            };
            // A record whose write was repeated may be there twice.
            let known = places.entry(id).or_insert(place);
            if known.is_suspect {
                *known = place;
            }
            at += (len as u64).next_multiple_of(ALIGN_BYTES);
        }
        Ok((last_sequence, newest_generation))
    }

    fn read(&self, place: RecordPlace) -> Result<Record, VolumeError> {
        let segments = self.segments.lock();
        let Some(segment) = segments.all.iter().find(|s| s.number == place.segment) else {
            return Err(self.corrupt(place.segment, place.offset_bytes, "the file is gone"));
        };
        let mut bytes = vec![0; place.len_bytes];
        segment
            .file
            .read_exact_at(&mut bytes, place.offset_bytes)
            .map_err(|e| failed(&self.path, "reading a record", &e))?;
        Record::decode(&bytes.into()).map_err(|e| self.corrupt(place.segment, place.offset_bytes, e))
    }
}

#[async_trait]
impl WalStore for Journal {
    fn found(&self) -> &[RecordId] {
        &self.found
    }

    fn is_suspect(&self, id: RecordId) -> bool {
        self.places.get(&id).is_some_and(|place| place.is_suspect)
    }

    fn first_sequence(&self) -> u64 {
        self.first_sequence
    }

    fn depth(&self) -> usize {
        APPENDS_AT_ONCE
    }

    fn stored_bytes(&self, len_bytes: u64) -> u64 {
        len_bytes.next_multiple_of(ALIGN_BYTES)
    }

    fn capacity_bytes(&self) -> u64 {
        // Segments are not filled to the end.
        SEGMENT_BYTES * SEGMENTS_MAX as u64 / 4 * 3
    }

    async fn read(&self, id: RecordId) -> Result<Record, VolumeError> {
        let Some(place) = self.places.get(&id).copied() else {
            return Err(VolumeError::Internal(format!(
                "record {id} is not in the journal"
            )));
        };
        self.blocking(move |inner| inner.read(place)).await
    }

    async fn append(&self, group: &EncodedGroup) -> Result<(), AppendError> {
        let group = group.clone();
        self.blocking(move |inner| inner.append(&group))
            .await
            .map_err(AppendError::Failed)
    }

    async fn trim(&self, generation: u64, acknowledged: u64) -> Result<(), VolumeError> {
        // Another thread may hold the lock while it makes a segment.
        self.blocking(move |inner| {
            inner.trim(generation, acknowledged);
            Ok(())
        })
        .await
    }

    async fn remove_found(&self) -> Result<(), VolumeError> {
        self.blocking(Inner::remove_segments).await
    }

    /// An older server cannot be alive while the directory is locked.
    async fn clear(&self, _: bool) -> Result<(), VolumeError> {
        self.blocking(|inner| {
            inner.segments.lock().is_closed = true;
            inner.appended.notify_all();
            inner.remove_segments()?;
            fs::remove_file(inner.path.join(LABEL))
                .map_err(|e| failed(&inner.path, "removing the label", &e))?;
            inner
                .dir
                .sync_all()
                .map_err(|e| failed(&inner.path, "removing the label", &e))
        })
        .await
    }
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
