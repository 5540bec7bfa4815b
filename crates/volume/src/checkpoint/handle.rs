//! The handle of a volume's checkpoint task, through which writers and flushes use it. The task itself is in `task`.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::appender::DriverWal;
use super::machine;
use super::publisher::Publisher;
use super::state::Event;
use super::task::{Command, Commands, Task};
use crate::base::error::VolumeError;
use crate::engine::{Engine, Relocated};
use crate::index::relocation::Relocation;
use crate::meta::checkpoint_list::Recorder;
use crate::metrics::Metrics;
use crate::write_buffer::backlog::{Backlog, Since};
use crate::write_buffer::overlay::{Buffered, Overlay};
use crate::write_buffer::policy::BufferPolicy;
use crate::write_buffer::quota::{Quota, Reservation};

/// Configuration of the checkpoint task.
#[derive(Clone)]
pub struct DriverConfig {
    /// Age of a generation at which it is published.
    pub checkpoint_interval: Duration,
    /// The longest time that a flush may wait.
    pub io_timeout: Duration,
    /// The thresholds of the write buffer, whose size is that of the active and the frozen generations together.
    pub buffer: BufferPolicy,
    /// The number of the first generation. It is higher than every number used before.
    pub first_generation: u64,
    /// The generation that the newest checkpoint's record has.
    pub recorded_generation: u64,
    /// The log, if there is one. The overlay must then keep account for it.
    pub wal: Option<DriverWal>,
    /// Where publishes and appends are counted.
    pub metrics: Metrics,
}

/// Handle of one volume's checkpoint task. All clones share the task.
#[derive(Clone)]
pub struct Driver {
    commands: mpsc::UnboundedSender<Command>,
    publisher: Arc<Publisher>,
    quota: Arc<Quota>,
    overlay: Arc<Overlay>,
    since: Arc<Mutex<Since>>,
    has_wal: bool,
    io_timeout: Duration,
    buffer: BufferPolicy,
}

impl Driver {
    /// Starts the task on the current runtime.
    pub fn start(
        overlay: Arc<Overlay>,
        engine: Arc<dyn Engine>,
        recorder: Arc<dyn Recorder>,
        config: DriverConfig,
    ) -> Self {
        let (commands, inbox) = mpsc::unbounded_channel();
        let recorded = config.recorded_generation;
        let publisher = Arc::new(Publisher::new(
            engine,
            recorder,
            overlay.clone(),
            config.metrics.clone(),
            recorded,
        ));
        let driver = Self {
            commands: commands.clone(),
            publisher: publisher.clone(),
            quota: Arc::new(Quota::new(config.buffer)),
            overlay: overlay.clone(),
            since: Arc::default(),
            has_wal: config.wal.is_some(),
            io_timeout: config.io_timeout,
            buffer: config.buffer,
        };
        let back = Commands::to(&commands);
        let task = Task::new(overlay, publisher, config, &driver.quota, &driver.since, back);
        tokio::spawn(task.run(inbox));
        driver
    }

    /// Whether the last attempt to publish failed.
    pub fn is_publishing_failing(&self) -> bool {
        self.quota.is_failing()
    }

    /// Returns the error of a fenced volume if the volume is fenced.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`].
    pub fn check_fenced(&self) -> Result<(), VolumeError> {
        self.quota.check_fenced()
    }

    /// Reports that a change was added to the overlay, and slows the caller according to what the change buffered.
    ///
    /// Blocks the calling thread; never call it on the runtime.
    pub fn buffered(&self, change: Buffered) {
        if change.is_first {
            self.send(Event::Dirtied);
        }
        if self
            .buffer
            .has_passed_eighth(change.active_bytes, change.added_bytes)
            && self
                .buffer
                .is_large_enough(change.active_bytes, change.is_streaming)
        {
            self.send(Event::Grown);
        }
        self.quota.slow_down(change);
    }

    fn send(&self, event: Event) {
        let _ = self.commands.send(Command::Event(machine::Event::Volume(event)));
    }

    /// Waits until the buffer has room for a change that adds at most `bytes`. Blocks the calling thread.
    ///
    /// # Errors
    /// [`VolumeError::BufferFull`] after `io_timeout`, [`VolumeError::Fenced`].
    pub fn wait_for_room(&self, bytes: u64) -> Result<Reservation<'_>, VolumeError> {
        self.quota
            .wait_for_room(&self.overlay, bytes, self.io_timeout, || self.send(Event::Grown))
    }

    /// Waits until a publish has made room in the buffer file, that is until `has_room`. Blocks the calling thread.
    ///
    /// # Errors
    /// As [`Self::wait_for_room`].
    pub(crate) fn wait_for_kept_room(&self, has_room: impl Fn() -> bool) -> Result<(), VolumeError> {
        // As for room in memory: a publish that failed is tried again when it is due, however many wait.
        let ask = || {
            if self.overlay.is_active_dirty() {
                self.send(Event::Grown);
            }
        };
        self.quota.wait_for(&self.overlay, has_room, self.io_timeout, ask)
    }

    /// Resolves once every change that was added to the overlay before the call is durable: in the WAL, or published.
    ///
    /// # Errors
    /// [`VolumeError::Timeout`] after `io_timeout` (the data is kept and retried), [`VolumeError::Fenced`].
    pub async fn flush(&self) -> Result<(), VolumeError> {
        self.flush_to(false).await
    }

    /// Resolves once every change that was added to the overlay before the call is published.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub async fn publish_all(&self) -> Result<(), VolumeError> {
        self.flush_to(true).await
    }

    async fn flush_to(&self, needs_checkpoint: bool) -> Result<(), VolumeError> {
        let (answer, answered) = oneshot::channel();
        self.commands
            .send(Command::Flush {
                needs_checkpoint,
                answer,
            })
            .map_err(|_| VolumeError::Closed)?;
        answered.await.map_err(|_| VolumeError::Closed)?
    }

    /// Ends all writing for good once `lost` resolves to a reason, which means that another server took the volume
    /// over.
    pub fn fence_when(&self, lost: impl Future<Output = Option<String>> + Send + 'static) {
        let (commands, quota) = (Commands::to(&self.commands), self.quota.clone());
        tokio::spawn(async move {
            if let Some(reason) = lost.await {
                quota.note_fenced(reason);
                commands.send(Command::Event(machine::Event::Volume(Event::Fenced)));
            }
        });
    }

    /// Asks for a checkpoint without waiting for it.
    pub fn checkpoint_soon(&self) {
        let _ = self.commands.send(Command::CheckpointWanted);
    }

    /// Generations that are begun from now on are published at this age.
    pub fn set_checkpoint_interval(&self, interval: Duration) {
        let _ = self.commands.send(Command::Interval(interval));
    }

    /// Publishes a relocation, between two publishes: as a checkpoint that reads as the one before. It goes on when this is given up.
    ///
    /// # Errors
    /// As [`Engine::relocate`].
    pub(crate) async fn relocate(
        &self,
        relocation: Arc<Relocation>,
    ) -> Result<Option<Relocated>, VolumeError> {
        self.check_fenced()?;
        let publisher = self.publisher.clone();
        let relocated = tokio::spawn(async move { publisher.relocate(relocation).await });
        relocated
            .await
            .unwrap_or_else(|e| Err(VolumeError::Internal(e.to_string())))
    }

    /// Publishes what was added to the overlay before the call. From then on whatever a log or the buffer file has that is not published
    /// is made upon the newest checkpoint of now, or a later one, also where checkpoints came since that hold nothing of clients.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub(crate) async fn publish_and_rebase(&self) -> Result<(), VolumeError> {
        self.check_fenced()?;
        self.publish_all().await?;
        // A publish that found nothing to publish has left the buffer file as it was.
        self.overlay.rebase();
        Ok(())
    }

    /// Publishes a checkpoint of this size, between two publishes. It goes on when this is given up.
    ///
    /// # Errors
    /// As [`Engine::grow`].
    pub(crate) async fn grow(&self, size_bytes: u64) -> Result<(), VolumeError> {
        self.check_fenced()?;
        let publisher = self.publisher.clone();
        let grown = tokio::spawn(async move { publisher.grow(size_bytes).await });
        grown
            .await
            .unwrap_or_else(|e| Err(VolumeError::Internal(e.to_string())))
    }

    /// What is not yet where it is to be.
    pub fn backlog(&self) -> Backlog {
        self.since.lock().backlog(&self.overlay, self.has_wal)
    }

    /// Ends the task once the publishes and appends in flight have ended. Returns the number of the active generation,
    /// or `None` when the task had ended already.
    pub async fn stop(&self) -> Option<u64> {
        self.publisher.settled().await;
        let (stopped, wait) = oneshot::channel();
        self.commands.send(Command::Stop(stopped)).ok()?;
        wait.await.ok().map(|generation| generation.0)
    }
}
