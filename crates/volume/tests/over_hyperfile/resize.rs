//! Sizes are changed by checkpoints of their own, which plain Hyperfile calls read as they read any other.

use std::sync::Arc;

use hyperfile::file::hyper::Hyper;
use hyperfile::meta_format::BlockPtrFormat;
use hyperfile::ondisk::InodeRaw;
use hypernbd_volume::admin::{self, VolumeInfo};
use hypernbd_volume::engine::limits::CHECKPOINT_NUMBER_MAX;
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::{ErrorKind, Volume, VolumeError};
use parking_lot::Mutex;

use crate::faults::{AtRequest, LIMIT, When};
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
