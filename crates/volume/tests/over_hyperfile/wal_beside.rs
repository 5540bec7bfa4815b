//! The log beside the volume: found by who asked for none, carried along by copies and moves, gone with the volume. In a directory
//! as on S3, because all of it but the choice of the place is the same.

use std::sync::Arc;
use std::time::Duration;

use hyperfile::file::hyper::Hyper;
use hypernbd_volume::admin::{self, IfDamaged, wal};
use hypernbd_volume::check::Request;
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::{Volume, VolumeError, VolumeUrl, WalPlace};

use crate::check::check;
use crate::fixture::{Fixture, pattern};
use crate::provenance::{copy_dir, restore};

pub const MIB: u64 = 1 << 20;
pub const LEN: usize = 8192;
pub const LIMIT: Duration = Duration::from_secs(30);

/// Nothing is published unless it is asked for.
pub fn options(wal: Option<WalPlace>) -> VolumeOptions {
    VolumeOptions {
        wal,
        checkpoint_interval: Duration::from_secs(3600),
        lease: LeaseOptions {
            duration: Duration::from_secs(2),
            ..LeaseOptions::default()
        },
        ..VolumeOptions::default()
    }
}

pub fn beside() -> VolumeOptions {
    options(Some(WalPlace::Beside))
}

pub fn made() -> Fixture {
    let f = Fixture::new();
    f.create(4 * MIB, 65536);
    f
}

fn try_open(f: &Fixture, url: &VolumeUrl, options: &VolumeOptions) -> Result<Arc<Volume>, VolumeError> {
    f.run(Volume::open(url, &f.store_options, options))
}

pub fn open(f: &Fixture, options: &VolumeOptions) -> Arc<Volume> {
    try_open(f, &f.url, options).unwrap_or_else(|e| panic!("{}", e.chain()))
}

/// A server that flushes one write to the log alone, and is killed.
pub fn write_and_kill(f: &Fixture, offset_bytes: u64, seed: u64) {
    let volume = open(f, &beside());
    volume.write(offset_bytes, &pattern(seed, LEN), false).unwrap();
    volume.flush().unwrap();
}

pub fn assert_reads(f: &Fixture, volume: &Volume, offset_bytes: u64, seed: u64) {
    assert!(
        f.read(volume, offset_bytes, LEN) == pattern(seed, LEN),
        "seed {seed}"
    );
}

fn is_wal_open(f: &Fixture, url: &VolumeUrl) -> bool {
    f.run(wal::info(url, &f.store_options)).unwrap().wal.is_some()
}

/// Keys of the records of the volume at another URL.
fn records_at(f: &Fixture, url: &VolumeUrl) -> Vec<String> {
    let listed = f.run(async {
        let store = hypernbd_volume::store::connect(url, &f.store_options)
            .await
            .unwrap();
        store.list(&store.meta_key("log/")).await.unwrap()
    });
    listed.into_iter().map(|object| object.key).collect()
}

#[test]
fn a_flush_is_in_the_log_and_a_regular_end_empties_it() {
    let f = made();
    write_and_kill(&f, 5, 1);
    assert!(!f.meta_objects("log/").is_empty() && is_wal_open(&f, &f.url));
    let volume = open(&f, &beside());
    assert_reads(&f, &volume, 5, 1);
    volume.close(LIMIT).unwrap();
    assert_eq!(f.meta_objects("log/"), [""; 0]);
    assert!(!is_wal_open(&f, &f.url));
}

/// It is replayed, published and ended, and the server goes on without: what is flushed from then on is in checkpoints.
#[test]
fn who_asks_for_no_log_finds_the_one_with_records() {
    let f = made();
    write_and_kill(&f, 5, 1);
    let checkpoint = || {
        f.run(admin::info(&f.url, &f.store_options))
            .unwrap()
            .last_checkpoint
    };
    let before = checkpoint();
    let volume = open(&f, &options(None));
    assert_reads(&f, &volume, 5, 1);
    assert!(!is_wal_open(&f, &f.url));
    assert_eq!(f.meta_objects("log/"), [""; 0]);
    assert_eq!(checkpoint(), before + 1, "the replay");
    volume.write(5, &pattern(2, LEN), false).unwrap();
    volume.flush().unwrap();
    assert_eq!(checkpoint(), before + 2, "a flush is a checkpoint");
    drop(volume);
    // Nothing of the log comes back, and what is flushed to the next one is above it.
    write_and_kill(&f, MIB, 3);
    let volume = open(&f, &options(None));
    assert_reads(&f, &volume, 5, 2);
    assert_reads(&f, &volume, MIB, 3);
    volume.close(LIMIT).unwrap();
}

/// Hyperfile's own tools know of no log: what is in it alone they see after a regular end, or a replay by command.
#[test]
fn other_tools_see_what_was_flushed_once_the_log_is_ended() {
    let f = made();
    let seen = || {
        f.with_hyper_opened(|mut file: Hyper<'static>| async move {
            let mut out = vec![0xEE; LEN];
            file.fs_read(0, &mut out).await.unwrap();
            out
        })
    };
    write_and_kill(&f, 0, 1);
    assert!(seen() == vec![0; LEN]);
    assert!(
        f.run(wal::replay(
            &f.url,
            &f.store_options,
            None,
            &beside().lease,
            false
        ))
        .unwrap()
    );
    assert!(seen() == pattern(1, LEN));
    let volume = open(&f, &beside());
    volume.write(0, &pattern(2, LEN), true).unwrap();
    volume.close(LIMIT).unwrap();
    assert!(seen() == pattern(2, LEN));
}

/// The older owner is alive, and was only taken over from.
#[test]
fn an_older_owner_is_shut_out_by_who_asks_for_no_log() {
    let f = made();
    let older = open(&f, &beside());
    older.write(0, &pattern(1, LEN), true).unwrap();
    let mut without = options(None);
    without.lease.takeover = true;
    let newer = open(&f, &without);
    assert_reads(&f, &newer, 0, 1);
    let late = older
        .write(MIB, &pattern(9, LEN), false)
        .and_then(|()| older.flush());
    assert!(late.is_err(), "acknowledged after the takeover");
    newer.write(0, &pattern(2, LEN), true).unwrap();
    drop(newer);
    drop(older);
    let volume = open(&f, &beside());
    assert_reads(&f, &volume, 0, 2);
    assert!(f.read(&volume, MIB, LEN) == vec![0; LEN]);
    volume.close(LIMIT).unwrap();
}

/// A read-only opening changes nothing: it reads the newest checkpoint.
#[test]
fn a_read_only_opening_reads_the_newest_checkpoint_and_leaves_the_log() {
    let f = made();
    write_and_kill(&f, 0, 1);
    let before = f.meta_objects("log/");
    let volume = f.open_read_only();
    assert!(f.read(&volume, 0, LEN) == vec![0; LEN]);
    volume.close(LIMIT).unwrap();
    assert_eq!(f.meta_objects("log/"), before);
}

#[test]
fn another_log_is_refused_as_long_as_this_one_has_records() {
    let f = made();
    write_and_kill(&f, 0, 1);
    let journal = WalPlace::At(f.url_of("journal"));
    let refused = try_open(&f, &f.url, &options(Some(journal.clone())))
        .err()
        .unwrap();
    let text = refused.chain();
    assert!(
        text.contains("names another one") && text.contains("wal replay"),
        "{text}"
    );
    assert!(
        f.run(wal::replay(
            &f.url,
            &f.store_options,
            None,
            &beside().lease,
            false
        ))
        .unwrap()
    );
    let volume = open(&f, &options(Some(journal)));
    assert_reads(&f, &volume, 0, 1);
    volume.write(0, &pattern(2, LEN), true).unwrap();
    drop(volume);
    // And the other way round: that one is not found by itself.
    for wal in [None, Some(WalPlace::Beside)] {
        let refused = try_open(&f, &f.url, &options(wal)).err().unwrap();
        assert!(matches!(refused, VolumeError::Wal { .. }), "{}", refused.chain());
    }
}

#[test]
fn the_deletion_takes_the_records_along() {
    let f = made();
    write_and_kill(&f, 0, 1);
    let lease = beside().lease;
    f.run(admin::delete(&f.url, &f.store_options, &lease, IfDamaged::Refuse))
        .unwrap();
    assert_eq!(f.objects(), [""; 0]);
    f.create(4 * MIB, 65536);
    let volume = open(&f, &beside());
    assert!(f.read(&volume, 0, LEN) == vec![0; LEN]);
    volume.close(LIMIT).unwrap();
}

/// Makes a copy of a killed server's volume, with its records.
fn copied(f: &Fixture) -> VolumeUrl {
    write_and_kill(f, 0, 1);
    copy_dir(&f.path_of("vol"), &f.path_of("copy"));
    f.url_of("copy")
}

/// The records were copied along. What becomes of them is said; the original has its own.
#[test]
fn a_copy_takes_its_records_along_and_touches_none_of_the_originals() {
    for is_replayed in [true, false] {
        let f = made();
        let copy = copied(&f);
        let of_original = f.meta_objects("log/");
        for wal in [None, Some(WalPlace::Beside)] {
            let text = try_open(&f, &copy, &options(wal)).err().unwrap().chain();
            assert!(
                text.contains("of which this one is a copy") && text.contains("hypernbd wal replay"),
                "{text}"
            );
        }
        let mut how = beside();
        if is_replayed {
            let before = records_at(&f, &copy);
            let lease = beside().lease;
            assert!(
                f.run(wal::replay(&copy, &f.store_options, None, &lease, false))
                    .unwrap()
            );
            assert_eq!(records_at(&f, &copy), before, "another volume's log is read only");
        } else {
            how.discard_wal = true;
        }
        let volume = try_open(&f, &copy, &how).unwrap_or_else(|e| panic!("{}", e.chain()));
        let want = if is_replayed {
            pattern(1, LEN)
        } else {
            vec![0; LEN]
        };
        assert!(f.read(&volume, 0, LEN) == want, "replayed: {is_replayed}");
        volume.write(MIB, &pattern(2, LEN), true).unwrap();
        drop(volume);
        // A server of the copy is killed: its own records are replayed, and nothing else.
        let volume = try_open(&f, &copy, &options(None)).unwrap_or_else(|e| panic!("{}", e.chain()));
        assert!(f.read(&volume, 0, LEN) == want, "replayed: {is_replayed}");
        assert_reads(&f, &volume, MIB, 2);
        volume.close(LIMIT).unwrap();
        assert_eq!(f.meta_objects("log/"), of_original);
        let original = open(&f, &beside());
        assert_reads(&f, &original, 0, 1);
        assert!(f.read(&original, MIB, LEN) == vec![0; LEN], "the copy's");
        original.close(LIMIT).unwrap();
    }
}

/// What was copied along is removed once it is not needed.
#[test]
fn a_copy_gets_rid_of_the_records_that_it_was_copied_with() {
    let f = made();
    let copy = copied(&f);
    let lease = beside().lease;
    assert!(f.run(wal::discard(&copy, &f.store_options, &lease)).unwrap());
    assert!(!records_at(&f, &copy).is_empty());
    let volume = try_open(&f, &copy, &options(None)).unwrap();
    // In the background of the opening.
    let began = std::time::Instant::now();
    while !records_at(&f, &copy).is_empty() {
        assert!(began.elapsed() < LIMIT, "they stay");
        std::thread::sleep(Duration::from_millis(5));
    }
    volume.close(LIMIT).unwrap();
    assert!(!f.meta_objects("log/").is_empty(), "the original's");
}

#[test]
fn a_volume_that_was_moved_keeps_its_records() {
    let f = made();
    let moved = copied(&f);
    std::fs::remove_dir_all(f.path_of("vol")).unwrap();
    let adopt = VolumeOptions {
        adopt: true,
        ..options(None)
    };
    let volume = try_open(&f, &moved, &adopt).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert_reads(&f, &volume, 0, 1);
    volume.close(LIMIT).unwrap();
    // Seals may stay, since the server before it is not known to have ended. There is nothing to replay.
    let again = try_open(&f, &moved, &options(None)).unwrap();
    assert_reads(&f, &again, 0, 1);
    again.close(LIMIT).unwrap();
}

/// A clone is made of checkpoints: what is in the log alone is not in it, and stays the parent's.
#[test]
fn a_clone_has_nothing_of_the_log() {
    let f = made();
    let volume = open(&f, &beside());
    volume.write(0, &pattern(1, LEN), true).unwrap();
    volume.publish().unwrap();
    volume.write(0, &pattern(2, LEN), true).unwrap();
    drop(volume);
    let clone = f.url_of("clone");
    f.run(admin::clone(&f.url, &f.store_options, None, &clone))
        .unwrap();
    assert_eq!(records_at(&f, &clone), [""; 0]);
    let cloned = try_open(&f, &clone, &beside()).unwrap();
    assert_reads(&f, &cloned, 0, 1);
    cloned.close(LIMIT).unwrap();
    let parent = open(&f, &options(None));
    assert_reads(&f, &parent, 0, 2);
    parent.close(LIMIT).unwrap();
}

#[test]
fn a_log_is_not_replayed_over_a_container_that_was_restored_alone() {
    let f = made();
    let volume = open(&f, &beside());
    volume.write(0, &pattern(1, LEN), true).unwrap();
    volume.close(LIMIT).unwrap();
    copy_dir(&f.path_of("vol"), &f.path_of("backup"));
    let volume = open(&f, &beside());
    volume.write(MIB, &pattern(2, LEN), true).unwrap();
    volume.publish().unwrap();
    volume.write(2 * MIB, &pattern(3, LEN), true).unwrap();
    drop(volume);
    restore(&f.path_of("backup"), &f.path_of("vol"), |name| {
        !name.starts_with("volume.meta")
    });
    for wal in [None, Some(WalPlace::Beside)] {
        let refused = try_open(&f, &f.url, &options(wal)).err().unwrap();
        let text = refused.chain();
        assert!(matches!(refused, VolumeError::Wal { .. }), "{text}");
        assert!(text.contains("restored from a backup"), "{text}");
    }
    let discard = VolumeOptions {
        discard_wal: true,
        ..options(None)
    };
    let volume = open(&f, &discard);
    assert_reads(&f, &volume, 0, 1);
    assert!(f.read(&volume, 2 * MIB, LEN) == vec![0; LEN]);
    volume.close(LIMIT).unwrap();
}

/// Records of another id at the place are of a volume that was there before, and of no use to anybody.
#[test]
fn records_of_a_deleted_volume_do_no_harm_to_the_next() {
    let f = made();
    write_and_kill(&f, 0, 1);
    let late = f.meta_objects("log/").pop().unwrap();
    let store = f.store().unwrap();
    let record = f.run(store.get(&late)).unwrap().unwrap().0;
    let lease = beside().lease;
    f.run(admin::delete(&f.url, &f.store_options, &lease, IfDamaged::Refuse))
        .unwrap();
    f.create(4 * MIB, 65536);
    let volume = open(&f, &beside());
    volume.write(MIB, &pattern(2, LEN), true).unwrap();
    // A request of the deleted volume's server was on its way.
    let store = f.store().unwrap();
    f.run(store.put(&late, record)).unwrap();
    drop(volume);
    let volume = open(&f, &beside());
    assert!(f.read(&volume, 0, LEN) == vec![0; LEN]);
    assert_reads(&f, &volume, MIB, 2);
    volume.close(LIMIT).unwrap();
}

#[test]
fn a_check_knows_the_records_and_reads_them() {
    let f = made();
    write_and_kill(&f, 0, 1);
    let report = check(&f, &Request::default());
    assert!(report.is_clean() && report.notes.is_empty(), "{report:#?}");
    let record = f.meta_objects("log/").pop().unwrap();
    let store = f.store().unwrap();
    f.run(store.put(&record, "no record")).unwrap();
    let report = check(&f, &Request::default());
    let told = format!("{report:#?}");
    assert!(!report.is_clean() && told.contains("log"), "{told}");
}

/// `StoreOptions` say nothing of it: the log is reached as its volume is, wherever that is.
#[test]
fn what_is_told_of_it() {
    let f = made();
    write_and_kill(&f, 0, 1);
    let told = f.run(wal::info(&f.url, &StoreOptions::default())).unwrap();
    assert_eq!(
        told.wal.unwrap().url,
        "auto",
        "no address, which a copy would not share"
    );
    assert_eq!(told.records, Some(f.meta_objects("log/").len() as u64));
    let info = f.run(admin::info(&f.url, &f.store_options)).unwrap();
    assert_eq!(info.wal_url, told.address);
}
