//! No damage of any object makes a volume read as something that was not written, whoever opens it: it reads as it did, or not at all.
//! `check.rs` shows that what is damaged is named; here nobody looks before.

use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use hypernbd_volume::past::At;

use crate::check::Rich;
use crate::clones::copy_directory;
use crate::faults::LIMIT;
use crate::fixture::{Fixture, pattern};

/// Not whole blocks: the last one is stored in part.
const SIZE: usize = (256 << 10) + 1024;
const FIRST: usize = 128 << 10;
const MOST: usize = 12_000;
/// Bytes flipped in each object; each of them where it has no more.
const PLACES: usize = 48;
/// Objects of one kind that are many: every so manieth is damaged.
const ONE_OF: usize = 5;

fn small() -> Rich {
    Rich::of(SIZE, FIRST, MOST)
}

/// The kind of an object, by its key.
fn kind(key: &str) -> &str {
    let name = key
        .trim_start_matches("volume.meta/")
        .trim_start_matches("volume/");
    match name.split_once('/') {
        Some((folder, _)) => folder,
        None if name.starts_with(|c: char| c.is_ascii_digit()) => "segment",
        None => name,
    }
}

/// Every object, but for one of a few of those that are many.
fn victims(rich: &Rich) -> Vec<String> {
    let keys = rich.keys().into_iter().enumerate();
    let is_many = |key: &str| matches!(kind(key), "segment" | "checkpoints");
    let keys: Vec<String> = keys
        .filter(|(number, key)| !is_many(key) || number % ONE_OF == 0)
        .map(|(_, key)| key)
        .collect();
    let kinds = [
        "segment",
        "checkpoints",
        "inode",
        "volume.json",
        "lease",
        "wal",
        "import",
        "scrub",
        "snapshots",
        "retention",
    ];
    for wanted in kinds {
        assert!(keys.iter().any(|key| kind(key) == wanted), "{wanted}: {keys:?}");
    }
    keys
}

/// Reads the newest state, and one checkpoint, another one each time. What is not refused is what was written.
fn assert_nothing_wrong(rich: &Rich, turn: usize, how: &str) {
    let (newest, _) = rich.kept.iter().next_back().unwrap();
    let (past, _) = rich.kept.iter().nth(turn % rich.kept.len()).unwrap();
    for (number, at) in [(newest, None), (past, Some(At::Number(*past)))] {
        let read = catch_unwind(AssertUnwindSafe(|| rich.read(at)));
        let read = read.unwrap_or_else(|_| panic!("a panic got out: {how}"));
        if let Ok(bytes) = read {
            assert!(
                bytes == rich.kept[number],
                "checkpoint {number} reads as something else: {how}"
            );
        }
    }
}

#[test]
fn no_flipped_bit_gives_a_wrong_byte() {
    let rich = small();
    let mut turn = 0;
    for key in victims(&rich) {
        let path = rich.f.object_file(&key);
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let len = rich.f.run(rich.store.head(&key)).unwrap().unwrap().size_bytes as usize;
        let step = len.div_ceil(PLACES).max(1);
        for place in (0..len).step_by(step) {
            // Not always the same byte of what is aligned.
            let at = (place + turn % step).min(len - 1);
            let mut byte = [0];
            file.read_exact_at(&mut byte, at as u64).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << (turn % 8)], at as u64)
                .unwrap();
            assert_nothing_wrong(
                &rich,
                turn,
                &format!("bit {} of byte {at} of {len} of {key}", turn % 8),
            );
            file.write_all_at(&byte, at as u64).unwrap();
            turn += 1;
        }
    }
    assert!(turn > 10 * PLACES, "{turn} bits");
    for (number, expected) in &rich.kept {
        assert!(
            rich.read(Some(At::Number(*number))).unwrap() == *expected,
            "the test left damage"
        );
    }
}

/// Gone, cut short as by a writer that stored it so, and replaced by another object of its kind.
#[test]
fn no_lost_cut_or_swapped_object_gives_a_wrong_byte() {
    let rich = small();
    let keys = rich.keys();
    for (turn, key) in victims(&rich).iter().enumerate() {
        let file = rich.f.object_file(key);
        let own = std::fs::read(&file).unwrap();
        let (body, _) = rich.f.run(rich.store.get(key)).unwrap().unwrap();
        let others = keys
            .iter()
            .filter(|other| kind(other) == kind(key) && *other != key);
        let other = others
            .map(|other| std::fs::read(rich.f.object_file(other)).unwrap())
            .next();
        for how in ["missing", "cut", "swapped"] {
            match (how, &other) {
                ("missing", _) => drop(rich.f.run(rich.store.delete(key)).unwrap()),
                ("cut", _) => drop(
                    rich.f
                        .run(rich.store.put(key, body.slice(..body.len() / 2)))
                        .unwrap(),
                ),
                (_, Some(other)) => std::fs::write(&file, other).unwrap(),
                (_, None) => continue,
            }
            assert_nothing_wrong(&rich, turn, &format!("{how} {key}"));
            std::fs::write(&file, &own).unwrap();
        }
    }
    for (number, expected) in &rich.kept {
        assert!(
            rich.read(Some(At::Number(*number))).unwrap() == *expected,
            "the test left damage"
        );
    }
}

/// A server that opens a volume of which what lies beside the container is damaged or gone refuses, or serves what was written; and what it
/// is given on top of that is there afterwards.
#[test]
fn a_server_over_damage_beside_the_container_serves_what_was_written() {
    const SMALL: usize = 64 << 10;
    let f = Fixture::new();
    f.create(SMALL as u64, 4096);
    let mut model = pattern(1, SMALL);
    let volume = f.open();
    volume.write(0, &model, true).unwrap();
    model[4096..9000].copy_from_slice(&pattern(2, 9000 - 4096));
    volume.write(4096, &model[4096..9000], true).unwrap();
    volume.close(LIMIT).unwrap();
    let (place, kept) = (f.path_of("vol"), f.path_of("kept"));
    copy_directory(&place, &kept);
    let (mut served, mut refused) = (0, 0);
    for key in f.meta_objects("") {
        for is_missing in [false, true] {
            let file = f.object_file(&key);
            match is_missing {
                true => f.remove_meta(&key),
                false => {
                    let len = f.run(f.store().unwrap().head(&key)).unwrap().unwrap().size_bytes as usize;
                    let mut bytes = std::fs::read(&file).unwrap();
                    bytes[len / 2] ^= 4;
                    std::fs::write(&file, bytes).unwrap();
                }
            }
            match f.try_open() {
                Err(_) => refused += 1,
                Ok(volume) => {
                    served += 1;
                    let how = if is_missing { "missing" } else { "flipped" };
                    assert!(f.read(&volume, 0, SMALL) == model, "{how} {key}");
                    let more = pattern(3, 4096);
                    volume.write(20_480, &more, true).unwrap();
                    volume.close(LIMIT).unwrap();
                    let mut expected = model.clone();
                    expected[20_480..24_576].copy_from_slice(&more);
                    let again = f.open_read_only();
                    assert!(f.read(&again, 0, SMALL) == expected, "{how} {key}");
                    again.close(LIMIT).unwrap();
                }
            }
            std::fs::remove_dir_all(&place).unwrap();
            copy_directory(&kept, &place);
        }
    }
    assert!(served > 0 && refused > 0, "{served} served, {refused} refused");
}
