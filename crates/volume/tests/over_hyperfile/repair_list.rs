//! Entries of the list of checkpoints that are written again, and volumes that go back to what is whole.

use std::os::unix::fs::FileExt;

use hypernbd_volume::admin::retention::{prune, set_policy};
use hypernbd_volume::base::control::Control;
use hypernbd_volume::options::{LeaseOptions, VolumeOptions};
use hypernbd_volume::past::{At, Past};
use hypernbd_volume::repair::{How, Newest, Outcome, Repaired, rebuild_list, to_newest_whole};
use hypernbd_volume::retention::Policy;
use hypernbd_volume::{ErrorKind, Volume, VolumeError};
use serde_json::Value;

use crate::faults::LIMIT;
use crate::fixture::{Fixture, pattern};
use crate::repair::{GONE, LARGE, SMALL, flip, outcomes, volume_and_replica};
use crate::replicas::{Contents, newest};

const SIZE: usize = 1 << 20;

/// A volume with so many checkpoints, each of a write of its own.
fn volume(checkpoints: u64) -> (Fixture, Contents) {
    let f = Fixture::new();
    f.create(SIZE as u64, 4096);
    let (mut contents, mut model) = (Contents::new(), vec![0; SIZE]);
    let volume = f.open();
    for seed in 1..=checkpoints {
        let at = seed as usize * 24_000;
        model[at..at + 12_000].copy_from_slice(&pattern(seed, 12_000));
        volume.write(at as u64, &model[at..at + 12_000], true).unwrap();
        contents.insert(newest(&f, &f.url), model.clone());
    }
    volume.close(LIMIT).unwrap();
    assert!(
        contents.keys().copied().eq(1..=checkpoints),
        "{:?}",
        contents.keys()
    );
    (f, contents)
}

fn key_of(cno: u64) -> String {
    format!("volume.meta/checkpoints/{cno:010}")
}

fn entry(f: &Fixture, cno: u64) -> Value {
    let (body, _) = f.run(f.store().unwrap().get(&key_of(cno))).unwrap().unwrap();
    serde_json::from_slice(&body).unwrap()
}

/// Flips a bit of an entry where it is stored.
fn damage_entry(f: &Fixture, cno: u64) {
    let path = f.object_file(&key_of(cno));
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5).unwrap();
    file.write_all_at(&[byte[0] ^ 2], 5).unwrap();
}

fn is_readable(f: &Fixture, cno: u64) -> bool {
    matches!(f.run(f.store().unwrap().get(&key_of(cno))), Ok(Some(_)))
}

fn rebuild(f: &Fixture, is_written: bool) -> Repaired {
    let how = How {
        is_data: false,
        is_written,
    };
    let (url, options) = (&f.url, &f.store_options);
    let (lease, control) = (LeaseOptions::default(), Control::default());
    let rebuilt = f.run(rebuild_list(url, options, &lease, how, &control));
    rebuilt.unwrap_or_else(|e| panic!("{}", e.chain()))
}

fn read_at(f: &Fixture, at: At) -> Vec<u8> {
    let options = VolumeOptions {
        read_only: true,
        ..VolumeOptions::default()
    };
    let past = Past::At(at);
    let opened = f.run(Volume::open_past(&f.url, &f.store_options, &options, &past));
    let volume = opened.unwrap_or_else(|e| panic!("{}", e.chain()));
    let bytes = f.read(&volume, 0, volume.size_bytes() as usize);
    volume.close(LIMIT).unwrap();
    bytes
}

fn left_for(repaired: &Repaired, name: &str, because: &str) {
    let outcomes = outcomes(repaired);
    let of = outcomes.iter().find(|(object, _)| object == name);
    assert!(
        matches!(of, Some((_, Outcome::Left(reason))) if reason.contains(because)),
        "{name}, {because}: {outcomes:?}"
    );
}

#[test]
fn a_damaged_entry_is_written_again_from_the_container() {
    let (f, contents) = volume(4);
    let first = entry(&f, 1)["generation"].as_u64().unwrap();
    for (aside, cno) in [2, 4].into_iter().enumerate() {
        let was = entry(&f, cno);
        damage_entry(&f, cno);
        let name = format!("{cno:010}");
        let looked = rebuild(&f, false);
        assert_eq!(outcomes(&looked), [(name.clone(), Outcome::Possible)]);
        assert!(!looked.is_whole() && !is_readable(&f, cno), "nothing was changed");
        assert_eq!(f.meta_objects("aside/").len(), aside);
        let done = rebuild(&f, true);
        assert_eq!(outcomes(&done), [(name, Outcome::Mended)]);
        assert!(done.is_whole(), "{:?}", done.left);
        // What was there is set aside.
        assert_eq!(f.meta_objects("aside/").len(), aside + 1);
        let is = entry(&f, cno);
        for field in ["cno", "check", "size_bytes"] {
            assert_eq!(is[field], was[field], "{field} of {cno}");
        }
        let (is, was) = (
            is["generation"].as_u64().unwrap(),
            was["generation"].as_u64().unwrap(),
        );
        match cno {
            // That of the entry before: not more than is certain.
            2 => assert_eq!(is, first),
            // Above all that were used, or they would be used again.
            _ => assert!(is > was, "{is} after {was}"),
        }
    }
    for (cno, expected) in &contents {
        assert!(read_at(&f, At::Number(*cno)) == *expected, "checkpoint {cno}");
    }
    // A server goes on from there.
    let volume = f.open();
    volume.write(0, &pattern(9, 4096), true).unwrap();
    volume.close(LIMIT).unwrap();
    assert!(entry(&f, 5)["generation"].as_u64() > entry(&f, 4)["generation"].as_u64());
    assert!(rebuild(&f, false).found.is_empty());
}

/// As when a server is killed between a publish and its entry.
#[test]
fn the_newest_checkpoint_gets_its_entry() {
    let (f, contents) = volume(3);
    f.remove_meta(&key_of(3));
    assert_eq!(
        outcomes(&rebuild(&f, false)),
        [(format!("{:010}", 3), Outcome::Possible)]
    );
    let done = rebuild(&f, true);
    assert_eq!(outcomes(&done), [(format!("{:010}", 3), Outcome::Mended)]);
    assert!(done.is_whole(), "{:?}", done.left);
    assert!(read_at(&f, At::Number(3)) == contents[&3]);
}

#[test]
fn no_entry_is_written_for_what_is_not_whole() {
    let (f, _) = volume(4);
    for cno in [2, 4] {
        damage_entry(&f, cno);
    }
    // All later checkpoints need what the first one stored, and the second one's own object is gone.
    f.remove("0000000001.0");
    f.remove("0000000002.0");
    let done = rebuild(&f, true);
    left_for(&done, "0000000002", "own object");
    left_for(&done, "0000000004", "not whole");
    left_for(&done, "0000000001.0", "no entry");
    assert!(done.left.is_none() && !is_readable(&f, 2) && !is_readable(&f, 4));
    assert!(f.meta_objects("aside/").is_empty());
}

/// A container that went back to an earlier state: the entries after it are none of its checkpoints.
#[test]
fn no_entry_is_written_for_another_history() {
    let (f, _) = volume(2);
    let inode = f.object_file("volume/inode");
    let earlier = std::fs::read(&inode).unwrap();
    let volume = f.open();
    volume.write(0, &pattern(7, 4096), true).unwrap();
    volume.close(LIMIT).unwrap();
    std::fs::write(&inode, earlier).unwrap();
    damage_entry(&f, 3);
    left_for(&rebuild(&f, true), "0000000003", "newest checkpoint is 2");
    assert!(!is_readable(&f, 3));
}

/// A volume of which the retention has removed the first checkpoints.
fn pruned() -> (Fixture, Contents) {
    let (f, contents) = volume(20);
    let policy = Policy {
        keep_last: 1,
        ..Policy::default()
    };
    f.run(set_policy(&f.url, &f.store_options, Some(&policy)))
        .unwrap();
    let removed = f.run(prune(&f.url, &f.store_options, &LeaseOptions::default()));
    assert!(removed.unwrap().checkpoints > 0 && !is_readable(&f, 2));
    (f, contents)
}

#[test]
fn what_the_retention_removed_gets_no_entry() {
    let (f, _) = pruned();
    f.run(
        f.store()
            .unwrap()
            .put(&key_of(2), "an entry that came back damaged"),
    )
    .unwrap();
    for is_written in [false, true] {
        left_for(&rebuild(&f, is_written), "0000000002", "retention");
    }
}

#[test]
fn an_entry_that_the_usage_table_knows_is_written_as_it_was() {
    let (f, contents) = pruned();
    let was = entry(&f, 10);
    f.remove_meta(&key_of(10));
    let done = rebuild(&f, true);
    assert_eq!(outcomes(&done), [(format!("{:010}", 10), Outcome::Mended)]);
    assert!(done.is_whole(), "{:?}", done.left);
    let is = entry(&f, 10);
    for field in ["cno", "check", "size_bytes", "published_ms"] {
        assert_eq!(is[field], was[field], "{field}");
    }
    assert_eq!(is["generation"], entry(&f, 9)["generation"]);
    assert!(read_at(&f, At::Number(10)) == contents[&10]);
}

fn back(f: &Fixture, is_data: bool, is_written: bool) -> Result<Newest, VolumeError> {
    let how = How { is_data, is_written };
    let (url, options) = (&f.url, &f.store_options);
    f.run(to_newest_whole(
        url,
        options,
        &LeaseOptions::default(),
        how,
        &Control::default(),
    ))
}

#[test]
fn a_damaged_volume_goes_back_to_its_newest_whole_checkpoint() {
    let (f, contents, _) = volume_and_replica();
    assert_eq!(back(&f, true, true).unwrap(), Newest::Whole(3));
    flip(&f, "vol", GONE);
    // Only who reads the data finds it.
    assert_eq!(back(&f, false, false).unwrap(), Newest::Whole(3));
    let Newest::Damaged(way) = back(&f, true, false).unwrap() else {
        panic!("the newest is damaged");
    };
    assert_eq!((way.to, way.newest, &way.done), (2, 3, &None));
    assert!(
        way.undone_bytes >= 1 << 20 && way.undone_bytes < 2 << 20,
        "{way:?}"
    );
    assert!(way.published_ms <= way.newest_published_ms, "{way:?}");
    assert_eq!(newest(&f, &f.url), 3, "nothing was changed");
    flip(&f, "vol", SMALL);
    let Newest::Damaged(way) = back(&f, true, true).unwrap() else {
        panic!("the newest is damaged");
    };
    let done = way.done.unwrap();
    assert_eq!((way.to, way.newest, done.number), (1, 3, 4));
    assert!(
        done.before.to_string().starts_with("before-repair-"),
        "{}",
        done.before
    );
    assert!(read_at(&f, At::Number(4)) == contents[&1]);
    // What was there before is not lost: mended, it reads as it did.
    for name in [SMALL, GONE] {
        flip(&f, "vol", name);
    }
    assert!(read_at(&f, At::Name(done.before)) == contents[&3]);
    assert_eq!(back(&f, true, true).unwrap(), Newest::Whole(4));
    flip(&f, "vol", LARGE);
    let e = back(&f, true, true).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
    assert_eq!(newest(&f, &f.url), 4);
}
