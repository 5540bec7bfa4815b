use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::Volume;
use crate::admin::{self, CreateOptions, rollback};
use crate::base::checkpoint_id::{CheckpointId, NewestCheckpoint};
use crate::base::error::ErrorKind;
use crate::base::url::VolumeUrl;
use crate::engine::SoleOwner;
use crate::engine::parents;
use crate::engine::state_stored;
use crate::format::stored_state::StoredState;
use crate::index::diff::{Place, places};
use crate::options::{LeaseOptions, StoreOptions, VolumeOptions};
use crate::past::{self, At, Past};
use crate::retention::{NEWEST_KEPT, Reading, ensure_kept, keeper, put_policy};
use crate::store;

const SIZE: usize = 3 << 20;
const BLOCK: usize = 4096;
const LIMIT: Duration = Duration::from_secs(60);

struct World {
    runtime: tokio::runtime::Runtime,
    _dir: tempfile::TempDir,
    url: VolumeUrl,
    options: StoreOptions,
    store: Store,
    model: Vec<u8>,
    /// What the volume read as at each checkpoint.
    at: BTreeMap<u64, Vec<u8>>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let options = StoreOptions::default();
        let create = CreateOptions {
            size_bytes: SIZE as u64,
            block_size_bytes: BLOCK as u32,
        };
        runtime.block_on(admin::create(&url, &options, &create)).unwrap();
        let store = runtime.block_on(store::connect(&url, &options)).unwrap();
        Self {
            runtime,
            _dir: dir,
            url,
            options,
            store,
            model: vec![0; SIZE],
            at: BTreeMap::new(),
        }
    }

    fn run<R>(&self, future: impl Future<Output = R>) -> R {
        self.runtime.block_on(future)
    }

    fn newest(&self) -> u64 {
        self.run(inode::load(&self.store)).unwrap().0.i_last_cno
    }

    fn id(&self, cno: u64) -> CheckpointId {
        CheckpointId::of_inode(&self.run(state_stored(&self.store, cno)).unwrap().unwrap())
    }

    fn open(&self) -> Arc<Volume> {
        let options = VolumeOptions {
            retention_interval: None,
            ..VolumeOptions::default()
        };
        self.run(Volume::open(&self.url, &self.options, &options))
            .unwrap()
    }

    /// The same for a clone of its newest checkpoint.
    fn into_clone(mut self) -> Self {
        let VolumeUrl::File { path } = &self.url else {
            panic!("{}", self.url)
        };
        let url = VolumeUrl::parse(&format!("file://{}/", path.with_file_name("clone").display())).unwrap();
        self.run(admin::clone(&self.url, &self.options, None, &url))
            .unwrap();
        self.url = url;
        self.store = self.run(parents::connect(&self.url, &self.options)).unwrap();
        self.at = BTreeMap::from([(self.newest(), self.model.clone())]);
        self
    }

    /// So many checkpoints with random changes.
    fn publish(&mut self, rng: &mut fastrand::Rng, checkpoints: usize) {
        let volume = self.open();
        for _ in 0..checkpoints {
            for _ in 0..rng.usize(1..4) {
                // Most of it again and again in one place, or few objects would ever be dead.
                let within = if rng.u8(0..8) == 0 { SIZE } else { SIZE / 24 };
                let at = rng.usize(0..within - 1);
                let len = rng.usize(1..(SIZE - at).min(30 * BLOCK) + 1);
                if rng.u8(0..4) == 0 {
                    volume.zero(at as u64, len as u64, false).unwrap();
                    self.model[at..at + len].fill(0);
                } else {
                    let byte = rng.u8(1..255);
                    volume.write(at as u64, &vec![byte; len], false).unwrap();
                    self.model[at..at + len].fill(byte);
                }
            }
            volume.flush().unwrap();
            self.at.insert(self.newest(), self.model.clone());
        }
        volume.close(LIMIT).unwrap();
    }

    fn keep_last(&self, count: u32) {
        let policy = Policy {
            keep_last: count,
            ..Policy::default()
        };
        self.run(put_policy(&self.store, &policy)).unwrap();
    }

    fn prune(&self) -> Removed {
        let lease = LeaseOptions::default();
        self.run(admin::retention::prune(&self.url, &self.options, &lease))
            .unwrap()
    }

    fn listed(&self) -> BTreeSet<u64> {
        let listed = self
            .run(past::list(&self.url, &self.options, 0, u64::MAX))
            .unwrap();
        listed.into_iter().map(|listed| listed.cno).collect()
    }

    fn read_at(&self, cno: u64) -> Result<Vec<u8>, VolumeError> {
        let (options, at) = (VolumeOptions::default(), Past::At(At::Number(cno)));
        let volume = self.run(Volume::open_past(&self.url, &self.options, &options, &at))?;
        let mut out = vec![0xEE; SIZE];
        let read = volume.read(0, &mut out);
        volume.close(LIMIT).unwrap();
        read.map(|()| out)
    }

    /// Every checkpoint that is listed reads as it did (Invariant H1), and no other can be opened.
    fn check_past(&self, seed: u64) {
        let listed = self.listed();
        assert!(listed.contains(&self.newest()), "seed {seed}");
        for (cno, model) in &self.at {
            match self.read_at(*cno) {
                Ok(read) => assert!(
                    listed.contains(cno) && read == *model,
                    "seed {seed}, checkpoint {cno}"
                ),
                Err(e) => assert!(!listed.contains(cno), "seed {seed}, checkpoint {cno}: {e}"),
            }
        }
    }

    /// Objects that a listed checkpoint refers to, counted without the table.
    fn referred(&self) -> BTreeSet<u64> {
        let mut objects = BTreeSet::new();
        for cno in self.listed() {
            let raw = self.run(state_stored(&self.store, cno)).unwrap().unwrap();
            let (state, cache) = (StoredState::of_inode(&raw), IndexCache::default());
            let each = |_, place| match place {
                Place::Node(object) | Place::Block(object) => drop(objects.insert(object)),
            };
            self.run(places(&self.store, None, &state.root, &cache, each))
                .unwrap();
            objects.extend(object_names::summaries_of(cno));
        }
        objects
    }

    fn stored(&self) -> BTreeSet<u64> {
        self.run(stored(&self.store)).unwrap().into_keys().collect()
    }

    fn rounds(&self, epoch: u64, grace: Duration) -> Rounds {
        Rounds::new(
            self.store.clone(),
            epoch,
            Arc::new(SoleOwner),
            IndexCache::default(),
            grace,
            Duration::ZERO,
        )
    }

    /// As if the plan had been written so much later, by a clock that was ahead.
    fn plan_written_later(&self, by: Duration) {
        let VolumeUrl::File { path } = &self.url else {
            panic!("{}", self.url)
        };
        let mut dirs = vec![path.clone()];
        let mut changed = 0;
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path);
                } else if path.to_string_lossy().ends_with("plan") {
                    let mut bytes = std::fs::read(&path).unwrap();
                    let name: &[u8] = b"\"modified_ms\":";
                    let at = bytes.windows(name.len()).rposition(|part| part == name);
                    let at = at.unwrap() + name.len();
                    let digits = bytes[at..].iter().take_while(|b| b.is_ascii_digit()).count();
                    let ms: u64 = std::str::from_utf8(&bytes[at..at + digits])
                        .unwrap()
                        .parse()
                        .unwrap();
                    let later = (ms + by.as_millis() as u64).to_string();
                    bytes[at..at + digits].copy_from_slice(later.as_bytes());
                    std::fs::write(&path, bytes).unwrap();
                    changed += 1;
                }
            }
        }
        assert_eq!(changed, 1);
    }

    /// What would go now, and the account that tells it.
    fn choose(&self, policy: &Policy) -> (Account, Choice) {
        self.run(async {
            let mut account = Account::load(&self.store).await.unwrap();
            account
                .advance(&self.store, &IndexCache::default(), &Recent::default())
                .await
                .unwrap();
            account.store(&self.store).await.unwrap();
            let protected = protected(&self.store, &account, Unusable::Clear).await.unwrap();
            let stored = stored(&self.store).await.unwrap();
            let mut chooser = Chooser::unlimited(Duration::ZERO);
            let usage = account.usage();
            let choice = choose(
                &mut chooser,
                usage,
                Some(policy),
                &protected,
                &stored,
                &BTreeSet::new(),
                Instant::now(),
            );
            (account, choice)
        })
    }
}

/// Of a server that another one has taken over from.
struct Former;

#[async_trait::async_trait]
impl Ownership for Former {
    async fn check(&self) -> Result<(), VolumeError> {
        Err(VolumeError::Fenced {
            reason: "of a test".into(),
        })
    }
}

/// Of a server that cannot tell for now.
struct Unsure;

#[async_trait::async_trait]
impl Ownership for Unsure {
    async fn check(&self) -> Result<(), VolumeError> {
        Err(VolumeError::Timeout {
            operation: "a test",
            waited: Duration::ZERO,
            last: String::new(),
        })
    }
}

fn keep_last(count: u32) -> Policy {
    Policy {
        keep_last: count,
        ..Policy::default()
    }
}

/// Changes, rollbacks, names and prunings at random: what is kept reads as it did, and without rollbacks nothing else is stored.
#[test]
fn what_is_kept_reads_as_it_did_and_the_rest_is_gone() {
    for seed in 0..8 {
        let has_rollbacks = seed % 2 == 1;
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut world = World::new();
        let mut names = 0;
        let mut removed = Removed::default();
        for step in 0..14 {
            match rng.u8(0..6) {
                0 if has_rollbacks && step > 2 => {
                    let listed: Vec<u64> = world.listed().into_iter().collect();
                    let target = *rng.choice(&listed).unwrap();
                    if target != world.newest() {
                        let (at, lease) = (At::Number(target), LeaseOptions::default());
                        world
                            .run(rollback::rollback(&world.url, &world.options, &at, &lease))
                            .unwrap();
                        world.model = world.at[&target].clone();
                        world.at.insert(world.newest(), world.model.clone());
                    }
                }
                1 if step > 2 => {
                    let listed: Vec<u64> = world.listed().into_iter().collect();
                    let at = At::Number(*rng.choice(&listed).unwrap());
                    names += 1;
                    let name = format!("n{names}").parse().unwrap();
                    world
                        .run(past::create(&world.url, &world.options, &name, Some(&at)))
                        .unwrap();
                }
                2 if names > 0 => {
                    let name = format!("n{names}").parse().unwrap();
                    world
                        .run(past::delete(&world.url, &world.options, &name))
                        .unwrap();
                    names -= 1;
                }
                _ => world.publish(&mut rng, 8),
            }
            if rng.bool() {
                world.keep_last(rng.u32(1..30));
                let pruned = world.prune();
                removed.checkpoints += pruned.checkpoints;
                removed.objects += pruned.objects;
                removed.bytes += pruned.bytes;
                world.check_past(seed);
                let (referred, stored) = (world.referred(), world.stored());
                let newest = world.newest();
                let extra = stored
                    .difference(&referred)
                    .filter(|o| object_names::cno_of(**o) < newest);
                assert!(
                    has_rollbacks || extra.count() == 0,
                    "seed {seed}: something is left"
                );
            }
        }
        assert!(
            removed.checkpoints > 10 && removed.objects > 10,
            "seed {seed}: {removed:?}"
        );
    }
}

/// A round that was broken off at any point is gone on with by the next owner, and what was not decided stays.
#[test]
fn an_owner_that_was_paused_removes_nothing_of_a_later_one() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(7);
    world.publish(&mut rng, 30);
    let policy = keep_last(1);
    world.keep_last(1);
    let (account, choice) = world.choose(&policy);
    assert!(
        choice.retired.len() > 10 && choice.objects.len() > 5,
        "{choice:?}"
    );
    // The first owner has planned, and sleeps. The second one settles that: it was not decided, and stays.
    let (mut first, mut second) = (world.rounds(1, Duration::ZERO), world.rounds(2, Duration::ZERO));
    world.run(first.settle(true)).unwrap();
    let planned = world.run(first.plan(&account, &choice)).unwrap();
    assert!(world.read_at(choice.retired[0]).is_err(), "it is planned to go");
    assert_eq!(world.run(second.settle(true)).unwrap(), None);
    let refused = world.run(first.decide(planned)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Fenced);
    // Once it knows that it is no owner any more, it begins no other.
    let mut former = Rounds {
        ownership: Arc::new(Former),
        ..world.rounds(1, Duration::ZERO)
    };
    let refused = world.run(former.settle(true)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Fenced);
    world.check_past(0);
    assert!(world.read_at(choice.retired[0]).is_ok());
    // The second has decided, and is killed. The third one removes it, although the policy keeps it by now.
    let planned = world.run(second.plan(&account, &choice)).unwrap();
    world.run(second.decide(planned)).unwrap();
    world.keep_last(100);
    let before = world.stored();
    let finished = world.run(world.rounds(3, Duration::ZERO).settle(true)).unwrap();
    assert_eq!(
        finished.map(|plan| plan.objects),
        Some(choice.objects.clone()),
        "which the second one may be removing still"
    );
    let gone: BTreeSet<u64> = before.difference(&world.stored()).copied().collect();
    assert_eq!(gone, choice.objects.iter().copied().collect());
    world.check_past(0);
    assert_eq!(world.listed().len(), world.at.len() - choice.retired.len());
}

/// What a plan names is of one history. A volume that was restored from before it may use all of it.
#[test]
fn a_plan_of_another_history_removes_nothing() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(8);
    world.publish(&mut rng, 30);
    let (account, choice) = world.choose(&keep_last(1));
    let mut first = world.rounds(1, Duration::ZERO);
    world.run(first.settle(true)).unwrap();
    let mut planned = world.run(first.plan(&account, &choice)).unwrap();
    planned.at = planned.at.map(|at| CheckpointId {
        check: crate::base::checkpoint_id::InodeCheck::from_bits(!at.check.to_bits()),
        ..at
    });
    world.run(first.decide(planned)).unwrap();
    let before = world.stored();
    world.run(world.rounds(2, Duration::ZERO).settle(true)).unwrap();
    assert_eq!(world.stored(), before);
    world.check_past(0);
}

/// Readers, names and policies that come while a plan is made: either they are seen, and it is void, or they see it.
#[test]
fn who_wants_a_checkpoint_to_stay_is_seen_or_sees_that_it_goes() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(9);
    world.publish(&mut rng, 30);
    world.keep_last(1);
    let policy = keep_last(1);
    let (account, choice) = world.choose(&policy);
    let cno = choice.retired[3];
    let id = world.id(cno);
    let mut rounds = world.rounds(1, Duration::ZERO);
    world.run(rounds.settle(true)).unwrap();
    // Nobody wants anything.
    let before = rounds.plan.as_ref().unwrap().0.clone();
    let planned = world.run(rounds.plan(&account, &choice)).unwrap();
    assert!(
        world
            .run(rounds.in_the_way(&account, &policy, &before, &planned))
            .unwrap()
            .is_none()
    );
    // A reader that comes now sees the plan, and takes its pin away.
    let refused = world.run(Reading::begin(&world.store, id)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::NotFound);
    assert!(
        world
            .run(rounds.in_the_way(&account, &policy, &before, &planned))
            .unwrap()
            .is_none()
    );
    // So does one that gives a name, which is not listed then.
    let (at, name) = (At::Number(cno), "late".parse().unwrap());
    let named = world.run(past::create(&world.url, &world.options, &name, Some(&at)));
    assert_eq!(named.unwrap_err().kind(), ErrorKind::NotFound);
    assert!(
        world
            .run(past::snapshots(&world.url, &world.options))
            .unwrap()
            .is_empty()
    );
    world.run(rounds.replace(planned.emptied(1))).unwrap();
    // Readers that came before are seen, until they end.
    let reading = world.run(Reading::begin(&world.store, id)).unwrap();
    let planned = world.run(rounds.plan(&account, &choice)).unwrap();
    assert!(
        world
            .run(rounds.in_the_way(&account, &policy, &before, &planned))
            .unwrap()
            .is_some()
    );
    assert!(!world.run(rounds.carry_out(&account, &policy, &choice)).unwrap());
    world.check_past(0);
    world.run(reading.end());
    assert!(
        world
            .run(rounds.in_the_way(&account, &policy, &before, &planned))
            .unwrap()
            .is_none()
    );
    // Also those that came while nothing was ever removed.
    world.run(crate::retention::remove_policy(&world.store)).unwrap();
    let reading = world.run(Reading::begin(&world.store, id)).unwrap();
    world.keep_last(1);
    assert!(!world.run(rounds.carry_out(&account, &policy, &choice)).unwrap());
    world.run(reading.end());
    // Names, too.
    world
        .run(past::create(&world.url, &world.options, &name, Some(&at)))
        .unwrap();
    assert!(!world.run(rounds.carry_out(&account, &policy, &choice)).unwrap());
    world
        .run(past::delete(&world.url, &world.options, &name))
        .unwrap();
    // And another policy.
    world.keep_last(2);
    assert!(!world.run(rounds.carry_out(&account, &policy, &choice)).unwrap());
    world.keep_last(1);
    assert!(world.run(rounds.carry_out(&account, &policy, &choice)).unwrap());
    assert!(world.run(ensure_kept(&world.store, id)).is_err());
    world.check_past(0);
}

/// By the time of a plan that was written while the store's clock was ahead, every pin ran out long ago. It is by the time of the next
/// one that a reader is seen, so its pin must still be there then.
#[test]
fn who_reads_is_seen_although_the_plan_was_written_by_a_clock_that_was_ahead() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(18);
    world.publish(&mut rng, 30);
    world.keep_last(1);
    let (_, choice) = world.choose(&keep_last(1));
    let (other, cno) = (choice.retired[2], choice.retired[3]);
    let mut rounds = world.rounds(1, Duration::ZERO);
    world.run(rounds.settle(true)).unwrap();
    world.plan_written_later(Duration::from_secs(3 * 24 * 3600));
    let reading = world.run(Reading::begin(&world.store, world.id(cno))).unwrap();
    for _ in 0..2 {
        world.run(rounds.round(Instant::now())).unwrap();
    }
    let listed = world.listed();
    assert!(listed.contains(&cno) && !listed.contains(&other), "{listed:?}");
    world.check_past(18);
    world.run(reading.end());
}

/// An entry that is written after its checkpoint went does not bring it back.
#[test]
fn an_entry_that_comes_late_is_not_believed() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(10);
    world.publish(&mut rng, 30);
    world.keep_last(1);
    let cno = *world.at.keys().nth(4).unwrap();
    let entry = world
        .run(checkpoint_list::load_entry(&world.store, cno))
        .unwrap()
        .unwrap();
    assert!(world.prune().checkpoints > 0);
    assert!(
        world
            .run(checkpoint_list::write_entry(&world.store, &entry))
            .unwrap()
    );
    world.check_past(0);
    assert!(!world.listed().contains(&cno));
    let name = "late".parse().unwrap();
    let at = At::Number(cno);
    let named = past::create(&world.url, &world.options, &name, Some(&at));
    assert!(world.run(named).is_err());
}

/// What a removed checkpoint alone needed is gone. Its entry, come late, does not stop a new count of the table, also where an object of
/// it is there for something else.
#[test]
fn a_late_entry_of_what_is_gone_does_not_stop_a_new_count() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(10);
    world.publish(&mut rng, 30);
    world.keep_last(1);
    let cno = *world.at.keys().nth(4).unwrap();
    let store = world.store.clone();
    let (entry, objects) = world.run(async {
        let entry = checkpoint_list::load_entry(&store, cno).await.unwrap().unwrap();
        let mut objects = Vec::new();
        for object in store.list(&store.data_key(&format!("{cno:010}"))).await.unwrap() {
            let (body, _) = store.get(&object.key).await.unwrap().unwrap();
            objects.push((object.key, body));
        }
        (entry, objects)
    });
    assert!(!objects.is_empty());
    assert!(world.prune().checkpoints > 0);
    let account = world.run(async {
        for (key, body) in objects {
            store.put(&key, body).await.unwrap();
        }
        checkpoint_list::write_entry(&store, &entry).await.unwrap();
        store.delete(&store.meta_key("retention/usage")).await.unwrap();
        let mut account = Account::load(&store).await.unwrap();
        let (cache, recent) = (IndexCache::default(), Recent::default());
        let counted = account.advance(&store, &cache, &recent).await;
        counted.map(|()| account)
    });
    let account = account.expect("it is counted past");
    assert!(!account.usage().kept().contains_key(&cno));
    assert!(account.usage().kept().contains_key(&world.newest()));
    world.check_past(0);
}

/// A server that was stopped may enter its checkpoint after its successor has counted past that number. Who names it then keeps
/// it: the table is counted anew, and no plan takes it for gone.
#[test]
fn a_checkpoint_whose_entry_comes_after_it_was_counted_past_is_kept_for_its_name() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(12);
    world.publish(&mut rng, 30);
    let cno = *world.at.keys().nth(4).unwrap();
    let id = world.id(cno);
    let entry = world
        .run(checkpoint_list::load_entry(&world.store, cno))
        .unwrap()
        .unwrap();
    let key = world.store.meta_key(&checkpoint_list::entry_name(cno));
    world.run(world.store.delete(&key)).unwrap();
    world.keep_last(1000);
    let mut rounds = world.rounds(1, Duration::ZERO);
    world.run(rounds.round(Instant::now())).unwrap();
    // Counted past it, with no plan that says so.
    world
        .run(checkpoint_list::write_entry(&world.store, &entry))
        .unwrap();
    let (at, name) = (At::Number(cno), "late".parse().unwrap());
    world
        .run(past::create(&world.url, &world.options, &name, Some(&at)))
        .unwrap();
    let expected = world.read_at(cno).unwrap();
    world.keep_last(1);
    for _ in 0..3 {
        world.run(rounds.round(Instant::now())).unwrap();
    }
    world.prune();
    assert_eq!(world.read_at(cno).unwrap(), expected);
    assert!(world.listed().contains(&cno));
    assert!(!world.listed().contains(&(cno - 1)), "the others have gone");
    assert_eq!(world.id(cno), id);
    world.check_past(0);
}

/// Nothing goes before it has not been needed for the time of grace; and the time counts anew once it was.
#[test]
fn what_is_not_needed_stays_for_the_time_of_grace() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(11);
    world.publish(&mut rng, 30);
    world.keep_last(1);
    let grace = Duration::from_secs(600);
    let mut rounds = world.rounds(1, grace);
    let begin = Instant::now();
    let mut at = |seconds| {
        world
            .run(rounds.round(begin + Duration::from_secs(seconds)))
            .unwrap()
    };
    let first = at(0);
    assert!(
        first.checkpoints == 0 && first.objects == 0 && first.waiting > 10,
        "{first:?}"
    );
    assert_eq!(at(599), first);
    world.keep_last(1000);
    assert_eq!(at(601).waiting, 0);
    world.keep_last(1);
    assert_eq!(at(700), first);
    assert_eq!(at(1299), first);
    let removed = at(1300);
    assert_eq!(
        (removed.checkpoints + removed.objects, removed.waiting),
        (first.waiting, 0)
    );
    world.check_past(0);
}

/// A plan has room for so much; what is left goes with the next ones, and not an interval later.
#[test]
fn what_a_plan_has_no_room_for_goes_in_the_same_turn() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(17);
    world.publish(&mut rng, 40);
    world.keep_last(1);
    let mut rounds = world.rounds(1, Duration::ZERO);
    rounds.chooser.at_once_max = 3;
    let rounds = tokio::sync::Mutex::new(rounds);
    let last = world.run(keeper::turn(&rounds, Duration::ZERO)).unwrap();
    assert!(!last.is_cut && last.waiting == 0, "{last:?}");
    assert!(
        (NEWEST_KEPT..NEWEST_KEPT + 3).contains(&world.listed().len()),
        "{:?}",
        world.listed()
    );
    let left = world.prune();
    assert_eq!((left.checkpoints, left.objects), (0, 0));
    world.check_past(17);
}

/// Whoever asks has a turn of the task that does the rounds, whether it does any by itself or not.
#[test]
fn a_turn_can_be_asked_for() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(17);
    world.publish(&mut rng, 40);
    world.keep_last(1);
    let rounds = Arc::new(tokio::sync::Mutex::new(world.rounds(1, Duration::ZERO)));
    let newest = NewestCheckpoint::new(world.id(world.newest()));
    let before = world.listed();
    world.run(async {
        let keeper = keeper::Keeper::start(rounds, None, Duration::ZERO, newest, None);
        assert_eq!(keeper.ask(true).await.unwrap(), None, "it does none by itself");
        assert_eq!(world.store.metrics().space.removed_checkpoints.get(), 0);
        let removed = keeper.ask(false).await.unwrap().unwrap();
        assert!(removed.checkpoints > 10 && removed.waiting == 0, "{removed:?}");
        let again = keeper.ask(false).await.unwrap().unwrap();
        assert_eq!((again.checkpoints, again.objects), (0, 0));
        let counted = &world.store.metrics().space;
        assert_eq!(counted.removed_checkpoints.get(), removed.checkpoints);
        assert_eq!(counted.removed_objects.get(), removed.objects);
    });
    assert!(world.listed().len() < before.len());
    world.check_past(17);
}

/// The table is made again where it is lost, damaged or of another history, and comes to the same.
#[test]
fn the_table_can_be_made_again() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(12);
    world.publish(&mut rng, 20);
    let (account, _) = world.choose(&keep_last(1));
    world.publish(&mut rng, 3);
    let key = world.store.meta_key("retention/usage");
    let gone_on = world.choose(&keep_last(1)).0;
    assert_ne!(gone_on.usage(), account.usage());
    for lost in [None, Some(b"{".to_vec())] {
        match lost {
            None => drop(world.run(world.store.delete(&key)).unwrap()),
            Some(body) => drop(world.run(world.store.put(&key, body)).unwrap()),
        }
        assert_eq!(world.choose(&keep_last(1)).0.usage(), gone_on.usage());
    }
}

/// What was removed does not hinder the next server from going on with the table: the checkpoint that it is of is kept.
#[test]
fn the_stored_table_can_be_gone_on_from() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(14);
    world.publish(&mut rng, 5);
    world.choose(&keep_last(1));
    for _ in 0..2 {
        world.publish(&mut rng, 25);
        world.keep_last(1);
        assert!(world.prune().checkpoints > 0);
        let at = world.run(Account::load(&world.store)).unwrap().usage().at();
        let at = at.expect("a table of a checkpoint that is there");
        assert!(world.listed().contains(&at.cno));
    }
}

/// A volume without a policy loses nothing, and nothing is written to it for this.
#[test]
fn without_a_policy_everything_stays() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(13);
    world.publish(&mut rng, 25);
    world.run(crate::retention::remove_policy(&world.store)).unwrap();
    let before = world.run(world.store.list(&world.store.meta_key(""))).unwrap();
    let mut rounds = world.rounds(1, Duration::ZERO);
    assert_eq!(
        world.run(rounds.round(Instant::now())).unwrap(),
        Removed::default()
    );
    world.check_past(0);
    assert_eq!(
        world.run(world.store.list(&world.store.meta_key(""))).unwrap(),
        before
    );
    assert_eq!(world.listed(), world.at.keys().copied().collect());
}

/// A plan that was stored may be void: what it names is counted still, though compaction has looked at the table meanwhile.
#[test]
fn a_void_plan_leaves_no_mark_in_the_table_that_compaction_looks_at() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(15);
    world.publish(&mut rng, 30);
    world.keep_last(1);
    let (account, choice) = world.choose(&keep_last(1));
    assert!(choice.retired.len() > 10, "{choice:?}");
    // Each of them got a name before the plan was stored.
    for cno in &choice.retired {
        let (name, at) = (format!("n{cno}").parse().unwrap(), At::Number(*cno));
        world
            .run(past::create(&world.url, &world.options, &name, Some(&at)))
            .unwrap();
    }
    let mut rounds = world.rounds(1, Duration::ZERO);
    world.run(rounds.settle(true)).unwrap();
    world.run(rounds.plan(&account, &choice)).unwrap();
    let block_bytes = BLOCK as u64;
    world.run(rounds.victims(block_bytes, Want::Everything)).unwrap();
    // The plan is void now.
    let removed = world.run(rounds.round(Instant::now())).unwrap();
    assert_eq!(removed.checkpoints, 0);
    assert_eq!(world.listed(), world.at.keys().copied().collect());
    world.check_past(15);
}

/// What a clone has inherited lies elsewhere: that it is not stored says nothing of whether it is needed. A round that came to nothing
/// leaves it in the table, by which flattening copies.
#[test]
fn what_a_clone_has_inherited_is_copied_although_a_round_came_to_nothing() {
    let mut world = World::new();
    let mut rng = fastrand::Rng::with_seed(16);
    world.publish(&mut rng, 12);
    let mut world = world.into_clone();
    // Everything is written anew, so that only the first checkpoint needs what is inherited.
    world.model.fill(7);
    let volume = world.open();
    volume.write(0, &world.model, true).unwrap();
    world.at.insert(world.newest(), world.model.clone());
    volume.close(LIMIT).unwrap();
    world.publish(&mut rng, 20);
    world.keep_last(1);
    let mut rounds = Rounds {
        ownership: Arc::new(Unsure),
        ..world.rounds(1, Duration::ZERO)
    };
    world.run(rounds.round(Instant::now())).unwrap_err();
    // What was to go is kept now.
    world.keep_last(1000);
    let lease = LeaseOptions::default();
    let flattened = world
        .run(admin::flatten(&world.url, &world.options, &lease))
        .unwrap();
    assert!(flattened.objects > 5, "{flattened:?}");
    assert_eq!(world.listed(), world.at.keys().copied().collect());
    world.check_past(16);
}
