//! Runs the rounds of a volume that is being served, in the background.

use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use super::choice::NEWEST_KEPT;
use super::round::{Removed, Rounds};
use crate::base::checkpoint_id::{CheckpointId, NewestCheckpoint};
use crate::base::error::{ErrorKind, VolumeError};
use crate::meta::wal_marker::Marker;

/// The most rounds that are skipped in a row when nothing was published.
const SKIPPED_MAX: u32 = 11;
/// The most rounds of a turn.
const ROUNDS_MAX: usize = 100;
/// The pause between two rounds of a turn, in which others come to the container and to the rounds.
const PAUSE: Duration = Duration::from_secs(1);

/// Runs rounds until it is dropped. The next server continues a round that was interrupted.
#[derive(Debug)]
pub(crate) struct Keeper(AbortHandle);

impl Keeper {
    /// Starts on the current runtime. What earlier servers left is settled at once. If there is an `interval`, a round
    /// follows in each, and more of them at once where a plan has no room for all that may go. `newest` shows whether anything was published; `marker` is the marker of the volume's WAL, if
    /// it has one.
    pub fn start(
        rounds: Arc<Mutex<Rounds>>,
        interval: Option<Duration>,
        newest: NewestCheckpoint,
        marker: Option<Arc<Marker>>,
    ) -> Self {
        let running = tokio::spawn(run(rounds, interval, newest, marker));
        Self(running.abort_handle())
    }

    /// Stops the rounds.
    pub fn stop(&self) {
        self.0.abort();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn run(
    rounds: Arc<Mutex<Rounds>>,
    interval: Option<Duration>,
    newest: NewestCheckpoint,
    marker: Option<Arc<Marker>>,
) {
    let mut failures = 0_u32;
    let mut skipped = 0;
    let mut done: Option<CheckpointId> = None;
    if let Err(e) = rounds.lock().await.settle(false).await {
        if ends(&e) {
            return;
        }
        debug!(
            "what earlier servers were removing is settled later: {}",
            e.chain()
        );
    }
    let Some(interval) = interval else { return };
    loop {
        tokio::time::sleep(interval).await;
        let at = newest.get();
        // Names and pins that end are noticed now and then.
        if done.is_some()
            && done == at
            && skipped < SKIPPED_MAX
            && rounds.lock().await.is_policy_unchanged().await
        {
            skipped += 1;
            continue;
        }
        skipped = 0;
        if let Some(marker) = &marker
            && let Err(e) = marker.follow(NEWEST_KEPT as u64).await
        {
            debug!(
                "the log's marker names an old checkpoint, which stays for that: {}",
                e.chain()
            );
        }
        match turn(&rounds, PAUSE).await {
            Ok(removed) => {
                failures = 0;
                done = at.filter(|_| removed.waiting == 0);
            }
            Err(e) if ends(&e) => return,
            Err(e) => {
                done = None;
                failures += 1;
                // Logged once and then at growing intervals, because the failure costs nothing but space.
                if failures.is_power_of_two() {
                    warn!(
                        "retention has failed {failures} times, and is tried again later: {}",
                        e.chain()
                    );
                }
            }
        }
    }
}

/// Rounds until a plan has room for what is left that may go now. A volume with more writes than one plan an interval has room for would
/// only grow otherwise. Returns what the last round removed, and what waits.
pub(super) async fn turn(rounds: &Mutex<Rounds>, pause: Duration) -> Result<Removed, VolumeError> {
    let mut removed = rounds.lock().await.round(Instant::now()).await?;
    for _ in 1..ROUNDS_MAX {
        if !removed.is_cut {
            break;
        }
        tokio::time::sleep(pause).await;
        removed = rounds.lock().await.round(Instant::now()).await?;
    }
    Ok(removed)
}

/// Whether the error means that there is another owner.
fn ends(e: &VolumeError) -> bool {
    let is_fenced = e.kind() == ErrorKind::Fenced;
    if is_fenced {
        info!("retention has stopped in this server: {e}");
    }
    is_fenced
}
