//! Looks blocks up in the container's index without the owner thread.
//!
//! Index nodes never change once they are stored, and the root of the index changes only with a publish. So a look-up
//! walks the tree below the newest published root on its own, with nodes from a cache that all look-ups share, and
//! never waits for a publish in flight. Its result is entered into the location map, except for blocks that were
//! published meanwhile (see [`LocationMap::end_lookup`]).

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use btree_ondisk::bmap::BMap;
use futures::FutureExt;
use hyperfile::BlockPtr;
use hyperfile::meta_format::BlockPtrFormat;
use parking_lot::Mutex;

use super::cache::IndexCache;
use super::checksums::IndexChecksums;
use super::loader::NodeLoader;
use super::walk::Walk;
use crate::base::checkpoint_id::{CheckpointId, RECENT_MAX};
use crate::base::error::VolumeError;
use crate::base::geometry::LiveGeometry;
use crate::format::node::NODE_BYTES;
use crate::format::object_names::object_of;
use crate::format::stored_state::Root;
use crate::index::location_map::{LocationMap, LookupId, Place, Run};
use crate::store::Store;

/// Number of index entries after which one look-up stops and answers for the first part. Holes do not count.
const LOOKUP_ENTRIES_MAX: usize = 64 * 1024;

/// What this process knows of the published state. Only the owner thread changes it, in one step with each publish.
#[derive(Debug)]
pub(crate) struct Published {
    /// The places of blocks.
    pub locations: LocationMap,
    /// Root of the index.
    pub root: Root,
    /// The roots of the checkpoints that were published last.
    pub recent: RecentRoots,
}

/// Roots of the newest checkpoints of this process. They need not be read from the store.
#[derive(Debug, Default)]
pub(crate) struct RecentRoots(BTreeMap<CheckpointId, Root>);

impl RecentRoots {
    /// The newest of them.
    pub fn newest(&self) -> Option<CheckpointId> {
        self.0.keys().next_back().copied()
    }

    /// Adds the newest checkpoint.
    pub fn note(&mut self, id: CheckpointId, root: Root) {
        self.0.insert(id, root);
        if self.0.len() > RECENT_MAX {
            self.0.pop_first();
        }
    }

    /// The root of this checkpoint, if it is remembered.
    pub fn of(&self, id: CheckpointId) -> Option<Root> {
        self.0.get(&id).copied()
    }
}

/// The published index. Any number of look-ups may use it at once.
pub(crate) struct Index {
    store: Store,
    published: Arc<Mutex<Published>>,
    geometry: LiveGeometry,
    cache: IndexCache,
    loader: NodeLoader,
}

/// Reads the path to the first block into the memory of `cache`. Most of that path is shared by all other blocks.
pub(crate) async fn warm(store: Store, cache: IndexCache, root: Root) {
    let loader = NodeLoader::new(store, IndexChecksums::default(), Some(cache.clone()));
    match BMap::<'_, u64, BlockPtr, BlockPtr, _, _>::read(&root.0, NODE_BYTES, loader, cache) {
        Ok(tree) => drop(tree.lookup_batch(&[0]).await),
        Err(e) => log::debug!("the index is not fetched ahead: {e}"),
    }
}

/// A look-up in progress. Dropping it abandons the look-up.
struct Lookup<'a> {
    published: &'a Mutex<Published>,
    id: Option<LookupId>,
}

impl Drop for Lookup<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id.take() {
            self.published.lock().locations.abandon_lookup(id);
        }
    }
}

impl Index {
    pub(crate) fn new(
        store: Store,
        checksums: IndexChecksums,
        cache: IndexCache,
        geometry: LiveGeometry,
        published: Arc<Mutex<Published>>,
    ) -> Self {
        let loader = NodeLoader::new(store.clone(), checksums, Some(cache.clone()));
        Self {
            store,
            published,
            geometry,
            cache,
            loader,
        }
    }

    /// Finds the places of blocks from `blocks.start` on and enters them into the location map. Blocks that were
    /// published meanwhile are left out, because the map has their places.
    pub(crate) async fn look_up(&self, blocks: Range<u64>) -> Result<Vec<Run>, VolumeError> {
        let (root, mut lookup) = {
            let mut published = self.published.lock();
            let id = published.locations.begin_lookup();
            let lookup = Lookup {
                published: &self.published,
                id: Some(id),
            };
            (published.root, lookup)
        };
        let what = format!("looking up blocks {}..{}", blocks.start, blocks.end);
        // The tree's code trusts the stored nodes. A damaged node must not end the server.
        let found = std::panic::AssertUnwindSafe(self.find(root, blocks))
            .catch_unwind()
            .boxed()
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::InvalidData, "the index is damaged")))
            .map_err(|e| match e.kind() {
                io::ErrorKind::InvalidData => VolumeError::Corrupt {
                    what: format!("the index of the volume at {}", self.store.url),
                    reason: format!("{what}: {e}"),
                },
                // The error is the loader's, or one of the tree itself.
                _ => e
                    .downcast::<VolumeError>()
                    .unwrap_or_else(|e| VolumeError::engine(what, e)),
            })?;
        let id = lookup.id.take();
        Ok(id.map_or_else(Vec::new, |id| {
            self.published.lock().locations.end_lookup(id, found)
        }))
    }

    /// Reads the current index into memory, leaf by leaf from the start of the volume, as far as there is memory. A
    /// read of any block then needs no request for the index. Nodes never change, so later publishes outdate only few
    /// of them.
    ///
    /// # Errors
    /// When the index cannot be read. Reads then do their own look-ups.
    pub(crate) async fn bring_into_memory(&self) -> io::Result<usize> {
        let root = self.published.lock().root;
        let mut walk = Walk::new(root, self.loader.clone(), self.cache.clone())?;
        // The rest is kept for the upper levels, and for nodes that are published later.
        let most = self.cache.nodes_in_memory() / 4 * 3;
        let (mut at, mut leaves) = (0, 0);
        while at < u64::MAX && leaves < most {
            let part = walk.next(at..u64::MAX).await?;
            leaves += usize::from(!part.entries.is_empty());
            at = part.end;
            // The nodes may all be in memory already, so that nothing else here would yield.
            tokio::task::yield_now().await;
        }
        Ok(leaves)
    }

    async fn find(&self, root: Root, blocks: Range<u64>) -> io::Result<Vec<Run>> {
        let mut walk = Walk::new(root, self.loader.clone(), self.cache.clone())?;
        let format = walk.format()?;
        let block_size = u64::from(self.geometry.now().block_size());
        let mut runs = Vec::new();
        let mut at = blocks.start;
        let mut found = 0;
        while at < blocks.end && found < LOOKUP_ENTRIES_MAX {
            let part = walk.next(at..blocks.end).await?;
            found += part.entries.len();
            for (block, pointer) in part.entries {
                if block > at {
                    push(&mut runs, at..block, Place::Nothing, block_size);
                }
                push(
                    &mut runs,
                    block..block + 1,
                    place_of(pointer, format)?,
                    block_size,
                );
                at = block + 1;
            }
            // A hole is skipped as a whole, however long it is.
            let end = part.end.min(self.geometry.now().blocks().max(blocks.end));
            if end > at {
                push(&mut runs, at..end, Place::Nothing, block_size);
                at = end;
            }
        }
        Ok(runs)
    }
}

fn place_of(pointer: BlockPtr, format: BlockPtrFormat) -> io::Result<Place> {
    if BlockPtrFormat::is_zero_block(&pointer) {
        return Ok(Place::Nothing);
    }
    if !BlockPtrFormat::is_on_staging(&pointer) {
        let reason = format!("the published index holds the pointer {pointer:#x}, which names no object");
        return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
    }
    let (segment, offset) = BlockPtrFormat::decode(&pointer, &format);
    Ok(Place::Stored {
        object: object_of(segment),
        offset_bytes: offset as u64,
    })
}

/// Adds a run to `runs`, and joins it with the last run if it continues that one.
pub(crate) fn push(runs: &mut Vec<Run>, blocks: Range<u64>, place: Place, block_size: u64) {
    if let Some(last) = runs.last_mut()
        && last.blocks.end == blocks.start
        && last
            .place
            .advanced(last.blocks.end - last.blocks.start, block_size)
            == place
    {
        last.blocks.end = blocks.end;
        return;
    }
    runs.push(Run { blocks, place });
}
