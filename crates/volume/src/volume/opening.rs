//! Opening a volume: find it, take its lease, shut older owners out of its log, open its container, replay.

use std::sync::Arc;

use futures::join;
use log::{info, warn};

use super::{Parts, Volume};
use crate::admin::{self, Looked};
use crate::catalogue::{self, Catalogue, CatalogueEntry, Watermarks};
use crate::engine::hyper::{HyperEngine, OpenState};
use crate::engine::index_cache::IndexCache;
use crate::engine::{Engine, Ownership, SoleOwner, StoredState};
use crate::error::VolumeError;
use crate::lease::Lease;
use crate::log::marker::{self, MarkerState};
use crate::log::open::{self as log_open, OpenLog, ReplayOptions};
use crate::options::{StoreOptions, VolumeOptions};
use crate::read::cache::ReadCache;
use crate::store::{self, Store};
use crate::url::VolumeUrl;
use crate::writeback::appender::DriverLog;
use crate::writeback::state::GENERATIONS_AHEAD_MAX;

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
        if !options.read_only {
            log_open::check_unlocked(options.wal_url.as_ref()).await?;
        }
        let begun = match begin_sighted(url, store_options, options).await? {
            Some(begun) => begun,
            None => {
                let looked = admin::look(url, store_options).await?;
                if options.read_only {
                    return open_read_only(looked, options).await;
                }
                begin(looked, store_options, options).await?
            }
        };
        let Begun {
            store,
            volume_id,
            lease,
            seen,
            entry,
        } = begun;
        let request = log_open::Request {
            store: &store,
            volume_id: &volume_id,
            store_options,
            url: options.wal_url.as_ref(),
            is_discard_allowed: options.discard_wal,
            epoch: lease.epoch(),
        };
        let opened = open_owned(&request, options, &lease, seen, entry).await;
        if opened.is_err() {
            // The engine's open may have written.
            lease.release(false).await;
        }
        opened
    }
}

/// A volume whose lease is held.
struct Begun {
    store: Store,
    volume_id: String,
    lease: Arc<Lease>,
    /// What was stored before the lease was taken.
    seen: StoredState,
    /// The catalogue's entry of that, if there is one. Entries never change.
    entry: Option<CatalogueEntry>,
}

/// Takes the lease of a volume that was looked at. Before that look nothing is written: opening must not leave anything at
/// a mistyped URL.
async fn begin(
    looked: Looked,
    store_options: &StoreOptions,
    options: &VolumeOptions,
) -> Result<Begun, VolumeError> {
    looked.ensure_safe(store_options.allow_unsafe).await?;
    let volume_id = looked.ensure_volume_id().await?;
    let (store, seen) = (looked.store, looked.newest);
    let (lease, entry) = join!(
        Lease::take(&store, volume_id.clone(), &options.lease, looked.lease),
        catalogue::load_entry(&store, seen.mark.cno)
    );
    Ok(Begun {
        lease: lease?,
        entry: entry.ok().flatten(),
        store,
        volume_id,
        seen,
    })
}

/// The same for a volume that was seen before, without another look: the lease is taken only if it is still the one seen.
/// `None` when it is not, or when a store that is not known to keep conditions makes that mean nothing.
async fn begin_sighted(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    options: &VolumeOptions,
) -> Result<Option<Begun>, VolumeError> {
    let Some(sighting) = &options.lease.sighting else {
        return Ok(None);
    };
    if options.read_only || store_options.allow_unsafe {
        return Ok(None);
    }
    let store = store::unproved(url, store_options).await?;
    let (volume_id, seen) = (sighting.volume_id.clone(), sighting.newest);
    let (lease, entry) = join!(
        Lease::take_unchanged(&store, volume_id.clone(), &options.lease, sighting.lease.clone()),
        catalogue::load_entry(&store, seen.mark.cno)
    );
    Ok(lease.map(|lease| Begun {
        store,
        volume_id,
        lease,
        seen,
        entry: entry.ok().flatten(),
    }))
}

async fn open_read_only(looked: Looked, options: &VolumeOptions) -> Result<Arc<Volume>, VolumeError> {
    let volume_id = looked.volume_id();
    warn_of_log(looked.marker);
    let (engine, _) = open_engine(
        &looked.store,
        options,
        volume_id.as_deref(),
        Arc::new(SoleOwner),
        None,
    )
    .await?;
    Ok(Arc::new(Volume::with_parts(
        Arc::new(engine),
        Parts::default(),
        options,
    )))
}

async fn open_owned(
    request: &log_open::Request<'_>,
    options: &VolumeOptions,
    lease: &Arc<Lease>,
    seen: StoredState,
    entry_seen: Option<CatalogueEntry>,
) -> Result<Arc<Volume>, VolumeError> {
    let &log_open::Request {
        store,
        volume_id,
        epoch,
        ..
    } = request;
    let engine = open_engine(store, options, Some(volume_id), lease.clone(), Some(seen));
    let (begun, (engine, state)) = if request.url.is_some() {
        // Before the container is opened: older owners acknowledge nothing and raise no watermark from here on.
        let begun = log_open::begin(request, marker::load(store).await?).await?;
        (begun, engine.await?)
    } else {
        // No log to replay. One that is there is refused, or given up.
        let (found, engine) = join!(marker::load(store), engine);
        (log_open::begin(request, found?).await?, engine?)
    };
    let recorded = match (
        catalogue::take_up(store, state.newest, state.modified_ms, epoch, entry_seen).await,
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
            // An older owner may have used more than it recorded.
            watermark + GENERATIONS_AHEAD_MAX + 1
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
    seen: Option<StoredState>,
) -> Result<(HyperEngine, OpenState), VolumeError> {
    let index_cache = match (&options.node_cache, volume_id) {
        (Some(config), Some(id)) => IndexCache::open(config, id)
            .await
            .map_err(|e| VolumeError::InvalidInput(format!("node_cache_config cannot be used: {e}")))?,
        _ => IndexCache::default(),
    };
    let read_cache = ReadCache::open(&options.read_cache, volume_id).await;
    let (engine, state) =
        HyperEngine::open_owned(store, index_cache, read_cache, options.read_only, ownership, seen).await?;
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
fn warn_of_log(marker: Result<Option<MarkerState>, VolumeError>) {
    match marker {
        Ok(Some(marker)) if !marker.is_clean => warn!(
            "the log {} may hold flushed writes that are not published: they are not seen by this read-only opening",
            marker.url
        ),
        Ok(_) => {}
        Err(e) => warn!("whether the volume has a log cannot be told: {}", e.chain()),
    }
}
