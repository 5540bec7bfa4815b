//! The thread that owns a container: locates blocks, publishes generations, recovers after a failed publish.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use futures::FutureExt;
use hyperfile::block_source::BlockSource;
use hyperfile::file::HyperTrait;
use log::{debug, info, warn};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::container::{self, Container};
use super::index::{Published, Root};
use super::index_cache::IndexCache;
use super::index_seal::IndexSeals;
use super::mark::Mark;
use super::{Checkpoint, Ownership, inode, placement};
use crate::error::VolumeError;
use crate::geometry::{BlockIndex, Geometry};
use crate::read::location::{LocationMap, Place};
use crate::store::Store;
use crate::writeback::overlay::Frozen;

/// Runs kept in the location map: about 16 MiB.
const LOCATION_RUNS_MAX: usize = 256 * 1024;
/// Blocks zeroed by one checkpoint at most: each costs an index entry in memory until it is published.
const ZEROED_BLOCKS_MAX: u64 = 2 << 20;
/// Blocks zeroed by one call of the engine.
const ZERO_CALL_BLOCKS: u64 = 64 * 1024;

type Reply<R> = oneshot::Sender<Result<R, VolumeError>>;

/// What the owner is asked.
pub(super) enum Request {
    Publish {
        frozen: Arc<Frozen>,
        reply: Reply<Option<Checkpoint>>,
    },
    Recover {
        reply: Reply<()>,
    },
    Close {
        reply: oneshot::Sender<()>,
    },
}

pub(super) struct Config {
    pub store: Store,
    pub seals: IndexSeals,
    pub index_cache: IndexCache,
    pub is_read_only: bool,
    pub ownership: Arc<dyn Ownership>,
}

pub(super) struct Opened {
    pub known: Arc<Mutex<Published>>,
    pub geometry: Geometry,
    pub newest: Checkpoint,
    pub mark: Mark,
    pub modified_ms: u64,
}

/// The bytes of a frozen generation, read by the engine while it uploads them.
struct FrozenSource(Arc<Frozen>);

impl BlockSource for FrozenSource {
    fn read_at(&self, off: u64, buf: &mut [u8]) -> std::io::Result<()> {
        if self.0.with(|g| g.copy_complete(off, buf)) {
            Ok(())
        } else {
            Err(std::io::Error::other(format!(
                "{} bytes at {off} were never written",
                buf.len()
            )))
        }
    }
}

struct Owner {
    config: Config,
    geometry: Geometry,
    /// `None` after a panic inside the engine, until a recovery opens it anew.
    container: Option<Container>,
    /// The state published last, by this owner or before it.
    published: Mark,
    /// What publishes tried to store since, their outcomes unknown. All of them: a request that was given up may still
    /// be on its way, and land after a later attempt began.
    attempted: Vec<Mark>,
    /// What reads go by.
    known: Arc<Mutex<Published>>,
}

/// Opens the container, says how that went, and serves requests until told to close. Who is told must check the ownership
/// before the first request: what was opened is adopted by now.
pub(super) async fn run(config: Config, mut inbox: mpsc::UnboundedReceiver<Request>, opened: Reply<Opened>) {
    let mut owner = match open(config).await {
        Ok((owner, modified_ms)) => {
            let newest = owner.checkpoint();
            let state = Opened {
                known: owner.known.clone(),
                geometry: owner.geometry,
                newest,
                mark: owner.published,
                modified_ms,
            };
            if opened.send(Ok(state)).is_err() {
                return;
            }
            owner
        }
        Err(e) => {
            let _ = opened.send(Err(e));
            return;
        }
    };
    while let Some(request) = inbox.recv().await {
        match request {
            Request::Publish { frozen, reply } => {
                let result = AssertUnwindSafe(owner.publish(&frozen)).catch_unwind().await;
                let _ = reply.send(owner.after(result));
            }
            Request::Recover { reply } => {
                let result = AssertUnwindSafe(owner.recover()).catch_unwind().await;
                let _ = reply.send(owner.after(result));
            }
            Request::Close { reply } => {
                drop(owner);
                let _ = reply.send(());
                return;
            }
        }
    }
}

async fn open(config: Config) -> Result<(Owner, u64), VolumeError> {
    let url = config.store.url.to_string();
    let container = container::open(
        &config.store,
        config.seals.clone(),
        config.index_cache.clone(),
        config.is_read_only,
    )
    .await
    .map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => VolumeError::NotFound { url: url.clone() },
        _ => VolumeError::engine(format!("opening the volume at {url}"), e),
    })?;
    let stat = container.stat();
    let block_size = u32::try_from(stat.st_blksize)
        .ok()
        .filter(|b| b.is_power_of_two() && *b <= 1 << 30);
    let Some(block_size) = block_size else {
        let reason = format!("its block size is {}", stat.st_blksize);
        return Err(VolumeError::Corrupt {
            what: format!("the volume at {url}"),
            reason,
        });
    };
    let geometry = Geometry::new(stat.st_size as u64, block_size);
    let published = Mark::of_container(&container);
    let modified_ms = (stat.st_mtime * 1000 + stat.st_mtime_nsec / 1_000_000).max(0) as u64;
    let known = Published {
        locations: LocationMap::new(geometry.block_size(), LOCATION_RUNS_MAX),
        root: Root(container.bmap_get_raw()),
    };
    let owner = Owner {
        known: Arc::new(Mutex::new(known)),
        config,
        geometry,
        container: Some(container),
        published,
        attempted: Vec::new(),
    };
    Ok((owner, modified_ms))
}

impl Owner {
    fn checkpoint(&self) -> Checkpoint {
        Checkpoint {
            cno: self.published.cno,
            size_bytes: self.geometry.size_bytes(),
        }
    }

    /// A panic inside the engine leaves the container in an unknown state: it is given up, and reported as a failure.
    fn after<R>(&mut self, result: std::thread::Result<Result<R, VolumeError>>) -> Result<R, VolumeError> {
        result.unwrap_or_else(|_| {
            self.container = None;
            Err(VolumeError::Internal(
                "the engine panicked; the container is opened anew".into(),
            ))
        })
    }

    fn container(&mut self) -> Result<&mut Container, VolumeError> {
        self.container
            .as_mut()
            .ok_or_else(|| VolumeError::Internal("the container is being recovered".into()))
    }

    async fn publish(&mut self, frozen: &Arc<Frozen>) -> Result<Option<Checkpoint>, VolumeError> {
        let started = Instant::now();
        let (zero_runs, data_runs) = frozen.with(|g| (g.zero_runs(), g.data_runs()));
        let mut newest = None;
        let mut zeroed = 0;
        for run in &zero_runs {
            let mut at = run.start;
            while at < run.end {
                let geometry = self.geometry;
                for found in placement::find(self.container()?, geometry, at..run.end).await? {
                    at = found.blocks.end.min(run.end);
                    if found.place == Place::Nothing {
                        continue;
                    }
                    let mut from = found.blocks.start;
                    while from < at {
                        let until = at.min(from + ZERO_CALL_BLOCKS);
                        let (start, len) = placement::bytes_of(self.geometry, &(from..until));
                        let zero = self.container()?.write_zero(start, len).await;
                        zero.map_err(|e| VolumeError::engine(format!("zeroing {len} bytes at {start}"), e))?;
                        zeroed += until - from;
                        from = until;
                    }
                }
                if zeroed >= ZEROED_BLOCKS_MAX {
                    newest = Some(self.flush().await?);
                    zeroed = 0;
                }
            }
        }
        if !data_runs.is_empty() {
            self.write_refs(frozen, &data_runs).await?;
        }
        let applied = started.elapsed();
        if zeroed > 0 || !data_runs.is_empty() {
            newest = Some(self.flush().await?);
        }
        // The source holds the generation: kept until the next publish, an idle volume would hold half its buffer.
        self.container()?
            .set_block_source(None)
            .map_err(|e| VolumeError::engine("releasing the source", e))?;
        let flushed = started.elapsed();
        self.update_locations(zero_runs, data_runs).await;
        debug!(
            "publish of {} bytes: applied in {applied:?}, stored in {:?}, located in {:?}",
            frozen.with(|g| g.buffered_bytes()),
            flushed - applied,
            started.elapsed() - flushed
        );
        Ok(newest)
    }

    async fn write_refs(
        &mut self,
        frozen: &Arc<Frozen>,
        data_runs: &[Range<u64>],
    ) -> Result<(), VolumeError> {
        let bs = u64::from(self.geometry.block_size());
        let whole_end = self.geometry.size_bytes() / bs;
        let source: Arc<dyn BlockSource> = Arc::new(FrozenSource(frozen.clone()));
        let container = self.container()?;
        container
            .set_block_source(Some(source))
            .map_err(|e| VolumeError::engine("setting the source", e))?;
        for run in data_runs {
            let whole = run.start..run.end.min(whole_end);
            if !whole.is_empty() {
                let (start, len) = (
                    (whole.start * bs) as usize,
                    ((whole.end - whole.start) * bs) as usize,
                );
                let written = self.container()?.write_ref(start, len).await;
                written.map_err(|e| VolumeError::engine(format!("writing {len} bytes at {start}"), e))?;
            }
            if run.end > whole_end {
                // A whole block here would move the end of the volume.
                let len = self.geometry.block_len(BlockIndex(whole_end)) as usize;
                let start = whole_end * bs;
                let mut bytes = vec![0; len];
                if !frozen.with(|g| g.copy_complete(start, &mut bytes)) {
                    return Err(VolumeError::Internal("the last block is incomplete".into()));
                }
                let written = self.container()?.write(start as usize, &bytes).await;
                written.map_err(|e| VolumeError::engine(format!("writing {len} bytes at {start}"), e))?;
            }
        }
        Ok(())
    }

    /// Publishes what was applied, with the flush that does not roll back.
    async fn flush(&mut self) -> Result<Checkpoint, VolumeError> {
        let container = self.container()?;
        let attempted = Mark::of_container(container);
        container.flush_timing_reset();
        let flushed = HyperTrait::flush(container).await;
        let took = container.flush_timing().snapshot();
        self.attempted.push(attempted);
        let segment = flushed.map_err(|e| VolumeError::engine("publishing a checkpoint", e))?;
        self.attempted.clear();
        self.published = attempted.at(segment.as_cno());
        debug!(
            "published checkpoint {}: laid out in {} ms, uploaded in {} ms, inode in {} ms",
            self.published.cno,
            took.build_segment_ns / 1_000_000,
            took.segment_done_ns / 1_000_000,
            took.flush_inode_ns / 1_000_000
        );
        Ok(self.checkpoint())
    }

    /// Enters what was published, and the new root, in one step: before the publish is reported, and so before its
    /// generation is dropped (Invariant R1).
    async fn update_locations(&mut self, zero_runs: Vec<Range<u64>>, data_runs: Vec<Range<u64>>) {
        let bs = u64::from(self.geometry.block_size());
        let mut changed: Vec<_> = zero_runs
            .into_iter()
            .map(|blocks| (blocks, Some(Place::Nothing)))
            .collect();
        for run in data_runs {
            let Some(container) = self.container.as_mut() else {
                changed.push((run, None));
                continue;
            };
            match placement::places_of(container, bs, run.clone()).await {
                Ok(runs) => changed.extend(runs.into_iter().map(|r| (r.blocks, Some(r.place)))),
                // Published all the same: looked up when it is asked for.
                Err(e) => {
                    debug!(
                        "the places of {} blocks are not known yet: {e}",
                        run.end - run.start
                    );
                    changed.push((run, None));
                }
            }
        }
        self.enter(changed);
    }

    fn enter(&mut self, changed: Vec<(Range<u64>, Option<Place>)>) {
        let Some(root) = self.container.as_ref().map(|c| Root(c.bmap_get_raw())) else {
            return;
        };
        let mut known = self.known.lock();
        known.locations.publish(changed);
        known.root = root;
    }

    /// Whether a stored state is one this owner made: the last it published, or the one it just tried to.
    fn is_own(&self, stored: Mark) -> bool {
        stored == self.published
            || self
                .attempted
                .iter()
                .any(|a| stored.cno > self.published.cno && stored.has_time_of(a))
    }

    fn foreign(&self, stored: Mark) -> VolumeError {
        let reason = format!(
            "checkpoint {} at {} was published by another writer (this server's newest is {})",
            stored.cno, self.config.store.url, self.published.cno
        );
        VolumeError::Fenced { reason }
    }

    /// Goes back to what is stored: the one way on after a failed publish, whatever failed.
    ///
    /// A plain retry can stay refused for ever. The engine's own way back adopts whatever is stored, and may write to
    /// it, so the state stored and the lease are proved to be ours before, and once more after.
    async fn recover(&mut self) -> Result<(), VolumeError> {
        let failed = |e| VolumeError::engine("recovering after a failed publish", e);
        self.config.ownership.check().await?;
        let (raw, _) = inode::load(&self.config.store).await?;
        let stored = Mark::of_inode(&raw);
        if !self.is_own(stored) {
            return Err(self.foreign(stored));
        }
        match self.container.as_mut() {
            Some(container) => container.discard_unflushed().await.map_err(failed)?,
            None => {
                let (store, cache) = (&self.config.store, self.config.index_cache.clone());
                let container =
                    container::open(store, self.config.seals.clone(), cache, self.config.is_read_only)
                        .await
                        .map_err(failed)?;
                self.container = Some(container);
            }
        }
        let adopted = Mark::of_container(self.container()?);
        if !self.is_own(adopted) {
            return Err(self.foreign(adopted));
        }
        // Adopt, then check (Invariant O1): a new owner that comes after this rewrites the inode, and what was adopted
        // here is refused. The marks alone depend on clocks.
        self.config.ownership.check().await?;
        if adopted != self.published {
            info!(
                "checkpoint {} had been published though its answer was lost",
                adopted.cno
            );
            self.published = adopted;
            self.attempted.clear();
        }
        self.enter(Vec::new());
        warn!(
            "recovered to checkpoint {}; what is unpublished is published again",
            adopted.cno
        );
        Ok(())
    }
}
