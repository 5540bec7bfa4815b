//! The index on a local disk: a server that starts again asks the store for none of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Beside, Engine, SoleOwner};
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::options::{
    NodeCacheConfig, NodeCacheStrategy, ReadCacheConfig, ReadCacheDisk, StoreOptions, VolumeOptions,
};
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;
use hypernbd_volume::{ExtentKind, Volume, VolumeId};

use crate::faults::LIMIT;
use crate::fixture::{Fixture, pattern};
use crate::gets::Gets;

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// Several leaves of the index hold them, and an upper level leads there.
const BLOCKS: u64 = 2000;
/// They are written in so many checkpoints.
const CHECKPOINTS: u64 = 8;

/// The places of the blocks. The first block of the volume, which every opening reads, is none of them.
fn block(number: u64) -> u64 {
    1 + 97 * number
}

/// With the index in a directory.
fn options(f: &Fixture) -> VolumeOptions {
    VolumeOptions {
        node_cache: Some(NodeCacheConfig {
            path: f.path_of("nodes"),
            size_bytes: 32 * MIB,
            strategy: NodeCacheStrategy::ReuseCache,
        }),
        ..without()
    }
}

/// Nothing but what is asked for reads the index.
fn without() -> VolumeOptions {
    VolumeOptions {
        retention_interval: None,
        ..VolumeOptions::default()
    }
}

/// A volume whose blocks a server with these options wrote.
fn written(with: impl Fn(&Fixture) -> VolumeOptions) -> Fixture {
    let f = Fixture::new();
    f.create(1 << 30, BLOCK as u32);
    let volume = f.run(Volume::open(&f.url, &f.store_options, &with(&f))).unwrap();
    for number in 0..BLOCKS {
        volume
            .write(block(number) * BLOCK, &pattern(number + 1, BLOCK as usize), false)
            .unwrap();
        if number % (BLOCKS / CHECKPOINTS) == 0 {
            volume.flush().unwrap();
        }
    }
    volume.flush().unwrap();
    volume.close(LIMIT).unwrap();
    f
}

/// Looks every block up; data is not read.
fn look_all_up(volume: &Volume) {
    let (mut found, mut at) = (Vec::new(), 0);
    while at < volume.size_bytes() {
        for extent in volume.extents(at, volume.size_bytes() - at, false).unwrap() {
            at = extent.offset_bytes + extent.len_bytes;
            if extent.kind == ExtentKind::Data {
                found.extend(extent.offset_bytes / BLOCK..at / BLOCK);
            }
        }
    }
    assert!(found.into_iter().eq((0..BLOCKS).map(block)));
}

/// The requests of a server that looks every block up.
fn gets_of_a_server(f: &Fixture, options: &VolumeOptions) -> usize {
    let gets = Gets::default();
    let volume = f.run(Volume::open(&f.url, &gets.options(), options)).unwrap();
    look_all_up(&volume);
    volume.close(LIMIT).unwrap();
    gets.take()
}

/// The directory of the one volume there is.
fn cache_of_volume(f: &Fixture) -> PathBuf {
    let mut all = fs::read_dir(f.path_of("nodes")).unwrap();
    all.next().unwrap().unwrap().path()
}

#[test]
fn a_server_that_starts_again_asks_for_no_node() {
    let f = written(options);
    assert_eq!(
        gets_of_a_server(&f, &options(&f)),
        0,
        "the nodes that were written"
    );
    assert_eq!(gets_of_a_server(&f, &options(&f)), 0, "again");
    assert!(
        gets_of_a_server(&f, &without()) > 0,
        "without the directory: the test tests nothing"
    );

    // The nodes that were fetched, and nothing of them was published there.
    let f = written(|_| without());
    assert!(gets_of_a_server(&f, &options(&f)) > 0);
    assert_eq!(
        gets_of_a_server(&f, &options(&f)),
        0,
        "the nodes that were fetched"
    );
}

#[test]
fn a_server_after_one_that_was_killed_asks_for_no_node() {
    let f = written(options);
    // A server of its own end: it needs no lease, which a killed one would hold.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let read_only = VolumeOptions {
        read_only: true,
        ..options(&f)
    };
    let volume = runtime
        .block_on(Volume::open(&f.url, &StoreOptions::default(), &read_only))
        .unwrap();
    look_all_up(&volume);
    drop(volume);
    runtime.shutdown_timeout(LIMIT);
    let lock = cache_of_volume(&f).join("nodes.lock");
    let is_locked = || {
        let file = File::options().write(true).open(&lock).unwrap();
        file.try_lock().is_err()
    };
    let began = Instant::now();
    while is_locked() {
        assert!(began.elapsed() < LIMIT, "the cache is still in use");
        sleep(Duration::from_millis(10));
    }
    assert_eq!(gets_of_a_server(&f, &options(&f)), 0);
}

/// What a disk holds was judged by the state that was seen before the open. Where the open finds another one, the disks must not be
/// said to be of that before it is known: the server may be killed in between.
#[test]
fn the_disks_are_said_to_be_of_what_the_open_found_once_that_is_known() {
    let f = Fixture::new();
    f.create(MIB, BLOCK as u32);
    let store = f.store().unwrap();
    let open = |index, pages, seen| {
        let owner = Arc::new(SoleOwner);
        f.run(HyperEngine::open_owned(&store, index, pages, false, owner, seen))
            .unwrap()
    };
    let (engine, before) = open(IndexCache::default(), ReadCache::none(), None);
    let mut generation = Generation::new(engine.geometry());
    let bytes = pattern(1, BLOCK as usize);
    drop(generation.write(PreparedWrite::new(engine.geometry(), 0, &bytes)));
    let publish = engine.publish(Arc::new(Frozen::new(generation)), Beside::default());
    let published = f.run(publish).unwrap().unwrap();
    f.run(engine.close());

    let id = VolumeId::random();
    let pages = ReadCacheConfig {
        memory_bytes: 16 * MIB,
        disk: Some(ReadCacheDisk {
            dir: f.path_of("pages"),
            size_bytes: 64 * MIB,
        }),
    };
    let nodes = options(&f).node_cache.unwrap();
    let index = f.run(IndexCache::open(&nodes, id)).unwrap();
    let pages = f.run(ReadCache::open(&pages, Some(id)));
    assert!(pages.has_disk());
    let (engine, found) = open(index, pages, Some(before.stored));
    assert_eq!(found.newest.id, published.id);
    let noted = [
        f.path_of("nodes").join(id.to_string()).join("nodes/checkpoint"),
        f.path_of("pages").join(id.to_string()).join("checkpoint"),
    ];
    assert!(
        noted.iter().all(|path| !path.exists()),
        "it may be another history"
    );
    engine.use_caches();
    assert!(noted.iter().all(|path| path.exists()));
    f.run(engine.close());
}

#[test]
fn a_damaged_node_is_refused_and_fetched_anew() {
    let f = written(options);
    // The first leaf says where these two blocks are. With another key it is a node all the same.
    let keys = |second: u64| [block(0).to_le_bytes(), second.to_le_bytes()].concat();
    let (right, wrong) = (keys(block(1)), keys(block(1) + 1));
    let path = cache_of_volume(&f).join("nodes/foyer-storage-file");
    let file = File::options().read(true).write(true).open(path).unwrap();
    let (mut page, mut at, mut damaged) = (vec![0; 4096], 0, 0);
    // It is sparse, and an entry begins at a page's start.
    while file.read_exact_at(&mut page, at).is_ok() {
        if page.iter().any(|b| *b != 0)
            && let Some(key) = page.windows(right.len()).position(|bytes| bytes == right)
        {
            file.write_all_at(&wrong, at + key as u64).unwrap();
            damaged += 1;
        }
        at += page.len() as u64;
    }
    file.sync_all().unwrap();
    assert!(damaged > 0, "the leaf is not there: the test tests nothing");
    assert!(gets_of_a_server(&f, &options(&f)) > 0, "fetched anew");
    assert_eq!(gets_of_a_server(&f, &options(&f)), 0, "and kept");
}
