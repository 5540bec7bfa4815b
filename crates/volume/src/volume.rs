//! The public face of a volume: what an NBD server asks of a block device, at byte granularity.
//!
//! The methods block the calling thread and may be called from any number of threads in any order, but not from the
//! runtime's own. Requests that need no I/O (writes into the buffer, reads of buffered bytes) never leave the caller's
//! thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::try_join_all;
use futures::join;
use log::{info, warn};
use tokio::runtime::Handle;

use crate::admin;
use crate::catalogue::{self, Catalogue, CatalogueEntry, NoRecorder, Recorder};
use crate::engine::hyper::HyperEngine;
use crate::engine::index_cache::IndexCache;
use crate::engine::{Engine, Ownership, SoleOwner};
use crate::error::VolumeError;
use crate::geometry::Geometry;
use crate::lease::Lease;
use crate::options::{StoreOptions, VolumeOptions};
use crate::read::cache::ReadCache;
use crate::store::Store;
use crate::url::VolumeUrl;
use crate::writeback::driver::{Driver, DriverConfig};
use crate::writeback::generation::buffered_block_bytes;
use crate::writeback::overlay::{Buffered, Overlay};

/// Wait before a failed read is tried again; doubled each time up to [`READ_RETRY_WAIT_MAX`].
const READ_RETRY_WAIT: Duration = Duration::from_millis(100);
const READ_RETRY_WAIT_MAX: Duration = Duration::from_secs(3);
/// Time for ending threads, even when all the time given went into the last checkpoint.
const CLOSE_LEAST: Duration = Duration::from_secs(1);

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

/// An open volume.
pub struct Volume {
    geometry: Geometry,
    overlay: Arc<Overlay>,
    engine: Arc<dyn Engine>,
    driver: Driver,
    catalogue: Option<Arc<Catalogue>>,
    lease: Option<Arc<Lease>>,
    runtime: Handle,
    io_timeout: Duration,
    is_read_only: bool,
    is_closed: AtomicBool,
}

impl Volume {
    /// Opens the volume at `url`. Must be called on a multi-thread runtime, which must outlive the volume.
    ///
    /// # Errors
    /// [`VolumeError::NotFound`] when there is none; nothing is ever created by an open. [`VolumeError::Held`] when
    /// another server has it open for writing.
    pub async fn open(
        url: &VolumeUrl,
        store_options: &StoreOptions,
        options: &VolumeOptions,
    ) -> Result<Arc<Self>, VolumeError> {
        // Before this nothing is written: opening must not leave anything at a mistyped URL.
        let mut looked = admin::look(url, store_options).await?;
        let mut lease = None;
        let mut entry_seen = None;
        let volume_id = if options.read_only {
            looked.volume_id()
        } else {
            looked.ensure_safe(store_options.allow_unsafe).await?;
            let id = looked.ensure_volume_id().await?;
            let store = &looked.store;
            let taken = Lease::take(store, id.clone(), &options.lease, looked.lease.clone());
            let (taken, entry) = join!(taken, catalogue::load(store, looked.newest_cno));
            lease = Some(taken?);
            entry_seen = entry.ok().flatten();
            Some(id)
        };
        let store = looked.store;
        let opened = Self::open_owned(&store, options, volume_id, lease.clone(), entry_seen).await;
        if let (Err(_), Some(lease)) = (&opened, lease) {
            // The engine's open may have written.
            lease.release(false).await;
        }
        opened
    }

    async fn open_owned(
        store: &Store,
        options: &VolumeOptions,
        volume_id: Option<String>,
        lease: Option<Arc<Lease>>,
        entry_seen: Option<CatalogueEntry>,
    ) -> Result<Arc<Self>, VolumeError> {
        let index_cache = match (&options.node_cache, &volume_id) {
            (Some(config), Some(id)) => IndexCache::open(config, id)
                .await
                .map_err(|e| VolumeError::InvalidInput(format!("node_cache_config cannot be used: {e}")))?,
            _ => IndexCache::default(),
        };
        let ownership: Arc<dyn Ownership> = match &lease {
            Some(lease) => lease.clone(),
            None => Arc::new(SoleOwner),
        };
        let read_cache = ReadCache::open(&options.read_cache, volume_id.as_deref()).await;
        let (engine, state) =
            HyperEngine::open_owned(store, index_cache, read_cache, options.read_only, ownership).await?;
        let geometry = engine.geometry();
        let mut recorder: Arc<dyn Recorder> = Arc::new(NoRecorder);
        let mut catalogue = None;
        if let Some(lease) = &lease {
            let repaired =
                catalogue::repair(store, state.newest, state.modified_ms, lease.epoch(), entry_seen);
            if let Err(e) = repaired.await {
                warn!(
                    "checkpoint {} is not in the catalogue: {}",
                    state.newest.cno,
                    e.chain()
                );
            }
            let started = Catalogue::start(store.clone(), lease.epoch());
            recorder = started.clone();
            catalogue = Some(started);
        }
        info!(
            "opened {}: {} bytes in blocks of {}, checkpoint {}, volume {}{}",
            store.url,
            geometry.size_bytes(),
            geometry.block_size(),
            state.newest.cno,
            volume_id.as_deref().unwrap_or("without a label"),
            if options.read_only { ", read-only" } else { "" }
        );
        let mut volume = Self::over(Arc::new(engine), recorder, options);
        volume.catalogue = catalogue;
        if let Some(lease) = &lease {
            volume.driver.fence_when(lease.lost());
        }
        volume.lease = lease;
        Ok(Arc::new(volume))
    }

    /// A volume over any engine, on the current runtime.
    pub fn over(engine: Arc<dyn Engine>, recorder: Arc<dyn Recorder>, options: &VolumeOptions) -> Self {
        let geometry = engine.geometry();
        let overlay = Arc::new(Overlay::new(geometry));
        let config = DriverConfig {
            checkpoint_interval: options.checkpoint_interval,
            io_timeout: options.io_timeout,
            write_buffer_bytes: options.write_buffer_bytes,
        };
        let driver = Driver::start(overlay.clone(), engine.clone(), recorder, config);
        Self {
            geometry,
            overlay,
            engine,
            driver,
            catalogue: None,
            lease: None,
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
        let mut last = String::from("none, the store is slow");
        let tries = async {
            let mut wait = READ_RETRY_WAIT;
            while let Err(e) = self.engine.read(offset_bytes, out).await {
                last = e.chain();
                log::debug!("a read is tried again: {last}");
                // Not all at the same moment, when many wait for the same store.
                tokio::time::sleep(wait.mul_f64(fastrand::f64() + 0.5)).await;
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
        self.driver.shared().check_fenced()?;
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
            .block_on(self.engine.prefetch(offset_bytes, len_bytes))
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
                tokio::time::timeout_at(until, self.driver.flush())
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
                self.driver.stop().await;
                if let Some(catalogue) = &self.catalogue {
                    catalogue.finish().await;
                }
                self.engine.close().await;
            };
            // The owner thread may be in the middle of a publish that hangs; it ends when that does.
            let until = until.max(tokio::time::Instant::now() + CLOSE_LEAST);
            let is_stopped = tokio::time::timeout_at(until, stopped).await.is_ok();
            if !is_stopped {
                warn!("the store still holds up a publish; it is left unfinished");
            }
            if let Some(lease) = &self.lease {
                // A failed publish may still be on its way to the store, and must not meet a new owner that trusts
                // the end of this one.
                let released = lease.release(flushed.is_ok() && is_stopped);
                if tokio::time::timeout_at(until, released).await.is_err() {
                    warn!(
                        "the lease could not be released; on another machine it is in force until it runs out"
                    );
                }
            }
            flushed
        })
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

impl Drop for Volume {
    /// Of a volume that was not closed the lease stays in force, but for this process.
    fn drop(&mut self) {
        if let Some(lease) = &self.lease {
            lease.forget();
        }
    }
}
