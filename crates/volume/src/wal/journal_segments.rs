//! The segments of a journal: which record goes to which segment, and when a segment is used again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::EncodedGroup;
use super::journal::Inner;
use super::journal_label::failed;
use super::replay::IN_FLIGHT_MAX;
use crate::base::counters::JOURNAL_NUMBERS;
use crate::base::error::VolumeError;

pub(super) const SUFFIX: &str = "log";
/// Size of a segment in bytes. A record of two frozen generations and the active one can be longer; its segment is then
/// longer, too.
pub(super) const SEGMENT_BYTES: u64 = 16 << 20;
/// The highest number of segments: together they take 256 MiB.
pub(super) const SEGMENTS_MAX: usize = 16;
/// The highest number of records written at once.
pub(super) const APPENDS_AT_ONCE: usize = 8;
const _: () = assert!(APPENDS_AT_ONCE as u64 <= IN_FLIGHT_MAX);
/// Records start at multiples of this many bytes, so that a torn record never shares a page with a good one.
pub(super) const ALIGN_BYTES: u64 = 4096;

#[derive(Debug)]
pub(super) struct Segment {
    pub number: u64,
    pub file: Arc<File>,
    pub used_bytes: u64,
    pub newest_generation: u64,
    /// The highest number among the records of its present use; after the opening, among all records found in it.
    pub last_sequence: u64,
    /// A record is being written.
    pub is_busy: bool,
    /// A write or sync failed. The state of the file on disk is not known, so nothing more is written to it.
    pub is_broken: bool,
}

impl Segment {
    /// Whether a record with this number may be written to the segment.
    pub fn is_writable(&self, sequence: u64) -> bool {
        !self.is_broken && !self.is_busy && self.last_sequence < sequence
    }

    /// Whether every record in the segment is published and none is being written.
    pub fn is_published(&self, trimmed: u64) -> bool {
        !self.is_busy && self.newest_generation <= trimmed
    }
}

#[derive(Debug, Default)]
pub(super) struct Segments {
    pub all: Vec<Segment>,
    /// All generations up to this one are published.
    pub trimmed: u64,
    /// The last number up to which no record was missing at the last trim. That record stays as long as another segment
    /// can be used. After a crash it tells records that were never acknowledged from records that were acknowledged,
    /// published and overwritten.
    pub anchor: u64,
    /// The journal is being removed, so no segment may be made any more.
    pub is_closed: bool,
    /// Making a segment failed since the last checkpoint.
    pub is_disk_full: bool,
}

/// Space for a record.
pub(super) struct Reserved {
    /// Of the segment.
    pub number: u64,
    pub file: Arc<File>,
    /// In bytes.
    pub at: u64,
    /// The record before it in the segment.
    last_sequence: u64,
}

impl Inner {
    pub(super) fn append(&self, group: &EncodedGroup) -> Result<(), VolumeError> {
        let Reserved {
            number,
            file,
            at,
            last_sequence,
        } = self.reserve(group)?;
        let written = file
            .write_all_at(&group.bytes, at)
            .and_then(|()| file.sync_data());
        let mut segments = self.segments.lock();
        if let Some(segment) = segments.all.iter_mut().find(|s| s.number == number) {
            segment.is_busy = false;
            // After a failed sync the kernel may treat written pages as clean. Only another file can be trusted.
            if written.is_err() {
                segment.is_broken = true;
                // The record is not in it, so that it need not be kept for that.
                segment.last_sequence = last_sequence;
            }
        }
        self.appended.notify_all();
        written.map_err(|e| failed(&self.path, "writing a record", &e))
    }

    /// Reserves space for a record, and marks the segment as busy.
    pub(super) fn reserve(&self, group: &EncodedGroup) -> Result<Reserved, VolumeError> {
        let padded = (group.bytes.len() as u64).next_multiple_of(ALIGN_BYTES);
        let mut segments = self.segments.lock();
        let has_room = |s: &Segment| s.used_bytes + padded <= SEGMENT_BYTES;
        let is_fit = |s: &Segment| s.is_writable(group.sequence) && has_room(s);
        let index = loop {
            if segments.is_closed {
                let closed = io::Error::other("the journal is closed");
                return Err(failed(&self.path, "writing a record", &closed));
            }
            if let Some(index) = segments.all.iter().position(is_fit) {
                break index;
            }
            match self.next_segment(&mut segments) {
                Ok(index) => break index,
                // On a small disk the records are written one after another.
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
        let last_sequence = std::mem::replace(&mut segment.last_sequence, group.sequence);
        segment.is_busy = true;
        Ok(Reserved {
            number: segment.number,
            file: segment.file.clone(),
            at,
            last_sequence,
        })
    }

    /// Returns a segment that can be written from its start: one whose records are published, or a new one.
    fn next_segment(&self, segments: &mut Segments) -> Result<usize, VolumeError> {
        let (trimmed, anchor) = (segments.trimmed, segments.anchor);
        let is_free = |s: &Segment| !s.is_broken && s.is_published(trimmed);
        let index = match segments
            .all
            .iter()
            .position(|s| is_free(s) && s.last_sequence < anchor)
        {
            Some(free) => free,
            None => self
                .new_segment(segments)
                .or_else(|e| segments.all.iter().position(is_free).ok_or(e))?,
        };
        let segment = &mut segments.all[index];
        segment.used_bytes = 0;
        segment.newest_generation = 0;
        // The records left from the earlier use are published, whatever their numbers are.
        segment.last_sequence = 0;
        Ok(index)
    }

    fn new_segment(&self, segments: &mut Segments) -> Result<usize, VolumeError> {
        if segments.all.len() >= SEGMENTS_MAX {
            let full = io::Error::other("the journal is full until the next checkpoint");
            return Err(failed(&self.path, "writing a record", &full));
        }
        if segments.is_disk_full && segments.all.iter().any(|s| s.is_busy) {
            let full = io::Error::new(ErrorKind::StorageFull, "there was no room for another segment");
            return Err(failed(&self.path, "making a segment", &full));
        }
        let newest = segments.all.iter().map(|s| s.number).max().unwrap_or(0);
        let number = JOURNAL_NUMBERS.after(newest)?;
        let path = self.path_of(number);
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

    fn path_of(&self, number: u64) -> PathBuf {
        self.path.join(format!("{number:010}.{SUFFIX}"))
    }

    /// Notes that all generations up to `generation` are published, and that every record up to `acknowledged` was
    /// stored.
    pub(super) fn trim(&self, generation: u64, acknowledged: u64) {
        let mut segments = self.segments.lock();
        segments.trimmed = segments.trimmed.max(generation);
        segments.anchor = segments.anchor.max(acknowledged);
        segments.is_disk_full = false;
        let (trimmed, anchor) = (segments.trimmed, segments.anchor);
        // A broken segment is of no use any more and only takes the place of another.
        segments.all.retain(|s| {
            let is_needed = !s.is_broken || !s.is_published(trimmed) || s.last_sequence >= anchor;
            is_needed || fs::remove_file(self.path_of(s.number)).is_err()
        });
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

    pub(super) fn remove_segments(&self) -> Result<(), VolumeError> {
        let mut segments = self.segments.lock();
        while let Some(segment) = segments.all.pop() {
            fs::remove_file(self.path_of(segment.number))
                .map_err(|e| failed(&self.path, "removing a segment", &e))?;
        }
        self.dir
            .sync_all()
            .map_err(|e| failed(&self.path, "removing segments", &e))
    }
}
