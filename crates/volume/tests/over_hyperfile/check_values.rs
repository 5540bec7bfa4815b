//! Check values of objects that are uploaded in parts: who may write them, and what becomes of a volume whose check values cannot be
//! written or read.

use std::sync::Arc;

use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextMut, BeforeTransmitInterceptorContextMut,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use hypernbd_volume::check::Request;
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Beside, Engine};
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;

use crate::check::check;
use crate::faults::{BoxError, LIMIT, Script, Step, Then, Until, Verdict, Write, divert, judged, refusal};
use crate::fixture::{Fixture, pattern};

/// More than is put in one piece.
const LEN: usize = 10 << 20;
const OBJECT: &str = "0000000001.0";

fn sums(f: &Fixture) -> Vec<u8> {
    let store = f.store().unwrap();
    let key = store.meta_key(&format!("sums/{OBJECT}"));
    let (body, _) = f.run(store.get(&key)).unwrap().expect("check values");
    body.to_vec()
}

/// Two owners store an object of the same name. The older one's completion is refused, and what tells of the new one's stays.
#[test]
fn an_owner_that_was_taken_over_replaces_no_check_values() {
    let f = Fixture::new();
    f.create(16 << 20, 4096);
    let script = Arc::new(Script::default());
    let store = judged(f.store().unwrap(), script.clone());
    let open = HyperEngine::open(&store, IndexCache::default(), ReadCache::none(), false);
    let (engine, _) = f.run(open).unwrap();
    let mut generation = Generation::new(engine.geometry());
    generation.write(PreparedWrite::new(engine.geometry(), 0, &pattern(1, LEN)));
    let frozen = Arc::new(Frozen::new(generation));
    let completion = Write {
        object: OBJECT.to_owned(),
        step: Step::Complete,
    };
    script.add(completion.clone(), 0, Until::Opened, Then::Goes(Verdict::Pass));
    std::thread::scope(|scope| {
        let older = scope.spawn(|| f.run(engine.publish(frozen, Beside::default())));
        script.wait(&Until::Seen(completion));
        let newer = f.open();
        newer.write(0, &pattern(2, LEN), true).unwrap();
        let of_newer = sums(&f);
        script.open();
        older.join().unwrap().unwrap_err();
        assert!(sums(&f) == of_newer, "they are of what is there");
        assert!(f.read(&newer, 0, LEN) == pattern(2, LEN));
        newer.close(LIMIT).unwrap();
    });
    f.run(engine.close());
    let report = check(&f, &Request::with_data());
    assert!(
        report.is_clean() && report.unverified_bytes == Some(0),
        "{report:#?}"
    );
}

/// Keys that may not write check values.
#[derive(Debug)]
struct Forbidden;

#[derive(Debug)]
struct IsForbidden;

impl Storable for IsForbidden {
    type Storer = StoreReplace<Self>;
}

impl Intercept for Forbidden {
    fn name(&self) -> &'static str {
        "forbidden"
    }

    fn modify_before_transmit(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request_mut();
        if request.method() == "PUT" && request.uri().contains("/sums/") {
            divert(request)?;
            bag.interceptor_state().store_put(IsForbidden);
        }
        Ok(())
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if bag.load::<IsForbidden>().is_some() {
            bag.interceptor_state().unset::<IsForbidden>();
            *context.response_mut() = refusal(403, "AccessDenied")?;
        }
        Ok(())
    }
}

#[test]
fn who_may_not_write_check_values_publishes_without_them() {
    let mut f = Fixture::new();
    f.create(16 << 20, 4096);
    f.store_options.hook = Hook::new(Forbidden);
    let volume = f.open();
    volume.write(0, &pattern(1, LEN), true).unwrap();
    volume.close(LIMIT).unwrap();
    f.store_options.hook = Hook::default();
    assert!(f.meta_objects("sums/").is_empty());
    let volume = f.open();
    assert!(f.read(&volume, 0, LEN) == pattern(1, LEN));
    volume.close(LIMIT).unwrap();
}

#[test]
fn damaged_check_values_hinder_nobody() {
    let f = Fixture::new();
    f.create(16 << 20, 4096);
    let volume = f.open();
    volume.write(0, &pattern(1, LEN), true).unwrap();
    volume.close(LIMIT).unwrap();
    let store = f.store().unwrap();
    let key = store.meta_key(&format!("sums/{OBJECT}"));
    for damaged in [&b"{"[..], b"", &[0xFF; 4096]] {
        f.run(store.put(&key, damaged.to_vec())).unwrap();
        let volume = f.open();
        assert!(f.read(&volume, 0, LEN) == pattern(1, LEN));
        // And what is published upon its index.
        volume.write(4096, &pattern(1, LEN)[4096..8192], true).unwrap();
        volume.close(LIMIT).unwrap();
    }
}
