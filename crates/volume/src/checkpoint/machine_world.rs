//! The model of an owner that the tests of the machines share with the simulation: the real `Machine` with an overlay
//! of numbered cells. Each write stores a number larger than any before it. The requests that it wants sent are left in
//! its fields.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::machine::{Action, Event, Machine};
use super::state::{self, PublishEnd};
use crate::base::ids::{FROZEN_MAX, FlushAnswer, FlushId, GENERATIONS_AHEAD_MAX, GenerationId};
use crate::wal::group_commit::{self, GroupCommit, Snapshot};
use crate::wal::record::{self, Content, Entry};
use crate::wal::replay::IN_FLIGHT_MAX;

pub type Cells = BTreeMap<u8, u64>;

/// A generation with more changed cells than this is not written to the WAL.
const BULK_CELLS: usize = 5;

/// A record of the WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub is_seal: bool,
    pub owner: u32,
    pub after: GenerationId,
    pub unacknowledged: u32,
    pub entries: Vec<(GenerationId, u8, u64)>,
}

impl Record {
    pub fn newest(&self) -> GenerationId {
        self.entries.iter().map(|e| e.0).max().unwrap_or(GenerationId(0))
    }

    pub fn group(&self, sequence: u64) -> record::Record {
        let entries = self.entries.iter().map(|(generation, cell, value)| Entry {
            generation: generation.0,
            offset_bytes: u64::from(*cell),
            content: Content::Data(value.to_le_bytes().to_vec().into()),
        });
        record::Record {
            is_seal: self.is_seal,
            after_generation: self.after.0,
            unacknowledged: self.unacknowledged,
            entries: entries.collect(),
            ..record::Record::seal(uuid::Uuid::nil(), 0, sequence)
        }
    }
}

/// A frozen generation.
pub struct Frozen {
    pub id: GenerationId,
    pub cells: Cells,
    unlogged: BTreeSet<u8>,
    is_bulk: bool,
    /// Whether its publish is in flight, and the number of the attempt.
    pub is_publishing: bool,
    pub attempt: u32,
    /// Whether only its watermark is missing.
    pub is_unrecorded: bool,
}

/// The inside of an owner of a volume with a WAL. It sends no request itself.
pub struct Owner {
    pub id: u32,
    pub machine: Machine,
    pub active: Cells,
    /// Oldest first.
    pub frozen: VecDeque<Frozen>,
    pub active_unlogged: BTreeSet<u8>,
    pub is_active_bulk: bool,
    pub groups: BTreeMap<u64, Record>,
    pub newest: GenerationId,
    pub appends: Vec<u64>,
    pub append_retries: Vec<u64>,
    pub is_retry_armed: bool,
    pub ages: Vec<GenerationId>,
    pub trimmed: GenerationId,
    first_sequence: u64,
    pub acknowledged: u64,
    pub promises: BTreeMap<FlushId, Cells>,
    pub flushes: u64,
}

impl Owner {
    pub fn new(id: u32, first: GenerationId, next_sequence: u64, depth: usize) -> Self {
        let published = GenerationId(first.0 - 1);
        let wal = GroupCommit::new(next_sequence, published, depth, 40);
        Self {
            id,
            machine: Machine::new(first, Some(wal)),
            active: Cells::new(),
            frozen: VecDeque::new(),
            active_unlogged: BTreeSet::new(),
            is_active_bulk: false,
            groups: BTreeMap::new(),
            newest: GenerationId(0),
            appends: Vec::new(),
            append_retries: Vec::new(),
            is_retry_armed: false,
            ages: Vec::new(),
            trimmed: published,
            first_sequence: next_sequence,
            // The number before the first record is that of the seal that began the part.
            acknowledged: next_sequence - 1,
            promises: BTreeMap::new(),
            flushes: 0,
        }
    }

    pub fn unpublished(&self) -> Cells {
        let mut all = Cells::new();
        for frozen in &self.frozen {
            all.extend(&frozen.cells);
        }
        all.extend(&self.active);
        all
    }

    /// Feeds an event, carries out the actions, and returns what was acknowledged.
    pub fn feed(&mut self, event: Event) -> Vec<Cells> {
        let mut acknowledged = Vec::new();
        let mut todo: std::collections::VecDeque<Action> = self.machine.on(event).into();
        while let Some(action) = todo.pop_front() {
            match action {
                Action::Volume(action) => self.carry_out(action, &mut acknowledged),
                Action::Snapshot { sequence } => {
                    let taken = self.snapshot(sequence);
                    todo.extend(self.machine.on(Event::Wal(group_commit::Event::Snapshot(taken))));
                }
                Action::Append { sequence } => {
                    assert!(
                        !self.appends.contains(&sequence),
                        "one append of a group at a time"
                    );
                    let lowest = self.acknowledged + 1;
                    assert!(
                        sequence < lowest + IN_FLIGHT_MAX,
                        "L1: more on the way than is sealed"
                    );
                    self.appends.push(sequence);
                }
                Action::ArmAppendRetry { sequence, .. } => self.append_retries.push(sequence),
                Action::Forget { sequence } => {
                    assert!(self.groups.remove(&sequence).is_some());
                    self.acknowledged = self.acknowledged.max(sequence);
                }
                Action::TrimWal(generation) => self.trimmed = generation,
            }
        }
        acknowledged
    }

    pub fn carry_out(&mut self, action: state::Action, acknowledged: &mut Vec<Cells>) {
        match action {
            state::Action::Freeze(id) => {
                assert!(self.frozen.len() < FROZEN_MAX);
                self.frozen.push_back(Frozen {
                    id,
                    cells: std::mem::take(&mut self.active),
                    unlogged: std::mem::take(&mut self.active_unlogged),
                    is_bulk: std::mem::take(&mut self.is_active_bulk),
                    is_publishing: false,
                    attempt: 0,
                    is_unrecorded: false,
                });
            }
            state::Action::Publish { generation, attempt } => {
                let at = self.frozen.iter().position(|f| f.id == generation);
                let at = at.expect("frozen before it is published");
                assert!(at == 0 || self.frozen[at - 1].is_publishing, "W1: in order");
                let frozen = &mut self.frozen[at];
                assert!(!std::mem::replace(&mut frozen.is_publishing, true));
                frozen.attempt = attempt;
                self.is_retry_armed = false;
            }
            state::Action::DropFrozen(id) => {
                assert_eq!(self.frozen.pop_front().map(|f| f.id), Some(id));
            }
            state::Action::Answer(id, answer) => {
                let promise = self.promises.remove(&id).expect("answered once");
                if answer == FlushAnswer::Durable {
                    acknowledged.push(promise);
                }
            }
            state::Action::ArmAge(id) => self.ages.push(id),
            state::Action::ArmRetry { .. } => self.is_retry_armed = true,
            state::Action::Fence => assert!(self.machine.is_fenced()),
        }
    }

    /// The publish of the oldest generation ended. A publish that overlaps it fails with it.
    pub fn publish_ended(&mut self, end: PublishEnd) -> Vec<Cells> {
        let mut acknowledged = Vec::new();
        let mut end = end;
        let under_way: Vec<_> = self
            .frozen
            .iter()
            .filter(|f| f.is_publishing)
            .map(|f| f.id)
            .collect();
        for generation in under_way {
            let frozen = self.frozen.iter_mut().find(|f| f.id == generation);
            frozen.expect("under way").is_publishing = false;
            let ended = state::Event::PublishEnded { generation, end };
            acknowledged.extend(self.feed(Event::Volume(ended)));
            if end == PublishEnd::Published {
                break;
            }
            end = PublishEnd::Failed;
        }
        acknowledged
    }

    /// The next publish may begin while the newest one is in flight, if it is.
    pub fn next_may_begin(&mut self) -> Vec<Cells> {
        match self.frozen.back() {
            Some(newest) if newest.is_publishing => {
                let (generation, attempt) = (newest.id, newest.attempt);
                let event = state::Event::NextMayBegin { generation, attempt };
                self.feed(Event::Volume(event))
            }
            _ => Vec::new(),
        }
    }

    pub fn snapshot(&mut self, sequence: u64) -> Snapshot {
        if self.is_active_bulk {
            return Snapshot::TooLarge;
        }
        let mut entries = Vec::new();
        let mut behind = None;
        for frozen in &mut self.frozen {
            if frozen.is_bulk {
                behind = Some(frozen.id);
            } else {
                let taken = std::mem::take(&mut frozen.unlogged);
                entries.extend(taken.into_iter().map(|c| (frozen.id, c, frozen.cells[&c])));
            }
        }
        let active = self.machine.active();
        let taken = std::mem::take(&mut self.active_unlogged);
        entries.extend(taken.into_iter().map(|c| (active, c, self.active[&c])));
        let Some(newest) = entries.iter().map(|e| e.0).max() else {
            return Snapshot::Nothing { behind };
        };
        assert!(
            newest.0 <= self.trimmed.0 + GENERATIONS_AHEAD_MAX,
            "L2: further beyond what is published than openings reckon with"
        );
        let len_bytes = entries.len() as u64;
        let record = Record {
            is_seal: false,
            owner: self.id,
            unacknowledged: record::unacknowledged(sequence, self.acknowledged, self.first_sequence),
            after: std::mem::replace(&mut self.newest, newest),
            entries,
        };
        self.groups.insert(sequence, record);
        Snapshot::Record {
            newest,
            len_bytes,
            behind,
        }
    }

    pub fn write(&mut self, cell: u8, value: u64) -> Vec<Cells> {
        let is_first = self.active.is_empty();
        self.active.insert(cell, value);
        self.active_unlogged.insert(cell);
        self.is_active_bulk |= self.active_unlogged.len() > BULK_CELLS;
        let mut acknowledged = Vec::new();
        if is_first {
            acknowledged = self.feed(Event::Volume(state::Event::Dirtied));
        }
        if self.active.len() > 7 {
            acknowledged.extend(self.feed(Event::Volume(state::Event::Grown)));
        }
        acknowledged
    }

    pub fn flush(&mut self) -> Vec<Cells> {
        self.flushes += 1;
        let id = FlushId(self.flushes);
        self.promises.insert(id, self.unpublished());
        let is_active_dirty = !self.active.is_empty();
        self.feed(Event::Flush {
            id,
            is_active_dirty,
            needs_checkpoint: false,
        })
    }
}

pub fn seal(owner: u32) -> Record {
    Record {
        is_seal: true,
        owner,
        after: GenerationId(0),
        unacknowledged: 0,
        entries: Vec::new(),
    }
}
