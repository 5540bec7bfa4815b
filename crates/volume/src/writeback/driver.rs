//! The async shell around the write-back state machine: feeds it events, carries out its actions.
//!
//! One task per volume owns the machine. Publishes run beside it, so that flushes expire and writes go on while the
//! store is slow. Nothing here decides anything; see [`super::state`].

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::StreamExt;
use log::{info, warn};
use parking_lot::{Condvar, Mutex};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::overlay::{Frozen, Overlay};
use super::state::{Action, Event, FlushAnswer, FlushId, GenerationId, PublishEnd, WriteBack};
use super::throttle::Throttle;
use crate::catalogue::Recorder;
use crate::engine::{Checkpoint, Engine};
use crate::error::VolumeError;
use crate::geometry::Geometry;

/// Reads that complete partly written blocks, in flight at once.
const COMPLETIONS_IN_FLIGHT: usize = 64;
/// First wait after a failed publish; doubled by each further failure.
const RETRY_WAIT: Duration = Duration::from_millis(200);
/// The longest wait between attempts.
const RETRY_WAIT_MAX: Duration = Duration::from_secs(5);

/// Times and sizes the driver works by.
#[derive(Debug, Clone, Copy)]
pub struct DriverConfig {
    /// Age of a generation at which it is published.
    pub checkpoint_interval: Duration,
    /// How long a flush may wait.
    pub io_timeout: Duration,
    /// The most bytes buffered, active and frozen together.
    pub write_buffer_bytes: u64,
}

impl DriverConfig {
    /// Whether a generation of this size is published without waiting for its age: half of the buffer, or an eighth
    /// when nothing is gained by waiting, so that the line is busy from early on.
    fn is_large_enough(&self, bytes: u64, is_streaming: bool) -> bool {
        let part = if is_streaming { 8 } else { 2 };
        bytes >= self.write_buffer_bytes / part
    }
}

#[derive(Debug)]
enum Command {
    Event(Event),
    Flush(oneshot::Sender<Result<(), VolumeError>>),
    PublishEnded(Result<Option<Checkpoint>, VolumeError>),
    CheckpointWanted,
    Stop(oneshot::Sender<()>),
}

#[derive(Debug, Default)]
struct Room {
    /// Counts the generations dropped, so that a waiting writer can tell that one was.
    published: u64,
    /// Bytes that writers were let in with and have not buffered yet.
    reserved_bytes: u64,
}

/// Room in the write buffer for one change, given back when the change is made.
#[derive(Debug)]
pub struct Reservation<'a> {
    shared: &'a Shared,
    bytes: u64,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.shared.room.0.lock().reserved_bytes -= self.bytes;
    }
}

/// What writers and the driver share.
#[derive(Debug)]
pub struct Shared {
    /// Why the volume is fenced, once it is.
    fenced: Mutex<Option<String>>,
    is_fenced: AtomicBool,
    throttle: Mutex<Throttle>,
    /// When the publish under way is expected to end.
    room_expected: Mutex<std::time::Instant>,
    /// When the writers as a whole have paid for what they buffered.
    paid_until: Mutex<std::time::Instant>,
    room: (Mutex<Room>, Condvar),
    last_failure: Mutex<String>,
}

impl Shared {
    /// The error of a fenced volume, if it is one.
    pub fn check_fenced(&self) -> Result<(), VolumeError> {
        if !self.is_fenced.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(VolumeError::Fenced {
            reason: self.fenced.lock().clone().unwrap_or_default(),
        })
    }
}

/// Handle to the driver of one volume. Clones share it.
#[derive(Debug, Clone)]
pub struct Driver {
    commands: mpsc::UnboundedSender<Command>,
    shared: Arc<Shared>,
    overlay: Arc<Overlay>,
    config: DriverConfig,
}

impl Driver {
    /// Starts the driver's task on the current runtime.
    pub fn start(
        overlay: Arc<Overlay>,
        engine: Arc<dyn Engine>,
        recorder: Arc<dyn Recorder>,
        config: DriverConfig,
    ) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            fenced: Mutex::default(),
            is_fenced: AtomicBool::new(false),
            throttle: Mutex::new(Throttle::new(config.write_buffer_bytes)),
            room_expected: Mutex::new(std::time::Instant::now()),
            paid_until: Mutex::new(std::time::Instant::now()),
            room: Default::default(),
            last_failure: Mutex::default(),
        });
        let driver = Self {
            commands: commands.clone(),
            shared: shared.clone(),
            overlay: overlay.clone(),
            config,
        };
        let task = Task {
            machine: WriteBack::default(),
            overlay,
            engine,
            recorder,
            config,
            shared,
            commands: commands.downgrade(),
            flushes: HashMap::new(),
            deadlines: VecDeque::new(),
            next_flush: 0,
            frozen: None,
            publish_started: None,
        };
        tokio::spawn(task.run(inbox));
        driver
    }

    /// What writers need to know.
    pub fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Says that a change was taken into the overlay, and slows the caller by what it buffered.
    ///
    /// Blocks the calling thread; never call it on the runtime.
    pub fn buffered(&self, change: super::overlay::Buffered) {
        if change.is_first {
            let _ = self.commands.send(Command::Event(Event::Dirtied));
        }
        // Looked at each time another eighth of the buffer is filled, not at every write.
        let eighths = |bytes: u64| bytes / (self.config.write_buffer_bytes / 8).max(1);
        let is_next_eighth = eighths(change.active_bytes) > eighths(change.active_bytes - change.added_bytes);
        if is_next_eighth
            && self
                .config
                .is_large_enough(change.active_bytes, change.is_streaming)
        {
            let _ = self.commands.send(Command::Event(Event::Grown));
        }
        self.slow_down(change);
    }

    fn slow_down(&self, change: super::overlay::Buffered) {
        // The active generation gets half of the buffer: were it to take what a small frozen one leaves, small and large
        // ones would alternate, and a large one is a long wait.
        let fill = change.total_bytes.max(2 * change.active_bytes);
        let now = std::time::Instant::now();
        let (delay, longest) = {
            let throttle = self.shared.throttle.lock();
            if fill <= throttle.soft_bytes() {
                return;
            }
            let room_in = self.shared.room_expected.lock().saturating_duration_since(now);
            let delay = throttle.delay(change.added_bytes, fill, room_in);
            (delay, throttle.longest_wait(fill, room_in))
        };
        let until = {
            let mut paid_until = self.shared.paid_until.lock();
            // What nobody has to wait for is forgiven; carried on, it would stop everybody once waits may be long.
            *paid_until = ((*paid_until).max(now) + delay).min(now + longest);
            *paid_until
        };
        let (room, is_published) = &self.shared.room;
        let mut room = room.lock();
        let seen = room.published;
        while !delay.is_zero()
            && room.published == seen
            && !is_published.wait_until(&mut room, until).timed_out()
        {}
    }

    /// Waits until the buffer has room for a change that adds at most `bytes`. Blocks the calling thread.
    ///
    /// # Errors
    /// [`VolumeError::BufferFull`] after `io_timeout`, [`VolumeError::Fenced`].
    pub fn wait_for_room(&self, bytes: u64) -> Result<Reservation<'_>, VolumeError> {
        let capacity = self.config.write_buffer_bytes;
        // A change larger than the buffer is let in once half of it is free.
        let needed = bytes.min(capacity / 2);
        let until = std::time::Instant::now() + self.config.io_timeout;
        let (room, is_published) = &self.shared.room;
        let mut room = room.lock();
        while self.overlay.total_bytes() + room.reserved_bytes + needed > capacity {
            self.shared.check_fenced()?;
            let _ = self.commands.send(Command::Event(Event::Grown));
            if is_published.wait_until(&mut room, until).timed_out() {
                return Err(VolumeError::BufferFull {
                    capacity_bytes: capacity,
                    waited: self.config.io_timeout,
                });
            }
        }
        room.reserved_bytes += bytes;
        Ok(Reservation {
            shared: &self.shared,
            bytes,
        })
    }

    /// Resolves once everything taken into the overlay before the call is published.
    ///
    /// # Errors
    /// [`VolumeError::Timeout`] after `io_timeout` (the data is kept and retried), [`VolumeError::Fenced`].
    pub async fn flush(&self) -> Result<(), VolumeError> {
        let (answer, answered) = oneshot::channel();
        self.commands
            .send(Command::Flush(answer))
            .map_err(|_| VolumeError::Closed)?;
        answered.await.map_err(|_| VolumeError::Closed)?
    }

    /// Asks for a checkpoint nobody waits for.
    pub fn checkpoint_soon(&self) {
        let _ = self.commands.send(Command::CheckpointWanted);
    }

    /// Ends the driver's task. A publish under way is waited for.
    pub async fn stop(&self) {
        let (stopped, wait) = oneshot::channel();
        if self.commands.send(Command::Stop(stopped)).is_ok() {
            let _ = wait.await;
        }
    }
}

struct Task {
    machine: WriteBack,
    overlay: Arc<Overlay>,
    engine: Arc<dyn Engine>,
    recorder: Arc<dyn Recorder>,
    config: DriverConfig,
    shared: Arc<Shared>,
    /// Weak, so that the task ends with the last handle.
    commands: mpsc::WeakUnboundedSender<Command>,
    flushes: HashMap<FlushId, oneshot::Sender<Result<(), VolumeError>>>,
    /// Ascending, because every flush waits equally long.
    deadlines: VecDeque<(Instant, FlushId)>,
    next_flush: u64,
    frozen: Option<Arc<Frozen>>,
    publish_started: Option<Instant>,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut stopping: Option<oneshot::Sender<()>> = None;
        loop {
            if let Some(stopped) = stopping.take_if(|_| self.publish_started.is_none()) {
                let _ = stopped.send(());
                return;
            }
            let deadline = self.deadlines.front().map(|(at, _)| *at);
            let command = tokio::select! {
                biased;
                command = inbox.recv() => command,
                () = tokio::time::sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                    let (_, id) = self.deadlines.pop_front().expect("a deadline was due");
                    Some(Command::Event(Event::FlushExpired(id)))
                }
            };
            let event = match command {
                None => return,
                Some(Command::Stop(stopped)) => {
                    stopping = Some(stopped);
                    continue;
                }
                Some(Command::Event(event)) => event,
                Some(Command::CheckpointWanted) => Event::CheckpointWanted {
                    is_active_dirty: self.overlay.is_active_dirty(),
                },
                Some(Command::Flush(answer)) => {
                    self.next_flush += 1;
                    let id = FlushId(self.next_flush);
                    self.flushes.insert(id, answer);
                    self.deadlines
                        .push_back((Instant::now() + self.config.io_timeout, id));
                    Event::Flush {
                        needs_checkpoint: true,
                        id,
                        is_active_dirty: self.overlay.is_active_dirty(),
                    }
                }
                Some(Command::PublishEnded(result)) => Event::PublishEnded(self.publish_ended(result)),
            };
            for action in self.machine.on(event) {
                self.carry_out(action);
            }
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Freeze(_) => self.frozen = Some(self.overlay.freeze()),
            Action::Publish { generation, attempt } => self.publish(generation, attempt),
            Action::DropFrozen(_) => {
                self.frozen = None;
                let dropped = self.overlay.drop_frozen();
                // Freeing some 10^5 blocks takes a while, and the next publish should not wait for it.
                tokio::task::spawn_blocking(move || drop(dropped));
                *self.shared.paid_until.lock() = std::time::Instant::now();
                self.wake_writers();
                // The next generation may have grown past the mark while this one was published.
                let (bytes, is_streaming) = self.overlay.active();
                if self.config.is_large_enough(bytes, is_streaming) {
                    send(&self.commands, Command::Event(Event::Grown));
                }
            }
            Action::ArmAge(generation) => {
                self.send_later(self.config.checkpoint_interval, Event::AgeDue(generation));
            }
            Action::ArmRetry { attempt } => {
                let wait = RETRY_WAIT
                    .saturating_mul(1 << (attempt - 1).min(16))
                    .min(RETRY_WAIT_MAX);
                self.send_later(wait, Event::RetryDue);
            }
            Action::Answer(id, answer) => self.answer(id, answer),
            Action::Fence => {
                self.shared.is_fenced.store(true, Ordering::Release);
                self.wake_writers();
            }
        }
    }

    fn wake_writers(&self) {
        let (room, is_published) = &self.shared.room;
        room.lock().published += 1;
        is_published.notify_all();
    }

    fn send_later(&self, wait: Duration, event: Event) {
        let commands = self.commands.clone();
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            send(&commands, Command::Event(event));
        });
    }

    fn answer(&mut self, id: FlushId, answer: FlushAnswer) {
        self.deadlines.retain(|(_, waiting)| *waiting != id);
        let Some(waiting) = self.flushes.remove(&id) else {
            return;
        };
        let result = match answer {
            FlushAnswer::Durable => Ok(()),
            FlushAnswer::Fenced => self.shared.check_fenced(),
            FlushAnswer::TimedOut => {
                let last = self.shared.last_failure.lock().clone();
                let last = if last.is_empty() {
                    "none, the store is slow".to_owned()
                } else {
                    last
                };
                Err(VolumeError::Timeout {
                    operation: "flush",
                    waited: self.config.io_timeout,
                    last,
                })
            }
        };
        // A client that went away is no failure.
        let _ = waiting.send(result);
    }

    fn publish(&mut self, generation: GenerationId, attempt: u32) {
        let Some(frozen) = self.frozen.clone() else {
            debug_assert!(false, "published before it was frozen");
            return;
        };
        self.publish_started = Some(Instant::now());
        let takes = self
            .shared
            .throttle
            .lock()
            .publish_estimate(frozen.with(|g| g.buffered_bytes()));
        *self.shared.room_expected.lock() = std::time::Instant::now() + takes;
        let (engine, commands) = (self.engine.clone(), self.commands.clone());
        tokio::spawn(async move {
            // The inner task isolates a panic of the engine: it becomes a failed publish.
            let publish = tokio::spawn(async move {
                if attempt > 0 {
                    engine.recover().await?;
                }
                complete_partial_blocks(engine.as_ref(), &frozen).await?;
                engine.publish(frozen).await
            });
            let result = publish
                .await
                .unwrap_or_else(|e| Err(VolumeError::Internal(e.to_string())));
            log::debug!("generation {}: {result:?}", generation.0);
            send(&commands, Command::PublishEnded(result));
        });
    }

    fn publish_ended(&mut self, result: Result<Option<Checkpoint>, VolumeError>) -> PublishEnd {
        let took = self
            .publish_started
            .take()
            .map(|at| at.elapsed())
            .unwrap_or_default();
        match result {
            Ok(checkpoint) => {
                let had_failed = !std::mem::take(&mut *self.shared.last_failure.lock()).is_empty();
                if had_failed {
                    info!("the store takes data again: everything kept so far is published");
                }
                let bytes = self.frozen.as_ref().map_or(0, |f| f.with(|g| g.buffered_bytes()));
                self.shared.throttle.lock().published(bytes, took);
                if let Some(checkpoint) = checkpoint {
                    self.recorder.published(checkpoint);
                }
                PublishEnd::Published
            }
            Err(VolumeError::Fenced { reason }) => {
                log::error!("fenced: {reason}; writes and flushes fail from now on, reads go on");
                *self.shared.fenced.lock() = Some(reason);
                PublishEnd::Fenced
            }
            Err(e) => {
                let text = e.chain();
                warn!("a checkpoint could not be published (the data is kept and tried again): {text}");
                *self.shared.last_failure.lock() = text;
                PublishEnd::Failed
            }
        }
    }
}

fn send(commands: &mpsc::WeakUnboundedSender<Command>, command: Command) {
    if let Some(commands) = commands.upgrade() {
        let _ = commands.send(command);
    }
}

/// Reads what partly written blocks lack from the published state, many at once, so that whole blocks are published.
async fn complete_partial_blocks(engine: &dyn Engine, frozen: &Frozen) -> Result<(), VolumeError> {
    let geometry: Geometry = engine.geometry();
    let partial = frozen.with(|g| g.partial_blocks());
    let mut reads = futures::stream::iter(partial)
        .map(|(block, gap)| async move {
            let mut bytes = vec![0; gap.len()];
            let at = block.0 * u64::from(geometry.block_size()) + u64::from(gap.start);
            engine
                .read(at, &mut bytes)
                .await
                .map(|()| (block, gap.start, bytes))
        })
        .buffer_unordered(COMPLETIONS_IN_FLIGHT);
    while let Some(read) = reads.next().await {
        let (block, in_block, bytes) = read?;
        frozen.complete(block, in_block, &bytes);
    }
    Ok(())
}
