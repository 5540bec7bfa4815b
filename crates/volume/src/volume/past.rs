//! An earlier checkpoint as a volume that can be read.

use std::sync::Arc;

use futures::future::BoxFuture;
use futures::{FutureExt, try_join};
use rangemap::RangeSet;

use super::{Parts, Volume};
use crate::base::checkpoint_id::NewestCheckpoint;
use crate::base::error::VolumeError;
use crate::base::units::MIB;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::engine::parents;
use crate::engine::past::PastEngine;
use crate::index::cache::IndexCache;
use crate::options::{StoreOptions, VolumeOptions};
use crate::past::{self, Past, Point};
use crate::read::cache::ReadCache;
use crate::read::cache_config::ReadCacheConfig;
use crate::retention::Reading;
use crate::store::{self, Store};

/// The most memory for the index of one checkpoint in bytes; below, that for its data in bytes.
const INDEX_MEMORY_MAX_BYTES: u64 = 8 * MIB;
const CACHE_MEMORY_MAX_BYTES: u64 = 32 * MIB;

impl Volume {
    /// Opens an earlier checkpoint, or differences between two, of the volume at `url`. It can be read and not written,
    /// and does not change when the volume is written. Must be called on a multi-thread runtime, which must outlive it.
    ///
    /// # Errors
    /// [`VolumeError::NoCheckpoint`] when there is no such checkpoint.
    pub async fn open_past(
        url: &VolumeUrl,
        store_options: &StoreOptions,
        options: &VolumeOptions,
        what: &Past,
    ) -> Result<Arc<Self>, VolumeError> {
        let plain = store::unproved(url, store_options).await?;
        let found = async {
            match what {
                Past::At(at) => Ok((past::find(&plain, Some(at)).await?, None)),
                Past::Changes { from, to } => {
                    let found = try_join!(past::find(&plain, Some(from)), past::find(&plain, Some(to)))?;
                    Ok((found.1, Some(found.0)))
                }
            }
        };
        let ((to, from), label) = try_join!(found, parents::readable_label(&plain))?;
        let (store, _) = parents::attach(&plain, label.as_ref()).await?;
        let since = from.as_ref().map(|from| format!(" since {}", from.id()));
        let identity = label.as_ref().map(|found| {
            let (id, since) = (found.label.volume_id, since.unwrap_or_default());
            format!("{id}, checkpoint {}{since}", to.id())
        });
        let (point, reading, shown) = match from {
            None => (to, Reading::begin(&store, to.id()).await?, None),
            Some(from) => {
                let reading = Reading::begin(&store, to.id()).await?;
                let changed = past::between(&store, &from, &to).await;
                if changed.is_err() {
                    reading.end().await;
                }
                let changed = changed?;
                let shown = changed
                    .iter()
                    .map(|range| range.offset_bytes..range.offset_bytes + range.len_bytes);
                (to, reading, Some(shown.collect::<RangeSet<u64>>()))
            }
        };
        let cache_memory_bytes = options.read_cache.memory_bytes.min(CACHE_MEMORY_MAX_BYTES);
        let index_memory_bytes = options.index_memory_bytes.min(INDEX_MEMORY_MAX_BYTES);
        let engine = engine_of(&store, &point, index_memory_bytes, cache_memory_bytes).await;
        let engine = match shown {
            Some(shown) => engine.showing(shown),
            None => engine,
        };
        Ok(Self::past(engine, options, reading, Some(store), identity))
    }

    /// Opens a checkpoint that was found, to be read as a whole. It gets the memory that these options give, and starts
    /// with empty caches. Otherwise as [`Self::open_past`].
    ///
    /// # Errors
    /// [`VolumeError::NoCheckpoint`] when it is being removed.
    pub(crate) async fn open_point(
        store: &Store,
        point: &Point,
        options: &VolumeOptions,
    ) -> Result<Arc<Self>, VolumeError> {
        let reading = Reading::begin(store, point.id()).await?;
        let cache_memory_bytes = options.read_cache.memory_bytes;
        let engine = engine_of(store, point, options.index_memory_bytes, cache_memory_bytes).await;
        // The store stays usable, because it is the caller's, who may go on to change something.
        Ok(Self::past(engine, options, reading, None, None))
    }

    /// Opens the state that a stored inode names, for a server that only reads, with the memory that these options give and nothing on a
    /// disk.
    ///
    /// # Errors
    /// [`VolumeError::NoCheckpoint`] when it is being removed.
    pub(super) fn open_stored<'a>(
        store: Store,
        point: Point,
        options: &'a VolumeOptions,
        volume_id: Option<VolumeId>,
    ) -> BoxFuture<'a, Result<Arc<Self>, VolumeError>> {
        async move {
            let reading = Reading::begin(&store, point.id()).await?;
            if !reading.is_pinned() {
                store.end_changes().await;
            }
            let cache_memory_bytes = options.read_cache.memory_bytes;
            let engine = engine_of(&store, &point, options.index_memory_bytes, cache_memory_bytes).await;
            let identity = volume_id.map(|id| format!("{id}, checkpoint {}", point.id()));
            let mut volume = Self::past(engine, options, reading, Some(store), identity);
            if let Some(volume) = Arc::get_mut(&mut volume) {
                volume.newest = NewestCheckpoint::new(point.id());
            }
            Ok(volume)
        }
        .boxed()
    }

    fn past(
        engine: PastEngine,
        options: &VolumeOptions,
        reading: Reading,
        store: Option<Store>,
        identity: Option<String>,
    ) -> Arc<Self> {
        let options = VolumeOptions {
            read_only: true,
            write_buffer_dir: None,
            ..options.clone()
        };
        let parts = Parts {
            metrics: store
                .as_ref()
                .map(|store| store.metrics().clone())
                .unwrap_or_default(),
            ..Parts::default()
        };
        let mut volume = Self::with_parts(Arc::new(engine), parts, &options);
        volume.reading = reading;
        volume.identity = identity;
        volume.store = store;
        Arc::new(volume)
    }
}

async fn engine_of(
    store: &Store,
    point: &Point,
    index_memory_bytes: u64,
    cache_memory_bytes: u64,
) -> PastEngine {
    let cache = ReadCacheConfig {
        memory_bytes: cache_memory_bytes,
        disk: None,
    };
    PastEngine::new(
        store,
        &point.state,
        point.block_size_bytes,
        IndexCache::default()
            .with_memory(index_memory_bytes)
            .counted(store.metrics()),
        ReadCache::open(&cache, None).await.counted(store.metrics()),
    )
}
