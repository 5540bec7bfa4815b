//! Somebody on another host asks, through the lease, that a volume grows: what its server does, and what becomes of requests that nobody
//! answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use hypernbd_volume::admin::{AskedToGrow, ask_to_grow};
use hypernbd_volume::lease::{GrowthRequest, GrowthStage, LeaseRecord, LeaseState};
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::transfer::Control;
use hypernbd_volume::{Volume, VolumeId, WalPlace, admin};
use parking_lot::Mutex;

use crate::faults::{AtRequest, BoxError, When};
use crate::fixture::{Fixture, pattern};

const MIB: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);
/// Renewals come three times in this.
const LEASE: Duration = Duration::from_secs(3);

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn volume_of_1_mib() -> Fixture {
    let f = Fixture::new();
    f.create(MIB as u64, 4096);
    f
}

fn serve(f: &Fixture, wal: Option<WalPlace>) -> Arc<Volume> {
    let options = VolumeOptions {
        wal,
        lease: LeaseOptions {
            duration: LEASE,
            ..LeaseOptions::default()
        },
        ..VolumeOptions::default()
    };
    f.run(Volume::open(&f.url, &f.store_options, &options)).unwrap()
}

/// Asks from another host: with nothing but the store.
fn ask(f: &Fixture, size: usize, patience: Duration, control: &Control) -> AskedToGrow {
    let store = StoreOptions::default();
    f.run(ask_to_grow(&f.url, &store, size as u64, patience, control))
        .unwrap()
}

fn asked_for(f: &Fixture, volume_id: VolumeId, valid: Duration) -> GrowthRequest {
    GrowthRequest {
        id: "theirs".into(),
        volume_id,
        size_bytes: 2 * MIB as u64,
        asked_ms: f.lease().unwrap().taken_ms,
        valid_ms: valid.as_millis() as u64,
        asked_by: "somebody".into(),
        stage: GrowthStage::Asked,
    }
}

/// What a command leaves that is killed as soon as it has asked.
fn leave_request(f: &Fixture, request: GrowthRequest) {
    let growth = Some(request);
    let lease = f.lease().unwrap();
    f.put_lease(&LeaseRecord { growth, ..lease });
}

fn stage(f: &Fixture) -> Option<GrowthStage> {
    f.lease().unwrap().growth.map(|growth| growth.stage)
}

/// A lease whose holder is on another machine, and has vanished.
fn vanished(f: &Fixture) -> LeaseRecord {
    let mut lease = f.lease().unwrap();
    lease.state = LeaseState::Held;
    lease.token = "theirs".into();
    lease.holder.host = "far-away".into();
    lease.holder.boot_id = "another boot".into();
    lease.duration_ms = 300;
    f.put_lease(&lease);
    lease
}

#[test]
fn a_server_elsewhere_grows_what_it_serves_and_keeps_its_lease() {
    for wal in [None, Some(WalPlace::Beside)] {
        let f = volume_of_1_mib();
        let volume = serve(&f, wal);
        let mut model = pattern(1, MIB);
        volume.write(0, &model, false).unwrap();
        let before = f.lease().unwrap();
        for size in [2 * MIB, 3 * MIB] {
            let asked = ask(&f, size, LIMIT, &Control::default());
            let AskedToGrow::Grown { size_bytes, holder } = asked else {
                panic!("{asked:?}");
            };
            assert_eq!(size_bytes as usize, size);
            assert_eq!(holder, before.holder.to_string());
            assert_eq!(volume.size_bytes() as usize, size);
            assert_eq!(
                f.run(admin::info(&f.url, &StoreOptions::default()))
                    .unwrap()
                    .size_bytes as usize,
                size
            );
            model.resize(size, 0);
            assert!(f.read(&volume, 0, size) == model);
            let at = size - 900;
            volume.write(at as u64, &pattern(2, 900), true).unwrap();
            model[at..].copy_from_slice(&pattern(2, 900));
        }
        let after = f.lease().unwrap();
        assert!(after.is_held());
        assert_eq!((after.token, after.epoch), (before.token, before.epoch));
        // It does not shrink, and says so.
        let asked = ask(&f, MIB, LIMIT, &Control::default());
        let AskedToGrow::Failed { why, .. } = asked else {
            panic!("{asked:?}");
        };
        assert!(why.contains("does not shrink"), "{why}");
        assert_eq!(volume.size_bytes() as usize, 3 * MIB);
        volume.close(LIMIT).unwrap();
        assert_eq!(f.lease().unwrap().state, LeaseState::Released);
        let again = f.open();
        assert!(f.read(&again, 0, 3 * MIB) == model);
        // Its lease is another, which says nothing of that.
        assert_eq!(f.lease().unwrap().growth, None);
    }
}

#[test]
fn nobody_is_asked_where_nobody_holds_the_volume() {
    let f = volume_of_1_mib();
    assert_eq!(ask(&f, 2 * MIB, LIMIT, &Control::default()), AskedToGrow::Nobody);
    f.open().close(LIMIT).unwrap();
    assert_eq!(ask(&f, 2 * MIB, LIMIT, &Control::default()), AskedToGrow::Nobody);
    assert_eq!(f.lease().unwrap().growth, None);
}

/// Also after a deletion and a creation at the same place: a lease with another id is another volume's.
#[test]
fn a_request_for_another_volume_is_not_carried_out() {
    let f = volume_of_1_mib();
    let volume = serve(&f, None);
    let other = VolumeId::try_from("7a1f0c52-4d0e-4f1c-9a1e-0d5b6f3c2a10".to_owned()).unwrap();
    leave_request(&f, asked_for(&f, other, LIMIT));
    wait_for("an answer", || {
        matches!(stage(&f), Some(GrowthStage::Failed { .. }))
    });
    assert_eq!(volume.size_bytes() as usize, MIB);
    volume.write(0, &pattern(1, 4096), true).unwrap();
    volume.close(LIMIT).unwrap();
}

/// A server that was stopped while somebody asked, and goes on much later: nobody waits for that any more.
#[test]
fn a_request_that_is_seen_too_late_is_not_carried_out() {
    let mut f = volume_of_1_mib();
    let is_armed = Arc::new(AtomicBool::new(false));
    let armed = is_armed.clone();
    let is_it = move |method: &str, uri: &str| {
        method == "GET" && uri.contains(".meta/lease") && armed.load(Ordering::SeqCst)
    };
    let held_up = || std::thread::sleep(Duration::from_millis(100));
    f.store_options.hook = Hook::new(AtRequest::new(is_it, When::BeforeItIsSent, held_up));
    let volume = serve(&f, None);
    f.store_options.hook = Hook::default();
    let id = f.lease().unwrap().volume_id;
    is_armed.store(true, Ordering::SeqCst);
    leave_request(&f, asked_for(&f, id, Duration::from_millis(10)));
    wait_for("an answer", || {
        matches!(stage(&f), Some(GrowthStage::Failed { .. }))
    });
    let Some(GrowthStage::Failed { why }) = stage(&f) else {
        panic!("another answer");
    };
    assert!(why.contains("too old"), "{why}");
    assert_eq!(volume.size_bytes() as usize, MIB);
    volume.close(LIMIT).unwrap();
}

#[test]
fn a_request_that_nobody_answers_is_withdrawn_and_the_volume_is_free_as_before() {
    let f = volume_of_1_mib();
    f.open().close(LIMIT).unwrap();
    let lease = vanished(&f);
    let asked = ask(&f, 2 * MIB, Duration::ZERO, &Control::default());
    assert!(matches!(asked, AskedToGrow::NoAnswer { .. }), "{asked:?}");
    let growth = f.lease().unwrap().growth.unwrap();
    assert_eq!(growth.stage, GrowthStage::Withdrawn);
    let growth = Some(growth);
    assert_eq!(
        f.lease().unwrap(),
        LeaseRecord {
            growth,
            ..lease.clone()
        }
    );
    // Whoever opens it finds that the holder has gone, and no request.
    let next = f.open();
    assert_eq!(
        (next.size_bytes() as usize, f.lease().unwrap().growth),
        (MIB, None)
    );
    next.close(LIMIT).unwrap();
    let (store, lease) = (StoreOptions::default(), LeaseOptions::default());
    let resized = admin::resize(&f.url, &store, 2 * MIB as u64, false, &lease);
    assert_eq!(f.run(resized).unwrap().size_bytes as usize, 2 * MIB);
}

/// A later release may say more in its lease, and would miss it.
#[test]
fn what_is_not_known_of_a_lease_stays_when_a_request_is_written_into_it() {
    let f = volume_of_1_mib();
    f.open().close(LIMIT).unwrap();
    let mut lease = serde_json::to_value(vanished(&f)).unwrap();
    lease["later"] = serde_json::json!({ "x": 1 });
    let store = f.store().unwrap();
    let key = store.meta_key("lease");
    f.run(store.put(&key, serde_json::to_vec(&lease).unwrap()))
        .unwrap();
    let asked = ask(&f, 2 * MIB, Duration::ZERO, &Control::default());
    assert!(matches!(asked, AskedToGrow::NoAnswer { .. }), "{asked:?}");
    let (body, _) = f.run(store.get(&key)).unwrap().unwrap();
    let mut found: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let growth = found.as_object_mut().unwrap().remove("growth").unwrap();
    assert_eq!(growth["stage"], "withdrawn");
    assert_eq!(found, lease);
}

/// A request that a killed command left dies with the lease that it was for.
#[test]
fn the_next_owner_carries_no_request_out_that_was_for_the_one_before() {
    let f = volume_of_1_mib();
    f.open().close(LIMIT).unwrap();
    let lease = vanished(&f);
    leave_request(&f, asked_for(&f, lease.volume_id, LIMIT * 60));
    let next = serve(&f, None);
    assert_eq!(f.lease().unwrap().growth, None);
    wait_for("two renewals", || f.lease().unwrap().renewals >= 2);
    assert_eq!(next.size_bytes() as usize, MIB);
    next.close(LIMIT).unwrap();
}

#[test]
fn of_two_who_ask_the_second_is_told_of_the_first_and_who_stops_takes_it_back() {
    let f = volume_of_1_mib();
    f.open().close(LIMIT).unwrap();
    let lease = LeaseRecord {
        // So long that nobody stops waiting by itself.
        duration_ms: 3_600_000,
        ..vanished(&f)
    };
    let request = GrowthRequest {
        valid_ms: u64::MAX,
        ..asked_for(&f, lease.volume_id, LIMIT)
    };
    f.put_lease(&LeaseRecord {
        growth: Some(request.clone()),
        ..lease.clone()
    });
    let asked = ask(&f, 3 * MIB, LIMIT, &Control::default());
    let is_first =
        |asked: &AskedToGrow| matches!(asked, AskedToGrow::Pending { request: first } if **first == request);
    assert!(is_first(&asked), "{asked:?}");
    f.put_lease(&lease);
    let control = Control::default();
    control.stop();
    assert_eq!(ask(&f, 3 * MIB, LIMIT, &control), AskedToGrow::Stopped);
    assert_eq!(stage(&f), Some(GrowthStage::Withdrawn));
}

/// A server of an earlier release finds its own token and goes on; with its next renewal it drops what it does not know.
#[test]
fn a_server_that_knows_no_requests_is_told_apart() {
    let f = volume_of_1_mib();
    f.open().close(LIMIT).unwrap();
    let lease = LeaseRecord {
        duration_ms: 3_600_000,
        ..vanished(&f)
    };
    f.put_lease(&lease);
    std::thread::scope(|scope| {
        let renewing = scope.spawn(|| {
            wait_for("a request", || stage(&f).is_some());
            let renewals = lease.renewals + 1;
            f.put_lease(&LeaseRecord {
                renewals,
                ..lease.clone()
            });
        });
        let asked = ask(&f, 2 * MIB, LIMIT, &Control::default());
        assert!(matches!(asked, AskedToGrow::Ignored { .. }), "{asked:?}");
        renewing.join().unwrap();
    });
}

/// What is sent about the lease.
#[derive(Debug, Clone, Default)]
struct OfTheLease(Arc<Mutex<Vec<String>>>);

impl Intercept for OfTheLease {
    fn name(&self) -> &'static str {
        "OfTheLease"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        if request.uri().contains(".meta/lease") {
            self.0.lock().push(request.method().to_owned());
        }
        Ok(())
    }
}

/// While nobody asks for anything, a renewal is one request, and no other is made to find out.
#[test]
fn that_somebody_may_ask_costs_no_request() {
    let mut f = volume_of_1_mib();
    let sent = OfTheLease::default();
    f.store_options.hook = Hook::new(sent.clone());
    let volume = serve(&f, None);
    f.store_options.hook = Hook::default();
    let (first, begun) = (f.lease().unwrap().renewals, sent.0.lock().len());
    wait_for("four renewals", || f.lease().unwrap().renewals >= first + 4);
    let of_renewals = sent.0.lock()[begun..].to_vec();
    let counted = &volume.metrics().lease;
    // A store that does not answer in time is looked at.
    let looks = of_renewals.iter().filter(|method| *method != "PUT").count() as u64;
    assert!(looks <= counted.failures.get(), "{of_renewals:?}");
    volume.close(LIMIT).unwrap();
}
