//! Volumes restored, copied, moved and made anew by other tools, with the logs and catalogues that were there before.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyperfile::file::hyper::Hyper;
use hyperfile::meta_format::BlockPtrFormat;
use hypernbd_volume::admin::{IfDamaged, wal};
use hypernbd_volume::meta::label;
use hypernbd_volume::options::{
    LeaseOptions, NodeCacheConfig, NodeCacheStrategy, ReadCacheConfig, ReadCacheDisk, VolumeOptions,
};
use hypernbd_volume::{Volume, VolumeError, VolumeUrl, WalPlace, admin, store};

use crate::fixture::{Fixture, pattern};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(30);

/// A volume with a journal.
struct Logged {
    f: Fixture,
    journal: VolumeUrl,
}

impl Logged {
    fn new() -> Self {
        let f = Fixture::new();
        f.create(4 * MIB, 4096);
        let journal = f.url_of("journal");
        Self { f, journal }
    }

    fn try_open_at(&self, url: &VolumeUrl, options: VolumeOptions) -> Result<Arc<Volume>, VolumeError> {
        let started = Instant::now();
        loop {
            match self.f.run(Volume::open(url, &self.f.store_options, &options)) {
                // A server that was dropped lets its journal go once its tasks have ended.
                Err(VolumeError::Journal { .. }) if started.elapsed() < LIMIT => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                opened => return opened,
            }
        }
    }

    fn options(&self) -> VolumeOptions {
        VolumeOptions {
            wal: Some(WalPlace::At(self.journal.clone())),
            // Nothing is published unless it is asked for.
            checkpoint_interval: Duration::from_secs(3600),
            lease: LeaseOptions {
                duration: Duration::from_secs(2),
                ..LeaseOptions::default()
            },
            ..VolumeOptions::default()
        }
    }

    fn try_open(&self, discard_wal: bool) -> Result<Arc<Volume>, VolumeError> {
        let options = VolumeOptions {
            discard_wal,
            ..self.options()
        };
        self.try_open_at(&self.f.url, options)
    }

    /// Writes, flushes to the log and kills the server.
    fn write_and_kill(&self, offset_bytes: u64, seed: u64) {
        let volume = self.try_open(false).unwrap();
        volume.write(offset_bytes, &pattern(seed, 8192), false).unwrap();
        volume.flush().unwrap();
        drop(volume);
    }

    fn write_and_close(&self, offset_bytes: u64, seed: u64) {
        let volume = self.try_open(false).unwrap();
        volume.write(offset_bytes, &pattern(seed, 8192), true).unwrap();
        volume.close(LIMIT).unwrap();
    }

    /// The log is refused; given up, and the server killed at once, what was flushed before that is there.
    fn assert_given_up_for_good(&self) {
        let refused = self.try_open(false).err().expect("the log is refused");
        assert!(matches!(refused, VolumeError::Wal { .. }), "{}", refused.chain());
        drop(self.try_open(true).unwrap());
        // That it was given up is not asked for twice.
        drop(self.try_open(false).unwrap());
        self.write_and_kill(3 * MIB, 77);
        let volume = self.try_open(false).unwrap();
        assert!(
            self.f.read(&volume, 3 * MIB, 8192) == pattern(77, 8192),
            "flushed"
        );
        volume.close(LIMIT).unwrap();
    }

    /// The log is refused, and nothing is changed; given up, the volume is the one that was put there, and what is flushed
    /// from then on stays.
    fn assert_refused_until_given_up(&self, is_there: &[(u64, Option<u64>)]) {
        let refused = self.try_open(false).err().expect("the log is refused");
        let text = refused.chain();
        assert!(matches!(refused, VolumeError::Wal { .. }), "{text}");
        assert!(
            text.contains("restored from a backup") && text.contains("discard_wal=yes"),
            "{text}"
        );
        let volume = self.try_open(true).unwrap();
        for &(at, seed) in is_there {
            let want = seed.map_or(vec![0; 8192], |seed| pattern(seed, 8192));
            assert!(self.f.read(&volume, at, 8192) == want, "at {at}");
        }
        volume.close(LIMIT).unwrap();
        drop(volume);
        self.write_and_kill(3 * MIB, 77);
        self.write_and_close(3 * MIB + 8192, 78);
        self.write_and_kill(3 * MIB + 16384, 79);
        let volume = self.try_open(false).unwrap();
        for (at, seed) in [(0, 77), (8192, 78), (16384, 79)] {
            assert!(
                self.f.read(&volume, 3 * MIB + at, 8192) == pattern(seed, 8192),
                "flushed: {seed}"
            );
        }
        volume.close(LIMIT).unwrap();
    }
}

pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_name() == "scratch" {
            // Temporary files of a server that is ending: they come and go.
            std::fs::create_dir(&target).unwrap();
        } else if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            match std::fs::copy(entry.path(), target) {
                // A server that was taken over may still remove what it had begun.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                copied => drop(copied.unwrap()),
            }
        }
    }
}

/// Puts back what was copied, as a backup is restored: the directory itself stays.
pub fn restore(backup: &Path, volume: &Path, is_chosen: impl Fn(&str) -> bool) {
    let (kept, objects) = (backup.join("objects"), volume.join("objects"));
    for entry in std::fs::read_dir(&objects).unwrap() {
        let entry = entry.unwrap();
        if is_chosen(&entry.file_name().to_string_lossy()) {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    for entry in std::fs::read_dir(&kept).unwrap() {
        let entry = entry.unwrap();
        if is_chosen(&entry.file_name().to_string_lossy()) {
            std::fs::copy(entry.path(), objects.join(entry.file_name())).unwrap();
        }
    }
}

/// A backup taken at the first of three writes is restored; the third is in the log, the second was published.
fn restored(l: &Logged, is_chosen: impl Fn(&str) -> bool) {
    let backup: PathBuf = l.f.path_of("backup");
    l.write_and_close(0, 1);
    copy_dir(&l.f.path_of("vol"), &backup);
    l.write_and_close(MIB, 2);
    l.write_and_kill(2 * MIB, 3);
    restore(&backup, &l.f.path_of("vol"), is_chosen);
}

const RESTORED: [(u64, Option<u64>); 3] = [(0, Some(1)), (MIB, None), (2 * MIB, None)];

#[test]
fn a_log_is_not_replayed_over_a_restored_backup() {
    let l = Logged::new();
    restored(&l, |_| true);
    l.assert_refused_until_given_up(&RESTORED);
}

#[test]
fn a_log_is_not_replayed_over_a_container_that_was_restored_alone() {
    let l = Logged::new();
    restored(&l, |name| !name.starts_with("volume.meta"));
    l.assert_refused_until_given_up(&RESTORED);
}

#[test]
fn a_log_that_was_given_up_stays_given_up_though_the_server_is_killed() {
    let l = Logged::new();
    restored(&l, |name| !name.starts_with("volume.meta"));
    l.assert_given_up_for_good();
    let l = Logged::new();
    restored(&l, |_| true);
    l.assert_given_up_for_good();
}

/// A flush that is answered right after a log was given up counts, although nothing was published since.
#[test]
fn what_is_flushed_right_after_a_log_was_given_up_is_kept() {
    let l = Logged::new();
    restored(&l, |name| !name.starts_with("volume.meta"));
    let volume = l.try_open(true).unwrap();
    volume.write(3 * MIB, &pattern(77, 8192), false).unwrap();
    volume.flush().unwrap();
    drop(volume);
    let volume = l.try_open(false).unwrap();
    assert!(l.f.read(&volume, 3 * MIB, 8192) == pattern(77, 8192), "flushed");
    volume.close(LIMIT).unwrap();
}

/// The container is removed by tools that know nothing of what lies beside it, and one is made in its place.
#[test]
fn a_container_made_anew_by_other_tools_gets_nothing_of_the_one_before() {
    let l = Logged::new();
    l.write_and_close(0, 1);
    l.write_and_kill(MIB, 2);
    let objects = l.f.path_of("vol").join("objects");
    for entry in std::fs::read_dir(&objects).unwrap() {
        let entry = entry.unwrap();
        if !entry.file_name().to_string_lossy().starts_with("volume.meta") {
            std::fs::remove_file(entry.path()).unwrap();
        }
    }
    l.f.with_hyper_created(
        4096,
        BlockPtrFormat::PartedSegment,
        |mut file: Hyper<'static>| async move {
            file.fs_truncate(4 << 20).await.unwrap();
        },
    );
    l.assert_refused_until_given_up(&[(0, None), (MIB, None)]);
}

/// A copy went another way, and its container is put in the original's place: both have a checkpoint of the same number, and the entry
/// that is there is of the other one.
#[test]
fn an_entry_does_not_speak_for_another_checkpoint_of_its_number() {
    let l = Logged::new();
    l.write_and_close(0, 1);
    let copy = l.f.path_of("copy");
    copy_dir(&l.f.path_of("vol"), &copy);
    let volume = l
        .try_open_at(&l.f.url_of("copy"), VolumeOptions::default())
        .unwrap();
    volume.write(2 * MIB, &pattern(9, 8192), true).unwrap();
    volume.close(LIMIT).unwrap();
    l.write_and_close(MIB, 2);
    l.write_and_kill(3 * MIB, 3);
    restore(&copy, &l.f.path_of("vol"), |name| {
        !name.starts_with("volume.meta")
    });
    l.assert_refused_until_given_up(&[(0, Some(1)), (MIB, None), (2 * MIB, Some(9)), (3 * MIB, None)]);
}

#[test]
fn a_copy_gets_what_its_log_holds_and_leaves_the_log_to_the_original() {
    let l = Logged::new();
    l.write_and_close(0, 1);
    l.write_and_kill(MIB, 2);
    let copied = l.f.url_of("copy");
    copy_dir(&l.f.path_of("vol"), &l.f.path_of("copy"));
    let journal = l.f.path_of("journal");
    let records = || {
        let mut all: Vec<_> = std::fs::read_dir(&journal)
            .unwrap()
            .map(|e| {
                let path = e.unwrap().path();
                (path.clone(), std::fs::read(path).unwrap())
            })
            .collect();
        all.sort();
        all
    };
    let before = records();

    let refused = l.try_open_at(&copied, l.options()).err().unwrap();
    let text = refused.chain();
    assert!(
        text.contains("of which this one is a copy") && text.contains("hypernbd wal replay"),
        "{text}"
    );
    let lease = l.options().lease;
    let replayed = wal::replay(&copied, &l.f.store_options, None, &lease, false);
    assert!(l.f.run(replayed).unwrap());
    let copy = l.try_open_at(&copied, VolumeOptions::default()).unwrap();
    for (at, seed) in [(0, 1), (MIB, 2)] {
        assert!(
            l.f.read(&copy, at, 8192) == pattern(seed, 8192),
            "in the copy: {seed}"
        );
    }
    copy.write(MIB, &pattern(9, 8192), true).unwrap();
    copy.close(LIMIT).unwrap();
    let ids = l.f.run(async {
        let id = async |url| {
            let store = store::connect(url, &l.f.store_options).await.unwrap();
            label::load(&store).await.unwrap().unwrap()
        };
        (id(&l.f.url).await, id(&copied).await)
    });
    assert_ne!(ids.0.volume_id, ids.1.volume_id);
    assert_eq!(ids.1.parent.as_ref(), Some(&ids.0.volume_id));

    l.f.run(admin::delete(
        &copied,
        &l.f.store_options,
        &lease,
        IfDamaged::Refuse,
    ))
    .unwrap();
    assert!(records() == before, "the log is the original's");
    let original = l.try_open(false).unwrap();
    assert!(l.f.read(&original, MIB, 8192) == pattern(2, 8192), "flushed");
    original.close(LIMIT).unwrap();
}

/// A copy that nobody opened yet calls itself as the original does.
#[test]
fn the_deletion_of_a_copy_leaves_the_log_to_the_original() {
    let l = Logged::new();
    l.write_and_kill(MIB, 2);
    copy_dir(&l.f.path_of("vol"), &l.f.path_of("copy"));
    let lease = l.options().lease;
    let copied = l.f.url_of("copy");
    let deleted = admin::delete(&copied, &l.f.store_options, &lease, IfDamaged::Refuse);
    l.f.run(deleted).unwrap();
    let original = l.try_open(false).unwrap();
    assert!(l.f.read(&original, MIB, 8192) == pattern(2, 8192), "flushed");
    original.close(LIMIT).unwrap();
}

/// One that was moved keeps its log when that is said.
#[test]
fn a_moved_volume_keeps_its_log() {
    let l = Logged::new();
    l.write_and_kill(MIB, 2);
    copy_dir(&l.f.path_of("vol"), &l.f.path_of("moved"));
    std::fs::remove_dir_all(l.f.path_of("vol")).unwrap();
    let moved = l.f.url_of("moved");
    let refused = l.try_open_at(&moved, l.options()).err().unwrap().chain();
    assert!(refused.contains("adopt=yes"), "{refused}");
    let options = VolumeOptions {
        adopt: true,
        ..l.options()
    };
    let volume = l.try_open_at(&moved, options).unwrap();
    assert!(l.f.read(&volume, MIB, 8192) == pattern(2, 8192), "flushed");
    volume.close(LIMIT).unwrap();
}

/// A volume with both caches on a disk.
fn cached_options(f: &Fixture) -> VolumeOptions {
    VolumeOptions {
        node_cache: Some(NodeCacheConfig {
            path: f.path_of("nodes"),
            size_bytes: 32 * MIB,
            strategy: NodeCacheStrategy::ReuseCache,
        }),
        read_cache: ReadCacheConfig {
            memory_bytes: 16 * MIB,
            disk: Some(ReadCacheDisk {
                dir: f.path_of("pages"),
                size_bytes: 64 * MIB,
            }),
        },
        ..VolumeOptions::default()
    }
}

/// A backup is restored, written to as far as the history that was left went, and read with the caches of that one.
#[test]
fn caches_of_another_history_are_not_read() {
    for is_closed in [true, false] {
        let f = Fixture::new();
        f.create(32 * MIB, 4096);
        let open = || {
            f.run(Volume::open(&f.url, &f.store_options, &cached_options(&f)))
                .unwrap()
        };
        let write = |volume: &Volume, seed| {
            volume.write(0, &pattern(seed, 8 << 20), true).unwrap();
            assert!(f.read(volume, 0, 8 << 20) == pattern(seed, 8 << 20));
        };
        let end = |volume: Arc<Volume>| {
            if is_closed {
                volume.close(LIMIT).unwrap();
            }
        };
        let volume = open();
        write(&volume, 1);
        volume.close(LIMIT).unwrap();
        drop(volume);
        copy_dir(&f.path_of("vol"), &f.path_of("backup"));
        let volume = open();
        write(&volume, 97);
        end(volume);
        restore(&f.path_of("backup"), &f.path_of("vol"), |_| true);
        // Without the caches, so that they know nothing of it.
        let volume = f.open();
        write(&volume, 65);
        volume.close(LIMIT).unwrap();
        let volume = open();
        assert!(
            f.read(&volume, 0, 8 << 20) == pattern(65, 8 << 20),
            "closed: {is_closed}"
        );
        // And what is published upon an index of this history is right, too.
        volume.write(MIB + 5, b"changed", true).unwrap();
        volume.close(LIMIT).unwrap();
        let mut want = pattern(65, 8 << 20);
        want[MIB as usize + 5..][..7].copy_from_slice(b"changed");
        let volume = f.open_read_only();
        assert!(f.read(&volume, 0, 8 << 20) == want, "closed: {is_closed}");
    }
}

/// In a bucket nothing tells a reader that a volume was deleted, and another one made at its address: it has other data in objects of the
/// same names, with check values that are right.
#[test]
fn a_reader_reads_nothing_of_a_volume_that_was_made_at_the_place_of_its_own() {
    let f = Fixture::new();
    let other = f.url_of("other");
    f.create(4 * MIB, 4096);
    let options = admin::CreateOptions {
        size_bytes: 4 * MIB,
        block_size_bytes: 4096,
    };
    f.run(admin::create(&other, &f.store_options, &options)).unwrap();
    for (url, seed) in [(&f.url, 1), (&other, 2)] {
        let volume = f
            .run(Volume::open(url, &f.store_options, &VolumeOptions::default()))
            .unwrap();
        volume.write(0, &pattern(seed, MIB as usize), true).unwrap();
        volume.close(LIMIT).unwrap();
    }
    let reader = f.open_read_only();
    f.run(async {
        let here = store::connect(&f.url, &f.store_options).await.unwrap();
        let there = store::connect(&other, &f.store_options).await.unwrap();
        for prefix in [here.data_key(""), here.meta_key("")] {
            for object in here.list(&prefix).await.unwrap() {
                here.delete(&object.key).await.unwrap();
            }
            for object in there.list(&prefix).await.unwrap() {
                let (body, _) = there.get(&object.key).await.unwrap().unwrap();
                here.put(&object.key, body).await.unwrap();
            }
        }
    });
    let mut out = vec![0; 8192];
    let failed = reader
        .read(MIB / 2, &mut out)
        .expect_err("it is of another volume");
    assert!(failed.chain().contains("was deleted"), "{}", failed.chain());
    // Nor anything that it finds there later.
    reader.read(0, &mut out).expect_err("it is over");
}
