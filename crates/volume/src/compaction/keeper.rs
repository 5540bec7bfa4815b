//! The relocations of a served volume, beside everything else it does.

use std::sync::Arc;
use std::time::Duration;

use log::{debug, info, warn};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::pace::{self, Pace};
use super::relocation::{Flip, Ground, Moved};
use super::schedule::Schedule;
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

/// Relocates until it is dropped.
#[derive(Debug)]
pub(crate) struct Keeper(AbortHandle);

/// What a keeper works with.
pub(crate) struct Work {
    pub ground: Ground,
    pub flip: Arc<dyn Flip>,
    pub rounds: Arc<Mutex<Rounds>>,
    pub published_bytes: PublishedBytes,
    /// Bytes a second at most; 0 is without a bound.
    pub cap_rate: u64,
}

impl Keeper {
    /// Starts on the current runtime.
    pub fn start(work: Work) -> Self {
        Self(tokio::spawn(work.run()).abort_handle())
    }

    /// Ends it. A flip that is on its way is carried out; copies before it are left.
    pub fn stop(&self) {
        self.0.abort();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Work {
    async fn run(self) {
        let mut failures = 0_u32;
        let (mut schedule, mut looked_at) = (Schedule::new(self.published_bytes.get()), Instant::now());
        loop {
            loop {
                tokio::time::sleep(POLL).await;
                if schedule.is_look_due(self.published_bytes.get(), looked_at.elapsed()) {
                    break;
                }
            }
            looked_at = Instant::now();
            schedule.look(self.published_bytes.get());
            match self.relocate_all(&mut schedule).await {
                Ok(look_after_bytes) => {
                    failures = 0;
                    schedule.looked(look_after_bytes);
                }
                Err(e) if e.kind() == ErrorKind::Fenced => {
                    info!("compaction has stopped in this server: {e}");
                    return;
                }
                // The format, or the numbers' end.
                Err(e) if matches!(e.kind(), ErrorKind::InvalidInput | ErrorKind::Exhausted) => {
                    info!("the volume is not compacted: {}", e.chain());
                    return;
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
                    tokio::time::sleep(wait.min(RETRY_WAIT_MAX)).await;
                }
            }
        }
    }

    /// The next victims, once the flip before is accounted: until then its victims are chosen again.
    async fn victims(&self, flipped_as: u64) -> Result<Victims, VolumeError> {
        for _ in 0..ENTRY_WAITS {
            let mut rounds = self.rounds.lock().await;
            let victims = rounds.victims(self.ground.block_bytes(), Want::Bound).await?;
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

    /// Relocates as long as there is anything to do. Returns the bytes to be published before the next look.
    async fn relocate_all(&self, schedule: &mut Schedule) -> Result<u64, VolumeError> {
        let mut all = Moved::default();
        loop {
            let victims = self.victims(schedule.flipped_as()).await?;
            if victims.next.is_empty() || schedule.is_over() {
                if all.objects > 0 {
                    info!(
                        "compaction copied {} live bytes out of {} objects of {} bytes, which are removed once no kept checkpoint needs them",
                        all.bytes, all.objects, all.object_bytes
                    );
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
            all.objects += moved.objects;
            all.object_bytes += moved.object_bytes;
            all.bytes += moved.bytes;
        }
    }
}
