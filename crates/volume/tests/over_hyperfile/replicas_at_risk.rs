//! What goes on beside a replication: whoever writes to the replica, removes from it, or takes the original away at the wrong moment, each
//! volume stays whole, and nobody is told that all is copied when it is not.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hyperfile::meta_format::BlockPtrFormat;
use hypernbd_volume::admin;
use hypernbd_volume::lease::LeaseState;
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::past::{self, At};
use hypernbd_volume::replicate::{Request, replicate};
use hypernbd_volume::retention::Policy;
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::store::{self, ETag};
use hypernbd_volume::transfer::Control;
use hypernbd_volume::{ErrorKind, Volume, VolumeUrl};
use parking_lot::Mutex;

use crate::clones::copy_directory;
use crate::faults::{AtRequest, LIMIT, When};
use crate::fixture::{Fixture, pattern};
use crate::replicas::{
    Contents, SIZE, Until, again, assert_whole, newest, original, refused, request, run, whole, write_on,
};

/// More checkpoints than any policy keeps.
const MANY: u64 = 20;

/// Does something, which takes requests of its own, right before the first request of a kind is sent.
fn meanwhile<Fut: Future<Output = ()>>(
    f: &Fixture,
    is_it: fn(&str, &str) -> bool,
    work: impl FnOnce() -> Fut + Send + 'static,
) -> StoreOptions {
    let handle = f.handle();
    with(AtRequest::new(is_it, When::BeforeItIsSent, move || {
        handle.block_on(work())
    }))
}

fn with(at: AtRequest) -> StoreOptions {
    StoreOptions {
        hook: Hook::new(at),
        ..StoreOptions::default()
    }
}

/// Does something while a future of the fixture waits for it.
fn aside(work: impl FnOnce() + Send) {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap());
}

/// Which write each object of a container is.
async fn versions(url: &VolumeUrl) -> BTreeMap<String, ETag> {
    let store = store::connect(url, &StoreOptions::default()).await.unwrap();
    let mut versions = BTreeMap::new();
    for object in store.list(&store.data_key("")).await.unwrap() {
        let info = store.head(&object.key).await.unwrap().unwrap();
        versions.insert(object.key, info.etag);
    }
    versions
}

pub fn keep_last(f: &Fixture, url: &VolumeUrl, keep_last: u32) -> Policy {
    let policy = Policy {
        keep_last,
        ..Policy::default()
    };
    let set = admin::retention::set_policy(url, &f.store_options, Some(&policy));
    f.run(set).unwrap();
    policy
}

/// A replica of which a prune was interrupted after it had decided what it removes, while the original goes back to a checkpoint that
/// needs this.
fn pruned_and_rolled_back() -> (Fixture, Contents, VolumeUrl) {
    let (f, mut contents) = original(BlockPtrFormat::PartedSegment);
    let volume = f.open();
    for seed in 0..MANY {
        // Nothing of what was there before is needed any more.
        let bytes = pattern(100 + seed, SIZE);
        volume.write(0, &bytes, true).unwrap();
        contents.insert(newest(&f, &f.url), bytes);
    }
    volume.close(LIMIT).unwrap();
    let to = f.url_of("replica");
    again(&f, &to);
    keep_last(&f, &to, 1);
    let is_it = |method: &str, uri: &str| method == "POST" && uri.contains("delete");
    let failing = with(AtRequest::new(is_it, When::BeforeItIsSent, || ()).refused());
    f.run(admin::retention::prune(&to, &failing, &LeaseOptions::default()))
        .unwrap_err();
    let back = *contents.keys().nth(1).unwrap();
    let (at, lease) = (At::Number(back), LeaseOptions::default());
    let rolled = admin::rollback::rollback(&f.url, &f.store_options, &at, &lease);
    let rolled = f.run(rolled).unwrap();
    let state = contents[&back].clone();
    contents.insert(rolled.number, state);
    (f, contents, to)
}

fn prune(f: &Fixture, to: &VolumeUrl) {
    f.run(admin::retention::prune(
        to,
        &f.store_options,
        &LeaseOptions::default(),
    ))
    .unwrap();
}

#[test]
fn what_an_interrupted_prune_was_removing_is_copied_again() {
    let (mut f, contents, to) = pruned_and_rolled_back();
    again(&f, &to);
    // It finishes what was begun, if nobody has.
    prune(&f, &to);
    let at = assert_whole(&mut f, &to, &contents);
    assert_eq!(at, *contents.last_key_value().unwrap().0);
    f.url = to;
    assert!(whole(&f, &f.open()) == contents[&at]);
}

#[test]
fn what_a_command_that_may_still_run_was_removing_is_not_copied_again_at_once() {
    let (mut f, contents, to) = pruned_and_rolled_back();
    let own = std::mem::replace(&mut f.url, to.clone());
    let mut lease = f.lease().unwrap();
    lease.state = LeaseState::Held;
    lease.holder.host = "elsewhere".into();
    lease.holder.boot_id = "another".into();
    lease.duration_ms = 200;
    f.put_lease(&lease);
    f.url = own;
    let said = refused(&f, &to);
    assert!(said.contains("may still run"), "{said}");
    again(&f, &to);
    prune(&f, &to);
    assert_whole(&mut f, &to, &contents);
}

/// Deletes the volume, makes another one at its place, and takes away what tells of its checkpoint with this number.
fn make_anew(f: &Fixture, at: u64) {
    let lease = LeaseOptions::default();
    let deleted = admin::delete(&f.url, &f.store_options, &lease, admin::IfDamaged::Refuse);
    f.run(deleted).unwrap();
    f.create(1 << 20, 4096);
    overwrite_past(f, at);
}

/// Overwrites all of a volume again and again, until it has published two checkpoints past this one, and takes away what tells of this.
fn overwrite_past(f: &Fixture, at: u64) {
    let volume = f.open();
    for seed in 90.. {
        volume.write(0, &pattern(seed, SIZE), true).unwrap();
        if newest(f, &f.url) > at + 1 {
            break;
        }
    }
    volume.close(LIMIT).unwrap();
    let store = f.store().unwrap();
    for key in [
        store.meta_key(&format!("checkpoints/{at:010}")),
        store.data_key(&format!("{at:010}.0")),
    ] {
        f.run(store.delete(&key)).unwrap();
    }
}

#[test]
fn a_volume_that_is_made_anew_is_not_followed() {
    let (mut f, contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    let request = Request {
        follows: Some(Duration::from_millis(50)),
        ..request(&f, &to, &f.store_options)
    };
    let (control, is_over) = (Control::default(), AtomicBool::new(false));
    let mut is_remade = false;
    let followed = std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..3000 {
                if !is_over.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
            control.stop();
        });
        let followed = f.run(replicate(&request, &control, |so_far| {
            if so_far.behind_checkpoints == 0 && !std::mem::replace(&mut is_remade, true) {
                aside(|| make_anew(&f, so_far.checkpoint));
            }
        }));
        is_over.store(true, Ordering::Release);
        followed
    });
    let e = followed.unwrap_err();
    assert!(e.chain().contains("made anew"), "{}", e.chain());
    let at = assert_whole(&mut f, &to, &contents);
    assert_eq!(at, *contents.last_key_value().unwrap().0);
}

#[test]
fn another_history_is_told_by_what_both_have() {
    let (mut f, mut contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    let backup = f.path_of("backup");
    copy_directory(&f.path_of("vol"), &backup);
    write_on(&f, &mut contents, 5, 3);
    let at = again(&f, &to).checkpoint;
    let objects = f.path_of("vol").join("objects");
    std::fs::remove_dir_all(&objects).unwrap();
    copy_directory(&backup.join("objects"), &objects);
    // What is published later needs nothing of what was there before.
    overwrite_past(&f, at);
    let said = refused(&f, &to);
    assert!(said.contains("under the same numbers"), "{said}");
    assert_eq!(assert_whole(&mut f, &to, &contents), at);
}

#[test]
fn what_is_written_to_right_before_its_lease_is_taken_is_a_volume_of_its_own() {
    let (f, mut contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    again(&f, &to);
    write_on(&f, &mut contents, 5, 2);
    let seen = Arc::new(Mutex::new(BTreeMap::new()));
    let (url, before) = (to.clone(), seen.clone());
    let to_options = meanwhile(
        &f,
        |_, uri| uri.contains(".meta/lease"),
        move || async move {
            let (options, lease) = (StoreOptions::default(), LeaseOptions::default());
            admin::resize(&url, &options, 1 << 20, false, &lease)
                .await
                .unwrap();
            *before.lock() = versions(&url).await;
        },
    );
    let e = run(&f, &to, &to_options).unwrap_err();
    assert!(e.chain().contains("a volume of its own"), "{}", e.chain());
    assert!(!seen.lock().is_empty());
    assert_eq!(
        f.run(versions(&to)),
        *seen.lock(),
        "nothing is put, nor the inode"
    );
}

#[test]
fn whoever_lost_the_replica_gives_no_names() {
    let (f, _) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    again(&f, &to);
    let name: past::SnapshotName = "late".parse().unwrap();
    f.run(past::create(&f.url, &f.store_options, &name, None))
        .unwrap();
    let url = to.clone();
    let to_options = meanwhile(
        &f,
        |_, uri| uri.contains("snapshots"),
        move || async move {
            let options = VolumeOptions {
                lease: LeaseOptions {
                    takeover: true,
                    ..LeaseOptions::default()
                },
                ..VolumeOptions::default()
            };
            let opened = Volume::open(&url, &StoreOptions::default(), &options).await;
            let opened = opened.unwrap();
            tokio::task::spawn_blocking(move || opened.close(LIMIT))
                .await
                .unwrap()
                .unwrap();
        },
    );
    let e = run(&f, &to, &to_options).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Fenced, "{}", e.chain());
    let named = f.run(past::snapshots(&to, &f.store_options)).unwrap();
    assert!(named.is_empty());
}

/// Numbers are reserved, and all objects looked at, before any is copied. In a store that outlives the replica, a volume that is deleted and
/// made anew in between may have other objects under these names.
#[test]
fn whoever_lost_the_replica_copies_nothing_more() {
    let (mut f, mut contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    again(&f, &to);
    let mut expected = contents.last_key_value().unwrap().1.clone();
    expected[..4].copy_from_slice(b"mine");
    write_on(&f, &mut contents, 5, 3);
    let seen = Arc::new(Mutex::new(BTreeMap::new()));
    let (url, before) = (to.clone(), seen.clone());
    let to_options = meanwhile(
        &f,
        |method, uri| method == "HEAD" && uri.contains("/000000"),
        move || async move {
            let options = VolumeOptions {
                lease: LeaseOptions {
                    takeover: true,
                    ..LeaseOptions::default()
                },
                ..VolumeOptions::default()
            };
            let promoted = Volume::open(&url, &StoreOptions::default(), &options).await;
            let promoted = promoted.unwrap();
            tokio::task::spawn_blocking(move || {
                promoted.write(0, b"mine", true).unwrap();
                promoted.close(LIMIT).unwrap();
            })
            .await
            .unwrap();
            *before.lock() = versions(&url).await;
        },
    );
    let e = run(&f, &to, &to_options).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Fenced, "{}", e.chain());
    assert!(!seen.lock().is_empty());
    assert_eq!(f.run(versions(&to)), *seen.lock(), "nothing more is copied");
    f.url = to;
    assert!(whole(&f, &f.open()) == expected);
}

#[test]
fn a_first_copy_replaces_nothing_of_what_another_one_made() {
    let (mut f, contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    let mut expected = contents.last_key_value().unwrap().1.clone();
    expected[..4].copy_from_slice(b"mine");
    let seen = Arc::new(Mutex::new(BTreeMap::new()));
    let (url, of, before) = (to.clone(), f.url.clone(), seen.clone());
    let to_options = meanwhile(
        &f,
        |method, uri| method == "PUT" && uri.contains("/000000"),
        move || async move {
            let options = StoreOptions::default();
            let request = Request {
                url: &of,
                store_options: &options,
                to: &url,
                to_options: &options,
                takes_over: false,
                follows: None,
            };
            replicate(&request, &Control::default(), |_| ()).await.unwrap();
            let promoted = Volume::open(&url, &options, &VolumeOptions::default()).await;
            let promoted = promoted.unwrap();
            tokio::task::spawn_blocking(move || {
                promoted.write(0, b"mine", true).unwrap();
                promoted.close(LIMIT).unwrap();
            })
            .await
            .unwrap();
            *before.lock() = versions(&url).await;
        },
    );
    let e = run(&f, &to, &to_options).unwrap_err();
    assert!(!seen.lock().is_empty(), "{}", e.chain());
    assert_eq!(f.run(versions(&to)), *seen.lock(), "no object is put again");
    assert!(e.chain().contains("a volume of its own"), "{}", e.chain());
    f.url = to;
    assert!(whole(&f, &f.open()) == expected);
}

#[test]
fn beside_a_fast_writer_it_ends() {
    let (f, contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    let request = request(&f, &to, &f.store_options);
    let control = Control::default();
    let volume = f.open();
    let mut passes = 0;
    let done = f.run(replicate(&request, &control, |_| {
        passes += 1;
        if passes > 6 {
            control.stop();
        }
        aside(|| volume.write(passes, b"more", true).unwrap());
    }));
    volume.close(LIMIT).unwrap();
    let done = done.unwrap();
    assert!(done.checkpoint >= *contents.last_key_value().unwrap().0);
    assert!(passes <= 3, "{passes}");
}

#[test]
fn a_replica_has_rules_however_early_its_making_was_interrupted() {
    let (f, _) = original(BlockPtrFormat::PartedSegment);
    let policy = keep_last(&f, &f.url, 1000);
    for requests in 0..6 {
        let to = f.url_of(&format!("replica-{requests}"));
        let to_options = StoreOptions {
            hook: Hook::new(Until {
                left: AtomicUsize::new(requests),
            }),
            ..StoreOptions::default()
        };
        run(&f, &to, &to_options).unwrap_err();
        again(&f, &to);
        let of_replica = f.run(admin::retention::policy(&to, &f.store_options));
        assert_eq!(of_replica.unwrap(), Some(policy.clone()), "{requests}");
    }
}

#[test]
fn a_volume_that_was_moved_keeps_its_id() {
    let (mut f, _) = original(BlockPtrFormat::PartedSegment);
    let id = |f: &Fixture| f.run(admin::info(&f.url, &f.store_options)).unwrap().volume_id;
    let before = id(&f);
    copy_directory(&f.path_of("vol"), &f.path_of("moved"));
    std::fs::remove_dir_all(f.path_of("vol")).unwrap();
    f.url = f.url_of("moved");
    let to = f.url_of("replica");
    let said = refused(&f, &to);
    assert!(said.contains("adopt=yes"), "{said}");
    assert!(!f.path_of("replica").exists());
    let cloned = f.run(admin::clone(&f.url, &f.store_options, None, &f.url_of("clone")));
    let said = cloned.unwrap_err().to_string();
    assert!(said.contains("adopt=yes"), "{said}");
    let options = VolumeOptions {
        adopt: true,
        ..VolumeOptions::default()
    };
    let opened = f.run(Volume::open(&f.url, &f.store_options, &options));
    opened.unwrap().close(LIMIT).unwrap();
    assert_eq!(id(&f), before);
    again(&f, &to);
}
