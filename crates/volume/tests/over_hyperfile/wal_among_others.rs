//! A log beside the volume, and what else goes by it: checks, rules, the buffer's file, openings that cannot look at it at first.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use hypernbd_volume::Volume;
use hypernbd_volume::admin::retention::{prune, set_policy};
use hypernbd_volume::admin::{self, wal};
use hypernbd_volume::check::Request;
use hypernbd_volume::options::{LeaseOptions, VolumeOptions, WRITE_BUFFER_LEAST_BYTES};
use hypernbd_volume::past;
use hypernbd_volume::retention::Policy;
use hypernbd_volume::store::hook::Hook;
use parking_lot::Mutex;

use crate::check::check;
use crate::faults::{self, AtRequest, Verdict, When, Write, hook};
use crate::fixture::{Fixture, pattern};
use crate::wal_beside::{LEN, LIMIT, MIB, assert_reads, beside, made, open, options, write_and_kill};

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

/// Once the marker says that there is nothing to replay, nobody looks for an owner that goes on: it must be shut out before.
#[test]
fn a_log_is_sealed_before_it_is_said_to_be_given_up() {
    let mut f = made();
    let older = open(&f, &beside());
    older.write(0, &pattern(1, LEN), true).unwrap();
    let flushed = Arc::new(Mutex::new(None));
    let (of_older, seen) = (older.clone(), flushed.clone());
    let go_on = move || {
        let written = of_older.write(MIB, &pattern(2, LEN), false);
        *seen.lock() = Some(written.and_then(|()| of_older.flush()).is_ok());
    };
    let is_it = |method: &str, uri: &str| method == "PUT" && uri.contains(".meta/wal");
    f.store_options.hook = Hook::new(AtRequest::new(is_it, When::BeforeItIsSent, go_on));
    let lease = LeaseOptions {
        takeover: true,
        ..beside().lease
    };
    assert!(f.run(wal::discard(&f.url, &f.store_options, &lease)).unwrap());
    assert_eq!(
        *flushed.lock(),
        Some(false),
        "acknowledged, and nobody will replay it"
    );
}

/// Nothing is removed.
#[derive(Debug)]
struct NoDeletes;

impl Intercept for NoDeletes {
    fn name(&self) -> &'static str {
        "no deletes"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let (method, uri) = (context.request().method(), context.request().uri());
        match method == "DELETE" || method == "POST" && uri.contains("delete") {
            true => Err("injected: refused".into()),
            false => Ok(()),
        }
    }
}

/// Keys that may not remove records serve as well: nothing in these is needed any more.
#[test]
fn records_that_cannot_be_removed_keep_nobody_from_serving() {
    let mut f = made();
    write_and_kill(&f, 0, 1);
    f.store_options.hook = Hook::new(NoDeletes);
    let volume = open(&f, &options(None));
    f.store_options.hook = Hook::default();
    assert_reads(&f, &volume, 0, 1);
    assert!(!f.meta_objects("log/").is_empty());
    volume.write(0, &pattern(2, LEN), true).unwrap();
    drop(volume);
    let volume = open(&f, &beside());
    assert_reads(&f, &volume, 0, 2);
    volume.close(LIMIT).unwrap();
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
        f.run(admin::resize(
            &f.url,
            &f.store_options,
            1 << 30,
            false,
            &LeaseOptions::default(),
        ))
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

/// So many inodes are written, and no more.
#[derive(Debug)]
struct Inodes(AtomicUsize);

impl faults::Policy for Inodes {
    fn judge(&self, write: &Write) -> Verdict {
        let one_less = |left: usize| left.checked_sub(1);
        let (order, is_inode) = (Ordering::SeqCst, write.is_inode());
        match !is_inode || self.0.fetch_update(order, order, one_less).is_ok() {
            true => Verdict::Pass,
            false => Verdict::Refused,
        }
    }
}

/// What the buffer's file holds goes back behind the log, and comes forward again. No checkpoint is made of anything in between.
#[test]
fn what_was_flushed_stays_though_the_buffer_file_is_applied_after_the_log() {
    for inodes in 1..5 {
        let mut f = Fixture::new();
        f.create(16 * MIB, 65536);
        let kept = |write_buffer_bytes, timeout_s| VolumeOptions {
            write_buffer_dir: Some(f.path_of("buffer")),
            write_buffer_bytes,
            io_timeout: Duration::from_secs(timeout_s),
            ..beside()
        };
        let (large, small) = (kept(64 * MIB, 60), kept(WRITE_BUFFER_LEAST_BYTES, 1));
        let volume = open(&f, &large);
        volume.write(0, &pattern(1, LEN), false).unwrap();
        for at in 1..12 {
            volume.write(at * MIB, &pattern(at, MIB as usize), false).unwrap();
        }
        volume.write(0, &pattern(2, LEN), false).unwrap();
        volume.flush().unwrap();
        drop(volume);
        // It is killed after so many checkpoints, the first of which is that of the log.
        f.store_options.hook = hook(Inodes(AtomicUsize::new(inodes)));
        drop(f.run(Volume::open(&f.url, &f.store_options, &small)));
        f.store_options.hook = Hook::default();
        let mut elsewhere = options(None);
        elsewhere.lease.takeover = true;
        let volume = open(&f, &elsewhere);
        assert_reads(&f, &volume, 0, 2);
        for at in 1..12 {
            assert!(
                f.read(&volume, at * MIB, MIB as usize) == pattern(at, MIB as usize),
                "{inodes} inodes: {at}"
            );
        }
        volume.close(LIMIT).unwrap();
    }
}
