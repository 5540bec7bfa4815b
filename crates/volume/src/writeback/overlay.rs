//! The unpublished part of a volume: the active generation, and the frozen one while it is being published.
//!
//! *Invariant W1* lives here: bytes leave the overlay only through [`Overlay::drop_frozen`], which is called only
//! once a checkpoint that holds them is published.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::generation::{Generation, PreparedWrite, Replaced, is_zero};
use super::unlogged::Unlogged;
use crate::geometry::{BlockIndex, Geometry};
use crate::log::record::Content;

/// A generation that takes no more writes. It is still completed (see [`Generation::complete`]), hence the lock.
#[derive(Debug)]
pub struct Frozen(RwLock<Generation>);

impl Frozen {
    /// A frozen generation outside an overlay, for tests of engines.
    pub fn new(generation: Generation) -> Self {
        Self(RwLock::new(generation))
    }

    /// Looks at the generation.
    pub fn with<R>(&self, look: impl FnOnce(&Generation) -> R) -> R {
        look(&self.0.read())
    }

    /// Completes a partly written block with published bytes.
    pub fn complete(&self, block: BlockIndex, in_block: u32, bytes: &[u8]) {
        self.0.write().complete(block, in_block, bytes);
    }
}

#[derive(Debug)]
struct Layers {
    active: Generation,
    frozen: Option<Arc<Frozen>>,
    /// What the log lacks of the active generation; `None` without a log.
    active_unlogged: Option<Unlogged>,
    /// What the log lacks of the frozen generation.
    frozen_unlogged: Option<Unlogged>,
}

/// What a generation has for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForLog {
    /// The log has all of it.
    Nothing,
    /// These changes: offset in bytes from the volume's start, and what is there.
    Changes(Vec<(u64, Content)>),
    /// More than is logged at once.
    TooLarge,
}

/// What both generations have for the log, as of one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnloggedChanges {
    /// Of the frozen generation. [`ForLog::TooLarge`] leaves the active one's changes to be logged all the same.
    pub frozen: ForLog,
    /// Of the active generation. When it is too large nothing was taken of the frozen one either.
    pub active: ForLog,
}

/// What a change did to the buffered amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffered {
    /// Whether this change was the active generation's first.
    pub is_first: bool,
    /// Bytes the change added to the buffered amount.
    pub added_bytes: u64,
    /// Bytes of the active generation now.
    pub active_bytes: u64,
    /// Bytes of the active and frozen generations together, now.
    pub total_bytes: u64,
    /// See [`Generation::is_streaming`].
    pub is_streaming: bool,
}

/// Active and frozen generation of one volume.
#[derive(Debug)]
pub struct Overlay {
    geometry: Geometry,
    layers: RwLock<Layers>,
    /// Bytes of the frozen generation, so that writers need not take its lock.
    frozen_bytes: Mutex<u64>,
    /// The account of an empty generation; `None` without a log.
    no_unlogged: Option<Unlogged>,
}

impl Overlay {
    /// An empty overlay.
    pub fn new(geometry: Geometry) -> Self {
        Self::following(geometry, None)
    }

    /// An empty overlay that keeps account of what a log lacks: of each generation up to `log_bulk_bytes`.
    pub fn with_log(geometry: Geometry, log_bulk_bytes: u64) -> Self {
        Self::following(geometry, Some(Unlogged::new(log_bulk_bytes)))
    }

    fn following(geometry: Geometry, unlogged: Option<Unlogged>) -> Self {
        let layers = Layers {
            active: Generation::new(geometry),
            frozen: None,
            frozen_unlogged: unlogged.clone(),
            active_unlogged: unlogged.clone(),
        };
        Self {
            geometry,
            layers: RwLock::new(layers),
            frozen_bytes: Mutex::new(0),
            no_unlogged: unlogged,
        }
    }

    /// Takes a write in; it is visible to every reader when this returns.
    pub fn write(&self, offset_bytes: u64, data: &[u8]) -> Buffered {
        let prepared = PreparedWrite::new(self.geometry, offset_bytes, data);
        let range = offset_bytes..offset_bytes + data.len() as u64;
        self.change(|layers| {
            if let Some(unlogged) = &mut layers.active_unlogged {
                unlogged.written(range);
            }
            layers.active.write(prepared)
        })
    }

    /// Zeroes every byte of the range.
    pub fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Buffered {
        self.change(|layers| {
            if let Some(unlogged) = &mut layers.active_unlogged {
                unlogged.zeroed(offset_bytes..offset_bytes + len_bytes);
            }
            layers.active.zero(offset_bytes, len_bytes)
        })
    }

    /// Drops the whole blocks of the range.
    pub fn trim(&self, offset_bytes: u64, len_bytes: u64) -> Buffered {
        self.change(|layers| {
            if let Some(unlogged) = &mut layers.active_unlogged {
                let blocks = self.geometry.whole_blocks(offset_bytes, len_bytes);
                let block_size = u64::from(self.geometry.block_size());
                let end = (blocks.end * block_size).min(self.geometry.size_bytes());
                unlogged.zeroed(blocks.start * block_size..end);
            }
            layers.active.trim(offset_bytes, len_bytes)
        })
    }

    fn change(&self, apply: impl FnOnce(&mut Layers) -> Replaced) -> Buffered {
        let mut layers = self.layers.write();
        let was_empty = layers.active.is_empty();
        let before = layers.active.buffered_bytes();
        let replaced = apply(&mut layers);
        let active_bytes = layers.active.buffered_bytes();
        let is_first = was_empty && !layers.active.is_empty();
        let total_bytes = active_bytes + *self.frozen_bytes.lock();
        let is_streaming = layers.active.is_streaming();
        drop(layers);
        drop(replaced);
        Buffered {
            is_first,
            added_bytes: active_bytes.saturating_sub(before),
            active_bytes,
            total_bytes,
            is_streaming,
        }
    }

    /// Copies what is unpublished of the range into `out` and returns what is not here, ascending.
    ///
    /// Active and frozen are looked at as of one moment, so a freeze in between can hide nothing.
    pub fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Vec<Range<u64>> {
        let (missing, frozen) = {
            let layers = self.layers.read();
            (layers.active.read(offset_bytes, out), layers.frozen.clone())
        };
        let Some(frozen) = frozen.filter(|_| !missing.is_empty()) else {
            return missing;
        };
        frozen.with(|generation| {
            let mut still = Vec::new();
            for r in missing {
                let at = (r.start - offset_bytes) as usize..(r.end - offset_bytes) as usize;
                still.extend(generation.read(r.start, &mut out[at]));
            }
            still
        })
    }

    /// What is unpublished of `blocks`: runs of data (`true`) or zeros (`false`), ascending, the active generation
    /// before the frozen one.
    pub fn block_runs(&self, blocks: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let (active, frozen) = {
            let layers = self.layers.read();
            (layers.active.block_runs(blocks.clone()), layers.frozen.clone())
        };
        let below = frozen
            .map(|f| f.with(|g| g.block_runs(blocks)))
            .unwrap_or_default();
        if below.is_empty() {
            return active;
        }
        // A partly written block over a frozen one is data either way; a zeroed block hides what is below.
        let mut merged = rangemap::RangeMap::new();
        merged.extend(below);
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
        layers.active.is_empty() && layers.frozen.is_none()
    }

    /// Bytes buffered, active and frozen.
    pub fn total_bytes(&self) -> u64 {
        let layers = self.layers.read();
        layers.active.buffered_bytes() + *self.frozen_bytes.lock()
    }

    /// Bytes buffered in the active generation, and whether it is streaming.
    pub fn active(&self) -> (u64, bool) {
        let layers = self.layers.read();
        (layers.active.buffered_bytes(), layers.active.is_streaming())
    }

    /// Makes the active generation the frozen one and opens an empty one.
    ///
    /// # Panics
    /// When a generation is frozen already: there is at most one, and replacing it would lose acknowledged writes.
    pub fn freeze(&self) -> Arc<Frozen> {
        let mut layers = self.layers.write();
        assert!(
            layers.frozen.is_none(),
            "a frozen generation is dropped only once it is published"
        );
        let active = std::mem::replace(&mut layers.active, Generation::new(self.geometry));
        *self.frozen_bytes.lock() = active.buffered_bytes();
        layers.frozen_unlogged = std::mem::replace(&mut layers.active_unlogged, self.no_unlogged.clone());
        let frozen = Arc::new(Frozen::new(active));
        layers.frozen = Some(frozen.clone());
        frozen
    }

    /// Drops the frozen generation: its publish succeeded. The memory goes with the value returned.
    pub fn drop_frozen(&self) -> Option<Arc<Frozen>> {
        let mut layers = self.layers.write();
        *self.frozen_bytes.lock() = 0;
        layers.frozen_unlogged = self.no_unlogged.clone();
        layers.frozen.take()
    }

    /// Takes what the log lacks: it counts as logged from now on, so it must be logged, or published.
    pub fn take_unlogged(&self) -> UnloggedChanges {
        let mut layers = self.layers.write();
        let layers = &mut *layers;
        let is_too_large =
            |unlogged: &Option<Unlogged>| unlogged.as_ref().is_some_and(Unlogged::is_too_large);
        if is_too_large(&layers.active_unlogged) {
            return UnloggedChanges {
                frozen: ForLog::Nothing,
                active: ForLog::TooLarge,
            };
        }
        let frozen = if is_too_large(&layers.frozen_unlogged) {
            ForLog::TooLarge
        } else {
            match &layers.frozen {
                Some(frozen) => frozen.with(|g| changes(g, layers.frozen_unlogged.as_mut())),
                None => ForLog::Nothing,
            }
        };
        UnloggedChanges {
            frozen,
            active: changes(&layers.active, layers.active_unlogged.as_mut()),
        }
    }

    /// About how many bytes the log lacks; 0 without a log.
    pub fn unlogged_bytes(&self) -> u64 {
        let layers = self.layers.read();
        let both = [&layers.active_unlogged, &layers.frozen_unlogged];
        both.into_iter().flatten().map(Unlogged::data_bytes).sum()
    }
}

/// The changes to a generation that its account names.
fn changes(generation: &Generation, unlogged: Option<&mut Unlogged>) -> ForLog {
    let Some(unlogged) = unlogged.filter(|u| !u.is_empty()) else {
        return ForLog::Nothing;
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
    ForLog::Changes(zeros.chain(data).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::generation::buffered_block_bytes;
    use super::*;

    const SIZE: u64 = 40_000;

    fn overlay_on(
        below: &[u8],
        read: impl FnOnce(&mut [u8]) -> Vec<Range<u64>>,
        at: u64,
        len: usize,
    ) -> Vec<u8> {
        let mut out = vec![0; len];
        for gap in read(&mut out) {
            let to = (gap.start - at) as usize..(gap.end - at) as usize;
            out[to].copy_from_slice(&below[gap.start as usize..gap.end as usize]);
        }
        out
    }

    proptest! {
        /// Whatever is frozen and published meanwhile, the overlay over what is published is the volume.
        #[test]
        fn the_newest_write_is_on_top(
            ops in prop::collection::vec((0..7u8, 0..SIZE, 0..9_000u64, 1..=255u8), 1..80),
        ) {
            let overlay = Overlay::new(Geometry::new(SIZE, 4096));
            let mut frozen: Option<Arc<Frozen>> = None;
            let mut published = vec![0u8; SIZE as usize];
            let mut model = published.clone();
            for (op, at, len, value) in ops {
                let len = len.min(SIZE - at);
                let range = at as usize..(at + len) as usize;
                match op {
                    0 | 1 => {
                        overlay.write(at, &vec![value; len as usize]);
                        model[range].fill(value);
                    }
                    2 => {
                        overlay.zero(at, len);
                        model[range].fill(0);
                    }
                    3 if frozen.is_none() => frozen = Some(overlay.freeze()),
                    4 => {
                        if let Some(f) = frozen.take() {
                            published = overlay_on(&published, |out| f.with(|g| g.read(0, out)), 0, SIZE as usize);
                            overlay.drop_frozen();
                        }
                    }
                    _ => {
                        let seen = overlay_on(&published, |out| overlay.read(at, out), at, len as usize);
                        prop_assert!(seen == model[range]);
                    }
                }
            }
        }
    }

    proptest! {
        /// What was taken for the log, laid over the published bytes in order, is the volume as of the last taking.
        #[test]
        fn the_log_gets_every_change(
            ops in prop::collection::vec((0..8u8, 0..SIZE, 0..9_000u64, 0..=255u8), 1..60),
        ) {
            let overlay = Overlay::with_log(Geometry::new(SIZE, 4096), 1 << 30);
            let mut logged = vec![0u8; SIZE as usize];
            let mut model = logged.clone();
            for (op, at, len, value) in ops {
                let len = len.min(SIZE - at);
                let range = at as usize..(at + len) as usize;
                match op {
                    0 | 1 => {
                        overlay.write(at, &vec![value; len as usize]);
                        model[range].fill(value);
                    }
                    2 => {
                        overlay.zero(at, len);
                        model[range].fill(0);
                    }
                    3 => {
                        overlay.trim(at, len);
                        for b in Geometry::new(SIZE, 4096).whole_blocks(at, len) {
                            model[(b * 4096) as usize..((b + 1) * 4096).min(SIZE) as usize].fill(0);
                        }
                    }
                    4 if overlay.layers.read().frozen.is_none() => {
                        overlay.freeze();
                    }
                    _ => {
                        let taken = overlay.take_unlogged();
                        for part in [taken.frozen, taken.active] {
                            let ForLog::Changes(changes) = part else { continue };
                            for (at, content) in changes {
                                let to = at as usize..(at + content.len_bytes()) as usize;
                                match content {
                                    Content::Data(bytes) => logged[to].copy_from_slice(&bytes),
                                    Content::Zero { .. } => logged[to].fill(0),
                                }
                            }
                        }
                        prop_assert!(logged == model);
                    }
                }
            }
        }
    }

    #[test]
    fn too_much_is_not_taken() {
        let overlay = Overlay::with_log(GEOMETRY(), 64 << 10);
        overlay.write(0, &[1; 4096]);
        overlay.freeze();
        overlay.write(8192, &[2; 128 << 10]);
        let taken = overlay.take_unlogged();
        assert_eq!((taken.frozen, taken.active), (ForLog::Nothing, ForLog::TooLarge));
        overlay.drop_frozen();
        overlay.freeze();
        overlay.write(0, &[3; 100]);
        let taken = overlay.take_unlogged();
        assert_eq!(taken.frozen, ForLog::TooLarge);
        let ForLog::Changes(changes) = taken.active else {
            panic!("{taken:?}")
        };
        assert_eq!(changes, [(0, Content::Data(vec![3; 100].into()))]);
    }

    const GEOMETRY: fn() -> Geometry = || Geometry::new(1 << 20, 4096);

    #[test]
    fn a_frozen_write_is_seen_until_it_is_dropped_and_hidden_by_a_newer_one() {
        let overlay = Overlay::new(GEOMETRY());
        overlay.write(0, &[1; 8192]);
        let frozen = overlay.freeze();
        overlay.write(4096, &[2; 100]);
        let mut out = [0; 8192];
        assert!(overlay.read(0, &mut out).is_empty());
        assert_eq!((out[0], out[4096], out[4196]), (1, 2, 1));
        assert_eq!(overlay.total_bytes(), 3 * buffered_block_bytes(GEOMETRY()));
        overlay.drop_frozen();
        drop(frozen);
        assert_eq!(overlay.read(0, &mut out), vec![0..4096, 4196..8192]);
        assert_eq!(overlay.total_bytes(), buffered_block_bytes(GEOMETRY()));
    }

    #[test]
    fn runs_of_both_generations_merge_with_the_newer_on_top() {
        let overlay = Overlay::new(GEOMETRY());
        overlay.write(0, &[1; 4 * 4096]);
        overlay.freeze();
        overlay.trim(4096, 4096);
        overlay.write(8 * 4096, &[1]);
        assert_eq!(
            overlay.block_runs(0..256),
            vec![(0..1, true), (1..2, false), (2..4, true), (8..9, true)]
        );
    }

    #[test]
    #[should_panic(expected = "only once it is published")]
    fn freezing_over_a_frozen_generation_is_refused() {
        let overlay = Overlay::new(GEOMETRY());
        overlay.write(0, &[1]);
        overlay.freeze();
        overlay.write(0, &[2]);
        overlay.freeze();
    }
}
