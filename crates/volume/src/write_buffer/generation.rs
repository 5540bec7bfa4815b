//! One generation of unpublished writes, as whole-block buffers (pure: no clock, no I/O).
//!
//! A generation holds, for each block it touches, one of
//!
//! | state | held as | reads inside the block |
//! |---|---|---|
//! | untouched | nothing | not answered here: the caller asks the next older layer |
//! | partly written | a buffer and the byte ranges written | the written ranges |
//! | wholly written | a buffer | all of it |
//! | zeroed | membership of a range set | zeros |
//!
//! A block is never both buffered and zeroed, and a block that is known to be all zeros is zeroed. Each buffered block
//! counts as a whole block from its first byte on, so completing a partly written block before its publish needs no
//! memory that was not counted. Runs of zeroed blocks and the written ranges of a block are counted too, because a
//! client can make any number of them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use rangemap::RangeSet;

use crate::base::geometry::{BlockIndex, Geometry};

/// Memory per buffered block besides its bytes: its entry in the map, and the allocator's overhead.
const BLOCK_OVERHEAD_BYTES: u64 = 96;

/// Memory in bytes that is counted for a run of zeroed blocks, or for one more written range of a partly written block:
/// its entry in the set, and in the lists that a publish makes of the set.
pub const RANGE_BYTES: u64 = 128;

/// Memory counted for one buffered block, in bytes.
pub fn buffered_block_bytes(geometry: Geometry) -> u64 {
    u64::from(geometry.block_size()) + BLOCK_OVERHEAD_BYTES
}

/// Which bytes of a buffered block were written.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Coverage {
    /// Every byte of the block that lies inside the volume.
    Full,
    /// The same, some of them from what was published before.
    Completed,
    /// These ranges, in bytes from the block's start.
    Partial(RangeSet<u32>),
}

/// How much of a buffered block was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    InPart,
    Whole,
    /// The whole block was written, and it is all zeros.
    Zeros,
}

/// A buffered block: always `block_size` bytes, zero where nothing was written.
#[derive(Debug, Clone)]
struct BufferedBlock {
    bytes: Box<[u8]>,
    coverage: Coverage,
}

/// A write whose whole blocks are copied before any lock is taken.
///
/// Under the lock of a generation only finished buffers are inserted and the two partial ends copied. So a write of 32
/// MiB does not make readers wait for its copy.
#[derive(Debug)]
pub struct PreparedWrite<'a> {
    offset_bytes: u64,
    data: &'a [u8],
    /// `None` for a block of zeros.
    whole: Vec<(u64, Option<Box<[u8]>>)>,
}

impl<'a> PreparedWrite<'a> {
    /// Copies the whole blocks of `data`, which is to be written at `offset_bytes`.
    pub fn new(geometry: Geometry, offset_bytes: u64, data: &'a [u8]) -> Self {
        let whole = geometry
            .pieces(offset_bytes, data.len() as u64)
            .filter(|p| p.is_whole)
            .map(|p| {
                let at = (p.offset_bytes - offset_bytes) as usize;
                let bytes = &data[at..at + p.len as usize];
                // The bytes are in the processor's caches now, so a search for zeros costs next to nothing.
                let buffer = (!is_zero(bytes)).then(|| {
                    // The last block of a volume may be shorter than a block; its buffer has the full length.
                    if bytes.len() == geometry.block_size() as usize {
                        return Box::from(bytes);
                    }
                    let mut b = geometry.new_block();
                    b[..bytes.len()].copy_from_slice(bytes);
                    b
                });
                (p.block.0, buffer)
            })
            .collect();
        Self {
            offset_bytes,
            data,
            whole,
        }
    }

    /// The written range, in bytes from the volume's start.
    pub fn range(&self) -> Range<u64> {
        self.offset_bytes..self.offset_bytes + self.data.len() as u64
    }
}

/// Buffers that a change replaced. The caller drops them once no lock is held.
#[derive(Debug, Default)]
pub struct Replaced(#[allow(dead_code)] Vec<Box<[u8]>>);

/// Unpublished writes, one checkpoint's worth.
#[derive(Debug, Clone)]
pub struct Generation {
    geometry: Geometry,
    blocks: BTreeMap<u64, BufferedBlock>,
    zeroed: RangeSet<u64>,
    /// Every partly written block, and perhaps some that are complete by now. With it nobody has to search all blocks.
    partial: BTreeSet<u64>,
    /// The number of written ranges of all partly written blocks.
    written_ranges: u64,
    /// Bytes of data that were written, including those that were overwritten since.
    taken_bytes: u64,
}

impl Generation {
    /// An empty generation of a volume of this geometry.
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            blocks: BTreeMap::new(),
            zeroed: RangeSet::new(),
            partial: BTreeSet::new(),
            written_ranges: 0,
            taken_bytes: 0,
        }
    }

    /// The volume has grown, from an end at a block's border: no block that it holds has another length.
    pub fn grow(&mut self, geometry: Geometry) {
        debug_assert!(
            self.geometry
                .size_bytes()
                .is_multiple_of(geometry.block_size().into())
        );
        self.geometry = geometry;
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.zeroed.is_empty()
    }

    /// Whether the blocks were written whole and about once each. Waiting for more writes to the same blocks would then
    /// save nothing.
    pub fn is_streaming(&self) -> bool {
        let block_bytes = self.blocks.len() as u64 * u64::from(self.geometry.block_size());
        self.taken_bytes.abs_diff(block_bytes) <= block_bytes / 16
    }

    /// Memory counted for this generation, in bytes: its whole blocks, and the bookkeeping for them.
    pub fn buffered_bytes(&self) -> u64 {
        let ranges = self.zeroed.len() as u64 + self.written_ranges;
        self.blocks.len() as u64 * buffered_block_bytes(self.geometry) + ranges * RANGE_BYTES
    }

    /// Adds a write. A later write of the same bytes wins.
    pub fn write(&mut self, prepared: PreparedWrite<'_>) -> Replaced {
        let PreparedWrite {
            offset_bytes,
            data,
            whole,
        } = prepared;
        self.taken_bytes += data.len() as u64;
        for p in self
            .geometry
            .pieces(offset_bytes, data.len() as u64)
            .filter(|p| !p.is_whole)
        {
            let at = (p.offset_bytes - offset_bytes) as usize;
            self.write_partial(p.block, p.in_block, &data[at..at + p.len as usize]);
        }
        let mut replaced = Vec::new();
        if let (Some(first), Some(last)) = (whole.first(), whole.last())
            && !self.zeroed.is_empty()
        {
            self.zeroed.remove(first.0..last.0 + 1);
        }
        for (index, bytes) in whole {
            let old = match bytes {
                Some(bytes) => self.blocks.insert(
                    index,
                    BufferedBlock {
                        bytes,
                        coverage: Coverage::Full,
                    },
                ),
                None => {
                    self.zeroed.insert(index..index + 1);
                    self.blocks.remove(&index)
                }
            };
            if let Some(old) = old {
                self.written_ranges -= old.written_ranges();
                replaced.push(old.bytes);
            }
        }
        Replaced(replaced)
    }

    /// Zeroes every byte of the range (NBD write-zeroes).
    pub fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> Replaced {
        for p in self.geometry.partial_ends(offset_bytes, len_bytes) {
            if !self.zeroed.contains(&p.block.0) {
                self.write_partial(p.block, p.in_block, &vec![0u8; p.len as usize]);
            }
        }
        self.zero_whole_blocks(self.geometry.whole_blocks(offset_bytes, len_bytes))
    }

    /// Zeroes the whole blocks of the range (NBD trim). Blocks that the range covers in part stay as they are.
    pub fn trim(&mut self, offset_bytes: u64, len_bytes: u64) -> Replaced {
        self.zero_whole_blocks(self.geometry.whole_blocks(offset_bytes, len_bytes))
    }

    fn zero_whole_blocks(&mut self, blocks: Range<u64>) -> Replaced {
        if blocks.is_empty() {
            return Replaced::default();
        }
        // Searches the buffered blocks and not the range, which may name 10^9 blocks of which a handful are buffered.
        let mut dropped = Vec::new();
        for (_, block) in self.blocks.extract_if(blocks.clone(), |_, _| true) {
            self.written_ranges -= block.written_ranges();
            dropped.push(block.bytes);
        }
        self.zeroed.insert(blocks);
        Replaced(dropped)
    }

    fn write_partial(&mut self, block: BlockIndex, in_block: u32, bytes: &[u8]) {
        let geometry = self.geometry;
        let range = in_block..in_block + bytes.len() as u32;
        let zeroed = &mut self.zeroed;
        let entry = self.blocks.entry(block.0).or_insert_with(|| {
            let coverage = if zeroed.contains(&block.0) {
                zeroed.remove(block.0..block.0 + 1);
                Coverage::Full
            } else {
                Coverage::Partial(RangeSet::new())
            };
            BufferedBlock {
                bytes: geometry.new_block(),
                coverage,
            }
        });
        entry.bytes[range.start as usize..range.end as usize].copy_from_slice(bytes);
        let before = entry.written_ranges();
        let held = entry.cover(range, geometry.block_len(block));
        self.written_ranges = self.written_ranges + entry.written_ranges() - before;
        self.note(block, held);
    }

    /// Updates the bookkeeping after bytes were written to a buffered block.
    fn note(&mut self, block: BlockIndex, held: Extent) {
        match held {
            Extent::InPart => self.partial.insert(block.0),
            Extent::Whole | Extent::Zeros => self.partial.remove(&block.0),
        };
        if held == Extent::Zeros {
            self.blocks.remove(&block.0);
            self.zeroed.insert(block.0..block.0 + 1);
        }
    }

    /// Copies what this generation holds of `[offset_bytes, offset_bytes + out.len())` into `out`. Returns the byte
    /// ranges that it does not hold (absolute offsets, ascending, joined).
    pub fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Vec<Range<u64>> {
        let mut missing: Vec<Range<u64>> = Vec::new();
        let end = offset_bytes + out.len() as u64;
        if self.is_empty() {
            push_joined(&mut missing, offset_bytes..end);
            return missing;
        }
        for p in self.geometry.pieces(offset_bytes, out.len() as u64) {
            let at = (p.offset_bytes - offset_bytes) as usize;
            let dst = &mut out[at..at + p.len as usize];
            let want = p.in_block..p.in_block + p.len;
            match self.blocks.get(&p.block.0) {
                Some(block) => block.read(want, dst, |gap| {
                    let base = p.block.0 * u64::from(self.geometry.block_size());
                    push_joined(
                        &mut missing,
                        base + u64::from(gap.start)..base + u64::from(gap.end),
                    );
                }),
                None if self.zeroed.contains(&p.block.0) => dst.fill(0),
                None => push_joined(&mut missing, p.offset_bytes..p.offset_bytes + u64::from(p.len)),
            }
        }
        missing
    }

    /// What this generation knows of `blocks`: ascending runs of zeroed blocks (`false`) and of blocks with data
    /// (`true`). Blocks of which it knows nothing are in no run. A partly written block counts as data, unless only
    /// zeros were written to it: then the next older layer says what it is.
    pub fn block_runs(&self, blocks: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let mut runs: Vec<(Range<u64>, bool)> = Vec::new();
        let mut zeros = self
            .zeroed
            .overlapping(&blocks)
            .map(|z| z.start.max(blocks.start)..z.end.min(blocks.end))
            .peekable();
        let push = |run: Range<u64>, is_data: bool, runs: &mut Vec<(Range<u64>, bool)>| match runs.last_mut()
        {
            Some((last, d)) if *d == is_data && last.end == run.start => last.end = run.end,
            _ => runs.push((run, is_data)),
        };
        for (&index, block) in self.blocks.range(blocks.clone()) {
            if matches!(block.coverage, Coverage::Partial(_)) && is_zero(&block.bytes) {
                continue;
            }
            while let Some(z) = zeros.next_if(|z| z.start < index) {
                push(z, false, &mut runs);
            }
            push(index..index + 1, true, &mut runs);
        }
        for z in zeros {
            push(z, false, &mut runs);
        }
        runs
    }

    /// Whether anything in the block was written or zeroed in this generation.
    pub fn holds(&self, block: BlockIndex) -> bool {
        self.blocks.contains_key(&block.0) || self.zeroed.contains(&block.0)
    }

    /// The partly written blocks, each with the smallest range that holds all its unwritten bytes (in bytes from the
    /// block's start).
    pub fn partial_blocks(&self) -> Vec<(BlockIndex, Range<u32>)> {
        self.partial
            .iter()
            .filter_map(|&index| match &self.blocks.get(&index)?.coverage {
                Coverage::Full | Coverage::Completed => None,
                Coverage::Partial(written) => {
                    let all = 0..self.geometry.block_len(BlockIndex(index));
                    let first = written.gaps(&all).next()?.start;
                    let last = written.gaps(&all).last()?.end;
                    Some((BlockIndex(index), first..last))
                }
            })
            .collect()
    }

    /// Completes a partly written block with published bytes, which start at `in_block`. Bytes that were written in
    /// this generation stay as they are. A block that turns out to be all zeros becomes a zeroed one; it is then not
    /// published at all where the container does not map it.
    pub fn complete(&mut self, block: BlockIndex, in_block: u32, bytes: &[u8]) {
        let len = self.geometry.block_len(block);
        // A block that is complete by now stays as it is: the generation may be frozen, and a publish may have read its
        // runs.
        let is_partial = |b: &&mut BufferedBlock| matches!(b.coverage, Coverage::Partial(_));
        let Some(entry) = self.blocks.get_mut(&block.0).filter(is_partial) else {
            return;
        };
        let range = in_block..in_block + bytes.len() as u32;
        if let Coverage::Partial(written) = &entry.coverage {
            let gaps: Vec<_> = written.gaps(&range).collect();
            for gap in gaps {
                let from = (gap.start - in_block) as usize..(gap.end - in_block) as usize;
                entry.bytes[gap.start as usize..gap.end as usize].copy_from_slice(&bytes[from]);
            }
        }
        let before = entry.written_ranges();
        let held = entry.cover(range, len);
        if held != Extent::InPart {
            entry.coverage = Coverage::Completed;
        }
        self.written_ranges = self.written_ranges + entry.written_ranges() - before;
        self.note(block, held);
    }

    /// Runs of consecutive buffered blocks, ascending. Every block must be complete before it is published.
    pub fn data_runs(&self) -> Vec<Range<u64>> {
        runs_of(self.blocks.keys().copied())
    }

    /// As [`Self::data_runs`], of the blocks alone that were written in part, and completed with published bytes.
    pub fn completed_runs(&self) -> Vec<Range<u64>> {
        let completed = self
            .blocks
            .iter()
            .filter(|(_, b)| b.coverage == Coverage::Completed);
        runs_of(completed.map(|(&index, _)| index))
    }

    /// The zeroed block ranges, ascending.
    pub fn zero_runs(&self) -> Vec<Range<u64>> {
        self.zeroed.iter().cloned().collect()
    }

    /// Copies `out.len()` bytes at `offset_bytes` out of completely written blocks, for a publish.
    ///
    /// Returns `false` when any of the bytes is in a block that is not complete. The publish must then fail, because it
    /// would store bytes that were never written.
    #[must_use]
    pub fn copy_complete(&self, offset_bytes: u64, out: &mut [u8]) -> bool {
        let block_size = u64::from(self.geometry.block_size());
        // The blocks are visited in order, so that a piece of an upload costs one search and not one for each block.
        let mut blocks = self.blocks.range(offset_bytes / block_size..);
        for p in self.geometry.pieces(offset_bytes, out.len() as u64) {
            let at = (p.offset_bytes - offset_bytes) as usize;
            let from = p.in_block as usize..(p.in_block + p.len) as usize;
            match blocks.next() {
                Some((
                    &index,
                    BufferedBlock {
                        bytes,
                        coverage: Coverage::Full | Coverage::Completed,
                    },
                )) if index == p.block.0 => {
                    out[at..at + p.len as usize].copy_from_slice(&bytes[from]);
                }
                _ => return false,
            }
        }
        true
    }
}

impl BufferedBlock {
    /// The number of written ranges that are recorded; none for a complete block.
    fn written_ranges(&self) -> u64 {
        match &self.coverage {
            Coverage::Full | Coverage::Completed => 0,
            Coverage::Partial(written) => written.len() as u64,
        }
    }

    /// Records that these bytes were written, and returns how much of the block was written by now.
    fn cover(&mut self, range: Range<u32>, block_len: u32) -> Extent {
        let came_in = range.start as usize..range.end as usize;
        if let Coverage::Partial(written) = &mut self.coverage {
            written.insert(range);
            if written.gaps(&(0..block_len)).next().is_some() {
                return Extent::InPart;
            }
            self.coverage = Coverage::Full;
        }
        // For most blocks the written bytes alone decide.
        if is_zero(&self.bytes[came_in]) && is_zero(&self.bytes) {
            Extent::Zeros
        } else {
            Extent::Whole
        }
    }

    fn read(&self, want: Range<u32>, dst: &mut [u8], mut missing: impl FnMut(Range<u32>)) {
        dst.copy_from_slice(&self.bytes[want.start as usize..want.end as usize]);
        if let Coverage::Partial(written) = &self.coverage {
            for gap in written.gaps(&want) {
                missing(gap);
            }
        }
    }
}

/// Compares the bytes with themselves shifted by one. That runs at memory speed, and ends at the first byte that is not
/// zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes.first().is_none_or(|b| *b == 0) && bytes[1..] == bytes[..bytes.len() - 1]
}

/// Ascending blocks as runs.
fn runs_of(blocks: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for index in blocks {
        match runs.last_mut() {
            Some(last) if last.end == index => last.end += 1,
            _ => runs.push(index..index + 1),
        }
    }
    runs
}

fn push_joined(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    if range.is_empty() {
        return;
    }
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
#[path = "generation_tests.rs"]
mod tests;
