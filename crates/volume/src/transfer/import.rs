//! An import: an image or a pipe, into a volume that is made for it or overwritten.
//!
//! Nothing is written before everything was checked that can be. From the first byte on a note lies beside the volume
//! ([`ImportRecord`]), which is brought up to what was flushed, and says at the end that what was published was read again and is the same.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use log::warn;
use serde::Serialize;
use tokio::runtime::Handle;

use super::begin::{Written, begin, remove};
use super::export::{open_state, verify};
use super::{Control, Copied, Copy, Pace, Phase, Source, Target, TransferError, VolumeImage, copy};
use crate::admin::VolumeInfo;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::units::format_size;
use crate::base::url::VolumeUrl;
use crate::meta::import_record::{FileId, ImportRecord};
use crate::options::{LeaseOptions, StoreOptions};

/// Parts that are read and written at once: enough to read while others are checksummed and wait for room in the write buffer.
const PARTS_AT_ONCE: usize = 8;
/// How often what was written is flushed and noted.
const NOTE_INTERVAL: Duration = Duration::from_secs(5);
/// How long the end of a volume's use may take, and how long where the store failed already.
pub(super) const CLOSE_MAX: Duration = Duration::from_secs(60);
const CLOSE_FAILED_MAX: Duration = Duration::from_secs(5);

/// What is imported.
pub struct Input<'a> {
    /// Where its bytes come from.
    pub source: Source<'a>,
    /// The file that it lies in, and what tells that it is still the same; nothing of a pipe.
    pub file: Option<(PathBuf, FileId)>,
}

impl Input<'_> {
    pub(super) fn size_bytes(&self) -> Option<u64> {
        match &self.source {
            Source::Image(image) => Some(image.size_bytes()),
            Source::Pipe(_) => None,
        }
    }
}

/// How it is imported.
#[derive(Debug)]
pub struct Request<'a> {
    /// Where the volume is, or is made.
    pub url: &'a VolumeUrl,
    /// How its store is reached.
    pub store_options: &'a StoreOptions,
    /// Size of the volume that is made, in bytes; that of the image, where it is not given.
    pub size_bytes: Option<u64>,
    /// Size of its blocks.
    pub block_size_bytes: Option<u32>,
    /// Whether a volume that is there may be written to.
    pub overwrites: bool,
    /// Whether what was published is read again.
    pub verifies: bool,
    /// How the lease is taken.
    pub lease: LeaseOptions,
    /// A limit to the rate.
    pub pace: Option<&'a Pace>,
}

/// What an import did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Imported {
    /// Size of the volume in bytes.
    pub bytes: u64,
    /// Bytes of the image that are data.
    pub data_bytes: u64,
    /// Its checksum.
    pub checksum: String,
    /// Time that it took, in seconds.
    pub seconds: f64,
    /// Where it went on after an interruption, in bytes; 0 otherwise.
    pub resumed_bytes: u64,
    /// What was published was read again, and is the same.
    pub is_verified: bool,
    /// What came out of a pipe, in bytes: the rest of the volume reads as zeros. None of an image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub piped_bytes: Option<u64>,
}

/// Imports. The volume is not held by anybody afterwards.
///
/// # Errors
/// Before anything is written when something is in the way. Later [`TransferError::Unfinished`], which says what is left: a state that
/// the same import goes on from, or nothing.
pub fn import(
    input: Input<'_>,
    request: &Request<'_>,
    control: &Control,
    runtime: &Handle,
) -> Result<Imported, TransferError> {
    let started = Instant::now();
    let target = runtime.block_on(begin(&input, request))?;
    let (resumed_bytes, size_bytes) = (target.record.written_bytes, target.volume.size_bytes());
    let file = input.file.clone();
    let mut work = Work {
        target,
        request,
        control,
        runtime,
        can_resume: true,
        is_stored: false,
        noted_bytes: AtomicU64::new(resumed_bytes),
    };
    let done = work.run(input, file.as_ref());
    match done {
        Ok(copied) => Ok(Imported {
            bytes: size_bytes,
            data_bytes: copied.data_bytes,
            checksum: copied.checksum,
            seconds: started.elapsed().as_secs_f64(),
            resumed_bytes,
            is_verified: request.verifies,
            piped_bytes: copied.piped_bytes,
        }),
        Err(cause) => {
            let left = work.leave(&cause);
            Err(TransferError::Unfinished {
                cause: Box::new(cause),
                left,
            })
        }
    }
}

/// An import that has begun to write.
struct Work<'a> {
    target: Written,
    request: &'a Request<'a>,
    control: &'a Control,
    runtime: &'a Handle,
    /// What was written is of the source as it is.
    can_resume: bool,
    /// All of it is in the volume and was flushed.
    is_stored: bool,
    /// What the note says that was written.
    noted_bytes: AtomicU64,
}

impl Work<'_> {
    fn run(&mut self, input: Input<'_>, file: Option<&(PathBuf, FileId)>) -> Result<Copied, TransferError> {
        let size_bytes = self.target.volume.size_bytes();
        if let Some(image) = input.size_bytes().filter(|image| *image > size_bytes) {
            return Err(TransferError::Refused(format!(
                "the volume was made smaller meanwhile: it has {size_bytes} bytes, and the image {image}"
            )));
        }
        let copied = self.copy(input.source, size_bytes);
        let settled_bytes = match &copied {
            Ok(_) => size_bytes,
            Err(_) => self.control.settled_bytes(),
        };
        self.target.record.written_bytes = self.target.record.written_bytes.max(settled_bytes);
        let copied = copied?;
        if let Some((path, id)) = file {
            let now = std::fs::metadata(path)
                .map_err(|e| TransferError::io(format!("cannot look at {}", path.display()), e))?;
            if FileId::new(path, id.size_bytes, &now) != *id {
                self.can_resume = false;
                return Err(TransferError::Refused(format!(
                    "{} was changed while it was read, so what was read is no state that it ever had: stop whatever writes to \
                     it",
                    path.display()
                )));
            }
        }
        self.target.volume.flush()?;
        self.is_stored = true;
        if self.request.verifies {
            self.verify(&copied)?;
        }
        let finished = self.target.record.clone().finish(&self.target.store);
        self.runtime.block_on(finished)?;
        // Everything is published: this gives the lease back.
        if let Err(e) = self.target.volume.close(CLOSE_MAX) {
            warn!(
                "the import is complete, but the volume could not be closed cleanly: {}",
                e.chain()
            );
        }
        Ok(copied)
    }

    /// Copies, and notes from time to time what was flushed.
    fn copy(&self, source: Source<'_>, size_bytes: u64) -> Result<Copied, TransferError> {
        let volume = &self.target.volume;
        let image = VolumeImage::new(volume.clone());
        let job = Copy {
            source,
            target: Target::Image {
                image: &image,
                is_blank: self.target.is_blank,
            },
            size_bytes,
            written_bytes: self.target.record.written_bytes,
            zero_unit_bytes: volume.block_size_bytes().into(),
            threads: PARTS_AT_ONCE,
            pace: self.request.pace,
            phase: Phase::Copying,
        };
        let (ended, end) = mpsc::channel::<()>();
        std::thread::scope(|scope| {
            if self.target.record.source.is_some() {
                scope.spawn(|| self.note_until(end));
            }
            let copied = copy(job, self.control);
            drop(ended);
            copied
        })
    }

    /// Flushes and notes what was written, until the other end of the channel goes.
    fn note_until(&self, end: mpsc::Receiver<()>) {
        let mut record = self.target.record.clone();
        while end.recv_timeout(NOTE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            // Everything before it is answered, and so what the flush covers.
            let settled_bytes = self.control.settled_bytes();
            if settled_bytes <= record.written_bytes {
                continue;
            }
            record.written_bytes = settled_bytes;
            if let Err(e) = self.flush_and_note(&record) {
                // What fails for good fails the copy, too.
                warn!("the progress of the import could not be stored: {}", e.chain());
            }
        }
    }

    fn flush_and_note(&self, record: &ImportRecord) -> Result<(), VolumeError> {
        self.target.volume.flush()?;
        self.runtime.block_on(record.put(&self.target.store))?;
        self.noted_bytes.store(record.written_bytes, Ordering::Release);
        Ok(())
    }

    /// Reads what was published, from the store, while nobody else can write to it.
    fn verify(&mut self, copied: &Copied) -> Result<(), TransferError> {
        let Request {
            url, store_options, ..
        } = self.request;
        let published = open_state(&self.target.store, store_options, None);
        let published = self.runtime.block_on(published)?;
        let image = VolumeImage::new(published.volume.clone());
        let size_bytes = self.target.volume.size_bytes();
        let verified = verify(
            &url.to_string(),
            &image,
            size_bytes,
            &copied.checksum,
            self.control,
        );
        let _ = published.volume.close(CLOSE_MAX);
        if let Err(TransferError::Differs { .. }) = verified {
            self.can_resume = false;
        }
        verified
    }

    /// Ends an import that has come to its end, and could not be verified. Its source may be gone.
    fn leave_whole(&self) -> String {
        let (record, store) = (self.target.record.clone(), &self.target.store);
        let can_go_on = record.source.is_some();
        let noted = self.runtime.block_on(async {
            match can_go_on {
                true => record.put(store).await,
                false => record.finish(store).await,
            }
        });
        if let Err(e) = noted {
            warn!(
                "that the import has come to its end could not be stored: {}",
                e.chain()
            );
        }
        let _ = self.target.volume.close(CLOSE_FAILED_MAX);
        let url = self.request.url;
        match can_go_on {
            true => format!("{url} is whole, and was not verified: the same command, run again, does that"),
            false => format!("{url} is whole, and was not verified"),
        }
    }

    /// Ends an import that failed, so that it can be taken up or nothing is left of it. Says which.
    fn leave(&self, cause: &TransferError) -> String {
        let url = self.request.url;
        let half = format!("{url} is half written");
        if let TransferError::Volume(e) = cause
            && e.kind() == ErrorKind::Fenced
        {
            let _ = self.target.volume.close(CLOSE_FAILED_MAX);
            return format!("{half}, and held by another server");
        }
        if self.is_stored && self.can_resume {
            return self.leave_whole();
        }
        // A store that failed for so long that the volume gave up takes no more now.
        let has_failed = matches!(cause, TransferError::Volume(_));
        let close_max = if has_failed { CLOSE_FAILED_MAX } else { CLOSE_MAX };
        let mut record = self.target.record.clone();
        if has_failed {
            record.written_bytes = self.noted_bytes.load(Ordering::Acquire);
        }
        if !self.can_resume || record.source.is_none() {
            record.written_bytes = 0;
        }
        if record.written_bytes == 0 && record.is_new {
            let _ = self.target.volume.close(close_max);
            let is_ours = |info: &VolumeInfo| {
                let lease = info.lease.as_ref();
                lease.is_some_and(|lease| lease.epoch == record.epoch)
            };
            return match self.runtime.block_on(remove(self.request, is_ours)) {
                Ok(()) => format!("the volume that was made for it was removed: nothing is at {url}"),
                Err(e) => format!(
                    "{half}, and could not be removed ({}): hypernbd delete {url}",
                    e.chain()
                ),
            };
        }
        if !has_failed && let Err(e) = self.flush_and_note(&record) {
            warn!("the progress of the import could not be stored: {}", e.chain());
        }
        // What matters is what was noted.
        let _ = self.target.volume.close(close_max);
        format!(
            "{half}: the same command, run again, goes on after {} of it",
            format_size(self.noted_bytes.load(Ordering::Acquire))
        )
    }
}
