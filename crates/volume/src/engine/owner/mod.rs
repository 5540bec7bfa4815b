//! The thread that owns a container: it opens the container, takes requests and the ends of publishes in flight, and
//! recovers after a failed publish.
//!
//! * `thread`: the thread itself, and its end.
//! * `publish`: how it publishes; `relocate`: how it gives blocks other places.
//! * `in_flight`: a checkpoint that is laid out, on its way to the store beside the thread.
//! * `upload_source`: the bytes that such a checkpoint uploads.

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt;
use hyperfile::file::HyperTrait;
use log::{info, warn};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinError;

use super::container::{self, Container};
use super::copy::Reserved;
use super::guard::InodeGuard;
use super::limits::CheckpointNumbers;
use super::{Beside, Ownership, Relocated};
use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::VolumeError;
use crate::base::geometry::{Geometry, LiveGeometry};
use crate::format::inode;
use crate::format::stored_state::{Root, StateId};
use crate::index::cache::IndexCache;
use crate::index::checksums::IndexChecksums;
use crate::index::location_map::{LocationMap, Place};
use crate::index::lookup::{Published, RecentRoots};
use crate::index::relocation::Relocation;
use crate::store::{ETag, Store};
use crate::write_buffer::overlay::Frozen;
use in_flight::{PublishInFlight, StoredPublish};

mod grow;
mod in_flight;
mod publish;
mod relocate;
pub(super) mod thread;
mod upload_source;

/// Runs that the location map keeps: about 9 MiB.
const LOCATION_RUNS_MAX: usize = 192 * 1024;
/// The most blocks that one checkpoint zeroes. Each costs an index entry in memory until it is published.
pub(super) const ZEROED_BLOCKS_MAX: u64 = 2 << 20;

pub(super) type Reply<R> = oneshot::Sender<Result<R, VolumeError>>;

/// A request to the owner thread.
pub(super) enum Request {
    Publish {
        frozen: Arc<Frozen>,
        beside: Beside,
        reply: Reply<Option<Checkpoint>>,
    },
    Reserve {
        reply: Reply<Reserved>,
    },
    Relocate {
        relocation: Arc<Relocation>,
        reply: Reply<Option<Relocated>>,
    },
    Grow {
        size_bytes: u64,
        reply: Reply<Checkpoint>,
    },
    Recover {
        reply: Reply<()>,
    },
    Close {
        reply: oneshot::Sender<bool>,
    },
}

pub(super) struct Config {
    pub store: Store,
    pub checksums: IndexChecksums,
    pub index_cache: IndexCache,
    pub is_read_only: bool,
    pub ownership: Arc<dyn Ownership>,
    /// Updated by the owner thread.
    pub numbers: Arc<CheckpointNumbers>,
    /// The most blocks that one checkpoint zeroes, about.
    pub zeroed_blocks_max: u64,
}

pub(super) struct Opened {
    pub known: Arc<Mutex<Published>>,
    pub geometry: LiveGeometry,
    pub newest: Checkpoint,
    pub state_id: StateId,
    pub modified_ms: u64,
}

/// Blocks whose places a publish changes. The new place is `None` when it is not known.
pub(super) type Changed = Vec<(Range<u64>, Option<Place>)>;

/// A publish whose checkpoint is being stored.
pub(super) struct UnderWay {
    pub publish: PublishInFlight,
    pub state_id: StateId,
    /// The places to enter into the location map once it is stored.
    pub changed: Changed,
    pub root: Root,
    pub reply: Reply<Option<Checkpoint>>,
}

pub(super) struct Owner {
    pub(super) config: Config,
    /// The guard of the inode, for every container that this owner opens.
    guard: InodeGuard,
    pub(super) geometry: LiveGeometry,
    /// `None` after a panic inside the engine, until a recovery opens it anew.
    pub(super) container: Option<Container>,
    /// The newest published state, by this owner or an earlier one.
    pub(super) published: StateId,
    /// The states that publishes have tried to store since then, with unknown outcome. All of them are kept: a request
    /// that was given up may still be in flight, and take effect after a later attempt began.
    pub(super) attempted: Vec<StateId>,
    /// Publishes in flight, in their order. The container is ahead of the stored state by all of them.
    pub(super) under_way: VecDeque<UnderWay>,
    /// The most index nodes that the engine keeps in memory because publishes have been in flight ever since they were
    /// placed.
    pub(super) nodes_kept: u64,
    /// The highest number that was given out: a container that is opened anew goes on above it.
    pub(super) number_max: u64,
    /// Set once a publish failed: the container holds changes that are not stored, and must return to the stored state
    /// first.
    pub(super) must_recover: bool,
    /// The published state that reads use.
    pub(super) known: Arc<Mutex<Published>>,
}

/// Opens the container, reports the result, and serves requests until told to close. The receiver of the report must
/// check the ownership before its first request, because the opened state is already adopted.
pub(super) async fn run(config: Config, mut inbox: mpsc::UnboundedReceiver<Request>, opened: Reply<Opened>) {
    let mut owner = match open(config).await {
        Ok((owner, modified_ms)) => {
            let newest = owner.checkpoint(&owner.known.lock().root);
            let state = Opened {
                known: owner.known.clone(),
                geometry: owner.geometry.clone(),
                newest,
                state_id: owner.published,
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
    loop {
        tokio::select! {
            // The end of a publish is reported before the next one begins.
            biased;
            () = owner.land_next(), if !owner.under_way.is_empty() => {}
            request = inbox.recv() => match request {
                Some(Request::Publish { frozen, beside, reply }) => owner.publish(&frozen, beside, reply).await,
                Some(Request::Reserve { reply }) => {
                    let _ = reply.send(owner.reserve());
                }
                Some(Request::Relocate { relocation, reply }) => {
                    let _ = reply.send(owner.relocate(&relocation).await);
                }
                Some(Request::Grow { size_bytes, reply }) => {
                    let _ = reply.send(owner.grow(size_bytes).await);
                }
                Some(Request::Recover { reply }) => {
                    owner.land_all().await;
                    let result = AssertUnwindSafe(owner.recover()).catch_unwind().await;
                    let _ = reply.send(owner.after(result));
                }
                Some(Request::Close { reply }) => {
                    owner.land_all().await;
                    // A recovery does not tell what became of an attempt: of a clone it leaves the inode as it is, and a request of
                    // that attempt may still be carried out. A next owner that fences nobody would take it up for another writer's.
                    let is_settled = !owner.must_recover && owner.attempted.is_empty();
                    let keeps_nodes = is_settled && owner.config.index_cache.has_disk();
                    if let Some(container) = owner.container.as_ref().filter(|_| keeps_nodes) {
                        container::give_up_nodes(container);
                    }
                    drop(owner);
                    let _ = reply.send(is_settled);
                    return;
                }
                None => return owner.land_all().await,
            }
        }
    }
}

async fn open(config: Config) -> Result<(Owner, u64), VolumeError> {
    let url = config.store.url.to_string();
    let guard = InodeGuard::opening();
    let container = container::open(
        &config.store,
        &guard,
        config.checksums.clone(),
        config.index_cache.clone(),
        config.is_read_only,
    )
    .await
    .map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => VolumeError::NotFound { url: url.clone() },
        _ => VolumeError::engine(format!("opening the volume at {url}"), e),
    })?;
    guard.close();
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
    let published = StateId::of_container(&container);
    let modified_ms = (stat.st_mtime * 1000 + stat.st_mtime_nsec / 1_000_000).max(0) as u64;
    let known = Published {
        locations: LocationMap::new(geometry.block_size(), LOCATION_RUNS_MAX),
        root: Root(container.bmap_get_raw()),
        recent: RecentRoots::default(),
    };
    config.numbers.note(container.inode().get_last_seq().as_cno());
    let owner = Owner {
        known: Arc::new(Mutex::new(known)),
        config,
        guard,
        geometry: geometry.into(),
        container: Some(container),
        published,
        attempted: Vec::new(),
        under_way: VecDeque::new(),
        nodes_kept: 0,
        number_max: 0,
        must_recover: false,
    };
    Ok((owner, modified_ms))
}

/// Checks that this state is the stored one.
///
/// # Errors
/// When it is not; when the store fails.
pub(in crate::engine) async fn ensure_is_stored(store: &Store, adopted: StateId) -> Result<(), VolumeError> {
    let (raw, _) = inode::load(store).await?;
    match StateId::of_inode(&raw) == adopted {
        true => Ok(()),
        false => Err(VolumeError::engine(
            format!("taking up checkpoint {}", adopted.cno),
            std::io::Error::other("its inode could not be stored"),
        )),
    }
}

/// Which attempts may still take effect where this one is stored, and its inode was not rewritten: those that came after it. Their requests
/// may still be carried out, and an open takes up a checkpoint that was made upon the stored one.
fn made_upon(attempted: &[StateId], stored: StateId) -> Vec<StateId> {
    let at = attempted.iter().position(|attempt| stored.has_times_of(attempt));
    at.map_or_else(Vec::new, |at| attempted[at + 1..].to_vec())
}

impl Owner {
    /// The newest published checkpoint, whose root is `root`.
    pub(super) fn checkpoint(&self, root: &Root) -> Checkpoint {
        let now = || self.geometry.now().size_bytes();
        let size_bytes = self
            .container
            .as_ref()
            .map_or_else(now, |container| container.inode().size() as u64);
        Checkpoint {
            id: self.published.id(size_bytes, &root.0),
            size_bytes,
            published_ms: self.published.modified_ms(),
        }
    }

    /// As [`Self::checkpoint`], for a checkpoint that was published just now. Remembers its root.
    pub(super) fn reported(&self, root: Root) -> Checkpoint {
        let checkpoint = self.checkpoint(&root);
        self.known.lock().recent.note(checkpoint.id, root);
        checkpoint
    }

    /// A panic inside the engine leaves the container in an unknown state. The container is dropped, and the panic
    /// becomes an error.
    pub(super) fn after<R>(
        &mut self,
        result: std::thread::Result<Result<R, VolumeError>>,
    ) -> Result<R, VolumeError> {
        result.unwrap_or_else(|_| {
            self.container = None;
            Err(VolumeError::Internal(
                "the engine panicked; the container is opened anew".into(),
            ))
        })
    }

    pub(super) fn container(&mut self) -> Result<&mut Container, VolumeError> {
        self.container
            .as_mut()
            .ok_or_else(|| VolumeError::Internal("the container is being recovered".into()))
    }

    /// Waits for the oldest publish in flight and reports it. The wait may be dropped and repeated.
    async fn land_next(&mut self) {
        let Some(oldest) = self.under_way.front_mut() else {
            return;
        };
        let ended = oldest.publish.ended().await;
        if let Some(UnderWay {
            state_id,
            changed,
            root,
            reply,
            ..
        }) = self.under_way.pop_front()
        {
            let stored = self.stored(ended, state_id, changed, root);
            self.must_recover |= stored.is_err();
            let _ = reply.send(stored.map(Some));
        }
    }

    /// Waits for every publish in flight.
    pub(super) async fn land_all(&mut self) {
        while !self.under_way.is_empty() {
            self.land_next().await;
        }
    }

    fn stored(
        &mut self,
        ended: Result<std::io::Result<StoredPublish>, JoinError>,
        state_id: StateId,
        changed: Changed,
        root: Root,
    ) -> Result<Checkpoint, VolumeError> {
        let ended = ended.map_err(|e| {
            self.container = None;
            VolumeError::Internal(format!(
                "storing a checkpoint ended early ({e}); the container is opened anew"
            ))
        })?;
        let stored = ended.map_err(|e| VolumeError::engine("publishing a checkpoint", e))?;
        self.published = state_id;
        // No earlier attempt can be stored any more; a later one still can.
        let through = self.attempted.iter().position(|&a| a == state_id);
        self.attempted.drain(..through.map_or(0, |at| at + 1));
        if let Some(container) = &self.container {
            in_flight::stored(container, stored);
            if self.under_way.is_empty() {
                in_flight::all_stored(container);
                self.nodes_kept = 0;
            }
        }
        self.enter(changed, root);
        Ok(self.reported(root))
    }

    /// Enters the changed places and the new root in one step. That happens before the publish is reported, and so
    /// before its generation is dropped (Invariant R1).
    pub(super) fn enter(&self, changed: Changed, root: Root) {
        let mut known = self.known.lock();
        known.locations.publish(changed);
        known.root = root;
    }

    /// Whether this owner made a stored state: it is the state published last, or one that it has tried to publish
    /// since.
    fn is_own(&self, stored: StateId) -> bool {
        stored == self.published
            || self
                .attempted
                .iter()
                .any(|a| stored.cno > self.published.cno && stored.has_times_of(a))
    }

    fn foreign(&self, stored: StateId) -> VolumeError {
        let reason = format!(
            "checkpoint {} at {} was published by another writer (this server's newest is {})",
            stored.cno, self.config.store.url, self.published.cno
        );
        VolumeError::Fenced { reason }
    }

    /// Returns to the stored state. That is the only way on after a failed publish, whatever failed.
    ///
    /// A plain retry may be refused for ever. The engine's own recovery adopts whatever is stored, and may write to it.
    /// So the lease is checked and the stored state proved to be ours first. The guard then lets the engine read only
    /// the write that was proved, however often it reads the inode, and the lease is checked once more afterwards.
    async fn recover(&mut self) -> Result<(), VolumeError> {
        self.return_to_stored().await?;
        warn!(
            "recovered to checkpoint {}; unpublished writes are published again",
            self.published.cno
        );
        Ok(())
    }

    /// As [`Self::recover`], also where nothing failed.
    pub(super) async fn return_to_stored(&mut self) -> Result<(), VolumeError> {
        self.config.ownership.check().await?;
        let proved = self.prove_stored().await?;
        self.guard.recover(&proved);
        let is_opened_anew = self.container.is_none() || self.config.store.lineage().fork() > 0;
        let went_back = self.go_back().await;
        self.guard.close();
        if let Err(e) = went_back {
            // Another writer may have published meanwhile. An own publish that was still in flight may have been
            // stored, too.
            self.prove_stored().await?;
            return Err(e);
        }
        if is_opened_anew {
            self.ensure_stored().await?;
        }
        self.adopt(is_opened_anew).await
    }

    /// Refuses a state that the container has in memory alone: an open that takes up a checkpoint and cannot put its inode goes on
    /// without (`roll_forward` in hyperfile 0.14.0), and a takeover would lose that checkpoint.
    async fn ensure_stored(&mut self) -> Result<(), VolumeError> {
        let adopted = StateId::of_container(self.container()?);
        let stored = ensure_is_stored(&self.config.store, adopted).await;
        if stored.is_err() {
            self.container = None;
        }
        stored
    }

    /// The ETag of the stored inode, if it is one of this owner's writes.
    async fn prove_stored(&self) -> Result<ETag, VolumeError> {
        let (raw, info) = inode::load(&self.config.store).await?;
        let stored = StateId::of_inode(&raw);
        if !self.is_own(stored) {
            return Err(self.foreign(stored));
        }
        Ok(info.etag)
    }

    /// Remembers the highest number that the container has given out.
    pub(super) fn note_number(&mut self) {
        if let Some(container) = &self.container {
            self.number_max = self.number_max.max(container.inode().get_last_seq().as_cno());
        }
    }

    /// Makes the container return to the stored state.
    async fn go_back(&mut self) -> Result<(), VolumeError> {
        let failed = |e| VolumeError::engine("recovering after a failed publish", e);
        self.note_number();
        if self.config.store.lineage().fork() > 0 {
            // The engine would go on with a loader of its own making, which knows nothing of what a clone inherits.
            self.container = None;
        }
        match self.container.as_mut() {
            Some(container) => {
                container.discard_unflushed().await.map_err(failed)?;
                // It belongs to a publish that failed before it was stored.
                container.set_block_source(None).map_err(failed)?;
            }
            None => {
                let (store, cache) = (&self.config.store, self.config.index_cache.clone());
                let checksums = self.config.checksums.clone();
                let container =
                    container::open(store, &self.guard, checksums, cache, self.config.is_read_only).await;
                let container = container.map_err(failed)?;
                while container.inode().get_last_seq().as_cno() < self.number_max {
                    container.inode_mut().get_next_seq();
                }
                self.container = Some(container);
            }
        }
        Ok(())
    }

    /// Adopts the state to which the container returned. One that was opened anew has left the inode as it was, if that was the stored one.
    async fn adopt(&mut self, is_opened_anew: bool) -> Result<(), VolumeError> {
        let adopted = StateId::of_container(self.container()?);
        if !self.is_own(adopted) {
            return Err(self.foreign(adopted));
        }
        // Adopt, then check (Invariant O1): a new owner that comes later rewrites the inode, and then a publish on top
        // of the state adopted here is refused. The state ids alone depend on clocks.
        self.config.ownership.check().await?;
        // What its publish would have entered is not known here.
        let mut changed = Vec::new();
        if adopted != self.published {
            changed.push((0..u64::MAX, None));
            info!(
                "checkpoint {} was published, although the store's answer was lost",
                adopted.cno
            );
            self.published = adopted;
            self.attempted = match is_opened_anew {
                true => made_upon(&self.attempted, adopted),
                false => Vec::new(),
            };
        }
        let container = self.container()?;
        let (root, size) = (Root(container.bmap_get_raw()), container.inode().size() as u64);
        self.geometry.grow_to(size);
        self.enter(changed, root);
        self.must_recover = false;
        self.nodes_kept = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(cno: u64, at: i64) -> StateId {
        StateId {
            cno,
            mtime: (at, 0),
            ctime: (at, 0),
        }
    }

    /// A publish of a clone that was laid out upon the one that was adopted may arrive after that: it is this owner's all the same.
    #[test]
    fn attempts_after_the_one_that_is_stored_stay_known() {
        let attempted = [state(5, 50), state(6, 60), state(7, 70)];
        assert_eq!(made_upon(&attempted, state(5, 50)), attempted[1..]);
        assert_eq!(made_upon(&attempted, state(6, 60)), attempted[2..]);
        assert_eq!(made_upon(&attempted, state(7, 70)), []);
        assert_eq!(made_upon(&attempted, state(4, 40)), []);
    }
}
