//! The relocations of a served volume, beside everything else it does.

use std::sync::Arc;
use std::time::Duration;

use log::{debug, info, warn};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::Compacted;
use super::pace::{self, Pace};
use super::relocation::{Flip, Ground};
use super::schedule::Schedule;
use crate::base::asks::{Asking, Asks, asks};
use crate::base::control::Control;
use crate::base::error::{ErrorKind, VolumeError};
use crate::engine::hyper_engine::PublishedBytes;
use crate::retention::{Rounds, Victims, Want};

/// How often it is asked whether enough was published for a look; that costs nothing.
const POLL: Duration = Duration::from_secs(1);
/// How long an entry of the list is waited for that is written behind its checkpoint, and how often it is asked for.
const ENTRY_WAITS: u32 = 50;
const ENTRY_WAIT: Duration = Duration::from_millis(100);
/// The first wait after a failure; doubled by each further one.
const RETRY_WAIT: Duration = Duration::from_secs(10);
const RETRY_WAIT_MAX: Duration = Duration::from_secs(600);

/// Relocates until it is dropped: by itself where it is to, and whenever it is asked to. One task does both, so that no two relocations
/// choose the same victims.
#[derive(Debug)]
pub(crate) struct Keeper {
    task: AbortHandle,
    /// With what ends it between two checkpoints.
    asks: Asks<Arc<Control>, Compacted>,
}

/// What a keeper works with.
pub(crate) struct Work {
    pub ground: Ground,
    pub flip: Arc<dyn Flip>,
    pub rounds: Arc<Mutex<Rounds>>,
    pub published_bytes: PublishedBytes,
    /// Bytes a second at most; 0 is without a bound.
    pub cap_rate: u64,
    /// Whether anything is relocated that nobody asked for.
    pub is_automatic: bool,
}

impl Keeper {
    /// Starts on the current runtime.
    pub fn start(work: Work) -> Self {
        let (asks, asking) = asks("a compaction");
        let task = tokio::spawn(work.run(asking)).abort_handle();
        Self { task, asks }
    }

    /// Copies whatever gives back enough for what its copy costs, of what there is now; as fast as the store takes it at the lowest class,
    /// and below the cap. Waits for what is being relocated, and for who asked before. `control` ends it between two checkpoints.
    ///
    /// # Errors
    /// Those of the relocations: what was moved until then is in place. [`VolumeError::InvalidInput`] when too many wait already.
    /// [`VolumeError::Closed`] when the volume is closed meanwhile.
    pub async fn ask(&self, control: Arc<Control>) -> Result<Compacted, VolumeError> {
        self.asks.ask(control).await
    }

    /// Ends it. A flip that is on its way is carried out; copies before it are left.
    pub fn stop(&self) {
        self.task.abort();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Work {
    async fn run(self, mut asking: Asking<Arc<Control>, Compacted>) {
        let mut is_automatic = self.is_automatic;
        let mut failures = 0_u32;
        let mut schedule = Schedule::new(self.published_bytes.get());
        let (mut looked_at, mut not_before) = (Instant::now(), Instant::now());
        loop {
            let asked = tokio::select! {
                biased;
                asked = asking.recv() => match asked {
                    Some(asked) => Some(asked),
                    // Nobody is left who could ask: the volume has gone.
                    None => return,
                },
                () = self.look_due(&schedule, looked_at, not_before), if is_automatic => None,
            };
            looked_at = Instant::now();
            schedule.look(self.published_bytes.get());
            if let Some(asked) = asked {
                let done = self.relocate_asked(&mut schedule, &asked.question).await;
                tell(&done);
                asked.tell(done);
                continue;
            }
            match self.relocate_all(&mut schedule, &asking).await {
                Ok(look_after_bytes) => {
                    failures = 0;
                    schedule.looked(look_after_bytes);
                }
                Err(e) if e.kind() == ErrorKind::Fenced => {
                    info!("compaction has stopped in this server: {e}");
                    is_automatic = false;
                }
                // The format, or the numbers' end.
                Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Exhausted) => {
                    info!("the volume is not compacted: {}", e.chain());
                    is_automatic = false;
                }
                Err(e) => {
                    failures += 1;
                    if failures.is_power_of_two() {
                        warn!(
                            "compaction has failed {failures} times, and is tried again later: {}",
                            e.chain()
                        );
                    }
                    let wait = RETRY_WAIT.saturating_mul(1 << (failures - 1).min(10));
                    not_before = Instant::now() + wait.min(RETRY_WAIT_MAX);
                }
            }
        }
    }

    /// Resolves once enough was published since the last look for another one.
    async fn look_due(&self, schedule: &Schedule, looked_at: Instant, not_before: Instant) {
        tokio::time::sleep_until(not_before).await;
        loop {
            tokio::time::sleep(POLL).await;
            if schedule.is_look_due(self.published_bytes.get(), looked_at.elapsed()) {
                return;
            }
        }
    }

    /// The next victims, once the flip before is accounted: until then its victims are chosen again.
    async fn victims(&self, flipped_as: u64, want: Want) -> Result<Victims, VolumeError> {
        for _ in 0..ENTRY_WAITS {
            let mut rounds = self.rounds.lock().await;
            let victims = rounds.victims(self.ground.block_bytes(), want).await?;
            drop(rounds);
            if victims.accounted >= flipped_as {
                return Ok(victims);
            }
            tokio::time::sleep(ENTRY_WAIT).await;
        }
        Err(VolumeError::Internal(format!(
            "checkpoint {flipped_as}, a relocation, is not in the list"
        )))
    }

    /// Relocates as long as there is anything to do, and nobody asks for more. Returns the bytes to be published before the next look.
    async fn relocate_all(
        &self,
        schedule: &mut Schedule,
        asking: &Asking<Arc<Control>, Compacted>,
    ) -> Result<u64, VolumeError> {
        let mut all = Compacted::default();
        loop {
            let victims = self.victims(schedule.flipped_as(), Want::Bound).await?;
            if victims.next.is_empty() || schedule.is_over() || !asking.is_empty() {
                if all.objects > 0 {
                    tell_of(&all);
                }
                return Ok(pace::look_after(&victims.debt));
            }
            let pace = Pace::new(pace::rate(&victims.debt, self.cap_rate));
            let control = Control::default();
            let moved = self
                .ground
                .relocate(&victims.next, self.flip.as_ref(), pace, &control)
                .await?;
            debug!("{:?} for {:?}", moved, victims.debt);
            schedule.relocated(moved.checkpoint);
            all.add(&moved);
        }
    }

    /// Relocates what there was to relocate when this began: clients that write meanwhile do not keep it from ending.
    async fn relocate_asked(
        &self,
        schedule: &mut Schedule,
        control: &Control,
    ) -> Result<Compacted, VolumeError> {
        info!("told to compact");
        let cap = Some(self.cap_rate).filter(|rate| *rate > 0);
        let mut done = Compacted::default();
        let mut at_first = None;
        loop {
            let victims = self.victims(schedule.flipped_as(), Want::Everything).await?;
            let wanted = *at_first.get_or_insert(victims.objects);
            if victims.next.is_empty() || done.objects >= wanted || control.is_stopped() {
                break;
            }
            // However many follow each other, what is not published names one of the newest checkpoints.
            self.flip.settle().await?;
            schedule.settled();
            let moved = self
                .ground
                .relocate(&victims.next, self.flip.as_ref(), Pace::new(cap), control)
                .await?;
            if moved.checkpoint == 0 {
                break;
            }
            schedule.relocated(moved.checkpoint);
            done.add(&moved);
        }
        done.is_stopped = control.is_stopped();
        Ok(done)
    }
}

/// Logs how a compaction ended that was asked for.
fn tell(done: &Result<Compacted, VolumeError>) {
    match done {
        Ok(done) if done.is_stopped => info!("compaction is stopped: who asked for it has gone"),
        Ok(done) => tell_of(done),
        Err(e) => warn!("compaction, which was asked for, has failed: {}", e.chain()),
    }
}

fn tell_of(done: &Compacted) {
    info!(
        "compaction copied {} live bytes out of {} objects of {} bytes, which are removed once no kept checkpoint needs them",
        done.copied_bytes, done.objects, done.object_bytes
    );
}
