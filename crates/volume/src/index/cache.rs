//! The cache of a container's index nodes: some in memory, and more on a local disk when `node_cache_config` says so.
//!
//! Nodes are keyed by the container that has them and their pointer, which is immutable within one container; so every volume has a directory of its own
//! below the one configured, named by its id, and is used only by a volume that has the checkpoint which the cache goes up
//! to. That checkpoint is recorded before a node of it is added, so a server that was killed leaves the next one what it had.
//! A node from the disk is checked when it is read (foyer keeps a checksum with each entry). A failing cache is a cache that
//! misses.

use std::io::{self, Read, Write};
use std::sync::Arc;

use btree_ondisk::{NodeCache, NodeTieredCacheStats};
use foyer::{
    BlockEngineBuilder, Cache, CacheBuilder, Code, CodeError, HybridCache, HybridCacheBuilder,
    HybridCachePolicy,
};
use log::warn;
use parking_lot::{Mutex, RwLock};

use super::cache_files::{NodeFiles, named};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::volume_id::VolumeId;
use crate::disk::{RealDisk, cache_file};
use crate::format::node::NODE_BYTES;
use crate::format::object_names::cno_of_pointer;
use crate::index::cache_config::{INDEX_MEMORY_DEFAULT_BYTES, NodeCacheConfig, NodeCacheStrategy};
use crate::meta::cache_state::CacheState;
use crate::metrics::Metrics;
use crate::store::Store;
use crate::store::lineage::{Lineage, RootId};

/// The most nodes that wait for their checkpoint to be recorded. More are not added to the disk; they take 4 MiB.
const WAITING_MAX: usize = 1024;
type Nodes = HybridCache<NodeKey, Vec<u8>>;

/// A node: the container that has it, and its pointer there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct NodeKey {
    root: RootId,
    pointer: u64,
}

impl Code for NodeKey {
    fn encode(&self, writer: &mut impl Write) -> Result<(), CodeError> {
        writer.write_all(&self.root.0.to_le_bytes())?;
        writer.write_all(&self.pointer.to_le_bytes())?;
        Ok(())
    }

    fn decode(reader: &mut impl Read) -> Result<Self, CodeError> {
        let (mut root, mut pointer) = ([0; 16], [0; 8]);
        reader.read_exact(&mut root)?;
        reader.read_exact(&mut pointer)?;
        Ok(Self {
            root: RootId(u128::from_le_bytes(root)),
            pointer: u64::from_le_bytes(pointer),
        })
    }

    fn estimated_size(&self) -> usize {
        24
    }
}

/// A cache of index nodes. All clones share its contents.
#[derive(Clone)]
pub struct IndexCache {
    memory: Cache<NodeKey, Box<[u8]>>,
    /// Of the container that it is used for.
    lineage: Arc<Lineage>,
    nodes_in_memory: usize,
    disk: Option<Arc<Disk>>,
    /// Where look-ups are counted.
    metrics: Metrics,
}

struct Disk {
    nodes: RwLock<Option<Nodes>>,
    state: CacheState,
    recorded: Mutex<Recorded>,
    capacity_bytes: usize,
    /// Locked until the cache is closed, because only this process may write and empty the directory.
    files: NodeFiles,
}

/// What may be added to the disk. A cache is used by a volume that has the recorded checkpoint, so a node of a later one would be
/// used by a volume that has another node in its place.
#[derive(Default)]
struct Recorded {
    /// The number of the recorded checkpoint; `None` until it is this volume's.
    cno: Option<u64>,
    /// Nodes of later checkpoints.
    waiting: Vec<(NodeKey, Vec<u8>)>,
}

impl Disk {
    fn nodes(&self) -> Option<Nodes> {
        self.nodes.read().clone()
    }

    fn add(&self, key: NodeKey, node: &[u8]) {
        {
            let mut recorded = self.recorded.lock();
            if recorded.cno.is_none_or(|cno| cno < cno_of_pointer(key.pointer)) {
                if recorded.waiting.len() < WAITING_MAX {
                    recorded.waiting.push((key, node.to_vec()));
                }
                return;
            }
        }
        if let Some(nodes) = self.nodes() {
            nodes.insert(key, node.to_vec());
        }
    }

    /// Records the volume's newest checkpoint, and adds the nodes that waited for that.
    fn record(&self, newest: CheckpointId, is_closed: bool) {
        if !self.state.note(newest, is_closed) {
            return;
        }
        let is_added = |(key, _): &mut (NodeKey, Vec<u8>)| cno_of_pointer(key.pointer) <= newest.cno;
        let added: Vec<_> = {
            let mut recorded = self.recorded.lock();
            recorded.cno = Some(newest.cno);
            recorded.waiting.extract_if(.., is_added).collect()
        };
        if let Some(nodes) = self.nodes() {
            for (key, node) in added {
                nodes.insert(key, node);
            }
        }
    }
}

impl Default for IndexCache {
    /// A cache in memory only.
    fn default() -> Self {
        Self::in_memory_of(INDEX_MEMORY_DEFAULT_BYTES, None)
    }
}

impl IndexCache {
    fn in_memory_of(memory_bytes: u64, disk: Option<Arc<Disk>>) -> Self {
        let nodes_in_memory = usize::try_from(memory_bytes / NODE_BYTES as u64).unwrap_or(usize::MAX);
        Self {
            memory: CacheBuilder::new(nodes_in_memory)
                .with_name("index-nodes")
                .build(),
            nodes_in_memory,
            lineage: Arc::default(),
            disk,
            metrics: Metrics::default(),
        }
    }

    /// The same cache, counted here.
    #[must_use]
    pub fn counted(self, metrics: &Metrics) -> Self {
        Self {
            metrics: metrics.clone(),
            ..self
        }
    }

    /// The same cache, shared, for the container of `store`: nodes that it has inherited are its parents'.
    #[must_use]
    pub fn of_container(&self, store: &Store) -> Self {
        Self {
            lineage: store.lineage().clone(),
            ..self.clone()
        }
    }

    fn key(&self, pointer: u64) -> NodeKey {
        NodeKey {
            root: self.lineage.root_of(cno_of_pointer(pointer)),
            pointer,
        }
    }

    /// The same cache with this much memory, which is empty.
    #[must_use]
    pub fn with_memory(self, memory_bytes: u64) -> Self {
        Self::in_memory_of(memory_bytes, self.disk).counted(&self.metrics)
    }

    /// The number of nodes for which there is memory.
    pub(super) fn nodes_in_memory(&self) -> usize {
        self.nodes_in_memory
    }

    /// Opens the cache of the volume `volume_id`.
    ///
    /// # Errors
    /// When the directory cannot be made or used; the text names it.
    pub async fn open(config: &NodeCacheConfig, volume_id: VolumeId) -> io::Result<Self> {
        let of_volume = config.path.join(volume_id.to_string());
        let Some(files) = NodeFiles::lock(&of_volume, &RealDisk)? else {
            return Ok(Self::default());
        };
        let is_trusted =
            matches!(config.strategy, NodeCacheStrategy::ReuseCache) && !files.is_of_killed_earlier();
        if !is_trusted {
            files.empty()?;
        }
        let capacity_bytes = config.size_bytes as usize;
        let state = CacheState::load(files.dir());
        let nodes = build(&files, capacity_bytes).await?;
        Ok(Self {
            disk: Some(Arc::new(Disk {
                state,
                nodes: RwLock::new(Some(nodes)),
                recorded: Mutex::default(),
                capacity_bytes,
                files,
            })),
            ..Self::default()
        })
    }

    /// The part of the cache that is in memory. It is shared with this one.
    pub fn in_memory(&self) -> Self {
        Self {
            memory: self.memory.clone(),
            lineage: self.lineage.clone(),
            nodes_in_memory: self.nodes_in_memory,
            disk: None,
            metrics: self.metrics.clone(),
        }
    }

    /// Drops the nodes in memory, and those that were to be added to the disk.
    pub fn clear_memory(&self) {
        self.memory.clear();
        if let Some(disk) = &self.disk {
            disk.recorded.lock().waiting.clear();
        }
    }

    /// Adds a fetched node, unless it is in memory already.
    pub fn keep(&self, pointer: u64, node: &[u8]) {
        if !self.memory.contains(&self.key(pointer)) {
            self.push(&pointer, node);
        }
    }

    /// The newest checkpoint from which nodes on the disk may come, if there is a disk and this is known.
    pub(crate) fn found(&self) -> Option<CheckpointId> {
        self.disk.as_ref()?.state.found()
    }

    /// Whether there is a disk.
    pub(crate) fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Notes the volume's newest checkpoint. Nodes go to the disk only from this checkpoint and earlier ones.
    pub fn note_checkpoint(&self, newest: CheckpointId) {
        if let Some(disk) = &self.disk {
            disk.record(newest, false);
        }
    }

    /// As [`Self::shut`], and records that the volume's newest checkpoint is `newest`.
    pub async fn close(&self, newest: CheckpointId) {
        if let Some(disk) = &self.disk {
            disk.record(newest, true);
        }
        self.shut().await;
        if let Some(disk) = &self.disk {
            disk.files.unlock();
        }
    }

    /// Writes the held nodes to the disk and closes the files. From then on the cache misses.
    async fn shut(&self) {
        let Some(disk) = &self.disk else { return };
        let nodes = disk.nodes.write().take();
        if let Some(nodes) = nodes {
            nodes.memory().flush().await;
            if let Err(e) = nodes.close().await {
                warn!("closing the node cache in {}: {e}", disk.files.dir().display());
            }
        }
    }

    async fn load_from_disk(&self, key: NodeKey, data: &mut [u8]) -> bool {
        let Some(nodes) = self.nodes() else {
            return false;
        };
        match nodes.get(&key).await {
            Ok(Some(entry)) if entry.value().len() == data.len() => {
                data.copy_from_slice(entry.value());
                self.memory.insert(key, entry.value().as_slice().into());
                true
            }
            Ok(_) => false,
            Err(e) => {
                warn!("the node cache failed; the node is read from the store: {e}");
                false
            }
        }
    }

    fn nodes(&self) -> Option<Nodes> {
        self.disk.as_ref().and_then(|disk| disk.nodes())
    }
}

async fn build(files: &NodeFiles, capacity_bytes: usize) -> io::Result<Nodes> {
    files.make()?;
    let dir = files.dir();
    let device = cache_file::open(dir, capacity_bytes).map_err(|e| named(dir, &e))?;
    let unit_bytes = cache_file::unit_bytes(capacity_bytes);
    HybridCacheBuilder::new()
        .with_name("index-nodes")
        .with_policy(HybridCachePolicy::WriteOnInsertion)
        .memory(0)
        .storage()
        .with_engine_config(BlockEngineBuilder::new(device).with_block_size(unit_bytes))
        .build()
        .await
        .map_err(|e| named(dir, &e))
}

impl NodeCache<u64> for IndexCache {
    fn push(&self, p: &u64, data: &[u8]) {
        let key = self.key(*p);
        self.memory.insert(key, data.into());
        if let Some(disk) = &self.disk {
            disk.add(key, data);
        }
    }

    async fn load(&self, p: u64, data: &mut [u8]) -> io::Result<bool> {
        let key = self.key(p);
        if let Some(node) = self
            .memory
            .get(&key)
            .filter(|node| node.value().len() == data.len())
        {
            data.copy_from_slice(node.value());
            self.metrics.caches.index.memory.one();
            return Ok(true);
        }
        let found = self.load_from_disk(key, data).await;
        match found {
            true => self.metrics.caches.index.disk.one(),
            false => self.metrics.caches.index.misses.one(),
        }
        Ok(found)
    }

    fn invalid(&self, p: &u64) {
        let key = self.key(*p);
        self.memory.remove(&key);
        if let Some(nodes) = self.nodes() {
            nodes.remove(&key);
        }
    }

    fn evict(&self) {
        if let Some(nodes) = self.nodes() {
            nodes.memory().evict_all();
        }
    }

    fn get_stats(&self) -> NodeTieredCacheStats {
        NodeTieredCacheStats::default()
    }

    fn shutdown(&self) {}

    async fn reset(&self) -> io::Result<()> {
        self.clear_memory();
        let Some(disk) = &self.disk else { return Ok(()) };
        self.shut().await;
        disk.files.empty()?;
        let nodes = build(&disk.files, disk.capacity_bytes).await?;
        *disk.nodes.write() = Some(nodes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &std::path::Path, strategy: NodeCacheStrategy) -> NodeCacheConfig {
        NodeCacheConfig {
            path: dir.to_owned(),
            size_bytes: 32 << 20,
            strategy,
        }
    }

    fn id(number: u128) -> VolumeId {
        VolumeId::from_uuid(uuid::Uuid::from_u128(number))
    }

    fn at(cno: u64) -> CheckpointId {
        CheckpointId {
            cno,
            check: crate::base::checkpoint_id::InodeCheck::from_bits(cno),
        }
    }

    async fn has(cache: &IndexCache, key: u64) -> bool {
        cache.load(key, &mut [0; 4096]).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn nodes_stay_with_their_volume() {
        let dir = tempfile::tempdir().unwrap();
        let reuse = config(dir.path(), NodeCacheStrategy::ReuseCache);
        let cache = IndexCache::open(&reuse, id(1)).await.unwrap();
        cache.note_checkpoint(at(1));
        cache.push(&7, &[7; 4096]);
        cache.nodes().unwrap().storage().wait().await;
        assert!(has(&cache, 7).await, "in memory");
        cache.memory.clear();
        assert!(has(&cache, 7).await, "on the disk");
        cache.close(at(1)).await;
        cache.memory.clear();
        assert!(!has(&cache, 7).await, "closed");

        let other = IndexCache::open(&reuse, id(2)).await.unwrap();
        assert!(!has(&other, 7).await, "another volume");
        let again = IndexCache::open(&reuse, id(1)).await.unwrap();
        assert!(has(&again, 7).await, "kept");
        // A second server at the same time leaves the first one's files alone.
        let beside = IndexCache::open(&reuse, id(1)).await.unwrap();
        assert!(!beside.has_disk() && again.has_disk());
        beside.push(&9, &[9; 4096]);
        beside.close(at(1)).await;
        again.note_checkpoint(at(2));
        // It is dropped without close, as when a server is killed.
        drop(again);
        let mut after_kill = IndexCache::open(&reuse, id(1)).await.unwrap();
        // A child that another test starts has the locked file, too, until it runs its program.
        let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !after_kill.has_disk() {
            assert!(std::time::Instant::now() < until, "the lock is held");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            after_kill = IndexCache::open(&reuse, id(1)).await.unwrap();
        }
        assert_eq!(after_kill.found(), Some(at(2)));
        assert!(has(&after_kill, 7).await, "kept over a kill");
        after_kill.note_checkpoint(at(2));
        after_kill.push(&8, &[8; 4096]);
        after_kill.close(at(2)).await;
        // A server of an earlier release was killed: it recorded nothing since its start.
        let earlier = dir.path().join(id(1).to_string()).join("nodes/open");
        std::fs::write(&earlier, "").unwrap();
        let after_earlier = IndexCache::open(&reuse, id(1)).await.unwrap();
        assert!(after_earlier.found().is_none() && !earlier.exists());
        assert!(!has(&after_earlier, 7).await, "an earlier release");
        after_earlier.note_checkpoint(at(2));
        after_earlier.push(&8, &[8; 4096]);
        after_earlier.close(at(2)).await;
        let recreate = config(dir.path(), NodeCacheStrategy::Recreate);
        assert!(!has(&IndexCache::open(&recreate, id(1)).await.unwrap(), 8).await);
    }

    /// Otherwise a volume that is put back to the recorded checkpoint, and goes on from there, would find nodes of what came after
    /// it under the numbers that it uses again.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn no_node_is_on_the_disk_before_its_checkpoint_is_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let reuse = config(dir.path(), NodeCacheStrategy::ReuseCache);
        let of = |cno: u64| 1 << 62 | cno << 32;
        let on_disk = async |cache: &IndexCache, cno| {
            if let Some(nodes) = cache.nodes() {
                nodes.storage().wait().await;
            }
            cache.memory.clear();
            has(cache, of(cno)).await
        };
        let cache = IndexCache::open(&reuse, id(1)).await.unwrap();
        cache.push(&of(3), &[3; 4096]);
        cache.push(&of(4), &[4; 4096]);
        assert!(has(&cache, of(3)).await, "in memory");
        assert!(!on_disk(&cache, 3).await, "nothing is recorded");
        cache.note_checkpoint(at(3));
        assert!(on_disk(&cache, 3).await, "it waited for that");
        assert!(!on_disk(&cache, 4).await, "a later one");
        cache.push(&of(2), &[2; 4096]);
        assert!(on_disk(&cache, 2).await, "an earlier one");
        cache.note_checkpoint(at(4));
        assert!(on_disk(&cache, 4).await);
        // What was fetched for what turned out to be another volume.
        cache.push(&of(5), &[5; 4096]);
        cache.clear_memory();
        cache.note_checkpoint(at(5));
        assert!(!on_disk(&cache, 5).await, "dropped");
    }

    /// Two clones of one parent, each with nodes of its own under the same pointers.
    #[tokio::test(flavor = "multi_thread")]
    async fn clones_share_the_nodes_of_their_parent_and_no_others() {
        use crate::store::lineage::Inherited;
        let dir = tempfile::tempdir().unwrap();
        let url =
            crate::base::url::VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
        let options = crate::store::options::StoreOptions::default();
        let store = crate::store::connect_for_create(&url, &options).await.unwrap();
        let child = |number: u128| {
            let inherited = Inherited {
                up_to: 7,
                volume_id: id(1),
                store: store.clone(),
            };
            store.with_lineage(Lineage::new(Some(id(number)), vec![inherited]))
        };
        let cache = IndexCache::default();
        let (parent, a, b) = (
            cache.of_container(&store.with_lineage(Lineage::new(Some(id(1)), Vec::new()))),
            cache.of_container(&child(2)),
            cache.of_container(&child(3)),
        );
        let (inherited, own) = (1 << 62 | 7 << 32, 1 << 62 | 8 << 32);
        a.push(&inherited, &[7; 4096]);
        a.push(&own, &[8; 4096]);
        assert!(has(&b, inherited).await && has(&parent, inherited).await);
        assert!(has(&a, own).await && !has(&b, own).await && !has(&parent, own).await);
        b.invalid(&own);
        assert!(has(&a, own).await);
    }
}
