//! The public face of a volume: what an NBD server needs of a block device, at byte granularity.
//!
//! The methods block the calling thread. They may be called from any number of threads in any order, but not from the
//! runtime's own threads. Requests that need no I/O (writes into the buffer, reads of buffered bytes) never leave the
//! caller's thread.

use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::try_join_all;
use log::warn;
use tokio::runtime::Handle;

use crate::base::checkpoint_id::NewestCheckpoint;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::geometry::Geometry;
use crate::buffer_file::{Kept, NoRoom};
use crate::checkpoint::appender::DriverWal;
use crate::checkpoint::handle::{Driver, DriverConfig};
use crate::compaction;
use crate::engine::Engine;
use crate::flatten;
use crate::lease::Lease;
use crate::meta::checkpoint_list::{Catalogue, NoRecorder, Recorder};
use crate::metrics::Metrics;
use crate::open::recover_wal::OpenWal;
use crate::options::VolumeOptions;
use crate::retention::{Keeper, Reading};
use crate::scrub;
use crate::store::Store;
use crate::wal::LOG_BULK_BYTES;
use crate::write_buffer::backlog::Backlog;
use crate::write_buffer::generation::{RANGE_BYTES, buffered_block_bytes};
use crate::write_buffer::overlay::{Change, Overlay};
use crate::write_buffer::policy::BufferPolicy;

mod growing;
mod opening;
mod past;
mod restore;
pub(crate) mod status;
mod upkeep;

/// The wait before a failed read is tried again. It doubles each time, up to [`READ_RETRY_WAIT_MAX`].
const READ_RETRY_WAIT: Duration = Duration::from_millis(100);
const READ_RETRY_WAIT_MAX: Duration = Duration::from_secs(3);
/// How often a read finds something missing, damaged or not permitted before it fails. Bytes may be damaged on their way, and
/// a new permission takes a moment to reach all of a store.
const SETTLED_READS_MAX: u32 = 4;
/// The least time for ending threads, even when the last checkpoint took all the given time.
const CLOSE_LEAST: Duration = Duration::from_secs(1);
/// The least time for giving back the lease at a clean end, with a second attempt: otherwise the next server waits until it runs out.
const RELEASE_LEAST: Duration = Duration::from_secs(5);

/// The kind of a run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data.
    Data,
    /// Zeroed, not yet published.
    Zero,
    /// Never written, or trimmed: reads as zeros and takes no space.
    Hole,
}

/// A run of bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts, in bytes from the volume's start.
    pub offset_bytes: u64,
    /// Its length in bytes, never 0.
    pub len_bytes: u64,
    /// Its kind.
    pub kind: ExtentKind,
}

/// The parts of an open volume besides its engine.
#[derive(Default)]
pub struct Parts {
    /// Called for every publish, if there is one.
    pub recorder: Option<Arc<dyn Recorder>>,
    /// The WAL, if there is one. It must have been replayed.
    pub wal: Option<DriverWal>,
    /// The number of the first generation. It is higher than every number used before.
    pub first_generation: u64,
    /// Where it is counted what the volume does.
    pub metrics: Metrics,
    /// The generation that the newest checkpoint's record has.
    pub recorded_generation: u64,
}

/// An open volume.
pub struct Volume {
    overlay: Arc<Overlay>,
    engine: Arc<dyn Engine>,
    driver: Driver,
    catalogue: Option<Arc<Catalogue>>,
    lease: Option<Arc<Lease>>,
    wal: Option<OpenWal>,
    /// The buffer file, in which changes survive this process.
    kept: OnceLock<Arc<Kept>>,
    /// The store of the volume, which is left clean at the close.
    store: Option<Store>,
    /// Removes checkpoints that are not kept.
    retention: Option<Keeper>,
    /// See [`Self::retention_grace`].
    retention_grace: Duration,
    /// What copies what is live out of objects that are mostly dead.
    compaction: Option<compaction::Keeper>,
    /// What ends the sharing of a clone.
    flatten: Option<flatten::Keeper>,
    /// What reads everything once an interval, to find damage.
    scrub: Option<scrub::Keeper>,
    /// What keeps the checkpoint that is read.
    reading: Reading,
    /// The newest checkpoint that is published and recorded.
    newest: NewestCheckpoint,
    /// See [`Self::identity`].
    identity: Option<String>,
    metrics: Metrics,
    write_buffer_bytes: u64,
    runtime: Handle,
    io_timeout: Duration,
    is_read_only: bool,
    is_closed: AtomicBool,
}

impl Volume {
    /// A volume on top of any engine, on the current runtime.
    pub fn over(engine: Arc<dyn Engine>, recorder: Arc<dyn Recorder>, options: &VolumeOptions) -> Self {
        let parts = Parts {
            recorder: Some(recorder),
            ..Parts::default()
        };
        Self::with_parts(engine, parts, options)
    }

    /// A volume on top of any engine, with these parts, on the current runtime.
    pub fn with_parts(engine: Arc<dyn Engine>, parts: Parts, options: &VolumeOptions) -> Self {
        let geometry = engine.geometry();
        let overlay = Arc::new(match &parts.wal {
            Some(_) => Overlay::with_wal(geometry, LOG_BULK_BYTES),
            None => Overlay::new(geometry),
        });
        let config = DriverConfig {
            checkpoint_interval: options.checkpoint_interval,
            io_timeout: options.io_timeout,
            buffer: BufferPolicy::new(options.write_buffer_bytes),
            first_generation: parts.first_generation.max(1),
            recorded_generation: parts.recorded_generation,
            wal: parts.wal,
            metrics: parts.metrics.clone(),
        };
        let recorder = parts.recorder.unwrap_or_else(|| Arc::new(NoRecorder));
        let driver = Driver::start(overlay.clone(), engine.clone(), recorder, config);
        Self {
            overlay,
            engine,
            driver,
            catalogue: None,
            lease: None,
            wal: None,
            kept: OnceLock::new(),
            store: None,
            retention: None,
            retention_grace: options.retention_grace,
            compaction: None,
            flatten: None,
            scrub: None,
            reading: Reading::default(),
            newest: NewestCheckpoint::default(),
            identity: None,
            metrics: parts.metrics,
            write_buffer_bytes: options.write_buffer_bytes,
            runtime: Handle::current(),
            io_timeout: options.io_timeout,
            is_read_only: options.read_only,
            is_closed: AtomicBool::new(false),
        }
    }

    fn geometry(&self) -> Geometry {
        self.overlay.geometry()
    }

    /// Size in bytes. It may grow while the volume is open.
    pub fn size_bytes(&self) -> u64 {
        self.geometry().size_bytes()
    }

    /// Size of a data block in bytes.
    pub fn block_size_bytes(&self) -> u32 {
        self.geometry().block_size()
    }

    /// Fills `out` with the bytes at `offset_bytes`.
    ///
    /// # Errors
    /// A failing store is retried for `io_timeout`; then [`VolumeError::Timeout`]. Data that is missing or damaged is
    /// read a few times, because it may be damaged only on its way; then [`VolumeError::Corrupt`]. So is what the store
    /// says may not be read.
    pub fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        self.check_range(offset_bytes, out.len() as u64)?;
        let missing = self.overlay.read(offset_bytes, out);
        if missing.is_empty() {
            return Ok(());
        }
        self.check_open()?;
        self.engine.note_read(offset_bytes, out.len() as u64);
        let mut pieces = Vec::with_capacity(missing.len());
        let mut rest = out;
        let mut at = offset_bytes;
        for range in missing {
            let (_, from) = rest.split_at_mut((range.start - at) as usize);
            let (piece, after) = from.split_at_mut((range.end - range.start) as usize);
            if !self.engine.read_at_once(range.start, piece) {
                pieces.push(self.read_published(range.start, piece));
            }
            (rest, at) = (after, range.end);
        }
        if pieces.is_empty() {
            return Ok(());
        }
        self.runtime.block_on(try_join_all(pieces)).map(|_| ())
    }

    async fn read_published(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        self.tried("read", offset_bytes, async || {
            self.engine.read(offset_bytes, out).await
        })
        .await
    }

    /// Does what reads published state, again and again where it fails, for as long as a request may take.
    async fn tried<T>(
        &self,
        operation: &'static str,
        offset_bytes: u64,
        mut attempt: impl AsyncFnMut() -> Result<T, VolumeError>,
    ) -> Result<T, VolumeError> {
        let mut last = String::from("none, the store is slow");
        let tries = async {
            let (mut wait, mut settled) = (READ_RETRY_WAIT, 0);
            loop {
                let e = match attempt().await {
                    Ok(done) => return Ok(done),
                    Err(e) => e,
                };
                last = e.chain();
                let is_damage = matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound);
                settled += u32::from(is_damage || e.kind() == ErrorKind::AccessDenied);
                if settled == SETTLED_READS_MAX {
                    if is_damage {
                        self.metrics.damage.reads.one();
                    }
                    return Err(e);
                }
                log::debug!("a {operation} is tried again: {last}");
                // The random factor keeps many readers that wait for the same store from retrying at the same moment.
                tokio::time::sleep(wait.mul_f64(fastrand::f64() + 0.5)).await;
                wait = (wait * 2).min(READ_RETRY_WAIT_MAX);
            }
        };
        let tried = tokio::time::timeout(self.io_timeout, tries).await;
        match tried {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(e)) => {
                warn!("a {operation} at {offset_bytes} failed: {}", e.chain());
                Err(e)
            }
            Err(_) => {
                warn!("a {operation} at {offset_bytes} failed: {last}");
                Err(VolumeError::Timeout {
                    operation,
                    waited: self.io_timeout,
                    last,
                })
            }
        }
    }

    /// Writes `data` at `offset_bytes`. Every reader sees it when this returns. With `fua` it is also durable then.
    ///
    /// # Errors
    /// [`VolumeError::BufferFull`] when the store has accepted nothing for `io_timeout`, [`VolumeError::Fenced`].
    pub fn write(&self, offset_bytes: u64, data: &[u8], fua: bool) -> Result<(), VolumeError> {
        self.check_range(offset_bytes, data.len() as u64)?;
        let blocks = self.geometry().touched_blocks(offset_bytes, data.len() as u64);
        // Two partly written ends add a range each; or a zeroed run is split, which adds one.
        let most_bytes =
            (blocks.end - blocks.start) * (buffered_block_bytes(self.geometry()) + RANGE_BYTES) + RANGE_BYTES;
        self.change(most_bytes, fua, Change::Write { offset_bytes, data })
    }

    /// Zeroes every byte of the range (NBD write-zeroes). The cost depends on the mapped blocks and not on the length.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn zero(&self, offset_bytes: u64, len_bytes: u64, fua: bool) -> Result<(), VolumeError> {
        self.check_range(offset_bytes, len_bytes)?;
        // The two ends of the range may be partial blocks.
        let most_bytes = 2 * (buffered_block_bytes(self.geometry()) + RANGE_BYTES) + RANGE_BYTES;
        self.change(
            most_bytes,
            fua,
            Change::Zero {
                offset_bytes,
                len_bytes,
            },
        )
    }

    /// Drops the whole blocks of the range, which then read as zeros, and leaves the rest as it is (NBD trim).
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn trim(&self, offset_bytes: u64, len_bytes: u64, fua: bool) -> Result<(), VolumeError> {
        self.check_range(offset_bytes, len_bytes)?;
        self.change(
            RANGE_BYTES,
            fua,
            Change::Trim {
                offset_bytes,
                len_bytes,
            },
        )
    }

    /// Makes a change that buffers at most `most_bytes`.
    fn change(&self, most_bytes: u64, fua: bool, change: Change<'_>) -> Result<(), VolumeError> {
        if self.is_read_only {
            return Err(VolumeError::ReadOnly);
        }
        self.check_open()?;
        self.driver.check_fenced()?;
        self.engine.check_write()?;
        let (buffered, stored) = loop {
            let reserved = self.driver.wait_for_room(most_bytes)?;
            let taken = self.overlay.take_in(change);
            drop(reserved);
            let kept = self.kept.get();
            match taken {
                Ok((buffered, ticket)) => {
                    if ticket.is_half_full {
                        self.driver.checkpoint_soon();
                    }
                    let stored = kept.map_or(Ok(()), |kept| kept.store(ticket, change.data()));
                    break (buffered, stored);
                }
                Err(NoRoom) => {
                    let len_bytes = change.data().len() as u64;
                    let has_room = || kept.is_none_or(|kept| kept.has_room(len_bytes));
                    self.driver.wait_for_kept_room(has_room)?;
                }
            }
        };
        self.driver.buffered(buffered);
        stored?;
        if fua { self.flush() } else { Ok(()) }
    }

    /// Returns once every write that was answered before the call is durable.
    ///
    /// # Errors
    /// [`VolumeError::Timeout`] after `io_timeout`: the data is kept, and the next flush covers it again.
    pub fn flush(&self) -> Result<(), VolumeError> {
        if self.is_read_only {
            return Ok(());
        }
        self.check_open()?;
        if self.overlay.total_bytes() > 0 {
            self.engine.check_publish()?;
        }
        self.runtime.block_on(self.driver.flush())
    }

    /// Returns once every write replied to before the call is in a checkpoint, with a log too.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub fn publish(&self) -> Result<(), VolumeError> {
        if self.is_read_only {
            return Ok(());
        }
        self.check_open()?;
        if self.overlay.total_bytes() > 0 {
            self.engine.check_publish()?;
        }
        self.runtime.block_on(self.driver.publish_all())
    }

    /// Generations that are begun from now on are published at this age.
    pub fn set_checkpoint_interval(&self, interval: Duration) {
        self.driver.set_checkpoint_interval(interval);
    }

    /// Brings the range into the read cache, or as much of it as may take its room at once (NBD cache).
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn prefetch(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), VolumeError> {
        self.check_range(offset_bytes, len_bytes)?;
        self.check_open()?;
        if len_bytes == 0 {
            return Ok(());
        }
        self.runtime
            .block_on(self.tried("prefetch", offset_bytes, async || {
                self.engine.prefetch(offset_bytes, len_bytes).await
            }))
    }

    /// The extents from `offset_bytes` on: at least one, contiguous, none reaching past the range. They may end before
    /// the range when finding out more would take long. With `one_only` there is exactly one.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn extents(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        one_only: bool,
    ) -> Result<Vec<Extent>, VolumeError> {
        self.check_range(offset_bytes, len_bytes)?;
        self.check_open()?;
        let blocks = self.geometry().touched_blocks(offset_bytes, len_bytes);
        if blocks.is_empty() {
            return Ok(Vec::new());
        }
        // The unpublished state is read first: a publish in between moves blocks to the published state, which is read
        // second.
        let unpublished = self.overlay.block_runs(blocks.clone());
        let published = match self.engine.block_runs_at_once(blocks.clone()) {
            Some(published) => published,
            None => {
                let look = self.tried("look at what is mapped", offset_bytes, async || {
                    self.engine.block_runs(blocks.clone()).await
                });
                self.runtime.block_on(look)?
            }
        };
        let known_end = published.last().map_or(blocks.start, |(run, _)| run.end);
        let mut kinds = rangemap::RangeMap::new();
        for (run, is_data) in published {
            kinds.insert(
                run,
                if is_data {
                    ExtentKind::Data
                } else {
                    ExtentKind::Hole
                },
            );
        }
        for (run, is_data) in unpublished {
            let run = run.start..run.end.min(known_end);
            if !run.is_empty() {
                kinds.insert(
                    run,
                    if is_data {
                        ExtentKind::Data
                    } else {
                        ExtentKind::Zero
                    },
                );
            }
        }
        let block_size = u64::from(self.geometry().block_size());
        let end = offset_bytes + len_bytes;
        let extents = kinds.into_iter().map(|(run, kind)| {
            let start = (run.start * block_size).max(offset_bytes);
            let until = (run.end * block_size).min(end);
            Extent {
                offset_bytes: start,
                len_bytes: until - start,
                kind,
            }
        });
        Ok(extents.take(if one_only { 1 } else { usize::MAX }).collect())
    }

    /// The file in which answered and unpublished changes survive this process, if there is one.
    pub fn kept_in(&self) -> Option<&Path> {
        self.kept.get().and_then(|kept| kept.kept_in())
    }

    /// What is counted of it.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// How far durability is behind.
    pub fn backlog(&self) -> Backlog {
        self.driver.backlog()
    }

    /// Asks for a checkpoint of what is unpublished now, in the background. If nothing is unpublished, later writes are
    /// not published any sooner because of it.
    pub fn checkpoint_soon(&self) {
        if self.overlay.is_active_dirty() {
            self.driver.checkpoint_soon();
        }
    }

    /// Publishes everything unpublished and stops the volume's threads, in at most about `timeout`. Only the first call
    /// has an effect.
    ///
    /// # Errors
    /// When not everything could be published. Writes that no flush had covered are then lost.
    pub fn close(&self, timeout: Duration) -> Result<(), VolumeError> {
        self.end(timeout, true)
    }

    /// As [`Self::close`], but publishes nothing: what is unpublished may be half of what belongs together.
    pub(super) fn close_unpublished(&self, timeout: Duration) {
        // The result only says that nothing was published.
        let _ = self.end(timeout, false);
    }

    fn end(&self, timeout: Duration, publishes: bool) -> Result<(), VolumeError> {
        if self.is_closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        if let Some(scrub) = &self.scrub {
            scrub.stop();
        }
        if let Some(flatten) = &self.flatten {
            flatten.stop();
        }
        if let Some(compaction) = &self.compaction {
            compaction.stop();
        }
        if let Some(retention) = &self.retention {
            retention.stop();
        }
        self.runtime.block_on(async {
            let until = tokio::time::Instant::now() + timeout;
            let flushed = match (self.is_read_only, publishes) {
                (true, _) => Ok(()),
                (false, true) => self.publish_last(until, timeout).await,
                (false, false) => Err(VolumeError::Closed),
            };
            let stopped = async {
                let last_generation = self.driver.stop().await;
                self.finish_wal(last_generation.filter(|_| flushed.is_ok())).await;
                if let Some(kept) = self.kept.get()
                    && flushed.is_ok()
                    && self.overlay.is_empty()
                {
                    kept.close();
                }
                if let Some(catalogue) = &self.catalogue {
                    catalogue.finish().await;
                }
                let is_settled = self.engine.close().await;
                self.reading.end().await;
                is_settled
            };
            // The owner thread may be in the middle of a publish that hangs.
            let until = until.max(tokio::time::Instant::now() + CLOSE_LEAST);
            let stopped = tokio::time::timeout_at(until, stopped).await;
            let (is_stopped, is_settled) = (stopped.is_ok(), stopped.unwrap_or(false));
            if !is_stopped {
                warn!("a publish still waits for the store; it is left unfinished");
            }
            if let Some(lease) = &self.lease {
                // A failed publish or relocation may still be in flight to the store. It must not take effect under a new owner
                // that trusts this one to have ended cleanly.
                let is_all_published = flushed.is_ok() && self.overlay.is_empty();
                let is_file_needed = self.kept.get().is_some() && !is_all_published;
                let is_clean = flushed.is_ok() && is_settled && !is_file_needed;
                let released = lease.release_leaving(is_clean, is_file_needed);
                let until = match is_clean {
                    true => until.max(tokio::time::Instant::now() + RELEASE_LEAST),
                    false => until,
                };
                if tokio::time::timeout_at(until, released).await.is_err() {
                    warn!(
                        "the lease could not be released; on another machine it is in force until it runs out"
                    );
                }
            }
            if !is_stopped {
                self.engine.abandon().await;
            }
            if let Some(store) = &self.store {
                store.end_changes().await;
            }
            flushed
        })
    }

    /// Publishes everything before the end. The time counts from the last step of a publish, as it does for a flush: on a slow line the
    /// last checkpoint takes long, and does not fail.
    async fn publish_last(
        &self,
        mut until: tokio::time::Instant,
        timeout: Duration,
    ) -> Result<(), VolumeError> {
        let mut published = pin!(self.driver.publish_all());
        loop {
            if let Ok(published) = tokio::time::timeout_at(until, &mut published).await {
                return published;
            }
            let later = self.overlay.last_progress().map(|at| at + timeout);
            match later.filter(|later| *later > until) {
                Some(later) => until = later,
                None => {
                    return Err(VolumeError::Timeout {
                        operation: "the last checkpoint",
                        waited: timeout,
                        last: "the time given for closing ran out".to_owned(),
                    });
                }
            }
        }
    }

    /// Ends the WAL cleanly, but only when no record in it is needed any more.
    async fn finish_wal(&self, last_generation: Option<u64>) {
        let (Some(wal), Some(generation)) = (&self.wal, last_generation) else {
            return;
        };
        // A write that was accepted while the last checkpoint was made may have been flushed to the WAL.
        if !self.overlay.is_empty() || self.driver.check_fenced().is_err() {
            warn!("the write-ahead log is left as it is; the next opening replays it");
            return;
        }
        let is_older_alive = self.lease.as_ref().is_some_and(|lease| lease.older_may_run());
        if let Err(e) = wal.finish(generation, is_older_alive).await {
            warn!(
                "everything is published, but the write-ahead log could not be marked as ended; the next opening looks at it once more: {}",
                e.chain()
            );
        }
    }

    fn check_range(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), VolumeError> {
        if self.geometry().contains(offset_bytes, len_bytes) {
            return Ok(());
        }
        Err(VolumeError::OutOfRange {
            offset_bytes,
            len_bytes,
            size_bytes: self.geometry().size_bytes(),
        })
    }

    fn check_open(&self) -> Result<(), VolumeError> {
        if self.is_closed.load(Ordering::Acquire) {
            Err(VolumeError::Closed)
        } else {
            Ok(())
        }
    }
}

impl Drop for Volume {
    /// Dropping without close keeps the stored lease; only this process may retake it at once.
    fn drop(&mut self) {
        if let Some(lease) = &self.lease {
            lease.forget();
        }
    }
}
