//! A volume with a WAL in a simulated world: the store, the WAL, an owner, and older owners that were only paused.
//! Every request can fail, be carried out and answered with an error, or arrive long after it was given up. Crashes
//! come at every step, also during an opening.
//!
//! The volume is a set of numbered cells, and each write stores a number larger than any before it. What must hold:
//!
//! * *L1*: whenever an owner or an older one acknowledges a flush, everything that the flush covers is in the state
//!   that the newest owner sees. So no flush is ever acknowledged past a gap, or after the WAL was sealed.
//! * *L2*: after a crash at any step and a replay, no cell has a number older than one that a flush has covered, and
//!   none has a number that an older owner sent and the owner did not show. So no late write of an older owner
//!   overwrites what clients read.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::base::ids::GENERATIONS_AHEAD_MAX;
use crate::checkpoint::machine_world::{Cells, Owner, Record, seal};
use crate::checkpoint::state::PublishEnd;
use crate::wal::RecordId;
use crate::wal::group_commit::AppendEnd;
use crate::wal::record::Content;
use crate::wal::replay::{IN_FLIGHT_MAX, Replay, numbers_to_seal};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Ok,
    Refused,
    /// Carried out, answered with an error.
    Lost,
    /// Answered with an error, carried out later or never.
    Late,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Write(u8),
    Flush,
    Append(usize, Outcome),
    Publish(Outcome),
    /// The next publish may begin while one is in flight.
    NextMayBegin,
    /// A request that was given up arrives.
    Land(usize),
    Delete(usize),
    Age,
    Retry,
    AppendRetry,
    Slow,
    Expire,
    /// The owner is killed, and the next open gets this far before it is killed, too.
    Crash(u8),
    /// The same, but the owner was only paused and comes back.
    Pause(u8),
    /// An older owner takes a step.
    Zombie(ZombieStep),
}

#[derive(Debug, Clone, Copy)]
enum ZombieStep {
    Write(u8),
    Flush,
    Append(usize),
    Publish,
    NextMayBegin,
    AppendRetry,
}

#[derive(Default)]
struct Store {
    published: Cells,
    watermark: u64,
    wal: BTreeMap<u64, Record>,
    /// The owner whose publishes and watermarks are accepted.
    owner: u32,
    /// Appends that were given up and may still arrive.
    network: Vec<(u64, Record)>,
}

impl Store {
    fn create(&mut self, sequence: u64, record: &Record) -> bool {
        let there = self.wal.entry(sequence).or_insert_with(|| record.clone());
        // The shell compares the records, because an attempt of its own may have taken the number.
        there == record
    }
}

impl Owner {
    fn append(&mut self, store: &mut Store, nth: usize, outcome: Outcome) -> Vec<Cells> {
        if self.appends.is_empty() {
            return Vec::new();
        }
        let sequence = self.appends.remove(nth % self.appends.len());
        let record = self.groups[&sequence].clone();
        let end = match outcome {
            Outcome::Refused => AppendEnd::Failed,
            Outcome::Late => {
                store.network.push((sequence, record));
                AppendEnd::Failed
            }
            Outcome::Ok | Outcome::Lost => match (store.create(sequence, &record), outcome) {
                (false, _) => AppendEnd::Fenced,
                (true, Outcome::Ok) => AppendEnd::Durable,
                (true, _) => AppendEnd::Failed,
            },
        };
        self.feed(Event::Wal(group_commit::Event::AppendEnded { sequence, end }))
    }

    fn publish(&mut self, store: &mut Store, outcome: Outcome) -> Vec<Cells> {
        let Some(frozen) = self.frozen.front_mut().filter(|f| f.is_publishing) else {
            return Vec::new();
        };
        let generation = frozen.id;
        let end = if store.owner != self.id {
            PublishEnd::Fenced
        } else if !frozen.is_unrecorded {
            if matches!(outcome, Outcome::Ok | Outcome::Lost) {
                store.published.extend(&frozen.cells);
            }
            if outcome == Outcome::Ok {
                // The watermark is written next, and nothing is reported before that.
                frozen.is_unrecorded = true;
                return Vec::new();
            }
            PublishEnd::Failed
        } else {
            if matches!(outcome, Outcome::Ok | Outcome::Lost) {
                store.watermark = generation.0;
            }
            match outcome {
                Outcome::Ok => PublishEnd::Published,
                _ => PublishEnd::Failed,
            }
        };
        self.publish_ended(end)
    }
}

struct World {
    store: Store,
    owner: Owner,
    zombies: Vec<Owner>,
    depth: usize,
    written: u64,
    owners: u32,
    promised: Cells,
    /// What the owner showed when it was opened, and what was written since.
    shown: Cells,
    own: BTreeSet<u64>,
}

impl World {
    fn new(depth: usize) -> Self {
        let mut store = Store::default();
        store.create(1, &seal(0));
        Self {
            store,
            owner: Owner::new(0, GenerationId(1), 2, depth),
            zombies: Vec::new(),
            depth,
            written: 0,
            owners: 0,
            promised: Cells::new(),
            shown: Cells::new(),
            own: BTreeSet::new(),
        }
    }

    fn visible(&self) -> Cells {
        let mut all = self.store.published.clone();
        all.extend(self.owner.unpublished());
        all
    }

    /// A flush was acknowledged, by the owner or by an older one.
    fn acknowledged(&mut self, by: &str, promises: Vec<Cells>) {
        let visible = self.visible();
        for promise in promises {
            for (cell, value) in promise {
                assert!(
                    visible.get(&cell) >= Some(&value),
                    "L1: {by} acknowledged {value} in cell {cell}, which is not in the volume"
                );
                let promised = self.promised.entry(cell).or_default();
                *promised = (*promised).max(value);
            }
        }
    }

    fn step(&mut self, step: Step) {
        let Self { store, owner, .. } = self;
        let acknowledged = match step {
            Step::Write(cell) => {
                self.written += 1;
                self.own.insert(self.written);
                owner.write(cell, self.written)
            }
            Step::Flush => owner.flush(),
            Step::Append(nth, outcome) => owner.append(store, nth, outcome),
            Step::Publish(outcome) => owner.publish(store, outcome),
            Step::NextMayBegin => owner.next_may_begin(),
            Step::Land(nth) => {
                if !store.network.is_empty() {
                    let (sequence, record) = store.network.remove(nth % store.network.len());
                    store.create(sequence, &record);
                }
                Vec::new()
            }
            Step::Delete(nth) => {
                let owned = |s: &u64, r: &Record| {
                    !r.is_seal && r.newest() <= owner.trimmed && *s < owner.acknowledged
                };
                let old: Vec<u64> = store
                    .wal
                    .iter()
                    .filter(|(s, r)| owned(s, r))
                    .map(|(s, _)| *s)
                    .collect();
                if !old.is_empty() {
                    store.wal.remove(&old[nth % old.len()]);
                }
                Vec::new()
            }
            Step::Age => match owner.ages.pop() {
                Some(id) => owner.feed(Event::Volume(state::Event::AgeDue(id))),
                None => Vec::new(),
            },
            Step::Retry if std::mem::take(&mut owner.is_retry_armed) => {
                owner.feed(Event::Volume(state::Event::RetryDue))
            }
            Step::Retry => Vec::new(),
            Step::AppendRetry => match owner.append_retries.pop() {
                Some(sequence) => owner.feed(Event::Wal(group_commit::Event::RetryDue { sequence })),
                None => Vec::new(),
            },
            Step::Slow => match owner.appends.first().copied() {
                Some(sequence) => owner.feed(Event::Wal(group_commit::Event::AppendSlow { sequence })),
                None => Vec::new(),
            },
            Step::Expire => match owner.promises.keys().next().copied() {
                Some(id) => owner.feed(Event::Volume(state::Event::FlushExpired(id))),
                None => Vec::new(),
            },
            Step::Crash(at) | Step::Pause(at) => {
                self.reopen(at, matches!(step, Step::Pause(_)));
                Vec::new()
            }
            Step::Zombie(step) => return self.zombie(step),
        };
        self.acknowledged("the owner", acknowledged);
    }

    fn zombie(&mut self, step: ZombieStep) {
        let Some(mut zombie) = self.zombies.pop() else {
            return;
        };
        let acknowledged = match step {
            ZombieStep::Write(cell) => {
                self.written += 1;
                zombie.write(cell, self.written)
            }
            ZombieStep::Flush => zombie.flush(),
            ZombieStep::Append(nth) => zombie.append(&mut self.store, nth, Outcome::Ok),
            ZombieStep::Publish => zombie.publish(&mut self.store, Outcome::Ok),
            ZombieStep::NextMayBegin => zombie.next_may_begin(),
            ZombieStep::AppendRetry => match zombie.append_retries.pop() {
                Some(sequence) => zombie.feed(Event::Wal(group_commit::Event::RetryDue { sequence })),
                None => Vec::new(),
            },
        };
        self.acknowledged("an older owner", acknowledged);
        self.zombies.push(zombie);
    }

    /// Opens the volume for a new owner. The first `at` attempts are killed, each a little later than the previous one.
    fn reopen(&mut self, at: u8, is_pause: bool) {
        // Appends of a killed owner may still arrive; a paused one sends them itself.
        for sequence in self.owner.appends.clone() {
            let record = self.owner.groups[&sequence].clone();
            self.store.network.push((sequence, record));
        }
        let mut until = if at == 0 { u32::MAX } else { u32::from(at) };
        let owner = loop {
            match self.try_open(until) {
                Some(owner) => break owner,
                None => until = until.saturating_mul(2),
            }
        };
        let old = std::mem::replace(&mut self.owner, owner);
        if is_pause {
            self.zombies.push(old);
        }
        let visible = self.visible();
        for (cell, value) in &self.promised {
            assert!(
                visible.get(cell) >= Some(value),
                "L2: cell {cell} has {:?}, a flush has covered {value}",
                visible.get(cell)
            );
        }
        for (cell, value) in &visible {
            assert!(
                self.own.contains(value) || self.shown.get(cell) == Some(value),
                "L2: cell {cell} has {value} of an older owner, the last one showed {:?}",
                self.shown.get(cell)
            );
        }
        self.shown = visible;
        self.own.clear();
    }

    /// Returns `None` when the open was killed after `steps` requests.
    fn try_open(&mut self, steps: u32) -> Option<Owner> {
        self.owners += 1;
        let id = self.owners;
        let mut left = steps;
        let mut alive = || {
            left -= 1;
            left > 0
        };
        self.store.owner = id;
        // A record that arrives after the listing, beyond the seal, is ignored: nobody could have acknowledged it.
        let found = loop {
            let mut found: Vec<u64> = self.store.wal.keys().copied().collect();
            let mut is_changed = false;
            let to_seal = numbers_to_seal(&found);
            for &sequence in &to_seal {
                is_changed |= !self.store.create(sequence, &seal(id));
                if !alive() {
                    return None;
                }
                // Now and then a record in flight arrives in between.
                if sequence % 3 == 0
                    && let Some((sequence, record)) = self.store.network.pop()
                {
                    self.store.create(sequence, &record);
                }
            }
            if !is_changed {
                found.extend(to_seal);
                break BTreeSet::from_iter(found);
            }
        };
        let watermark = self.store.watermark;
        let mut replayed = Cells::new();
        let mut replay = Replay::new(watermark);
        for (&sequence, record) in self.store.wal.iter().filter(|(s, _)| found.contains(s)) {
            let id = RecordId { epoch: 0, sequence };
            let entries = replay.next(id, record.group(sequence));
            for entry in entries.expect("L2: a sound log is never refused") {
                let Content::Data(value) = &entry.content else {
                    unreachable!("numbers are data")
                };
                let value = u64::from_le_bytes(value[..].try_into().expect("a number"));
                replayed.insert(entry.offset_bytes as u8, value);
            }
        }
        let newest = replay.newest_generation();
        if !alive() {
            return None;
        }
        self.store.published.extend(replayed);
        if !alive() {
            return None;
        }
        // No record that an older owner still has in flight is above it.
        self.store.watermark = newest + GENERATIONS_AHEAD_MAX;
        // The part starts beyond every number that an older owner may still have in flight, which would take the place
        // of a record.
        let start = self.store.wal.keys().last().expect("sealed") + IN_FLIGHT_MAX;
        assert!(self.store.create(start, &seal(id)));
        let next_sequence = start + 1;
        let owner = Owner::new(
            id,
            GenerationId(self.store.watermark + 1),
            next_sequence,
            self.depth,
        );
        Some(owner)
    }

    /// From here on nothing fails: everything is published and every flush answered.
    fn settle(&mut self) {
        self.step(Step::Flush);
        for _ in 0..60 {
            self.step(Step::AppendRetry);
            self.step(Step::Append(0, Outcome::Ok));
            self.step(Step::Retry);
            self.step(Step::Publish(Outcome::Ok));
            if let Some(id) = self.owner.ages.pop() {
                let acknowledged = self.owner.feed(Event::Volume(state::Event::AgeDue(id)));
                self.acknowledged("the owner", acknowledged);
            }
        }
        assert!(!self.owner.machine.is_fenced(), "nobody else is the owner");
        assert!(
            self.owner.promises.is_empty(),
            "every flush is answered in the end"
        );
        assert!(self.owner.unpublished().is_empty(), "all is published in the end");
        assert_eq!(self.owner.machine.live_wal_bytes(), 0);
        self.reopen(0, false);
    }
}

fn outcome() -> impl Strategy<Value = Outcome> {
    prop_oneof![
        6 => Just(Outcome::Ok),
        1 => Just(Outcome::Refused),
        1 => Just(Outcome::Lost),
        1 => Just(Outcome::Late),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let zombie = prop_oneof![
        (0..10u8).prop_map(ZombieStep::Write),
        Just(ZombieStep::Flush),
        (0..9usize).prop_map(ZombieStep::Append),
        Just(ZombieStep::Publish),
        Just(ZombieStep::NextMayBegin),
        Just(ZombieStep::AppendRetry),
    ];
    prop_oneof![
        8 => (0..10u8).prop_map(Step::Write),
        6 => Just(Step::Flush),
        8 => (0..9usize, outcome()).prop_map(|(n, o)| Step::Append(n, o)),
        4 => outcome().prop_map(Step::Publish),
        3 => Just(Step::NextMayBegin),
        1 => (0..9usize).prop_map(Step::Land),
        2 => (0..9usize).prop_map(Step::Delete),
        1 => Just(Step::Age),
        2 => Just(Step::Retry),
        2 => Just(Step::AppendRetry),
        1 => Just(Step::Slow),
        1 => Just(Step::Expire),
        1 => (0..6u8).prop_map(Step::Crash),
        1 => (0..6u8).prop_map(Step::Pause),
        3 => zombie.prop_map(Step::Zombie),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// L1 and L2 over long random schedules, with one append in flight (the journal) and with many (S3).
    #[test]
    fn flushed_writes_survive_everything(
        steps in prop::collection::vec(step(), 1..150),
        depth in prop::sample::select(vec![1usize, 3, IN_FLIGHT_MAX as usize]),
    ) {
        let mut world = World::new(depth);
        for s in steps {
            world.step(s);
        }
        world.settle();
    }
}

/// L1 and L2 over every schedule of five steps: a write of either of two cells and a flush, an append that ends in
/// each way, a publish or watermark that ends in each way, a deletion, and a crash or pause at the next step of opening.
#[test]
fn every_short_schedule_keeps_flushed_writes() {
    use Outcome::*;
    use Step::*;
    let alphabet: [&[Step]; 11] = [
        &[Write(0), Flush],
        &[Write(1), Age],
        &[Append(0, Ok)],
        &[Append(1, Ok)],
        &[Append(0, Lost)],
        &[Append(0, Late), AppendRetry],
        &[NextMayBegin, Publish(Ok)],
        &[Publish(Lost), Retry],
        &[Delete(0), Land(0)],
        &[Crash(2), Write(0)],
        &[
            Pause(0),
            Zombie(ZombieStep::Append(0)),
            Zombie(ZombieStep::Publish),
        ],
    ];
    let length = 5;
    for number in 0..alphabet.len().pow(length) {
        let mut world = World::new(2);
        let mut rest = number;
        for _ in 0..length {
            for s in alphabet[rest % alphabet.len()] {
                world.step(*s);
            }
            rest /= alphabet.len();
        }
        world.reopen(0, false);
    }
}
