//! The unpublished part of a volume: the active generation, and the frozen one while it is being published.
//!
//! *Invariant W1* lives here: bytes leave the overlay only through [`Overlay::drop_frozen`], which is called only
//! once a checkpoint that holds them is published.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::generation::{Generation, PreparedWrite, Replaced};
use crate::geometry::{BlockIndex, Geometry};

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
}

impl Overlay {
    /// An empty overlay.
    pub fn new(geometry: Geometry) -> Self {
        let layers = Layers {
            active: Generation::new(geometry),
            frozen: None,
        };
        Self {
            geometry,
            layers: RwLock::new(layers),
            frozen_bytes: Mutex::new(0),
        }
    }

    /// Takes a write in; it is visible to every reader when this returns.
    pub fn write(&self, offset_bytes: u64, data: &[u8]) -> Buffered {
        let prepared = PreparedWrite::new(self.geometry, offset_bytes, data);
        self.change(|active| active.write(prepared))
    }

    /// Zeroes every byte of the range.
    pub fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Buffered {
        self.change(|active| active.zero(offset_bytes, len_bytes))
    }

    /// Drops the whole blocks of the range.
    pub fn trim(&self, offset_bytes: u64, len_bytes: u64) -> Buffered {
        self.change(|active| active.trim(offset_bytes, len_bytes))
    }

    fn change(&self, apply: impl FnOnce(&mut Generation) -> Replaced) -> Buffered {
        let mut layers = self.layers.write();
        let was_empty = layers.active.is_empty();
        let before = layers.active.buffered_bytes();
        let replaced = apply(&mut layers.active);
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
        let frozen = Arc::new(Frozen::new(active));
        layers.frozen = Some(frozen.clone());
        frozen
    }

    /// Drops the frozen generation: its publish succeeded. The memory goes with the value returned.
    pub fn drop_frozen(&self) -> Option<Arc<Frozen>> {
        let mut layers = self.layers.write();
        *self.frozen_bytes.lock() = 0;
        layers.frozen.take()
    }
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
