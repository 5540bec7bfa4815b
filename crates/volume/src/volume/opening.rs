//! Opening a volume: find it, take its lease, shut older owners out of its WAL, open its container, replay.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use btree_ondisk::NodeCache;
use futures::future::BoxFuture;
use futures::{FutureExt, join};
use log::{info, warn};

use super::restore::Claim;
use super::{Parts, Volume, growing};
use crate::base::checkpoint_id::{InodeCheck, NewestCheckpoint};
use crate::base::error::VolumeError;
use crate::base::ids::GENERATIONS_AHEAD_MAX;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::checkpoint::appender::DriverWal;
use crate::compaction::{self, Ground};
use crate::engine::hyper_engine::{HyperEngine, OpenState};
use crate::engine::parents;
use crate::engine::{Engine, Ownership, SoleOwner};
use crate::flatten;
use crate::format::inode;
use crate::format::object_names::is_container_object;
use crate::format::stored_state::StoredState;
use crate::index::cache::IndexCache;
use crate::lease::state::Stored;
use crate::lease::{self, Lease};
use crate::meta::cache_state;
use crate::meta::checkpoint_list::{self, Catalogue, CatalogueEntry, Watermarks};
use crate::meta::label;
use crate::meta::wal_marker;
use crate::open::history::{self, Known, Seen};
use crate::open::inspect::{self, Inspection};
use crate::open::recover_wal::{self, OpenWal, Wanted};
use crate::open::replay_wal::{ReplayOptions, warn_left};
use crate::options::{Compaction, LeaseOptions, StoreOptions, VolumeOptions};
use crate::past::{self, Point};
use crate::read::cache::ReadCache;
use crate::retention::{Keeper, ORPHAN_AGE, Reading, Recent, Rounds};
use crate::scrub;
use crate::store::{self, Store};

/// The age, by the store's clock, from which an unfinished upload must belong to a killed server. This server's own
/// uploads are younger, whatever the clocks show.
const UNFINISHED_AGE_MIN: Duration = Duration::from_secs(3600);
/// The longest time for ending the engine of an opening that has failed: a publish of its replay may still wait for the store.
const GIVE_UP_MAX: Duration = Duration::from_secs(10);

impl Volume {
    /// Opens the volume at `url`. Must be called on a multi-thread runtime, which must outlive the volume.
    ///
    /// [`VolumeError::NotFound`] when there is none; an open never creates anything. [`VolumeError::Held`] when another
    /// server has it open for writing. [`VolumeError::Wal`] for a WAL that must not be ignored and cannot be used.
    pub fn open<'a>(
        url: &'a VolumeUrl,
        store_options: &'a StoreOptions,
        options: &'a VolumeOptions,
    ) -> BoxFuture<'a, Result<Arc<Self>, VolumeError>> {
        async move {
            if !options.read_only {
                recover_wal::check_claimable(options.wal.as_ref()).await?;
            }
            match Self::open_once(url, store_options, options).await {
                // The lease was restored with the volume. The epochs in the WAL that is given up must stay below this
                // owner's.
                Err(VolumeError::WalAhead { newest, .. }) if options.discard_wal => {
                    let mut options = options.clone();
                    options.lease.sighting = None;
                    options.lease.epoch_above = newest;
                    Self::open_once(url, store_options, &options).await
                }
                opened => opened,
            }
        }
        .boxed()
    }

    fn open_once<'a>(
        url: &'a VolumeUrl,
        store_options: &'a StoreOptions,
        options: &'a VolumeOptions,
    ) -> BoxFuture<'a, Result<Arc<Self>, VolumeError>> {
        async move {
            let begun = match begin_sighted(url, store_options, options).await? {
                Some(begun) => begun,
                None => {
                    let looked = inspect::inspect(url, store_options).await?;
                    if options.read_only {
                        return open_read_only(looked, options).await;
                    }
                    begin(looked, store_options, options).await?
                }
            };
            let Begun {
                store,
                volume_id,
                parent,
                origin,
                lease,
                seen,
                entry,
                mut claim,
                wal,
            } = begun;
            let recovered = match claim.settle(&lease) {
                Ok(recovered) => recovered,
                Err(e) => {
                    lease.release(false).await;
                    return Err(e);
                }
            };
            let request = recover_wal::Request {
                store: &store,
                volume_id,
                parent,
                inherited: options.inherited_wal,
                newest_seen: seen.id(),
                store_options,
                place: wal.place.as_ref(),
                is_discard_allowed: options.discard_wal,
                epoch: lease.epoch(),
            };
            let before = Before {
                seen,
                entry,
                origin,
                ends_wal: wal.is_ended,
            };
            let mut opened = open_owned(&request, options, &lease, before).await;
            if let Err(VolumeError::WalAhead { .. }) = &opened
            // A later owner takes the lease before it opens the WAL.
            && let Err(e) = lease.check().await
            {
                opened = Err(e);
            }
            let kept = match opened {
                Ok((volume, newest)) => claim
                    .keep(&store, &volume, newest, recovered)
                    .await
                    .map(|()| volume),
                Err(e) => Err(e),
            };
            match &kept {
                Ok(volume) => lease.grow_with(growing::grower(volume)),
                // The engine's open may have written.
                Err(_) => lease.release(false).await,
            }
            kept
        }
        .boxed()
    }
}

/// A volume whose lease this server holds.
struct Begun {
    store: Store,
    volume_id: VolumeId,
    /// The id of the volume of which this one is a copy.
    parent: Option<VolumeId>,
    /// The check value of the inode of the container when it was created.
    origin: Option<InodeCheck>,
    lease: Arc<Lease>,
    /// The state that was stored before the lease was taken.
    seen: StoredState,
    /// The entry of that state in the checkpoint list, if there is one. Entries never change.
    entry: Option<CatalogueEntry>,
    /// The claim on the buffer file.
    claim: Claim,
    /// The WAL to open.
    wal: Wanted,
}

/// Takes the lease of a volume that was inspected. Nothing is written before that inspection, because an open must not
/// leave anything at a mistyped URL.
fn begin<'a>(
    mut looked: Inspection,
    store_options: &'a StoreOptions,
    options: &'a VolumeOptions,
) -> BoxFuture<'a, Result<Begun, VolumeError>> {
    async move {
        looked.ensure_safe(store_options.allow_unsafe).await?;
        let is_copied = looked.is_elsewhere();
        let wal = looked.wal(options.wal.as_ref());
        if looked.is_elsewhere() {
            let marker = std::mem::replace(&mut looked.marker, Ok(None))?;
            recover_wal::check_copied(&looked.store, marker.as_ref(), options)?;
        }
        let label = looked.settle_label(options.adopt).await?;
        let (store, seen) = (looked.store, looked.newest);
        warn_of_buffer(looked.lease.as_ref(), options);
        let mut claim = Claim::new(options, label.volume_id, &store.url)?;
        let lease_options = LeaseOptions {
            is_copied,
            ..claim.lease_options(options)
        };
        let mut before_put = |predecessor: Option<&str>| claim.about_to_replace(predecessor);
        let (lease, entry) = join!(
            Lease::take(
                &store,
                label.volume_id,
                &lease_options,
                looked.lease,
                &mut before_put
            ),
            checkpoint_list::load_entry(&store, seen.state_id.cno)
        );
        let lease = lease?;
        let store = match still_inheriting(store, label.volume_id).await {
            Ok(store) => store,
            Err(e) => {
                lease.release(false).await;
                return Err(e);
            }
        };
        // Whoever copies to it must find that it is another's from here on.
        if label.replica_of.is_some()
            && let Err(e) = label::end_replica(&store).await
        {
            lease.release(false).await;
            return Err(e);
        }
        Ok(Begun {
            lease,
            entry: entry.ok().flatten(),
            store,
            volume_id: label.volume_id,
            parent: label.parent,
            origin: label.origin,
            seen,
            claim,
            wal,
        })
    }
    .boxed()
}

/// The store of a volume whose lease was just taken. `clone --flatten` may have ended the sharing while that was waited for, and its
/// parents keep nothing for it since.
async fn still_inheriting(store: Store, volume_id: VolumeId) -> Result<Store, VolumeError> {
    if store.lineage().fork() == 0 {
        return Ok(store);
    }
    let found = label::find(&store).await?;
    match &found {
        Some(found) if found.label.volume_id == volume_id && found.label.is_clone => Ok(store),
        Some(found) if found.label.volume_id == volume_id => {
            Ok(parents::attach(&store, Some(found)).await?.0)
        }
        _ => Err(VolumeError::NotFound {
            url: store.url.to_string(),
        }),
    }
}

/// Takes the lease of a volume that was inspected earlier, without another inspection, and only if the lease is still
/// the one that was seen. Returns `None` when it is not, or when the store is not known to honour conditions, so that
/// the write would prove nothing.
fn begin_sighted<'a>(
    url: &'a VolumeUrl,
    store_options: &'a StoreOptions,
    options: &'a VolumeOptions,
) -> BoxFuture<'a, Result<Option<Begun>, VolumeError>> {
    async move {
        let Some(sighting) = &options.lease.sighting else {
            return Ok(None);
        };
        if options.read_only || store_options.allow_unsafe || options.lease.is_retry {
            return Ok(None);
        }
        let (volume_id, seen) = (sighting.volume_id, sighting.newest);
        let store = store::unproved(url, store_options).await?;
        let store = parents::inheriting(&store, Some(volume_id), sighting.clone_of.as_ref()).await?;
        let (parent, origin) = (sighting.parent, sighting.origin);
        let wal = Wanted::found(sighting.has_wal_beside, options.wal.as_ref());
        warn_of_buffer(Some(&sighting.lease), options);
        let mut claim = Claim::new(options, volume_id, url)?;
        let lease_options = claim.lease_options(options);
        let mut before_put = |predecessor: Option<&str>| claim.about_to_replace(predecessor);
        let (lease, entry) = join!(
            Lease::take_unchanged(
                &store,
                volume_id,
                &lease_options,
                sighting.lease.clone(),
                &mut before_put
            ),
            checkpoint_list::load_entry(&store, seen.state_id.cno)
        );
        let Some(lease) = lease else { return Ok(None) };
        // The label may have been looked at before the sharing was ended, and the lease after that.
        let store = match still_inheriting(store, volume_id).await {
            Ok(store) => store,
            Err(e) => {
                lease.release(false).await;
                return Err(e);
            }
        };
        Ok(Some(Begun {
            store,
            volume_id,
            parent,
            origin,
            lease,
            seen,
            entry: entry.ok().flatten(),
            claim,
            wal,
        }))
    }
    .boxed()
}

fn open_read_only<'a>(
    looked: Inspection,
    options: &'a VolumeOptions,
) -> BoxFuture<'a, Result<Arc<Volume>, VolumeError>> {
    async move {
        let volume_id = looked.volume_id();
        let consequence = "this read-only server does not show them";
        wal_marker::warn_of_unpublished(&looked.store, looked.marker, consequence);
        let (engine, state) = open_engine(EngineOf {
            store: &looked.store,
            options,
            volume_id,
            ownership: Arc::new(SoleOwner),
            seen: looked.newest,
            entry: None,
        })
        .await?;
        let reading = match Reading::begin(&looked.store, state.newest.id).await {
            Ok(reading) => reading,
            Err(e) => {
                give_up(&engine, true).await;
                let cno = state.newest.id.cno;
                let before = match &e {
                    VolumeError::NoCheckpoint { .. } => before_unnamed(&looked.store, cno).await?,
                    _ => None,
                };
                let Some(point) = before else { return Err(e) };
                info!(
                    "checkpoint {cno} of {} is stored and was not published: the one before it is shown",
                    looked.store.url
                );
                return Volume::open_stored(looked.store, point, options, volume_id).await;
            }
        };
        if !reading.is_pinned() {
            // Nothing else is written, and nothing of the attempt stays.
            looked.store.end_changes().await;
        }
        let parts = Parts {
            metrics: looked.store.metrics().clone(),
            ..Parts::default()
        };
        let mut volume = Volume::with_parts(Arc::new(engine), parts, options);
        volume.newest = NewestCheckpoint::new(state.newest.id);
        volume.identity = volume_id.map(|id| format!("{id}, checkpoint {}", state.newest.id));
        volume.reading = reading;
        volume.store = Some(looked.store);
        Ok(Arc::new(volume))
    }
    .boxed()
}

/// The state that the inode names, where that is one before checkpoint `cno`, which the engine found.
///
/// An open that only reads takes up, in memory alone, what a writer has stored and not named yet (`roll_forward` in hyperfile 0.14.0). A
/// writer that was killed there never names it, and the next owner may drop it: nothing keeps it for who reads it.
async fn before_unnamed(store: &Store, cno: u64) -> Result<Option<Point>, VolumeError> {
    let (stored, _) = inode::load(store).await?;
    match stored.i_last_cno < cno {
        true => past::state_of(&stored).map(Some),
        false => Ok(None),
    }
}

/// The state that was stored before the lease was taken.
struct Before {
    seen: StoredState,
    entry: Option<CatalogueEntry>,
    origin: Option<InodeCheck>,
    /// The WAL is ended once its records are replayed.
    ends_wal: bool,
}

/// How often the log is begun anew because the owner before has still written its marker.
const LOG_TRIES: u32 = 4;

/// Begins the log. An owner that was taken over from may write the marker in between, until it finds that out: that is none that takes
/// the log over from this one, as long as the lease is this one's.
async fn begin_wal(
    request: &recover_wal::Request<'_>,
    lease: &Lease,
) -> Result<recover_wal::Begun, VolumeError> {
    for _ in 1..LOG_TRIES {
        match recover_wal::begin(request, wal_marker::load(request.store).await?).await {
            Err(VolumeError::Fenced { .. }) => lease.check().await?,
            begun => return begun,
        }
    }
    recover_wal::begin(request, wal_marker::load(request.store).await?).await
}

fn open_owned<'a>(
    request: &'a recover_wal::Request<'a>,
    options: &'a VolumeOptions,
    lease: &'a Arc<Lease>,
    before: Before,
) -> BoxFuture<'a, Result<(Arc<Volume>, NewestCheckpoint), VolumeError>> {
    async move {
        let &recover_wal::Request {
            store,
            volume_id,
            epoch,
            ..
        } = request;
        let engine = open_engine(EngineOf {
            store,
            options,
            volume_id: Some(volume_id),
            ownership: lease.clone(),
            seen: before.seen,
            entry: before.entry.as_ref(),
        });
        let seen_cno = before.seen.state_id.cno;
        let later = checkpoint_list::numbers_after(store, seen_cno);
        let (begun, opened, later) = if request.place.is_some() {
            // This comes before the container is opened: from here on older owners acknowledge nothing and raise no
            // watermark.
            let begun = begin_wal(request, lease).await?;
            let (opened, later) = join!(engine, later);
            (Ok(begun), opened, later)
        } else {
            // There is no WAL to replay. If one is there, it is refused or given up.
            let (found, opened, later) = join!(wal_marker::load(store), engine, later);
            let begun = match found {
                Ok(found) => {
                    let wanted = Wanted::of(found.as_ref().map(|(marker, _)| marker), None);
                    if let Some(place) = &wanted.place {
                        // It could not be looked at before the lease was taken, or was begun since.
                        if let Ok((engine, state)) = opened {
                            give_up(&engine, before.seen.id() == state.newest.id).await;
                        }
                        let request = recover_wal::Request {
                            place: Some(place),
                            ..*request
                        };
                        let before = Before {
                            ends_wal: wanted.is_ended,
                            ..before
                        };
                        return open_owned(&request, options, lease, before).await;
                    }
                    recover_wal::begin(request, found).await
                }
                Err(e) => Err(e),
            };
            (begun, opened, later)
        };
        let (engine, state) = match opened {
            Ok(opened) => opened,
            // What is wrong with the log says more.
            Err(e) => return Err(begun.err().unwrap_or(e)),
        };
        let seen = before.seen.id();
        let mut are_caches_ours = seen == state.newest.id;
        let taken_up: Result<_, VolumeError> = async {
            let (mut begun, later) = (begun?, later?);
            let known = Known {
                origin: before.origin,
                entry: before.entry.clone(),
                later: Some((seen_cno, later)),
            };
            let history = history::look(store, state.newest, known).await?;
            if !are_caches_ours {
                // Whether to use the caches was decided by the state that was seen.
                if !history.has(seen).await? {
                    engine.empty_caches().await?;
                }
                engine.use_caches();
                engine.warm_index();
                are_caches_ours = true;
            }
            begun.judge(&history).await?;
            let recorded = history.settle(state.modified_ms, epoch).await?;
            let watermark = recorded.max(begun.least_watermark);
            let mut parts = Parts {
                metrics: store.metrics().clone(),
                ..Parts::default()
            };
            let mut newest = NewestCheckpoint::new(state.newest.id);
            parts.first_generation = match &begun.wal {
                Some(wal) => {
                    let owner = DriverWal {
                        store: wal.store.clone(),
                        volume_id: volume_id.as_uuid(),
                        epoch,
                        newest: wal.marker.newest().clone(),
                    };
                    owner.newest.set(state.newest.id);
                    let replaying = Replaying {
                        wal,
                        owner: &owner,
                        history: &history,
                        watermark,
                    };
                    let (generation, recorder) = replaying.run(store, options, &engine).await?;
                    newest = owner.newest.clone();
                    parts.recorded_generation = generation;
                    if before.ends_wal {
                        wal.finish(generation, lease.older_may_run()).await?;
                        info!("the log {} is ended: none was asked for", wal.url);
                    } else {
                        parts.recorder = Some(Arc::new(recorder));
                        parts.wal = Some(owner);
                    }
                    // The replay has gone beyond what an older owner may have on its way to the log.
                    generation + 1
                }
                None => {
                    parts.recorded_generation = recorded;
                    // An older owner may have used more than it recorded.
                    watermark + GENERATIONS_AHEAD_MAX + 1
                }
            };
            Ok((begun, parts, newest))
        }
        .await;
        let (begun, mut parts, newest) = match taken_up {
            Ok(taken_up) => taken_up,
            Err(e) => {
                give_up(&engine, are_caches_ours).await;
                return Err(e);
            }
        };
        let mut catalogue = None;
        let is_inherited = begun.is_inherited;
        let wal = begun.wal.filter(|_| !before.ends_wal);
        if wal.is_none() {
            let started = Catalogue::start(store.clone(), epoch, newest.clone(), lease.clone());
            parts.recorder = Some(started.clone());
            catalogue = Some(started);
        }
        let rounds = Rounds::new(
            store.clone(),
            epoch,
            lease.clone(),
            engine.index_in_memory(),
            options.retention_grace,
            ORPHAN_AGE,
        )
        .remembering(Recent {
            recorded: newest.clone(),
            published: Some(engine.published()),
        })
        .showing_debt(u64::from(engine.geometry().block_size()));
        let ground = Ground::new(&engine, store.clone(), rounds.under_way());
        let (published_bytes, reads) = (engine.published_bytes(), engine.reads());
        let mut volume = Volume::with_parts(Arc::new(engine), parts, options);
        volume.identity = Some(volume_id.to_string());
        volume.catalogue = catalogue;
        volume.wal = wal;
        volume.driver.fence_when(lease.lost());
        volume.lease = Some(lease.clone());
        volume.newest = newest.clone();
        volume.store = Some(store.clone());
        tokio::spawn(abort_uploads(store.clone()));
        if request.parent.is_some() && !is_inherited {
            tokio::spawn(remove_inherited(store.clone(), volume_id));
        }
        let marker = volume.wal.as_ref().map(|wal| wal.marker.clone());
        let interval = options.retention_interval;
        let rounds = Arc::new(tokio::sync::Mutex::new(rounds));
        volume.retention = Some(Keeper::start(
            rounds.clone(),
            interval,
            options.retention_grace,
            newest.clone(),
            marker,
        ));
        volume.flatten = Some(flatten::Keeper::start(flatten::Work {
            store: store.clone(),
            lease: lease.clone(),
            rounds: rounds.clone(),
            reads: reads.clone(),
        }));
        volume.compaction = Some(compaction::Keeper::start(compaction::Work {
            ground,
            flip: Arc::new(volume.driver.clone()),
            rounds,
            published_bytes,
            cap_rate: options.compaction_rate,
            // Without rounds nothing would come of it.
            is_automatic: options.compaction == Compaction::Auto && interval.is_some(),
        }));
        volume.scrub = options.scrub_interval.map(|interval| {
            let work = scrub::Work {
                store: store.clone(),
                volume_id,
                ownership: lease.clone(),
                reads,
                interval,
            };
            scrub::Keeper::start(work, lease.lost())
        });
        Ok((Arc::new(volume), newest))
    }
    .boxed()
}

/// Ends the engine of an opening that has failed, so that the next one has the caches on a disk. They are emptied where it is not known
/// that they are of the history which the engine has found.
async fn give_up(engine: &HyperEngine, are_caches_ours: bool) {
    if !are_caches_ours && let Err(e) = engine.empty_caches().await {
        // Not closed, they are not said to be whole.
        warn!(
            "the caches of an opening that failed cannot be emptied: {}",
            e.chain()
        );
        return;
    }
    if tokio::time::timeout(GIVE_UP_MAX, engine.close()).await.is_err() {
        engine.abandon().await;
    }
}

/// Aborts the uploads that earlier servers had begun when they were killed. Nothing depends on it.
async fn abort_uploads(store: Store) {
    // Written by this server, a moment ago or later.
    let lease = store.meta_key(lease::NAME);
    let aborted = store.abort_old_uploads(is_container_object, UNFINISHED_AGE_MIN, &lease);
    match aborted.await {
        Ok(0) => {}
        Ok(count) => log::info!("aborted {count} uploads that killed servers left unfinished"),
        Err(e) => log::debug!("uploads that killed servers left unfinished stay: {e}"),
    }
}

/// Removes the records that were copied along with the volume. None is needed once its WAL is one of its own, or none.
async fn remove_inherited(store: Store, volume_id: VolumeId) {
    match wal_marker::remove_inherited(&store, volume_id).await {
        Ok(0) => {}
        Ok(count) => log::info!("removed {count} log records of the volume that this one is a copy of"),
        Err(e) => log::debug!("log records of the volume that this one is a copy of stay: {e}"),
    }
}

/// The replay of a WAL.
struct Replaying<'a> {
    wal: &'a OpenWal,
    owner: &'a DriverWal,
    history: &'a Seen,
    watermark: u64,
}

impl Replaying<'_> {
    /// Applies the WAL to the volume. Returns the newest generation used.
    async fn run(
        &self,
        store: &Store,
        options: &VolumeOptions,
        engine: &HyperEngine,
    ) -> Result<(u64, Watermarks), VolumeError> {
        let wal = self.wal;
        let recorder = Watermarks::new(store.clone(), self.owner.epoch, wal.marker.clone());
        let replay_options = ReplayOptions {
            write_buffer_bytes: options.write_buffer_bytes,
            io_timeout: options.io_timeout,
        };
        let generation = wal
            .replay(engine, &recorder, self.watermark, self.history, &replay_options)
            .await?;
        // Nothing in it is needed any more, and keys that may not remove it serve as well.
        if let Err(e) = wal.store.trim(generation, wal.store.first_sequence() - 1).await {
            warn_left(&wal.url, &e);
        }
        Ok((generation, recorder))
    }
}

/// What is needed to open an engine.
struct EngineOf<'a> {
    store: &'a Store,
    options: &'a VolumeOptions,
    volume_id: Option<VolumeId>,
    ownership: Arc<dyn Ownership>,
    /// The state of the volume at the inspection.
    seen: StoredState,
    /// The entry of that state in the checkpoint list, if it was loaded.
    entry: Option<&'a CatalogueEntry>,
}

impl EngineOf<'_> {
    /// Opens the caches, and empties those that do not belong to this volume's history.
    async fn caches(&self) -> Result<(IndexCache, ReadCache), VolumeError> {
        let index_cache = match (&self.options.node_cache, self.volume_id) {
            (Some(config), Some(id)) => IndexCache::open(config, id).await.unwrap_or_else(|e| {
                warn!("{e}; it is kept in memory only");
                IndexCache::default()
            }),
            _ => IndexCache::default(),
        };
        let metrics = self.store.metrics();
        let index_cache = index_cache
            .with_memory(self.options.index_memory_bytes)
            .counted(metrics);
        let read_cache = ReadCache::open(&self.options.read_cache, self.volume_id).await;
        let read_cache = read_cache.counted(metrics);
        let newest = self.seen.id();
        let is_ours = |found| cache_state::is_of_volume(self.store, found, newest, self.entry);
        let index = async {
            if index_cache.has_disk() && !is_ours(index_cache.found()).await {
                index_cache.reset().await?;
            }
            Ok(())
        };
        let pages = async {
            if read_cache.has_disk() && !is_ours(read_cache.found()).await {
                read_cache.clear().await?;
            }
            Ok(())
        };
        let (index, pages): (io::Result<()>, io::Result<()>) = join!(index, pages);
        let of_pages = self.options.read_cache.disk.as_ref().map(|disk| &disk.dir);
        let of_nodes = self.options.node_cache.as_ref().map(|nodes| &nodes.path);
        let nodes_key = match of_nodes == of_pages {
            true => "cache_dir",
            false => "node_cache_config",
        };
        for (emptied, key) in [(index, nodes_key), (pages, "cache_dir")] {
            emptied.map_err(|e| VolumeError::InvalidInput(format!("{key} cannot be used: {e}")))?;
        }
        Ok((index_cache, read_cache))
    }
}

fn open_engine<'a>(of: EngineOf<'a>) -> BoxFuture<'a, Result<(HyperEngine, OpenState), VolumeError>> {
    async move {
        let (index_cache, read_cache) = of.caches().await?;
        let EngineOf {
            store,
            options,
            volume_id,
            ownership,
            seen,
            ..
        } = of;
        // Another server may publish between the inspection and a read-only open. That does no harm.
        let expected = (!options.read_only).then_some(seen);
        let (engine, state) = HyperEngine::open_owned(
            store,
            index_cache,
            read_cache,
            options.read_only,
            ownership,
            expected,
        )
        .await?;
        if expected.is_none_or(|seen| seen.id() == state.newest.id) {
            engine.warm_index();
        }
        let geometry = engine.geometry();
        info!(
            "opened {}: {} bytes in blocks of {}, checkpoint {}, volume {}{}",
            store.url,
            geometry.size_bytes(),
            geometry.block_size(),
            state.newest.id.cno,
            volume_id.map_or("without a label".to_owned(), |id| id.to_string()),
            if options.read_only { ", read-only" } else { "" }
        );
        Ok((engine, state))
    }
    .boxed()
}

/// Warns when this server is not given the buffer directory of the previous one, because it then goes on without the
/// changes in it. The lease names that directory; the directory itself is not read.
fn warn_of_buffer(lease: Option<&Stored>, options: &VolumeOptions) {
    let Some(record) = lease.map(|lease| &lease.record) else {
        return;
    };
    let given = options
        .write_buffer_dir
        .as_ref()
        .map(|dir| dir.display().to_string());
    if let Some(dir) = record.left_buffer()
        && given.as_deref() != Some(dir)
    {
        warn!(
            "the server before this one did not end cleanly, and kept its write buffer in {dir}: what it had answered and not \
             published is not applied without write_buffer_dir={dir}, and never after this server has had the volume"
        );
    }
}
