use std::fs;

use super::*;
use crate::disk::tests::{Lack, Lacking};

const MIB: u64 = 1 << 20;

fn key(n: u64) -> PageKey {
    PageKey {
        root: RootId::default(),
        object: 7 << 32,
        offset_bytes: n * 4096,
    }
}

fn id(number: u128) -> VolumeId {
    VolumeId::from_uuid(uuid::Uuid::from_u128(number))
}

fn at(cno: u64) -> CheckpointId {
    CheckpointId {
        cno,
        check: crate::base::checkpoint_id::InodeCheck::from_bits(cno),
    }
}

fn page(n: u64) -> Vec<u8> {
    (0..4096u64).map(|i| (n * 31 + i) as u8).collect()
}

fn config(dir: &Path) -> ReadCacheConfig {
    ReadCacheConfig {
        memory_bytes: MIB,
        disk: Some(ReadCacheDisk {
            dir: dir.to_owned(),
            size_bytes: 64 * MIB,
        }),
    }
}

/// Waits until what was inserted is on the disk.
async fn written(cache: &ReadCache) {
    cache.pages().unwrap().storage().wait().await;
}

/// Fills far more than memory holds and waits until it is on the disk.
async fn fill(cache: &ReadCache, count: u64) {
    for n in 0..count {
        cache.insert(key(n), page(n).to_vec());
        if n % 256 == 255 {
            written(cache).await;
        }
    }
    written(cache).await;
}

async fn hits(cache: &ReadCache, count: u64) -> u64 {
    let mut hits = 0;
    for n in 0..count {
        if let Some(found) = cache.load(key(n), <[u8]>::to_vec).await {
            assert!(found == page(n), "page {n} is wrong");
            hits += 1;
        }
    }
    hits
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_bounded_and_the_disk_holds_the_rest_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let cache = ReadCache::open(&config(dir.path()), Some(id(1))).await;
    fill(&cache, 2000).await;
    let in_memory = (0..2000)
        .filter(|&n| cache.with(key(n), |_| ()).is_some())
        .count();
    assert!(
        (1..=256).contains(&in_memory),
        "{in_memory} pages of 4 KiB in 1 MiB"
    );
    assert!(hits(&cache, 2000).await > 1800);
    cache.close(at(1)).await;
    drop(cache);
    let again = ReadCache::open(&config(dir.path()), Some(id(1))).await;
    assert!(again.has_disk());
    assert!(hits(&again, 2000).await > 1800, "warm after a restart");
    let other = ReadCache::open(&config(dir.path()), Some(id(2))).await;
    assert_eq!(hits(&other, 2000).await, 0, "another volume");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_emptied_cache_holds_nothing_in_memory_or_on_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let cache = ReadCache::open(&config(dir.path()), Some(id(1))).await;
    fill(&cache, 2000).await;
    cache.close(at(4)).await;
    drop(cache);
    let again = ReadCache::open(&config(dir.path()), Some(id(1))).await;
    assert_eq!(again.found(), Some(at(4)));
    again.clear().await.unwrap();
    assert_eq!(hits(&again, 2000).await, 0);
    fill(&again, 2000).await;
    assert!(hits(&again, 2000).await > 1800, "it goes on");
}

/// A unit of the disk that is filled again exactly up to where an old run of pages begins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_emptied_does_not_come_back_behind_what_is_new() {
    // As many as foyer writes below one index.
    const RUN_PAGES: u64 = 170;
    const OLD_PAGES: u64 = 1500;
    let dir = tempfile::tempdir().unwrap();
    let open = async || ReadCache::open(&config(dir.path()), Some(id(1))).await;
    let cache = open().await;
    fill(&cache, OLD_PAGES).await;
    cache.close(at(4)).await;
    drop(cache);

    // This server ends before it has kept anything.
    let cache = open().await;
    cache.clear().await.unwrap();
    cache.close(at(3)).await;
    drop(cache);

    let other = |n: u64| -> Vec<u8> { page(n).iter().map(|byte| !byte).collect() };
    let cache = open().await;
    assert_eq!(cache.found(), Some(at(3)));
    for n in 0..RUN_PAGES {
        cache.insert(key(n), other(n));
    }
    written(&cache).await;
    cache.close(at(3)).await;
    drop(cache);

    let cache = open().await;
    let mut found = 0;
    for n in 0..OLD_PAGES {
        if let Some(bytes) = cache.load(key(n), <[u8]>::to_vec).await {
            assert!(n < RUN_PAGES && bytes == other(n), "page {n} of before");
            found += 1;
        }
    }
    assert!(found > 0, "what is new is kept");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_in_use_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let first = ReadCache::open(&config(dir.path()), Some(id(1))).await;
    let second = ReadCache::open(&config(dir.path()), Some(id(1))).await;
    assert!(first.has_disk() && !second.has_disk());
    second.insert(key(1), page(1).to_vec());
    assert_eq!(
        second.load(key(1), <[u8]>::to_vec).await,
        Some(page(1)),
        "in memory"
    );
    first.close(at(1)).await;
    assert!(ReadCache::open(&config(dir.path()), Some(id(1))).await.has_disk());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_on_the_disk_costs_misses_and_no_wrong_byte() {
    let dir = tempfile::tempdir().unwrap();
    let cache = ReadCache::open(&config(dir.path()), Some(id(1))).await;
    fill(&cache, 2000).await;
    cache.close(at(1)).await;
    drop(cache);
    let mut damaged = 0;
    for file in fs::read_dir(dir.path().join(id(1).to_string()).join(PAGES_NAME)).unwrap() {
        let path = file.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        for at in (0..bytes.len()).step_by(10_007) {
            bytes[at] ^= 0x55;
            damaged += 1;
        }
        fs::write(&path, bytes).unwrap();
    }
    assert!(damaged > 100);
    // This asserts for every page that is found that its bytes are right.
    let again = ReadCache::open(&config(dir.path()), Some(id(1))).await;
    assert!(hits(&again, 2000).await < 2000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_cannot_be_used_leaves_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join(id(1).to_string()),
        "a file where a directory should be",
    )
    .unwrap();
    let cache = ReadCache::open(&config(dir.path()), Some(id(1))).await;
    assert!(!cache.has_disk());
    cache.insert(key(3), page(3).to_vec());
    assert_eq!(cache.with(key(3), <[u8]>::to_vec), Some(page(3)));
    let none = ReadCache::none();
    none.insert(key(3), page(3).to_vec());
    assert_eq!(none.with(key(3), <[u8]>::to_vec), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_whose_locks_exclude_nobody_is_gone_without() {
    let dir = tempfile::tempdir().unwrap();
    for lack in [Lack::Exclusion, Lack::Locks] {
        let cache = ReadCache::open_on(&config(dir.path()), Some(id(1)), &Lacking(lack)).await;
        assert!(!cache.has_disk(), "{lack:?}");
        cache.insert(key(1), page(1));
        assert!(cache.with(key(1), |_| ()).is_some(), "{lack:?}: in memory");
    }
}

/// Clones have other bytes under the same numbers.
#[tokio::test(flavor = "multi_thread")]
async fn a_page_is_of_one_container() {
    let config = ReadCacheConfig {
        memory_bytes: 1 << 20,
        disk: None,
    };
    let cache = ReadCache::open(&config, None).await;
    let of = |root: u128| PageKey {
        root: RootId(root),
        ..key(1)
    };
    cache.insert(of(1), vec![1; 4096]);
    assert_eq!(cache.with(of(1), |page| page[0]), Some(1));
    assert_eq!(cache.with(of(2), |page| page[0]), None);
    let mut written = Vec::new();
    of(2).encode(&mut written).unwrap();
    assert_eq!(written.len(), of(2).estimated_size());
    assert_eq!(PageKey::decode(&mut written.as_slice()).unwrap(), of(2));
}

/// Of a checkpoint that the disk does not record yet nothing is kept, in memory neither: what is there goes on to the disk.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_a_checkpoint_are_kept_once_it_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let cache = ReadCache::open(&config(dir.path()), Some(id(1))).await;
    let of = |cno: u64| PageKey {
        object: crate::format::object_names::of_name(&format!("{cno:010}.0")).unwrap(),
        ..key(1)
    };
    cache.note_checkpoint(at(3));
    cache.insert(of(3), page(1));
    cache.insert(of(4), page(2));
    written(&cache).await;
    assert!(cache.load(of(3), <[u8]>::to_vec).await.is_some());
    assert!(cache.load(of(4), <[u8]>::to_vec).await.is_none(), "not noted");
    cache.note_checkpoint(at(4));
    cache.insert(of(4), page(2));
    assert!(cache.load(of(4), <[u8]>::to_vec).await.is_some());
}
