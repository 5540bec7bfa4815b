//! When the unpublished writes of a volume are frozen, published and retried, and which flush is answered when
//! (pure: events in, actions out, no clock, no I/O).
//!
//! Generations are numbered from 1, and the numbers continue over restarts. With a WAL a flush asks for no checkpoint;
//! it waits until the group commit (`crate::wal::group_commit`) has answered it, or says that a checkpoint is needed
//! after all. One generation becomes one checkpoint. At most two generations are frozen, and each stays frozen until
//! its publish has succeeded. They are published in the order of their numbers. The publish of the second overlaps that
//! of the first only when the engine allows it, which is when the connection would otherwise be idle.
//!
//! | a frozen generation is | until |
//! |---|---|
//! | being published | published: it is dropped; failed: it is kept |
//! | kept | it is the oldest, no publish is in flight, and a retry is due, a flush arrives, or the previous generation was published → being published again |
//!
//! A fenced volume keeps its frozen generations, and publishes nothing more.
//!
//! *Invariant W4*: a flush is answered with success only once every generation that could hold a write that was
//! answered before the flush arrived is published. A flush waits for the generation that is active when it arrives, or,
//! when that is empty, for the newest frozen one. A failed publish answers no flush: the flush goes on waiting for the
//! retry, and is answered with an error when its time is up or the volume is fenced. The data is kept in both cases.

use std::collections::VecDeque;

use crate::base::ids::{FROZEN_MAX, FlushAnswer, FlushId, GenerationId};

/// How a publish ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishEnd {
    /// A checkpoint that holds the generation is published.
    Published,
    /// The generation is not known to be published. The publish may be tried again.
    Failed,
    /// Another writer published: this volume must never write again.
    Fenced,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The active generation took its first write.
    Dirtied,
    /// The active generation grew past the size at which it is published.
    Grown,
    /// `checkpoint_interval` passed since the first write of this generation.
    AgeDue(GenerationId),
    /// A checkpoint is wanted, although no flush waits for it.
    CheckpointWanted {
        /// Whether the active generation holds anything.
        is_active_dirty: bool,
    },
    /// A flush arrived. Every write that was answered before it is in the overlay.
    Flush {
        /// Identifies the flush in [`Action::Answer`].
        id: FlushId,
        /// Whether the active generation holds anything.
        is_active_dirty: bool,
        /// Whether a checkpoint is to start for the flush. Otherwise it waits for the next one, unless the WAL answers
        /// it earlier.
        needs_checkpoint: bool,
    },
    /// A flush that did not ask for a checkpoint needs one after all.
    FlushNeedsCheckpoint(FlushId),
    /// A flush was answered elsewhere: the WAL holds everything that it covers.
    FlushGone(FlushId),
    /// The time limit of a flush has passed.
    FlushExpired(FlushId),
    /// The publish of a generation ended.
    PublishEnded {
        /// Its number.
        generation: GenerationId,
        /// The way it ended.
        end: PublishEnd,
    },
    /// The next publish may begin while this one is in flight.
    NextMayBegin {
        /// The generation being published.
        generation: GenerationId,
        /// The number of the attempt.
        attempt: u32,
    },
    /// The wait after a failed publish is over.
    RetryDue,
    /// Another owner is known to have taken the volume over, or to have sealed its WAL.
    Fenced,
}

/// What is to be done, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Freeze the active generation, which holds data, under this number.
    Freeze(GenerationId),
    /// Publish a frozen generation: the oldest, or the next one while the oldest is in flight.
    Publish {
        /// Its number.
        generation: GenerationId,
        /// 0 for the first attempt; above 0 the engine must be recovered first.
        attempt: u32,
    },
    /// The oldest frozen generation is published: drop it.
    DropFrozen(GenerationId),
    /// Send [`Event::AgeDue`] in `checkpoint_interval`.
    ArmAge(GenerationId),
    /// Send [`Event::RetryDue`] after the back-off for this attempt.
    ArmRetry {
        /// Attempts made so far, from 1.
        attempt: u32,
    },
    /// Answer a flush.
    Answer(FlushId, FlushAnswer),
    /// Stop writing for good.
    Fence,
}

#[derive(Debug)]
struct Frozen {
    id: GenerationId,
    /// Attempts that failed.
    attempt: u32,
    is_under_way: bool,
    /// Whether the next publish may begin while this one is in flight.
    may_be_followed: bool,
}

impl Frozen {
    fn publish(&mut self) -> Action {
        self.is_under_way = true;
        self.may_be_followed = false;
        Action::Publish {
            generation: self.id,
            attempt: self.attempt,
        }
    }
}

/// The checkpoint state machine of one volume.
#[derive(Debug)]
pub struct WriteBack {
    active: GenerationId,
    is_active_dirty: bool,
    /// Oldest first.
    frozen: VecDeque<Frozen>,
    is_fenced: bool,
    /// A checkpoint of the active generation is wanted as soon as one can start.
    is_wanted: bool,
    waiting: Vec<(FlushId, GenerationId)>,
}

impl Default for WriteBack {
    fn default() -> Self {
        Self::starting_at(GenerationId(1))
    }
}

impl WriteBack {
    /// Begins with `first` as the number of the first generation.
    pub fn starting_at(first: GenerationId) -> Self {
        Self {
            active: first,
            is_active_dirty: false,
            frozen: VecDeque::new(),
            is_fenced: false,
            is_wanted: false,
            waiting: Vec::new(),
        }
    }

    /// Whether the active generation is known to hold anything.
    pub fn is_active_dirty(&self) -> bool {
        self.is_active_dirty
    }

    /// The number of the active generation.
    pub fn active(&self) -> GenerationId {
        self.active
    }

    /// Takes an event and returns what is to be done.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Dirtied => self.dirtied(&mut actions),
            Event::Grown => {
                self.dirtied(&mut actions);
                self.is_wanted = true;
            }
            Event::AgeDue(generation) => self.is_wanted |= generation == self.active,
            Event::CheckpointWanted { is_active_dirty } => {
                if is_active_dirty {
                    self.dirtied(&mut actions);
                    self.is_wanted = true;
                }
                self.retry_now(&mut actions);
            }
            Event::Flush {
                id,
                is_active_dirty,
                needs_checkpoint,
            } => self.flush(id, is_active_dirty, needs_checkpoint, &mut actions),
            Event::FlushNeedsCheckpoint(id) => {
                if let Some((_, waits_for)) = self.waiting.iter().find(|(w, _)| *w == id) {
                    self.is_wanted |= *waits_for == self.active;
                    self.retry_now(&mut actions);
                }
            }
            Event::FlushGone(id) => self.waiting.retain(|(w, _)| *w != id),
            Event::FlushExpired(id) => {
                if let Some(at) = self.waiting.iter().position(|(w, _)| *w == id) {
                    self.waiting.remove(at);
                    actions.push(Action::Answer(id, FlushAnswer::TimedOut));
                }
            }
            Event::PublishEnded { generation, end } => self.publish_ended(generation, end, &mut actions),
            Event::NextMayBegin { generation, attempt } => {
                let mut frozen = self.frozen.iter_mut();
                if let Some(frozen) = frozen.find(|f| f.id == generation && f.attempt == attempt) {
                    frozen.may_be_followed = true;
                }
            }
            Event::RetryDue => self.retry_now(&mut actions),
            Event::Fenced => self.fence(&mut actions),
        }
        self.start_if_wanted(&mut actions);
        actions
    }

    /// Whether another owner took the volume over.
    pub fn is_fenced(&self) -> bool {
        self.is_fenced
    }

    fn dirtied(&mut self, actions: &mut Vec<Action>) {
        if !self.is_active_dirty {
            self.is_active_dirty = true;
            actions.push(Action::ArmAge(self.active));
        }
    }

    fn flush(
        &mut self,
        id: FlushId,
        is_active_dirty: bool,
        needs_checkpoint: bool,
        actions: &mut Vec<Action>,
    ) {
        if self.is_fenced {
            actions.push(Action::Answer(id, FlushAnswer::Fenced));
            return;
        }
        if is_active_dirty {
            self.dirtied(actions);
            self.is_wanted |= needs_checkpoint;
            self.waiting.push((id, self.active));
        } else if let Some(newest) = self.frozen.back() {
            self.waiting.push((id, newest.id));
        } else {
            actions.push(Action::Answer(id, FlushAnswer::Durable));
        }
        if needs_checkpoint {
            self.retry_now(actions);
        }
    }

    fn retry_now(&mut self, actions: &mut Vec<Action>) {
        if self.is_fenced || self.frozen.iter().any(|f| f.is_under_way) {
            return;
        }
        if let Some(oldest) = self.frozen.front_mut() {
            actions.push(oldest.publish());
        }
    }

    fn publish_ended(&mut self, generation: GenerationId, end: PublishEnd, actions: &mut Vec<Action>) {
        let at = self
            .frozen
            .iter()
            .position(|f| f.id == generation && f.is_under_way);
        let Some(at) = at.filter(|_| !self.is_fenced) else {
            return;
        };
        match end {
            PublishEnd::Published if at == 0 => {
                self.frozen.pop_front();
                actions.push(Action::DropFrozen(generation));
                self.waiting.retain(|(id, waits_for)| {
                    let is_done = *waits_for <= generation;
                    if is_done {
                        actions.push(Action::Answer(*id, FlushAnswer::Durable));
                    }
                    !is_done
                });
                // A generation that failed together with this one is published again at once, without its own retry wait.
                self.retry_now(actions);
            }
            // Out-of-order success counts as failure: no generation is published before the previous one.
            PublishEnd::Published | PublishEnd::Failed => {
                self.frozen[at].attempt += 1;
                self.frozen[at].is_under_way = false;
                if self.frozen.iter().all(|f| !f.is_under_way) {
                    let attempt = self.frozen[0].attempt;
                    actions.push(Action::ArmRetry { attempt });
                }
            }
            PublishEnd::Fenced => self.fence(actions),
        }
    }

    /// Does not wait for a publish in flight. That publish either fails, or was stored before the new owner's open and
    /// is part of what the new owner sees. In both cases it is reported to nobody as a success.
    fn fence(&mut self, actions: &mut Vec<Action>) {
        if std::mem::replace(&mut self.is_fenced, true) {
            return;
        }
        actions.push(Action::Fence);
        let waiting = self.waiting.drain(..);
        actions.extend(waiting.map(|(id, _)| Action::Answer(id, FlushAnswer::Fenced)));
    }

    fn may_freeze(&self) -> bool {
        self.frozen.back().is_none_or(|newest| {
            newest.is_under_way && newest.may_be_followed && self.frozen.len() < FROZEN_MAX
        })
    }

    fn start_if_wanted(&mut self, actions: &mut Vec<Action>) {
        if !self.is_fenced && self.is_wanted && self.is_active_dirty && self.may_freeze() {
            let generation = self.active;
            self.active = GenerationId(generation.0 + 1);
            self.is_active_dirty = false;
            self.is_wanted = false;
            let mut frozen = Frozen {
                id: generation,
                attempt: 0,
                is_under_way: false,
                may_be_followed: false,
            };
            actions.push(Action::Freeze(generation));
            actions.push(frozen.publish());
            self.frozen.push_back(frozen);
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
