//! A log beside the volume, and what else goes by it: checks, rules, the buffer's file, openings that cannot look at it at first.

use std::sync::atomic::{AtomicUsize, Ordering};

use hypernbd_volume::admin::retention::{prune, set_policy};
use hypernbd_volume::admin::wal;
use hypernbd_volume::check::Request;
use hypernbd_volume::options::VolumeOptions;
use hypernbd_volume::past;
use hypernbd_volume::retention::Policy;
use hypernbd_volume::store::hook::Hook;

use crate::check::check;
use crate::faults::{AtRequest, When};
use crate::fixture::pattern;
use crate::log_beside::{LEN, LIMIT, MIB, assert_reads, beside, made, open, options, write_and_kill};

/// The server publishes and removes what it no longer needs while the records are read.
#[test]
fn a_check_looks_again_at_a_log_that_changes() {
    // The last record is read first of all, and once more in its turn.
    for reading in [1, 2] {
        let mut f = made();
        let volume = open(&f, &beside());
        for seed in 0..3 {
            volume.write(0, &pattern(seed, LEN), true).unwrap();
        }
        drop(volume);
        let last = f.meta_objects("log/").pop().unwrap();
        let (store, runtime, removed) = (f.store().unwrap(), f.handle(), last.clone());
        let (name, reads) = (last.clone(), AtomicUsize::new(0));
        let is_it = move |method: &str, uri: &str| {
            method == "GET" && uri.contains(&name[..]) && reads.fetch_add(1, Ordering::SeqCst) + 1 == reading
        };
        let remove = move || {
            let _ = runtime.block_on(store.delete(&removed)).unwrap();
        };
        f.store_options.hook = Hook::new(AtRequest::new(is_it, When::BeforeItIsSent, remove));
        let report = check(&f, &Request::default());
        assert!(report.is_clean() && report.notes.is_empty(), "{report:#?}");
        assert!(!f.meta_objects("log/").contains(&last));
    }
}

/// What could not be looked at before the lease was taken is looked at under it: a usable log is replayed, and not given up.
#[test]
fn records_are_found_though_the_first_look_failed() {
    for discard_wal in [true, false] {
        let mut f = made();
        write_and_kill(&f, 0, 1);
        let is_it = |method: &str, uri: &str| method == "GET" && uri.contains(".meta/wal");
        let failing = AtRequest::new(is_it, When::Stored, || {}).answered(400, "InvalidRequest");
        f.store_options.hook = Hook::new(failing);
        let mut without = options(None);
        without.discard_wal = discard_wal;
        let volume = open(&f, &without);
        assert_reads(&f, &volume, 0, 1);
        volume.close(LIMIT).unwrap();
    }
}

/// A log that was closed goes on from no checkpoint.
#[test]
fn a_closed_log_keeps_no_checkpoint() {
    let f = made();
    let volume = open(&f, &beside());
    volume.write(0, &pattern(1, LEN), true).unwrap();
    volume.close(LIMIT).unwrap();
    let listed = || f.run(past::list(&f.url, &f.store_options, 0, u64::MAX)).unwrap();
    let old = listed().last().unwrap().cno;
    let volume = open(&f, &options(None));
    for seed in 0..20 {
        volume.write(0, &pattern(seed, LEN), false).unwrap();
        volume.flush().unwrap();
    }
    volume.close(LIMIT).unwrap();
    let policy = Policy {
        keep_last: 1,
        ..Policy::default()
    };
    f.run(set_policy(&f.url, &f.store_options, Some(&policy)))
        .unwrap();
    f.run(prune(&f.url, &f.store_options, &beside().lease)).unwrap();
    assert!(listed().iter().all(|one| one.cno > old), "{:?}", listed());
}

/// What the buffer's file holds is applied only by the next who has the lease.
#[test]
fn the_buffer_file_comes_before_what_is_done_with_the_log() {
    let f = made();
    let dir = f.path_of("buffer");
    let kept = VolumeOptions {
        write_buffer_dir: Some(dir.clone()),
        ..beside()
    };
    let volume = open(&f, &kept);
    volume.write(0, &pattern(1, LEN), true).unwrap();
    volume.write(MIB, &pattern(2, LEN), false).unwrap();
    drop(volume);
    let lease = beside().lease;
    for refused in [
        f.run(prune(&f.url, &f.store_options, &lease)).map(drop),
        f.run(wal::replay(&f.url, &f.store_options, None, &lease, false))
            .map(drop),
    ] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains(dir.to_str().unwrap()), "{error}");
    }
    let volume = open(&f, &kept);
    assert_reads(&f, &volume, 0, 1);
    assert_reads(&f, &volume, MIB, 2);
    volume.close(LIMIT).unwrap();
    f.run(prune(&f.url, &f.store_options, &lease)).unwrap();
}
