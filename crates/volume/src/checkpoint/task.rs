//! The async shell around the state machines: feeds them events and carries out their actions.
//!
//! One task per volume owns the machines. Publishes and appends run in tasks of their own, so that flushes expire and
//! writes go on while the store is slow. This module decides nothing; see [`super::machine`].

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::appender::Appender;
use super::handle::DriverConfig;
use super::machine::{self, Machine};
use super::publisher::Publisher;
use super::state::{Action, Event, PublishEnd};
use crate::base::clock::now_ms;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::ids::{FlushAnswer, FlushId, GenerationId};
use crate::engine::{BESIDE_BYTES, Beside};
use crate::wal::AppendError;
use crate::wal::group_commit::{AppendEnd, Event as WalEvent};
use crate::write_buffer::backlog::Since;
use crate::write_buffer::overlay::{Frozen, Overlay};
use crate::write_buffer::quota::Quota;

/// The wait after the first failed publish. Each further failure doubles it.
const RETRY_WAIT: Duration = Duration::from_millis(200);
/// The longest wait between attempts.
const RETRY_WAIT_MAX: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) enum Command {
    Event(machine::Event),
    Flush {
        needs_checkpoint: bool,
        answer: oneshot::Sender<Result<(), VolumeError>>,
    },
    PublishEnded {
        generation: GenerationId,
        result: Result<(), VolumeError>,
    },
    AppendEnded {
        sequence: u64,
        result: Result<(), AppendError>,
    },
    CheckpointWanted,
    Interval(Duration),
    Stop(oneshot::Sender<GenerationId>),
}

/// Sends commands to the task. It is a weak reference, so that the task ends with the last handle.
#[derive(Debug, Clone)]
pub(super) struct Commands(mpsc::WeakUnboundedSender<Command>);

impl Commands {
    pub fn to(commands: &mpsc::UnboundedSender<Command>) -> Self {
        Self(commands.downgrade())
    }

    pub fn send(&self, command: Command) {
        if let Some(commands) = self.0.upgrade() {
            let _ = commands.send(command);
        }
    }

    pub fn send_later(&self, wait: Duration, command: Command) {
        let commands = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            commands.send(command);
        });
    }
}

/// A frozen generation.
struct FrozenNow {
    id: GenerationId,
    generation: Arc<Frozen>,
    /// When its publish began; `None` while none is in flight.
    publish_started: Option<Instant>,
}

/// The checkpoint task of one volume.
pub(super) struct Task {
    machine: Machine,
    overlay: Arc<Overlay>,
    publisher: Arc<Publisher>,
    appender: Option<Appender>,
    config: DriverConfig,
    quota: Arc<Quota>,
    since: Arc<Mutex<Since>>,
    commands: Commands,
    flushes: HashMap<FlushId, oneshot::Sender<Result<(), VolumeError>>>,
    /// Deadlines in ascending order, because every flush may wait equally long.
    deadlines: VecDeque<(Instant, FlushId)>,
    next_flush: u64,
    /// Oldest first.
    frozen: VecDeque<FrozenNow>,
    /// The number of the generation that is active in the overlay now.
    active: GenerationId,
    /// Receives how the newest publish ended. The next publish takes it.
    newest_publish: Option<oneshot::Receiver<bool>>,
    last_publish_ended: Instant,
    last_failure: String,
}

impl Task {
    pub fn new(
        overlay: Arc<Overlay>,
        publisher: Arc<Publisher>,
        config: DriverConfig,
        quota: &Arc<Quota>,
        since: &Arc<Mutex<Since>>,
        back: Commands,
    ) -> Self {
        let first = GenerationId(config.first_generation);
        let group_commit = config
            .wal
            .as_ref()
            .map(|l| l.group_commit(GenerationId(first.0 - 1)));
        Self {
            machine: Machine::new(first, group_commit),
            publisher,
            overlay,
            appender: config
                .wal
                .clone()
                .map(|wal| Appender::new(wal, back.clone(), config.metrics.clone())),
            config,
            quota: quota.clone(),
            since: since.clone(),
            commands: back,
            flushes: HashMap::new(),
            deadlines: VecDeque::new(),
            next_flush: 0,
            frozen: VecDeque::new(),
            active: first,
            newest_publish: None,
            last_publish_ended: Instant::now(),
            last_failure: String::new(),
        }
    }

    pub async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut stopping: Option<oneshot::Sender<GenerationId>> = None;
        loop {
            let is_quiet = !self.is_publishing() && self.machine.is_wal_idle();
            if let Some(stopped) = stopping.take_if(|_| is_quiet) {
                let _ = stopped.send(self.active);
                return;
            }
            let deadline = self.deadlines.front().map(|(at, _)| *at);
            let command = tokio::select! {
                biased;
                command = inbox.recv() => command,
                () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    let Some(id) = self.expired() else { continue };
                    Some(Command::Event(machine::Event::Volume(Event::FlushExpired(id))))
                }
            };
            let event = match command {
                None => return,
                Some(Command::Stop(stopped)) => {
                    stopping = Some(stopped);
                    continue;
                }
                Some(command) => self.event_of(command),
            };
            if let Some(event) = event {
                self.feed(event);
            }
        }
    }

    /// The flush whose deadline has passed. Returns `None` while a publish makes progress: the time counts from its
    /// last step.
    fn expired(&mut self) -> Option<FlushId> {
        let (_, id) = self.deadlines.pop_front()?;
        let later = self.overlay.last_progress().map(|at| at + self.config.io_timeout);
        match later.filter(|later| *later > Instant::now()) {
            Some(later) => {
                self.deadlines.push_front((later, id));
                None
            }
            None => Some(id),
        }
    }

    /// The event for a command, or `None` when there is nothing left to do.
    fn event_of(&mut self, command: Command) -> Option<machine::Event> {
        Some(match command {
            Command::Event(event) => {
                match event {
                    // Sent while the generation before was active, and that has frozen since. Whatever makes this one dirty says so itself.
                    machine::Event::Volume(Event::Dirtied) if !self.overlay.is_active_dirty() => return None,
                    machine::Event::Volume(Event::Dirtied) => {
                        self.since.lock().active.get_or_insert_with(Instant::now);
                    }
                    // The command was sent while the previous generation was active. Publishing a small generation now
                    // would only delay the next one.
                    machine::Event::Volume(Event::Grown) if self.is_publishing() && !self.is_worth_it() => {
                        return None;
                    }
                    _ => {}
                }
                event
            }
            Command::CheckpointWanted => machine::Event::Volume(Event::CheckpointWanted {
                is_active_dirty: self.overlay.is_active_dirty(),
            }),
            Command::Flush {
                needs_checkpoint,
                answer,
            } => {
                self.next_flush += 1;
                let id = FlushId(self.next_flush);
                self.flushes.insert(id, answer);
                self.deadlines
                    .push_back((Instant::now() + self.config.io_timeout, id));
                machine::Event::Flush {
                    id,
                    is_active_dirty: self.overlay.is_active_dirty(),
                    needs_checkpoint,
                }
            }
            Command::PublishEnded { generation, result } => {
                let end = self.publish_ended(generation, result);
                machine::Event::Volume(Event::PublishEnded { generation, end })
            }
            Command::AppendEnded { sequence, result } => {
                let end = self.append_ended(result);
                machine::Event::Wal(WalEvent::AppendEnded { sequence, end })
            }
            Command::Interval(interval) => {
                // Of generations that are dirtied from now on.
                self.config.checkpoint_interval = interval;
                return None;
            }
            Command::Stop(_) => unreachable!("seen to by the loop"),
        })
    }

    /// Whether the active generation fills a good part of the buffer.
    fn is_worth_it(&self) -> bool {
        let (bytes, _) = self.overlay.active();
        self.config.buffer.is_worth_overlap(bytes)
    }

    fn feed(&mut self, event: machine::Event) {
        let mut todo: VecDeque<machine::Action> = self.machine.on(event).into();
        while let Some(action) = todo.pop_front() {
            match action {
                machine::Action::Volume(action) => self.carry_out(action),
                machine::Action::Snapshot { sequence } => {
                    if let Some(appender) = &mut self.appender {
                        let frozen = self.frozen.iter().map(|f| f.id);
                        let taken = appender.snapshot(sequence, &self.overlay, frozen, self.active);
                        let event = machine::Event::Wal(WalEvent::Snapshot(taken));
                        todo.extend(self.machine.on(event));
                    }
                }
                other => {
                    if let Some(appender) = &mut self.appender {
                        match other {
                            machine::Action::Append { sequence } => appender.append(sequence),
                            machine::Action::ArmAppendRetry { sequence, attempt } => {
                                appender.retry_later(sequence, attempt);
                            }
                            machine::Action::Forget { sequence } => appender.forget(sequence),
                            machine::Action::TrimWal(generation) => appender.trim(generation),
                            machine::Action::Volume(_) | machine::Action::Snapshot { .. } => {}
                        }
                    }
                }
            }
        }
        if let Some(appender) = &self.appender {
            let mut since = self.since.lock();
            since.wal_bytes = self.machine.live_wal_bytes();
            since.wal_records = appender.records();
            since.wal = appender.oldest();
            since.unlogged = appender.unlogged_since();
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Freeze(id) => {
                self.frozen.push_back(FrozenNow {
                    id,
                    generation: self.overlay.freeze(),
                    publish_started: None,
                });
                self.active = GenerationId(id.0 + 1);
                let mut since = self.since.lock();
                let active = since.active.take();
                since.frozen.push_back(active);
                self.quota.made_room();
            }
            Action::Publish { generation, attempt } => self.publish(generation, attempt),
            Action::DropFrozen(_) => {
                let dropped = self.frozen.pop_front();
                let bytes = dropped
                    .as_ref()
                    .map_or(0, |f| f.generation.with(|g| g.buffered_bytes()));
                let room = self.quota.take(bytes);
                let dropped = (dropped, self.overlay.drop_frozen());
                // Freeing some 10^5 blocks takes a while, and the next publish should not have to wait for it.
                tokio::task::spawn_blocking(move || {
                    drop(dropped);
                    drop(room);
                });
                self.since.lock().frozen.pop_front();
                // The active generation may have grown past the publish size while this one was published.
                let (bytes, is_streaming) = self.overlay.active();
                if self.config.buffer.is_large_enough(bytes, is_streaming) {
                    let grown = machine::Event::Volume(Event::Grown);
                    self.commands.send(Command::Event(grown));
                }
            }
            Action::ArmAge(generation) => {
                let due = machine::Event::Volume(Event::AgeDue(generation));
                self.commands
                    .send_later(self.config.checkpoint_interval, Command::Event(due));
            }
            Action::ArmRetry { attempt } => {
                let wait = RETRY_WAIT
                    .saturating_mul(1 << (attempt - 1).min(16))
                    .min(RETRY_WAIT_MAX);
                let due = machine::Event::Volume(Event::RetryDue);
                self.commands.send_later(wait, Command::Event(due));
            }
            Action::Answer(id, answer) => self.answer(id, answer),
            Action::Fence => self.quota.fence(),
        }
    }

    fn answer(&mut self, id: FlushId, answer: FlushAnswer) {
        self.deadlines.retain(|(_, waiting)| *waiting != id);
        let Some(waiting) = self.flushes.remove(&id) else {
            return;
        };
        let result = match answer {
            FlushAnswer::Durable => Ok(()),
            FlushAnswer::Fenced => Err(self.quota.fenced_error()),
            FlushAnswer::TimedOut => {
                let last = match self.last_failure.as_str() {
                    "" => "none, but nothing went on meanwhile: the store is slow".to_owned(),
                    last => last.to_owned(),
                };
                Err(VolumeError::Timeout {
                    operation: "flush",
                    waited: self.config.io_timeout,
                    last,
                })
            }
        };
        // It is no failure when the client has gone.
        let _ = waiting.send(result);
    }

    fn is_publishing(&self) -> bool {
        self.frozen.iter().any(|f| f.publish_started.is_some())
    }

    fn publish(&mut self, generation: GenerationId, attempt: u32) {
        let is_beside = self.is_publishing();
        let Some(frozen) = self.frozen.iter_mut().find(|f| f.id == generation) else {
            debug_assert!(false, "published before it was frozen");
            return;
        };
        frozen.publish_started = Some(Instant::now());
        let frozen = frozen.generation.clone();
        self.quota.publish_began(frozen.with(|g| g.buffered_bytes()));
        let copied_bytes = self.config.buffer.copied_bytes(BESIDE_BYTES);
        let room = is_beside.then(|| self.quota.take(copied_bytes));
        let (ended, newest) = oneshot::channel();
        let before = self.newest_publish.replace(newest).filter(|_| is_beside);
        let (next, may_begin) = oneshot::channel();
        let beside = Beside {
            before,
            next: Some(next),
        };
        let commands = self.commands.clone();
        tokio::spawn(async move {
            if may_begin.await.is_ok() {
                let event = Event::NextMayBegin { generation, attempt };
                commands.send(Command::Event(machine::Event::Volume(event)));
            }
        });
        let (publisher, commands) = (self.publisher.clone(), self.commands.clone());
        tokio::spawn(async move {
            // The inner task isolates a panic of the engine: it becomes a failed publish.
            let publish =
                tokio::spawn(async move { publisher.publish(frozen, generation, attempt, beside).await });
            let result = publish
                .await
                .unwrap_or_else(|e| Err(VolumeError::Internal(e.to_string())));
            log::debug!("generation {}: {result:?}", generation.0);
            let is_published = result.is_ok();
            drop(room);
            commands.send(Command::PublishEnded { generation, result });
            let _ = ended.send(is_published);
        });
    }

    fn publish_ended(&mut self, generation: GenerationId, result: Result<(), VolumeError>) -> PublishEnd {
        let frozen = self.frozen.iter_mut().find(|f| f.id == generation);
        let (started, bytes) = frozen.map_or((None, 0), |f| {
            let bytes = f.generation.with(|g| g.buffered_bytes());
            (f.publish_started.take(), bytes)
        });
        // While the publish overlapped the previous one, the two shared the bandwidth. So only the time since then
        // counts.
        let began = started.map_or(self.last_publish_ended, |at| at.max(self.last_publish_ended));
        self.last_publish_ended = Instant::now();
        let publishes = &self.config.metrics.publishes;
        self.quota.note_failing(result.is_err());
        match result {
            Ok(()) => {
                if !std::mem::take(&mut self.last_failure).is_empty() {
                    info!("the store accepts data again: every write that was kept is published");
                }
                let took = started.map_or(Duration::ZERO, |at| self.last_publish_ended - at);
                publishes.succeeded(bytes, took, now_ms());
                self.quota.published(bytes, self.last_publish_ended - began);
                PublishEnd::Published
            }
            Err(VolumeError::Fenced { reason }) => {
                publishes.failed();
                self.quota.note_fenced(reason);
                PublishEnd::Fenced
            }
            Err(e) => {
                publishes.failed();
                if e.kind() == ErrorKind::Corrupt {
                    self.config.metrics.damage.publishes.one();
                }
                let text = e.chain();
                // A publish that overlaps the oldest one fails with it, and has no new reason to report.
                if self.frozen.front().is_some_and(|oldest| oldest.id == generation) {
                    warn!(
                        "a checkpoint could not be published; its data is kept, and the publish is tried again: {text}"
                    );
                    self.last_failure = text;
                }
                PublishEnd::Failed
            }
        }
    }

    fn append_ended(&mut self, result: Result<(), AppendError>) -> AppendEnd {
        let Some(appender) = &mut self.appender else {
            return AppendEnd::Failed;
        };
        let (end, reason) = appender.ended(result);
        match (end, reason) {
            (AppendEnd::Fenced, reason) => self.quota.note_fenced(reason.unwrap_or_default()),
            (_, Some(reason)) => self.last_failure = reason,
            _ => {}
        }
        end
    }
}
