//! What the scrub of an open volume finds, says, keeps and forgets.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypernbd_volume::admin::retention::{prune, set_policy};
use hypernbd_volume::meta::scrub_record::ScrubRecord;
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::retention::Policy;
use hypernbd_volume::{Volume, admin};

use crate::faults::LIMIT;
use crate::fixture::{Fixture, pattern};

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;

/// A volume whose first two checkpoints have a mebibyte each, at 0 and at 8 MiB.
fn fixture() -> Fixture {
    let f = Fixture::new();
    f.create(16 << 20, BLOCK as u32);
    let volume = f.open();
    for at in [0, 8 * MIB] {
        let bytes = pattern(at as u64 + 1, MIB);
        volume.write(at as u64, &bytes, true).unwrap();
    }
    volume.close(LIMIT).unwrap();
    f
}

/// With passes that follow each other.
fn options() -> VolumeOptions {
    VolumeOptions {
        scrub_interval: Some(Duration::from_secs(1)),
        ..VolumeOptions::default()
    }
}

fn open_with(f: &Fixture, options: &VolumeOptions) -> Arc<Volume> {
    f.run(Volume::open(&f.url, &f.store_options, options)).unwrap()
}

fn open(f: &Fixture) -> Arc<Volume> {
    open_with(f, &options())
}

fn scrub(volume: &Volume) -> Option<ScrubRecord> {
    volume.status().scrub
}

/// Waits until this is so.
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until the scrub is as it is wanted.
fn wait_for(volume: &Volume, what: &str, is_so: impl Fn(&ScrubRecord) -> bool) -> ScrubRecord {
    wait_until(what, || scrub(volume).as_ref().is_some_and(&is_so));
    // It may have gone on since, but not back.
    let record = scrub(volume).unwrap();
    assert!(is_so(&record), "{what}: {record:?}");
    record
}

/// A pass that began after this moment has come to its end.
fn pass_after(volume: &Volume, ms: u64) -> ScrubRecord {
    wait_for(volume, "a pass", |record| {
        record.last.is_some_and(|last| last.began_ms > ms)
    })
}

/// What a volume keeps of its scrub.
fn kept(f: &Fixture) -> Option<ScrubRecord> {
    f.run(admin::info(&f.url, &f.store_options)).unwrap().scrub
}

/// The file of an object, and where these bytes lie in it.
fn place_of(f: &Fixture, name: &str, bytes: &[u8]) -> (File, u64) {
    let store = f.store().unwrap();
    let path = f.object_file(&store.data_key(name));
    let body = fs::read(&path).unwrap();
    let mut windows = body.windows(bytes.len());
    let at = windows.position(|window| window == bytes).unwrap();
    (File::options().write(true).open(path).unwrap(), at as u64)
}

#[test]
fn damage_is_named_counted_kept_and_forgotten_once_it_is_mended() {
    let f = fixture();
    let volume = open(&f);
    let whole = pass_after(&volume, 0);
    let last = whole.last.unwrap();
    assert!(whole.damage.is_empty());
    assert!(last.objects >= 2 && last.verified_bytes > 2 << 20, "{last:?}");
    assert_eq!(last.unverified_bytes, 0);

    let block = &pattern(8 * MIB as u64 + 1, MIB)[600 << 10..][..BLOCK];
    let (file, at) = place_of(&f, "0000000002.0", block);
    file.write_all_at(&[!block[0]], at).unwrap();
    let found = wait_for(&volume, "damage", |record| !record.damage.is_empty());
    let [place] = &found.damage[..] else {
        panic!("{found:?}")
    };
    assert_eq!(place.object, f.store().unwrap().data_key("0000000002.0"));
    assert!((place.offset_bytes..place.offset_bytes + place.len_bytes).contains(&at));
    assert!(place.is_newest_affected, "{place:?}");
    assert!(place.affected_bytes <= 64 << 10, "{place:?}");
    let bad = 8 * MIB as u64 + (600 << 10);
    let mut ranges = place.ranges.iter();
    let is_in = ranges.any(|range| (range.offset_bytes..range.offset_bytes + range.len_bytes).contains(&bad));
    assert!(is_in, "{place:?}");

    // Found again by each pass, it is counted once, and was found when it was found first.
    let later = pass_after(&volume, found.last.unwrap().began_ms);
    assert_eq!(later.damage, found.damage);
    let counted = || volume.metrics().damage.scrub.get();
    assert_eq!(counted(), 1);
    volume.close(LIMIT).unwrap();

    // It outlives the server, and the next one tells of it before it has read anything.
    assert_eq!(kept(&f).unwrap().damage, found.damage);
    let monthly = VolumeOptions {
        scrub_interval: Some(Duration::from_secs(30 * 24 * 3600)),
        ..VolumeOptions::default()
    };
    let next = open_with(&f, &monthly);
    let known = wait_for(&next, "the record", |_| true);
    assert_eq!(known.damage, found.damage);
    assert_eq!(counted(), 1, "nothing new");
    next.close(LIMIT).unwrap();

    file.write_all_at(&block[..1], at).unwrap();
    let mended = open(&f);
    wait_for(&mended, "it to be forgotten", |record| record.damage.is_empty());
    // That is stored at once, too.
    wait_until("it to be stored", || kept(&f).unwrap().damage.is_empty());
    mended.close(LIMIT).unwrap();
}

#[test]
fn what_is_missing_or_too_short_or_of_the_index_is_found() {
    for how in ["missing", "short", "index"] {
        let f = fixture();
        let volume = open(&f);
        assert!(pass_after(&volume, 0).damage.is_empty());
        let store = f.store().unwrap();
        // An index is found by its inode. That of an earlier checkpoint lies within the bytes that are compared with the damaged ones.
        let name = match how {
            "index" => "0000000002.0",
            _ => "0000000001.0",
        };
        let key = store.data_key(name);
        let (body, _) = f.run(store.get(&key)).unwrap().unwrap();
        match how {
            "missing" => f.remove(name),
            "short" => {
                let half = body.slice(..body.len() / 2);
                f.run(store.put(&key, half)).unwrap();
            }
            _ => {
                // Right before the first block is the index.
                let (file, at) = place_of(&f, name, &pattern(8 * MIB as u64 + 1, MIB)[..BLOCK]);
                let node = at - 100;
                file.write_all_at(&[!body[node as usize]], node).unwrap();
            }
        }
        let found = wait_for(&volume, how, |record| !record.damage.is_empty());
        for place in &found.damage {
            assert_eq!(place.object, key, "{how}: {found:?}");
            assert!(place.affected_bytes > 0, "{how}: {found:?}");
        }
        volume.close(LIMIT).unwrap();
    }
}

/// Damage that is in the way of an earlier checkpoint, and of no data, is told with that checkpoint.
#[test]
fn a_checkpoint_that_cannot_be_found_is_told_by_its_number() {
    let f = fixture();
    let volume = open(&f);
    assert!(pass_after(&volume, 0).damage.is_empty());
    let name = "0000000001.0";
    let first = &pattern(1, MIB)[..BLOCK];
    let body = fs::read(f.object_file(&f.store().unwrap().data_key(name))).unwrap();
    // Right before the first block is the index, and its inode lies within the bytes that are compared with that.
    let (file, at) = place_of(&f, name, first);
    file.write_all_at(&[!body[at as usize - 100]], at - 100).unwrap();
    let found = wait_for(&volume, "damage", |record| !record.damage.is_empty());
    for place in &found.damage {
        assert_eq!((place.affected_bytes, place.ranges.len()), (0, 0), "{found:?}");
        let words = ": checkpoint 1 cannot be read from it: ";
        assert!(place.to_string().contains(words), "{place}");
    }
    volume.close(LIMIT).unwrap();
}

/// What no kept checkpoint needs is nobody's damage, though it lies in an object that others are needed of.
#[test]
fn damage_that_nothing_needs_is_not_told_of() {
    let f = Fixture::new();
    f.create(4 << 20, BLOCK as u32);
    let volume = f.open();
    volume.write(0, &pattern(1, MIB), true).unwrap();
    volume.write(0, &pattern(2, MIB / 2), true).unwrap();
    for seed in 3..=20 {
        volume.write(2 << 20, &pattern(seed, BLOCK), true).unwrap();
    }
    volume.close(LIMIT).unwrap();
    let policy = Policy {
        keep_last: 1,
        ..Policy::default()
    };
    f.run(set_policy(&f.url, &f.store_options, Some(&policy)))
        .unwrap();
    let removed = f.run(prune(&f.url, &f.store_options, &LeaseOptions::default()));
    assert!(removed.unwrap().checkpoints >= 2);
    // In the half that was written anew, and in the other one.
    let bytes = pattern(1, MIB);
    for (at, is_needed) in [(100 << 10, false), (900 << 10, true)] {
        let block = &bytes[at..][..BLOCK];
        let (file, place) = place_of(&f, "0000000001.0", block);
        file.write_all_at(&[!block[0]], place).unwrap();
        let volume = open(&f);
        let before = kept(&f)
            .and_then(|record| record.last)
            .map_or(0, |last| last.began_ms);
        let record = pass_after(&volume, before);
        assert_eq!(!record.damage.is_empty(), is_needed, "{record:?}");
        volume.close(LIMIT).unwrap();
        file.write_all_at(&block[..1], place).unwrap();
    }
}

/// Retention removes checkpoints and objects all the while: what goes is not missed.
#[test]
fn what_retention_removes_meanwhile_is_not_missed() {
    let f = Fixture::new();
    f.create(4 << 20, BLOCK as u32);
    let policy = Policy {
        keep_last: 1,
        ..Policy::default()
    };
    f.run(set_policy(&f.url, &f.store_options, Some(&policy)))
        .unwrap();
    let options = VolumeOptions {
        retention_interval: Some(Duration::from_secs(1)),
        retention_grace: Duration::from_secs(1),
        ..options()
    };
    let volume = open_with(&f, &options);
    let removed = || volume.metrics().space.removed_checkpoints.get();
    let began = Instant::now();
    let (mut seed, mut passes, mut last_ms) = (0_u64, 0, 0);
    while removed() < 60 || passes < 5 {
        assert!(began.elapsed() < LIMIT, "{} removed, {passes} passes", removed());
        seed += 1;
        let bytes = pattern(seed, 9000);
        volume.write(seed % 1000 * 4096, &bytes, true).unwrap();
        // No faster than retention takes it away.
        std::thread::sleep(Duration::from_millis(10));
        let Some(record) = scrub(&volume) else { continue };
        assert!(record.damage.is_empty(), "{record:?}");
        if let Some(last) = record.last.filter(|last| last.ended_ms > last_ms) {
            (passes, last_ms) = (passes + 1, last.ended_ms);
        }
    }
    assert_eq!(volume.metrics().damage.scrub.get(), 0);
    volume.close(LIMIT).unwrap();
}

/// Taken over, it reads nothing more, and the new owner's scrub goes on.
#[test]
fn a_server_that_was_taken_over_scrubs_no_more() {
    let f = fixture();
    let older = open(&f);
    pass_after(&older, 0);
    let takeover = VolumeOptions {
        lease: LeaseOptions {
            takeover: true,
            ..LeaseOptions::default()
        },
        ..options()
    };
    // Counted for itself.
    let newer = f.run(Volume::open(&f.url, &StoreOptions::default(), &takeover));
    let newer = newer.unwrap();
    // A flush finds that out at latest.
    older.write(0, &pattern(5, BLOCK), false).unwrap();
    assert!(older.flush().is_err());
    wait_until("its scrub to end", || scrub(&older).is_none());
    let read = older.metrics().scrub.verified_bytes.get();
    let first = pass_after(&newer, 0).last.unwrap();
    pass_after(&newer, first.began_ms);
    assert_eq!(older.metrics().scrub.verified_bytes.get(), read);
    newer.close(LIMIT).unwrap();
    // Whatever that says: it was taken over.
    let _ = older.close(LIMIT);
}
