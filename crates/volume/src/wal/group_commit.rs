//! Which flush is made durable by which group of the log (pure: events in, actions out, no clock, no I/O).
//!
//! A flush takes what the log lacks at that moment (a *snapshot*) and appends it as one group. Groups have dense
//! sequence numbers; up to `depth` of them are on their way at once, and flushes that arrive while as many are share
//! the next one.
//!
//! | a flush waits for | until |
//! |---|---|
//! | its snapshot | a place among the groups on their way is free |
//! | its group, and every group before it | they are durable, or the generations in them are published |
//! | the frozen generation, when that is too large to be logged | it is published |
//! | a checkpoint (then the write-back machine answers it) | its changes are too large, the log is full, or an append failed or is slow |
//!
//! *Invariant L1*: a flush is answered with success only when no group at or before its own is missing, or when from the
//! first missing one on everything it covers is published. A group that failed is appended again with the same number and the same bytes, for as
//! long as it takes; meanwhile flushes go by checkpoints. An append refused because the number is taken by somebody
//! else's record (a seal) ends the owner: it can acknowledge nothing any more.

use std::collections::VecDeque;

use crate::base::ids::{FlushAnswer, FlushId, GenerationId};

/// How an append ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AppendEnd {
    /// The group is durable.
    Durable,
    /// It is not known to be; it may be tried again.
    Failed,
    /// Another owner sealed the log.
    Fenced,
}

/// What a snapshot found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snapshot {
    /// The log has everything, but for the generation `behind`.
    Nothing {
        /// A frozen generation that is too large to be logged.
        behind: Option<GenerationId>,
    },
    /// A group was made of what the log lacked.
    Group {
        /// The highest generation in it.
        newest: GenerationId,
        /// Its length as stored, in bytes.
        len_bytes: u64,
        /// A frozen generation that is too large to be logged.
        behind: Option<GenerationId>,
    },
    /// More than is logged at once; nothing was taken.
    TooLarge,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A flush arrived; every write replied to before it can be in a snapshot from now on.
    Flush(FlushId),
    /// What the snapshot asked for found.
    Snapshot(Snapshot),
    /// The append of a group ended.
    AppendEnded {
        /// Its number.
        sequence: u64,
        /// How.
        end: AppendEnd,
    },
    /// The append of a group takes long.
    AppendSlow {
        /// Its number.
        sequence: u64,
    },
    /// The wait after a failed append is over.
    RetryDue {
        /// The group's number.
        sequence: u64,
    },
    /// This generation, and all before it, are published and the watermark says so.
    Published(GenerationId),
    /// A flush was answered elsewhere: by a checkpoint, or because its time was up.
    FlushGone(FlushId),
    /// A publish found that another writer took the volume over.
    Fenced,
}

/// What is to be done, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Take what the log lacks, make it a group with this number if there is anything, send [`Event::Snapshot`] before
    /// any other event.
    Snapshot {
        /// The number.
        sequence: u64,
    },
    /// Append the group with this number.
    Append {
        /// The number.
        sequence: u64,
    },
    /// Send [`Event::RetryDue`] after the back-off for this attempt.
    ArmRetry {
        /// The group's number.
        sequence: u64,
        /// Attempts made so far, from 1.
        attempt: u32,
    },
    /// Answer a flush.
    Answer(FlushId, FlushAnswer),
    /// This flush needs a checkpoint; the write-back machine answers it.
    NeedsCheckpoint(FlushId),
    /// The frozen generation is waited for: if its publish failed, it is to be tried again now.
    RetryPublish,
    /// The log has grown: a checkpoint would allow to remove groups.
    WantCheckpoint,
    /// The group's bytes are not needed any more.
    Forget {
        /// Its number.
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
    /// Every group up to this one.
    sequence: u64,
    behind: Option<GenerationId>,
    is_by_checkpoint: bool,
}

/// The group commit of one log.
#[derive(Debug)]
pub struct GroupCommit {
    depth: usize,
    capacity_bytes: u64,
    next_sequence: u64,
    published: GenerationId,
    /// From the first group that is not durable on.
    in_flight: VecDeque<InFlight>,
    /// Groups that replay would need: the newest generation and the length in bytes of each.
    live: VecDeque<(GenerationId, u64)>,
    live_bytes: u64,
    /// Flushes without a snapshot.
    gathering: Vec<FlushId>,
    waiting: Vec<Waiting>,
    /// An append failed or is slow, and groups are still on their way.
    is_troubled: bool,
    is_fenced: bool,
}

impl GroupCommit {
    /// For a log whose next group has the number `next_sequence`, on top of the published generation `published`. At
    /// most `depth` groups are on their way at once; beyond `capacity_bytes` of groups not yet published flushes go by
    /// checkpoints.
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

    /// Takes an event in and says what is to be done.
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

    /// Bytes of the groups that a replay would need.
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// Whether no group is on its way that anybody could still need.
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
            Snapshot::Group {
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

    /// Nobody waits for a log that is in trouble longer than for a checkpoint.
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

    /// Answers the flushes that have what they waited for (Invariant L1).
    fn settle(&mut self, actions: &mut Vec<Action>) {
        // Past a missing group even one that is stored counts for nothing: the next owner seals the gap, not what lies
        // behind it.
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
