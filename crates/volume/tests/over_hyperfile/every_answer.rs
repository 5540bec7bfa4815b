//! Every answer to every write of a publish, with another server's takeover in between or without: no acknowledged flush
//! is lost, and the older owner acknowledges none that the new one does not have (Invariants W4 and O1).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextMut, BeforeTransmitInterceptorContextMut,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Beside, Engine};
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::lease::Lease;
use hypernbd_volume::options::LeaseOptions;
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;
use hypernbd_volume::{ErrorKind, Volume, admin, store};
use parking_lot::Mutex;

use crate::faults::{BoxError, LIMIT, divert, refusal};
use crate::fixture::{Fixture, pattern};

/// Statuses with S3's codes; none is an answer that does not arrive.
const ANSWERS: [Option<(u16, &str)>; 8] = [
    Some((403, "AccessDenied")),
    Some((404, "NoSuchKey")),
    Some((409, "ConditionalRequestConflict")),
    Some((412, "PreconditionFailed")),
    Some((429, "SlowDown")),
    Some((500, "InternalError")),
    Some((503, "SlowDown")),
    None,
];
/// Whether the write is carried out, and when the volume is taken over.
const WAYS: [(bool, Takeover); 5] = [
    (false, Takeover::No),
    (true, Takeover::No),
    (false, Takeover::Before),
    (true, Takeover::After),
    (true, Takeover::Before),
];
/// More writes than a publish here has.
const WRITES_MAX: usize = 30;
const RECOVERIES_MAX: usize = 3;
const OLD: u64 = 1;
const NEW: u64 = 2;
const THEIRS: u64 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takeover {
    No,
    /// Before the request is sent.
    Before,
    /// Once it was carried out, before it is answered.
    After,
}

#[derive(Debug, Clone, Copy)]
struct Case {
    /// Which write of the publish.
    number: usize,
    answer: Option<(u16, &'static str)>,
    is_carried_out: bool,
    takeover: Takeover,
}

/// What the older owner publishes, and what the new one does.
#[derive(Debug)]
struct Shape {
    size: usize,
    ours: &'static [(usize, usize)],
    theirs: [(usize, usize); 2],
}

/// Two blocks, one of them the last, which is short and so is written by value.
const SMALL: Shape = Shape {
    size: (1 << 20) + 512,
    ours: &[(8192, 4096), (1 << 20, 512)],
    theirs: [(4096, 4096), (1 << 20, 512)],
};
/// A stream, stored in pieces beside the thread that owns the container.
const STREAM: Shape = Shape {
    size: (8 << 20) + 512,
    ours: &[(1 << 20, 6 << 20)],
    theirs: [(4096, 4096), (8 << 20, 512)],
};

/// The new owner.
struct Successor {
    volume: Arc<Volume>,
    /// What it found where the older one writes.
    found: Vec<Vec<u8>>,
}

type TakeOver = Box<dyn Fn() -> Successor + Send + Sync>;

struct Script {
    case: Case,
    asked: AtomicUsize,
    take_over: TakeOver,
    successor: Mutex<Option<Successor>>,
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.case)
    }
}

impl Script {
    fn take_over(&self) {
        let successor = tokio::task::block_in_place(|| {
            // On a thread that is not the runtime's.
            std::thread::scope(|scope| scope.spawn(|| (self.take_over)()).join().unwrap())
        });
        *self.successor.lock() = Some(successor);
    }

    fn is_met(&self) -> bool {
        self.asked.load(Ordering::SeqCst) >= self.case.number
    }
}

#[derive(Debug)]
struct Scripted(Arc<Script>);

#[derive(Debug)]
struct IsTheOne;

impl Storable for IsTheOne {
    type Storer = StoreReplace<Self>;
}

impl Intercept for Scripted {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn modify_before_transmit(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let case = self.0.case;
        let request = context.request();
        let is_publishing = matches!(request.method(), "PUT" | "POST") && !request.uri().contains(".meta/");
        if !is_publishing || self.0.asked.fetch_add(1, Ordering::SeqCst) + 1 != case.number {
            return Ok(());
        }
        if case.takeover == Takeover::Before {
            self.0.take_over();
        }
        bag.interceptor_state().store_put(IsTheOne);
        if !case.is_carried_out {
            divert(context.request_mut())?;
        }
        Ok(())
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if bag.load::<IsTheOne>().is_none() {
            return Ok(());
        }
        bag.interceptor_state().unset::<IsTheOne>();
        if self.0.case.takeover == Takeover::After {
            self.0.take_over();
        }
        let Some((status, code)) = self.0.case.answer else {
            return Err("injected: answer lost".into());
        };
        *context.response_mut() = refusal(status, code)?;
        Ok(())
    }
}

fn contents(f: &Fixture, volume: &Volume, ranges: &[(usize, usize)]) -> Vec<Vec<u8>> {
    let read = |&(at, len): &(usize, usize)| f.read(volume, at as u64, len);
    ranges.iter().map(read).collect()
}

fn patterns(seed: u64, ranges: &[(usize, usize)]) -> Vec<Vec<u8>> {
    ranges.iter().map(|&(_, len)| pattern(seed, len)).collect()
}

/// Runs the case; whether the publish had such a write.
fn is_met(shape: &'static Shape, case: Case) -> bool {
    let f = Arc::new(Fixture::new());
    f.create(shape.size as u64, 4096);
    let before = f.open();
    for (at, len) in shape.ours.iter().chain(&shape.theirs) {
        before.write(*at as u64, &pattern(OLD, *len), false).unwrap();
    }
    before.close(LIMIT).unwrap();

    let plain = f.store().unwrap();
    let volume_id = f.run(admin::info(&f.url, &f.store_options)).unwrap().volume_id;
    let take_over: TakeOver = {
        let f = f.clone();
        Box::new(move || {
            let volume = f.take_over();
            let found = contents(&f, &volume, shape.ours);
            for (at, len) in shape.theirs {
                volume.write(at as u64, &pattern(THEIRS, len), false).unwrap();
            }
            volume.flush().unwrap();
            Successor { volume, found }
        })
    };
    let script = Arc::new(Script {
        case,
        asked: AtomicUsize::new(usize::MAX / 2),
        take_over,
        successor: Mutex::default(),
    });
    let (lease, engine) = f.run(async {
        // The lease is this owner's, whoever had it; it was given back.
        let options = LeaseOptions {
            takeover: true,
            ..LeaseOptions::default()
        };
        let seen = hypernbd_volume::lease::load(&plain).await.unwrap();
        assert!(seen.is_some_and(|lease| !lease.is_held()));
        let lease = Lease::take(&plain, volume_id.unwrap(), &options, None, &mut |_| Ok(()))
            .await
            .unwrap();
        let mut store = store::connect(&f.url, &f.store_options).await.unwrap();
        let config = store.client.config().to_builder();
        store.client = aws_sdk_s3::Client::from_conf(config.interceptor(Scripted(script.clone())).build());
        let (cache, reads) = (IndexCache::default(), ReadCache::none());
        let opened = HyperEngine::open_owned(&store, cache, reads, false, lease.clone(), None).await;
        (lease, opened.unwrap().0)
    });
    let mut generation = Generation::new(engine.geometry());
    for &(at, len) in shape.ours {
        generation.write(PreparedWrite::new(
            engine.geometry(),
            at as u64,
            &pattern(NEW, len),
        ));
    }
    let generation = Arc::new(Frozen::new(generation));
    let publish = || f.run(engine.publish(generation.clone(), Beside::default()));

    script.asked.store(0, Ordering::SeqCst);
    let first = publish();
    let is_met = script.is_met();
    script.asked.store(usize::MAX / 2, Ordering::SeqCst);
    let mut is_acknowledged = first.is_ok();
    let successor = script.successor.lock().take();
    if let Some(successor) = &successor {
        let is_found = successor.found == patterns(NEW, shape.ours);
        assert!(
            is_found || successor.found == patterns(OLD, shape.ours),
            "{case:?}: neither what was there nor what was published"
        );
        assert!(
            is_found || !is_acknowledged,
            "{case:?}: acknowledged after the takeover"
        );
        for _ in 0..RECOVERIES_MAX {
            let recovered = f.run(engine.recover());
            assert_eq!(recovered.unwrap_err().kind(), ErrorKind::Fenced, "{case:?}");
            assert!(publish().is_err(), "{case:?}: acknowledged after the takeover");
        }
    }
    for _ in 0..RECOVERIES_MAX {
        if is_acknowledged || successor.is_some() {
            break;
        }
        f.run(engine.recover())
            .unwrap_or_else(|e| panic!("{case:?}: {e}"));
        is_acknowledged = publish().is_ok();
    }
    f.run(engine.close());
    let newest = match &successor {
        Some(successor) => {
            // What it has acknowledged is not touched by what came after.
            successor.volume.write(0, &pattern(THEIRS, 4096), true).unwrap();
            successor.volume.close(LIMIT).unwrap();
            f.open()
        }
        None => {
            assert!(is_acknowledged, "{case:?}: not published in the end: {first:?}");
            f.run(lease.release(true));
            f.open()
        }
    };
    match successor {
        Some(successor) => {
            assert!(
                contents(&f, &newest, &shape.theirs) == patterns(THEIRS, &shape.theirs),
                "{case:?}: what the new owner flushed is lost"
            );
            let kept: Vec<_> = shape.ours.iter().zip(&successor.found).collect();
            for (&(at, len), found) in kept {
                let is_theirs = shape.theirs.contains(&(at, len));
                assert!(
                    is_theirs || f.read(&newest, at as u64, len) == *found,
                    "{case:?}: what the new owner found is another now"
                );
            }
        }
        None => assert!(
            contents(&f, &newest, shape.ours) == patterns(NEW, shape.ours),
            "{case:?}: an acknowledged flush is lost"
        ),
    }
    newest.close(LIMIT).unwrap();
    is_met
}

/// Every write of the publish, until it has no more; how many those were.
fn every_write(
    shape: &'static Shape,
    answers: &[Option<(u16, &'static str)>],
    ways: &[(bool, Takeover)],
) -> usize {
    for number in 1..WRITES_MAX {
        for &answer in answers {
            for &(is_carried_out, takeover) in ways {
                let case = Case {
                    number,
                    answer,
                    is_carried_out,
                    takeover,
                };
                if !is_met(shape, case) {
                    return number - 1;
                }
            }
        }
    }
    panic!("more than {WRITES_MAX} writes");
}

#[test]
fn whatever_is_answered_to_a_small_publish_no_acknowledged_flush_is_lost() {
    let writes = every_write(&SMALL, &ANSWERS, &WAYS);
    assert_eq!(writes, 2, "an object and the inode");
}

#[test]
fn whatever_is_answered_to_a_stream_no_acknowledged_flush_is_lost() {
    // One that the engine would try again after, and none.
    let answers = [ANSWERS[6], None];
    let writes = every_write(&STREAM, &answers, &WAYS[..4]);
    assert!(writes >= 5, "an upload of two pieces and the inode: {writes}");
}
