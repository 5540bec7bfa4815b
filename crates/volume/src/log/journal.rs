//! The log in a directory of this machine: the same records, one fdatasync a group.
//!
//! ```text
//! <dir>/                flock(2) on it is held by the server that has the journal open
//! <dir>/journal.json    which volume's it is, and an identity that the volume's marker repeats
//! <dir>/NNNNNNNNNN.log  segments of 16 MiB, written full of zeros once, so that a sync later changes no metadata
//! ```
//!
//! Records stand at multiples of 4 KiB, numbered without gaps over all segments. Several may be written and synced at
//! once, each in a segment of its own: a segment is written by one at a time, and the numbers in it ascend. A segment
//! whose records are all published is written again from its start; what is left in it of before is published. So after
//! a crash only the last record of a segment can be torn; it was never acknowledged, and is not replayed. A valid record
//! behind a bad one, or behind one with a higher number, is *suspect*: left of before when it is published, else proof of
//! damage. Every file has one description and one sync at a time, so that each sync learns of its own failure.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use uuid::Uuid;

use super::journal_label::{LABEL, Label, failed, lock, make_label};
use super::record::{Group, HEADER_BYTES};
use super::replay::IN_FLIGHT_MAX;
use super::{AppendError, EncodedGroup, GroupId, LogStore};
use crate::error::VolumeError;

const SUFFIX: &str = "log";
/// Size of a segment in bytes; a group is at most a little more than half of it.
const SEGMENT_BYTES: u64 = 16 << 20;
/// Segments at most: 256 MiB.
const SEGMENTS_MAX: usize = 16;
/// Records written at once.
const APPENDS_AT_ONCE: usize = 8;
const _: () = assert!(APPENDS_AT_ONCE as u64 <= IN_FLIGHT_MAX);
/// Records start at multiples of this, in bytes: a torn record then never shares a page with a good one.
const ALIGN_BYTES: u64 = 4096;

#[derive(Debug)]
struct Segment {
    number: u64,
    file: Arc<File>,
    used_bytes: u64,
    newest_generation: u64,
    /// The highest number that a record in it has or had.
    last_sequence: u64,
    /// A record is being written.
    is_busy: bool,
    /// A write or sync failed: what is on disk is not known, so nothing more is written here.
    is_broken: bool,
}

impl Segment {
    /// Whether a record with this number may be written to it.
    fn is_writable(&self, sequence: u64) -> bool {
        !self.is_broken && !self.is_busy && self.last_sequence < sequence
    }
}

#[derive(Debug, Default)]
struct Segments {
    all: Vec<Segment>,
    /// Everything up to this generation is published.
    trimmed: u64,
    /// A segment could not be made since the last checkpoint.
    is_disk_full: bool,
}

/// Where a record is.
#[derive(Debug, Clone, Copy)]
struct Place {
    segment: u64,
    offset_bytes: u64,
    len_bytes: usize,
    is_suspect: bool,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    /// Open, and locked.
    dir: File,
    volume_id: Uuid,
    segments: Mutex<Segments>,
    /// A record was written, or not.
    appended: Condvar,
}

/// A journal.
#[derive(Debug)]
pub struct Journal {
    inner: Arc<Inner>,
    journal_id: String,
    places: BTreeMap<GroupId, Place>,
    found: Vec<GroupId>,
    first_sequence: u64,
}

impl Journal {
    /// Opens the journal in `path`, or makes one where there is nothing. `expected_id` is what the volume's marker says
    /// of an unfinished journal: then nothing is made.
    ///
    /// # Errors
    /// [`VolumeError::Journal`] when it is another one, is in use, or is corrupt.
    pub async fn open(
        path: &Path,
        volume_id: Uuid,
        expected_id: Option<String>,
    ) -> Result<Self, VolumeError> {
        let path = path.to_path_buf();
        tokio::task::spawn_blocking(move || Self::open_blocking(path, volume_id, expected_id))
            .await
            .map_err(|e| VolumeError::Internal(e.to_string()))?
    }

    fn open_blocking(path: PathBuf, volume_id: Uuid, expected: Option<String>) -> Result<Self, VolumeError> {
        let fail = |reason: String| VolumeError::Journal {
            path: path.display().to_string(),
            reason,
        };
        if expected.is_none() {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|e| failed(&path, "making the directory", &e))?;
        }
        let dir = File::open(&path).map_err(|e| failed(&path, "opening the directory", &e))?;
        lock(&path, &dir)?;
        let label = match fs::read(path.join(LABEL)) {
            Ok(text) => serde_json::from_slice::<Label>(&text).map_err(|e| fail(format!("{LABEL}: {e}")))?,
            Err(e) if e.kind() == ErrorKind::NotFound && expected.is_none() => {
                make_label(&path, &dir, volume_id).map_err(|e| failed(&path, "making the journal", &e))?
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(fail("there is no journal in it".into()));
            }
            Err(e) => return Err(failed(&path, "reading the label", &e)),
        };
        if label.volume_id != volume_id.to_string() {
            return Err(fail(format!(
                "it belongs to volume {}, this is volume {volume_id}; give each volume a journal of its own",
                label.volume_id
            )));
        }
        if expected.is_some_and(|id| id != label.journal_id) {
            return Err(fail(
                "it is not the journal that the volume was last written with".into(),
            ));
        }
        let inner = Inner {
            path,
            dir,
            volume_id,
            segments: Mutex::default(),
            appended: Condvar::new(),
        };
        let places = inner.scan()?;
        let first_sequence = places.keys().map(|id| id.sequence).max().unwrap_or(0) + 1;
        Ok(Self {
            inner: Arc::new(inner),
            journal_id: label.journal_id,
            found: places.keys().copied().collect(),
            places,
            first_sequence,
        })
    }

    /// Looks whether a journal in `path` could be opened as far as other servers go; changes nothing.
    ///
    /// # Errors
    /// [`VolumeError::Journal`] when another server has it open.
    pub async fn check_unlocked(path: &Path) -> Result<(), VolumeError> {
        let path = path.to_path_buf();
        let look = move || match File::open(&path) {
            Ok(dir) => lock(&path, &dir),
            // Whatever else is wrong the opening finds out.
            Err(_) => Ok(()),
        };
        tokio::task::spawn_blocking(look)
            .await
            .map_err(|e| VolumeError::Internal(e.to_string()))?
    }

    /// The identity that the volume's marker repeats.
    pub fn id(&self) -> &str {
        &self.journal_id
    }

    async fn blocking<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<R, VolumeError> + Send + 'static,
    ) -> Result<R, VolumeError> {
        let inner = self.inner.clone();
        tokio::task::spawn_blocking(move || work(&inner))
            .await
            .map_err(|e| VolumeError::Internal(e.to_string()))?
    }
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

    /// Finds the records, and opens the segments.
    fn scan(&self) -> Result<BTreeMap<GroupId, Place>, VolumeError> {
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
                // One that is cut short was being made when the server was killed.
                is_broken: (bytes.len() as u64) < SEGMENT_BYTES,
            });
        }
        segments.all.sort_unstable_by_key(|s| s.number);
        Ok(places)
    }

    /// Enters the valid records of a segment. Returns the highest number and the highest generation.
    fn scan_segment(
        &self,
        segment: u64,
        bytes: &Bytes,
        places: &mut BTreeMap<GroupId, Place>,
    ) -> Result<(u64, u64), VolumeError> {
        let (mut last_sequence, mut newest_generation) = (0, 0);
        let mut is_sound = true;
        let mut at = 0;
        while at + (HEADER_BYTES as u64) <= bytes.len() as u64 {
            let rest = bytes.slice(at as usize..);
            let Ok((group, len)) = Group::decode_prefix(&rest) else {
                is_sound = false;
                at += ALIGN_BYTES;
                continue;
            };
            if group.volume_id != self.volume_id {
                if is_sound {
                    return Err(self.corrupt(segment, at, "a record of another volume"));
                }
                // A part of a torn record's data looks like one.
                at += ALIGN_BYTES;
                continue;
            }
            let place = Place {
                segment,
                offset_bytes: at,
                len_bytes: len,
                is_suspect: !is_sound || group.sequence <= last_sequence,
            };
            last_sequence = last_sequence.max(group.sequence);
            newest_generation = newest_generation.max(group.newest_generation());
            let id = GroupId {
                epoch: group.epoch,
                sequence: group.sequence,
            };
            // A record that was tried again may be there twice.
            let known = places.entry(id).or_insert(place);
            if known.is_suspect {
                *known = place;
            }
            at += (len as u64).next_multiple_of(ALIGN_BYTES);
        }
        Ok((last_sequence, newest_generation))
    }

    fn append(&self, group: &EncodedGroup) -> Result<(), VolumeError> {
        let (number, file, at) = self.reserve(group)?;
        let written = file
            .write_all_at(&group.bytes, at)
            .and_then(|()| file.sync_data());
        let mut segments = self.segments.lock();
        if let Some(segment) = segments.all.iter_mut().find(|s| s.number == number) {
            segment.is_busy = false;
            // After a failed sync the kernel may hold written pages for clean: only another file can be trusted.
            segment.is_broken |= written.is_err();
        }
        self.appended.notify_all();
        written.map_err(|e| failed(&self.path, "writing a record", &e))
    }

    /// A place for a record, and the number of the segment, which is busy then.
    fn reserve(&self, group: &EncodedGroup) -> Result<(u64, Arc<File>, u64), VolumeError> {
        let padded = (group.bytes.len() as u64).next_multiple_of(ALIGN_BYTES);
        let mut segments = self.segments.lock();
        let has_room = |s: &Segment| s.used_bytes + padded <= SEGMENT_BYTES;
        let is_fit = |s: &Segment| s.is_writable(group.sequence) && has_room(s);
        let index = loop {
            if let Some(index) = segments.all.iter().position(is_fit) {
                break index;
            }
            match self.next_segment(&mut segments, group.sequence) {
                Ok(index) => break index,
                // On a small disk they follow one another.
                Err(_) if segments.all.iter().any(|s| s.is_busy && has_room(s)) => {
                    self.appended.wait(&mut segments);
                }
                Err(e) => return Err(e),
            }
        };
        let segment = &mut segments.all[index];
        let at = segment.used_bytes;
        segment.used_bytes += padded;
        segment.newest_generation = segment.newest_generation.max(group.newest_generation);
        segment.last_sequence = group.sequence;
        segment.is_busy = true;
        Ok((segment.number, segment.file.clone(), at))
    }

    /// A segment to be written from its start: one whose records are published, or a new one.
    fn next_segment(&self, segments: &mut Segments, sequence: u64) -> Result<usize, VolumeError> {
        let trimmed = segments.trimmed;
        let is_free = |s: &Segment| s.is_writable(sequence) && s.newest_generation <= trimmed;
        if let Some(free) = segments.all.iter().position(is_free) {
            let segment = &mut segments.all[free];
            segment.used_bytes = 0;
            segment.newest_generation = 0;
            return Ok(free);
        }
        if segments.all.len() >= SEGMENTS_MAX {
            let full = io::Error::other("the journal is full until the next checkpoint");
            return Err(failed(&self.path, "writing a record", &full));
        }
        if segments.is_disk_full && segments.all.iter().any(|s| s.is_busy) {
            let full = io::Error::new(ErrorKind::StorageFull, "there was no room for another segment");
            return Err(failed(&self.path, "making a segment", &full));
        }
        let number = segments.all.iter().map(|s| s.number).max().unwrap_or(0) + 1;
        let path = self.path.join(format!("{number:010}.{SUFFIX}"));
        let made = self.make_segment(&path).inspect_err(|_| {
            let _ = fs::remove_file(&path);
        });
        segments.is_disk_full = made.is_err();
        let file = made.map_err(|e| failed(&self.path, "making a segment", &e))?;
        segments.all.push(Segment {
            number,
            file: Arc::new(file),
            used_bytes: 0,
            newest_generation: 0,
            last_sequence: 0,
            is_busy: false,
            is_broken: false,
        });
        Ok(segments.all.len() - 1)
    }

    fn make_segment(&self, path: &Path) -> io::Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        let zeros = vec![0; 1 << 20];
        for at in (0..SEGMENT_BYTES).step_by(zeros.len()) {
            file.write_all_at(&zeros, at)?;
        }
        file.sync_all()?;
        self.dir.sync_all()?;
        Ok(file)
    }

    fn read(&self, place: Place) -> Result<Group, VolumeError> {
        let segments = self.segments.lock();
        let Some(segment) = segments.all.iter().find(|s| s.number == place.segment) else {
            return Err(self.corrupt(place.segment, place.offset_bytes, "the file is gone"));
        };
        let mut bytes = vec![0; place.len_bytes];
        segment
            .file
            .read_exact_at(&mut bytes, place.offset_bytes)
            .map_err(|e| failed(&self.path, "reading a record", &e))?;
        Group::decode(&bytes.into()).map_err(|e| self.corrupt(place.segment, place.offset_bytes, e))
    }

    fn remove_segments(&self) -> Result<(), VolumeError> {
        let mut segments = self.segments.lock();
        while let Some(segment) = segments.all.pop() {
            let path = self.path.join(format!("{:010}.{SUFFIX}", segment.number));
            fs::remove_file(&path).map_err(|e| failed(&self.path, "removing a segment", &e))?;
        }
        self.dir
            .sync_all()
            .map_err(|e| failed(&self.path, "removing segments", &e))
    }
}

#[async_trait]
impl LogStore for Journal {
    fn found(&self) -> &[GroupId] {
        &self.found
    }

    fn is_suspect(&self, id: GroupId) -> bool {
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

    async fn read(&self, id: GroupId) -> Result<Group, VolumeError> {
        let Some(place) = self.places.get(&id).copied() else {
            return Err(VolumeError::Internal(format!("{id:?} is not in the journal")));
        };
        self.blocking(move |inner| inner.read(place)).await
    }

    async fn append(&self, group: &EncodedGroup) -> Result<(), AppendError> {
        let group = group.clone();
        self.blocking(move |inner| inner.append(&group))
            .await
            .map_err(AppendError::Failed)
    }

    async fn trim(&self, generation: u64, _: u64) -> Result<(), VolumeError> {
        let mut segments = self.inner.segments.lock();
        segments.trimmed = segments.trimmed.max(generation);
        segments.is_disk_full = false;
        Ok(())
    }

    async fn remove_found(&self) -> Result<(), VolumeError> {
        self.blocking(Inner::remove_segments).await
    }

    /// An older server cannot be alive while the directory is locked.
    async fn clear(&self, _: bool) -> Result<(), VolumeError> {
        self.blocking(|inner| {
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
