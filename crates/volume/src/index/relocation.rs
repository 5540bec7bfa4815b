//! Places that are to become others: what of some objects an index still refers to, and the change of an index to where that was copied.
//!
//! Nothing here moves data. [`live`] is asked before the copy; [`apply`] compares every entry once more, because the index may have
//! gone on meanwhile: what a client changed keeps what the client wrote.

use std::io;

use btree_ondisk::bmap::BMap;
use hyperfile::BlockPtr;
use hyperfile::meta_format::BlockPtrFormat;

use super::cache::IndexCache;
use super::loader::NodeLoader;
use super::walk::LEAVES_KEPT;
use crate::format::node::NODE_BYTES;
use crate::format::object_names::segment_of;
use crate::format::stored_state::Root;

/// Leaves fetched together.
const FETCHED_TOGETHER: usize = 256;
/// Keys nearer than this to one that is fetched are most often in the same leaf: one that is half full has 127.
const KEYS_APART: u64 = 64;

/// An index that may be changed.
pub(crate) type Tree = BMap<'static, u64, BlockPtr, BlockPtr, NodeLoader, IndexCache>;

/// One block, where it lies, and where it was copied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// The block.
    pub block: u64,
    /// The pointer that was copied from.
    pub from: BlockPtr,
    /// The pointer of the copy.
    pub to: BlockPtr,
}

/// A node of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// 1 for leaves.
    pub level: usize,
    /// The first key below it.
    pub key: u64,
    /// Where it lies.
    pub pointer: BlockPtr,
}

/// What is to be changed in an index.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Relocation {
    /// Blocks that were copied, ascending.
    pub moves: Vec<Move>,
    /// Nodes that are to be written anew.
    pub nodes: Vec<Node>,
}

/// What was changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// The moves that took effect, ascending.
    pub moved: Vec<Move>,
    /// Nodes that are written anew, those above the moves not counted.
    pub nodes: usize,
}

impl Applied {
    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.moved.is_empty() && self.nodes == 0
    }
}

/// The pointer of a place in the object of this number.
pub(crate) fn pointer_of(object: u64, offset_bytes: u64) -> BlockPtr {
    let format = BlockPtrFormat::PartedSegment;
    BlockPtrFormat::encode(segment_of(object), offset_bytes as usize, 0, &format)
}

/// Where a pointer leads: the offset in its object, in bytes.
pub(crate) fn offset_of(pointer: BlockPtr) -> u64 {
    BlockPtrFormat::decode(&pointer, &BlockPtrFormat::PartedSegment).1 as u64
}

/// Reads the index below `root`.
///
/// # Errors
/// `InvalidData` when there can be none.
pub(crate) fn read(root: &Root, loader: NodeLoader, cache: IndexCache) -> io::Result<Tree> {
    BMap::read(&root.0, NODE_BYTES, loader, cache)
}

/// Which of these blocks, ascending, have these very pointers, and which of these nodes the index has. `read` reads the index anew from its
/// root, as often as that is needed for the nodes in memory not to become too many.
///
/// # Errors
/// When the index cannot be read.
pub(crate) async fn live(
    read: impl Fn() -> io::Result<Tree>,
    blocks: &[(u64, BlockPtr)],
    nodes: Vec<Node>,
) -> io::Result<(Vec<(u64, BlockPtr)>, Vec<Node>)> {
    let mut found = Vec::new();
    let mut leaves = Leaves::new(blocks.iter().map(|(block, _)| *block).collect());
    let mut tree = read()?;
    while let Some(leaf) = leaves.next(&tree).await? {
        if leaves.held >= LEAVES_KEPT && leaves.at >= leaves.fetched {
            tree = read()?;
            leaves.held = 0;
        }
        let of_leaf = &blocks[leaf.wanted.clone()];
        let is_live = |(block, pointer): &&(u64, BlockPtr)| leaf.get(*block) == Some(*pointer);
        found.extend(of_leaf.iter().filter(is_live));
    }
    let mut there = Vec::new();
    for node in nodes {
        if is_there(&tree, &node).await? {
            there.push(node);
        }
    }
    Ok((found, there))
}

/// Changes the index: each block that still has the pointer it was copied from gets that of the copy, and the nodes that are still
/// there are marked, so that they are written with the next checkpoint.
///
/// # Errors
/// When the index cannot be read. It may be changed in part then, and must be dropped.
pub(crate) async fn apply(tree: &Tree, relocation: &Relocation) -> io::Result<Applied> {
    let mut applied = Applied::default();
    let moves = &relocation.moves;
    let mut leaves = Leaves::new(moves.iter().map(|one| one.block).collect());
    while let Some(leaf) = leaves.next(tree).await? {
        let of_leaf = &moves[leaf.wanted.clone()];
        let unchanged = of_leaf.iter().filter(|one| leaf.get(one.block) == Some(one.from));
        let unchanged: Vec<Move> = unchanged.copied().collect();
        if let Some(first) = unchanged.first() {
            let values: Vec<_> = unchanged.iter().map(|one| (one.block, one.to)).collect();
            tree.set_leaf_values(&first.block, &values).await?;
        }
        applied.moved.extend(unchanged);
    }
    for node in &relocation.nodes {
        if !is_there(tree, node).await? {
            continue;
        }
        // An entry below it is given the value that it has: that marks the whole way to it.
        let entries = tree.leaf_entries(&node.key).await?;
        if let Some(first) = entries.first() {
            tree.set_leaf_values(&node.key, &[*first]).await?;
            applied.nodes += 1;
        }
    }
    Ok(applied)
}

/// Whether the index has this node, unchanged.
async fn is_there(tree: &Tree, node: &Node) -> io::Result<bool> {
    // The root is in the inode, and no node of its own.
    if tree.is_direct() || node.level + 1 >= tree.height() {
        return Ok(false);
    }
    let children = match tree.node_children(node.level + 1, &node.key).await {
        Ok(children) => children,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    let at = children.partition_point(|(first, ..)| *first <= node.key);
    let child = children.get(at.saturating_sub(1));
    Ok(child.is_some_and(|(_, pointer, is_changed)| *pointer == node.pointer && !is_changed))
}

/// A leaf, and which of the wanted keys it is for.
struct Leaf {
    entries: Vec<(u64, BlockPtr)>,
    wanted: std::ops::Range<usize>,
}

impl Leaf {
    fn get(&self, block: u64) -> Option<BlockPtr> {
        let at = self.entries.binary_search_by_key(&block, |(key, _)| *key).ok()?;
        Some(self.entries[at].1)
    }
}

/// The leaves that some keys lie in, one after another.
struct Leaves {
    /// Ascending.
    keys: Vec<u64>,
    at: usize,
    fetched: usize,
    /// Leaves that were fetched.
    held: usize,
}

impl Leaves {
    fn new(keys: Vec<u64>) -> Self {
        debug_assert!(keys.is_sorted());
        Self {
            keys,
            at: 0,
            fetched: 0,
            held: 0,
        }
    }

    async fn next(&mut self, tree: &Tree) -> io::Result<Option<Leaf>> {
        let Some(&key) = self.keys.get(self.at) else {
            return Ok(None);
        };
        self.fetch(tree).await;
        let entries = match tree.leaf_entries(&key).await {
            Ok(entries) => entries,
            // Nothing is mapped at all.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let last = entries.last().map_or(key, |(last, _)| *last).max(key);
        let end = self.at + self.keys[self.at..].partition_point(|key| *key <= last);
        let wanted = self.at..end;
        self.at = end;
        Ok(Some(Leaf { entries, wanted }))
    }

    /// Fetches the next leaves together. What fails here fails again, and is told, when it is needed.
    async fn fetch(&mut self, tree: &Tree) {
        if self.at < self.fetched {
            return;
        }
        let mut ahead: Vec<u64> = Vec::new();
        let mut end = self.at;
        while end < self.keys.len() && ahead.len() < FETCHED_TOGETHER {
            let key = self.keys[end];
            if ahead.last().is_none_or(|last| key - last >= KEYS_APART) {
                ahead.push(key);
            }
            end += 1;
        }
        drop(tree.lookup_batch(&ahead).await);
        self.held += ahead.len();
        self.fetched = end;
    }
}
