//! The async shell around a volume's WAL: makes records of the changes that the WAL lacks, appends records and removes
//! them.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use tokio::time::Instant;
use uuid::Uuid;

use super::machine::Event;
use super::task::{Command, Commands};
use crate::base::checkpoint_id::NewestCheckpoint;
use crate::base::ids::GenerationId;
use crate::metrics::Metrics;
use crate::wal::group_commit::{AppendEnd, Event as WalEvent, GroupCommit, Snapshot};
use crate::wal::record::{Entry, Record, unacknowledged};
use crate::wal::{AppendError, EncodedGroup, WalStore};
use crate::write_buffer::overlay::{ForWal, Overlay};

/// The wait after the first failed append. Each further failure doubles it.
const RETRY_WAIT: Duration = Duration::from_millis(100);
const RETRY_WAIT_MAX: Duration = Duration::from_secs(5);
/// When an append takes longer than this, its flushes wait for a checkpoint as well.
const SLOW: Duration = Duration::from_secs(5);

/// The WAL that the checkpoint task works with.
#[derive(Clone)]
pub struct DriverWal {
    /// Where its records are stored.
    pub store: Arc<dyn WalStore>,
    /// The volume that the WAL belongs to.
    pub volume_id: Uuid,
    /// The owner's epoch.
    pub epoch: u64,
    /// The newest checkpoint, on top of which a record that is made now applies.
    pub newest: NewestCheckpoint,
}

impl DriverWal {
    /// The group commit of this WAL, on top of the published generation `published`.
    pub(super) fn group_commit(&self, published: GenerationId) -> GroupCommit {
        GroupCommit::new(
            self.store.first_sequence(),
            published,
            self.store.depth(),
            self.store.capacity_bytes(),
        )
    }
}

pub(super) struct Appender {
    wal: DriverWal,
    commands: Commands,
    metrics: Metrics,
    /// Groups on their way.
    groups: HashMap<u64, EncodedGroup>,
    /// The newest generation in any record so far.
    newest: u64,
    /// The last number up to which no record is missing.
    acknowledged: u64,
    /// When each record that a replay would need was made, with its newest generation.
    made: VecDeque<(GenerationId, Instant)>,
    /// The oldest write of each group that is on its way, by the group's number.
    on_way: BTreeMap<u64, Instant>,
    /// The oldest write that was left to a checkpoint, because its generation is too large for the log.
    left_out: Option<Instant>,
    failures: u64,
}

impl Appender {
    pub fn new(wal: DriverWal, commands: Commands, metrics: Metrics) -> Self {
        let acknowledged = wal.store.first_sequence() - 1;
        Self {
            wal,
            commands,
            metrics,
            groups: HashMap::new(),
            newest: 0,
            acknowledged,
            made: VecDeque::new(),
            on_way: BTreeMap::new(),
            left_out: None,
            failures: 0,
        }
    }

    /// Makes a record of the changes that the WAL lacks. `frozen` yields the frozen generations, oldest first.
    pub fn snapshot(
        &mut self,
        sequence: u64,
        overlay: &Overlay,
        frozen: impl Iterator<Item = GenerationId>,
        active: GenerationId,
    ) -> Snapshot {
        let taken = overlay.take_unlogged();
        let mut entries = Vec::new();
        let mut behind = None;
        let frozen = frozen.zip(taken.frozen);
        for (generation, part) in frozen.chain([(active, taken.active)]) {
            match part {
                ForWal::Nothing => {}
                ForWal::TooLarge if generation == active => return Snapshot::TooLarge,
                // The newest of these is published last, so waiting for it covers the others.
                ForWal::TooLarge => behind = Some(generation),
                ForWal::Changes(changes) => {
                    entries.extend(changes.into_iter().map(|(offset_bytes, content)| Entry {
                        generation: generation.0,
                        offset_bytes,
                        content,
                    }));
                }
            }
        }
        self.left_out = match behind {
            Some(_) => self.left_out.or(taken.since),
            None => None,
        };
        if entries.is_empty() {
            return Snapshot::Nothing { behind };
        }
        let first_sequence = self.wal.store.first_sequence();
        let group = Record {
            is_seal: false,
            after_generation: self.newest,
            unacknowledged: unacknowledged(sequence, self.acknowledged, first_sequence),
            base: self.wal.newest.get(),
            entries,
            ..Record::seal(self.wal.volume_id, self.wal.epoch, sequence)
        };
        let newest = GenerationId(group.newest_generation());
        self.newest = newest.0;
        let bytes = group.encode();
        let len_bytes = self.wal.store.stored_bytes(bytes.len() as u64);
        let encoded = EncodedGroup {
            sequence,
            newest_generation: newest.0,
            bytes,
        };
        self.groups.insert(sequence, encoded);
        self.on_way.extend(taken.since.map(|since| (sequence, since)));
        self.made.push_back((newest, Instant::now()));
        Snapshot::Record {
            newest,
            len_bytes,
            behind,
        }
    }

    /// Starts the append of a record.
    pub fn append(&self, sequence: u64) {
        let Some(group) = self.groups.get(&sequence).cloned() else {
            debug_assert!(false, "appended before it was made");
            return;
        };
        let (store, commands, metrics) = (
            self.wal.store.clone(),
            self.commands.clone(),
            self.metrics.clone(),
        );
        tokio::spawn(async move {
            let (began, len_bytes) = (Instant::now(), group.bytes.len() as u64);
            // The inner task isolates a panic: it becomes a failed append.
            let mut append = tokio::spawn(async move { store.append(&group).await });
            let ended = match tokio::time::timeout(SLOW, &mut append).await {
                Ok(ended) => ended,
                Err(_) => {
                    commands.send(Command::Event(Event::Wal(WalEvent::AppendSlow { sequence })));
                    append.await
                }
            };
            let result = ended.unwrap_or_else(|e| {
                Err(AppendError::Failed(crate::base::error::VolumeError::Internal(
                    e.to_string(),
                )))
            });
            match &result {
                Ok(()) => {
                    metrics.wal.durations.observe(began.elapsed());
                    metrics.wal.bytes.add(len_bytes);
                }
                Err(_) => metrics.wal.failures.one(),
            }
            commands.send(Command::AppendEnded { sequence, result });
        });
    }

    /// Notes that the append of a record ended. The returned text is the reason of a failure.
    pub fn ended(&mut self, result: Result<(), AppendError>) -> (AppendEnd, Option<String>) {
        match result {
            Ok(()) => {
                if std::mem::take(&mut self.failures) > 0 {
                    info!("the write-ahead log accepts records again");
                }
                (AppendEnd::Durable, None)
            }
            Err(AppendError::Fenced(reason)) => (AppendEnd::Fenced, Some(reason)),
            Err(AppendError::Failed(e)) => {
                let text = e.chain();
                if self.failures == 0 {
                    warn!(
                        "the write-ahead log accepts no records, so flushes publish checkpoints until it does: {text}"
                    );
                }
                self.failures += 1;
                (AppendEnd::Failed, Some(text))
            }
        }
    }

    /// Schedules another attempt.
    pub fn retry_later(&self, sequence: u64, attempt: u32) {
        let wait = RETRY_WAIT
            .saturating_mul(1 << (attempt - 1).min(16))
            .min(RETRY_WAIT_MAX);
        let event = Event::Wal(WalEvent::RetryDue { sequence });
        self.commands.send_later(wait, Command::Event(event));
    }

    /// Notes that the record and all before it are durable.
    pub fn forget(&mut self, sequence: u64) {
        self.groups.remove(&sequence);
        self.acknowledged = self.acknowledged.max(sequence);
        self.on_way.retain(|number, _| *number > sequence);
    }

    /// Removes records whose generations are all at or below this one.
    pub fn trim(&mut self, generation: GenerationId) {
        while self.made.front().is_some_and(|(newest, _)| *newest <= generation) {
            self.made.pop_front();
        }
        let (store, acknowledged) = (self.wal.store.clone(), self.acknowledged);
        tokio::spawn(async move {
            if let Err(e) = store.trim(generation.0, acknowledged).await {
                warn!(
                    "old records could not be removed from the write-ahead log, which stays in use: {}",
                    e.chain()
                );
            }
        });
    }

    /// How many groups a replay would need.
    pub fn records(&self) -> u64 {
        self.made.len() as u64
    }

    /// The oldest write that was taken for the log and is not in it.
    pub fn unlogged_since(&self) -> Option<Instant> {
        self.on_way.values().copied().chain(self.left_out).min()
    }

    /// When the oldest group that a replay would need was made.
    pub fn oldest(&self) -> Option<Instant> {
        self.made.front().map(|(_, at)| *at)
    }
}

#[cfg(test)]
#[path = "appender_tests.rs"]
mod tests;
