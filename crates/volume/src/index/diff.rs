//! The differences between two checkpoints of one container.
//!
//! Nodes of the index are never changed in place, so equal pointers mean equal subtrees. Level by level from the roots,
//! nodes that both checkpoints have are dropped, and only the rest is read. The cost depends on the amount of changes
//! and not on the volume.

use std::collections::HashSet;
use std::io;
use std::ops::Range;

use btree_ondisk::bmap::BMap;
use hyperfile::BlockPtr;
use hyperfile::meta_format::BlockPtrFormat;

use super::cache::IndexCache;
use super::checksums::IndexChecksums;
use super::loader::{NodeLoader, format_of};
use super::origins::Births;
use super::walk::LEAVES_KEPT;
use crate::format::node::NODE_BYTES;
use crate::format::object_names::object_of;
use crate::format::stored_state::{Root, StoredState};
use crate::store::Store;

/// Number of nodes that are fetched together.
const FETCHED_TOGETHER: usize = 256;

type Tree = BMap<'static, u64, BlockPtr, BlockPtr, NodeLoader, IndexCache>;

/// A node that may hold a difference: the first block below it, and its pointer (`None` for a root).
type Node = (u64, Option<BlockPtr>);

/// One of the two checkpoints.
struct Side {
    root: Root,
    loader: NodeLoader,
    cache: IndexCache,
    tree: Tree,
    /// Nodes that were read through this tree.
    held: usize,
    /// Nodes of one level that may hold differences, in the order of their blocks.
    nodes: Vec<Node>,
    /// Their level: 1 for leaves.
    level: usize,
}

impl Side {
    async fn new(store: &Store, root: &Root, cache: IndexCache) -> io::Result<Self> {
        let loader = NodeLoader::new(store.clone(), IndexChecksums::default(), Some(cache.clone()));
        let tree: Tree = BMap::read(&root.0, NODE_BYTES, loader.clone(), cache.clone())?;
        let (nodes, level) = match tree.seek_key(&0).await {
            Ok(first) => match tree.height() - 1 {
                // The root holds the entries itself.
                0 | 1 => (vec![(first, None)], 1),
                root_level => {
                    let children = tree.node_children(root_level, &first).await?;
                    let nodes = children.into_iter().map(|(key, pointer, _)| (key, Some(pointer)));
                    (nodes.collect(), root_level - 1)
                }
            },
            Err(e) if e.kind() == io::ErrorKind::NotFound => (Vec::new(), 1),
            Err(e) => return Err(e),
        };
        Ok(Self {
            root: *root,
            loader,
            cache,
            tree,
            held: 0,
            nodes,
            level,
        })
    }

    /// Replaces the nodes by their children, one level further down.
    async fn descend(&mut self) -> io::Result<()> {
        let mut below = Vec::new();
        let above = std::mem::take(&mut self.nodes);
        for nodes in above.chunks(FETCHED_TOGETHER) {
            self.fetch(nodes).await?;
            for (key, _) in nodes {
                let children = self.tree.node_children(self.level, key).await?;
                below.extend(children.into_iter().map(|(key, pointer, _)| (key, Some(pointer))));
            }
        }
        self.nodes = below;
        self.level -= 1;
        Ok(())
    }

    /// Fetches nodes together. What fails to be fetched fails again, and is told, when the node is needed.
    async fn fetch(&mut self, nodes: &[Node]) -> io::Result<()> {
        if self.held >= LEAVES_KEPT {
            self.tree = BMap::read(&self.root.0, NODE_BYTES, self.loader.clone(), self.cache.clone())?;
            self.held = 0;
        }
        self.held += nodes.len();
        let keys: Vec<u64> = nodes.iter().map(|(key, _)| *key).collect();
        drop(self.tree.lookup_batch(&keys).await);
        Ok(())
    }

    /// The entries of the next leaf that has any, from the leaf number `at` on.
    async fn entries(&mut self, at: &mut usize) -> io::Result<Vec<(u64, BlockPtr)>> {
        let Some(&(key, _)) = self.nodes.get(*at) else {
            return Ok(Vec::new());
        };
        if at.is_multiple_of(FETCHED_TOGETHER) {
            let next = self.nodes[*at..self.nodes.len().min(*at + FETCHED_TOGETHER)].to_vec();
            self.fetch(&next).await?;
        }
        *at += 1;
        let entries = self.tree.leaf_entries(&key).await?;
        match entries.is_empty() {
            false => Ok(entries),
            true => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the index leads to block {key}, and has no entry for it"),
            )),
        }
    }
}

/// Drops the nodes that both sides have.
fn drop_common(from: &mut Side, to: &mut Side) {
    let pointers = |side: &Side| -> HashSet<BlockPtr> { side.nodes.iter().filter_map(|(_, p)| *p).collect() };
    let (of_from, of_to) = (pointers(from), pointers(to));
    let is_common = |(_, pointer): &Node| pointer.is_some_and(|p| of_from.contains(&p) && of_to.contains(&p));
    from.nodes.retain(|node| !is_common(node));
    to.nodes.retain(|node| !is_common(node));
}

/// The entries of one side, in their order.
struct Entries<'a> {
    side: &'a mut Side,
    at: usize,
    leaf: std::iter::Peekable<std::vec::IntoIter<(u64, BlockPtr)>>,
}

impl<'a> Entries<'a> {
    fn of(side: &'a mut Side) -> Self {
        Self {
            side,
            at: 0,
            leaf: Vec::new().into_iter().peekable(),
        }
    }

    async fn peek(&mut self) -> io::Result<Option<(u64, BlockPtr)>> {
        if self.leaf.peek().is_none() {
            self.leaf = self.side.entries(&mut self.at).await?.into_iter().peekable();
        }
        Ok(self.leaf.peek().copied())
    }
}

/// Hands over the blocks, ascending, whose entries differ in the leaves of two sides, with the entry of each. With `births` those are
/// left out that were moved and not changed.
async fn each_difference(
    old: &mut Side,
    new: &mut Side,
    mut births: Option<Births>,
    mut each: impl FnMut(u64, Option<BlockPtr>, Option<BlockPtr>),
) -> io::Result<()> {
    let (mut old, mut new) = (Entries::of(old), Entries::of(new));
    loop {
        let (was, is) = (old.peek().await?, new.peek().await?);
        let block = match (was, is) {
            (None, None) => return Ok(()),
            (Some((block, _)), None) | (None, Some((block, _))) => block,
            (Some((a, _)), Some((b, _))) => a.min(b),
        };
        let of = |entry: Option<(u64, BlockPtr)>| entry.filter(|(at, _)| *at == block).map(|(_, p)| p);
        let (was, is) = (of(was), of(is));
        if was.is_some() {
            old.leaf.next();
        }
        if is.is_some() {
            new.leaf.next();
        }
        if was == is {
            continue;
        }
        if let (Some(births), Some(was), Some(is)) = (&mut births, was, is)
            && is_same(births, was, is).await?
        {
            continue;
        }
        each(block, was, is);
    }
}

/// Whether two places have the same bytes because one was copied from the other, or both from a third.
async fn is_same(births: &mut Births, was: BlockPtr, is: BlockPtr) -> io::Result<bool> {
    let is_data = |pointer: &BlockPtr| BlockPtrFormat::is_on_staging(pointer);
    if !is_data(&was) || !is_data(&is) {
        return Ok(false);
    }
    let was = births.of(was).await.map_err(io::Error::other)?;
    Ok(was == births.of(is).await.map_err(io::Error::other)?)
}

/// Which of two checkpoints has something that the other one has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnlyIn {
    /// The first.
    From,
    /// The second.
    To,
}

/// Descends until both sides hold the leaves that may differ. `each_node` gets the pointers of the nodes that only one
/// of the two trees has, leaves included.
async fn descend_to_leaves(
    old: &mut Side,
    new: &mut Side,
    mut each_node: impl FnMut(OnlyIn, BlockPtr),
) -> io::Result<()> {
    let mut tell = |only_in, side: &Side| {
        let pointers = side.nodes.iter().filter_map(|(_, pointer)| *pointer);
        pointers.for_each(|pointer| each_node(only_in, pointer));
    };
    loop {
        // Nodes of a level that the other tree does not have are in this tree alone.
        match old.level.cmp(&new.level) {
            std::cmp::Ordering::Greater => {
                tell(OnlyIn::From, old);
                old.descend().await?;
            }
            std::cmp::Ordering::Less => {
                tell(OnlyIn::To, new);
                new.descend().await?;
            }
            std::cmp::Ordering::Equal => {
                drop_common(old, new);
                tell(OnlyIn::From, old);
                tell(OnlyIn::To, new);
                if old.level == 1 {
                    return Ok(());
                }
                old.descend().await?;
                new.descend().await?;
            }
        }
    }
}

/// One place that a checkpoint refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// A node of the index in the object of this number ([`object_of`]).
    Node(u64),
    /// A block of data in it.
    Block(u64),
}

/// Calls `each` with the places that only one of two checkpoints refers to. Without `from`, these are all places that
/// `to` refers to. Nodes are taken from `cache` if they are there.
///
/// # Errors
/// When an index cannot be read.
pub(crate) async fn places(
    store: &Store,
    from: Option<&Root>,
    to: &Root,
    cache: &IndexCache,
    mut each: impl FnMut(OnlyIn, Place),
) -> io::Result<()> {
    let mut new = Side::new(store, to, cache.clone()).await?;
    let mut old = match from {
        Some(from) => Side::new(store, from, cache.clone()).await?,
        None => Side {
            nodes: Vec::new(),
            level: 1,
            ..Side::new(store, to, cache.clone()).await?
        },
    };
    let format = format_of(new.tree.get_userdata())?;
    let object = |pointer: &BlockPtr| object_of(BlockPtrFormat::decode(pointer, &format).0);
    descend_to_leaves(&mut old, &mut new, |only_in, pointer| {
        each(only_in, Place::Node(object(&pointer)));
    })
    .await?;
    each_difference(&mut old, &mut new, None, |_, was, is| {
        for (only_in, pointer) in [(OnlyIn::From, was), (OnlyIn::To, is)] {
            if let Some(pointer) = pointer.filter(BlockPtrFormat::is_on_staging) {
                each(only_in, Place::Block(object(&pointer)));
            }
        }
    })
    .await
}

/// Hands over the blocks that read otherwise at `to` than at `from`, in ascending runs, and whether they hold data at `to` or read
/// as zeros. A block that was moved without being changed is told as changed only where its origin is not known. Blocks that only one of the two sizes has are told
/// when they hold data at `to`.
///
/// # Errors
/// When an index cannot be read.
pub(crate) async fn changes(
    store: &Store,
    from: &StoredState,
    to: &StoredState,
    mut each: impl FnMut(Range<u64>, bool),
) -> io::Result<()> {
    let cache = IndexCache::default();
    let (mut old, mut new) = (
        Side::new(store, &from.root, cache.clone()).await?,
        Side::new(store, &to.root, cache).await?,
    );
    descend_to_leaves(&mut old, &mut new, |_, _| ()).await?;
    // Of other formats nothing is relocated.
    let births = match format_of(new.tree.get_userdata())? {
        BlockPtrFormat::PartedSegment => Some(Births::of_volume(store).await.map_err(io::Error::other)?),
        _ => None,
    };
    let mut run: Option<(Range<u64>, bool)> = None;
    let is_data = |pointer: Option<BlockPtr>| pointer.is_some_and(|p| !BlockPtrFormat::is_zero_block(&p));
    each_difference(&mut old, &mut new, births, |block, was, is| {
        if !is_data(was) && !is_data(is) {
            return;
        }
        match &mut run {
            Some((blocks, data)) if blocks.end == block && *data == is_data(is) => blocks.end += 1,
            _ => {
                if let Some((blocks, data)) = run.replace((block..block + 1, is_data(is))) {
                    each(blocks, data);
                }
            }
        }
    })
    .await?;
    if let Some((blocks, data)) = run {
        each(blocks, data);
    }
    Ok(())
}
