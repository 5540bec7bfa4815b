//! When the unpublished writes of a volume are frozen, published and retried, and which flush is answered when
//! (pure: events in, actions out, no clock, no I/O).
//!
//! Generations are numbered from 1, and go on over restarts. With a log a flush waits without asking for a checkpoint,
//! until the log (`crate::log::group_commit`) has answered it, or says that a checkpoint is needed after all. One generation is one checkpoint; at most one is frozen, and it stays frozen until
//! its publish has succeeded.
//!
//! | phase | frozen generation | leaves it |
//! |---|---|---|
//! | `Idle` | none | something wants a checkpoint and the active generation is dirty → `Publishing` |
//! | `Publishing` | being published | published → `Idle` (or at once the next); failed → `Waiting` |
//! | `Waiting` | whole, publish failed | retry due, or a flush arrives → `Publishing` |
//! | `Fenced` | whole if there was one, never published here again | never |
//!
//! *Invariant W4*: a flush is answered with success only once every generation that could hold a write replied to
//! before it arrived is published: it waits for the generation that is active when it arrives (or, when that is
//! empty, for the frozen one). A failed publish answers nobody: the flush goes on waiting for the retry, and is
//! answered with an error when its time is up or the volume is fenced; the data is kept either way.

/// Number of a generation; the first is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GenerationId(pub u64);

/// A waiting flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlushId(pub u64);

/// How a publish ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishEnd {
    /// A checkpoint that holds the generation is published.
    Published,
    /// It is not known to be; it may be tried again.
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
    /// A checkpoint is wanted though nobody waits for it.
    CheckpointWanted {
        /// Whether the active generation holds anything.
        is_active_dirty: bool,
    },
    /// A flush arrived; every write replied to before it is in the overlay.
    Flush {
        /// Its name in [`Action::Answer`].
        id: FlushId,
        /// Whether the active generation holds anything.
        is_active_dirty: bool,
        /// Whether a checkpoint is to start for it; otherwise it waits for one, unless a log is faster.
        needs_checkpoint: bool,
    },
    /// A flush that came without needing a checkpoint needs one after all.
    FlushNeedsCheckpoint(FlushId),
    /// A flush was answered elsewhere: the log has what it covers.
    FlushGone(FlushId),
    /// A flush has waited as long as it may.
    FlushExpired(FlushId),
    /// The publish under way ended.
    PublishEnded(PublishEnd),
    /// The wait after a failed publish is over.
    RetryDue,
    /// Another writer is known to have taken the volume over, or sealed its log.
    Fenced,
}

/// Answer to a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlushAnswer {
    /// Everything the flush covers is durable.
    Durable,
    /// Not durable within the time allowed; the data is kept and retried.
    TimedOut,
    /// Another writer took the volume over; never durable through this server.
    Fenced,
}

/// What is to be done, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Freeze the active generation (it is dirty) under this number.
    Freeze(GenerationId),
    /// Publish the frozen generation.
    Publish {
        /// Its number.
        generation: GenerationId,
        /// 0 for the first attempt; above 0 the engine must be recovered first.
        attempt: u32,
    },
    /// The frozen generation is published: drop it.
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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Publishing { attempt: u32 },
    Waiting { attempt: u32 },
    Fenced,
}

/// The write-back state machine of one volume.
#[derive(Debug)]
pub struct WriteBack {
    active: GenerationId,
    is_active_dirty: bool,
    phase: Phase,
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
    /// With `first` as the number of the first generation.
    pub fn starting_at(first: GenerationId) -> Self {
        Self {
            active: first,
            is_active_dirty: false,
            phase: Phase::Idle,
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

    /// Takes an event in and says what is to be done.
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
            Event::PublishEnded(end) => self.publish_ended(end, &mut actions),
            Event::RetryDue => self.retry_now(&mut actions),
            Event::Fenced => self.fence(&mut actions),
        }
        self.start_if_wanted(&mut actions);
        actions
    }

    /// Whether the volume was taken over by another writer.
    pub fn is_fenced(&self) -> bool {
        self.phase == Phase::Fenced
    }

    fn frozen(&self) -> Option<GenerationId> {
        (self.phase != Phase::Idle).then(|| GenerationId(self.active.0 - 1))
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
        if self.phase == Phase::Fenced {
            actions.push(Action::Answer(id, FlushAnswer::Fenced));
            return;
        }
        if is_active_dirty {
            self.dirtied(actions);
            self.is_wanted |= needs_checkpoint;
            self.waiting.push((id, self.active));
        } else if let Some(frozen) = self.frozen() {
            self.waiting.push((id, frozen));
        } else {
            actions.push(Action::Answer(id, FlushAnswer::Durable));
        }
        if needs_checkpoint {
            self.retry_now(actions);
        }
    }

    fn retry_now(&mut self, actions: &mut Vec<Action>) {
        if let (Phase::Waiting { attempt }, Some(generation)) = (self.phase, self.frozen()) {
            self.phase = Phase::Publishing { attempt };
            actions.push(Action::Publish { generation, attempt });
        }
    }

    fn publish_ended(&mut self, end: PublishEnd, actions: &mut Vec<Action>) {
        let (Phase::Publishing { attempt }, Some(generation)) = (self.phase, self.frozen()) else {
            return;
        };
        match end {
            PublishEnd::Published => {
                self.phase = Phase::Idle;
                actions.push(Action::DropFrozen(generation));
                self.waiting.retain(|(id, waits_for)| {
                    let is_done = *waits_for <= generation;
                    if is_done {
                        actions.push(Action::Answer(*id, FlushAnswer::Durable));
                    }
                    !is_done
                });
            }
            PublishEnd::Failed => {
                self.phase = Phase::Waiting { attempt: attempt + 1 };
                actions.push(Action::ArmRetry { attempt: attempt + 1 });
            }
            PublishEnd::Fenced => self.fence(actions),
        }
    }

    /// A publish under way is not waited for: it fails, or came before the new owner's open and is part of what that
    /// sees. Either way nobody is told that it succeeded.
    fn fence(&mut self, actions: &mut Vec<Action>) {
        if self.phase == Phase::Fenced {
            return;
        }
        self.phase = Phase::Fenced;
        actions.push(Action::Fence);
        let waiting = self.waiting.drain(..);
        actions.extend(waiting.map(|(id, _)| Action::Answer(id, FlushAnswer::Fenced)));
    }

    fn start_if_wanted(&mut self, actions: &mut Vec<Action>) {
        if self.phase == Phase::Idle && self.is_wanted && self.is_active_dirty {
            let generation = self.active;
            self.active = GenerationId(generation.0 + 1);
            self.is_active_dirty = false;
            self.is_wanted = false;
            self.phase = Phase::Publishing { attempt: 0 };
            actions.push(Action::Freeze(generation));
            actions.push(Action::Publish {
                generation,
                attempt: 0,
            });
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
