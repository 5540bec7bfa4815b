//! Joins the checkpoint state machine and the group commit of the WAL (pure).
//!
//! Both know every flush. The group commit answers a flush when the records that it needs are durable; the checkpoint
//! machine answers it when the generation that it waits for is published. Whichever answers first tells the other.
//! Without a WAL there is the checkpoint machine alone.

use super::state::{self, WriteBack};
use crate::base::ids::{FlushId, GenerationId};
use crate::wal::group_commit::{self, GroupCommit};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A flush arrived. Every write that was answered before it is in the overlay.
    Flush {
        /// Identifies the flush in its answer.
        id: FlushId,
        /// Whether the active generation holds anything.
        is_active_dirty: bool,
        /// Whether the flush needs a checkpoint even though there is a WAL.
        needs_checkpoint: bool,
    },
    /// An event for the checkpoint machine. Flushes arrive as [`Event::Flush`] instead.
    Volume(state::Event),
    /// An event for the group commit. Flushes arrive as [`Event::Flush`] instead.
    Wal(group_commit::Event),
}

/// What is to be done, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// An action of the checkpoint machine.
    Volume(state::Action),
    /// Take the changes that the WAL lacks. If there are any, make them a record with this number. Feed the
    /// [`group_commit::Event::Snapshot`] before any other event.
    Snapshot {
        /// The record's number.
        sequence: u64,
    },
    /// Append the record with this number.
    Append {
        /// The record's number.
        sequence: u64,
    },
    /// Send [`group_commit::Event::RetryDue`] after the back-off for this attempt.
    ArmAppendRetry {
        /// The record's number.
        sequence: u64,
        /// Attempts made so far, from 1.
        attempt: u32,
    },
    /// The record's bytes are not needed any more.
    Forget {
        /// The record's number.
        sequence: u64,
    },
    /// Records whose generations are all at or below this one may be removed from the WAL.
    TrimWal(GenerationId),
}

/// Both machines of one volume.
#[derive(Debug)]
pub struct Machine {
    volume: WriteBack,
    wal: Option<GroupCommit>,
}

impl Machine {
    /// Begins with `first` as the number of the first generation.
    pub fn new(first: GenerationId, wal: Option<GroupCommit>) -> Self {
        Self {
            volume: WriteBack::starting_at(first),
            wal,
        }
    }

    /// The number of the active generation.
    pub fn active(&self) -> GenerationId {
        self.volume.active()
    }

    /// Whether another owner took the volume over.
    pub fn is_fenced(&self) -> bool {
        self.volume.is_fenced()
    }

    /// Bytes of the WAL records that a replay would need.
    pub fn live_wal_bytes(&self) -> u64 {
        self.wal.as_ref().map_or(0, GroupCommit::live_bytes)
    }

    /// Whether no append to the WAL is in flight.
    pub fn is_wal_idle(&self) -> bool {
        self.wal.as_ref().is_none_or(GroupCommit::is_idle)
    }

    /// Takes an event and returns what is to be done.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Flush {
                id,
                is_active_dirty,
                needs_checkpoint,
            } => {
                let needs_checkpoint = needs_checkpoint || self.wal.is_none();
                let flush = state::Event::Flush {
                    id,
                    is_active_dirty,
                    needs_checkpoint,
                };
                self.volume(flush, &mut actions);
                let is_answer =
                    |a: &Action| matches!(a, Action::Volume(state::Action::Answer(to, _)) if *to == id);
                if !needs_checkpoint && !actions.iter().any(is_answer) {
                    self.wal(group_commit::Event::Flush(id), &mut actions);
                }
            }
            Event::Volume(event) => self.volume(event, &mut actions),
            Event::Wal(event) => self.wal(event, &mut actions),
        }
        actions
    }

    fn volume(&mut self, event: state::Event, actions: &mut Vec<Action>) {
        let decided = self.volume.on(event);
        actions.extend(decided.iter().copied().map(Action::Volume));
        if self.wal.is_none() {
            return;
        }
        // The group commit first forgets the flushes that were answered, so that no flush is answered twice.
        for action in &decided {
            if let state::Action::Answer(id, _) = action {
                self.wal(group_commit::Event::FlushGone(*id), actions);
            }
        }
        for action in decided {
            match action {
                state::Action::DropFrozen(generation) => {
                    actions.push(Action::TrimWal(generation));
                    self.wal(group_commit::Event::Published(generation), actions);
                }
                state::Action::Fence => self.wal(group_commit::Event::Fenced, actions),
                _ => {}
            }
        }
    }

    fn wal(&mut self, event: group_commit::Event, actions: &mut Vec<Action>) {
        let Some(wal) = &mut self.wal else { return };
        for action in wal.on(event) {
            match action {
                group_commit::Action::Snapshot { sequence } => actions.push(Action::Snapshot { sequence }),
                group_commit::Action::Append { sequence } => actions.push(Action::Append { sequence }),
                group_commit::Action::ArmRetry { sequence, attempt } => {
                    actions.push(Action::ArmAppendRetry { sequence, attempt });
                }
                group_commit::Action::Forget { sequence } => actions.push(Action::Forget { sequence }),
                group_commit::Action::Answer(id, answer) => {
                    actions.push(Action::Volume(state::Action::Answer(id, answer)));
                    self.volume(state::Event::FlushGone(id), actions);
                }
                group_commit::Action::NeedsCheckpoint(id) => {
                    self.volume(state::Event::FlushNeedsCheckpoint(id), actions);
                }
                group_commit::Action::RetryPublish => {
                    let is_active_dirty = false;
                    self.volume(state::Event::CheckpointWanted { is_active_dirty }, actions);
                }
                group_commit::Action::WantCheckpoint => {
                    let is_active_dirty = self.volume.is_active_dirty();
                    self.volume(state::Event::CheckpointWanted { is_active_dirty }, actions);
                }
                group_commit::Action::Fence => self.volume(state::Event::Fenced, actions),
            }
        }
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
