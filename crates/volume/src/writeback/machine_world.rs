//! The model of an owner that the tests of the machines and the simulation share: the real `Machine` with an overlay of
//! numbered cells, each write a number larger than any before it. What it wants sent is left in its fields.

use std::collections::{BTreeMap, BTreeSet};

use super::machine::{Action, Event, Machine};
use super::state::{self, FlushAnswer, FlushId, GenerationId};
use crate::log::group_commit::{self, GroupCommit, Snapshot};
use crate::log::record::{Content, Entry, Group};
use crate::log::replay::IN_FLIGHT_MAX;

pub type Cells = BTreeMap<u8, u64>;

/// More cells than this are not logged.
const BULK_CELLS: usize = 5;

/// A record of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub is_seal: bool,
    pub owner: u32,
    pub after: GenerationId,
    pub entries: Vec<(GenerationId, u8, u64)>,
}

impl Record {
    pub fn newest(&self) -> GenerationId {
        self.entries.iter().map(|e| e.0).max().unwrap_or(GenerationId(0))
    }

    pub fn group(&self, sequence: u64) -> Group {
        let entries = self.entries.iter().map(|(generation, cell, value)| Entry {
            generation: generation.0,
            offset_bytes: u64::from(*cell),
            content: Content::Data(value.to_le_bytes().to_vec().into()),
        });
        Group {
            is_seal: self.is_seal,
            after_generation: self.after.0,
            entries: entries.collect(),
            ..Group::seal(uuid::Uuid::nil(), 0, sequence)
        }
    }
}

/// An owner of a volume with a log, seen from the inside: it sends nothing itself.
pub struct Owner {
    pub id: u32,
    pub machine: Machine,
    pub active: Cells,
    pub frozen: Option<(GenerationId, Cells)>,
    pub active_unlogged: BTreeSet<u8>,
    pub is_active_bulk: bool,
    pub frozen_unlogged: BTreeSet<u8>,
    pub is_frozen_bulk: bool,
    pub groups: BTreeMap<u64, Record>,
    pub newest: GenerationId,
    pub appends: Vec<u64>,
    pub append_retries: Vec<u64>,
    /// Whether a publish is under way, and whether only its watermark is missing.
    pub is_publishing: bool,
    pub attempt: u32,
    pub is_unrecorded: bool,
    pub is_retry_armed: bool,
    pub ages: Vec<GenerationId>,
    pub trimmed: GenerationId,
    pub acknowledged: u64,
    pub promises: BTreeMap<FlushId, Cells>,
    pub flushes: u64,
}

impl Owner {
    pub fn new(id: u32, first: GenerationId, next_sequence: u64, depth: usize) -> Self {
        let published = GenerationId(first.0 - 1);
        let log = GroupCommit::new(next_sequence, published, depth, 40);
        Self {
            id,
            machine: Machine::new(first, Some(log)),
            active: Cells::new(),
            frozen: None,
            active_unlogged: BTreeSet::new(),
            is_active_bulk: false,
            frozen_unlogged: BTreeSet::new(),
            is_frozen_bulk: false,
            groups: BTreeMap::new(),
            newest: GenerationId(0),
            appends: Vec::new(),
            append_retries: Vec::new(),
            is_publishing: false,
            attempt: 0,
            is_unrecorded: false,
            is_retry_armed: false,
            ages: Vec::new(),
            trimmed: published,
            acknowledged: 0,
            promises: BTreeMap::new(),
            flushes: 0,
        }
    }

    pub fn unpublished(&self) -> Cells {
        let mut all = self.frozen.as_ref().map(|f| f.1.clone()).unwrap_or_default();
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
                    todo.extend(self.machine.on(Event::Log(group_commit::Event::Snapshot(taken))));
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
                Action::TrimLog(generation) => self.trimmed = generation,
            }
        }
        acknowledged
    }

    pub fn carry_out(&mut self, action: state::Action, acknowledged: &mut Vec<Cells>) {
        match action {
            state::Action::Freeze(id) => {
                assert!(self.frozen.is_none());
                self.frozen = Some((id, std::mem::take(&mut self.active)));
                self.frozen_unlogged = std::mem::take(&mut self.active_unlogged);
                self.is_frozen_bulk = std::mem::take(&mut self.is_active_bulk);
            }
            state::Action::Publish { attempt, .. } => {
                assert!(!self.is_publishing);
                self.attempt = attempt;
                self.is_publishing = true;
                self.is_retry_armed = false;
            }
            state::Action::DropFrozen(id) => {
                assert_eq!(self.frozen.take().map(|f| f.0), Some(id));
                self.frozen_unlogged.clear();
                self.is_frozen_bulk = false;
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

    pub fn snapshot(&mut self, sequence: u64) -> Snapshot {
        if self.is_active_bulk {
            return Snapshot::TooLarge;
        }
        let mut entries = Vec::new();
        let mut behind = None;
        if let Some((id, cells)) = &self.frozen {
            if self.is_frozen_bulk {
                behind = Some(*id);
            } else {
                let taken = std::mem::take(&mut self.frozen_unlogged);
                entries.extend(taken.into_iter().map(|c| (*id, c, cells[&c])));
            }
        }
        let active = self.machine.active();
        let taken = std::mem::take(&mut self.active_unlogged);
        entries.extend(taken.into_iter().map(|c| (active, c, self.active[&c])));
        let Some(newest) = entries.iter().map(|e| e.0).max() else {
            return Snapshot::Nothing { behind };
        };
        let len_bytes = entries.len() as u64;
        let record = Record {
            is_seal: false,
            owner: self.id,
            after: std::mem::replace(&mut self.newest, newest),
            entries,
        };
        self.groups.insert(sequence, record);
        Snapshot::Group {
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
        entries: Vec::new(),
    }
}
