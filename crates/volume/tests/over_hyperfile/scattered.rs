//! Volumes whose blocks lie far apart: what is zeroed, trimmed or cut off is found leaf by leaf of the index.

use std::collections::BTreeSet;

use hypernbd_volume::options::LeaseOptions;
use hypernbd_volume::{ExtentKind, Volume, admin};

use crate::faults::LIMIT;
use crate::fixture::{Fixture, pattern};

const BLOCK: u64 = 4096;
/// A tebibyte and a short last block.
const SIZE: u64 = (1 << 40) + 512;
/// Far more than one leaf of the index holds, so that leaves are split at every place.
const BLOCKS: usize = 3000;

fn bytes_of(block: u64) -> Vec<u8> {
    let len = BLOCK.min(SIZE - block * BLOCK) as usize;
    pattern(block + 1, len)
}

/// Writes scattered blocks, some of them in runs, the first and the last of the volume among them.
fn write_scattered(volume: &Volume, random: &mut fastrand::Rng) -> BTreeSet<u64> {
    let mut written = BTreeSet::from([0, SIZE / BLOCK]);
    while written.len() < BLOCKS {
        let start = random.u64(..SIZE / BLOCK);
        let run = if random.u8(..8) == 0 { 40 } else { 1 };
        written.extend(start..(start + run).min(SIZE / BLOCK));
    }
    for &block in &written {
        volume.write(block * BLOCK, &bytes_of(block), false).unwrap();
    }
    volume.flush().unwrap();
    written
}

fn mapped(volume: &Volume) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let mut at = 0;
    while at < volume.size_bytes() {
        for extent in volume.extents(at, volume.size_bytes() - at, false).unwrap() {
            if extent.kind == ExtentKind::Data {
                found.extend(
                    extent.offset_bytes / BLOCK..(extent.offset_bytes + extent.len_bytes).div_ceil(BLOCK),
                );
            }
            at = extent.offset_bytes + extent.len_bytes;
        }
    }
    found
}

fn check(fixture: &Fixture, volume: &Volume, left: &BTreeSet<u64>, gone: &BTreeSet<u64>) {
    // The short last block is zeroed by a block of zeros, which the engine stores.
    let is_whole = |block: &&u64| **block < SIZE / BLOCK;
    assert!(
        mapped(volume)
            .iter()
            .filter(is_whole)
            .eq(left.iter().filter(is_whole))
    );
    for &block in left {
        let expected = bytes_of(block);
        assert!(
            fixture.read(volume, block * BLOCK, expected.len()) == expected,
            "block {block}"
        );
    }
    for &block in gone {
        let len = bytes_of(block).len();
        assert!(
            fixture.read(volume, block * BLOCK, len).iter().all(|&b| b == 0),
            "block {block}"
        );
    }
}

/// Trims and write-zeroes of random ranges, some of them ending inside of a run, then of the whole volume.
#[test]
fn exactly_what_was_asked_for_is_gone() {
    let mut random = fastrand::Rng::with_seed(15);
    let fixture = Fixture::new();
    fixture.create(SIZE, BLOCK as u32);
    let volume = fixture.open();
    let mut left = write_scattered(&volume, &mut random);
    let mut gone = BTreeSet::new();
    volume.close(LIMIT).unwrap();
    drop(volume);

    // With nothing of the index in memory.
    let volume = fixture.open();
    let edges: Vec<u64> = left.iter().copied().collect();
    for turn in 0..30 {
        let start = edges[random.usize(..edges.len())] + random.u64(..2);
        let end = (start + random.u64(1..SIZE / BLOCK / 50)).min(SIZE / BLOCK);
        if start >= end {
            continue;
        }
        let (offset, len) = (start * BLOCK, (end - start) * BLOCK);
        if turn % 2 == 0 {
            volume.trim(offset, len, false).unwrap();
        } else {
            volume.zero(offset, len, false).unwrap();
        }
        let hit: Vec<u64> = left.range(start..end).copied().collect();
        for block in hit {
            left.remove(&block);
            gone.insert(block);
        }
        if turn % 5 == 0 {
            volume.flush().unwrap();
        }
    }
    volume.flush().unwrap();
    assert!(!gone.is_empty() && !left.is_empty());
    volume.close(LIMIT).unwrap();
    drop(volume);
    let volume = fixture.open();
    check(&fixture, &volume, &left, &gone);

    volume.trim(0, SIZE, false).unwrap();
    volume.flush().unwrap();
    volume.close(LIMIT).unwrap();
    drop(volume);
    gone.append(&mut left);
    let volume = fixture.open();
    check(&fixture, &volume, &left, &gone);
}

/// What is cut off by a smaller size does not come back with a larger one.
#[test]
fn what_is_cut_off_is_gone() {
    let mut random = fastrand::Rng::with_seed(16);
    let fixture = Fixture::new();
    fixture.create(SIZE, BLOCK as u32);
    let volume = fixture.open();
    let mut left = write_scattered(&volume, &mut random);
    volume.close(LIMIT).unwrap();
    drop(volume);

    // Inside of the volume's blocks, so that a part of one is cut.
    let kept = left.iter().copied().nth(BLOCKS / 3).unwrap();
    let shorter = kept * BLOCK + 512;
    for size in [shorter, SIZE] {
        fixture
            .run(admin::resize(
                &fixture.url,
                &fixture.store_options,
                size,
                size < SIZE,
                &LeaseOptions::default(),
            ))
            .unwrap();
    }
    let gone = left.split_off(&kept);
    let volume = fixture.open();
    let part = &bytes_of(kept)[..512];
    assert_eq!(fixture.read(&volume, kept * BLOCK, 512), part);
    assert!(
        fixture
            .read(&volume, kept * BLOCK + 512, 3584)
            .iter()
            .all(|&b| b == 0)
    );
    left.insert(kept);
    assert_eq!(mapped(&volume), left);
    for &block in gone.iter().filter(|block| **block != kept) {
        let len = bytes_of(block).len();
        assert!(
            fixture.read(&volume, block * BLOCK, len).iter().all(|&b| b == 0),
            "block {block}"
        );
    }
}
