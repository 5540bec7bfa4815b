use proptest::prelude::*;

use super::super::generation::{RANGE_BYTES, buffered_block_bytes};
use super::*;

const SIZE: u64 = 40_000;

fn overlay_on(below: &[u8], read: impl FnOnce(&mut [u8]) -> Vec<Range<u64>>, at: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    for gap in read(&mut out) {
        let to = (gap.start - at) as usize..(gap.end - at) as usize;
        out[to].copy_from_slice(&below[gap.start as usize..gap.end as usize]);
    }
    out
}

proptest! {
    /// Whatever is frozen and published meanwhile, reading the overlay on top of the published state gives the volume.
    #[test]
    fn the_newest_write_is_on_top(
        ops in prop::collection::vec((0..9u8, 0..SIZE, 0..9_000u64, 1..=255u8), 1..80),
    ) {
        let overlay = Overlay::new(Geometry::new(SIZE, 4096));
        // Published bytes that were read to complete a block and not yet applied: generation, block, offset in it,
        // bytes.
        let mut on_their_way: Vec<(u64, BlockIndex, u32, Vec<u8>)> = Vec::new();
        let mut frozen: VecDeque<Arc<Frozen>> = VecDeque::new();
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
                3 if frozen.len() < FROZEN_MAX => frozen.push_back(overlay.freeze()),
                4 => {
                    if let Some(f) = frozen.pop_front() {
                        published = overlay_on(&published, |out| f.with(|g| g.read(0, out)), 0, SIZE as usize);
                        overlay.drop_frozen();
                    }
                }
                5 => {
                    let (generation, partial) = overlay.partial_blocks();
                    for (block, gap) in partial {
                        let from = (block.0 * 4096) as usize;
                        let bytes = published[from + gap.start as usize..from + gap.end as usize].to_vec();
                        on_their_way.push((generation, block, gap.start, bytes));
                    }
                }
                6 => {
                    let nth = value as usize % 4;
                    for (generation, block, in_block, bytes) in on_their_way.drain(..).skip(nth) {
                        overlay.complete(generation, block, in_block, &bytes);
                    }
                }
                _ => {
                    let seen = overlay_on(&published, |out| overlay.read(at, out), at, len as usize);
                    prop_assert!(seen == model[range]);
                }
            }
        }
        let seen = overlay_on(&published, |out| overlay.read(0, out), 0, SIZE as usize);
        prop_assert!(seen == model);
    }
}

proptest! {
    /// The changes taken for the WAL, applied in order to the published bytes, give the volume as of the last taking.
    #[test]
    fn the_log_gets_every_change(
        ops in prop::collection::vec((0..8u8, 0..SIZE, 0..9_000u64, 0..=255u8), 1..60),
    ) {
        let overlay = Overlay::with_wal(Geometry::new(SIZE, 4096), 1 << 30);
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
                4 if overlay.layers.read().frozen.len() < FROZEN_MAX => {
                    overlay.freeze();
                }
                _ => {
                    let taken = overlay.take_unlogged();
                    for part in taken.frozen.into_iter().chain([taken.active]) {
                        let ForWal::Changes(changes) = part else { continue };
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
fn what_is_completed_ahead_stays_with_its_generation() {
    let overlay = Overlay::new(GEOMETRY());
    let published = [9; 4096];
    overlay.write(1, &[1]);
    overlay.freeze();
    overlay.write(2, &[2]);
    overlay.write(4096, &[2]);
    let (generation, partial) = overlay.partial_blocks();
    assert_eq!(
        partial,
        [(BlockIndex(1), 1..4096)],
        "what lies below block 0 is not published yet"
    );
    overlay.drop_frozen();
    overlay.complete(generation, BlockIndex(1), 1, &published[1..]);
    assert_eq!(overlay.partial_blocks().1, [(BlockIndex(0), 0..4096)]);
    let frozen = overlay.freeze();
    overlay.write(0, &[3]);
    overlay.complete(generation, BlockIndex(0), 0, &published);
    assert!(frozen.with(|g| g.copy_complete(0, &mut [0; 8192])));
    overlay.drop_frozen();
    overlay.complete(generation, BlockIndex(0), 0, &published);
    assert_eq!(
        overlay.partial_blocks().1,
        [(BlockIndex(0), 1..4096)],
        "another generation by now"
    );
}

#[test]
fn too_much_is_not_taken() {
    let overlay = Overlay::with_wal(GEOMETRY(), 64 << 10);
    overlay.write(0, &[1; 4096]);
    overlay.freeze();
    overlay.write(8192, &[2; 128 << 10]);
    let taken = overlay.take_unlogged();
    assert_eq!(
        (taken.frozen, taken.active),
        (vec![ForWal::Nothing], ForWal::TooLarge)
    );
    overlay.drop_frozen();
    overlay.freeze();
    overlay.write(0, &[3; 100]);
    let taken = overlay.take_unlogged();
    assert_eq!(taken.frozen, [ForWal::TooLarge]);
    let ForWal::Changes(changes) = taken.active else {
        panic!("{taken:?}")
    };
    assert_eq!(changes, [(0, Content::Data(vec![3; 100].into()))]);
    overlay.freeze();
    overlay.write(0, &[4; 10]);
    let taken = overlay.take_unlogged();
    assert_eq!(
        taken.frozen,
        [ForWal::TooLarge, ForWal::Nothing],
        "each by itself"
    );
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
    // Three blocks, of which one is partly written.
    assert_eq!(
        overlay.total_bytes(),
        3 * buffered_block_bytes(GEOMETRY()) + RANGE_BYTES
    );
    overlay.drop_frozen();
    drop(frozen);
    assert_eq!(overlay.read(0, &mut out), vec![0..4096, 4196..8192]);
    assert_eq!(
        overlay.total_bytes(),
        buffered_block_bytes(GEOMETRY()) + RANGE_BYTES
    );
}

#[test]
fn runs_of_all_generations_merge_with_the_newer_on_top() {
    let overlay = Overlay::new(GEOMETRY());
    overlay.write(0, &[1; 4 * 4096]);
    overlay.freeze();
    overlay.trim(4096, 8192);
    overlay.write(8 * 4096, &[1]);
    overlay.freeze();
    overlay.write(2 * 4096, &[1]);
    overlay.trim(8 * 4096, 4096);
    assert_eq!(
        overlay.block_runs(0..256),
        vec![(0..1, true), (1..2, false), (2..4, true), (8..9, false)]
    );
}

#[test]
fn frozen_generations_go_oldest_first_and_the_newer_hides_the_older() {
    let overlay = Overlay::new(GEOMETRY());
    let of_block = buffered_block_bytes(GEOMETRY());
    let read = |at: u64| {
        let mut out = [0; 1];
        overlay.read(at, &mut out).is_empty().then_some(out[0])
    };
    overlay.write(0, &[1; 8192]);
    overlay.freeze();
    overlay.write(4096, &[2; 8192]);
    let second = overlay.freeze();
    let (generation, partial) = {
        overlay.write(4096, &[3]);
        overlay.write(20480, &[3]);
        overlay.partial_blocks()
    };
    let named: Vec<_> = partial.iter().map(|(block, _)| block.0).collect();
    assert_eq!(named, [5], "what a frozen one holds is not as published");
    assert_eq!(
        [0, 4096, 4097, 8192].map(read),
        [Some(1), Some(3), Some(2), Some(2)]
    );
    overlay.drop_frozen();
    assert_eq!([0, 4097, 8192].map(read), [None, Some(2), Some(2)]);
    // Two of the four blocks are partly written.
    assert_eq!(overlay.total_bytes(), 4 * of_block + 2 * RANGE_BYTES);
    overlay.freeze();
    overlay.complete(generation, BlockIndex(5), 1, &[9; 4095]);
    assert_eq!(
        read(20481),
        Some(9),
        "completed though it is frozen as the second by now"
    );
    overlay.complete(generation - 1, BlockIndex(5), 1, &[8; 4095]);
    assert_eq!(read(20481), Some(9));
    drop(second);
    overlay.drop_frozen();
    overlay.complete(generation - 1, BlockIndex(5), 1, &[8; 4095]);
    assert_eq!([4096, 8192, 20481].map(read), [Some(3), None, Some(9)]);
}

#[test]
#[should_panic(expected = "only once it is published")]
fn freezing_more_than_may_be_is_refused() {
    let overlay = Overlay::new(GEOMETRY());
    for n in 0..=FROZEN_MAX {
        overlay.write(0, &[n as u8]);
        overlay.freeze();
    }
}
