//! The write-back machine and the group commit of its log as one (pure).
//!
//! Every flush is known to both: the log answers it when the groups it needs are durable, the write-back machine when
//! the generation it waits for is published, and whichever is first tells the other. Without a log this is the
//! write-back machine alone.

use super::state::{self, WriteBack};
use crate::base::ids::{FlushId, GenerationId};
use crate::wal::group_commit::{self, GroupCommit};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A flush arrived; every write replied to before it is in the overlay.
    Flush {
        /// Its name in the answer.
        id: FlushId,
        /// Whether the active generation holds anything.
        is_active_dirty: bool,
        /// Whether only a checkpoint will do, though there is a log.
        needs_checkpoint: bool,
    },
    /// To the write-back machine; flushes come by [`Event::Flush`].
    Volume(state::Event),
    /// To the group commit; flushes come by [`Event::Flush`].
    Log(group_commit::Event),
}

/// What is to be done, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Of the write-back machine.
    Volume(state::Action),
    /// Take what the log lacks, make it a group with this number if there is anything, and feed the
    /// [`group_commit::Event::Snapshot`] before any other event.
    Snapshot {
        /// The number.
        sequence: u64,
    },
    /// Append the group with this number.
    Append {
        /// The number.
        sequence: u64,
    },
    /// Send [`group_commit::Event::RetryDue`] after the back-off for this attempt.
    ArmAppendRetry {
        /// The group's number.
        sequence: u64,
        /// Attempts made so far, from 1.
        attempt: u32,
    },
    /// The group's bytes are not needed any more.
    Forget {
        /// Its number.
        sequence: u64,
    },
    /// Groups with nothing above this generation may be removed from the log.
    TrimLog(GenerationId),
}

/// Both machines of one volume.
#[derive(Debug)]
pub struct Machine {
    volume: WriteBack,
    log: Option<GroupCommit>,
}

impl Machine {
    /// With `first` as the number of the first generation.
    pub fn new(first: GenerationId, log: Option<GroupCommit>) -> Self {
        Self {
            volume: WriteBack::starting_at(first),
            log,
        }
    }

    /// The number of the active generation.
    pub fn active(&self) -> GenerationId {
        self.volume.active()
    }

    /// Whether the volume was taken over by another writer.
    pub fn is_fenced(&self) -> bool {
        self.volume.is_fenced()
    }

    /// Bytes of the log's groups that a replay would need.
    pub fn live_log_bytes(&self) -> u64 {
        self.log.as_ref().map_or(0, GroupCommit::live_bytes)
    }

    /// Whether no group is on its way to the log.
    pub fn is_log_idle(&self) -> bool {
        self.log.as_ref().is_none_or(GroupCommit::is_idle)
    }

    /// Takes an event in and says what is to be done.
    pub fn on(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Flush {
                id,
                is_active_dirty,
                needs_checkpoint,
            } => {
                let needs_checkpoint = needs_checkpoint || self.log.is_none();
                let flush = state::Event::Flush {
                    id,
                    is_active_dirty,
                    needs_checkpoint,
                };
                self.volume(flush, &mut actions);
                let is_answer =
                    |a: &Action| matches!(a, Action::Volume(state::Action::Answer(to, _)) if *to == id);
                if !needs_checkpoint && !actions.iter().any(is_answer) {
                    self.log(group_commit::Event::Flush(id), &mut actions);
                }
            }
            Event::Volume(event) => self.volume(event, &mut actions),
            Event::Log(event) => self.log(event, &mut actions),
        }
        actions
    }

    fn volume(&mut self, event: state::Event, actions: &mut Vec<Action>) {
        let decided = self.volume.on(event);
        actions.extend(decided.iter().copied().map(Action::Volume));
        if self.log.is_none() {
            return;
        }
        // First of all the log forgets who has been answered, so that nobody is answered twice.
        for action in &decided {
            if let state::Action::Answer(id, _) = action {
                self.log(group_commit::Event::FlushGone(*id), actions);
            }
        }
        for action in decided {
            match action {
                state::Action::DropFrozen(generation) => {
                    actions.push(Action::TrimLog(generation));
                    self.log(group_commit::Event::Published(generation), actions);
                }
                state::Action::Fence => self.log(group_commit::Event::Fenced, actions),
                _ => {}
            }
        }
    }

    fn log(&mut self, event: group_commit::Event, actions: &mut Vec<Action>) {
        let Some(log) = &mut self.log else { return };
        for action in log.on(event) {
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
