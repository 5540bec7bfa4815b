//! Which published blocks enter the read cache (pure).
//!
//! A write into part of a block needs the rest of that block before its flush is answered: from the cache, or with a request. Who
//! writes parts of blocks (a database, a file system's journal) does so in the same blocks again. So small publishes enter the cache
//! whole, and of a large one the blocks that were written in part. A stream writes whole blocks and does not come back soon: it
//! would cost a copy, and push out what is read.

use std::ops::Range;

use crate::write_buffer::generation::Generation;

/// The blocks of a published generation that are kept, in ascending runs, for a cache that gives a publish `room_bytes`.
pub(super) fn kept(generation: &Generation, room_bytes: u64, block_size: u64) -> Vec<Range<u64>> {
    if room_bytes < block_size {
        return Vec::new();
    }
    if generation.buffered_bytes() <= room_bytes {
        return generation.data_runs();
    }
    first(generation.completed_runs(), room_bytes / block_size)
}

/// The first blocks of `runs`, as many as this.
fn first(runs: Vec<Range<u64>>, mut blocks: u64) -> Vec<Range<u64>> {
    let cut = runs.into_iter().map_while(|run| {
        let len = blocks.min(run.end - run.start);
        blocks -= len;
        (len > 0).then(|| run.start..run.start + len)
    });
    cut.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::geometry::{BlockIndex, Geometry};
    use crate::write_buffer::generation::PreparedWrite;

    const BLOCK: u64 = 65536;

    fn geometry() -> Geometry {
        Geometry::new(1024 * BLOCK, BLOCK as u32)
    }

    fn generation() -> Generation {
        Generation::new(geometry())
    }

    fn write(generation: &mut Generation, at: u64, len: u64) {
        let data = vec![7; len as usize];
        drop(generation.write(PreparedWrite::new(geometry(), at, &data)));
    }

    /// Writes a part of a block, which is completed then.
    fn write_part(generation: &mut Generation, block: u64) {
        write(generation, block * BLOCK + 4096, 4096);
        generation.complete(BlockIndex(block), 0, &vec![1; BLOCK as usize]);
    }

    #[test]
    fn a_small_publish_is_kept_whole() {
        let mut small = generation();
        write(&mut small, 3 * BLOCK, 2 * BLOCK);
        write_part(&mut small, 9);
        assert_eq!(kept(&small, 4 * BLOCK, BLOCK), [3..5, 9..10]);
    }

    #[test]
    fn of_a_large_publish_the_blocks_are_kept_that_were_written_in_part() {
        let mut large = generation();
        write(&mut large, 100 * BLOCK, 64 * BLOCK);
        assert_eq!(kept(&large, 4 * BLOCK, BLOCK), [], "a stream");
        for block in [7, 8, 90, 300] {
            write_part(&mut large, block);
        }
        assert_eq!(kept(&large, 4 * BLOCK, BLOCK), [7..9, 90..91, 300..301]);
        assert_eq!(kept(&large, 3 * BLOCK, BLOCK), [7..9, 90..91], "as there is room");
        let one = kept(&large, BLOCK, BLOCK);
        assert_eq!(one.as_slice(), std::slice::from_ref(&(7..8)), "of a run");
        // It is written whole after that, and a block of the stream in part: neither needs what is published.
        write(&mut large, 90 * BLOCK, BLOCK);
        write(&mut large, 101 * BLOCK + 512, 512);
        assert_eq!(kept(&large, 4 * BLOCK, BLOCK), [7..9, 300..301]);
    }

    #[test]
    fn a_cache_without_room_for_a_block_keeps_none() {
        let mut small = generation();
        write_part(&mut small, 0);
        for room in [0, 1, BLOCK - 1] {
            assert_eq!(kept(&small, room, BLOCK), [], "{room}");
        }
    }
}
