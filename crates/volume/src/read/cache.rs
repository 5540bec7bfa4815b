//! The read cache: pages of published data in memory, and on a local disk when one is given.
//!
//! A page is keyed by where it is stored. Stored objects never change, so nothing here ever goes stale while the volume has
//! one history; what the disk holds is used only by a volume that has the checkpoint which it goes up to. It is checked when
//! it is read (foyer keeps a checksum with each entry), so that a killed server or a bad disk costs a miss and no wrong byte.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use foyer::{
    BlockEngineBuilder, Code, CodeError, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder,
    HybridCachePolicy, S3FifoConfig,
};
use log::warn;

use crate::base::checkpoint_id::CheckpointId;
use crate::base::volume_id::VolumeId;
use crate::disk::{Disk, RealDisk, fitness};
use crate::meta::cache_state::CacheState;
use crate::metrics::Metrics;
use crate::read::cache_config::{ReadCacheConfig, ReadCacheDisk};
use crate::store::lineage::RootId;

/// Memory for a page besides its bytes.
const PAGE_OVERHEAD_BYTES: usize = 176;
/// Unit in which room on the disk is taken and reclaimed.
const DISK_UNIT_BYTES: usize = 16 << 20;
/// Locked by the server that uses the directory.
const LOCK_NAME: &str = "lock";
/// The directory of the cache's own files.
const PAGES_NAME: &str = "pages";

/// Where a page is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageKey {
    /// The container that has the object: clones of one parent have other bytes under the same numbers, and share the parent's.
    pub root: RootId,
    /// The object, in the engine's own numbering.
    pub object: u64,
    /// Where in the object the page starts, in bytes.
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

/// Pages of published data. Without memory given to it, it holds nothing.
pub struct ReadCache {
    pages: Option<Pages>,
    memory_bytes: u64,
    /// Held as long as the disk is used.
    lock: Option<File>,
    /// What the disk says of the volume.
    state: Option<CacheState>,
    has_failed: AtomicBool,
    /// The disk could not be told of a newer checkpoint: nothing more is kept.
    is_stopped: AtomicBool,
    /// Where look-ups are counted.
    metrics: Metrics,
}

impl ReadCache {
    /// A cache that holds nothing.
    pub fn none() -> Self {
        Self {
            pages: None,
            memory_bytes: 0,
            lock: None,
            state: None,
            has_failed: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
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
        let mut lock = None;
        let mut state = None;
        let mut pages = None;
        if let (Some(disk), Some(id)) = (&config.disk, volume_id) {
            match on_disk(config, disk, id, on).await {
                Ok((opened, locked)) => {
                    (pages, lock) = (Some(opened), Some(locked));
                    state = Some(CacheState::load(&disk.dir.join(id.to_string())));
                }
                Err(e) => warn!(
                    "the read cache in {} cannot be used, it is kept in memory only: {e}",
                    disk.dir.join(id.to_string()).display()
                ),
            }
        }
        if pages.is_none() {
            pages = match in_memory(config).storage().build().await {
                Ok(pages) => Some(pages),
                Err(e) => {
                    warn!("there is no read cache: {e}");
                    None
                }
            };
        }
        Self {
            pages,
            memory_bytes: config.memory_bytes,
            lock,
            state,
            has_failed: AtomicBool::new(false),
            is_stopped: AtomicBool::new(false),
            metrics: Metrics::default(),
        }
    }

    /// Bytes of memory it may take; 0 when it holds nothing.
    pub fn memory_bytes(&self) -> u64 {
        self.pages.as_ref().map_or(0, |_| self.memory_bytes)
    }

    /// Whether a disk is in use.
    pub fn has_disk(&self) -> bool {
        self.lock.is_some()
    }

    /// Looks at a page in memory; `None` when it is not there.
    pub fn with<R>(&self, key: PageKey, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        let page = self.pages.as_ref()?.memory().get(&key)?;
        Some(look(page.value()))
    }

    /// Brings a page from the disk into memory and looks at it; `None` when it is in neither.
    pub async fn load<R>(&self, key: PageKey, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        match self.pages.as_ref()?.get(&key).await {
            Ok(page) => page.map(|page| look(page.value())),
            Err(e) => {
                if !self.has_failed.swap(true, Ordering::Relaxed) {
                    warn!("the disk of the read cache fails, what it holds is read from the store: {e}");
                }
                None
            }
        }
    }

    /// The checkpoint that the disk goes up to, if there is a disk and it can be told.
    pub(crate) fn found(&self) -> Option<CheckpointId> {
        self.state.as_ref()?.found()
    }

    /// Empties it: it is another history's, or that cannot be told.
    ///
    /// # Errors
    /// When the disk cannot be emptied; it must not be used then.
    pub async fn clear(&self) -> io::Result<()> {
        match &self.pages {
            Some(pages) => pages.clear().await.map_err(io::Error::other),
            None => Ok(()),
        }
    }

    /// The volume is at this checkpoint: what is kept from here on is of it, or of one before.
    pub fn note_checkpoint(&self, newest: CheckpointId) {
        self.note(newest, false);
    }

    fn note(&self, newest: CheckpointId, is_closed: bool) {
        if let Some(state) = &self.state
            && !state.note(newest, is_closed)
        {
            self.is_stopped.store(true, Ordering::Relaxed);
        }
    }

    /// Takes a page in.
    pub fn insert(&self, key: PageKey, page: Vec<u8>) {
        if self.is_stopped.load(Ordering::Relaxed) {
            return;
        }
        if let Some(pages) = &self.pages {
            pages.insert(key, page);
        }
    }

    /// Writes out what is on its way to the disk, and lets the directory go. `newest` is the checkpoint that the volume is
    /// at.
    pub async fn close(&self, newest: CheckpointId) {
        if let (Some(pages), Some(lock)) = (&self.pages, &self.lock) {
            match pages.close().await {
                Ok(()) => self.note(newest, true),
                Err(e) => warn!("closing the read cache: {e}"),
            }
            let _ = lock.unlock();
        }
    }
}

fn in_memory(
    config: &ReadCacheConfig,
) -> foyer::HybridCacheBuilderPhaseMemory<PageKey, Vec<u8>, foyer::DefaultHasher> {
    HybridCacheBuilder::new()
        .with_name("pages")
        .with_policy(HybridCachePolicy::WriteOnInsertion)
        .memory(config.memory_bytes as usize)
        // One pass over a large volume must not drive out what is read again and again.
        .with_eviction_config(S3FifoConfig::default())
        .with_weighter(|_: &PageKey, page: &Vec<u8>| page.len() + PAGE_OVERHEAD_BYTES)
}

async fn on_disk(
    config: &ReadCacheConfig,
    disk: &ReadCacheDisk,
    volume_id: VolumeId,
    on: &dyn Disk,
) -> io::Result<(Pages, File)> {
    let dir = disk.dir.join(volume_id.to_string());
    let lock = lock(&dir, on)?;
    let device = FsDeviceBuilder::new(dir.join(PAGES_NAME))
        .with_capacity(disk.size_bytes as usize)
        .build()
        .map_err(io::Error::other)?;
    let pages = in_memory(config)
        .storage()
        .with_engine_config(BlockEngineBuilder::new(device).with_block_size(DISK_UNIT_BYTES))
        .build()
        .await
        .map_err(io::Error::other)?;
    Ok((pages, lock))
}

/// Makes the directory, for its owner's eyes only, and locks it.
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
