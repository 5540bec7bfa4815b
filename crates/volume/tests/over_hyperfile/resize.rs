//! Sizes are changed by checkpoints of their own, which plain Hyperfile calls read as they read any other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use hyperfile::file::hyper::Hyper;
use hyperfile::meta_format::BlockPtrFormat;
use hyperfile::ondisk::InodeRaw;
use hypernbd_volume::admin::{self, VolumeInfo};
use hypernbd_volume::engine::limits::CHECKPOINT_NUMBER_MAX;
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::{ErrorKind, Volume, VolumeError, WalPlace};
use parking_lot::Mutex;

use crate::faults::{AtRequest, LIMIT, Policy, Verdict, When, Write, hook};
use crate::fixture::{Fixture, pattern};

pub const FORMATS: [BlockPtrFormat; 3] = [
    BlockPtrFormat::PartedSegment,
    BlockPtrFormat::StreamSegment,
    BlockPtrFormat::MicroGroup,
];

fn info(f: &Fixture) -> VolumeInfo {
    f.run(admin::info(&f.url, &f.store_options)).unwrap()
}

pub fn resize(f: &Fixture, size_bytes: usize, allow_shrink: bool) -> Result<VolumeInfo, VolumeError> {
    let lease = LeaseOptions::default();
    f.run(admin::resize(
        &f.url,
        &f.store_options,
        size_bytes as u64,
        allow_shrink,
        &lease,
    ))
}

/// Its length and contents, by plain Hyperfile calls, which then write `change` at its start.
fn elsewhere(f: &Fixture, change: Vec<u8>) -> Vec<u8> {
    f.with_hyper_opened(move |mut file: Hyper<'static>| async move {
        let size = file.fs_getattr().unwrap().st_size as usize;
        let mut out = vec![0xEE; size];
        assert_eq!(file.fs_read(0, &mut out).await.unwrap(), size);
        file.fs_write(0, &change).await.unwrap();
        file.fs_flush().await.unwrap();
        out
    })
}

/// A volume made by plain Hyperfile calls, and its contents.
pub fn made_elsewhere(format: BlockPtrFormat, size: usize) -> (Fixture, Vec<u8>) {
    let f = Fixture::new();
    let model = pattern(1, size);
    let written = model.clone();
    f.with_hyper_created(4096, format, move |mut file: Hyper<'static>| async move {
        file.fs_write(0, &written).await.unwrap();
        file.fs_flush().await.unwrap();
    });
    (f, model)
}

/// What there is, to us and to plain Hyperfile calls; both go on publishing upon it.
pub fn check(f: &Fixture, model: &mut [u8], seed: u64) {
    let volume = f.open();
    assert_eq!(volume.size_bytes() as usize, model.len());
    assert!(f.read(&volume, 0, model.len()) == *model, "as read here");
    let at = model.len() - 5;
    volume.write(at as u64, &pattern(seed, 5), true).unwrap();
    model[at..].copy_from_slice(&pattern(seed, 5));
    volume.close(LIMIT).unwrap();
    let change = pattern(seed + 1, 100);
    let found = elsewhere(f, change.clone());
    assert_eq!(found.len(), model.len());
    assert!(found == *model, "as read elsewhere");
    model[..100].copy_from_slice(&change);
    let volume = f.open();
    assert!(f.read(&volume, 0, model.len()) == *model, "as changed elsewhere");
    volume.close(LIMIT).unwrap();
}

#[test]
fn another_size_is_a_checkpoint_of_its_own_that_plain_hyperfile_calls_open() {
    // Many blocks and few, with a short last one and a whole one; to sizes in the same block and in others.
    for format in FORMATS {
        for (size, larger, smaller) in [
            (3 * 1024 * 1024 + 1024, 3 * 1024 * 1024 + 2000, 1024 * 1024 + 7),
            (5 * 4096, 9 * 4096 + 1, 2 * 4096),
            (4096 + 100, 1 << 30, 4096 + 50),
        ] {
            let (f, mut model) = made_elsewhere(format, size);
            let before = info(&f);
            let grown = resize(&f, larger, false).unwrap();
            assert_eq!(grown.last_checkpoint, before.last_checkpoint + 1, "{format:?}");
            assert_eq!(grown.size_bytes as usize, larger);
            if larger < 1 << 24 {
                model.resize(larger, 0);
                check(&f, &mut model, 10);
            }
            assert_eq!(
                resize(&f, smaller, false).unwrap_err().kind(),
                ErrorKind::InvalidInput
            );
            let before = info(&f);
            let shrunk = resize(&f, smaller, true).unwrap();
            assert_eq!(shrunk.last_checkpoint, before.last_checkpoint + 1, "{format:?}");
            model.truncate(smaller);
            check(&f, &mut model, 20);
            // What was cut off does not come back.
            resize(&f, size, false).unwrap();
            model.resize(size, 0);
            check(&f, &mut model, 30);
        }
    }
}

/// A server killed between the two writes of a checkpoint: whoever opens the volume takes it up, as any other.
#[test]
fn a_size_whose_inode_was_not_stored_is_taken_up() {
    for format in FORMATS {
        let (f, mut model) = made_elsewhere(format, 3 * 4096 + 5);
        let store = f.store().unwrap();
        let key = store.data_key("inode");
        // The first writable open labels the volume, and a takeover would change the inode.
        f.open().close(LIMIT).unwrap();
        let (before, _) = f.run(store.get(&key)).unwrap().unwrap();
        resize(&f, 5 * 4096, false).unwrap();
        f.run(store.put(&key, before)).unwrap();
        model.resize(5 * 4096, 0);
        let volume = f.open_read_only();
        assert_eq!(volume.size_bytes(), 5 * 4096, "{format:?}");
        assert!(f.read(&volume, 0, model.len()) == model);
    }
}

#[test]
fn the_last_checkpoint_number_is_left() {
    let (f, mut model) = made_elsewhere(BlockPtrFormat::PartedSegment, 3 * 4096);
    f.open().close(LIMIT).unwrap();
    let store = f.store().unwrap();
    let key = store.data_key("inode");
    let (body, _) = f.run(store.get(&key)).unwrap().unwrap();
    let mut raw = InodeRaw::from_u8_slice(&body);
    raw.i_last_seq = CHECKPOINT_NUMBER_MAX - 2;
    f.run(store.put(&key, raw.as_u8_slice().to_vec())).unwrap();
    // This one cuts stored blocks off, which takes no more numbers than another size alone.
    let shrunk = resize(&f, 4096, true).unwrap();
    assert_eq!(shrunk.last_checkpoint, CHECKPOINT_NUMBER_MAX - 1);
    let (before, _) = f.run(store.get(&key)).unwrap().unwrap();
    for (size, allow_shrink) in [(2 * 4096, false), (2048, true)] {
        let refused = resize(&f, size, allow_shrink).unwrap_err();
        assert!(refused.to_string().contains("used up"), "{refused}");
    }
    assert_eq!(info(&f).size_bytes, 4096);
    let (after, _) = f.run(store.get(&key)).unwrap().unwrap();
    let roots = [before, after].map(|body| InodeRaw::from_u8_slice(&body).i_bmap);
    assert_eq!(roots[0], roots[1]);
    model.truncate(4096);
    let volume = f.open_read_only();
    assert!(f.read(&volume, 0, 4096) == model);
}

/// A server takes the volume over when everything but the inode is stored. What it acknowledges is kept, and so is the size.
#[test]
fn a_resize_that_is_taken_over_changes_nothing() {
    for size in [9 * 4096, 4096 + 77] {
        let (mut f, mut model) = made_elsewhere(BlockPtrFormat::PartedSegment, 5 * 4096);
        f.open().close(LIMIT).unwrap();
        let server = Arc::<Mutex<Option<Arc<Volume>>>>::default();
        let (started, url, runtime) = (server.clone(), f.url.clone(), f.handle());
        let take_over = move || {
            let lease = LeaseOptions {
                takeover: true,
                ..LeaseOptions::default()
            };
            let options = VolumeOptions {
                lease,
                ..VolumeOptions::default()
            };
            let store = StoreOptions::default();
            let volume = runtime.block_on(Volume::open(&url, &store, &options)).unwrap();
            volume.write(4096, &pattern(2, 4096), true).unwrap();
            *started.lock() = Some(volume);
        };
        f.store_options.hook = Hook::new(AtRequest::inode(When::BeforeItIsSent, take_over));
        resize(&f, size, true).unwrap_err();
        f.store_options.hook = Hook::default();
        let server = server.lock().take().expect("it was taken over");
        model[4096..8192].copy_from_slice(&pattern(2, 4096));
        assert!(f.read(&server, 0, model.len()) == model);
        server.write(3 * 4096, &pattern(3, 100), true).unwrap();
        model[3 * 4096..3 * 4096 + 100].copy_from_slice(&pattern(3, 100));
        server.close(LIMIT).unwrap();
        assert_eq!(info(&f).size_bytes as usize, model.len());
        check(&f, &mut model, 40);
    }
}

const MIB: usize = 1 << 20;

/// A volume grows under its clients: what was written before is there, published or not; what is new reads as zeros, and is written to.
#[test]
fn a_volume_grows_while_it_is_open() {
    for wal in [None, Some(WalPlace::Beside)] {
        let f = Fixture::new();
        f.create(MIB as u64, 4096);
        let options = VolumeOptions {
            wal,
            ..VolumeOptions::default()
        };
        let volume = f.run(Volume::open(&f.url, &f.store_options, &options)).unwrap();
        let mut model = pattern(1, MIB);
        volume.write(0, &model, true).unwrap();
        volume.write(5000, &pattern(2, 10_000), false).unwrap();
        model[5000..15_000].copy_from_slice(&pattern(2, 10_000));
        let before = info(&f);
        for size in [MIB + 4096, 3 * MIB, 3 * MIB + 1024] {
            volume.grow(size as u64).unwrap();
            assert_eq!(volume.size_bytes() as usize, size);
            assert_eq!(info(&f).size_bytes as usize, size);
            model.resize(size, 0);
            assert!(f.read(&volume, 0, size) == model);
            let at = size - 900;
            volume
                .write(at as u64, &pattern(3, 900), size == 3 * MIB)
                .unwrap();
            model[at..].copy_from_slice(&pattern(3, 900));
        }
        assert!(info(&f).last_checkpoint >= before.last_checkpoint + 3);
        volume.grow(3 * MIB as u64 + 1024).unwrap();
        for size in [2 * MIB, 4 * MIB] {
            // It does not shrink; and its last block is stored short now.
            let refused = volume.grow(size as u64).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
        }
        volume.close(LIMIT).unwrap();
        check(&f, &mut model, 50);
    }
}

fn open_with_wal(f: &Fixture, takeover: bool) -> Arc<Volume> {
    let options = VolumeOptions {
        wal: Some(WalPlace::Beside),
        lease: LeaseOptions {
            takeover,
            ..LeaseOptions::default()
        },
        ..VolumeOptions::default()
    };
    f.run(Volume::open(&f.url, &f.store_options, &options)).unwrap()
}

/// What was flushed past the old end comes back from the log after a kill.
#[test]
fn what_was_flushed_past_the_old_end_is_there_after_a_kill() {
    let f = Fixture::new();
    f.create(MIB as u64, 4096);
    let volume = open_with_wal(&f, false);
    volume.write(0, &pattern(1, MIB), false).unwrap();
    volume.grow(2 * MIB as u64).unwrap();
    volume.write(MIB as u64, &pattern(2, MIB), true).unwrap();
    drop(volume);
    let volume = open_with_wal(&f, true);
    assert!(f.read(&volume, 0, 2 * MIB) == [pattern(1, MIB), pattern(2, MIB)].concat());
    volume.close(LIMIT).unwrap();
}

/// What becomes of the writes of one kind, once or until that is taken back.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Failing {
    is_inode: bool,
    verdict: Verdict,
    is_once: bool,
}

#[derive(Debug, Default, Clone)]
struct Armed(Arc<Mutex<Option<Failing>>>);

impl Policy for Armed {
    fn judge(&self, write: &Write) -> Verdict {
        let mut armed = self.0.lock();
        match *armed {
            Some(failing) if failing.is_inode == write.is_inode() => {
                armed.take_if(|failing| failing.is_once);
                failing.verdict
            }
            _ => Verdict::Pass,
        }
    }
}

#[test]
fn a_growth_that_fails_or_is_not_answered_leaves_one_size() {
    for (is_inode, verdict, is_once, is_grown) in [
        (false, Verdict::Refused, false, false),
        (false, Verdict::Lost, true, false),
        (true, Verdict::Refused, true, false),
        (true, Verdict::Refused, false, false),
        (true, Verdict::Lost, true, true),
    ] {
        let failing = Failing {
            is_inode,
            verdict,
            is_once,
        };
        let mut f = Fixture::new();
        f.create(MIB as u64, 4096);
        let armed = Armed::default();
        f.store_options.hook = hook(armed.clone());
        let volume = f.open();
        let mut model = pattern(1, MIB);
        volume.write(0, &model, true).unwrap();
        *armed.0.lock() = Some(failing);
        let grown = volume.grow(2 * MIB as u64);
        let left = armed.0.lock().take();
        assert_eq!(left.is_none(), is_once, "{failing:?}: nothing failed");
        assert_eq!(grown.is_ok(), is_grown, "{failing:?}: {grown:?}");
        let size = if is_grown { 2 * MIB } else { MIB };
        assert_eq!(volume.size_bytes() as usize, size, "{failing:?}");
        volume.write(4096, &pattern(2, 4096), true).unwrap();
        model[4096..8192].copy_from_slice(&pattern(2, 4096));
        assert_eq!(info(&f).size_bytes, volume.size_bytes(), "{failing:?}");
        volume.grow(2 * MIB as u64).unwrap();
        volume
            .write(2 * MIB as u64 - 100, &pattern(3, 100), true)
            .unwrap();
        model.resize(2 * MIB, 0);
        model[2 * MIB - 100..].copy_from_slice(&pattern(3, 100));
        assert!(f.read(&volume, 0, 2 * MIB) == model);
        volume.close(LIMIT).unwrap();
        check(&f, &mut model, 60);
    }
}

/// A volume that is idle recovers from a growth whose outcome it does not know, when it is asked again.
#[test]
fn a_growth_of_unknown_outcome_is_asked_for_again() {
    let mut f = Fixture::new();
    f.create(MIB as u64, 4096);
    let is_armed = Arc::new(AtomicBool::new(false));
    let armed = is_armed.clone();
    let is_it = move |method: &str, uri: &str| {
        method == "GET" && uri.contains("/inode") && armed.load(Ordering::SeqCst)
    };
    f.store_options.hook = Hook::new(AtRequest::new(is_it, When::BeforeItIsSent, || {}).refused());
    let volume = f.open();
    volume.write(0, &pattern(1, MIB), true).unwrap();
    is_armed.store(true, Ordering::SeqCst);
    volume.grow(2 * MIB as u64).unwrap_err();
    volume.grow(2 * MIB as u64).unwrap();
    assert_eq!((volume.size_bytes(), info(&f).size_bytes), (2 << 20, 2 << 20));
    volume.grow(3 * MIB as u64).unwrap();
    volume.close(LIMIT).unwrap();
    let mut model = pattern(1, MIB);
    model.resize(3 * MIB, 0);
    check(&f, &mut model, 70);
}

/// Two that wait for the same turn: the volume has the larger size of both, and each checkpoint is known by what is stored of it.
#[test]
fn growths_beside_each_other_never_shrink_it() {
    let f = Fixture::new();
    f.create(MIB as u64, 4096);
    let volume = open_with_wal(&f, false);
    volume.write(0, &pattern(1, MIB), true).unwrap();
    for round in 1..5 {
        let sizes = [3, 2, 4].map(|more| (MIB * (4 * round + more)) as u64);
        let grown: Vec<_> = std::thread::scope(|scope| {
            let volume = &volume;
            let growths = sizes.map(|size| (size, scope.spawn(move || volume.grow(size))));
            let ended = growths.map(|(size, growth)| (size, growth.join().unwrap()));
            ended.into_iter().collect()
        });
        assert_eq!(volume.size_bytes(), sizes[2]);
        assert_eq!(info(&f).size_bytes, sizes[2]);
        for (size, grown) in grown {
            let is_refused = |e: &VolumeError| e.kind() == ErrorKind::InvalidInput && size < sizes[2];
            assert!(grown.as_ref().err().is_none_or(is_refused), "{size}: {grown:?}");
        }
        volume
            .write(sizes[2] - 4096, &pattern(round as u64, 4096), true)
            .unwrap();
    }
    let size = volume.size_bytes();
    drop(volume);
    let volume = open_with_wal(&f, true);
    assert_eq!(volume.size_bytes(), size);
    assert!(f.read(&volume, size - 4096, 4096) == pattern(4, 4096));
    volume.close(LIMIT).unwrap();
}

/// Whoever was taken over from changes nothing, its size neither.
#[test]
fn an_owner_that_was_taken_over_from_does_not_grow_the_volume() {
    let f = Fixture::new();
    f.create(MIB as u64, 4096);
    let first = f.open();
    first.write(0, &pattern(1, 4096), true).unwrap();
    let second = f.take_over();
    assert_eq!(first.grow(2 * MIB as u64).unwrap_err().kind(), ErrorKind::Fenced);
    second.write(0, &pattern(2, 4096), true).unwrap();
    assert_eq!(info(&f).size_bytes as usize, MIB);
    second.close(LIMIT).unwrap();
}
