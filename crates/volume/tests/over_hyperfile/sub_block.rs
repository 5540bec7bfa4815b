//! Writes into parts of blocks that were published lately: the rest of these is in the read cache.

use std::ops::Range;
use std::sync::Arc;

use hypernbd_volume::Volume;
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Beside, Engine};
use hypernbd_volume::geometry::BlockIndex;
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::options::{ReadCacheConfig, VolumeOptions};
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::store;
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;

use crate::faults::LIMIT;
use crate::fixture::{Fixture, pattern};
use crate::gets::Gets;

const BLOCK: usize = 64 << 10;
/// The cache of the engines here: a sixteenth, the room for one publish, is 16 blocks.
const CACHE_BYTES: u64 = 16 << 20;

/// The pointers to so few blocks are in the inode, so the index takes no request.
#[test]
fn a_flush_of_part_of_a_block_that_was_just_published_reads_nothing() {
    let f = Fixture::new();
    f.create(4 * BLOCK as u64, BLOCK as u32);
    let gets = Gets::default();
    let options = VolumeOptions {
        retention_interval: None,
        ..VolumeOptions::default()
    };
    let open = || f.run(Volume::open(&f.url, &gets.options(), &options)).unwrap();
    let mut model = vec![0; 4 * BLOCK];
    let mut flushed = |volume: &Volume, at: usize, seed: u64, len: usize| {
        let bytes = pattern(seed, len);
        volume.write(at as u64, &bytes, false).unwrap();
        volume.flush().unwrap();
        model[at..at + len].copy_from_slice(&bytes);
        gets.take()
    };
    let volume = open();
    assert_eq!(flushed(&volume, 2 * BLOCK, 1, BLOCK), 0, "all of a block");
    for (seed, at) in [(2, 4096), (3, 20_000), (4, 4096), (5, BLOCK - 4096)] {
        assert_eq!(flushed(&volume, 2 * BLOCK + at, seed, 4096), 0, "at {at} of it");
    }
    volume.close(LIMIT).unwrap();
    drop(volume);

    let volume = open();
    gets.take();
    let first = flushed(&volume, 2 * BLOCK + 9000, 6, 512);
    assert!(first > 0, "nothing is in the cache: the test tests nothing");
    assert_eq!(
        flushed(&volume, 2 * BLOCK + 40_000, 7, 512),
        0,
        "once it was published"
    );
    assert!(f.read(&volume, 0, model.len()) == model);
    volume.close(LIMIT).unwrap();
}

/// An engine with a cache, whose requests are counted.
struct Cached {
    f: Fixture,
    gets: Gets,
    engine: HyperEngine,
    model: Vec<u8>,
}

impl Cached {
    fn new(blocks: usize) -> Self {
        let f = Fixture::new();
        f.create((blocks * BLOCK) as u64, BLOCK as u32);
        let gets = Gets::default();
        let engine = f.run(async {
            let store = store::connect(&f.url, &gets.options()).await.unwrap();
            let config = ReadCacheConfig {
                memory_bytes: CACHE_BYTES,
                disk: None,
            };
            let cache = ReadCache::open(&config, None).await;
            let opened = HyperEngine::open(&store, IndexCache::default(), cache, false).await;
            opened.unwrap().0
        });
        Self {
            f,
            gets,
            engine,
            model: vec![0; blocks * BLOCK],
        }
    }

    /// Publishes these blocks as the model has them. `in_part` are completed with what is published.
    fn publish(&self, whole: Range<usize>, in_part: Range<usize>) {
        let mut generation = Generation::new(self.engine.geometry());
        for (blocks, len) in [(whole, BLOCK), (in_part, BLOCK / 2)] {
            for block in blocks {
                let at = block * BLOCK;
                let data = &self.model[at..at + len];
                generation.write(PreparedWrite::new(self.engine.geometry(), at as u64, data));
                generation.complete(BlockIndex(block as u64), 0, &self.model[at..at + BLOCK]);
            }
        }
        let publish = self
            .engine
            .publish(Arc::new(Frozen::new(generation)), Beside::default());
        self.f.run(publish).unwrap().unwrap();
    }

    /// Reads what these blocks lack once their first 4 KiB are written, and returns the number of requests that took.
    fn complete(&self, blocks: Range<usize>) -> usize {
        self.gets.take();
        let gaps: Vec<Range<usize>> = blocks.map(|b| b * BLOCK + 4096..(b + 1) * BLOCK).collect();
        let ranges: Vec<Range<u64>> = gaps.iter().map(|g| g.start as u64..g.end as u64).collect();
        let mut each = |number: usize, bytes: &[u8]| {
            assert!(bytes == &self.model[gaps[number].clone()], "{:?}", gaps[number]);
        };
        self.f.run(self.engine.read_near(&ranges, &mut each)).unwrap();
        self.gets.take()
    }
}

/// Four times as much is published as the cache holds, of blocks that fit into it four times. The places that they had before must
/// not be in the way of those that they have.
#[test]
fn blocks_that_are_written_to_again_and_again_stay_in_the_cache() {
    const BLOCKS: usize = 64;
    const AT_ONCE: usize = 8;
    let mut c = Cached::new(BLOCKS);
    c.model = pattern(1, BLOCKS * BLOCK);
    for start in (0..BLOCKS).step_by(AT_ONCE) {
        c.publish(start..start + AT_ONCE, 0..0);
    }
    for round in 0..15 {
        for start in (0..BLOCKS).step_by(AT_ONCE) {
            let blocks = start..start + AT_ONCE;
            assert_eq!(c.complete(blocks.clone()), 0, "round {round}, blocks {blocks:?}");
            for block in blocks.clone() {
                let new = pattern((round * BLOCKS + block) as u64 + 2, 4096);
                c.model[block * BLOCK..][..4096].copy_from_slice(&new);
            }
            c.publish(blocks, 0..0);
        }
    }
    c.f.run(c.engine.close());
}

/// The stream alone is more than the room of a publish.
#[test]
fn a_stream_beside_them_does_not_keep_small_writes_out_of_the_cache() {
    let mut c = Cached::new(128);
    c.model = pattern(1, 128 * BLOCK);
    c.publish(0..64, 100..104);
    assert_eq!(c.complete(100..104), 0, "the blocks that were written in part");
    assert!(c.complete(0..64) > 0, "the stream is kept: it was copied");
    c.f.run(c.engine.close());
}
