//! The real engine: a Hyperfile container, owned by one thread.
//!
//! The container's futures are not `Send`, and every use of its index needs exclusive access. So it stays on a thread
//! of its own (`owner`), which takes requests to publish and to recover. Reads do not use that thread (`read_path`).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use btree_ondisk::NodeCache;
use futures::join;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;

use super::copy::{Copier, Reserved};
use super::limits::CheckpointNumbers;
use super::owner::thread::OwnerThread;
use super::owner::{self, Opened, Request};
use super::{Beside, Engine, Ownership, Relocated, SoleOwner};
use crate::base::checkpoint_id::{Checkpoint, CheckpointId};
use crate::base::error::VolumeError;
use crate::base::geometry::{Geometry, LiveGeometry};
use crate::format::stored_state::StoredState;
use crate::index::cache::IndexCache;
use crate::index::checksums::IndexChecksums;
use crate::index::lookup::{self, Index, Published};
use crate::index::relocation::Relocation;
use crate::read::cache::ReadCache;
use crate::read::read_path::{Objects, Reads};
use crate::read::reader::Reader;
use crate::store::Store;
use crate::write_buffer::overlay::Frozen;

/// Time that the owner gets to reach its next wait when it is abandoned. It may be in a stretch without one: laying out a large
/// checkpoint, or a file system's call.
const ABANDON_TIME_MAX: Duration = Duration::from_secs(5);

/// The engine of one volume's container.
pub struct HyperEngine {
    store: Store,
    geometry: LiveGeometry,
    known: Arc<Mutex<Published>>,
    reads: Reads,
    runtime: tokio::runtime::Handle,
    requests: mpsc::UnboundedSender<Request>,
    index_cache: IndexCache,
    numbers: Arc<CheckpointNumbers>,
    /// The newest published checkpoint.
    newest: Mutex<CheckpointId>,
    thread: Mutex<Option<OwnerThread>>,
    /// What is read into memory or the caches before anybody asks for it.
    warming: Mutex<Vec<AbortHandle>>,
    published_bytes: PublishedBytes,
}

/// What the open found.
#[derive(Debug, Clone, Copy)]
pub struct OpenState {
    /// The newest published checkpoint.
    pub newest: Checkpoint,
    /// The stored state.
    pub stored: StoredState,
    /// When the container last changed, in milliseconds since 1970-01-01 UTC.
    pub modified_ms: u64,
}

impl HyperEngine {
    /// Opens the container below `store`'s root and starts its owner thread, on the current runtime.
    ///
    /// # Errors
    /// [`VolumeError::NotFound`] when there is none.
    pub async fn open(
        store: &Store,
        index_cache: IndexCache,
        read_cache: ReadCache,
        is_read_only: bool,
    ) -> Result<(Self, OpenState), VolumeError> {
        let ownership = Arc::new(SoleOwner);
        Self::open_owned(store, index_cache, read_cache, is_read_only, ownership, None).await
    }

    /// As [`Self::open`], for a container that others may take over. `seen` is a state that was stored before this
    /// call. When it is the adopted state, the ownership need not be checked a second time, and the index is already
    /// being read into memory. When another checkpoint is adopted, nothing may be read until [`Self::use_caches`] was called.
    ///
    /// # Errors
    /// As [`Self::open`]; [`VolumeError::Fenced`] when another owner took the container over meanwhile.
    pub async fn open_owned(
        store: &Store,
        index_cache: IndexCache,
        read_cache: ReadCache,
        is_read_only: bool,
        ownership: Arc<dyn Ownership>,
        seen: Option<StoredState>,
    ) -> Result<(Self, OpenState), VolumeError> {
        let index_cache = index_cache.of_container(store);
        let (requests, inbox) = mpsc::unbounded_channel();
        let (opened, wait) = oneshot::channel();
        let runtime = tokio::runtime::Handle::current();
        let checksums = IndexChecksums::default();
        let numbers = Arc::<CheckpointNumbers>::default();
        let owner = owner::Config {
            store: store.clone(),
            checksums: checksums.clone(),
            index_cache: index_cache.clone(),
            is_read_only,
            ownership: ownership.clone(),
            numbers: numbers.clone(),
            zeroed_blocks_max: owner::ZEROED_BLOCKS_MAX,
        };
        let thread = OwnerThread::start(runtime.clone(), move || owner::run(owner, inbox, opened))
            .map_err(|e| VolumeError::engine("starting the owner thread", e))?;
        // Adopt, then check (Invariant O1). The adopted state is usually `seen`, which was read before this call. Then
        // this check comes after the read, although the open is still in progress. If a check fails, the owner thread
        // ends because its requests are dropped.
        let early_check = async {
            match seen {
                Some(_) => ownership.check().await,
                None => Ok(()),
            }
        };
        let warming = seen.map(|seen| {
            let warm = lookup::warm(store.clone(), index_cache.clone(), seen.root);
            runtime.spawn(warm)
        });
        let (opened, early_check) = join!(wait, early_check);
        let opened = opened.map_err(|_| thread_ended())??;
        let Opened {
            known,
            geometry,
            newest,
            state_id,
            modified_ms,
        } = opened;
        let stored = StoredState {
            state_id,
            root: known.lock().root,
            size_bytes: geometry.now().size_bytes(),
        };
        let index = Index::new(
            store.clone(),
            checksums,
            index_cache.clone(),
            geometry.clone(),
            known.clone(),
        );
        let reader = Reader::new(Objects(store.clone()), read_cache, geometry.now().block_size());
        let reads = Reads::new(geometry.clone(), known.clone(), index, reader);
        early_check?;
        if seen != Some(stored) {
            if let Some(warming) = warming {
                // The index that is being read may even be another volume's, if the volume was deleted and created
                // again.
                warming.abort();
                let _ = warming.await;
                index_cache.clear_memory();
            }
            ownership.check().await?;
            if !is_read_only {
                owner::ensure_is_stored(store, stored.state_id).await?;
            }
        }
        let engine = Self {
            store: store.clone(),
            geometry,
            known,
            reads,
            runtime,
            requests,
            index_cache,
            numbers,
            newest: Mutex::new(newest.id),
            thread: Mutex::new(Some(thread)),
            warming: Mutex::default(),
            published_bytes: PublishedBytes::default(),
        };
        let state = OpenState {
            newest,
            stored,
            modified_ms,
        };
        if seen.is_none_or(|seen| seen.id() == newest.id) {
            engine.use_caches();
        }
        Ok((engine, state))
    }

    /// Begins to use the caches, whose contents are of this history or were thrown away. Their disks say so from here on, and not
    /// before: a server that is killed while that is not known yet must not leave another history's contents under this one's name.
    pub fn use_caches(&self) {
        let newest = *self.newest.lock();
        self.note_checkpoint(newest);
        // A client reads the first block first: it holds a partition table or a superblock.
        let first = 0..u64::from(self.geometry.now().block_size());
        let ahead = self.runtime.spawn(self.reads.clone().read_ahead(first));
        self.warming.lock().push(ahead.abort_handle());
    }

    /// Starts reading the index into memory, in the background.
    pub fn warm_index(&self) {
        let warming = self.runtime.spawn(self.reads.clone().warm_index());
        self.warming.lock().push(warming.abort_handle());
    }

    fn stop_warming(&self) {
        for warming in self.warming.lock().drain(..) {
            warming.abort();
        }
    }

    /// Notes the newest checkpoint, also on the disks of the caches. Two publishes that overlap may come here in either order.
    fn note_checkpoint(&self, published: CheckpointId) {
        let mut newest = self.newest.lock();
        if published.cno < newest.cno {
            return;
        }
        *newest = published;
        self.reads.cache().note_checkpoint(published);
        self.index_cache.note_checkpoint(published);
    }

    /// What this process knows of the published state.
    pub(crate) fn published(&self) -> Arc<Mutex<Published>> {
        self.known.clone()
    }

    /// The index nodes that are in memory.
    pub(crate) fn index_in_memory(&self) -> IndexCache {
        self.index_cache.in_memory()
    }

    /// How much was published.
    pub(crate) fn published_bytes(&self) -> PublishedBytes {
        self.published_bytes.clone()
    }

    /// What copies stored blocks beside the owner.
    pub(crate) fn copier(&self) -> Copier {
        Copier::new(self.store.clone(), self.reads.clone())
    }

    /// What gives other work its turns at the store.
    pub(crate) fn reads(&self) -> Reads {
        self.reads.clone()
    }

    /// What sets numbers aside for copies.
    pub(crate) fn numbers_for_copies(&self) -> Numbers {
        Numbers(self.requests.clone())
    }

    /// Empties the caches: what they hold may be of another history.
    ///
    /// # Errors
    /// When a disk fails.
    pub async fn empty_caches(&self) -> Result<(), VolumeError> {
        let failed = |e| VolumeError::engine("emptying the caches", e);
        NodeCache::reset(&self.index_cache).await.map_err(failed)?;
        self.reads.cache().clear().await.map_err(failed)?;
        // The first read-ahead may have looked places up in them, or be at it.
        self.known.lock().locations.publish(vec![(0..u64::MAX, None)]);
        Ok(())
    }

    async fn ask<R>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<R, VolumeError>>) -> Request,
    ) -> Result<R, VolumeError> {
        let (reply, wait) = oneshot::channel();
        self.requests.send(request(reply)).map_err(|_| thread_ended())?;
        wait.await.map_err(|_| thread_ended())?
    }
}

#[async_trait]
impl Engine for HyperEngine {
    fn geometry(&self) -> Geometry {
        self.geometry.now()
    }

    async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        self.reads.read(offset_bytes, out).await
    }

    fn grouped(&self, ranges: Vec<Range<u64>>) -> Vec<Vec<Range<u64>>> {
        self.reads.grouped(ranges)
    }

    async fn read_near(
        &self,
        ranges: &[Range<u64>],
        each: &mut (dyn for<'b> FnMut(usize, &'b [u8]) + Send),
    ) -> Result<(), VolumeError> {
        self.reads.read_near(ranges, each).await
    }

    fn read_at_once(&self, offset_bytes: u64, out: &mut [u8]) -> bool {
        self.reads.read_at_once(offset_bytes, out)
    }

    fn note_read(&self, offset_bytes: u64, len_bytes: u64) {
        self.reads.note_read(&self.runtime, offset_bytes, len_bytes);
    }

    async fn prefetch(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), VolumeError> {
        self.reads.prefetch(offset_bytes, len_bytes).await
    }

    async fn block_runs(&self, blocks: Range<u64>) -> Result<Vec<(Range<u64>, bool)>, VolumeError> {
        self.reads.block_runs(blocks).await
    }

    fn block_runs_at_once(&self, blocks: Range<u64>) -> Option<Vec<(Range<u64>, bool)>> {
        self.reads.block_runs_at_once(blocks)
    }

    async fn publish(&self, frozen: Arc<Frozen>, beside: Beside) -> Result<Option<Checkpoint>, VolumeError> {
        let published = self
            .ask(|reply| Request::Publish {
                frozen: frozen.clone(),
                beside,
                reply,
            })
            .await?;
        let Some(checkpoint) = published else {
            return Ok(None);
        };
        self.note_checkpoint(checkpoint.id);
        self.reads.keep(&frozen, checkpoint.id.cno);
        let bytes = frozen.with(|g| g.buffered_bytes());
        self.published_bytes.0.fetch_add(bytes, Ordering::Relaxed);
        Ok(published)
    }

    fn check_write(&self) -> Result<(), VolumeError> {
        self.numbers.check_write()
    }

    fn check_publish(&self) -> Result<(), VolumeError> {
        self.numbers.check_publish()
    }

    async fn relocate(&self, relocation: Arc<Relocation>) -> Result<Option<Relocated>, VolumeError> {
        let relocated = self.ask(|reply| Request::Relocate { relocation, reply }).await?;
        if let Some(Relocated { checkpoint, applied }) = &relocated {
            self.note_checkpoint(checkpoint.id);
            self.reads.follow(&applied.moved);
        }
        Ok(relocated)
    }

    async fn grow(&self, size_bytes: u64) -> Result<Checkpoint, VolumeError> {
        let checkpoint = self.ask(|reply| Request::Grow { size_bytes, reply }).await?;
        self.note_checkpoint(checkpoint.id);
        Ok(checkpoint)
    }

    async fn recover(&self) -> Result<(), VolumeError> {
        self.ask(|reply| Request::Recover { reply }).await
    }

    async fn close(&self) -> bool {
        self.stop_warming();
        let (reply, wait) = oneshot::channel();
        let is_settled = match self.requests.send(Request::Close { reply }) {
            Ok(()) => wait.await.unwrap_or(false),
            Err(_) => false,
        };
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            thread.ended().await;
        }
        let newest = *self.newest.lock();
        self.index_cache.close(newest).await;
        self.reads.cache().close(newest).await;
        is_settled
    }

    async fn abandon(&self) {
        self.stop_warming();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            let _ = tokio::time::timeout(ABANDON_TIME_MAX, thread.abandon()).await;
        }
    }
}

impl Drop for HyperEngine {
    /// An opening that failed later leaves its caches to the next one at once.
    fn drop(&mut self) {
        self.stop_warming();
    }
}

/// Bytes that were published since the open, about. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct PublishedBytes(Arc<AtomicU64>);

impl PublishedBytes {
    /// How many.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Sets numbers aside for copies; ends with the engine.
#[derive(Clone)]
pub(crate) struct Numbers(mpsc::UnboundedSender<Request>);

impl Numbers {
    /// Sets the next number aside.
    ///
    /// # Errors
    /// When nothing can be relocated: the format has no parts, another tool's compaction is attached, a publish failed and was not
    /// recovered from, or the numbers end.
    pub async fn reserve(&self) -> Result<Reserved, VolumeError> {
        let (reply, wait) = oneshot::channel();
        self.0
            .send(Request::Reserve { reply })
            .map_err(|_| thread_ended())?;
        wait.await.map_err(|_| thread_ended())?
    }
}

fn thread_ended() -> VolumeError {
    VolumeError::Internal("the container's owner thread has ended".into())
}
