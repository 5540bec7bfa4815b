//! A takeover in the middle of a recovery: the engine reads the inode twice on its way back, and writes it after that.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use hyperfile::ondisk::InodeRaw;
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Beside, Engine};
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::store::{self, ETag, Store};
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;
use hypernbd_volume::{ErrorKind, VolumeError};
use parking_lot::Mutex;

use crate::fixture::{Fixture, pattern};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Refuses segments while told to, and rewrites the inode, as a takeover does, right before one of its reads.
#[derive(Debug, Default)]
struct Race {
    segments_refused: AtomicUsize,
    /// The read of the inode, counted down, before which that happens; none at 0.
    reads_left: AtomicUsize,
    elsewhere: Mutex<Option<(Store, tokio::runtime::Handle)>>,
    made: Mutex<Option<ETag>>,
}

#[derive(Debug)]
struct Racing(Arc<Race>);

fn counted_down(counter: &AtomicUsize) -> Option<usize> {
    let before = counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    before.ok().map(|n| n - 1)
}

impl Intercept for Racing {
    fn name(&self) -> &'static str {
        "racing"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        let path = request.uri().split('?').next().unwrap_or_default();
        let is_inode = path.ends_with("/inode");
        if request.method() == "PUT" && !is_inode && counted_down(&self.0.segments_refused).is_some() {
            return Err("injected: refused".into());
        }
        if request.method() == "GET" && is_inode && counted_down(&self.0.reads_left) == Some(0) {
            let (store, runtime) = self.0.elsewhere.lock().clone().unwrap();
            let made = std::thread::spawn(move || runtime.block_on(take_over(&store)));
            *self.0.made.lock() = Some(made.join().unwrap());
        }
        Ok(())
    }
}

/// What a takeover does to the inode (`engine/fence.rs`).
async fn take_over(store: &Store) -> ETag {
    let key = store.data_key("inode");
    let (body, etag) = store.get(&key).await.unwrap().unwrap();
    let mut raw = InodeRaw::from_u8_slice(&body);
    raw.i_ctime_nsec = (raw.i_ctime_nsec + 1) % 1_000_000_000;
    let body = raw.as_u8_slice().to_vec();
    store.put_if_match(&key, body, &etag).await.unwrap()
}

/// A recovery during which somebody takes the volume over, right before this read of the inode. Returns what came of it,
/// and whether the inode is still the one that the takeover made.
fn recovers(read: usize) -> (Result<(), VolumeError>, bool) {
    let f = Fixture::new();
    f.create(1 << 20, 4096);
    let race = Arc::<Race>::default();
    let plain = f.store().unwrap();
    let engine = f.run(async {
        let mut store = store::connect(&f.url, &f.store_options).await.unwrap();
        let config = store.client.config().to_builder();
        store.client = aws_sdk_s3::Client::from_conf(config.interceptor(Racing(race.clone())).build());
        let opened = HyperEngine::open(&store, IndexCache::default(), ReadCache::none(), false).await;
        opened.unwrap().0
    });
    *race.elsewhere.lock() = Some((plain.clone(), f.run(async { tokio::runtime::Handle::current() })));
    // A number is used, and nothing stored under it: the engine moves the stored counter past it on its way back.
    race.segments_refused.store(1, Ordering::SeqCst);
    let mut generation = Generation::new(engine.geometry());
    generation.write(PreparedWrite::new(engine.geometry(), 0, &pattern(1, 4096)));
    let published = f.run(engine.publish(Arc::new(Frozen::new(generation)), Beside::default()));
    assert!(published.is_err());
    race.reads_left.store(read, Ordering::SeqCst);
    let recovered = f.run(engine.recover());
    f.run(engine.close());
    let made = race.made.lock().clone().expect("the read was met");
    let stored = f.run(plain.head(&plain.data_key("inode"))).unwrap().unwrap();
    (recovered, stored.etag == made)
}

#[test]
fn a_takeover_in_the_middle_of_a_recovery_is_never_written_over() {
    // The first read is the proof, the second and the third are the engine's.
    for read in 1..=3 {
        let (recovered, is_untouched) = recovers(read);
        assert!(
            is_untouched,
            "read {read}: the new owner's inode was written over"
        );
        let error = recovered.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Fenced, "read {read}: {error}");
    }
}
