//! A store that answers one server's uploads with 503 while another server takes the volume over (Invariant O1). The
//! engine's own flush tries such a publish again, upon whatever inode is stored by then.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextMut, BeforeTransmitInterceptorContextMut,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Beside, Engine};
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;
use hypernbd_volume::{ErrorKind, store};

use crate::faults::{BoxError, LIMIT, divert, refusal};
use crate::fixture::{Fixture, pattern};

const SIZE: u64 = (1 << 20) + 512;

/// Answers every write of a segment with 503, and keeps it from the store, while told to.
#[derive(Debug, Default)]
struct Busy {
    is_on: AtomicBool,
    met: AtomicUsize,
}

#[derive(Debug)]
struct BusyStore(Arc<Busy>);

#[derive(Debug)]
struct IsRefused;

impl Storable for IsRefused {
    type Storer = StoreReplace<Self>;
}

impl Intercept for BusyStore {
    fn name(&self) -> &'static str {
        "busy-store"
    }

    fn modify_before_transmit(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request_mut();
        let path = request.uri().split('?').next().unwrap_or_default().to_owned();
        let is_segment = !path.ends_with("/inode") && !path.contains(".meta/");
        if !is_segment || !matches!(request.method(), "PUT" | "POST") || !self.0.is_on.load(Ordering::SeqCst)
        {
            return Ok(());
        }
        self.0.met.fetch_add(1, Ordering::SeqCst);
        bag.interceptor_state().store_put(IsRefused);
        divert(request)
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if bag.load::<IsRefused>().is_some() {
            bag.interceptor_state().unset::<IsRefused>();
            *context.response_mut() = refusal(503, "SlowDown")?;
        }
        Ok(())
    }
}

#[test]
fn an_upload_that_was_answered_503_is_not_published_over_the_next_owners_checkpoint() {
    let f = Fixture::new();
    f.create(SIZE, 4096);
    let before = f.open();
    // What the first one writes is mapped already: else its engine finds no place for it in another writer's index.
    for (at, len) in [(0, 4096), (8192, 4096), (SIZE - 512, 512)] {
        before.write(at, &pattern(1, len), false).unwrap();
    }
    before.flush().unwrap();
    before.close(LIMIT).unwrap();

    let busy = Arc::<Busy>::default();
    let first = f.run(async {
        let mut store = store::connect(&f.url, &f.store_options).await.unwrap();
        let config = store.client.config().to_builder();
        store.client = aws_sdk_s3::Client::from_conf(config.interceptor(BusyStore(busy.clone())).build());
        let opened = HyperEngine::open(&store, IndexCache::default(), ReadCache::none(), false).await;
        Arc::new(opened.unwrap().0)
    });
    // Whole blocks, and the last one, which is short and so is written by value.
    let mut generation = Generation::new(first.geometry());
    for (at, len) in [(8192, 4096), (SIZE - 512, 512)] {
        generation.write(PreparedWrite::new(first.geometry(), at, &pattern(2, len)));
    }
    busy.is_on.store(true, Ordering::SeqCst);
    let publishing = std::thread::scope(|scope| {
        let publishing =
            scope.spawn(|| f.run(first.publish(Arc::new(Frozen::new(generation)), Beside::default())));
        let started = Instant::now();
        while busy.met.load(Ordering::SeqCst) == 0 {
            assert!(started.elapsed() < LIMIT, "nothing was uploaded");
            std::thread::sleep(Duration::from_millis(5));
        }
        let second = f.open();
        second.write(4096, &pattern(3, 4096), false).unwrap();
        second.write(SIZE - 512, &pattern(4, 512), true).unwrap();
        busy.is_on.store(false, Ordering::SeqCst);
        let published = publishing.join().unwrap();
        // Nothing more to publish: the lease alone is given back.
        second.close(LIMIT).unwrap();
        published
    });
    assert!(
        publishing.is_err(),
        "the first one's publish was answered with success"
    );
    let recovered = f.run(first.recover()).unwrap_err();
    assert_eq!(recovered.kind(), ErrorKind::Fenced, "{recovered}");
    f.run(first.close());

    let third = f.open();
    for (at, seed, len) in [
        (0, 1, 4096),
        (4096, 3, 4096),
        (8192, 1, 4096),
        (SIZE - 512, 4, 512),
    ] {
        assert!(f.read(&third, at, len) == pattern(seed, len), "at {at}");
    }
}
