//! The read cache: pages of published data in memory, and on a local disk if one is given.
//!
//! A page is keyed by its place in the store. Stored objects never change, so a page stays valid as long as the volume
//! keeps one history. The pages on the disk are used only by a volume that has the newest checkpoint that they may come
//! from. A page from the disk is checked when it is read (foyer keeps a checksum with each entry). So a killed server
//! or a bad disk costs a miss and never a wrong byte.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use foyer::{
    BlockEngineBuilder, Code, CodeError, HybridCache, HybridCacheBuilder, HybridCachePolicy, S3FifoConfig,
};
use log::warn;
use parking_lot::RwLock;

use crate::base::checkpoint_id::CheckpointId;
use crate::base::volume_id::VolumeId;
use crate::disk::{Disk, RealDisk, cache_file, fitness};
use crate::format::object_names::cno_of;
use crate::meta::cache_state::CacheState;
use crate::metrics::Metrics;
use crate::read::cache_config::{ReadCacheConfig, ReadCacheDisk};
use crate::store::lineage::RootId;

/// Memory for a page besides its bytes.
const PAGE_OVERHEAD_BYTES: usize = 176;
/// The file that the server locks while it uses the directory.
const LOCK_NAME: &str = "lock";
/// The directory of the cache's own files.
const PAGES_NAME: &str = "pages";

/// The place of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageKey {
    /// The container that has the object: clones of one parent have other bytes under the same numbers, and share the parent's.
    pub root: RootId,
    /// The object, in the engine's own numbering.
    pub object: u64,
    /// Offset of the page in the object, in bytes.
    pub offset_bytes: u64,
}

impl Code for PageKey {
    fn encode(&self, writer: &mut impl Write) -> Result<(), CodeError> {
        writer.write_all(&self.root.0.to_le_bytes())?;
        writer.write_all(&self.object.to_le_bytes())?;
        writer.write_all(&self.offset_bytes.to_le_bytes())?;
        Ok(())
    }

    fn decode(reader: &mut impl Read) -> Result<Self, CodeError> {
        let mut root = [0; 16];
        reader.read_exact(&mut root)?;
        let mut next = || {
            let mut bytes = [0; 8];
            reader.read_exact(&mut bytes)?;
            Ok::<u64, io::Error>(u64::from_le_bytes(bytes))
        };
        let (object, offset_bytes) = (next()?, next()?);
        Ok(Self {
            root: RootId(u128::from_le_bytes(root)),
            object,
            offset_bytes,
        })
    }

    fn estimated_size(&self) -> usize {
        32
    }
}

type Pages = HybridCache<PageKey, Vec<u8>>;

/// Pages of published data. A cache without memory holds nothing.
pub struct ReadCache {
    /// None while they are thrown away, too.
    pages: RwLock<Option<Pages>>,
    /// 0 when it holds nothing.
    memory_bytes: u64,
    disk: Option<OnDisk>,
    has_failed: AtomicBool,
    /// A newer checkpoint could not be recorded on the disk, so no more pages are kept.
    is_stopped: AtomicBool,
    /// The number of the checkpoint that the disk records. A publish is shown to readers before it is recorded, and pages of it are not
    /// kept until then: a server that was killed in between would leave pages that a volume, restored from a backup of the recorded
    /// checkpoint, takes for its own.
    noted: AtomicU64,
    /// Where look-ups are counted.
    metrics: Metrics,
}

/// What a volume has of a local disk for its pages.
struct OnDisk {
    /// The directory of the volume.
    dir: PathBuf,
    size_bytes: u64,
    /// Held while the disk is in use.
    lock: File,
    /// What the disk records of the volume.
    state: CacheState,
}

impl ReadCache {
    /// A cache that holds nothing.
    pub fn none() -> Self {
        Self {
            pages: RwLock::new(None),
            memory_bytes: 0,
            disk: None,
            has_failed: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
            noted: AtomicU64::new(u64::MAX),
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

    /// Where it is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Opens the cache of the volume `volume_id`. A disk that cannot be used is gone without, with a warning.
    pub async fn open(config: &ReadCacheConfig, volume_id: Option<VolumeId>) -> Self {
        Self::open_on(config, volume_id, &RealDisk).await
    }

    async fn open_on(config: &ReadCacheConfig, volume_id: Option<VolumeId>, on: &dyn Disk) -> Self {
        if config.memory_bytes == 0 {
            return Self::none();
        }
        let (mut pages, mut disk) = (None, None);
        if let (Some(place), Some(id)) = (&config.disk, volume_id) {
            match on_disk(config.memory_bytes, place, id, on).await {
                Ok((opened, of_volume)) => (pages, disk) = (Some(opened), Some(of_volume)),
                Err(e) => warn!(
                    "the read cache in {} cannot be used, it is kept in memory only: {e}",
                    place.dir.join(id.to_string()).display()
                ),
            }
        }
        if pages.is_none() {
            pages = match in_memory(config.memory_bytes).storage().build().await {
                Ok(pages) => Some(pages),
                Err(e) => {
                    warn!("there is no read cache: {e}");
                    None
                }
            };
        }
        Self {
            memory_bytes: pages.as_ref().map_or(0, |_| config.memory_bytes),
            pages: RwLock::new(pages),
            disk,
            has_failed: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
            noted: AtomicU64::new(u64::MAX),
            metrics: Metrics::default(),
        }
    }

    /// The memory that the cache may take, in bytes; 0 when it holds nothing.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Whether a disk is in use.
    pub fn has_disk(&self) -> bool {
        self.disk.is_some()
    }

    /// Calls `look` with a page that is in memory. Returns `None` when the page is not there.
    pub fn with<R>(&self, key: PageKey, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let page = self.pages.read().as_ref()?.memory().get(&key)?;
        Some(look(page.value()))
    }

    /// Calls `look` with a page, which is read from the disk into memory if need be. Returns `None` when the page is in
    /// neither.
    pub async fn load<R>(&self, key: PageKey, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        match self.pages()?.get(&key).await {
            Ok(page) => page.map(|page| look(page.value())),
            Err(e) => {
                if !self.has_failed.swap(true, Ordering::Relaxed) {
                    warn!("the disk of the read cache failed; its data is read from the store: {e}");
                }
                None
            }
        }
    }

    /// The newest checkpoint from which pages on the disk may come, if there is a disk and this is known.
    pub(crate) fn found(&self) -> Option<CheckpointId> {
        self.disk.as_ref()?.state.found()
    }

    /// Empties the cache, because its pages belong to another history or may do so.
    ///
    /// # Errors
    /// When the disk cannot be emptied. It must then not be used.
    pub async fn clear(&self) -> io::Result<()> {
        let Some(disk) = &self.disk else {
            return match self.pages() {
                Some(pages) => pages.clear().await.map_err(io::Error::other),
                None => Ok(()),
            };
        };
        // foyer empties a disk by the first bytes of each unit alone. A unit that is filled again up to where an old run of pages
        // begins would bring that back at the next open. So the file goes, and reads miss meanwhile.
        let before = self.pages.write().take();
        if let Some(before) = before {
            before.memory().clear();
            if let Err(e) = before.close().await {
                warn!("closing the read cache in {}: {e}", disk.dir.display());
            }
        }
        cache_file::remove(&disk.dir.join(PAGES_NAME))?;
        let anew = disk.build(self.memory_bytes).await?;
        *self.pages.write() = Some(anew);
        Ok(())
    }

    fn pages(&self) -> Option<Pages> {
        self.pages.read().clone()
    }

    /// Notes the volume's newest checkpoint. Pages that are kept from here on come from this checkpoint or an earlier
    /// one.
    pub fn note_checkpoint(&self, newest: CheckpointId) {
        self.note(newest, false);
    }

    fn note(&self, newest: CheckpointId, is_closed: bool) {
        if let Some(disk) = &self.disk {
            if !disk.state.note(newest, is_closed) {
                self.is_stopped.store(true, Ordering::Relaxed);
            }
            self.noted.store(newest.cno, Ordering::Release);
        }
    }

    /// Adds a page.
    pub fn insert(&self, key: PageKey, page: Vec<u8>) {
        // In this order: where a newer one could not be recorded, that is seen.
        let is_noted = cno_of(key.object) <= self.noted.load(Ordering::Acquire);
        if !is_noted || self.is_stopped.load(Ordering::Relaxed) {
            return;
        }
        if let Some(pages) = self.pages.read().as_ref() {
            pages.insert(key, page);
        }
    }

    /// Takes a page out of memory. On the disk the oldest go first anyway, and foyer would keep a note of each that goes before.
    pub fn forget(&self, key: PageKey) {
        if let Some(pages) = self.pages.read().as_ref() {
            pages.memory().remove(&key);
        }
    }

    /// Writes the pending pages to the disk and unlocks the directory. `newest` is the volume's newest checkpoint.
    pub async fn close(&self, newest: CheckpointId) {
        let Some(disk) = &self.disk else { return };
        if let Some(pages) = self.pages() {
            match pages.close().await {
                Ok(()) => self.note(newest, true),
                Err(e) => warn!("closing the read cache: {e}"),
            }
        }
        let _ = disk.lock.unlock();
    }
}

impl OnDisk {
    /// Opens the pages that are there, with this much memory before them.
    async fn build(&self, memory_bytes: u64) -> io::Result<Pages> {
        let capacity_bytes = self.size_bytes as usize;
        let device = cache_file::open(&self.dir.join(PAGES_NAME), capacity_bytes)?;
        let unit_bytes = cache_file::unit_bytes(capacity_bytes);
        in_memory(memory_bytes)
            .storage()
            .with_engine_config(BlockEngineBuilder::new(device).with_block_size(unit_bytes))
            .build()
            .await
            .map_err(io::Error::other)
    }
}

fn in_memory(
    memory_bytes: u64,
) -> foyer::HybridCacheBuilderPhaseMemory<PageKey, Vec<u8>, foyer::DefaultHasher> {
    HybridCacheBuilder::new()
        .with_name("pages")
        .with_policy(HybridCachePolicy::WriteOnInsertion)
        .memory(memory_bytes as usize)
        // One pass over a large volume must not evict the pages that are read repeatedly.
        .with_eviction_config(S3FifoConfig::default())
        .with_weighter(|_: &PageKey, page: &Vec<u8>| page.len() + PAGE_OVERHEAD_BYTES)
}

async fn on_disk(
    memory_bytes: u64,
    place: &ReadCacheDisk,
    volume_id: VolumeId,
    on: &dyn Disk,
) -> io::Result<(Pages, OnDisk)> {
    let dir = place.dir.join(volume_id.to_string());
    let disk = OnDisk {
        lock: lock(&dir, on)?,
        state: CacheState::load(&dir),
        size_bytes: place.size_bytes,
        dir,
    };
    let pages = disk.build(memory_bytes).await?;
    Ok((pages, disk))
}

/// Makes the directory, accessible only to its owner, and locks it.
fn lock(dir: &Path, on: &dyn Disk) -> io::Result<File> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir.join(PAGES_NAME))?;
    let open = || {
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(dir.join(LOCK_NAME))
    };
    let (file, second) = (open()?, open()?);
    match fitness::try_lock(on, &file, &second, dir)? {
        true => Ok(file),
        false => Err(io::Error::other("another server uses it")),
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
