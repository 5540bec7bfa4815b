//! A volume, and two generations for it whose publishes overlap.

use std::ops::Range;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::{BoxFuture, Either, select};
use hypernbd_volume::base::checkpoint_id::Checkpoint;
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Beside, Engine, NextMayBegin};
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::options::ReadCacheConfig;
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;
use hypernbd_volume::{VolumeError, store};
use tokio::sync::oneshot;

use crate::faults::{LIMIT, Script, Step, Write, judged};
use crate::fixture::{Fixture, pattern};

pub const MIB: usize = 1 << 20;
pub const SIZE: usize = 32 * MIB;
/// What the two publishes write: each enough to go beside another, with blocks that both write.
const FIRST: Range<usize> = 0..17 * MIB;
const SECOND: Range<usize> = 8 * MIB..25 * MIB;
/// What is there before: within the first's alone, within both, within the second's alone, in neither.
const BEFORE: [usize; 4] = [MIB, 10 * MIB, 20 * MIB, 30 * MIB];

pub type Published = Result<Option<Checkpoint>, VolumeError>;

pub struct Pair {
    pub fixture: Fixture,
    pub script: Arc<Script>,
    pub engine: Arc<HyperEngine>,
    /// What is published.
    pub model: Vec<u8>,
    /// The newest checkpoint.
    pub cno: u64,
}

impl Pair {
    pub fn new(block_size: u32) -> Self {
        Self::with_cache(block_size, 0)
    }

    /// A volume with something in it, and an engine that knows nothing of it yet.
    pub fn with_cache(block_size: u32, cache_bytes: u64) -> Self {
        let fixture = Fixture::new();
        fixture.create(SIZE as u64, block_size);
        // There was an owner before.
        fixture.open().close(LIMIT).unwrap();
        let script = Arc::<Script>::default();
        let mut model = vec![0; SIZE];
        let published = fixture.run(async {
            let engine = open(&fixture).await;
            let mut before = Generation::new(engine.geometry());
            for at in BEFORE {
                let data = pattern(at as u64, MIB);
                before.write(PreparedWrite::new(engine.geometry(), at as u64, &data));
                model[at..at + MIB].copy_from_slice(&data);
            }
            let published = engine
                .publish(Arc::new(Frozen::new(before)), Beside::default())
                .await;
            engine.close().await;
            published.unwrap().unwrap()
        });
        let engine = fixture.run(async {
            let config = ReadCacheConfig {
                memory_bytes: cache_bytes,
                disk: None,
            };
            let store = store::connect(&fixture.url, &fixture.store_options)
                .await
                .unwrap();
            let store = judged(store, script.clone());
            let cache = ReadCache::open(&config, None).await;
            HyperEngine::open(&store, IndexCache::default(), cache, false)
                .await
                .unwrap()
                .0
        });
        Self {
            fixture,
            script,
            engine: Arc::new(engine),
            model,
            cno: published.id.cno,
        }
    }

    /// A generation that writes `range`, and the model with it.
    pub fn generation(&self, seed: u64, range: Range<usize>, model: &mut [u8]) -> Arc<Frozen> {
        let data = pattern(seed, range.len());
        let mut generation = Generation::new(self.engine.geometry());
        generation.write(PreparedWrite::new(
            self.engine.geometry(),
            range.start as u64,
            &data,
        ));
        model[range].copy_from_slice(&data);
        Arc::new(Frozen::new(generation))
    }

    /// The two generations, and what is there once the first of them is published, and once both are.
    pub fn generations(&self) -> ([Arc<Frozen>; 2], [Vec<u8>; 2]) {
        let mut model = self.model.clone();
        let first = self.generation(101, FIRST, &mut model);
        let with_first = model.clone();
        let second = self.generation(102, SECOND, &mut model);
        ([first, second], [with_first, model])
    }

    /// A write of the first checkpoint that comes now, or of the second, and so on.
    pub fn write_of(&self, which: u64, step: Step) -> Write {
        let object = format!("{:010}.0", self.cno + which);
        Write { object, step }
    }

    pub async fn contents(&self) -> Vec<u8> {
        let mut out = vec![0xEE; SIZE];
        self.engine.read(0, &mut out).await.unwrap();
        out
    }

    /// What a server that opens the volume now finds.
    pub fn contents_elsewhere(&self) -> Vec<u8> {
        self.fixture.run(async {
            let engine = open(&self.fixture).await;
            let mut out = vec![0xEE; SIZE];
            engine.read(0, &mut out).await.unwrap();
            engine.close().await;
            out
        })
    }
}

pub async fn open(fixture: &Fixture) -> HyperEngine {
    let store = store::connect(&fixture.url, &fixture.store_options)
        .await
        .unwrap();
    let opened = HyperEngine::open(&store, IndexCache::default(), ReadCache::none(), false).await;
    opened.unwrap().0
}

pub fn inode() -> Write {
    Write {
        object: "inode".into(),
        step: Step::Whole,
    }
}

pub fn beside(next: NextMayBegin) -> Beside {
    Beside {
        next: Some(next),
        ..Beside::default()
    }
}

/// Publishes, up to where the next may begin.
pub async fn begin(engine: &HyperEngine, frozen: Arc<Frozen>) -> BoxFuture<'_, Published> {
    let (next, may_begin) = oneshot::channel();
    let publish = engine.publish(frozen, beside(next));
    match select(publish, may_begin).await {
        Either::Right((Ok(()), publish)) => publish,
        Either::Right((Err(_), _)) => panic!("the next may not begin"),
        Either::Left((ended, mut may_begin)) => match may_begin.try_recv() {
            // Both came while this thread was held up.
            Ok(()) => std::future::ready(ended).boxed(),
            Err(_) => panic!("it ended before the next may begin: {ended:?}"),
        },
    }
}

/// Publishes the second as soon as it may begin, and looks that they end in their order.
pub async fn publish_both(engine: &HyperEngine, [first, second]: [Arc<Frozen>; 2]) -> (Published, Published) {
    let first = begin(engine, first).await;
    let second = engine.publish(second, beside(oneshot::channel().0));
    match select(first, second).await {
        Either::Left((first, second)) => (first, second.await),
        Either::Right((second, first)) => {
            let first = first.now_or_never();
            (first.expect("the first has ended when the second has"), second)
        }
    }
}

pub fn cno(published: &Published) -> u64 {
    published.as_ref().unwrap().unwrap().id.cno
}
