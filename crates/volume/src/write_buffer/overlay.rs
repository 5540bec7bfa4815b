//! The unpublished part of a volume: the active generation, and the frozen ones until they are published.
//!
//! *Invariant W1* lives here: bytes leave the overlay only through [`Overlay::drop_frozen`], which is called only
//! once a checkpoint that holds them is published.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;

use super::generation::{Generation, PreparedWrite, Replaced, is_zero};
use super::progress::Progress;
use super::wal_delta::WalDelta;
use crate::base::geometry::{BlockIndex, Geometry, LiveGeometry};
use crate::base::ids::FROZEN_MAX;
use crate::buffer_file::{Kept, Kind, NoRoom, Ticket};
use crate::wal::record::Content;

/// A generation that takes no more writes. Its blocks are still completed (see [`Generation::complete`]), hence the
/// lock.
#[derive(Debug)]
pub struct Frozen {
    generation: RwLock<Generation>,
    progress: Progress,
}

impl Frozen {
    /// A frozen generation outside an overlay, for tests of engines.
    pub fn new(generation: Generation) -> Self {
        Self {
            generation: RwLock::new(generation),
            progress: Progress::default(),
        }
    }

    /// Calls `look` with the generation, under its lock.
    pub fn with<R>(&self, look: impl FnOnce(&Generation) -> R) -> R {
        look(&self.generation.read())
    }

    /// Completes a partly written block with published bytes.
    pub fn complete(&self, block: BlockIndex, in_block: u32, bytes: &[u8]) {
        self.generation.write().complete(block, in_block, bytes);
        self.progress.advanced();
    }

    /// The progress of its publish.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }
}

/// A partly written block and the smallest range that holds all its unwritten bytes (bytes from the block's start).
pub type PartialBlock = (BlockIndex, Range<u32>);

#[derive(Debug)]
struct Layers {
    active: Generation,
    /// The number of generations that were frozen before the active one.
    freezes: u64,
    /// Oldest first.
    frozen: VecDeque<FrozenLayer>,
    /// The changes of the active generation that the WAL lacks; `None` without a WAL.
    active_unlogged: Option<WalDelta>,
    /// Since when there is something that the log lacks, in any generation; `None` without a log.
    unlogged_since: Option<Instant>,
    /// Where changes are kept too, so that they survive this process.
    kept: Option<Arc<Kept>>,
}

impl Layers {
    fn write(&mut self, prepared: PreparedWrite<'_>) -> Replaced {
        if let Some(unlogged) = &mut self.active_unlogged {
            unlogged.written(prepared.range());
        }
        self.active.write(prepared)
    }

    fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> Replaced {
        if let Some(unlogged) = &mut self.active_unlogged {
            unlogged.zeroed(offset_bytes..offset_bytes + len_bytes);
        }
        self.active.zero(offset_bytes, len_bytes)
    }

    fn trim(&mut self, geometry: Geometry, offset_bytes: u64, len_bytes: u64) -> Replaced {
        if let Some(unlogged) = &mut self.active_unlogged {
            let blocks = geometry.whole_blocks(offset_bytes, len_bytes);
            let block_size = u64::from(geometry.block_size());
            let end = (blocks.end * block_size).min(geometry.size_bytes());
            unlogged.zeroed(blocks.start * block_size..end);
        }
        self.active.trim(offset_bytes, len_bytes)
    }

    /// The frozen generations, newest first. That is the order in which reads ask them.
    fn frozen(&self) -> Vec<Arc<Frozen>> {
        self.frozen.iter().rev().map(|f| f.generation.clone()).collect()
    }
}

#[derive(Debug)]
struct FrozenLayer {
    generation: Arc<Frozen>,
    buffered_bytes: u64,
    /// The changes of the generation that the WAL lacks.
    unlogged: Option<WalDelta>,
}

/// What the WAL lacks of a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForWal {
    /// Nothing.
    Nothing,
    /// These changes: the offset in bytes from the volume's start, and the new content.
    Changes(Vec<(u64, Content)>),
    /// More than one record may hold.
    TooLarge,
}

/// What the WAL lacks of all generations, as of one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnloggedChanges {
    /// For each frozen generation, oldest first. Where one is [`ForWal::TooLarge`], the others' changes are still to be
    /// logged.
    pub frozen: Vec<ForWal>,
    /// For the active generation. If it is too large, nothing was taken of the frozen ones either.
    pub active: ForWal,
    /// Since when there is what was taken; `None` when nothing was.
    pub since: Option<Instant>,
}

/// A change to a volume.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Change<'a> {
    /// These bytes are written.
    Write { offset_bytes: u64, data: &'a [u8] },
    /// Every byte of the range becomes zero.
    Zero { offset_bytes: u64, len_bytes: u64 },
    /// The whole blocks of the range are dropped.
    Trim { offset_bytes: u64, len_bytes: u64 },
}

impl<'a> Change<'a> {
    /// The written bytes; empty for the other changes.
    pub fn data(self) -> &'a [u8] {
        match self {
            Self::Write { data, .. } => data,
            Self::Zero { .. } | Self::Trim { .. } => &[],
        }
    }

    fn place(self) -> (Kind, u64, u64) {
        match self {
            Self::Write { offset_bytes, data } => (Kind::Write, offset_bytes, data.len() as u64),
            Self::Zero {
                offset_bytes,
                len_bytes,
            } => (Kind::Zero, offset_bytes, len_bytes),
            Self::Trim {
                offset_bytes,
                len_bytes,
            } => (Kind::Trim, offset_bytes, len_bytes),
        }
    }
}

/// The effect of a change on the buffered amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffered {
    /// Whether this change was the active generation's first.
    pub is_first: bool,
    /// Bytes the change added to the buffered amount.
    pub added_bytes: u64,
    /// Buffered bytes of the active generation after the change.
    pub active_bytes: u64,
    /// Buffered bytes of the active and the frozen generations together, after the change.
    pub total_bytes: u64,
    /// See [`Generation::is_streaming`].
    pub is_streaming: bool,
}

/// Active and frozen generations of one volume.
#[derive(Debug)]
pub struct Overlay {
    geometry: LiveGeometry,
    layers: RwLock<Layers>,
    /// Buffered bytes of the frozen generations. Kept here so that writers need not take the generations' locks.
    frozen_bytes: Mutex<u64>,
    /// The [`WalDelta`] of an empty generation; `None` without a WAL.
    no_unlogged: Option<WalDelta>,
}

impl Overlay {
    /// An empty overlay.
    pub fn new(geometry: Geometry) -> Self {
        Self::following(geometry, None)
    }

    /// An empty overlay that records which changes the WAL lacks, up to `wal_bulk_bytes` for each generation.
    pub fn with_wal(geometry: Geometry, wal_bulk_bytes: u64) -> Self {
        Self::following(geometry, Some(WalDelta::new(wal_bulk_bytes)))
    }

    /// The geometry of the volume, in which writers write.
    pub fn geometry(&self) -> Geometry {
        self.geometry.now()
    }

    /// The volume has grown, from an end at a block's border. What is written from now on may lie behind that.
    pub fn grow(&self, geometry: Geometry) {
        let mut layers = self.layers.write();
        if geometry.size_bytes() <= self.geometry().size_bytes() {
            return;
        }
        layers.active.grow(geometry);
        self.geometry.grow_to(geometry.size_bytes());
    }

    /// A checkpoint was recorded in which nothing but the size was changed: what comes now is made upon it.
    pub(crate) fn rebase(&self) {
        let kept = self.layers.read().kept.clone();
        if let Some(kept) = kept {
            kept.rebase();
        }
    }

    fn following(geometry: Geometry, unlogged: Option<WalDelta>) -> Self {
        let layers = Layers {
            active: Generation::new(geometry),
            freezes: 0,
            frozen: VecDeque::new(),
            active_unlogged: unlogged.clone(),
            unlogged_since: None,
            kept: None,
        };
        Self {
            geometry: geometry.into(),
            layers: RwLock::new(layers),
            frozen_bytes: Mutex::new(0),
            no_unlogged: unlogged,
        }
    }

    /// From now on also keeps every change in the buffer file. Must be called while nothing is unpublished.
    pub(crate) fn keep_in(&self, kept: Arc<Kept>) {
        let mut layers = self.layers.write();
        debug_assert!(layers.active.is_empty() && layers.frozen.is_empty());
        layers.kept = Some(kept);
    }

    /// Adds a change. Every reader sees it when this returns. With a buffer file the change may be answered only after
    /// the ticket is stored there.
    ///
    /// # Errors
    /// [`NoRoom`] when the buffer file is full. Nothing was changed then.
    pub(crate) fn take_in(&self, change: Change<'_>) -> Result<(Buffered, Ticket), NoRoom> {
        match change {
            Change::Write { offset_bytes, data } => {
                let prepared = PreparedWrite::new(self.geometry(), offset_bytes, data);
                self.change_kept(change, |layers| layers.write(prepared))
            }
            Change::Zero {
                offset_bytes,
                len_bytes,
            } => self.change_kept(change, |layers| layers.zero(offset_bytes, len_bytes)),
            // It covers no whole block, so it changes nothing and needs no place in the buffer file.
            Change::Trim {
                offset_bytes,
                len_bytes,
            } if self.geometry().whole_blocks(offset_bytes, len_bytes).is_empty() => {
                Ok((self.trim(offset_bytes, len_bytes), Ticket::default()))
            }
            Change::Trim {
                offset_bytes,
                len_bytes,
            } => self.change_kept(change, |layers| {
                layers.trim(self.geometry(), offset_bytes, len_bytes)
            }),
        }
    }

    /// Reserves the change's place in the buffer file, if there is one, and applies the change, both under one lock.
    fn change_kept(
        &self,
        change: Change<'_>,
        apply: impl FnOnce(&mut Layers) -> Replaced,
    ) -> Result<(Buffered, Ticket), NoRoom> {
        let mut ticket = Ticket::default();
        let buffered = self.change(|layers| {
            if let Some(kept) = &layers.kept {
                let (kind, offset_bytes, len_bytes) = change.place();
                ticket = kept.reserve(kind, offset_bytes, len_bytes)?;
            }
            Ok(apply(layers))
        })?;
        Ok((buffered, ticket))
    }

    /// Writes as [`Self::take_in`] does, without keeping the change in the buffer file.
    pub fn write(&self, offset_bytes: u64, data: &[u8]) -> Buffered {
        let prepared = PreparedWrite::new(self.geometry(), offset_bytes, data);
        self.change_unkept(|layers| layers.write(prepared))
    }

    /// Zeroes every byte of the range, without keeping the change in the buffer file.
    pub fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Buffered {
        self.change_unkept(|layers| layers.zero(offset_bytes, len_bytes))
    }

    /// Drops the whole blocks of the range, without keeping the change in the buffer file.
    pub fn trim(&self, offset_bytes: u64, len_bytes: u64) -> Buffered {
        self.change_unkept(|layers| layers.trim(self.geometry(), offset_bytes, len_bytes))
    }

    fn change_unkept(&self, apply: impl FnOnce(&mut Layers) -> Replaced) -> Buffered {
        let Ok(buffered) = self.change::<std::convert::Infallible>(|layers| Ok(apply(layers)));
        buffered
    }

    fn change<E>(&self, apply: impl FnOnce(&mut Layers) -> Result<Replaced, E>) -> Result<Buffered, E> {
        let mut layers = self.layers.write();
        let was_empty = layers.active.is_empty();
        let before = layers.active.buffered_bytes();
        let replaced = apply(&mut layers)?;
        if layers.active_unlogged.is_some() {
            layers.unlogged_since.get_or_insert_with(Instant::now);
        }
        let active_bytes = layers.active.buffered_bytes();
        let is_first = was_empty && !layers.active.is_empty();
        let total_bytes = active_bytes + *self.frozen_bytes.lock();
        let is_streaming = layers.active.is_streaming();
        drop(layers);
        drop(replaced);
        Ok(Buffered {
            is_first,
            added_bytes: active_bytes.saturating_sub(before),
            active_bytes,
            total_bytes,
            is_streaming,
        })
    }

    /// Copies the unpublished bytes of the range into `out`. Returns the ranges that are not in the overlay, ascending.
    ///
    /// The active and the frozen generations are read as of one moment, so a freeze in between hides nothing.
    pub fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Vec<Range<u64>> {
        let (mut missing, frozen) = {
            let layers = self.layers.read();
            let missing = layers.active.read(offset_bytes, out);
            if missing.is_empty() || layers.frozen.is_empty() {
                return missing;
            }
            (missing, layers.frozen())
        };
        for layer in frozen {
            missing = layer.with(|generation| {
                let mut still = Vec::new();
                for r in missing {
                    let at = (r.start - offset_bytes) as usize..(r.end - offset_bytes) as usize;
                    still.extend(generation.read(r.start, &mut out[at]));
                }
                still
            });
        }
        missing
    }

    /// The unpublished state of `blocks`: ascending runs of data (`true`) or zeros (`false`). The active generation
    /// hides the frozen ones.
    pub fn block_runs(&self, blocks: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let (active, frozen) = {
            let layers = self.layers.read();
            (layers.active.block_runs(blocks.clone()), layers.frozen())
        };
        if frozen.is_empty() {
            return active;
        }
        // A partly written block over a frozen one is data either way. A zeroed block hides the older layers.
        let mut merged = rangemap::RangeMap::new();
        for layer in frozen.into_iter().rev() {
            merged.extend(layer.with(|g| g.block_runs(blocks.clone())));
        }
        merged.extend(active);
        merged.into_iter().collect()
    }

    /// Whether the active generation holds anything.
    pub fn is_active_dirty(&self) -> bool {
        !self.layers.read().active.is_empty()
    }

    /// Whether everything is published.
    pub fn is_empty(&self) -> bool {
        let layers = self.layers.read();
        layers.active.is_empty() && layers.frozen.is_empty()
    }

    /// Buffered bytes of the active and the frozen generations.
    pub fn total_bytes(&self) -> u64 {
        let layers = self.layers.read();
        layers.active.buffered_bytes() + *self.frozen_bytes.lock()
    }

    /// When the publish of a frozen generation last made progress; `None` when no generation is frozen or no publish
    /// has begun.
    pub fn last_progress(&self) -> Option<Instant> {
        let layers = self.layers.read();
        let last = layers
            .frozen
            .iter()
            .map(|layer| layer.generation.progress().last());
        last.max().flatten()
    }

    /// Buffered bytes of the active generation, and whether it is streaming.
    pub fn active(&self) -> (u64, bool) {
        let layers = self.layers.read();
        (layers.active.buffered_bytes(), layers.active.is_streaming())
    }

    /// Makes the active generation the newest frozen one and opens an empty one.
    ///
    /// # Panics
    /// When the highest number of generations is frozen already.
    pub fn freeze(&self) -> Arc<Frozen> {
        let mut layers = self.layers.write();
        assert!(
            layers.frozen.len() < FROZEN_MAX,
            "a frozen generation is dropped only once it is published"
        );
        let active = std::mem::replace(&mut layers.active, Generation::new(self.geometry()));
        let unlogged = std::mem::replace(&mut layers.active_unlogged, self.no_unlogged.clone());
        let buffered_bytes = active.buffered_bytes();
        *self.frozen_bytes.lock() += buffered_bytes;
        let generation = Arc::new(Frozen::new(active));
        layers.frozen.push_back(FrozenLayer {
            generation: generation.clone(),
            buffered_bytes,
            unlogged,
        });
        layers.freezes += 1;
        if let Some(kept) = &layers.kept {
            kept.freeze();
        }
        generation
    }

    /// The partly written blocks of the active generation whose other bytes are as published, and the number of the
    /// generation for [`Self::complete`]. Blocks that a frozen generation holds too are left out, because its publish
    /// changes their other bytes.
    pub fn partial_blocks(&self) -> (u64, Vec<PartialBlock>) {
        let (name, mut partial, frozen) = {
            let layers = self.layers.read();
            (layers.freezes, layers.active.partial_blocks(), layers.frozen())
        };
        for layer in frozen {
            layer.with(|g| partial.retain(|(block, _)| !g.holds(*block)));
        }
        (name, partial)
    }

    /// Completes a block that [`Self::partial_blocks`] named, with published bytes. The block's generation may be
    /// frozen by now. If it is published, there is nothing left to complete.
    pub fn complete(&self, generation: u64, block: BlockIndex, in_block: u32, bytes: &[u8]) {
        let frozen = {
            let mut layers = self.layers.write();
            if layers.freezes == generation {
                layers.active.complete(block, in_block, bytes);
                return;
            }
            let newer = layers.freezes - 1 - generation;
            let at = (layers.frozen.len() as u64).checked_sub(newer + 1);
            at.map(|at| layers.frozen[at as usize].generation.clone())
        };
        if let Some(frozen) = frozen {
            frozen.complete(block, in_block, bytes);
        }
    }

    /// Drops the oldest frozen generation, whose publish succeeded. Its memory is freed with the returned value.
    pub fn drop_frozen(&self) -> Option<Arc<Frozen>> {
        let mut layers = self.layers.write();
        let oldest = layers.frozen.pop_front()?;
        *self.frozen_bytes.lock() -= oldest.buffered_bytes;
        let kept = layers.kept.clone();
        drop(layers);
        if let Some(kept) = kept {
            kept.drop_oldest();
        }
        Some(oldest.generation)
    }

    /// Takes the changes that the WAL lacks. From now on they count as logged, so they must be logged or published.
    pub fn take_unlogged(&self) -> UnloggedChanges {
        let mut layers = self.layers.write();
        let layers = &mut *layers;
        let is_too_large =
            |unlogged: &Option<WalDelta>| unlogged.as_ref().is_some_and(WalDelta::is_too_large);
        if is_too_large(&layers.active_unlogged) {
            return UnloggedChanges {
                frozen: layers.frozen.iter().map(|_| ForWal::Nothing).collect(),
                active: ForWal::TooLarge,
                since: None,
            };
        }
        let frozen = layers.frozen.iter_mut().map(|layer| {
            if is_too_large(&layer.unlogged) {
                return ForWal::TooLarge;
            }
            layer.generation.with(|g| changes(g, layer.unlogged.as_mut()))
        });
        UnloggedChanges {
            frozen: frozen.collect(),
            active: changes(&layers.active, layers.active_unlogged.as_mut()),
            since: layers.unlogged_since.take(),
        }
    }

    /// Since when there is something that the log lacks; `None` without a log. What was published meanwhile may be counted still.
    pub fn unlogged_since(&self) -> Option<Instant> {
        self.layers.read().unlogged_since
    }

    /// About how many bytes the log lacks; 0 without a log.
    pub fn unlogged_bytes(&self) -> u64 {
        let layers = self.layers.read();
        let frozen = layers.frozen.iter().map(|layer| &layer.unlogged);
        let all = frozen.chain([&layers.active_unlogged]);
        all.flatten().map(WalDelta::data_bytes).sum()
    }
}

/// The changes to a generation that `unlogged` names.
fn changes(generation: &Generation, unlogged: Option<&mut WalDelta>) -> ForWal {
    let Some(unlogged) = unlogged.filter(|u| !u.is_empty()) else {
        return ForWal::Nothing;
    };
    let (data, zeros) = unlogged.take();
    let zeros = zeros.into_iter().map(|r| {
        let len_bytes = r.end - r.start;
        (r.start, Content::Zero { len_bytes })
    });
    let data = data.into_iter().map(|r| {
        let mut bytes = vec![0; (r.end - r.start) as usize];
        let missing = generation.read(r.start, &mut bytes);
        assert!(
            missing.is_empty(),
            "what was written is in the generation that took it in"
        );
        if is_zero(&bytes) {
            let len_bytes = bytes.len() as u64;
            return (r.start, Content::Zero { len_bytes });
        }
        (r.start, Content::Data(bytes.into()))
    });
    ForWal::Changes(zeros.chain(data).collect())
}

#[cfg(test)]
#[path = "overlay_tests.rs"]
mod tests;
