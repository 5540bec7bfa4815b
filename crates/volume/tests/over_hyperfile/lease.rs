//! The lease of real volumes: who is refused, who takes over, and what an old owner can still do.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use hypernbd_volume::admin::IfDamaged;
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Engine, Ownership};
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::lease::{LeaseRecord, LeaseState};
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::{ErrorKind, Volume, VolumeError, admin};

use crate::faults::BoxError;
use crate::fixture::{Fixture, pattern};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

fn volume_of_16_mib() -> Fixture {
    let f = Fixture::new();
    f.create(16 * MIB, 4096);
    f
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn assert_fenced(volume: &Volume) {
    for result in [volume.flush(), volume.write(0, b"x", false), volume.flush()] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::Fenced);
    }
}

/// A lease whose holder cannot be seen from here.
fn elsewhere(f: &Fixture, duration: Duration) -> LeaseRecord {
    let mut lease = f.lease().expect("a lease");
    lease.state = LeaseState::Held;
    lease.token = "theirs".into();
    lease.holder.host = "far-away".into();
    lease.holder.boot_id = "another boot".into();
    lease.duration_ms = duration.as_millis() as u64;
    lease
}

#[test]
fn a_second_server_is_refused_and_told_by_whom() {
    let f = volume_of_16_mib();
    let first = f.open();
    let error = f.try_open().err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Busy);
    let text = error.to_string();
    let pid = format!("pid {}", std::process::id());
    for part in [
        &pid,
        "runs on this machine",
        "takeover=yes",
        f.url.to_string().as_str(),
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    first.write(0, &pattern(1, 4096), true).unwrap();
    let reader = f.open_read_only();
    assert!(
        f.read(&reader, 0, 4096) == pattern(1, 4096),
        "readers take no lease"
    );
}

#[test]
fn a_closed_volume_is_free_and_every_owner_has_a_higher_epoch() {
    let f = volume_of_16_mib();
    assert_eq!(f.lease(), None);
    let mut last = 0;
    for life in 0..6 {
        let volume = f.open();
        let lease = f.lease().unwrap();
        assert!(lease.is_held() && lease.epoch > last, "{lease:?}");
        last = lease.epoch;
        volume.write(life * 4096, &pattern(life, 4096), true).unwrap();
        // An end of each kind; and a lease removed by hand must not make epochs go back.
        match life % 3 {
            0 => {
                volume.close(LIMIT).unwrap();
                assert_eq!(f.lease().unwrap().state, LeaseState::Released);
            }
            1 => {
                drop(volume);
                assert_eq!(f.lease().unwrap().state, LeaseState::Held);
            }
            _ => {
                volume.close(LIMIT).unwrap();
                let store = f.store().unwrap();
                f.remove_meta(&store.meta_key("lease"));
            }
        }
    }
    let volume = f.open();
    for life in 0..6 {
        assert!(f.read(&volume, life * 4096, 4096) == pattern(life, 4096));
    }
}

/// A server that publishes what it is told to alone, and does not look at its lease by itself.
fn open_patient(f: &Fixture) -> Arc<Volume> {
    let options = VolumeOptions {
        checkpoint_interval: Duration::from_secs(3600),
        lease: LeaseOptions {
            duration: Duration::from_secs(3600),
            ..LeaseOptions::default()
        },
        ..VolumeOptions::default()
    };
    f.run(Volume::open(&f.url, &f.store_options, &options)).unwrap()
}

/// The release of a lease that was written once before: its first write is not sent, and something happens before the second is.
struct FailingRelease {
    writes: AtomicUsize,
    before_second: Box<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for FailingRelease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "after {:?} writes", self.writes)
    }
}

impl Intercept for FailingRelease {
    fn name(&self) -> &'static str {
        "FailingRelease"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        if request.method() != "PUT" || !request.uri().contains(".meta/lease") {
            return Ok(());
        }
        match self.writes.fetch_add(1, Ordering::SeqCst) {
            1 => return Err("injected: refused".into()),
            2 => {
                let happens = || std::thread::scope(|scope| scope.spawn(&self.before_second).join().unwrap());
                tokio::task::block_in_place(happens);
            }
            _ => {}
        }
        Ok(())
    }
}

/// Ends a server whose release fails once. The lease that is there then.
fn ended_with_failing_release(f: &mut Fixture, before_second: Box<dyn Fn() + Send + Sync>) -> LeaseRecord {
    f.store_options.hook = Hook::new(FailingRelease {
        writes: AtomicUsize::new(0),
        before_second,
    });
    let volume = open_patient(f);
    volume.write(0, &pattern(1, 4096), true).unwrap();
    volume.close(LIMIT).unwrap();
    f.store_options.hook = Hook::default();
    f.lease().unwrap()
}

/// The next server would wait until the lease has run out.
#[test]
fn a_release_that_fails_once_is_written_again() {
    let mut f = volume_of_16_mib();
    let lease = ended_with_failing_release(&mut f, Box::new(|| ()));
    assert_eq!((lease.state, lease.epoch), (LeaseState::Released, 1));
}

#[test]
fn a_release_that_is_written_again_replaces_no_lease_of_another() {
    let mut f = volume_of_16_mib();
    let (runtime, url) = (f.handle(), f.url.clone());
    // Both are counted as one: a process opens its volume anew.
    let store = StoreOptions {
        metrics: f.store_options.metrics.clone(),
        ..StoreOptions::default()
    };
    let take_over = move || {
        let options = VolumeOptions {
            lease: LeaseOptions {
                takeover: true,
                ..LeaseOptions::default()
            },
            ..VolumeOptions::default()
        };
        drop(runtime.block_on(Volume::open(&url, &store, &options)).unwrap());
    };
    let lease = ended_with_failing_release(&mut f, Box::new(take_over));
    assert!(lease.is_held() && lease.epoch == 2, "{lease:?}");
    assert_eq!(f.store_options.metrics.lease.is_held.get(), 1);
}

#[test]
fn after_a_takeover_the_first_can_publish_nothing_even_before_the_second_does() {
    let f = volume_of_16_mib();
    let first = open_patient(&f);
    first.write(0, &pattern(1, 4096), true).unwrap();
    first.write(8192, &pattern(3, 4096), false).unwrap();
    let second = f.take_over();
    assert_fenced(&first);
    assert!(f.read(&first, 0, 4096) == pattern(1, 4096), "reads go on");
    assert!(first.close(LIMIT).is_err());
    assert!(
        f.lease().unwrap().is_held(),
        "the first gave back what was not its own"
    );

    second.write(4096, &pattern(2, 4096), true).unwrap();
    second.close(LIMIT).unwrap();
    let third = f.open();
    assert!(f.read(&third, 0, 4096) == pattern(1, 4096));
    assert!(f.read(&third, 4096, 4096) == pattern(2, 4096));
    assert!(f.read(&third, 8192, 4096).iter().all(|b| *b == 0));
}

/// The engine takes up checkpoints whose segment was stored and whose inode was not. One of an old owner that a newer
/// owner has not seen would bring back writes that were lost long before.
#[test]
fn what_a_shut_out_owner_has_stored_is_never_taken_up() {
    let f = volume_of_16_mib();
    let first = open_patient(&f);
    first.write(0, &pattern(1, 4096), true).unwrap();
    first.write(0, &pattern(9, 4096), false).unwrap();
    let second = f.take_over();
    assert!(f.read(&second, 0, 4096) == pattern(1, 4096));
    assert_fenced(&first);
    let segment = f.store().unwrap().data_key("0000000002.0");
    let is_stored = f.objects().contains(&segment);
    assert!(
        is_stored,
        "the first one's checkpoint was not sent; this test shows nothing"
    );
    second.close(LIMIT).unwrap();
    drop(first);
    for _ in 0..2 {
        let next = f.open();
        assert!(f.read(&next, 0, 4096) == pattern(1, 4096));
        assert!(f.read(&f.open_read_only(), 0, 4096) == pattern(1, 4096));
        next.close(LIMIT).unwrap();
    }
}

#[test]
fn a_takeover_is_noticed_by_the_renewal_alone() {
    let f = volume_of_16_mib();
    let short = LeaseOptions {
        duration: Duration::from_secs(3),
        ..LeaseOptions::default()
    };
    let first = f.try_open_with(short).unwrap();
    let second = f.take_over();
    // Nothing to publish: only the renewal can notice.
    wait_for("the first one notices", || first.flush().is_err());
    assert_fenced(&first);
    let text = first.flush().unwrap_err().to_string();
    assert!(text.contains("took the volume over (lease epoch 2)"), "{text}");
    second.write(0, &pattern(2, 4096), true).unwrap();
}

#[test]
fn a_lease_is_renewed_while_the_volume_is_open() {
    let f = volume_of_16_mib();
    let short = LeaseOptions {
        duration: Duration::from_millis(100),
        ..LeaseOptions::default()
    };
    let volume = f.try_open_with(short).unwrap();
    wait_for("five renewals", || f.lease().unwrap().renewals >= 5);
    volume.write(0, &[1], true).unwrap();
}

#[test]
fn a_holder_elsewhere_that_renews_no_more_is_waited_for_once() {
    let f = volume_of_16_mib();
    f.open().close(LIMIT).unwrap();
    let duration = Duration::from_millis(500);
    let lease = elsewhere(&f, duration);
    f.put_lease(&lease);

    let started = Instant::now();
    let options = hypernbd_volume::options::VolumeOptions::default();
    let sighting = f
        .run(admin::check_servable(&f.url, &f.store_options, &options))
        .unwrap();
    assert!(started.elapsed() >= duration, "it was not watched");
    assert_eq!(f.lease().unwrap(), lease, "a look changes nothing");

    let watched = LeaseOptions {
        sighting,
        ..LeaseOptions::default()
    };
    // So long that the test would fail if it were watched again.
    let volume = f.try_open_with(watched).unwrap();
    assert_eq!(f.lease().unwrap().epoch, lease.epoch + 1);
    volume.write(0, &[1], true).unwrap();
}

#[test]
fn a_holder_elsewhere_that_renews_is_respected() {
    let f = Arc::new(volume_of_16_mib());
    f.open().close(LIMIT).unwrap();
    let lease = elsewhere(&f, LIMIT * 10);
    f.put_lease(&lease);
    let store = f.store().unwrap();
    let renewing = {
        let key = store.meta_key("lease");
        async move {
            for renewals in 1.. {
                tokio::time::sleep(Duration::from_millis(50)).await;
                let lease = LeaseRecord {
                    renewals,
                    ..lease.clone()
                };
                store
                    .put(&key, serde_json::to_vec(&lease).unwrap())
                    .await
                    .unwrap();
            }
        }
    };
    let options = hypernbd_volume::options::VolumeOptions::default();
    let refused = f.run(async {
        tokio::select! {
            refused = Volume::open(&f.url, &f.store_options, &options) => refused.err().unwrap(),
            () = renewing => unreachable!(),
        }
    });
    assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
    assert!(
        refused.to_string().contains("far-away") && refused.to_string().contains("renewed"),
        "{refused}"
    );
}

/// What was seen of a volume before holds as long as nobody took its lease, and no longer.
#[test]
fn an_open_by_an_earlier_look_finds_what_changed_since() {
    let f = volume_of_16_mib();
    let options = hypernbd_volume::options::VolumeOptions::default();
    let look = || f.run(admin::check_servable(&f.url, &f.store_options, &options));
    let open = |sighting| {
        f.try_open_with(LeaseOptions {
            sighting,
            ..LeaseOptions::default()
        })
    };
    assert_eq!(look().unwrap(), None, "there is no lease yet");
    let first = open(None).unwrap();
    first.write(0, &pattern(1, 4096), true).unwrap();
    first.close(LIMIT).unwrap();

    let seen = look().unwrap();
    assert!(seen.is_some());
    let second = open(seen.clone()).unwrap();
    assert_eq!(f.lease().unwrap().epoch, 2);
    assert!(f.read(&second, 0, 4096) == pattern(1, 4096));
    assert_eq!(open(seen.clone()).err().unwrap().kind(), ErrorKind::Busy);
    second.write(0, &pattern(2, 4096), true).unwrap();
    second.close(LIMIT).unwrap();

    let third = open(seen.clone()).unwrap();
    assert_eq!(f.lease().unwrap().epoch, 3);
    assert!(
        f.read(&third, 0, 4096) == pattern(2, 4096),
        "it went on from what is old"
    );
    third.close(LIMIT).unwrap();

    let seen = look().unwrap();
    let lease = LeaseOptions::default();
    f.run(admin::delete(&f.url, &f.store_options, &lease, IfDamaged::Refuse))
        .unwrap();
    assert_eq!(open(seen.clone()).err().unwrap().kind(), ErrorKind::NotFound);
    f.create(16 * MIB, 4096);
    let made_again = open(seen).unwrap();
    assert!(f.read(&made_again, 0, 4096).iter().all(|b| *b == 0));
    made_again.write(0, &pattern(4, 4096), true).unwrap();
}

/// Answers as told, in order; then yes.
struct Told(Mutex<VecDeque<bool>>);

#[async_trait::async_trait]
impl Ownership for Told {
    async fn check(&self) -> Result<(), VolumeError> {
        match self.0.lock().unwrap().pop_front().unwrap_or(true) {
            true => Ok(()),
            false => Err(VolumeError::Fenced {
                reason: "told so".into(),
            }),
        }
    }
}

/// *Adopt, then check*: the answer that counts is the one given after the stored state was read.
#[test]
fn what_was_adopted_is_not_used_when_the_lease_is_lost_by_then() {
    let f = volume_of_16_mib();
    let store = f.store().unwrap();
    let open_after = |seen, answers: &[bool]| {
        let told = Arc::new(Told(Mutex::new(answers.iter().copied().collect())));
        f.run(HyperEngine::open_owned(
            &store,
            IndexCache::default(),
            ReadCache::none(),
            false,
            told,
            seen,
        ))
    };
    let open = |answers: &[bool]| open_after(None, answers);
    assert_eq!(open(&[false]).err().unwrap().kind(), ErrorKind::Fenced);
    for answers in [[true, false, true], [true, true, false]] {
        let (engine, _) = open(&answers).unwrap();
        let recovered = f.run(engine.recover());
        assert_eq!(recovered.unwrap_err().kind(), ErrorKind::Fenced, "{answers:?}");
        f.run(engine.close());
    }
    let (engine, before) = open(&[true, true, true]).unwrap();
    f.run(engine.recover()).unwrap();
    f.run(engine.close());

    // What was read before the check need not be checked again; what came since must be.
    let (engine, _) = open_after(Some(before.stored), &[true, false]).unwrap();
    f.run(engine.close());
    let refused = open_after(Some(before.stored), &[false, true]).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Fenced);
    let volume = f.open();
    volume.write(0, b"x", true).unwrap();
    volume.close(LIMIT).unwrap();
    let refused = open_after(Some(before.stored), &[true, false]).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::Fenced, "another state was adopted");
}

#[test]
fn the_verbs_that_change_a_volume_respect_its_server_unless_told_to_take_over() {
    let f = volume_of_16_mib();
    let lease = LeaseOptions::default();
    let by_force = LeaseOptions {
        takeover: true,
        ..LeaseOptions::default()
    };
    let volume = f.open();
    volume.write(0, &pattern(1, 4096), true).unwrap();
    let resized = f.run(admin::resize(&f.url, &f.store_options, 32 * MIB, false, &lease));
    assert_eq!(resized.unwrap_err().kind(), ErrorKind::Busy);
    let deleted = f.run(admin::delete(&f.url, &f.store_options, &lease, IfDamaged::Refuse));
    assert_eq!(deleted.unwrap_err().kind(), ErrorKind::Busy);
    volume.write(4096, &pattern(2, 4096), true).unwrap();

    f.run(admin::resize(
        &f.url,
        &f.store_options,
        32 * MIB,
        false,
        &by_force,
    ))
    .unwrap();
    volume.write(0, &pattern(3, 4096), false).unwrap();
    assert_fenced(&volume);
    let next = f.open();
    assert_eq!(next.size_bytes(), 32 * MIB);
    assert!(f.read(&next, 0, 4096) == pattern(1, 4096));
    assert!(f.read(&next, 4096, 4096) == pattern(2, 4096));

    f.run(admin::delete(
        &f.url,
        &f.store_options,
        &by_force,
        IfDamaged::Refuse,
    ))
    .unwrap();
    next.write(0, &[1], false).unwrap();
    assert!(next.flush().is_err());
    let _ = next.close(LIMIT);
    assert_eq!(
        f.objects(),
        Vec::<String>::new(),
        "the server left something behind"
    );
}

/// What was seen before is not enough where a deletion has left its mark: the server that opens the volume takes that away, and
/// the deletion, should it go on, finds it gone.
#[test]
fn a_volume_with_a_deletions_mark_is_opened_by_a_look_of_its_own() {
    let f = volume_of_16_mib();
    f.open().close(LIMIT).unwrap();
    let store = f.store().unwrap();
    let key = store.meta_key("volume.json");
    let (label, _) = f.run(store.get(&key)).unwrap().unwrap();
    let options = hypernbd_volume::options::VolumeOptions::default();
    let look = || {
        f.run(admin::check_servable(&f.url, &f.store_options, &options))
            .unwrap()
    };
    assert!(look().is_some());
    let marked = String::from_utf8(label.to_vec())
        .unwrap()
        .replacen('{', "{\"deletion\":7,", 1);
    f.run(store.put(&key, marked)).unwrap();
    let sighting = look();
    assert!(sighting.is_none());
    let lease = LeaseOptions {
        sighting,
        ..LeaseOptions::default()
    };
    let volume = f.try_open_with(lease).unwrap();
    volume.write(0, &[1], true).unwrap();
    let (settled, _) = f.run(store.get(&key)).unwrap().unwrap();
    assert_eq!(settled, label);
}
