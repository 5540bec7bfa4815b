//! An earlier checkpoint as an engine: the same reads as of the newest one, below a root that never changes.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;

use super::index::{Index, Published, StoredState};
use super::index_cache::IndexCache;
use super::index_seal::IndexSeals;
use super::reads::{Objects, Reads};
use super::{Beside, Checkpoint, Engine};
use crate::error::VolumeError;
use crate::geometry::Geometry;
use crate::read::cache::ReadCache;
use crate::read::location::LocationMap;
use crate::read::reader::Reader;
use crate::store::Store;
use crate::writeback::overlay::Frozen;

/// Runs of blocks whose places are remembered, at about 50 bytes each.
const LOCATION_RUNS_MAX: usize = 32 * 1024;

/// One checkpoint of a container, to be read.
pub(crate) struct PastEngine {
    geometry: Geometry,
    reads: Reads,
    runtime: tokio::runtime::Handle,
}

impl PastEngine {
    /// Of the checkpoint with this state, on the current runtime. The caches may hold anything of the same container: what is
    /// stored never changes.
    pub fn new(
        store: &Store,
        state: &StoredState,
        block_size_bytes: u32,
        index_cache: IndexCache,
        read_cache: ReadCache,
    ) -> Self {
        let geometry = Geometry::new(state.size_bytes, block_size_bytes);
        let known = Arc::new(Mutex::new(Published {
            locations: LocationMap::new(block_size_bytes, LOCATION_RUNS_MAX),
            root: state.root,
        }));
        let seals = IndexSeals::new(store.clone());
        let index = Index::new(store.clone(), seals, index_cache, geometry, known.clone());
        let reader = Reader::new(Objects(store.clone()), read_cache, block_size_bytes);
        Self {
            geometry,
            reads: Reads::new(geometry, known, index, reader),
            runtime: tokio::runtime::Handle::current(),
        }
    }
}

#[async_trait]
impl Engine for PastEngine {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        self.reads.read(offset_bytes, out).await
    }

    fn read_at_once(&self, offset_bytes: u64, out: &mut [u8]) -> bool {
        self.reads.read_at_once(offset_bytes, out)
    }

    fn note_read(&self, offset_bytes: u64, len_bytes: u64) {
        if let Some(ahead) = self.reads.note_read(offset_bytes, len_bytes) {
            self.runtime.spawn(self.reads.clone().read_ahead(ahead));
        }
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

    async fn publish(&self, _: Arc<Frozen>, _: Beside) -> Result<Option<Checkpoint>, VolumeError> {
        Err(VolumeError::ReadOnly)
    }

    async fn recover(&self) -> Result<(), VolumeError> {
        Ok(())
    }

    async fn close(&self) {}
}
