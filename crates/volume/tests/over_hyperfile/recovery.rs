//! Failed and ambiguous publishes against the real engine: requests that are refused, and requests that are carried
//! out though their answer is lost, at each of the two objects a publish writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::faults::{Policy, Verdict, Write, judged};
use crate::fixture::{Fixture, pattern};
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::meta::checkpoint_list::NoRecorder;
use hypernbd_volume::options::VolumeOptions;
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::{ErrorKind, Volume, store};

/// How many of the coming writes of each object fail, before and after they are carried out.
#[derive(Debug, Default)]
struct Faults {
    inode_refused: AtomicU32,
    inode_lost: AtomicU32,
    segment_refused: AtomicU32,
    segment_lost: AtomicU32,
    met: AtomicU32,
}

impl Faults {
    fn take(&self, counter: &AtomicU32) -> bool {
        let taken = counter
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
            .is_ok();
        if taken {
            self.met.fetch_add(1, Ordering::SeqCst);
        }
        taken
    }
}

impl Policy for Faults {
    fn judge(&self, write: &Write) -> Verdict {
        let (refused, lost) = if write.is_inode() {
            (&self.inode_refused, &self.inode_lost)
        } else {
            (&self.segment_refused, &self.segment_lost)
        };
        if self.take(refused) {
            Verdict::Refused
        } else if self.take(lost) {
            Verdict::Lost
        } else {
            Verdict::Pass
        }
    }
}

struct Faulty {
    fixture: Fixture,
    faults: Arc<Faults>,
}

impl Faulty {
    fn new(block_size: u32) -> Self {
        let fixture = Fixture::new();
        fixture.create(64 << 20, block_size);
        Self {
            fixture,
            faults: Arc::default(),
        }
    }

    /// Opens the volume through the faults. No checkpoints but those the test asks for.
    fn open(&self, io_timeout: Duration) -> Volume {
        let f = &self.fixture;
        f.run(async {
            let store = store::connect(&f.url, &f.store_options).await.unwrap();
            let store = judged(store, self.faults.clone());
            let (engine, _) = HyperEngine::open(&store, IndexCache::default(), ReadCache::none(), false)
                .await
                .unwrap();
            let checkpoint_interval = Duration::from_secs(3600);
            let options = VolumeOptions {
                checkpoint_interval,
                io_timeout,
                ..VolumeOptions::default()
            };
            Volume::over(Arc::new(engine), Arc::new(NoRecorder), &options)
        })
    }
}

/// Writes, meets the fault in a flush, and finds everything there: through this server, and through the next.
fn survives(set: impl Fn(&Faults), block_size: u32) {
    let t = Faulty::new(block_size);
    let volume = t.open(Duration::from_secs(60));
    let mut model = vec![0u8; 64 << 20];
    for round in 0..4u64 {
        // Enough for an upload in pieces in one round, a single object in the others.
        let len = if round == 2 { 24 << 20 } else { 100_001 };
        let at = (round * 3_000_001) as usize;
        let data = pattern(round + 1, len);
        volume.write(at as u64, &data, false).unwrap();
        model[at..at + len].copy_from_slice(&data);
        volume.trim(32 << 20, 1 << 20, false).unwrap();
        model[32 << 20..33 << 20].fill(0);
        set(&t.faults);
        volume.flush().unwrap();
        assert!(
            t.fixture.read(&volume, 0, 64 << 20) == model,
            "round {round}: through this server"
        );
        let next = t.fixture.open_read_only();
        assert!(
            t.fixture.read(&next, 0, 64 << 20) == model,
            "round {round}: what was flushed is published"
        );
    }
    assert!(t.faults.met.load(Ordering::SeqCst) >= 4, "the faults were met");
    volume.close(Duration::from_secs(30)).unwrap();
    assert!(t.fixture.read(&t.fixture.open(), 0, 64 << 20) == model);
}

#[test]
fn the_inode_is_refused() {
    survives(|f| f.inode_refused.store(1, Ordering::SeqCst), 4096);
}

#[test]
fn the_inodes_answer_is_lost() {
    survives(|f| f.inode_lost.store(1, Ordering::SeqCst), 4096);
}

#[test]
fn the_segment_is_refused() {
    survives(|f| f.segment_refused.store(1, Ordering::SeqCst), 65536);
}

#[test]
fn the_segments_answer_is_lost() {
    survives(|f| f.segment_lost.store(1, Ordering::SeqCst), 4096);
}

#[test]
fn everything_fails_a_few_times() {
    let all = |f: &Faults| {
        f.segment_lost.store(1, Ordering::SeqCst);
        f.inode_lost.store(1, Ordering::SeqCst);
        f.inode_refused.store(1, Ordering::SeqCst);
    };
    survives(all, 16384);
}

#[test]
fn a_flush_that_cannot_be_done_in_time_fails_keeps_the_data_and_is_made_good_by_the_next() {
    let t = Faulty::new(4096);
    let f = &t.fixture;
    let volume = t.open(Duration::from_millis(300));
    volume.write(0, &pattern(1, 4096), false).unwrap();
    t.faults.segment_refused.store(u32::MAX, Ordering::SeqCst);
    assert_eq!(volume.flush().unwrap_err().kind(), ErrorKind::Timeout);
    assert!(f.read(&volume, 0, 4096) == pattern(1, 4096), "kept and readable");
    volume.write(4096, &pattern(2, 4096), false).unwrap();
    assert_eq!(
        volume.flush().unwrap_err().kind(),
        ErrorKind::Timeout,
        "never reported as success"
    );
    t.faults.segment_refused.store(0, Ordering::SeqCst);
    // The attempt under way may need longer than this short time-out to end.
    let flushed = (0..100).any(|_| volume.flush().is_ok());
    assert!(flushed);
    let next = f.open_read_only();
    assert!(f.read(&next, 0, 4096) == pattern(1, 4096));
    assert!(f.read(&next, 4096, 4096) == pattern(2, 4096));
}
