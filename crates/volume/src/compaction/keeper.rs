//! The relocations of a served volume, beside everything else it does.

use std::sync::Arc;
use std::time::Duration;

use log::{debug, info, warn};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::pace::{self, Pace};
use super::relocation::{Flip, Ground, Moved};
use crate::base::checkpoint_id::NewestCheckpoint;
use crate::base::control::Control;
use crate::base::error::{ErrorKind, VolumeError};
use crate::engine::hyper_engine::PublishedBytes;
use crate::retention::{NEWEST_KEPT, Rounds, Victims, Want};

/// How often it is asked whether enough was published for a look; that costs nothing.
const POLL: Duration = Duration::from_secs(1);
/// A look is made this long after the last one though less was published: what history held may have been let go of.
const LOOK_AT_LATEST: Duration = Duration::from_secs(3600);
/// Relocations without a publish of clients in between. The buffer file and the records of a WAL name the checkpoint of the last
/// publish, which must be one of the newest that are always kept.
const FLIPS_IN_A_ROW_MAX: u32 = NEWEST_KEPT as u32 / 2 - 1;
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
    pub newest: NewestCheckpoint,
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
        let mut look_after = 0;
        let mut looked = (self.published_bytes.get(), self.newest.get(), Instant::now());
        loop {
            loop {
                tokio::time::sleep(POLL).await;
                let (bytes, newest, at) = looked;
                let published = self.published_bytes.get() - bytes;
                let is_late = at.elapsed() >= LOOK_AT_LATEST && self.newest.get() != newest;
                if published > 0 && (is_late || published >= look_after) {
                    break;
                }
            }
            looked = (self.published_bytes.get(), self.newest.get(), Instant::now());
            match self.relocate_all().await {
                Ok(bytes) => (failures, look_after) = (0, bytes),
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
    async fn relocate_all(&self) -> Result<u64, VolumeError> {
        let mut all = Moved::default();
        let (mut flipped_as, mut flips, mut is_over) = (0, 0, false);
        loop {
            let victims = self.victims(flipped_as).await?;
            if victims.next.is_empty() || is_over {
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
            // Nothing is changed any more where those objects are not needed, and the table tells that later.
            flips += 1;
            is_over = moved.checkpoint == 0 || flips == FLIPS_IN_A_ROW_MAX;
            flipped_as = moved.checkpoint.max(flipped_as);
            all.objects += moved.objects;
            all.object_bytes += moved.object_bytes;
            all.bytes += moved.bytes;
        }
    }
}
