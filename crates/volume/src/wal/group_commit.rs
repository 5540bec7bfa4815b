//! Which record of the WAL makes which flush durable (pure: events in, actions out, no clock, no I/O).
//!
//! A flush takes the changes that the WAL lacks at that moment (a *snapshot*) and appends them as one record. Records
//! have consecutive numbers. Up to `depth` appends are in flight at once; flushes that arrive while the limit is
//! reached share the next record.
//!
//! | a flush waits for | until |
//! |---|---|
//! | its snapshot | the number of appends in flight is below the limit |
//! | its record, and every earlier record | they are durable, or the generations in them are published |
//! | the frozen generation, when that is too large to be logged | it is published |
//! | a checkpoint (then the checkpoint machine answers it) | its changes are too large, the WAL is full, or an append failed or is slow |
//!
//! *Invariant L1*: a flush is answered with success only in two cases: no record up to and including its own is
//! missing, or every change that it covers from the first missing record on is published. A failed append is repeated
//! with the same number and the same bytes until it succeeds; meanwhile flushes wait for checkpoints. When an append is
//! refused because the number holds somebody else's record (a seal), the owner is fenced: it can acknowledge nothing
//! more.

use std::collections::VecDeque;

use crate::base::ids::{FlushAnswer, FlushId, GenerationId};

/// How an append ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AppendEnd {
    /// The record is durable.
    Durable,
    /// The record is not known to be durable. The append may be tried again.
    Failed,
    /// Another owner sealed the WAL.
    Fenced,
}

/// What a snapshot of the changes that the WAL lacks contains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snapshot {
    /// The WAL has every change, except for those of the generation `behind`.
    Nothing {
        /// A frozen generation that is too large for the WAL.
        behind: Option<GenerationId>,
    },
    /// The changes that the WAL lacked became a record.
    Record {
        /// The highest generation in it.
        newest: GenerationId,
        /// Its length as stored, in bytes.
        len_bytes: u64,
        /// A frozen generation that is too large for the WAL.
        behind: Option<GenerationId>,
    },
    /// There is more than one record may hold. Nothing was taken.
    TooLarge,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A flush arrived. Every snapshot from now on can hold all writes that were answered before it.
    Flush(FlushId),
    /// The result of the snapshot that was asked for.
    Snapshot(Snapshot),
    /// The append of a record ended.
    AppendEnded {
        /// Its number.
        sequence: u64,
        /// The way it ended.
        end: AppendEnd,
    },
    /// The append of a record takes long.
    AppendSlow {
        /// Its number.
        sequence: u64,
    },
    /// The wait after a failed append is over.
    RetryDue {
        /// The record's number.
        sequence: u64,
    },
    /// This generation and all before it are published, and the watermark covers them.
    Published(GenerationId),
    /// A flush was answered elsewhere: by a checkpoint, or because its time limit passed.
    FlushGone(FlushId),
    /// A publish found that another writer took the volume over.
    Fenced,
}

/// What is to be done, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Take the changes that the WAL lacks. If there are any, make them a record with this number. Send
    /// [`Event::Snapshot`] before any other event.
    Snapshot {
        /// The record's number.
        sequence: u64,
    },
    /// Append the record with this number.
    Append {
        /// The record's number.
        sequence: u64,
    },
    /// Send [`Event::RetryDue`] after the back-off for this attempt.
    ArmRetry {
        /// The record's number.
        sequence: u64,
        /// Attempts made so far, from 1.
        attempt: u32,
    },
    /// Answer a flush.
    Answer(FlushId, FlushAnswer),
    /// This flush needs a checkpoint. The checkpoint machine answers it.
    NeedsCheckpoint(FlushId),
    /// A flush waits for the frozen generation. If its publish failed, try it again now.
    RetryPublish,
    /// The WAL has grown. A checkpoint would allow the removal of records.
    WantCheckpoint,
    /// The record's bytes are not needed any more.
    Forget {
        /// The record's number.
        sequence: u64,
    },
    /// Stop writing for good.
    Fence,
}

#[derive(Debug)]
struct InFlight {
    sequence: u64,
    newest: GenerationId,
    is_durable: bool,
    attempt: u32,
}

#[derive(Debug)]
struct Waiting {
    id: FlushId,
    /// The flush waits for every record up to this number.
    sequence: u64,
    behind: Option<GenerationId>,
    is_by_checkpoint: bool,
}

/// The group commit of one WAL.
#[derive(Debug)]
pub struct GroupCommit {
    depth: usize,
    capacity_bytes: u64,
    next_sequence: u64,
    published: GenerationId,
    /// The records from the first one that is not durable on.
    in_flight: VecDeque<InFlight>,
    /// The records that a replay would need: the newest generation and the length in bytes of each.
    live: VecDeque<(GenerationId, u64)>,
    live_bytes: u64,
    /// Flushes that wait for a snapshot.
    gathering: Vec<FlushId>,
    waiting: Vec<Waiting>,
    /// An append failed or is slow, and appends are still in flight.
    is_troubled: bool,
    is_fenced: bool,
}

impl GroupCommit {
    /// For a WAL whose next record has the number `next_sequence`, on top of the published generation `published`. At
    /// most `depth` appends are in flight at once. While unpublished records take more than `capacity_bytes`, flushes
    /// wait for checkpoints.
    pub fn new(next_sequence: u64, published: GenerationId, depth: usize, capacity_bytes: u64) -> Self {
        Self {
            depth,
            capacity_bytes,
            next_sequence,
            published,
            in_flight: VecDeque::new(),
            live: VecDeque::new(),
            live_bytes: 0,
            gathering: Vec::new(),
            waiting: Vec::new(),
            is_troubled: false,
            is_fenced: false,
        }
    }

    /// Takes an event and returns what is to be done.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Flush(id) => self.flush(id, &mut actions),
            Event::Snapshot(snapshot) => self.taken(snapshot, &mut actions),
            Event::AppendEnded { sequence, end } => self.append_ended(sequence, end, &mut actions),
            Event::AppendSlow { sequence } => {
                if self
                    .in_flight
                    .iter()
                    .any(|g| g.sequence == sequence && !g.is_durable)
                {
                    self.trouble(&mut actions);
                }
            }
            Event::RetryDue { sequence } => {
                let is_missing = |g: &InFlight| g.sequence == sequence && !g.is_durable;
                if !self.is_fenced && self.in_flight.iter().any(is_missing) {
                    actions.push(Action::Append { sequence });
                }
            }
            Event::Published(generation) => self.published(generation, &mut actions),
            Event::FlushGone(id) => {
                self.gathering.retain(|g| *g != id);
                self.waiting.retain(|w| w.id != id);
            }
            Event::Fenced => self.fence(&mut actions),
        }
        actions
    }

    /// Bytes of the records that a replay would need.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// Whether no append is in flight that anybody could still need.
    pub fn is_idle(&self) -> bool {
        self.is_fenced || self.in_flight.iter().all(|g| g.newest <= self.published)
    }

    fn flush(&mut self, id: FlushId, actions: &mut Vec<Action>) {
        if self.is_fenced {
            actions.push(Action::Answer(id, FlushAnswer::Fenced));
        } else if self.is_troubled || self.live_bytes >= self.capacity_bytes {
            actions.push(Action::NeedsCheckpoint(id));
        } else {
            self.gathering.push(id);
            self.snapshot_if_room(actions);
        }
    }

    fn snapshot_if_room(&mut self, actions: &mut Vec<Action>) {
        if !self.gathering.is_empty() && self.in_flight.len() < self.depth {
            actions.push(Action::Snapshot {
                sequence: self.next_sequence,
            });
        }
    }

    fn taken(&mut self, snapshot: Snapshot, actions: &mut Vec<Action>) {
        let behind = match snapshot {
            Snapshot::TooLarge => {
                actions.extend(self.gathering.drain(..).map(Action::NeedsCheckpoint));
                return;
            }
            Snapshot::Nothing { behind } => behind,
            Snapshot::Record {
                newest,
                len_bytes,
                behind,
            } => {
                let sequence = self.next_sequence;
                self.next_sequence += 1;
                self.in_flight.push_back(InFlight {
                    sequence,
                    newest,
                    is_durable: false,
                    attempt: 0,
                });
                let half = self.capacity_bytes / 2;
                let was_below = self.live_bytes < half;
                self.live.push_back((newest, len_bytes));
                self.live_bytes += len_bytes;
                actions.push(Action::Append { sequence });
                if was_below && self.live_bytes >= half {
                    actions.push(Action::WantCheckpoint);
                }
                behind
            }
        };
        let sequence = self.next_sequence - 1;
        let waiting = self.gathering.drain(..).map(|id| Waiting {
            id,
            sequence,
            behind,
            is_by_checkpoint: false,
        });
        self.waiting.extend(waiting);
        if behind.is_some_and(|g| g > self.published) {
            actions.push(Action::RetryPublish);
        }
        self.settle(actions);
    }

    fn append_ended(&mut self, sequence: u64, end: AppendEnd, actions: &mut Vec<Action>) {
        let Some(group) = self.in_flight.iter_mut().find(|g| g.sequence == sequence) else {
            return;
        };
        if self.is_fenced || group.is_durable {
            return;
        }
        match end {
            AppendEnd::Durable => {
                group.is_durable = true;
                while self.in_flight.front().is_some_and(|g| g.is_durable) {
                    let Some(first) = self.in_flight.pop_front() else {
                        break;
                    };
                    actions.push(Action::Forget {
                        sequence: first.sequence,
                    });
                }
                self.is_troubled &= !self.in_flight.is_empty();
                self.settle(actions);
                self.snapshot_if_room(actions);
            }
            AppendEnd::Failed => {
                group.attempt += 1;
                let attempt = group.attempt;
                actions.push(Action::ArmRetry { sequence, attempt });
                self.trouble(actions);
            }
            AppendEnd::Fenced => self.fence(actions),
        }
    }

    fn fence(&mut self, actions: &mut Vec<Action>) {
        if std::mem::replace(&mut self.is_fenced, true) {
            return;
        }
        let waiting = self.waiting.drain(..).map(|w| w.id);
        let all = waiting.chain(self.gathering.drain(..));
        actions.extend(all.map(|id| Action::Answer(id, FlushAnswer::Fenced)));
        actions.push(Action::Fence);
    }

    /// While the WAL is in trouble, every flush waits for a checkpoint, so that none waits longer than a checkpoint
    /// takes.
    fn trouble(&mut self, actions: &mut Vec<Action>) {
        self.is_troubled = true;
        actions.extend(self.gathering.drain(..).map(Action::NeedsCheckpoint));
        for w in self.waiting.iter_mut().filter(|w| !w.is_by_checkpoint) {
            w.is_by_checkpoint = true;
            actions.push(Action::NeedsCheckpoint(w.id));
        }
    }

    fn published(&mut self, generation: GenerationId, actions: &mut Vec<Action>) {
        self.published = self.published.max(generation);
        while let Some(&(newest, len_bytes)) = self.live.front()
            && newest <= self.published
        {
            self.live.pop_front();
            self.live_bytes -= len_bytes;
        }
        self.settle(actions);
    }

    /// Answers the flushes whose conditions are met (Invariant L1).
    fn settle(&mut self, actions: &mut Vec<Action>) {
        // A record behind a missing one counts for nothing even if it is stored: the next owner seals the gap, and not
        // the record behind it.
        let missing = self
            .in_flight
            .iter()
            .skip_while(|g| g.is_durable)
            .find(|g| g.newest > self.published)
            .map_or(u64::MAX, |g| g.sequence);
        let published = self.published;
        self.waiting.retain(|w| {
            let is_done = w.sequence < missing && w.behind.is_none_or(|g| g <= published);
            if is_done {
                actions.push(Action::Answer(w.id, FlushAnswer::Durable));
            }
            !is_done
        });
    }
}

#[cfg(test)]
#[path = "group_commit_tests.rs"]
mod tests;
