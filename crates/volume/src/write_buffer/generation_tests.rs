//! Compares a generation with a flat array: every written byte reads as it was written, and no other byte is answered.

use proptest::prelude::*;

use super::*;

const BLOCK: u32 = 4096;
const SIZE: u64 = 9 * 4096 + 1234;

#[derive(Debug, Clone)]
enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Trim(u64, u64),
}

fn range() -> impl Strategy<Value = (u64, u64)> {
    let edge = prop_oneof![0..=SIZE, (0..=9u64).prop_map(|b| b * 4096), Just(SIZE)];
    (edge.clone(), edge).prop_map(|(a, b)| (a.min(b), a.max(b) - a.min(b)))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (range(), 1..=255u8).prop_map(|((o, l), v)| Op::Write(o, l, v)),
        1 => range().prop_map(|(o, l)| Op::Zero(o, l)),
        1 => range().prop_map(|(o, l)| Op::Trim(o, l)),
    ]
}

/// The same operations on single bytes. `None` is unknown.
fn apply_flat(model: &mut [Option<u8>], op: &Op) {
    let geometry = Geometry::new(SIZE, BLOCK);
    match *op {
        Op::Write(o, l, v) => model[o as usize..(o + l) as usize].fill(Some(v)),
        Op::Zero(o, l) => model[o as usize..(o + l) as usize].fill(Some(0)),
        Op::Trim(o, l) => {
            for b in geometry.whole_blocks(o, l) {
                let start = b * u64::from(BLOCK);
                let end = (start + u64::from(BLOCK)).min(SIZE);
                model[start as usize..end as usize].fill(Some(0));
            }
        }
    }
}

fn apply(generation: &mut Generation, op: &Op) {
    match *op {
        Op::Write(o, l, v) => {
            let data = vec![v; l as usize];
            generation.write(PreparedWrite::new(generation.geometry, o, &data));
        }
        Op::Zero(o, l) => {
            generation.zero(o, l);
        }
        Op::Trim(o, l) => {
            generation.trim(o, l);
        }
    }
}

proptest! {
    #[test]
    fn behaves_as_a_flat_array(ops in prop::collection::vec(op(), 1..40), (o, l) in range()) {
        let mut generation = Generation::new(Geometry::new(SIZE, BLOCK));
        let mut model = vec![None; SIZE as usize];
        for op in &ops {
            apply(&mut generation, op);
            apply_flat(&mut model, op);
        }
        let mut out = vec![0xEE; l as usize];
        let missing = generation.read(o, &mut out);
        let mut known = vec![true; l as usize];
        for r in &missing {
            known[(r.start - o) as usize..(r.end - o) as usize].fill(false);
        }
        for i in 0..l as usize {
            let want = model[o as usize + i];
            prop_assert_eq!(known[i].then_some(out[i]), want, "byte {}", o as usize + i);
        }
        prop_assert!(missing.windows(2).all(|w| w[0].end < w[1].start), "joined and ascending");
        // Checks the count: whole blocks, zeroed runs, and every recorded range of a partly written block.
        let ranges: usize = generation.blocks.values().map(|b| b.written_ranges() as usize).sum();
        let kept = (ranges + generation.zero_runs().len()) as u64 * RANGE_BYTES
            + generation.blocks.len() as u64 * buffered_block_bytes(generation.geometry);
        prop_assert_eq!(generation.buffered_bytes(), kept);
        // Runs cover exactly the touched blocks.
        let runs = generation.block_runs(0..generation.geometry.blocks());
        for b in 0..generation.geometry.blocks() {
            let start = (b * u64::from(BLOCK)) as usize;
            let end = (start + BLOCK as usize).min(SIZE as usize);
            let touched = model[start..end].iter().any(Option::is_some);
            let only_zeros_in_part = model[start..end].iter().any(Option::is_none)
                && model[start..end].iter().all(|v| v.is_none_or(|v| v == 0));
            let run = runs.iter().find(|(r, _)| r.contains(&b));
            prop_assert_eq!(run.is_some(), touched && !only_zeros_in_part);
            let all_zeros = model[start..end].iter().all(|v| *v == Some(0));
            prop_assert!(run.is_none_or(|(_, is_data)| *is_data != all_zeros), "zeros are no data");
        }
    }

    #[test]
    fn completing_makes_every_block_publishable(ops in prop::collection::vec(op(), 1..30)) {
        let mut generation = Generation::new(Geometry::new(SIZE, BLOCK));
        let mut model = vec![None; SIZE as usize];
        for op in &ops {
            apply(&mut generation, op);
            apply_flat(&mut model, op);
        }
        let below = |at: usize| (at % 251) as u8;
        for (block, gap) in generation.partial_blocks() {
            let base = block.0 as usize * BLOCK as usize;
            let bytes: Vec<u8> = (base + gap.start as usize..base + gap.end as usize).map(below).collect();
            generation.complete(block, gap.start, &bytes);
        }
        prop_assert!(generation.partial_blocks().is_empty());
        for run in generation.data_runs() {
            let start = run.start * u64::from(BLOCK);
            let end = (run.end * u64::from(BLOCK)).min(SIZE);
            let mut out = vec![0; (end - start) as usize];
            prop_assert!(generation.copy_complete(start, &mut out));
            for (i, got) in out.iter().enumerate() {
                let at = start as usize + i;
                prop_assert_eq!(*got, model[at].unwrap_or_else(|| below(at)));
            }
        }
    }
}

#[test]
fn an_incomplete_block_is_never_copied_for_a_publish() {
    let geometry = Geometry::new(SIZE, BLOCK);
    let mut generation = Generation::new(geometry);
    generation.write(PreparedWrite::new(geometry, 10, b"abc"));
    assert!(!generation.copy_complete(0, &mut [0; 4096]));
    assert!(!generation.copy_complete(4096, &mut [0; 10]), "untouched block");
}

#[test]
fn zeroing_the_whole_of_a_huge_volume_is_one_range() {
    let geometry = Geometry::new(9 << 40, 4096);
    let mut generation = Generation::new(geometry);
    generation.write(PreparedWrite::new(geometry, 1 << 40, &[7; 8192]));
    generation.trim(0, 9 << 40);
    assert_eq!(generation.zero_runs(), vec![0..geometry.blocks()]);
    assert_eq!(generation.buffered_bytes(), RANGE_BYTES);
}

#[test]
fn scattered_zeroes_and_scattered_bytes_take_memory_that_is_counted() {
    let geometry = Geometry::new(1 << 40, 65536);
    let mut zeroed = Generation::new(geometry);
    for n in 0..1000 {
        zeroed.trim(n * 2 * 65536, 65536);
    }
    assert_eq!(zeroed.buffered_bytes(), 1000 * RANGE_BYTES);
    let mut bytes = Generation::new(geometry);
    for n in 0..1000 {
        bytes.write(PreparedWrite::new(geometry, n * 2, b"x"));
    }
    assert_eq!(
        bytes.buffered_bytes(),
        buffered_block_bytes(geometry) + 1000 * RANGE_BYTES
    );
    bytes.write(PreparedWrite::new(geometry, 0, &[1; 65536]));
    assert_eq!(bytes.buffered_bytes(), buffered_block_bytes(geometry));
}

#[test]
fn streaming_is_whole_blocks_written_once() {
    let geometry = Geometry::new(1 << 20, BLOCK);
    let mut generation = Generation::new(geometry);
    for at in 0..32 {
        generation.write(PreparedWrite::new(geometry, at * 4096, &[1; 4096]));
    }
    assert!(generation.is_streaming());
    for _ in 0..3 {
        generation.write(PreparedWrite::new(geometry, 0, &[2; 4096]));
    }
    assert!(!generation.is_streaming(), "written over: waiting saves uploads");
    let mut scattered = Generation::new(geometry);
    for at in 0..32 {
        scattered.write(PreparedWrite::new(geometry, at * 8192, &[1; 512]));
    }
    assert!(
        !scattered.is_streaming(),
        "parts of blocks: waiting may complete them"
    );
}

#[test]
fn what_is_whole_is_not_changed_by_a_completion_that_comes_late() {
    let geometry = Geometry::new(1 << 20, 4096);
    let mut g = Generation::new(geometry);
    g.write(PreparedWrite::new(geometry, 0, &[1; 2048]));
    g.write(PreparedWrite::new(geometry, 2048, &[1; 2048]));
    let runs = g.data_runs();
    assert_eq!((runs.len(), &runs[0]), (1, &(0..1)));
    // The generation is frozen by now, and a publish has read its runs.
    g.complete(BlockIndex(0), 2048, &[7; 2048]);
    assert_eq!((g.data_runs(), g.zero_runs()), (runs, Vec::new()));
    let mut bytes = [0; 4096];
    assert!(g.copy_complete(0, &mut bytes));
    assert_eq!(bytes, [1; 4096]);
}

#[test]
fn zeroed_piece_by_piece_is_zeroed() {
    let geometry = Geometry::new(1 << 20, 4096);
    let is_zeroed = |g: &Generation| g.data_runs().is_empty() && g.block_runs(0..2) == [(0..1, false)];
    let zeros = |at: u64, len: usize, g: &mut Generation| {
        g.write(PreparedWrite::new(geometry, at, &vec![0; len]));
    };
    let mut g = Generation::new(geometry);
    g.zero(0, 3000);
    assert!(!is_zeroed(&g), "the rest is not known");
    g.zero(500, 3596);
    assert!(is_zeroed(&g) && g.buffered_bytes() == RANGE_BYTES && g.partial_blocks().is_empty());
    zeros(17, 4, &mut g);
    assert!(is_zeroed(&g), "zeros over zeros");
    g.write(PreparedWrite::new(geometry, 0, &[1; 4096]));
    zeros(0, 4095, &mut g);
    assert!(!is_zeroed(&g), "one byte is left");
    zeros(4095, 1, &mut g);
    assert!(is_zeroed(&g), "written over in pieces");
}
