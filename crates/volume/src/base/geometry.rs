//! The geometry of a volume: its size, its block size, and how byte ranges fall into blocks (pure).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The largest size of a volume. NBD sizes are signed 64-bit numbers; a block device of the Linux kernel ends a sector below that.
pub const SIZE_MAX_BYTES: u64 = i64::MAX as u64 - 511;

/// Index of a data block: byte offset divided by the block size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u64);

/// Size and block size of a volume, in bytes. The last block may reach past the volume's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    size_bytes: u64,
    block_size_bytes: u32,
}

/// The part of a byte range that falls into one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The block.
    pub block: BlockIndex,
    /// Absolute offset of the piece in the volume, in bytes.
    pub offset_bytes: u64,
    /// Offset of the piece inside its block, in bytes.
    pub in_block: u32,
    /// Length of the piece, in bytes.
    pub len: u32,
    /// Whether the piece covers every byte of the block that lies inside the volume.
    pub is_whole: bool,
}

impl Geometry {
    /// `block_size_bytes` must be a power of two of at most 1 GiB (the format's own bounds: 4 KiB to 1 GiB).
    pub fn new(size_bytes: u64, block_size_bytes: u32) -> Self {
        debug_assert!(block_size_bytes.is_power_of_two() && block_size_bytes <= 1 << 30);
        Self {
            size_bytes,
            block_size_bytes,
        }
    }

    /// Size of the volume in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Size of a block in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size_bytes
    }

    /// Number of blocks, the last one perhaps partly past the end.
    pub fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.block_size_bytes))
    }

    /// Bytes of `block` that lie inside the volume.
    pub fn block_len(&self, block: BlockIndex) -> u32 {
        let start = block.0 * u64::from(self.block_size_bytes);
        self.size_bytes
            .saturating_sub(start)
            .min(u64::from(self.block_size_bytes)) as u32
    }

    /// A zero-filled buffer of one block.
    pub fn new_block(&self) -> Box<[u8]> {
        vec![0u8; self.block_size_bytes as usize].into_boxed_slice()
    }

    /// Whether `[offset_bytes, offset_bytes + len_bytes)` lies inside the volume.
    pub fn contains(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        offset_bytes
            .checked_add(len_bytes)
            .is_some_and(|end| end <= self.size_bytes)
    }

    /// The blocks a byte range touches.
    pub fn touched_blocks(&self, offset_bytes: u64, len_bytes: u64) -> Range<u64> {
        let bs = u64::from(self.block_size_bytes);
        if len_bytes == 0 {
            return offset_bytes / bs..offset_bytes / bs;
        }
        offset_bytes / bs..(offset_bytes + len_bytes).div_ceil(bs)
    }

    /// The blocks a byte range covers whole; the volume's last block counts as whole when covered to the end.
    pub fn whole_blocks(&self, offset_bytes: u64, len_bytes: u64) -> Range<u64> {
        let bs = u64::from(self.block_size_bytes);
        let first = offset_bytes.div_ceil(bs);
        let end = offset_bytes + len_bytes;
        let last = if end >= self.size_bytes {
            self.blocks()
        } else {
            end / bs
        };
        first..last.max(first)
    }

    /// Whether a volume that is open grows by becoming this large. It has that size already when it does not.
    ///
    /// # Errors
    /// Why it cannot have that size.
    pub fn grows_to(&self, size_bytes: u64) -> Result<bool, String> {
        let (now, block) = (self.size_bytes, u64::from(self.block_size_bytes));
        match size_bytes {
            _ if size_bytes == now => Ok(false),
            _ if size_bytes < now => Err(format!(
                "the volume has {now} bytes, and one that is served does not shrink to {size_bytes}: stop its server, then hypernbd resize"
            )),
            _ if size_bytes > SIZE_MAX_BYTES => Err(format!(
                "a size of {size_bytes} bytes is beyond what NBD can address: give at most {SIZE_MAX_BYTES}"
            )),
            // Its last block is stored short.
            _ if !now.is_multiple_of(block) => Err(format!(
                "the volume has {now} bytes, which is no multiple of its blocks of {block}: stop its server, then hypernbd resize"
            )),
            _ => Ok(true),
        }
    }

    /// The range cut at block borders, ascending.
    pub fn pieces(&self, offset_bytes: u64, len_bytes: u64) -> impl Iterator<Item = Piece> + use<> {
        let (this, bs) = (*self, u64::from(self.block_size_bytes));
        let end = offset_bytes + len_bytes;
        let mut at = offset_bytes;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let block = BlockIndex(at / bs);
            let in_block = (at % bs) as u32;
            let len = (bs - u64::from(in_block)).min(end - at) as u32;
            let is_whole = in_block == 0 && len >= this.block_len(block);
            let piece = Piece {
                block,
                offset_bytes: at,
                in_block,
                len,
                is_whole,
            };
            at += u64::from(len);
            Some(piece)
        })
    }

    /// The at most two pieces of a range that cover their block in part. Costs nothing by length.
    pub fn partial_ends(&self, offset_bytes: u64, len_bytes: u64) -> impl Iterator<Item = Piece> + use<> {
        let bs = u64::from(self.block_size_bytes);
        let end = offset_bytes + len_bytes;
        let head = self
            .pieces(offset_bytes, len_bytes.min(bs - offset_bytes % bs))
            .next();
        let tail_start = (end.saturating_sub(1) / bs * bs).max(offset_bytes);
        let tail = self.pieces(tail_start, end - tail_start).next();
        let tail = tail.filter(|t| head.is_some_and(|h| h.block != t.block));
        head.into_iter().chain(tail).filter(|p| !p.is_whole)
    }
}

/// The geometry of a volume that may grow while it is served. Whoever uses it reads it once for each request.
#[derive(Debug, Clone)]
pub struct LiveGeometry {
    size_bytes: Arc<AtomicU64>,
    block_size_bytes: u32,
}

impl From<Geometry> for LiveGeometry {
    fn from(geometry: Geometry) -> Self {
        Self {
            size_bytes: Arc::new(AtomicU64::new(geometry.size_bytes)),
            block_size_bytes: geometry.block_size_bytes,
        }
    }
}

impl LiveGeometry {
    /// What it is now.
    pub fn now(&self) -> Geometry {
        Geometry::new(self.size_bytes.load(Ordering::Acquire), self.block_size_bytes)
    }

    /// Grows it. A smaller size changes nothing.
    pub fn grow_to(&self, size_bytes: u64) {
        self.size_bytes.fetch_max(size_bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_grows_for_all_who_know_it_and_never_shrinks() {
        let one = LiveGeometry::from(Geometry::new(8192, 4096));
        let other = one.clone();
        one.grow_to(12_288);
        one.grow_to(4096);
        assert_eq!(other.now(), Geometry::new(12_288, 4096));
    }

    #[test]
    fn partial_ends_are_the_partial_pieces() {
        let g = Geometry::new(10_000, 4096);
        for offset in (0..10_000).step_by(611) {
            for len in (0..10_000 - offset).step_by(397) {
                let slow: Vec<_> = g.pieces(offset, len).filter(|p| !p.is_whole).collect();
                let fast: Vec<_> = g.partial_ends(offset, len).collect();
                assert_eq!(slow, fast, "offset {offset} len {len}");
                let whole: Vec<_> = g
                    .pieces(offset, len)
                    .filter(|p| p.is_whole)
                    .map(|p| p.block.0)
                    .collect();
                assert_eq!(
                    whole,
                    g.whole_blocks(offset, len).collect::<Vec<_>>(),
                    "offset {offset} len {len}"
                );
            }
        }
    }

    #[test]
    fn the_last_block_is_short() {
        let g = Geometry::new(4096 + 1000, 4096);
        assert_eq!(g.blocks(), 2);
        assert_eq!(g.block_len(BlockIndex(1)), 1000);
        assert_eq!(g.whole_blocks(0, 5096), 0..2);
        assert_eq!(g.whole_blocks(0, 5095), 0..1);
        assert!(g.contains(0, 5096) && !g.contains(1, 5096) && !g.contains(u64::MAX, 2));
    }
}
