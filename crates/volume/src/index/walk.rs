//! Walks a stored index leaf by leaf. The cost depends on the entries in a range, and not on the length of the range.

use std::io;
use std::ops::Range;

use btree_ondisk::bmap::BMap;
use hyperfile::BlockPtr;
use hyperfile::meta_format::BlockPtrFormat;

use super::cache::IndexCache;
use super::loader::{NodeLoader, format_of};
use crate::format::node::NODE_BYTES;
use crate::format::stored_state::Root;

/// Number of leaves that are fetched together, ahead of the walk.
const LEAVES_AHEAD: usize = 256;
/// Number of leaves after which the tree is read from its root again. Otherwise it would keep every node that it has
/// read; these take 4 MiB.
pub(super) const LEAVES_KEPT: usize = 1024;

type Tree = BMap<'static, u64, BlockPtr, BlockPtr, NodeLoader, IndexCache>;

/// A walk over the index below one root. It sees the state of that root, whatever is published meanwhile.
pub(crate) struct Walk {
    root: Root,
    loader: NodeLoader,
    cache: IndexCache,
    tree: Tree,
    leaves: usize,
    /// First key of the last leaf that was fetched ahead.
    ahead: Option<u64>,
}

/// What one leaf says of a range.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Part {
    /// Blocks of the range with their pointers, ascending. A pointer may be that of a zeroed block.
    pub entries: Vec<(u64, BlockPtr)>,
    /// Every block before this one that has no entry is not mapped. This may be past the range.
    pub end: u64,
}

impl Part {
    /// The blocks that hold data, in ascending runs.
    pub(crate) fn mapped(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (block, pointer) in &self.entries {
            if BlockPtrFormat::is_zero_block(pointer) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == *block => run.end += 1,
                _ => runs.push(*block..block + 1),
            }
        }
        runs
    }
}

impl Walk {
    /// Begins a walk below `root`.
    ///
    /// # Errors
    /// `InvalidData` when the bytes are not a root.
    pub(crate) fn new(root: Root, loader: NodeLoader, cache: IndexCache) -> io::Result<Self> {
        let tree = read(&root, &loader, &cache)?;
        Ok(Self {
            root,
            loader,
            cache,
            tree,
            leaves: 0,
            ahead: None,
        })
    }

    /// The format of the block pointers.
    ///
    /// # Errors
    /// `InvalidData` when the root names no known format.
    pub(super) fn format(&self) -> io::Result<BlockPtrFormat> {
        format_of(self.tree.get_userdata())
    }

    /// What the first leaf with entries in `blocks` says of them. `blocks` must not begin before the blocks of the
    /// previous call.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub(crate) async fn next(&mut self, blocks: Range<u64>) -> io::Result<Part> {
        self.fetch_ahead(&blocks).await?;
        let nothing_until = |end| Part {
            entries: Vec::new(),
            end,
        };
        let first = match self.tree.seek_key(&blocks.start).await {
            Ok(key) if key < blocks.end => key,
            Ok(key) => return Ok(nothing_until(key)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(nothing_until(u64::MAX)),
            Err(e) => return Err(e),
        };
        let mut entries = self.tree.leaf_entries(&first).await?;
        self.leaves += 1;
        // Without this check, a leaf that ends before the key by which it was found would be visited for ever.
        let last = entries.last().map(|(key, _)| *key).filter(|last| *last >= first);
        let Some(last) = last else {
            let reason = format!("the index leads to block {first}, and has no entry for it");
            return Err(io::Error::new(io::ErrorKind::InvalidData, reason));
        };
        let beyond = entries
            .iter()
            .map(|(block, _)| *block)
            .find(|block| *block >= blocks.end);
        let end = beyond.unwrap_or(last.saturating_add(1));
        entries.retain(|(block, _)| blocks.contains(block));
        Ok(Part { entries, end })
    }

    /// Fetches the next leaves of the walk together. One by one, each would cost a round trip.
    async fn fetch_ahead(&mut self, blocks: &Range<u64>) -> io::Result<()> {
        if self.ahead.is_some_and(|ahead| blocks.start < ahead) {
            return Ok(());
        }
        if self.leaves >= LEAVES_KEPT {
            self.tree = read(&self.root, &self.loader, &self.cache)?;
            self.leaves = 0;
        }
        let children = match self.tree.node_children(2, &blocks.start).await {
            Ok(children) => children,
            // The tree has no leaves, or only one.
            Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotFound) => {
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        let firsts: Vec<u64> = children.into_iter().map(|(first, ..)| first).collect();
        // The leaf with the first block may begin before that block.
        let from = firsts
            .partition_point(|first| *first <= blocks.start)
            .saturating_sub(1);
        let firsts: Vec<u64> = firsts[from..]
            .iter()
            .copied()
            .filter(|first| *first < blocks.end && self.ahead.is_none_or(|ahead| *first > ahead))
            .take(LEAVES_AHEAD)
            .collect();
        let Some(last) = firsts.last().copied() else {
            return Ok(());
        };
        // An error here occurs again, and is returned, when the walk reaches the leaf.
        drop(self.tree.lookup_batch(&firsts).await);
        self.ahead = Some(last);
        Ok(())
    }
}

fn read(root: &Root, loader: &NodeLoader, cache: &IndexCache) -> io::Result<Tree> {
    BMap::read(&root.0, NODE_BYTES, loader.clone(), cache.clone())
}
