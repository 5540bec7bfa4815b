//! An engine that reads an earlier checkpoint. It reads as the newest one is read, but from a root that never changes.
//! It shows the whole checkpoint, or only its differences from another one.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use rangemap::RangeSet;

use super::{Beside, Engine};
use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::VolumeError;
use crate::base::geometry::Geometry;
use crate::format::stored_state::StoredState;
use crate::index::cache::IndexCache;
use crate::index::checksums::IndexChecksums;
use crate::index::location_map::LocationMap;
use crate::index::lookup::{Index, Published, RecentRoots};
use crate::read::cache::ReadCache;
use crate::read::read_path::{Objects, Reads};
use crate::read::reader::Reader;
use crate::store::Store;
use crate::write_buffer::overlay::Frozen;

/// Runs of blocks whose places are kept in memory, at about 50 bytes each.
const LOCATION_RUNS_MAX: usize = 32 * 1024;

/// A read-only view of one checkpoint of a container.
pub(crate) struct PastEngine {
    geometry: Geometry,
    reads: Reads,
    runtime: tokio::runtime::Handle,
    /// The bytes that are shown; everything else is a hole. `None` shows all bytes.
    shown: Option<RangeSet<u64>>,
}

impl PastEngine {
    /// Reads the checkpoint with this state, on the current runtime. The caches may hold anything of the same
    /// container, because stored objects never change.
    pub fn new(
        store: &Store,
        state: &StoredState,
        block_size_bytes: u32,
        index_cache: IndexCache,
        read_cache: ReadCache,
    ) -> Self {
        let geometry = Geometry::new(state.size_bytes, block_size_bytes);
        let index_cache = index_cache.of_container(store);
        let known = Arc::new(Mutex::new(Published {
            locations: LocationMap::new(block_size_bytes, LOCATION_RUNS_MAX),
            root: state.root,
            recent: RecentRoots::default(),
        }));
        let checksums = IndexChecksums::default();
        let index = Index::new(
            store.clone(),
            checksums,
            index_cache,
            geometry.into(),
            known.clone(),
        );
        let reader = Reader::new(Objects(store.clone()), read_cache, block_size_bytes);
        Self {
            geometry,
            reads: Reads::new(geometry.into(), known, index, reader),
            runtime: tokio::runtime::Handle::current(),
            shown: None,
        }
    }

    /// The same checkpoint with only these bytes shown.
    pub fn showing(self, shown: RangeSet<u64>) -> Self {
        Self {
            shown: Some(shown),
            ..self
        }
    }

    /// Zeroes the bytes of `out` that are not shown. `out` was read at `offset_bytes`.
    fn hide(&self, offset_bytes: u64, out: &mut [u8]) {
        let range = offset_bytes..offset_bytes + out.len() as u64;
        for gap in self.shown.iter().flat_map(|shown| shown.gaps(&range)) {
            out[(gap.start - offset_bytes) as usize..(gap.end - offset_bytes) as usize].fill(0);
        }
    }

    /// Which of these blocks are shown; `None` when all are.
    fn shown_runs(&self, blocks: &Range<u64>) -> Option<Vec<(Range<u64>, bool)>> {
        let shown = self.shown.as_ref()?;
        let block_size = u64::from(self.geometry.block_size());
        let bytes = blocks.start * block_size..(blocks.end * block_size).min(self.geometry.size_bytes());
        let of = |range: Range<u64>| range.start / block_size..range.end.div_ceil(block_size);
        let mut runs: Vec<_> = shown
            .overlapping(&bytes)
            .map(|range| (of(range.clone()), true))
            .collect();
        runs.extend(shown.gaps(&bytes).map(|range| (of(range), false)));
        let within = |(range, is_data): (Range<u64>, bool)| {
            (range.start.max(blocks.start)..range.end.min(blocks.end), is_data)
        };
        let mut runs: Vec<_> = runs
            .into_iter()
            .map(within)
            .filter(|(range, _)| !range.is_empty())
            .collect();
        runs.sort_unstable_by_key(|(range, _)| range.start);
        Some(runs)
    }
}

#[async_trait]
impl Engine for PastEngine {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        self.reads.read(offset_bytes, out).await?;
        self.hide(offset_bytes, out);
        Ok(())
    }

    fn read_at_once(&self, offset_bytes: u64, out: &mut [u8]) -> bool {
        let is_read = self.reads.read_at_once(offset_bytes, out);
        self.hide(offset_bytes, out);
        is_read
    }

    fn note_read(&self, offset_bytes: u64, len_bytes: u64) {
        self.reads.note_read(&self.runtime, offset_bytes, len_bytes);
    }

    async fn prefetch(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), VolumeError> {
        self.reads.prefetch(offset_bytes, len_bytes).await
    }

    async fn block_runs(&self, blocks: Range<u64>) -> Result<Vec<(Range<u64>, bool)>, VolumeError> {
        match self.shown_runs(&blocks) {
            Some(runs) => Ok(runs),
            None => self.reads.block_runs(blocks).await,
        }
    }

    fn block_runs_at_once(&self, blocks: Range<u64>) -> Option<Vec<(Range<u64>, bool)>> {
        let shown = self.shown_runs(&blocks);
        shown.or_else(|| self.reads.block_runs_at_once(blocks))
    }

    async fn publish(&self, _: Arc<Frozen>, _: Beside) -> Result<Option<Checkpoint>, VolumeError> {
        Err(VolumeError::ReadOnly)
    }

    async fn recover(&self) -> Result<(), VolumeError> {
        Ok(())
    }

    async fn close(&self) -> bool {
        true
    }
}
