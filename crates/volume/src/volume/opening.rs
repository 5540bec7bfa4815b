//! Opening a volume: find it, take its lease, shut older owners out of its log, open its container, replay.

use std::sync::Arc;

use log::{info, warn};

use super::{Parts, Volume};
use crate::admin::{self, label};
use crate::catalogue::{self, Catalogue, Watermarks};
use crate::engine::hyper::{HyperEngine, OpenState};
use crate::engine::index_cache::IndexCache;
use crate::engine::{Engine, Ownership, SoleOwner};
use crate::error::VolumeError;
use crate::lease::Lease;
use crate::log::marker;
use crate::log::open::{self as log_open, OpenLog, ReplayOptions};
use crate::options::{StoreOptions, VolumeOptions};
use crate::read::cache::ReadCache;
use crate::store::{self, Store};
use crate::url::VolumeUrl;
use crate::writeback::appender::DriverLog;

impl Volume {
    /// Opens the volume at `url`. Must be called on a multi-thread runtime, which must outlive the volume.
    ///
    /// # Errors
    /// [`VolumeError::NotFound`] when there is none; nothing is ever created by an open. [`VolumeError::Held`] when
    /// another server has it open for writing. [`VolumeError::Log`] for a log that must not be ignored and cannot be
    /// used.
    pub async fn open(
        url: &VolumeUrl,
        store_options: &StoreOptions,
        options: &VolumeOptions,
    ) -> Result<Arc<Self>, VolumeError> {
        let store = store::connect(url, store_options).await?;
        // A label is made only for a volume that is there: opening must not leave anything at a mistyped URL.
        admin::info_of(&store).await?;
        if options.read_only {
            return open_read_only(&store, options).await;
        }
        store::probe::ensure(&store, store_options.allow_unsafe).await?;
        let volume_id = label::ensure(&store).await?.volume_id;
        log_open::check_unlocked(options.wal_url.as_ref()).await?;
        let lease = Lease::take(&store, volume_id.clone(), &options.lease).await?;
        let opened = open_owned(&store, store_options, options, &volume_id, &lease).await;
        if opened.is_err() {
            // The engine's open may have written.
            lease.release(false).await;
        }
        opened
    }
}

async fn open_read_only(store: &Store, options: &VolumeOptions) -> Result<Arc<Volume>, VolumeError> {
    let volume_id = label::load(store).await?.map(|label| label.volume_id);
    warn_of_log(store).await;
    let (engine, _) = open_engine(store, options, volume_id.as_deref(), Arc::new(SoleOwner)).await?;
    Ok(Arc::new(Volume::with_parts(
        Arc::new(engine),
        Parts::default(),
        options,
    )))
}

async fn open_owned(
    store: &Store,
    store_options: &StoreOptions,
    options: &VolumeOptions,
    volume_id: &str,
    lease: &Arc<Lease>,
) -> Result<Arc<Volume>, VolumeError> {
    let epoch = lease.epoch();
    // Before the container is opened: older owners acknowledge nothing and raise no watermark from here on.
    let begun = log_open::begin(&log_open::Request {
        store,
        volume_id,
        store_options,
        url: options.wal_url.as_ref(),
        is_discard_allowed: options.discard_wal,
        epoch,
    })
    .await?;
    let (engine, state) = open_engine(store, options, Some(volume_id), lease.clone()).await?;
    let recorded = match (
        catalogue::take_up(store, state.newest, state.modified_ms, epoch).await,
        &begun.log,
    ) {
        (Err(e), None) => {
            let cno = state.newest.cno;
            warn!("checkpoint {cno} is not in the catalogue: {}", e.chain());
            0
        }
        // The watermark of the log: without it nobody knows what to replay.
        (taken_up, _) => taken_up?,
    };
    let watermark = recorded.max(begun.least_watermark);
    let mut parts = Parts::default();
    let mut catalogue = None;
    parts.first_generation = match &begun.log {
        Some(log) => {
            let owner = DriverLog {
                store: log.store.clone(),
                volume_id: log_open::parse_volume_id(volume_id)?,
                epoch,
            };
            let (generation, recorder) = replay(store, options, log, &owner, &engine, watermark).await?;
            parts.recorder = Some(Arc::new(recorder));
            parts.log = Some(owner);
            // The replay has gone beyond what an older owner may have on its way to the log.
            generation + 1
        }
        None => {
            let started = Catalogue::start(store.clone(), epoch);
            parts.recorder = Some(started.clone());
            catalogue = Some(started);
            // An older owner may have used two more than it recorded.
            watermark + 3
        }
    };
    let mut volume = Volume::with_parts(Arc::new(engine), parts, options);
    volume.catalogue = catalogue;
    volume.log = begun.log;
    volume.driver.fence_when(lease.lost());
    volume.lease = Some(lease.clone());
    Ok(Arc::new(volume))
}

/// Replays the log and makes it part of the volume. Returns the newest generation used.
async fn replay(
    store: &Store,
    options: &VolumeOptions,
    log: &OpenLog,
    owner: &DriverLog,
    engine: &HyperEngine,
    watermark: u64,
) -> Result<(u64, Watermarks), VolumeError> {
    let recorder = Watermarks::new(store.clone(), owner.epoch, log.marker.clone());
    let replay_options = ReplayOptions {
        write_buffer_bytes: options.write_buffer_bytes,
        io_timeout: options.io_timeout,
    };
    let generation = log.replay(engine, &recorder, watermark, &replay_options).await?;
    log.store.trim(generation, log.store.first_sequence() - 1).await?;
    Ok((generation, recorder))
}

async fn open_engine(
    store: &Store,
    options: &VolumeOptions,
    volume_id: Option<&str>,
    ownership: Arc<dyn Ownership>,
) -> Result<(HyperEngine, OpenState), VolumeError> {
    let index_cache = match (&options.node_cache, volume_id) {
        (Some(config), Some(id)) => IndexCache::open(config, id)
            .await
            .map_err(|e| VolumeError::InvalidInput(format!("node_cache_config cannot be used: {e}")))?,
        _ => IndexCache::default(),
    };
    let read_cache = ReadCache::open(&options.read_cache, volume_id).await;
    let (engine, state) =
        HyperEngine::open_owned(store, index_cache, read_cache, options.read_only, ownership).await?;
    let geometry = engine.geometry();
    info!(
        "opened {}: {} bytes in blocks of {}, checkpoint {}, volume {}{}",
        store.url,
        geometry.size_bytes(),
        geometry.block_size(),
        state.newest.cno,
        volume_id.unwrap_or("without a label"),
        if options.read_only { ", read-only" } else { "" }
    );
    Ok((engine, state))
}

/// A read-only opening replays nothing, and says so.
async fn warn_of_log(store: &Store) {
    match marker::load(store).await {
        Ok(Some((marker, _))) if !marker.is_clean => warn!(
            "the log {} may hold flushed writes that are not published: they are not seen by this read-only opening",
            marker.url
        ),
        Ok(_) => {}
        Err(e) => warn!("whether the volume has a log cannot be told: {}", e.chain()),
    }
}
