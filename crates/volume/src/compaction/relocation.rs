//! One relocation: what is live in the victims is found, copied, and flipped.

use std::io;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use futures::FutureExt;
use futures::stream::{self, StreamExt, TryStreamExt};
use log::{debug, warn};
use parking_lot::Mutex;

use super::pace::Pace;
use crate::base::control::Control;
use crate::base::error::{ErrorKind, VolumeError};
use crate::checkpoint::handle::Driver;
use crate::engine::copy::{Copier, Copy, OBJECT_BYTES, Reserved};
use crate::engine::hyper_engine::{HyperEngine, Numbers};
use crate::engine::{Engine, Relocated};
use crate::format::object_names::of_pointer;
use crate::index::cache::IndexCache;
use crate::index::checksums::IndexChecksums;
use crate::index::loader::NodeLoader;
use crate::index::lookup::Published;
use crate::index::origins::Births;
use crate::index::relocation::{self, Move, Node, Relocation, offset_of};
use crate::read::coalesce::{self, Piece, Span};
use crate::retention::{UnderWay, Victim};
use crate::store::Store;

/// Objects looked into at once.
const LOOKS_AT_ONCE: usize = 8;
/// The largest request for blocks to copy: with a gap of less than a request's cost between any two live blocks, that is the whole
/// object.
const READ_BYTES_MAX: u64 = 4 << 20;
/// Requests for blocks to copy at once.
const READS_AT_ONCE: usize = 4;

/// Publishes a relocation between two publishes of the volume, and records it.
#[async_trait]
pub trait Flip: Send + Sync {
    /// See [`Engine::relocate`].
    async fn flip(&self, relocation: Arc<Relocation>) -> Result<Option<Relocated>, VolumeError>;

    /// Returns once nothing that is not published is made upon a checkpoint from before this call. Where nobody writes beside it there is
    /// nothing of the kind.
    ///
    /// # Errors
    /// When what clients wrote cannot be published.
    async fn settle(&self) -> Result<(), VolumeError> {
        Ok(())
    }
}

#[async_trait]
impl Flip for Driver {
    async fn flip(&self, relocation: Arc<Relocation>) -> Result<Option<Relocated>, VolumeError> {
        self.relocate(relocation).await
    }

    async fn settle(&self) -> Result<(), VolumeError> {
        self.publish_and_rebase().await
    }
}

/// What a relocation did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Objects that what was live was copied out of.
    pub objects: u64,
    /// Their bytes.
    pub object_bytes: u64,
    /// Blocks that were copied.
    pub copied: u64,
    /// Of those, blocks that were changed meanwhile, and so stay where their change is.
    pub overtaken: u64,
    /// Nodes of the index that were written anew.
    pub nodes: u64,
    /// Bytes that were copied.
    pub bytes: u64,
    /// The checkpoint that this made; 0 when it made none.
    pub checkpoint: u64,
}

/// What relocations of one volume work with.
pub struct Ground {
    store: Store,
    copier: Copier,
    numbers: Numbers,
    published: Arc<Mutex<Published>>,
    cache: IndexCache,
    block_bytes: u64,
    under_way: UnderWay,
}

impl Ground {
    /// Over a container that is open for writing.
    pub fn new(engine: &HyperEngine, store: Store, under_way: UnderWay) -> Self {
        Self {
            store,
            copier: engine.copier(),
            numbers: engine.numbers_for_copies(),
            published: engine.published(),
            cache: engine.index_in_memory(),
            block_bytes: u64::from(engine.geometry().block_size()),
            under_way,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Copies what is live out of these objects and flips. Stopped by `control` before the flip.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when another owner has the volume. After any error the volume is as it was, or as it is to be.
    pub async fn relocate(
        &self,
        victims: &[Victim],
        flip: &dyn Flip,
        pace: Pace,
        control: &Control,
    ) -> Result<Moved, VolumeError> {
        // The tree's code trusts what is stored; a damaged node must not take the server down.
        let relocated = AssertUnwindSafe(self.relocate_unguarded(victims, flip, pace, control));
        relocated.catch_unwind().await.unwrap_or_else(|_| {
            Err(VolumeError::Corrupt {
                what: format!("the index of the volume at {}", self.store.url),
                reason: "it is damaged where what is live in objects is looked up".into(),
            })
        })
    }

    async fn relocate_unguarded(
        &self,
        victims: &[Victim],
        flip: &dyn Flip,
        pace: Pace,
        control: &Control,
    ) -> Result<Moved, VolumeError> {
        let mut moved = Moved {
            objects: victims.len() as u64,
            object_bytes: victims.iter().map(|victim| victim.object_bytes).sum(),
            ..Moved::default()
        };
        let (blocks, nodes) = self.live(victims).await?;
        let mut relocation = Relocation {
            moves: Vec::new(),
            nodes,
        };
        let mut reserved = None;
        if !blocks.is_empty() {
            let number = self.numbers.reserve().await?;
            self.under_way.begin(number.number());
            reserved = Some(number.number());
            let copied = self.copy(&number, &blocks, pace, control).await;
            relocation.moves = copied.inspect_err(|_| self.under_way.given_up(number.number()))?;
        }
        moved.copied = relocation.moves.len() as u64;
        moved.bytes = moved.copied * self.block_bytes;
        if control.is_stopped() || (relocation.moves.is_empty() && relocation.nodes.is_empty()) {
            reserved
                .into_iter()
                .for_each(|number| self.under_way.given_up(number));
            return Ok(moved);
        }
        // So that the owner has what it needs of the index in memory, and is not kept from publishing by reading it.
        self.bring_near(&relocation).await;
        let relocation = Arc::new(relocation);
        // Once it was sent, copies may come to be referred to though its answer is an error.
        let flipped = flip.flip(relocation.clone()).await;
        let flipped = flipped.inspect_err(|_| {
            let newest = self.published.lock().recent.newest().map_or(0, |id| id.cno);
            reserved
                .into_iter()
                .for_each(|number| self.under_way.sent(number, newest.max(number)));
        })?;
        match (&flipped, reserved) {
            (Some(flipped), Some(number)) => self.under_way.published(number, flipped.checkpoint.id.cno),
            (None, Some(number)) => self.under_way.given_up(number),
            (_, None) => {}
        }
        moved.checkpoint = flipped.as_ref().map_or(0, |flipped| flipped.checkpoint.id.cno);
        let applied = flipped.map(|flipped| flipped.applied).unwrap_or_default();
        moved.overtaken = moved.copied - applied.moved.len() as u64;
        moved.nodes = applied.nodes as u64;
        debug!("{}: {moved:?}", self.store.url);
        Ok(moved)
    }

    /// What of these objects the newest index refers to: blocks, ascending, with their pointers; and nodes.
    async fn live(&self, victims: &[Victim]) -> Result<(Vec<(u64, u64)>, Vec<Node>), VolumeError> {
        let looks = victims.iter().map(|victim| {
            let (object, object_bytes) = (victim.object, victim.object_bytes);
            self.copier.summary(object, object_bytes, self.block_bytes)
        });
        let looks: Vec<_> = looks.collect();
        let found: Vec<_> = stream::iter(looks).buffered(LOOKS_AT_ONCE).collect().await;
        let mut blocks = Vec::new();
        let mut nodes = Vec::new();
        for (found, victim) in found.into_iter().zip(victims) {
            let (summary, of_object) = match found {
                // It keeps its space; the others need not.
                Err(e) if is_damage(&e) => {
                    warn!("an object is not compacted: {}", e.chain());
                    continue;
                }
                found => found?,
            };
            let own = summary
                .blocks
                .into_iter()
                .filter(|(_, pointer)| of_pointer(*pointer) == victim.object);
            blocks.extend(own);
            nodes.extend(of_object);
        }
        blocks.sort_unstable();
        blocks.dedup();
        relocation::live(self.trees(), &blocks, nodes)
            .await
            .map_err(|e| VolumeError::engine("looking up what is live in objects", e))
    }

    /// Reads the newest index, of now, any number of times.
    fn trees(&self) -> impl Fn() -> io::Result<relocation::Tree> {
        let root = self.published.lock().root;
        let checksums = IndexChecksums::default();
        let loader = NodeLoader::new(self.store.clone(), checksums, Some(self.cache.clone()));
        let cache = self.cache.clone();
        move || relocation::read(&root, loader.clone(), cache.clone())
    }

    async fn bring_near(&self, relocation: &Relocation) {
        let wanted: Vec<_> = relocation.moves.iter().map(|one| (one.block, one.from)).collect();
        // What fails here fails again, and is told, at the flip.
        drop(relocation::live(self.trees(), &wanted, relocation.nodes.clone()).await);
    }

    /// Copies blocks, in their order.
    async fn copy(
        &self,
        reserved: &Reserved,
        blocks: &[(u64, u64)],
        mut pace: Pace,
        control: &Control,
    ) -> Result<Vec<Move>, VolumeError> {
        let mut births = Births::of_volume(&self.store).await?;
        let in_object = usize::try_from(OBJECT_BYTES / self.block_bytes)
            .unwrap_or(usize::MAX)
            .max(1);
        let mut moves = Vec::with_capacity(blocks.len());
        let mut part = 0_u16;
        // One object at a time: the first must be there before any other is.
        for blocks in blocks.chunks(in_object) {
            let read = self.read(blocks, &mut pace, control).await?;
            let Some(read) = read else {
                return Ok(Vec::new());
            };
            let mut copies = Vec::with_capacity(read.len());
            // A block that cannot be read stays where it is.
            let readable = blocks
                .iter()
                .zip(read)
                .filter_map(|(block, bytes)| Some((*block, bytes?)));
            let mut from = Vec::with_capacity(blocks.len());
            for ((block, pointer), bytes) in readable {
                let birth = births.of(pointer).await?;
                copies.push(Copy { block, birth, bytes });
                from.push((block, pointer));
            }
            if copies.is_empty() {
                continue;
            }
            part = part
                .checked_add(1)
                .ok_or_else(|| VolumeError::Internal("too many copies for one relocation".into()))?;
            let pointers = self.copier.put(reserved, part, copies).await?;
            let copied = from.into_iter().zip(pointers);
            moves.extend(copied.map(|((block, from), to)| Move { block, from, to }));
        }
        Ok(moves)
    }

    /// The bytes of these blocks, `None` for those that are damaged; `None` for all when it was stopped.
    async fn read(
        &self,
        blocks: &[(u64, u64)],
        pace: &mut Pace,
        control: &Control,
    ) -> Result<Option<Vec<Option<Bytes>>>, VolumeError> {
        let piece = |(number, (_, pointer)): (usize, &(u64, u64))| {
            let at = offset_of(*pointer);
            Piece {
                number,
                object: of_pointer(*pointer),
                bytes: at..at + self.block_bytes,
            }
        };
        let spans = coalesce::spans(blocks.iter().enumerate().map(piece).collect(), READ_BYTES_MAX);
        let pace = &Mutex::new(pace);
        let reads = spans.into_iter().map(|span| async move {
            if control.is_stopped() {
                return Ok(Vec::new());
            }
            let bytes = span.pieces.len() as u64 * self.block_bytes;
            let wait = pace.lock().wait(bytes, Instant::now());
            tokio::time::sleep(wait).await;
            let read = self.read_readable(&span).await?;
            control.add_data(bytes);
            control.settle(control.data_bytes());
            Ok::<_, VolumeError>(read)
        });
        let reads: Vec<_> = reads.collect();
        let mut reads = stream::iter(reads).buffer_unordered(READS_AT_ONCE);
        let mut all: Vec<Option<Bytes>> = vec![None; blocks.len()];
        while let Some(read) = reads.try_next().await? {
            for (number, bytes) in read {
                all[number] = Some(bytes);
            }
        }
        Ok((!control.is_stopped()).then_some(all))
    }

    /// Reads a span, without the blocks of it that are damaged or missing.
    async fn read_readable(&self, span: &Span) -> Result<Vec<(usize, Bytes)>, VolumeError> {
        match self.read_span(span).await {
            Err(e) if is_damage(&e) => warn!("blocks are not compacted: {}", e.chain()),
            read => return read,
        }
        let mut readable = Vec::new();
        for piece in &span.pieces {
            let alone = Span {
                object: span.object,
                bytes: piece.bytes.clone(),
                pieces: vec![piece.clone()],
            };
            match self.read_span(&alone).await {
                Err(e) if is_damage(&e) => {}
                read => readable.extend(read?),
            }
        }
        Ok(readable)
    }

    async fn read_span(&self, span: &Span) -> Result<Vec<(usize, Bytes)>, VolumeError> {
        let frames = self.copier.read(span.object, span.bytes.clone()).await?;
        let within = |bytes: &Range<u64>| {
            let at = (bytes.start - span.bytes.start) as usize;
            frames.to_vec(at, (bytes.end - bytes.start) as usize)
        };
        let pieces = span.pieces.iter().map(|piece| {
            let bytes = within(&piece.bytes);
            let bytes =
                bytes.ok_or_else(|| VolumeError::Internal("a read is shorter than what it was for".into()));
            Ok((piece.number, Bytes::from(bytes?)))
        });
        pieces.collect()
    }
}

/// Whether stored data is damaged or missing, which another attempt does not change.
fn is_damage(error: &VolumeError) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotFound)
}
