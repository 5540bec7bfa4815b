//! An earlier checkpoint as a volume, to be read.

use std::sync::Arc;

use super::{Parts, Volume};
use crate::engine::index_cache::IndexCache;
use crate::engine::past::PastEngine;
use crate::error::VolumeError;
use crate::options::{ReadCacheConfig, StoreOptions, VolumeOptions};
use crate::past::{self, At};
use crate::read::cache::ReadCache;
use crate::store;
use crate::units::MIB;
use crate::url::VolumeUrl;

/// Memory for the index of one checkpoint, and the most for its data, in bytes.
const INDEX_MEMORY_BYTES: u64 = 8 * MIB;
const CACHE_MEMORY_MAX_BYTES: u64 = 32 * MIB;

impl Volume {
    /// Opens an earlier checkpoint of the volume at `url`, which can be read and not written, whatever is written to the volume
    /// meanwhile. Must be called on a multi-thread runtime, which must outlive it.
    ///
    /// # Errors
    /// [`VolumeError::NoCheckpoint`] when there is no such checkpoint.
    pub async fn open_past(
        url: &VolumeUrl,
        store_options: &StoreOptions,
        options: &VolumeOptions,
        at: &At,
    ) -> Result<Arc<Self>, VolumeError> {
        let store = store::unproved(url, store_options).await?;
        let point = past::find(&store, Some(at)).await?;
        let cache = ReadCacheConfig {
            memory_bytes: options.read_cache.memory_bytes.min(CACHE_MEMORY_MAX_BYTES),
            disk: None,
        };
        let engine = PastEngine::new(
            &store,
            &point.state,
            point.block_size_bytes,
            IndexCache::default().with_memory(INDEX_MEMORY_BYTES),
            ReadCache::open(&cache, None).await,
        );
        let options = VolumeOptions {
            read_only: true,
            write_buffer_dir: None,
            ..options.clone()
        };
        Ok(Arc::new(Self::with_parts(
            Arc::new(engine),
            Parts::default(),
            &options,
        )))
    }
}
