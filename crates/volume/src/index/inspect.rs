//! Inspects any number of whole indexes, for a check of a volume: it reads each node once, and goes on past damaged
//! nodes.
//!
//! A node is read from the store once, however many indexes share it. It is checked against what leads to it, which
//! says its level and its blocks. Nodes near the leaves come first, so that the list of nodes still to be read stays
//! short.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::ops::Range;

use btree_ondisk::NodeCache;
use btree_ondisk::bmap::BMap;
use futures::stream::{self, StreamExt};
use hyperfile::BlockPtr;
use hyperfile::meta_format::BlockPtrFormat;

use super::cache::IndexCache;
use super::checksums::IndexChecksums;
use super::loader::{NodeLoader, format_of, piece_start};
use crate::base::error::{ErrorKind, VolumeError};
use crate::format::node::{self, LEAF_LEVEL, NODE_BYTES};
use crate::format::object_names::{cno_of, object_of, segment_of};
use crate::format::stored_state::Root;
use crate::store::Store;

/// Number of nodes of one level that are read together.
const READ_TOGETHER: usize = 1024;
/// Number of pieces of objects that are fetched at once by who is waited for.
pub(crate) const FETCHES_AT_ONCE: usize = 32;

/// What refers to a node or block: the root of one of the indexes, by its position among them, or a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Holder {
    /// A root.
    Root(usize),
    /// A node, by its pointer.
    Node(BlockPtr),
}

/// What the inspection found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    /// `holder` refers to a node. Reported once for each holder of the node.
    Node {
        /// The node's pointer.
        pointer: BlockPtr,
        /// The number of its object ([`object_of`]).
        object: u64,
        /// Its offset in the object, in bytes.
        offset_bytes: u64,
        /// What refers to it.
        holder: Holder,
    },
    /// `holder` gives the place of a block of data.
    Block {
        /// The block.
        block: u64,
        /// The number of its object.
        object: u64,
        /// Its offset in the object, in bytes.
        offset_bytes: u64,
        /// What says so.
        holder: Holder,
    },
    /// A node that was reported before cannot be used. The nodes below it were not read.
    Damaged {
        /// The node's pointer.
        pointer: BlockPtr,
        /// The number of its object.
        object: u64,
        /// Its offset in the object, in bytes.
        offset_bytes: u64,
        /// The blocks that the node should hold or lead to.
        blocks: Range<u64>,
        /// What is wrong.
        reason: String,
    },
}

/// A node that is still to be read.
#[derive(Debug, Clone)]
struct Wanted {
    pointer: BlockPtr,
    object: u64,
    offset_bytes: u64,
    /// The keys that it may have.
    keys: Range<u64>,
}

/// Which objects are inspected.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    /// Objects of this checkpoint and of earlier ones are left out ...
    pub after: u64,
    /// ... but for these, to which later checkpoints may have been the first to refer: copies of blocks, whose number is set aside long
    /// before.
    pub copies: HashSet<u64>,
}

impl Scope {
    fn has(&self, object: u64) -> bool {
        cno_of(object) > self.after || self.copies.contains(&object)
    }
}

/// An inspection in progress.
struct Inspection<'a, F> {
    loader: NodeLoader,
    cache: &'a IndexCache,
    scope: &'a Scope,
    fetches_at_once: usize,
    format: BlockPtrFormat,
    seen: HashSet<BlockPtr>,
    /// The nodes to be read, by level. The lowest level is read first.
    wanted: BTreeMap<u8, Vec<Wanted>>,
    each: F,
    nodes: u64,
}

/// Reports everything that these indexes refer to, one index after the other, and what several have with the first of them. All must
/// belong to one container. So many pieces of objects are fetched at once. Returns the number of nodes read.
///
/// # Errors
/// When the store fails. Damage is reported and is no error.
pub(crate) async fn inspect(
    store: &Store,
    roots: &[Root],
    scope: &Scope,
    cache: &IndexCache,
    fetches_at_once: usize,
    each: impl FnMut(Seen),
) -> Result<u64, VolumeError> {
    let failed = |e| VolumeError::engine(format!("reading an index of {}", store.url), e);
    let Some(first) = roots.first() else { return Ok(0) };
    let loader = NodeLoader::new(store.clone(), IndexChecksums::default(), None);
    let format = format_in(first, &loader, cache).map_err(failed)?;
    let mut inspection = Inspection {
        loader: NodeLoader::new(store.clone(), IndexChecksums::default(), Some(cache.clone())),
        cache,
        scope,
        fetches_at_once,
        format,
        seen: HashSet::new(),
        wanted: BTreeMap::new(),
        each,
        nodes: 0,
    };
    for (number, root) in roots.iter().enumerate() {
        // Roots are checked when inodes are read.
        let root = node::decode_root(&root.0)
            .map_err(|reason| failed(io::Error::new(io::ErrorKind::InvalidData, reason)))?;
        inspection.note(&root, Holder::Root(number), u64::MAX);
        // One at a time, so that a shared node is not put on the list many times.
        inspection.run().await.map_err(failed)?;
    }
    Ok(inspection.nodes)
}

fn format_in(root: &Root, loader: &NodeLoader, cache: &IndexCache) -> io::Result<BlockPtrFormat> {
    let tree: BMap<'_, u64, BlockPtr, BlockPtr, NodeLoader, IndexCache> =
        BMap::read(&root.0, NODE_BYTES, loader.clone(), cache.clone())?;
    format_of(tree.get_userdata())
}

impl<F: FnMut(Seen)> Inspection<'_, F> {
    /// Reports what a node refers to, and puts the nodes that were not seen yet on the list. The node's keys end before
    /// `end`.
    fn note(&mut self, node: &node::Node, holder: Holder, end: u64) {
        for (index, &(key, pointer)) in node.entries.iter().enumerate() {
            if !BlockPtrFormat::is_on_staging(&pointer) {
                continue;
            }
            let (segment, offset) = BlockPtrFormat::decode(&pointer, &self.format);
            let (object, offset_bytes) = (object_of(segment), offset as u64);
            if !self.scope.has(object) {
                continue;
            }
            if node.level == LEAF_LEVEL {
                (self.each)(Seen::Block {
                    block: key,
                    object,
                    offset_bytes,
                    holder,
                });
                continue;
            }
            (self.each)(Seen::Node {
                pointer,
                object,
                offset_bytes,
                holder,
            });
            if self.seen.insert(pointer) {
                let next = node.entries.get(index + 1).map_or(end, |(next, _)| *next);
                self.wanted.entry(node.level - 1).or_default().push(Wanted {
                    pointer,
                    object,
                    offset_bytes,
                    keys: key..next,
                });
            }
        }
    }

    async fn run(&mut self) -> io::Result<()> {
        while let Some(mut lowest) = self.wanted.first_entry() {
            let level = *lowest.key();
            let rest = lowest.get().len().saturating_sub(READ_TOGETHER);
            let batch = lowest.get_mut().split_off(rest);
            if lowest.get().is_empty() {
                lowest.remove();
            }
            self.read(level, batch).await?;
        }
        Ok(())
    }

    async fn read(&mut self, level: u8, batch: Vec<Wanted>) -> io::Result<()> {
        self.nodes += batch.len() as u64;
        let mut pieces: BTreeMap<(u64, u64), Vec<Wanted>> = BTreeMap::new();
        let mut bytes = vec![0; NODE_BYTES];
        for wanted in batch {
            match self.cache.load(wanted.pointer, &mut bytes).await? {
                true => self.take(level, &wanted, &bytes),
                false => {
                    let piece = (wanted.object, piece_start(wanted.offset_bytes));
                    pieces.entry(piece).or_default().push(wanted);
                }
            }
        }
        let loader = self.loader.clone();
        let fetches = pieces.into_iter().map(|((object, start), wanted)| {
            let loader = loader.clone();
            async move { (start, wanted, loader.piece(segment_of(object), start).await) }
        });
        let mut fetched = stream::iter(fetches).buffer_unordered(self.fetches_at_once);
        while let Some((start, wanted, piece)) = fetched.next().await {
            let piece = match piece {
                Ok(piece) => piece,
                Err(e) => Err(missing(&e).ok_or(e)?.into()),
            };
            if let (Ok(piece), Some(first)) = (&piece, wanted.first()) {
                loader.keep(segment_of(first.object), start, piece, self.format);
            }
            for wanted in wanted {
                let (start, piece) = match &piece {
                    Ok(piece) => (start, Ok(piece.clone())),
                    // Some of what is beside the damage may be whole.
                    Err(_) => {
                        loader
                            .window(segment_of(wanted.object), wanted.offset_bytes)
                            .await?
                    }
                };
                let at = (wanted.offset_bytes - start) as usize;
                let node = piece.as_ref().map_err(ToString::to_string);
                let node = node.and_then(|piece| {
                    piece
                        .get(at..at + NODE_BYTES)
                        .ok_or_else(|| "the object ends before it".to_owned())
                });
                match node {
                    Ok(node) => self.take(level, &wanted, node),
                    Err(reason) => self.damaged(&wanted, reason),
                }
            }
        }
        Ok(())
    }

    /// Accepts a node if it is what its holder says, and otherwise reports what is wrong.
    fn take(&mut self, level: u8, wanted: &Wanted, bytes: &[u8]) {
        let node = node::decode(bytes).and_then(|node| fits(level, &wanted.keys, &node).map(|()| node));
        match node {
            Ok(node) => self.note(&node, Holder::Node(wanted.pointer), wanted.keys.end),
            Err(reason) => self.damaged(wanted, reason),
        }
    }

    fn damaged(&mut self, wanted: &Wanted, reason: String) {
        (self.each)(Seen::Damaged {
            pointer: wanted.pointer,
            object: wanted.object,
            offset_bytes: wanted.offset_bytes,
            blocks: wanted.keys.clone(),
            reason,
        });
    }
}

/// Checks that a node can be at the place where it was found.
fn fits(level: u8, keys: &Range<u64>, node: &node::Node) -> Result<(), String> {
    if node.level != level {
        return Err(format!("it is of level {}, and {level} leads to it", node.level));
    }
    let is_outside = |(key, _): &&(u64, u64)| !keys.contains(key);
    match node.entries.iter().find(is_outside) {
        Some((key, _)) => Err(format!(
            "it tells of block {key}, and blocks {} to {} lead to it",
            keys.start,
            keys.end - 1
        )),
        None => Ok(()),
    }
}

/// What is wrong when an object is missing; `None` for a failure of the store.
fn missing(e: &io::Error) -> Option<String> {
    let inner = e.get_ref()?.downcast_ref::<VolumeError>()?;
    (inner.kind() == ErrorKind::Corrupt).then(|| inner.to_string())
}
