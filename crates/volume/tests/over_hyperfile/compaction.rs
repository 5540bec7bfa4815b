//! Relocations over the real engine: whatever comes in between, no checkpoint reads otherwise than it did (Invariant H1), and what was
//! relocated is needed by nobody any more.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hyperfile::file::hyper::Hyper;
use hyperfile::meta_format::BlockPtrFormat;
use hyperfile::ondisk::InodeRaw;
use hypernbd_volume::admin::compact::{Compacted, compact};
use hypernbd_volume::admin::retention::{prune, set_policy};
use hypernbd_volume::base::checkpoint_id::NewestCheckpoint;
use hypernbd_volume::base::control::Control;
use hypernbd_volume::check::Request;
use hypernbd_volume::compaction::{Flip, Ground, Moved, Pace};
use hypernbd_volume::engine::hyper_engine::HyperEngine;
use hypernbd_volume::engine::{Engine, Relocated, SoleOwner};
use hypernbd_volume::index::cache::IndexCache;
use hypernbd_volume::index::relocation::Relocation;
use hypernbd_volume::meta::checkpoint_list::{Catalogue, Recorder};
use hypernbd_volume::options::{LeaseOptions, VolumeOptions};
use hypernbd_volume::past::{self, At, Past};
use hypernbd_volume::read::cache::ReadCache;
use hypernbd_volume::retention::{Places, Policy, UnderWay, Victim};
use hypernbd_volume::store::Store;
use hypernbd_volume::{ErrorKind, Volume, VolumeError};
use parking_lot::Mutex;

use crate::faults::{LIMIT, Script, Step, Then, Until, Verdict, Write, judged};
use crate::fixture::{Fixture, pattern};
use crate::resize::{FORMATS, check, made_elsewhere};

pub const BLOCK: usize = 4096;
/// The last block is a short one.
const SIZE: usize = (3 << 20) + 1000;

pub type Hook = Box<dyn FnOnce() -> Result<(), VolumeError> + Send>;

/// A volume whose owner is the test's.
pub struct World {
    pub f: Arc<Fixture>,
    store: Store,
    pub engine: Arc<HyperEngine>,
    catalogue: Arc<Catalogue>,
    volume: Arc<Volume>,
    pub model: Arc<Mutex<Vec<u8>>>,
    /// What it read as at each checkpoint of a client's.
    at: BTreeMap<u64, Vec<u8>>,
    under_way: UnderWay,
}

/// Flips as a driver does, after something else has happened.
struct After {
    engine: Arc<HyperEngine>,
    catalogue: Arc<Catalogue>,
    hook: Mutex<Option<Hook>>,
    newest: u64,
}

#[async_trait]
impl Flip for After {
    async fn flip(&self, relocation: Arc<Relocation>) -> Result<Option<Relocated>, VolumeError> {
        let hook = self.hook.lock().take();
        if let Some(hook) = hook {
            tokio::task::block_in_place(hook)?;
        }
        let relocated = self.engine.relocate(relocation).await?;
        if let Some(relocated) = &relocated {
            self.catalogue
                .relocated(self.newest, relocated.checkpoint)
                .await?;
        }
        Ok(relocated)
    }
}

impl World {
    fn new(f: Fixture, model: Vec<u8>, store: Store) -> Self {
        let plain = f.store().unwrap();
        let (engine, catalogue, volume) = f.run(async {
            let (index, pages) = (IndexCache::default(), ReadCache::none());
            let (engine, state) = HyperEngine::open(&store, index, pages, false).await.unwrap();
            let newest = NewestCheckpoint::new(state.newest.id);
            let catalogue = Catalogue::start(plain, 1, newest, Arc::new(SoleOwner));
            let engine = Arc::new(engine);
            let options = VolumeOptions {
                // Nothing is published by its age.
                checkpoint_interval: Duration::from_secs(3600),
                ..VolumeOptions::default()
            };
            let volume = Volume::over(engine.clone(), catalogue.clone(), &options);
            (engine, catalogue, Arc::new(volume))
        });
        Self {
            f: Arc::new(f),
            store,
            engine,
            catalogue,
            volume,
            model: Arc::new(Mutex::new(model)),
            at: BTreeMap::new(),
            under_way: UnderWay::default(),
        }
    }

    fn created() -> Self {
        Self::created_with(|store| store)
    }

    pub fn created_with(judged: impl FnOnce(Store) -> Store) -> Self {
        let f = Fixture::new();
        f.create(SIZE as u64, BLOCK as u32);
        let store = judged(f.store().unwrap());
        Self::new(f, vec![0; SIZE], store)
    }

    pub fn newest(&self) -> u64 {
        self.inode().i_last_cno
    }

    fn inode(&self) -> InodeRaw {
        let store = self.f.store().unwrap();
        let (body, _) = self.f.run(store.get(&store.data_key("inode"))).unwrap().unwrap();
        let mut raw = InodeRaw::default();
        raw.as_mut_u8_slice().copy_from_slice(&body);
        raw
    }

    fn change(&self, rng: &mut fastrand::Rng, changes: usize) {
        change(&self.volume, &mut self.model.lock(), rng, changes);
    }

    pub fn publish(&mut self, rng: &mut fastrand::Rng, changes: usize) {
        self.change(rng, changes);
        self.volume.flush().unwrap();
        self.at.insert(self.newest(), self.model.lock().clone());
    }

    fn check(&self) {
        let model = self.model.lock();
        assert!(self.f.read(&self.volume, 0, model.len()) == *model);
    }

    /// Every object of the container that is not of the newest checkpoint, by number, with its length.
    pub fn objects(&self) -> BTreeMap<u64, u64> {
        let store = self.f.store().unwrap();
        let prefix = store.data_key("");
        let listed = self.f.run(store.list(&prefix)).unwrap();
        let numbered = listed.into_iter().filter_map(|object| {
            let name = object.key.strip_prefix(&prefix)?;
            Some((number_of(name)?, object.size_bytes))
        });
        numbered.collect()
    }

    pub fn relocate(&self, objects: &BTreeMap<u64, u64>, hook: Option<Hook>) -> Result<Moved, VolumeError> {
        let victims: Vec<Victim> = objects
            .iter()
            .map(|(&object, &object_bytes)| Victim {
                object,
                object_bytes,
                live: Places::default(),
                free_bytes: 0,
            })
            .collect();
        let flip = After {
            engine: self.engine.clone(),
            catalogue: self.catalogue.clone(),
            hook: Mutex::new(hook),
            newest: self.newest(),
        };
        let ground = Ground::new(&self.engine, self.store.clone(), self.under_way.clone());
        let control = Control::default();
        self.f
            .run(ground.relocate(&victims, &flip, Pace::new(None), &control))
    }

    fn close(self) -> (Arc<Fixture>, Vec<u8>) {
        self.volume.close(LIMIT).unwrap();
        self.f.run(self.catalogue.finish());
        let model = self.model.lock().clone();
        (self.f, model)
    }
}

/// Random writes and zeros, some of part blocks, some at the very end.
fn change(volume: &Volume, model: &mut [u8], rng: &mut fastrand::Rng, changes: usize) {
    for _ in 0..changes {
        let len = rng.usize(1..12 * BLOCK);
        let at = match rng.u8(0..6) {
            0 => model.len() - len,
            _ => rng.usize(0..model.len() - len),
        };
        // Long zeroed runs: leaves with nothing but zeroes.
        if rng.u8(0..4) == 0 {
            let len = (len * 30).min(model.len() - at);
            volume.zero(at as u64, len as u64, false).unwrap();
            model[at..at + len].fill(0);
        } else {
            let bytes = pattern(rng.u64(..), len);
            volume.write(at as u64, &bytes, false).unwrap();
            model[at..at + len].copy_from_slice(&bytes);
        }
    }
}

/// The number of an object, from its name.
fn number_of(name: &str) -> Option<u64> {
    let (cno, part) = name.split_once('.')?;
    Some(cno.parse::<u64>().ok()? << 32 | (part.parse::<u64>().ok()? + 1))
}

fn read_at(f: &Fixture, cno: u64) -> Vec<u8> {
    let (options, at) = (VolumeOptions::default(), Past::At(At::Number(cno)));
    let opened = f.run(Volume::open_past(&f.url, &f.store_options, &options, &at));
    let volume = opened.unwrap();
    let bytes = f.read(&volume, 0, volume.size_bytes() as usize);
    volume.close(LIMIT).unwrap();
    bytes
}

fn listed(f: &Fixture) -> BTreeSet<u64> {
    let listed = f.run(past::list(&f.url, &f.store_options, 0, u64::MAX)).unwrap();
    listed.into_iter().map(|one| one.cno).collect()
}

/// Random changes and relocations of random objects, with a client's changes before each flip: what is read stays right, now and at
/// every checkpoint; once everything was relocated nothing else is needed; and plain Hyperfile calls read it, and go on.
#[test]
fn relocations_change_no_byte_whatever_clients_do_meanwhile() {
    let mut overtaken = 0;
    for seed in 0..3 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut world = World::created();
        for _ in 0..6 {
            for _ in 0..rng.usize(1..5) {
                let changes = rng.usize(1..20);
                world.publish(&mut rng, changes);
            }
            let mut some = world.objects();
            some.retain(|_, _| rng.bool());
            let before = world.inode();
            let (volume, model) = (world.volume.clone(), world.model.clone());
            let mut of_hook = rng.fork();
            let hook: Hook = Box::new(move || {
                change(&volume, &mut model.lock(), &mut of_hook, 20);
                match of_hook.bool() {
                    true => volume.flush(),
                    false => Ok(()),
                }
            });
            let raced = world.relocate(&some, Some(hook)).unwrap();
            overtaken += raced.overtaken;
            let after = world.inode();
            if raced.checkpoint > 0 {
                assert_eq!(after.i_last_cno, raced.checkpoint);
                assert!((after.i_mtime, after.i_mtime_nsec) != (before.i_mtime, before.i_mtime_nsec));
            }
            world.check();
            world.volume.flush().unwrap();
            world.at.insert(world.newest(), world.model.lock().clone());
        }
        // Everything, with nobody in between. What it was in is not needed by the newest state any more.
        let old = world.objects();
        let moved = world.relocate(&old, None).unwrap();
        assert!(moved.copied > 100 && moved.overtaken == 0, "{moved:?}");
        world.check();
        let at = std::mem::take(&mut world.at);
        let (f, mut model) = world.close();
        for (cno, then) in &at {
            assert!(read_at(&f, *cno) == *then, "seed {seed}: checkpoint {cno}");
        }
        for object in old.keys() {
            f.remove(&format!("{:010}.{}", object >> 32, (object & 0xFFFF_FFFF) - 1));
        }
        let volume = f.open();
        assert!(
            f.read(&volume, 0, SIZE) == model,
            "seed {seed}: all of it is in the copies"
        );
        volume.close(LIMIT).unwrap();
        check(&f, &mut model, seed);
    }
    assert!(overtaken > 0, "a client was faster now and then");
}

/// Every answer to every write of a flip: the volume reads as it did, and goes on.
#[test]
fn a_flip_whose_answer_is_lost_is_known_or_never_was() {
    for (object, verdict) in [
        ("part", Verdict::Refused),
        ("part", Verdict::Lost),
        ("inode", Verdict::Refused),
        ("inode", Verdict::Lost),
    ] {
        let script = Arc::new(Script::default());
        let mut world = World::created_with(|store| judged(store, script.clone()));
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..4 {
            world.publish(&mut rng, 20);
        }
        let before = world.newest();
        let name = match object {
            // The copies have the next number, the flip the one after.
            "part" => format!("{:010}.0", before + 2),
            _ => "inode".to_owned(),
        };
        let write = Write {
            object: name,
            step: Step::Whole,
        };
        script.add(write, 0, Until::Opened, Then::Goes(verdict));
        script.open();
        let moved = world.relocate(&world.objects(), None);
        assert!(script.is_all_met());
        match (object, verdict) {
            // It is stored: what is stored is read back and known.
            ("inode", Verdict::Lost) => {
                let moved = moved.unwrap();
                assert!(moved.copied > 0 && moved.checkpoint == before + 2, "{moved:?}");
                assert_eq!(world.newest(), before + 2);
            }
            _ => {
                moved.unwrap_err();
                assert_eq!(world.newest(), before, "{object} {verdict:?}");
            }
        }
        world.check();
        for _ in 0..3 {
            world.publish(&mut rng, 10);
        }
        world.check();
        let at = std::mem::take(&mut world.at);
        let (f, model) = world.close();
        for (cno, then) in &at {
            assert!(
                read_at(&f, *cno) == *then,
                "{object} {verdict:?}: checkpoint {cno}"
            );
        }
        let volume = f.open();
        assert!(f.read(&volume, 0, SIZE) == model, "{object} {verdict:?}");
        volume.close(LIMIT).unwrap();
    }
}

/// Another owner takes the volume in the middle of a copy: the flip publishes nothing.
#[test]
fn a_flip_of_an_owner_that_was_taken_over_from_is_refused() {
    let mut world = World::created();
    let mut rng = fastrand::Rng::with_seed(3);
    for _ in 0..4 {
        world.publish(&mut rng, 20);
    }
    let f = world.f.clone();
    let taken = Arc::new(Mutex::new(None));
    let (put, model) = (taken.clone(), world.model.clone());
    let hook: Hook = Box::new(move || {
        let (options, lease) = (VolumeOptions::default(), LeaseOptions::default());
        let options = VolumeOptions {
            lease: LeaseOptions {
                takeover: true,
                ..lease
            },
            ..options
        };
        let handle = tokio::runtime::Handle::current();
        let volume = handle.block_on(Volume::open(&f.url, &f.store_options, &options))?;
        let mut rng = fastrand::Rng::with_seed(4);
        change(&volume, &mut model.lock(), &mut rng, 20);
        volume.flush()?;
        *put.lock() = Some(volume);
        Ok(())
    });
    let refused = world.relocate(&world.objects(), Some(hook)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Fenced, "{refused}");
    let volume = taken.lock().take().unwrap();
    let newest = world.newest();
    let model = world.model.lock().clone();
    assert!(world.f.read(&volume, 0, SIZE) == model);
    volume.write(5, &[9; 100], true).unwrap();
    assert!(world.newest() > newest);
    volume.close(LIMIT).unwrap();
    let mut model = model;
    model[5..105].fill(9);
    let volume = world.f.open();
    assert!(world.f.read(&volume, 0, SIZE) == model);
    volume.close(LIMIT).unwrap();
}

/// Killed between the copies and the flip: the volume opens as it was, and goes on beyond the number of the copies.
#[test]
fn copies_that_nobody_refers_to_hinder_nothing() {
    let mut world = World::created();
    let mut rng = fastrand::Rng::with_seed(5);
    for _ in 0..4 {
        world.publish(&mut rng, 20);
    }
    let newest = world.newest();
    let killed: Hook = Box::new(|| Err(VolumeError::Closed));
    world.relocate(&world.objects(), Some(killed)).unwrap_err();
    let copies = format!("{:010}.1", newest + 1);
    assert!(world.f.objects().iter().any(|key| key.ends_with(&copies)));
    assert_eq!(world.newest(), newest);
    // As much is left by a server that is killed: nothing is closed.
    let World { f, model, .. } = world;
    let mut model = model.lock().clone();
    let volume = f.take_over();
    assert!(f.read(&volume, 0, SIZE) == model);
    change(&volume, &mut model, &mut rng, 20);
    volume.flush().unwrap();
    volume.close(LIMIT).unwrap();
    assert!(
        listed(&f).last().is_some_and(|cno| *cno > newest + 1),
        "{:?}",
        listed(&f)
    );
    check(&f, &mut model, 8);
    assert!(
        f.objects().iter().any(|key| key.ends_with(&copies)),
        "young ones stay"
    );
}

/// Differences are told by content: what was only moved is not among them, as long as it is known where it came from.
#[test]
fn what_was_only_moved_is_no_difference() {
    let mut world = World::created();
    let mut rng = fastrand::Rng::with_seed(6);
    for _ in 0..4 {
        world.publish(&mut rng, 20);
    }
    let first = world.newest();
    world.relocate(&world.objects(), None).unwrap();
    // Copies of copies.
    let moved = world.relocate(&world.objects(), None).unwrap();
    assert!(moved.copied > 0);
    let second = world.newest();
    world.volume.write(7 * BLOCK as u64, &[1; BLOCK], true).unwrap();
    let third = world.newest();
    world.model.lock()[7 * BLOCK..8 * BLOCK].fill(1);
    let (f, model) = world.close();
    let diff = |from: u64, to: u64| {
        let (from, to) = (At::Number(from), At::Number(to));
        f.run(past::diff(&f.url, &f.store_options, &from, &to)).unwrap()
    };
    assert!(diff(first, second).is_empty() && diff(second, first).is_empty());
    let changed = diff(first, third);
    assert_eq!(changed.len(), 1, "{changed:?}");
    assert_eq!(
        (changed[0].offset_bytes, changed[0].len_bytes),
        (7 * BLOCK as u64, BLOCK as u64)
    );
    // Without what tells where copies came from, they count as changed.
    for key in f.meta_objects("origins/") {
        f.remove_meta(&key);
    }
    let told: u64 = diff(first, third).iter().map(|range| range.len_bytes).sum();
    assert!(told > 100 * BLOCK as u64, "{told}");
    let volume = f.open();
    assert!(f.read(&volume, 0, SIZE) == model);
    volume.close(LIMIT).unwrap();
}

/// The number of copies is set aside before a client's checkpoint, and a later one is the first to refer to them: who checks what came since
/// that checkpoint reads them.
#[test]
fn a_check_of_what_came_since_reads_copies_with_an_older_number() {
    let mut world = World::created();
    let mut rng = fastrand::Rng::with_seed(10);
    for _ in 0..4 {
        world.publish(&mut rng, 20);
    }
    let before = world.newest();
    let volume = world.volume.clone();
    let hook: Hook = Box::new(move || volume.write(7 * BLOCK as u64, &[1; BLOCK], true));
    let moved = world.relocate(&world.objects(), Some(hook)).unwrap();
    let since = before + 2;
    assert!(moved.copied > 100 && moved.checkpoint == since + 1, "{moved:?}");
    let (f, _) = world.close();
    let request = Request {
        since: Some(At::Number(since)),
        ..Request::with_data()
    };
    let clean = crate::check::check(&f, &request);
    assert!(clean.is_clean(), "{clean:#?}");
    let copies = format!("volume/{:010}.1", before + 1);
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(f.object_file(&copies))
        .unwrap();
    let store = f.store().unwrap();
    let at = f.run(store.head(&copies)).unwrap().unwrap().size_bytes / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
    let report = crate::check::check(&f, &request);
    let [problem] = &report.problems[..] else {
        panic!("{report:#?}")
    };
    assert_eq!(problem.object, copies);
}

fn compacted(f: &Fixture, control: &Control) -> Result<Compacted, VolumeError> {
    let lease = LeaseOptions::default();
    f.run(compact(&f.url, &f.store_options, &lease, control))
}

fn stored_bytes(f: &Fixture) -> u64 {
    let store = f.store().unwrap();
    let listed = f.run(store.list(&store.data_key(""))).unwrap();
    listed.iter().map(|object| object.size_bytes).sum()
}

/// `hypernbd compact`: its checkpoint has the generation of the one before, its victims go with the checkpoints that need them, and
/// every kept checkpoint reads as it did all the time.
#[test]
fn a_volume_that_is_compacted_gives_its_space_back() {
    let f = Fixture::new();
    f.create(SIZE as u64, BLOCK as u32);
    let policy = Policy {
        keep_last: 1,
        ..Policy::default()
    };
    f.run(set_policy(&f.url, &f.store_options, Some(&policy)))
        .unwrap();
    let mut model = vec![0; SIZE];
    let mut rng = fastrand::Rng::with_seed(9);
    let mut at = BTreeMap::new();
    let prune = || {
        f.run(prune(&f.url, &f.store_options, &LeaseOptions::default()))
            .unwrap()
    };
    let mut fill = |model: &mut Vec<u8>, at: &mut BTreeMap<u64, Vec<u8>>, checkpoints: usize| {
        let volume = f.open();
        for _ in 0..checkpoints {
            // Scattered single blocks: every object keeps a little that is live.
            for _ in 0..30 {
                let block = rng.usize(0..SIZE / BLOCK);
                let bytes = pattern(rng.u64(..), BLOCK);
                volume.write((block * BLOCK) as u64, &bytes, false).unwrap();
                model[block * BLOCK..(block + 1) * BLOCK].copy_from_slice(&bytes);
            }
            volume.flush().unwrap();
            let newest = f
                .run(hypernbd_volume::admin::info(&f.url, &f.store_options))
                .unwrap();
            at.insert(newest.last_checkpoint, model.clone());
        }
        volume.close(LIMIT).unwrap();
    };
    let check_past = |at: &BTreeMap<u64, Vec<u8>>| {
        for cno in listed(&f) {
            if let Some(then) = at.get(&cno) {
                assert!(read_at(&f, cno) == *then, "checkpoint {cno}");
            }
        }
    };
    for _ in 0..4 {
        fill(&mut model, &mut at, 20);
        prune();
    }
    let before = stored_bytes(&f);
    let newest = |f: &Fixture| {
        f.run(hypernbd_volume::admin::info(&f.url, &f.store_options))
            .unwrap()
            .last_checkpoint
    };
    let was = newest(&f);
    // Told to stop before it began: nothing is done.
    let control = Control::default();
    control.stop();
    let stopped = compacted(&f, &control).unwrap();
    assert!(
        stopped.is_stopped && stopped.objects == 0 && newest(&f) == was,
        "{stopped:?}"
    );
    let done = compacted(&f, &Control::default()).unwrap();
    assert!(
        done.objects > 10 && done.copied_bytes > 0 && !done.is_stopped,
        "{done:?}"
    );
    assert!(done.copied_bytes * 2 < done.object_bytes * 3, "{done:?}");
    check_past(&at);
    let store = f.store().unwrap();
    let entry = |cno: u64| -> serde_json::Value {
        let key = store.meta_key(&format!("checkpoints/{cno:010}"));
        let (body, _) = f.run(store.get(&key)).unwrap().unwrap();
        serde_json::from_slice(&body).unwrap()
    };
    let (before_it, it) = (entry(was), entry(newest(&f)));
    assert_eq!(it["kind"], "relocation");
    assert_eq!(it["generation"], before_it["generation"]);
    assert!(before_it.get("kind").is_none());
    // Again: there is nothing more to do.
    assert_eq!(compacted(&f, &Control::default()).unwrap(), Compacted::default());
    prune();
    check_past(&at);
    // The checkpoints that need the old places go as others come.
    fill(&mut model, &mut at, 17);
    prune();
    check_past(&at);
    let after = stored_bytes(&f);
    assert!(
        after + done.object_bytes / 2 < before + done.copied_bytes + (2 << 20),
        "{before} then {after}: {done:?}"
    );
    let volume = f.open();
    assert!(f.read(&volume, 0, SIZE) == model);
    volume.close(LIMIT).unwrap();
    check(&f, &mut model, 11);
}

/// `Volume::compact` and `Volume::prune` of a volume that does neither by itself. What clients were told of is published before anything is
/// moved, so that it is there although the owner is gone right afterwards.
#[test]
fn an_open_volume_is_compacted_and_pruned_when_asked() {
    let f = Fixture::new();
    f.create(SIZE as u64, BLOCK as u32);
    let rule = |policy: Option<&Policy>| f.run(set_policy(&f.url, &f.store_options, policy)).unwrap();
    let options = VolumeOptions {
        // Nothing is published by its age.
        checkpoint_interval: Duration::from_secs(3600),
        retention_interval: None,
        retention_grace: Duration::ZERO,
        ..VolumeOptions::default()
    };
    let volume = f.run(Volume::open(&f.url, &f.store_options, &options)).unwrap();
    let control = Arc::new(Control::default());
    rule(None);
    let refused = volume.compact(&control).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
    assert_eq!(volume.prune(false).unwrap_err().kind(), ErrorKind::InvalidInput);
    rule(Some(&Policy {
        keep_last: 1,
        ..Policy::default()
    }));
    let mut model = vec![0; SIZE];
    let mut rng = fastrand::Rng::with_seed(21);
    // Again and again, so that what is kept needs little of what the older objects have.
    let mut removed = 0;
    for _ in 0..4 {
        for _ in 0..20 {
            for _ in 0..30 {
                let block = rng.usize(0..SIZE / BLOCK);
                let bytes = pattern(rng.u64(..), BLOCK);
                volume.write((block * BLOCK) as u64, &bytes, false).unwrap();
                model[block * BLOCK..(block + 1) * BLOCK].copy_from_slice(&bytes);
            }
            volume.flush().unwrap();
        }
        assert_eq!(volume.prune(true).unwrap(), None, "it does not by itself");
        removed += volume.prune(false).unwrap().unwrap().checkpoints;
    }
    assert!(removed > 20, "{removed}");
    let newest = |f: &Fixture| {
        let info = f.run(hypernbd_volume::admin::info(&f.url, &f.store_options));
        info.unwrap().last_checkpoint
    };
    let was = newest(&f);
    let stopped = Arc::new(Control::default());
    stopped.stop();
    let done = volume.compact(&stopped).unwrap();
    assert!(
        done.is_stopped && done.objects == 0 && newest(&f) == was,
        "{done:?}"
    );
    // Not flushed, and part of a block.
    volume.write(5, &[9; 100], false).unwrap();
    model[5..105].fill(9);
    assert_eq!(newest(&f), was);
    let done = volume.compact(&control).unwrap();
    assert!(
        done.objects > 10 && done.copied_bytes > 0 && done.checkpoints > 0 && !done.is_stopped,
        "{done:?}"
    );
    assert!(f.read(&volume, 0, SIZE) == model);
    drop(volume);
    let volume = f.open();
    assert!(f.read(&volume, 0, SIZE) == model);
    volume.close(LIMIT).unwrap();
    for cno in listed(&f) {
        read_at(&f, cno);
    }
    check(&f, &mut model, 21);
}

#[test]
fn other_formats_are_refused_and_left_alone() {
    for format in FORMATS
        .into_iter()
        .filter(|format| *format != BlockPtrFormat::PartedSegment)
    {
        let (f, model) = made_elsewhere(format, SIZE);
        f.open().close(LIMIT).unwrap();
        let store = f.store().unwrap();
        let world = World::new(f, model, store);
        let before = world.newest();
        let refused = world.relocate(&world.objects(), None);
        assert!(
            refused.is_err() || refused.is_ok_and(|moved| moved.copied == 0),
            "{format:?}"
        );
        assert_eq!(world.newest(), before);
        world.check();
        world.close();
    }
}

/// A container made by plain Hyperfile calls, fragmented by them, relocated by us, read and changed by them again.
#[test]
fn what_other_tools_made_is_relocated_and_read_by_them() {
    let (f, mut model) = made_elsewhere(BlockPtrFormat::PartedSegment, SIZE);
    for seed in 0..6_u64 {
        let changes: Vec<(usize, Vec<u8>)> = (0..20)
            .map(|at| {
                (
                    (at * 37 + seed as usize * 11) % 700 * BLOCK,
                    pattern(seed * 100 + at as u64, 3000),
                )
            })
            .collect();
        for (at, bytes) in &changes {
            model[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        f.with_hyper_opened(move |mut file: Hyper<'static>| async move {
            for (at, bytes) in changes {
                file.fs_write(at, &bytes).await.unwrap();
            }
            file.fs_flush().await.unwrap();
        });
    }
    f.open().close(LIMIT).unwrap();
    let store = f.store().unwrap();
    let world = World::new(f, model, store);
    let old = world.objects();
    let moved = world.relocate(&old, None).unwrap();
    assert!(moved.copied > 700, "{moved:?}");
    world.check();
    let (f, mut model) = world.close();
    for object in old.keys() {
        f.remove(&format!("{:010}.{}", object >> 32, (object & 0xFFFF_FFFF) - 1));
    }
    check(&f, &mut model, 20);
}
