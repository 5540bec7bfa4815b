use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::*;
use crate::read::cache_config::ReadCacheConfig;

/// An object with computable bytes. It counts its fetches, and can make them wait.
struct Pattern {
    fetches: Arc<AtomicUsize>,
    bytes: Arc<AtomicU64>,
    door: Arc<Semaphore>,
    fail: Arc<AtomicUsize>,
}

fn byte(object: u64, at: u64) -> u8 {
    (object.wrapping_mul(251) + at.wrapping_mul(31) + (at >> 12)) as u8
}

#[async_trait]
impl ObjectSource for Pattern {
    async fn read(&self, object: u64, offset_bytes: u64, len_bytes: u64) -> Result<Frames, VolumeError> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        self.bytes.fetch_add(len_bytes, Ordering::SeqCst);
        self.door.acquire().await.unwrap().forget();
        self.door.add_permits(1);
        if self
            .fail
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
            .is_ok()
        {
            return Err(VolumeError::Internal("told to fail".into()));
        }
        Ok((offset_bytes..offset_bytes + len_bytes)
            .map(|at| byte(object, at))
            .collect())
    }
}

struct Fixture {
    reader: Arc<Reader>,
    fetches: Arc<AtomicUsize>,
    bytes: Arc<AtomicU64>,
    door: Arc<Semaphore>,
    fail: Arc<AtomicUsize>,
}

async fn fixture(memory_bytes: u64, block_size: u32, is_open: bool) -> Fixture {
    let config = ReadCacheConfig {
        memory_bytes,
        disk: None,
    };
    let cache = ReadCache::open(&config, None).await;
    let door = Arc::new(Semaphore::new(usize::from(is_open)));
    let (fetches, bytes, fail) = (Arc::default(), Arc::default(), Arc::default());
    let source = Pattern {
        fetches: Arc::clone(&fetches),
        bytes: Arc::clone(&bytes),
        door: door.clone(),
        fail: Arc::clone(&fail),
    };
    Fixture {
        reader: Arc::new(Reader::new(source, cache, block_size)),
        fetches,
        bytes,
        door,
        fail,
    }
}

fn stored(object: u64, run: Range<u64>, wanted: Range<u64>) -> Stored {
    Stored { object, run, wanted }
}

async fn read(reader: &Reader, stored: Stored) -> Vec<u8> {
    let mut out = vec![0; len(&stored.wanted)];
    let (object, wanted) = (stored.object, stored.wanted.clone());
    reader
        .read(vec![(stored, &mut out)], Class::Foreground)
        .await
        .unwrap();
    let expected: Vec<u8> = wanted.map(|at| byte(object, at)).collect();
    assert!(out == expected);
    out
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_part_of_any_run_is_read_right_with_and_without_a_cache() {
    for memory_bytes in [0, 16 << 20] {
        for block_size in [4096, 65536] {
            let f = fixture(memory_bytes, block_size, true).await;
            let run = 8192..8192 + 3 * u64::from(block_size) + 700;
            for (from, to) in [
                (0, 1),
                (4095, 4097),
                (0, len(&run)),
                (12_000, 12_288),
                (len(&run) - 5, len(&run)),
            ] {
                let wanted = run.start + from as u64..run.start + to as u64;
                for _ in 0..2 {
                    read(&f.reader, stored(3, run.clone(), wanted.clone())).await;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_is_in_memory_and_neighbours_come_in_one_fetch() {
    let f = fixture(16 << 20, 4096, true).await;
    let run = 0..4 << 20;
    read(&f.reader, stored(1, run.clone(), 100..1_000_000)).await;
    assert_eq!(f.fetches.load(Ordering::SeqCst), 1);
    let mut out = vec![0; 500_000];
    assert!(
        f.reader
            .read_at_once(&stored(1, run.clone(), 5000..505_000), &mut out)
    );
    assert!(out.iter().zip(5000..).all(|(b, at)| *b == byte(1, at)));
    assert!(
        !f.reader
            .read_at_once(&stored(1, run.clone(), 999_000..1_100_000), &mut vec![0; 101_000])
    );
    assert!(
        !f.reader.read_at_once(&stored(2, run, 5000..5001), &mut [0]),
        "another object"
    );
    assert_eq!(f.fetches.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_small_read_of_a_large_block_fetches_a_page_and_not_the_block() {
    let f = fixture(16 << 20, 512 << 10, true).await;
    read(&f.reader, stored(1, 0..512 << 10, 100_000..104_096)).await;
    assert_eq!(f.bytes.load(Ordering::SeqCst), 16 << 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_the_same_bytes_share_a_fetch_even_without_a_cache() {
    let f = fixture(0, 4096, false).await;
    let mut readers: Vec<_> = (0..20u64)
        .map(|i| {
            let reader = f.reader.clone();
            // The ranges overlap but are not equal.
            let wanted = i * 10..40_000 - i * 10;
            Box::pin(async move { read(&reader, stored(1, 0..1 << 20, wanted)).await })
        })
        .collect();
    // All of them wait before the first fetch ends.
    for reader in &mut readers {
        assert!(futures::poll!(reader).is_pending());
    }
    f.door.add_permits(20);
    for reader in readers {
        reader.await;
    }
    assert_eq!(f.fetches.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_fetch_is_an_error_and_the_next_read_tries_again() {
    let f = fixture(16 << 20, 4096, true).await;
    f.fail.store(1, Ordering::SeqCst);
    let mut out = vec![0; 10];
    let failed = f
        .reader
        .read(vec![(stored(1, 0..4096, 0..10), &mut out)], Class::Foreground)
        .await;
    assert!(failed.unwrap_err().to_string().contains("told to fail"));
    read(&f.reader, stored(1, 0..4096, 0..10)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bringing_near_and_keeping_spare_the_fetch() {
    let f = fixture(16 << 20, 4096, true).await;
    f.reader
        .bring(vec![stored(1, 0..1 << 20, 0..300_000)])
        .await
        .unwrap();
    let fetches = f.fetches.load(Ordering::SeqCst);
    read(&f.reader, stored(1, 0..1 << 20, 0..300_000)).await;
    assert_eq!(f.fetches.load(Ordering::SeqCst), fetches);
    let kept: Vec<u8> = (4096..12_288 + 500).map(|at| byte(9, at)).collect();
    f.reader.keep(&stored(9, 4096..12_788, 4096..12_788), &kept);
    read(&f.reader, stored(9, 4096..12_788, 5000..12_788)).await;
    assert_eq!(f.fetches.load(Ordering::SeqCst), fetches);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_request_is_asked_again_and_the_faster_answer_taken() {
    struct Slow(AtomicUsize);
    #[async_trait]
    impl ObjectSource for Slow {
        async fn read(&self, _: u64, _: u64, len_bytes: u64) -> Result<Frames, VolumeError> {
            // The 100th fetch never ends.
            if self.0.fetch_add(1, Ordering::SeqCst) == 99 {
                std::future::pending::<()>().await;
            }
            Ok(vec![7; len_bytes as usize].into())
        }
    }
    let reader = Reader::new(Slow(AtomicUsize::new(0)), ReadCache::none(), 4096);
    let all = async {
        for i in 0..150 {
            let mut out = [0];
            let at = i * 4096;
            reader
                .read(
                    vec![(stored(1, at..at + 4096, at..at + 1), &mut out)],
                    Class::Foreground,
                )
                .await
                .unwrap();
            assert_eq!(out, [7]);
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all)
        .await
        .expect("the second request was answered");
}

/// Blocks of a volume that was changed often: neighbours in the volume are in several objects, in each of them in order
/// and nearly adjacent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lies_near_each_other_in_the_store_comes_in_one_fetch_an_object() {
    for memory_bytes in [0, 16 << 20] {
        for class in [Class::Foreground, Class::Background] {
            let f = fixture(memory_bytes, 4096, true).await;
            let block = |i: u64| {
                let (object, at) = (i % 3, i / 3 * 2 * 4096);
                stored(object, at..at + 4096, at + 7..at + 4096)
            };
            let wanted: Vec<Stored> = (0..60).map(block).collect();
            let mut out = vec![vec![0; 4096 - 7]; wanted.len()];
            let pieces = wanted.iter().cloned().zip(out.iter_mut().map(Vec::as_mut_slice));
            f.reader.read(pieces.collect(), class).await.unwrap();
            for (stored, out) in wanted.iter().zip(&out) {
                let expected = stored.wanted.clone().map(|at| byte(stored.object, at));
                assert!(expected.eq(out.iter().copied()), "{stored:?}");
            }
            assert_eq!(f.fetches.load(Ordering::SeqCst), 3);
            assert_eq!(
                f.bytes.load(Ordering::SeqCst),
                3 * (20 + 19) * 4096,
                "with the gaps"
            );
            let is_kept = |stored: &Stored| f.reader.read_at_once(stored, &mut vec![0; len(&stored.wanted)]);
            let is_cached = memory_bytes > 0 && class == Class::Foreground;
            assert!(wanted.iter().all(|stored| is_kept(stored) == is_cached));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_that_are_on_their_way_are_not_fetched_again_with_their_neighbours() {
    let f = fixture(0, 4096, false).await;
    let page = |i: u64| stored(1, i * 4096..(i + 1) * 4096, i * 4096..(i + 1) * 4096);
    let (reader, one) = (f.reader.clone(), page(1));
    let first = tokio::spawn(async move { read(&reader, one).await });
    while f.fetches.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let reader = f.reader.clone();
    let second = tokio::spawn(async move {
        let mut out = vec![vec![0; 4096]; 3];
        let pieces = (0..3).map(page).zip(out.iter_mut().map(Vec::as_mut_slice));
        reader.read(pieces.collect(), Class::Foreground).await.unwrap();
        out.concat()
    });
    while f.fetches.load(Ordering::SeqCst) == 1 {
        tokio::task::yield_now().await;
    }
    f.door.add_permits(1);
    first.await.unwrap();
    let out = second.await.unwrap();
    assert!(out.iter().zip(0..).all(|(b, at)| *b == byte(1, at)));
    assert_eq!(f.fetches.load(Ordering::SeqCst), 2);
}
