//! Volumes over the real engine and an in-process store: what is published, recovered, fenced and left alone, and the
//! exchange of volumes with plain Hyperfile calls, both ways.

use std::time::Duration;

use crate::fixture::{Fixture, pattern};
use hyperfile::file::hyper::Hyper;
use hyperfile::meta_format::BlockPtrFormat;
use hypernbd_volume::admin::IfDamaged;
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Beside, Engine};
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::options::LeaseOptions;
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::store;
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;
use hypernbd_volume::{ErrorKind, ExtentKind, Volume, admin};

const MIB: u64 = 1 << 20;

#[test]
fn what_was_flushed_is_there_after_opening_again() {
    let f = Fixture::new();
    f.create(64 * MIB, 4096);
    let volume = f.open();
    volume.write(0, &pattern(1, 9 << 20), false).unwrap();
    volume.write(40 * MIB + 513, &pattern(2, 5000), false).unwrap();
    volume.zero(MIB, 8192, false).unwrap();
    volume.flush().unwrap();
    // Not flushed, and the process is gone without a close.
    drop(volume);

    let volume = f.open();
    let mut want = pattern(1, 9 << 20);
    want[MIB as usize..MIB as usize + 8192].fill(0);
    assert!(f.read(&volume, 0, 9 << 20) == want);
    assert!(f.read(&volume, 40 * MIB + 513, 5000) == pattern(2, 5000));
    assert!(
        f.read(&volume, 40 * MIB, 513).iter().all(|b| *b == 0),
        "the rest of a partly written block is zero"
    );
    let extents = volume.extents(0, 64 * MIB, false).unwrap();
    let kinds: Vec<_> = extents.iter().map(|e| (e.offset_bytes, e.kind)).collect();
    assert_eq!(
        kinds,
        [
            (0, ExtentKind::Data),
            (MIB, ExtentKind::Hole),
            (MIB + 8192, ExtentKind::Data),
            (9 * MIB, ExtentKind::Hole),
            (40 * MIB, ExtentKind::Data),
            (40 * MIB + 8192, ExtentKind::Hole),
        ]
    );
    volume.close(Duration::from_secs(30)).unwrap();
}

/// As when a server was killed between the last two requests of a publish: nobody knows yet whether the next owner takes it up.
#[test]
fn a_reader_is_shown_what_is_published_where_a_publish_was_broken_off() {
    let f = Fixture::new();
    f.create(4 * MIB, 4096);
    let volume = f.open();
    volume.write(0, &pattern(1, 4096), false).unwrap();
    volume.flush().unwrap();
    let inode = f.object_file(&f.store().unwrap().data_key("inode"));
    let before = std::fs::read(&inode).unwrap();
    volume.write(0, &pattern(2, 4096), false).unwrap();
    volume.flush().unwrap();
    volume.close(Duration::from_secs(30)).unwrap();
    std::fs::write(&inode, before).unwrap();
    let entries = f.meta_objects("checkpoints/");
    assert_eq!(entries.len(), 2);
    f.remove_meta(&entries[1]);

    let reader = f.open_read_only();
    assert!(f.read(&reader, 0, 4096) == pattern(1, 4096));
    reader.close(Duration::from_secs(30)).unwrap();
}

#[test]
fn overwriting_parts_of_published_blocks_keeps_the_rest() {
    let f = Fixture::new();
    f.create(4 * MIB, 65536);
    let volume = f.open();
    let mut model = pattern(3, 4 << 20);
    volume.write(0, &model, false).unwrap();
    volume.flush().unwrap();
    for (i, at) in (0..4 * MIB as usize - 700).step_by(48_611).enumerate() {
        let data = pattern(i as u64 + 10, 1 + i * 7 % 700);
        volume.write(at as u64, &data, false).unwrap();
        model[at..at + data.len()].copy_from_slice(&data);
        if i % 9 == 0 {
            volume.flush().unwrap();
        }
    }
    assert!(f.read(&volume, 0, 4 << 20) == model);
    volume.flush().unwrap();
    assert!(f.read(&volume, 0, 4 << 20) == model);
    drop(volume);
    assert!(f.read(&f.open(), 0, 4 << 20) == model);
}

#[test]
fn trimming_and_zeroing_an_empty_9_tib_volume_publishes_nothing() {
    let f = Fixture::new();
    let size = 9 << 40;
    f.create(size, 4096);
    let volume = f.open();
    let before = f.objects();
    volume.trim(0, size, false).unwrap();
    volume.zero(0, size, false).unwrap();
    volume.flush().unwrap();
    assert_eq!(
        volume
            .extents(0, size, true)
            .unwrap()
            .iter()
            .map(|e| (e.len_bytes, e.kind))
            .collect::<Vec<_>>(),
        [(size, ExtentKind::Hole)]
    );
    volume.close(Duration::from_secs(30)).unwrap();
    assert_eq!(f.objects(), before);
}

#[test]
fn zeros_written_over_holes_store_nothing() {
    let f = Fixture::new();
    f.create(64 * MIB, 65536);
    let volume = f.open();
    let before = f.objects();
    volume.zero(3 * 65536 - 4, 8, true).unwrap();
    volume.write(MIB, &vec![0; 1 << 20], true).unwrap();
    assert_eq!(volume.extents(0, 64 * MIB, false).unwrap().len(), 1);
    volume.close(Duration::from_secs(30)).unwrap();
    let mut after = f.objects();
    after.retain(|key| !before.contains(key));
    assert_eq!(after, Vec::<String>::new());
}

#[test]
fn trimmed_blocks_read_zero_and_are_holes_after_publishing() {
    let f = Fixture::new();
    f.create(64 * MIB, 4096);
    let volume = f.open();
    volume.write(0, &pattern(1, 8 << 20), true).unwrap();
    volume.trim(MIB + 1, 2 * MIB, true).unwrap();
    let mut want = pattern(1, 8 << 20);
    want[(MIB + 4096) as usize..(3 * MIB) as usize].fill(0);
    assert!(f.read(&volume, 0, 8 << 20) == want);
    drop(volume);
    let volume = f.open();
    assert!(f.read(&volume, 0, 8 << 20) == want);
    let extents = volume.extents(MIB, 2 * MIB, false).unwrap();
    assert_eq!(extents.len(), 2);
    assert_eq!((extents[0].len_bytes, extents[1].kind), (4096, ExtentKind::Hole));
}

#[test]
fn the_catalogue_lists_every_checkpoint_and_its_missing_end_is_repaired() {
    let f = Fixture::new();
    f.create(16 * MIB, 4096);
    let volume = f.open();
    for i in 0..3 {
        volume.write(i * 4096, &pattern(i, 4096), true).unwrap();
    }
    volume.close(Duration::from_secs(30)).unwrap();
    let entries = f.meta_objects("checkpoints/");
    assert_eq!(entries.len(), 3, "{entries:?}");
    f.remove_meta(&entries[2]);
    f.open().close(Duration::from_secs(30)).unwrap();
    assert_eq!(f.meta_objects("checkpoints/"), entries);
}

#[test]
fn opening_creates_nothing() {
    let f = Fixture::new();
    let error = f.try_open().err().unwrap();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains(&f.url.to_string()), "{error}");
    assert_eq!(f.objects(), Vec::<String>::new());
}

#[test]
fn a_read_only_volume_serves_reads_and_refuses_the_rest() {
    let f = Fixture::new();
    f.create(16 * MIB, 4096);
    let writer = f.open();
    writer.write(0, &pattern(1, 4096), true).unwrap();
    writer.close(Duration::from_secs(30)).unwrap();
    let before = f.objects();
    let volume = f.open_read_only();
    assert!(f.read(&volume, 0, 4096) == pattern(1, 4096));
    assert_eq!(
        volume.write(0, b"x", false).unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
    assert_eq!(
        volume.trim(0, 4096, false).unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
    volume.flush().unwrap();
    volume.close(Duration::from_secs(30)).unwrap();
    assert_eq!(f.objects(), before);
}

#[test]
fn requests_past_the_end_are_refused() {
    let f = Fixture::new();
    f.create(10_000, 4096);
    let volume = f.open();
    assert_eq!(volume.size_bytes(), 10_000);
    assert_eq!(
        volume.write(9_999, &[1, 2], false).unwrap_err().kind(),
        ErrorKind::OutOfRange
    );
    assert_eq!(
        volume.read(10_000, &mut [0]).unwrap_err().kind(),
        ErrorKind::OutOfRange
    );
    assert_eq!(
        volume.zero(u64::MAX, 2, false).unwrap_err().kind(),
        ErrorKind::OutOfRange
    );
    volume.write(9_990, &[7; 10], true).unwrap();
    volume.close(Duration::from_secs(30)).unwrap();
    let volume = f.open();
    assert_eq!(
        volume.size_bytes(),
        10_000,
        "writing the last block does not grow the volume"
    );
    assert_eq!(f.read(&volume, 9_990, 10), [7; 10]);
}

#[test]
fn resizing_keeps_what_is_left_and_shrinking_must_be_asked_for() {
    let f = Fixture::new();
    f.create(1 << 20, 4096);
    let volume = f.open();
    volume.write(0, &pattern(5, 1 << 20), true).unwrap();
    volume.close(Duration::from_secs(30)).unwrap();
    let refused = f
        .run(admin::resize(
            &f.url,
            &f.store_options,
            5000,
            false,
            &LeaseOptions::default(),
        ))
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    assert_eq!(
        f.run(admin::resize(
            &f.url,
            &f.store_options,
            5000,
            true,
            &LeaseOptions::default()
        ))
        .unwrap()
        .size_bytes,
        5000
    );
    assert_eq!(
        f.run(admin::resize(
            &f.url,
            &f.store_options,
            2 << 20,
            false,
            &LeaseOptions::default()
        ))
        .unwrap()
        .size_bytes,
        2 << 20
    );
    let volume = f.open();
    assert!(f.read(&volume, 0, 5000) == pattern(5, 1 << 20)[..5000]);
    assert!(
        f.read(&volume, 5000, (2 << 20) - 5000).iter().all(|b| *b == 0),
        "what was cut off does not come back"
    );
}

#[test]
fn creating_twice_is_refused_and_deleting_leaves_nothing() {
    let f = Fixture::new();
    f.create(MIB, 4096);
    let options = admin::CreateOptions {
        size_bytes: MIB,
        block_size_bytes: 4096,
    };
    let again = f
        .run(admin::create(&f.url, &f.store_options, &options))
        .unwrap_err();
    assert_eq!(again.kind(), ErrorKind::AlreadyExists);
    let volume = f.open();
    volume.write(0, &[1], true).unwrap();
    volume.close(Duration::from_secs(30)).unwrap();
    let plan = f.run(admin::delete_plan(&f.url, &f.store_options)).unwrap();
    assert!(plan.objects >= 4 && plan.bytes > 4096, "{plan:?}");
    // Interrupted after the inode: no volume any more, and deleting it again goes on.
    f.remove("inode");
    assert_eq!(f.try_open().err().unwrap().kind(), ErrorKind::NotFound);
    f.put("not-ours.txt");
    f.run(admin::delete(
        &f.url,
        &f.store_options,
        &LeaseOptions::default(),
        IfDamaged::Refuse,
    ))
    .unwrap();
    assert_eq!(
        f.objects(),
        ["volume/not-ours.txt"],
        "what is not the volume's stays"
    );
    f.remove("not-ours.txt");
    assert_eq!(
        f.run(admin::info(&f.url, &f.store_options)).unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn a_damaged_volume_is_refused_and_can_be_deleted() {
    let f = Fixture::new();
    f.create(MIB, 4096);
    let volume = f.open();
    volume.write(0, &[1; 5000], true).unwrap();
    // Nothing of it is put later.
    volume.close(Duration::from_secs(30)).unwrap();
    f.damage_everything();
    assert!(f.try_open().is_err());
    let delete = |if_damaged| {
        let lease = LeaseOptions::default();
        f.run(admin::delete(&f.url, &f.store_options, &lease, if_damaged))
    };
    let before = f.objects();
    let refused = delete(IfDamaged::Refuse).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
    assert!(refused.to_string().contains("--damaged"), "{refused}");
    assert_eq!(f.objects(), before, "nothing was deleted");
    delete(IfDamaged::Delete).unwrap();
    assert_eq!(f.objects(), Vec::<String>::new());
}

/// A server may hold a volume whose lease cannot be read.
#[test]
fn a_volume_whose_lease_is_damaged_is_not_deleted_under_its_server() {
    let f = Fixture::new();
    f.create(MIB, 4096);
    let volume = f.open();
    volume.write(0, &pattern(1, 4096), true).unwrap();
    let store = f.store().unwrap();
    f.run(store.put(&store.meta_key("lease"), "{")).unwrap();
    let lease = LeaseOptions::default();
    let deleted = f.run(admin::delete(&f.url, &f.store_options, &lease, IfDamaged::Refuse));
    assert_eq!(deleted.unwrap_err().kind(), ErrorKind::Corrupt);
    assert!(f.read(&volume, 0, 4096) == pattern(1, 4096));
    assert!(f.objects().contains(&store.data_key("inode")));
}

/// What a deletion has left may hold the id of the volume that was, and with it the key to its caches and its log.
#[test]
fn no_volume_is_created_upon_what_is_left_of_another() {
    let options = admin::CreateOptions {
        size_bytes: MIB,
        block_size_bytes: 4096,
    };
    for is_label_alone in [false, true] {
        let f = Fixture::new();
        f.create(MIB, 4096);
        let volume = f.open();
        volume.write(0, &pattern(1, 4096), true).unwrap();
        volume.close(Duration::from_secs(30)).unwrap();
        let id = || f.run(admin::info(&f.url, &f.store_options)).unwrap().volume_id;
        let first_id = id();
        // A deletion takes the inode first and the label last.
        f.remove("inode");
        let store = f.store().unwrap();
        if is_label_alone {
            for key in f.objects().iter().filter(|key| !key.ends_with("volume.json")) {
                f.remove_meta(key);
            }
        }
        let before = f.objects();
        let refused = f
            .run(admin::create(&f.url, &f.store_options, &options))
            .unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::AlreadyExists);
        assert!(refused.to_string().contains("hypernbd delete"), "{refused}");
        assert_eq!(f.objects(), before, "nothing was changed");
        let lease = LeaseOptions::default();
        f.run(admin::delete(&f.url, &f.store_options, &lease, IfDamaged::Refuse))
            .unwrap();
        assert_eq!(f.objects(), Vec::<String>::new());
        f.create(MIB, 4096);
        assert_ne!(id(), first_id);
        assert!(f.run(store.head(&store.meta_key("lease"))).unwrap().is_none());
    }
}

/// A probe that was killed, or is still running, tells of no volume.
#[test]
fn what_a_probe_left_is_no_hindrance_and_no_volume() {
    let f = Fixture::new();
    f.create(MIB, 4096);
    let lease = LeaseOptions::default();
    let delete = || f.run(admin::delete(&f.url, &f.store_options, &lease, IfDamaged::Refuse));
    let store = f.store().unwrap();
    let left = store.meta_key("probe-0123456789abcdef0123456789abcdef/read_back-1");
    f.run(store.put(&left, "first")).unwrap();
    assert_eq!(
        delete().unwrap().plan.objects,
        3,
        "inode, label and retention policy"
    );
    assert_eq!(f.objects(), Vec::<String>::new(), "it goes with the volume");
    let store = f
        .run(store::connect_for_create(&f.url, &f.store_options))
        .unwrap();
    f.run(store.put(&left, "first")).unwrap();
    assert_eq!(
        delete().unwrap_err().kind(),
        ErrorKind::NotFound,
        "it is no volume"
    );
    assert_eq!(f.objects(), std::slice::from_ref(&left), "it may be in use");
    f.create(MIB, 4096);
    f.open().close(Duration::from_secs(30)).unwrap();
    assert!(f.objects().contains(&left));
}

/// The label is there before the container: a creation that was interrupted is no volume, and is cleared away as a
/// deletion is.
#[test]
fn a_creation_that_was_interrupted_leaves_no_volume() {
    let f = Fixture::new();
    f.create(MIB, 4096);
    f.remove("inode");
    assert_eq!(f.try_open().err().unwrap().kind(), ErrorKind::NotFound);
    assert_eq!(
        f.objects(),
        ["volume.meta/retention/policy", "volume.meta/volume.json"]
    );
}

#[test]
fn a_published_generation_is_let_go() {
    let f = Fixture::new();
    f.create(MIB, 4096);
    f.run(async {
        let store = store::connect(&f.url, &f.store_options).await.unwrap();
        let (engine, _) = HyperEngine::open(&store, IndexCache::default(), ReadCache::none(), false)
            .await
            .unwrap();
        let mut generation = Generation::new(engine.geometry());
        generation.write(PreparedWrite::new(engine.geometry(), 0, &[1; 8192]));
        let frozen = std::sync::Arc::new(Frozen::new(generation));
        let held = std::sync::Arc::downgrade(&frozen);
        engine.publish(frozen, Beside::default()).await.unwrap().unwrap();
        // One more question to the owner, so that it is done with the publish.
        engine.recover().await.unwrap();
        assert!(
            held.upgrade().is_none(),
            "the engine still holds what it published"
        );
        engine.close().await;
    });
}

#[test]
fn bad_sizes_are_refused_before_anything_is_written() {
    let f = Fixture::new();
    for (size_bytes, block_size_bytes) in [(MIB, 5000), (MIB, 2048), (MIB, 64 << 20), (u64::MAX, 4096)] {
        let options = admin::CreateOptions {
            size_bytes,
            block_size_bytes,
        };
        let e = f
            .run(admin::create(&f.url, &f.store_options, &options))
            .unwrap_err();
        assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
    }
    assert_eq!(f.objects(), Vec::<String>::new());
}

/// Interop: containers made by plain Hyperfile calls are served, written and read back by plain Hyperfile calls.
#[test]
fn containers_made_elsewhere_are_served_and_ours_are_read_elsewhere() {
    for format in [
        BlockPtrFormat::PartedSegment,
        BlockPtrFormat::StreamSegment,
        BlockPtrFormat::MicroGroup,
    ] {
        for (block_size, size) in [
            (4096usize, 3 * 1024 * 1024 + 1024usize),
            (65536, 1_000_001),
            (524_288, 7 << 20),
        ] {
            let f = Fixture::new();
            let mut model = pattern(9, size);
            let written = model.clone();
            f.with_hyper_created(block_size, format, move |mut file: Hyper<'static>| async move {
                file.fs_write(0, &written).await.unwrap();
                file.fs_flush().await.unwrap();
            });
            let volume: std::sync::Arc<Volume> = f.open();
            assert_eq!(volume.size_bytes(), size as u64, "{format:?} {block_size}");
            assert_eq!(volume.block_size_bytes() as usize, block_size);
            assert!(
                f.read(&volume, 0, size) == model,
                "{format:?} {block_size}: as written elsewhere"
            );
            let change = pattern(10, 70_000);
            volume.write(900_001, &change, false).unwrap();
            model[900_001..970_001].copy_from_slice(&change);
            volume.write(size as u64 - 3, b"end", false).unwrap();
            model[size - 3..].copy_from_slice(b"end");
            volume.zero(8192, 200_000, false).unwrap();
            model[8192..208_192].fill(0);
            volume.close(Duration::from_secs(30)).unwrap();
            let found = f.with_hyper_opened(move |mut file: Hyper<'static>| async move {
                let mut out = vec![0; size];
                let n = file.fs_read(0, &mut out).await.unwrap();
                assert_eq!(n, size);
                assert_eq!(file.fs_getattr().unwrap().st_size as usize, size);
                out
            });
            assert!(found == model, "{format:?} {block_size}: as read elsewhere");
        }
    }
}
