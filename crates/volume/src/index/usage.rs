//! How much of the stored data the newest state refers to.

use std::collections::BTreeSet;
use std::io;

use hyperfile::meta_format::BlockPtrFormat;

use super::cache::IndexCache;
use super::checksums::IndexChecksums;
use super::loader::NodeLoader;
use super::walk::Walk;
use crate::format::node::NODE_BYTES;
use crate::format::object_names::{cno_of_pointer, object_of};
use crate::format::stored_state::StoredState;
use crate::store::Store;

/// The amount that one state refers to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Bytes of the state's data blocks and index leaves.
    pub bytes: u64,
    /// Blocks that hold data.
    pub blocks: u64,
    /// Number of objects that hold its data blocks.
    pub objects: u64,
    /// Of the bytes those that lie in what a clone has inherited. A leaf is counted with them when all that it leads to does.
    pub inherited_bytes: u64,
}

/// Walks the whole index of a state.
///
/// # Errors
/// When the index cannot be read.
pub(crate) async fn usage(store: &Store, state: &StoredState, block_size_bytes: u32) -> io::Result<Usage> {
    let cache = IndexCache::default();
    let loader = NodeLoader::new(store.clone(), IndexChecksums::default(), Some(cache.clone()));
    let mut walk = Walk::new(state.root, loader, cache)?;
    let format = walk.format()?;
    let mut usage = Usage::default();
    let mut objects = BTreeSet::new();
    let mut at = 0;
    while at < u64::MAX {
        let part = walk.next(at..u64::MAX).await?;
        let data = part.entries.iter().map(|(_, pointer)| pointer);
        let data: Vec<_> = data
            .filter(|pointer| !BlockPtrFormat::is_zero_block(pointer))
            .collect();
        let inherited = data
            .iter()
            .filter(|pointer| store.lineage().inherits(cno_of_pointer(***pointer)))
            .count() as u64;
        usage.inherited_bytes += inherited * u64::from(block_size_bytes);
        if !part.entries.is_empty() {
            usage.bytes += NODE_BYTES as u64;
            if inherited > 0 && inherited == data.len() as u64 {
                usage.inherited_bytes += NODE_BYTES as u64;
            }
        }
        for pointer in data {
            usage.blocks += 1;
            let (segment, _) = BlockPtrFormat::decode(pointer, &format);
            objects.insert(object_of(segment));
        }
        at = part.end;
    }
    usage.bytes += usage.blocks * u64::from(block_size_bytes);
    usage.objects = objects.len() as u64;
    Ok(usage)
}
