//! Earlier checkpoints: read, compared, gone back to; and plain Hyperfile calls read what that leaves.

use std::collections::BTreeMap;

use hypernbd_volume::admin::rollback::{RolledBack, rollback};
use hypernbd_volume::check::Request;
use hypernbd_volume::options::{LeaseOptions, VolumeOptions};
use hypernbd_volume::past::{self, At, ChangeKind};
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::{ErrorKind, VolumeError};

use crate::faults::{AtRequest, LIMIT, When};
use crate::fixture::{Fixture, pattern};
use crate::resize::{FORMATS, check, made_elsewhere, resize};

fn newest(f: &Fixture) -> u64 {
    f.run(hypernbd_volume::admin::info(&f.url, &f.store_options))
        .unwrap()
        .last_checkpoint
}

fn read_at(f: &Fixture, cno: u64) -> Vec<u8> {
    let options = VolumeOptions::default();
    let at = past::Past::At(At::Number(cno));
    let volume = f
        .run(hypernbd_volume::Volume::open_past(
            &f.url,
            &f.store_options,
            &options,
            &at,
        ))
        .unwrap();
    let bytes = f.read(&volume, 0, volume.size_bytes() as usize);
    assert_eq!(
        volume.write(0, b"x", false).unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
    volume.close(LIMIT).unwrap();
    bytes
}

fn roll_back(f: &Fixture, cno: u64) -> Result<RolledBack, VolumeError> {
    let at = At::Number(cno);
    f.run(rollback(&f.url, &f.store_options, &at, &LeaseOptions::default()))
}

fn compare(f: &Fixture, kept: &BTreeMap<u64, Vec<u8>>, from: u64, to: u64) {
    let changed = f
        .run(past::diff(
            &f.url,
            &f.store_options,
            &At::Number(from),
            &At::Number(to),
        ))
        .unwrap();
    let mut patched = kept[&from].clone();
    patched.resize(kept[&to].len(), 0);
    for range in &changed {
        let bytes = range.offset_bytes as usize..(range.offset_bytes + range.len_bytes) as usize;
        let new = &kept[&to][bytes.clone()];
        assert!(range.kind == ChangeKind::Data || new.iter().all(|b| *b == 0));
        patched[bytes].copy_from_slice(new);
    }
    assert!(patched == kept[&to], "from {from} to {to}");
    assert!(from != to || changed.is_empty());
}

/// Random changes, other sizes, rollbacks and rollbacks of rollbacks: whatever comes later, each checkpoint reads as it did when it
/// was the newest (Invariant H1), and the differences between any two make the one of the other.
#[test]
fn every_checkpoint_reads_as_it_did() {
    for (seed, format) in FORMATS.into_iter().enumerate() {
        let mut rng = fastrand::Rng::with_seed(seed as u64);
        let (f, mut model) = made_elsewhere(format, 3 * 1024 * 1024 + 1024);
        let mut kept: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for step in 0..24 {
            match rng.u8(0..8) {
                0 if !kept.is_empty() => {
                    let target = *rng.choice(&kept.keys().copied().collect::<Vec<_>>()).unwrap();
                    let before = newest(&f);
                    let done = roll_back(&f, target).unwrap();
                    assert_eq!(
                        (done.to.number(), done.number),
                        (target, before + 1),
                        "{format:?}"
                    );
                    model = kept[&target].clone();
                    let named = f.run(past::snapshots(&f.url, &f.store_options)).unwrap();
                    let named = named.iter().find(|s| s.name == done.before).unwrap();
                    assert_eq!(named.checkpoint.cno, before);
                }
                1 => {
                    let size = rng.usize(1024 * 1024..4 * 1024 * 1024);
                    resize(&f, size, true).unwrap();
                    model.resize(size, 0);
                }
                _ => {
                    let volume = f.open();
                    assert!(f.read(&volume, 0, model.len()) == model, "{format:?}");
                    for _ in 0..rng.usize(1..20) {
                        let at = rng.usize(0..model.len() - 20_000);
                        let len = rng.usize(1..20_000);
                        if rng.bool() {
                            let bytes = pattern(step * 100 + at as u64, len);
                            volume.write(at as u64, &bytes, false).unwrap();
                            model[at..at + len].copy_from_slice(&bytes);
                        } else {
                            volume.zero(at as u64, len as u64, false).unwrap();
                            model[at..at + len].fill(0);
                        }
                    }
                    volume.flush().unwrap();
                    volume.close(LIMIT).unwrap();
                }
            }
            kept.insert(newest(&f), model.clone());
        }
        // The entry of a checkpoint that another size made is written by the next open.
        f.open().close(LIMIT).unwrap();
        // Of a checkpoint that a resize made, and that was not the newest at any open, the list does not know.
        let store = f.store().unwrap();
        let is_known = |cno: u64| f.run(past::find(&store, Some(&At::Number(cno)))).is_ok();
        let known: Vec<u64> = kept.keys().copied().filter(|cno| is_known(*cno)).collect();
        assert!(known.len() > kept.len() / 2, "{known:?}");
        for cno in &known {
            assert!(read_at(&f, *cno) == kept[cno], "checkpoint {cno} of {format:?}");
        }
        let whole = crate::check::check(&f, &Request::with_data());
        assert!(whole.is_clean(), "{format:?}: {whole:?}");
        assert!(whole.checkpoints >= known.len() as u64, "{format:?}: {whole:?}");
        for _ in 0..20 {
            compare(
                &f,
                &kept,
                *rng.choice(&known).unwrap(),
                *rng.choice(&known).unwrap(),
            );
        }
    }
}

#[test]
fn plain_hyperfile_calls_go_on_from_a_rollback() {
    for format in FORMATS {
        let (f, mut model) = made_elsewhere(format, 3 * 1024 * 1024 + 1024);
        f.open().close(LIMIT).unwrap();
        let first = newest(&f);
        let volume = f.open();
        volume.write(5000, &pattern(7, 300_000), true).unwrap();
        volume.close(LIMIT).unwrap();
        roll_back(&f, first).unwrap();
        check(&f, &mut model, 10);
        check(&f, &mut model, 20);
    }
}

/// Killed at any request of it: the volume reads as before, or as it is to, and never otherwise.
#[test]
fn a_rollback_whose_inode_was_not_stored_is_taken_up() {
    for format in FORMATS {
        let (f, model) = made_elsewhere(format, 3 * 4096 + 5);
        f.open().close(LIMIT).unwrap();
        let first = newest(&f);
        let volume = f.open();
        volume.write(0, &pattern(7, 4096), true).unwrap();
        volume.close(LIMIT).unwrap();
        let store = f.store().unwrap();
        let key = store.data_key("inode");
        let (before, _) = f.run(store.get(&key)).unwrap().unwrap();
        let done = roll_back(&f, first).unwrap();
        f.run(store.put(&key, before)).unwrap();
        let entry = store.meta_key(&format!("checkpoints/{:010}", done.number));
        f.run(store.delete(&entry)).unwrap();
        let volume = f.open();
        assert!(f.read(&volume, 0, model.len()) == model, "{format:?}");
        volume.close(LIMIT).unwrap();
    }
}

#[test]
fn what_was_never_published_is_no_checkpoint() {
    let f = Fixture::new();
    f.create(1 << 20, 4096);
    for cno in [0, 1, 5, 1 << 30, u64::MAX] {
        let error = roll_back(&f, cno).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{cno}: {error}");
    }
    let volume = f.open();
    volume.write(0, b"x", true).unwrap();
    volume.close(LIMIT).unwrap();
    // A checkpoint that was sent and whose inode never was.
    let store = f.store().unwrap();
    let key = store.data_key("inode");
    let (before, _) = f.run(store.get(&key)).unwrap().unwrap();
    let volume = f.open();
    volume.write(0, b"y", true).unwrap();
    volume.close(LIMIT).unwrap();
    let orphan = newest(&f);
    f.run(store.put(&key, before)).unwrap();
    let entry = store.meta_key(&format!("checkpoints/{orphan:010}"));
    f.run(store.delete(&entry)).unwrap();
    let error = roll_back(&f, orphan).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

/// Without a log the entry of a checkpoint is written behind its publish.
#[test]
fn the_newest_checkpoint_is_found_before_its_entry_is_written() {
    let f = Fixture::new();
    f.create(1 << 20, 4096);
    for byte in 1..4 {
        let volume = f.open();
        volume.write(0, &[byte; 4096], true).unwrap();
        volume.close(LIMIT).unwrap();
    }
    let store = f.store().unwrap();
    let number = newest(&f);
    f.run(store.delete(&store.meta_key(&format!("checkpoints/{number:010}"))))
        .unwrap();
    let now = At::Ago(std::time::Duration::ZERO);
    assert_eq!(f.run(past::find(&store, Some(&now))).unwrap().number(), number);
    let listed = f.run(past::list(&f.url, &f.store_options, 0, u64::MAX)).unwrap();
    let numbers: Vec<u64> = listed.iter().map(|one| one.cno).collect();
    assert_eq!(numbers, [number - 2, number - 1, number]);
    assert!(
        listed
            .iter()
            .all(|one| one.size_bytes == 1 << 20 && one.written_bytes > 4096)
    );
}

/// Without a log nobody waits for a checkpoint's entry, and who opens the volume next adds that of the newest alone.
#[test]
fn an_entry_that_failed_once_is_in_the_list_all_the_same() {
    let mut f = Fixture::new();
    f.create(1 << 20, 4096);
    let write = |f: &Fixture, volume: &hypernbd_volume::Volume, seed| {
        volume.write(0, &pattern(seed, 4096), false).unwrap();
        volume.flush().unwrap();
        newest(f)
    };
    let volume = f.open();
    write(&f, &volume, 1);
    volume.close(LIMIT).unwrap();
    drop(volume);
    let is_entry = |method: &str, uri: &str| method == "PUT" && uri.contains("/checkpoints/");
    f.store_options.hook = Hook::new(AtRequest::new(is_entry, When::BeforeItIsSent, || {}).refused());
    let volume = f.open();
    let (refused, next) = (write(&f, &volume, 2), write(&f, &volume, 3));
    volume.close(LIMIT).unwrap();
    assert!(read_at(&f, refused)[..4096] == pattern(2, 4096)[..]);
    assert!(read_at(&f, next)[..4096] == pattern(3, 4096)[..]);
}
