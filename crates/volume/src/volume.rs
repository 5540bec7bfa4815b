//! The public face of a volume: what an NBD server asks of a block device, at byte granularity.
//!
//! The methods block the calling thread and may be called from any number of threads in any order, but not from the
//! runtime's own. Requests that need no I/O (writes into the buffer, reads of buffered bytes) never leave the caller's
//! thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::try_join_all;
use log::{info, warn};
use tokio::runtime::Handle;

use crate::admin::{self, label};
use crate::catalogue::{self, Catalogue, NoRecorder, Recorder, Watermarks};
use crate::engine::Engine;
use crate::engine::hyper::HyperEngine;
use crate::engine::index_cache::IndexCache;
use crate::error::VolumeError;
use crate::geometry::Geometry;
use crate::log::open::{self as log_open, OpenLog, ReplayOptions};
use crate::log::{LOG_BULK_BYTES, marker};
use crate::options::{StoreOptions, VolumeOptions};
use crate::store;
use crate::url::VolumeUrl;
use crate::writeback::appender::DriverLog;
use crate::writeback::backlog::Backlog;
use crate::writeback::driver::{Driver, DriverConfig};
use crate::writeback::generation::buffered_block_bytes;
use crate::writeback::overlay::{Buffered, Overlay};

/// Wait before a failed read is tried again; doubled each time up to [`READ_RETRY_WAIT_MAX`].
const READ_RETRY_WAIT: Duration = Duration::from_millis(100);
const READ_RETRY_WAIT_MAX: Duration = Duration::from_secs(3);
/// Time for ending threads, even when all the time given went into the last checkpoint.
const CLOSE_LEAST: Duration = Duration::from_secs(1);
/// The epoch of a volume without a lease.
const EPOCH: u64 = 1;

/// What a run of bytes is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data.
    Data,
    /// Zeroed, not yet published.
    Zero,
    /// Never written, or dropped: reads as zeros and takes no space.
    Hole,
}

/// A run of bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts, in bytes from the volume's start.
    pub offset_bytes: u64,
    /// Its length in bytes, never 0.
    pub len_bytes: u64,
    /// What it is.
    pub kind: ExtentKind,
}

/// What an open volume works with besides its engine.
#[derive(Default)]
pub struct Parts {
    /// Told of every publish; nobody when `None`.
    pub recorder: Option<Arc<dyn Recorder>>,
    /// The log, if there is one. It must be replayed already.
    pub log: Option<DriverLog>,
    /// The number of the first generation: above every one used before.
    pub first_generation: u64,
}

/// An open volume.
pub struct Volume {
    geometry: Geometry,
    overlay: Arc<Overlay>,
    engine: Arc<dyn Engine>,
    driver: Driver,
    catalogue: Option<Arc<Catalogue>>,
    log: Option<OpenLog>,
    runtime: Handle,
    io_timeout: Duration,
    is_read_only: bool,
    is_closed: AtomicBool,
}

impl Volume {
    /// Opens the volume at `url`. Must be called on a multi-thread runtime, which must outlive the volume.
    ///
    /// # Errors
    /// [`VolumeError::NotFound`] when there is none; nothing is ever created by an open.
    pub async fn open(
        url: &VolumeUrl,
        store_options: &StoreOptions,
        options: &VolumeOptions,
    ) -> Result<Arc<Self>, VolumeError> {
        let store = store::connect(url, store_options).await?;
        // A label is made only for a volume that is there: opening must not leave anything at a mistyped URL.
        admin::info_of(&store).await?;
        let label = if options.read_only {
            label::load(&store).await?
        } else {
            Some(label::ensure(&store).await?)
        };
        let volume_id = label.map(|l| l.volume_id);
        let index_cache = match (&options.node_cache, &volume_id) {
            (Some(config), Some(id)) => IndexCache::open(config, id)
                .await
                .map_err(|e| VolumeError::InvalidInput(format!("node_cache_config cannot be used: {e}")))?,
            _ => IndexCache::default(),
        };
        let begun = match &volume_id {
            Some(volume_id) if !options.read_only => {
                log_open::begin(&log_open::Request {
                    store: &store,
                    volume_id,
                    store_options,
                    url: options.wal_url.as_ref(),
                    is_discard_allowed: options.discard_wal,
                    epoch: EPOCH,
                })
                .await?
            }
            _ => {
                warn_of_log(&store).await;
                log_open::Begun::default()
            }
        };
        let (engine, state) = HyperEngine::open(&store, index_cache, options.read_only).await?;
        let geometry = engine.geometry();
        info!(
            "opened {url}: {} bytes in blocks of {}, checkpoint {}, volume {}{}",
            geometry.size_bytes(),
            geometry.block_size(),
            state.newest.cno,
            volume_id.as_deref().unwrap_or("without a label"),
            if options.read_only { ", read-only" } else { "" }
        );
        let mut parts = Parts::default();
        let mut catalogue = None;
        if !options.read_only {
            let taken_up = catalogue::take_up(&store, state.newest, state.modified_ms, EPOCH).await;
            let recorded = match (taken_up, &begun.log) {
                (Err(e), None) => {
                    warn!(
                        "checkpoint {} is not in the catalogue: {}",
                        state.newest.cno,
                        e.chain()
                    );
                    0
                }
                // The watermark of the log: without it nobody knows what to replay.
                (taken_up, _) => taken_up?,
            };
            let mut generation = recorded.max(begun.least_watermark);
            if let (Some(log), Some(volume_id)) = (&begun.log, &volume_id) {
                let recorder = Watermarks::new(store.clone(), EPOCH, log.marker.clone());
                let replay_options = ReplayOptions {
                    write_buffer_bytes: options.write_buffer_bytes,
                    io_timeout: options.io_timeout,
                };
                generation = log.replay(&engine, &recorder, generation, &replay_options).await?;
                log.store.trim(generation, log.store.first_sequence() - 1).await?;
                parts.recorder = Some(Arc::new(recorder));
                parts.log = Some(DriverLog {
                    store: log.store.clone(),
                    volume_id: log_open::parse_volume_id(volume_id)?,
                    epoch: EPOCH,
                });
            } else {
                let started = Catalogue::start(store.clone(), EPOCH);
                parts.recorder = Some(started.clone());
                catalogue = Some(started);
            }
            // An older owner may have used two more than it recorded.
            parts.first_generation = generation + 3;
        }
        let mut volume = Self::with_parts(Arc::new(engine), parts, options);
        volume.catalogue = catalogue;
        volume.log = begun.log;
        Ok(Arc::new(volume))
    }

    /// A volume over any engine, on the current runtime.
    pub fn over(engine: Arc<dyn Engine>, recorder: Arc<dyn Recorder>, options: &VolumeOptions) -> Self {
        let parts = Parts {
            recorder: Some(recorder),
            ..Parts::default()
        };
        Self::with_parts(engine, parts, options)
    }

    /// A volume over any engine and with these parts, on the current runtime.
    pub fn with_parts(engine: Arc<dyn Engine>, parts: Parts, options: &VolumeOptions) -> Self {
        let geometry = engine.geometry();
        let overlay = Arc::new(match &parts.log {
            Some(_) => Overlay::with_log(geometry, LOG_BULK_BYTES),
            None => Overlay::new(geometry),
        });
        let config = DriverConfig {
            checkpoint_interval: options.checkpoint_interval,
            io_timeout: options.io_timeout,
            write_buffer_bytes: options.write_buffer_bytes,
            first_generation: parts.first_generation.max(1),
            log: parts.log,
        };
        let recorder = parts.recorder.unwrap_or_else(|| Arc::new(NoRecorder));
        let driver = Driver::start(overlay.clone(), engine.clone(), recorder, config);
        Self {
            geometry,
            overlay,
            engine,
            driver,
            catalogue: None,
            log: None,
            runtime: Handle::current(),
            io_timeout: options.io_timeout,
            is_read_only: options.read_only,
            is_closed: AtomicBool::new(false),
        }
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.geometry.size_bytes()
    }

    /// Size of a data block in bytes.
    pub fn block_size_bytes(&self) -> u32 {
        self.geometry.block_size()
    }

    /// Fills `out` with the bytes at `offset_bytes`.
    ///
    /// # Errors
    /// A failing store is tried again for `io_timeout`, then [`VolumeError::Timeout`].
    pub fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        self.check_range(offset_bytes, out.len() as u64)?;
        let missing = self.overlay.read(offset_bytes, out);
        if missing.is_empty() {
            return Ok(());
        }
        self.check_open()?;
        let mut pieces = Vec::with_capacity(missing.len());
        let mut rest = out;
        let mut at = offset_bytes;
        for range in missing {
            let (_, from) = rest.split_at_mut((range.start - at) as usize);
            let (piece, after) = from.split_at_mut((range.end - range.start) as usize);
            pieces.push(self.read_published(range.start, piece));
            (rest, at) = (after, range.end);
        }
        self.runtime.block_on(try_join_all(pieces)).map(|_| ())
    }

    async fn read_published(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        let mut last = String::from("none, the store is slow");
        let tries = async {
            let mut wait = READ_RETRY_WAIT;
            while let Err(e) = self.engine.read(offset_bytes, out).await {
                last = e.chain();
                log::debug!("a read is tried again: {last}");
                tokio::time::sleep(wait).await;
                wait = (wait * 2).min(READ_RETRY_WAIT_MAX);
            }
        };
        match tokio::time::timeout(self.io_timeout, tries).await {
            Ok(()) => Ok(()),
            Err(_) => {
                warn!("a read at {offset_bytes} failed: {last}");
                Err(VolumeError::Timeout {
                    operation: "read",
                    waited: self.io_timeout,
                    last,
                })
            }
        }
    }

    /// Writes `data` at `offset_bytes`; visible to every reader when this returns, durable too when `fua`.
    ///
    /// # Errors
    /// [`VolumeError::BufferFull`] when the store has taken nothing for `io_timeout`, [`VolumeError::Fenced`].
    pub fn write(&self, offset_bytes: u64, data: &[u8], fua: bool) -> Result<(), VolumeError> {
        self.check_range(offset_bytes, data.len() as u64)?;
        let blocks = self.geometry.touched_blocks(offset_bytes, data.len() as u64);
        let most_bytes = (blocks.end - blocks.start) * buffered_block_bytes(self.geometry);
        self.change(most_bytes, fua, || self.overlay.write(offset_bytes, data))
    }

    /// Zeroes every byte of the range (NBD write-zeroes). Costs by what is mapped, not by the length.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn zero(&self, offset_bytes: u64, len_bytes: u64, fua: bool) -> Result<(), VolumeError> {
        self.check_range(offset_bytes, len_bytes)?;
        // The two ends.
        let most_bytes = 2 * buffered_block_bytes(self.geometry);
        self.change(most_bytes, fua, || self.overlay.zero(offset_bytes, len_bytes))
    }

    /// Drops the whole blocks of the range, which then read as zeros; leaves the rest as it is (NBD trim).
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn trim(&self, offset_bytes: u64, len_bytes: u64, fua: bool) -> Result<(), VolumeError> {
        self.check_range(offset_bytes, len_bytes)?;
        self.change(0, fua, || self.overlay.trim(offset_bytes, len_bytes))
    }

    /// Makes a change that buffers at most `most_bytes`.
    fn change(
        &self,
        most_bytes: u64,
        fua: bool,
        apply: impl FnOnce() -> Buffered,
    ) -> Result<(), VolumeError> {
        if self.is_read_only {
            return Err(VolumeError::ReadOnly);
        }
        self.check_open()?;
        self.driver.check_fenced()?;
        let reserved = self.driver.wait_for_room(most_bytes)?;
        let buffered = apply();
        drop(reserved);
        self.driver.buffered(buffered);
        if fua { self.flush() } else { Ok(()) }
    }

    /// Returns once every write replied to before the call is durable.
    ///
    /// # Errors
    /// [`VolumeError::Timeout`] after `io_timeout`: the data is kept, and the next flush covers it again.
    pub fn flush(&self) -> Result<(), VolumeError> {
        if self.is_read_only {
            return Ok(());
        }
        self.check_open()?;
        self.runtime.block_on(self.driver.flush())
    }

    /// Brings the range near. Without a read cache there is nowhere near to bring it to but the index, so only the
    /// places of the blocks are looked up.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn prefetch(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), VolumeError> {
        self.check_range(offset_bytes, len_bytes)?;
        self.check_open()?;
        let blocks = self.geometry.touched_blocks(offset_bytes, len_bytes);
        if !blocks.is_empty() {
            self.runtime.block_on(self.engine.block_runs(blocks))?;
        }
        Ok(())
    }

    /// What the bytes from `offset_bytes` on are: at least one extent, contiguous, none reaching past the range;
    /// perhaps not the whole range when finding out more would take long. One extent only when `one_only`.
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
        let blocks = self.geometry.touched_blocks(offset_bytes, len_bytes);
        if blocks.is_empty() {
            return Ok(Vec::new());
        }
        // Unpublished first: a publish in between moves blocks down into what is looked at second.
        let unpublished = self.overlay.block_runs(blocks.clone());
        let published = self.runtime.block_on(self.engine.block_runs(blocks.clone()))?;
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
        let block_size = u64::from(self.geometry.block_size());
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

    /// How far durability is behind.
    pub fn backlog(&self) -> Backlog {
        self.driver.backlog()
    }

    /// Asks for a checkpoint in the background.
    pub fn checkpoint_soon(&self) {
        self.driver.checkpoint_soon();
    }

    /// Publishes what is unpublished and stops the volume's threads, in at most about `timeout`. Once only; later
    /// calls do nothing.
    ///
    /// # Errors
    /// When not everything could be published: what was not covered by a flush is then lost.
    pub fn close(&self, timeout: Duration) -> Result<(), VolumeError> {
        if self.is_closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.runtime.block_on(async {
            let until = tokio::time::Instant::now() + timeout;
            let flushed = if self.is_read_only {
                Ok(())
            } else {
                tokio::time::timeout_at(until, self.driver.publish_all())
                    .await
                    .unwrap_or_else(|_| {
                        let last = "the time given for closing ran out".to_owned();
                        Err(VolumeError::Timeout {
                            operation: "the last checkpoint",
                            waited: timeout,
                            last,
                        })
                    })
            };
            let stopped = async {
                let last_generation = self.driver.stop().await;
                self.finish_log(last_generation.filter(|_| flushed.is_ok())).await;
                if let Some(catalogue) = &self.catalogue {
                    catalogue.finish().await;
                }
                self.engine.close().await;
            };
            // The owner thread may be in the middle of a publish that hangs; it ends when that does.
            if tokio::time::timeout_at(until.max(tokio::time::Instant::now() + CLOSE_LEAST), stopped)
                .await
                .is_err()
            {
                warn!("the store still holds up a publish; it is left unfinished");
            }
            flushed
        })
    }

    /// The clean end of the log: only when nothing in it is needed any more.
    async fn finish_log(&self, last_generation: Option<u64>) {
        let (Some(log), Some(generation)) = (&self.log, last_generation) else {
            return;
        };
        // A write that was let in while the last checkpoint was made may have been flushed to the log.
        if !self.overlay.is_empty() || self.driver.check_fenced().is_err() {
            warn!("the log is left as it is; the next opening replays it");
            return;
        }
        if let Err(e) = log.finish(generation).await {
            warn!(
                "everything is published, but the log could not be removed: {}",
                e.chain()
            );
        }
    }

    fn check_range(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), VolumeError> {
        if self.geometry.contains(offset_bytes, len_bytes) {
            return Ok(());
        }
        Err(VolumeError::OutOfRange {
            offset_bytes,
            len_bytes,
            size_bytes: self.geometry.size_bytes(),
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

/// A read-only opening replays nothing, and says so.
async fn warn_of_log(store: &store::Store) {
    match marker::load(store).await {
        Ok(Some((marker, _))) if !marker.is_clean => warn!(
            "the log {} may hold flushed writes that are not published: they are not seen by this read-only opening",
            marker.url
        ),
        Ok(_) => {}
        Err(e) => warn!("whether the volume has a log cannot be told: {}", e.chain()),
    }
}
