//! Runs the rounds of a volume that is being served, in the background.

use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;

use super::choice::NEWEST_KEPT;
use super::round::{Removed, Rounds};
use crate::base::asks::{Asking, Asks, asks};
use crate::base::checkpoint_id::{CheckpointId, NewestCheckpoint};
use crate::base::error::{ErrorKind, VolumeError};
use crate::meta::wal_marker::Marker;

/// The most rounds that are skipped in a row when nothing was published.
const SKIPPED_MAX: u32 = 11;
/// The most rounds of a turn.
const ROUNDS_MAX: usize = 100;
/// The pause between two rounds of a turn, in which others come to the container and to the rounds.
const PAUSE: Duration = Duration::from_secs(1);

/// Runs rounds until it is dropped: each interval, and whenever it is asked to. The next server continues a round that was interrupted.
#[derive(Debug)]
pub(crate) struct Keeper {
    task: AbortHandle,
    asks: Asks<Turn, Option<Removed>>,
}

/// What kind of turn is asked for.
#[derive(Debug)]
struct Turn {
    only_if_automatic: bool,
}

impl Keeper {
    /// Starts on the current runtime. What earlier servers left is settled at once. If there is an `interval`, a round
    /// follows in each, and more of them at once where a plan has no room for all that may go. `grace` is the one of the rounds. `newest`
    /// shows whether anything was published; `marker` is the marker of the volume's WAL, if it has one.
    pub fn start(
        rounds: Arc<Mutex<Rounds>>,
        interval: Option<Duration>,
        grace: Duration,
        newest: NewestCheckpoint,
        marker: Option<Arc<Marker>>,
    ) -> Self {
        let (asks, asking) = asks("the retention");
        let work = Work {
            rounds,
            interval,
            grace,
            newest,
            marker,
        };
        let task = tokio::spawn(work.run(asking)).abort_handle();
        Self { task, asks }
    }

    /// Has rounds made until a plan has room for what is left that may go now. With `only_if_automatic` nothing is done where no round
    /// comes by itself, and the answer is `None`. What waits for its time of grace goes right after that, where rounds come by themselves.
    ///
    /// # Errors
    /// Those of a round. [`VolumeError::InvalidInput`] when too many wait already. [`VolumeError::Closed`] when the volume is closed
    /// meanwhile.
    pub async fn ask(&self, only_if_automatic: bool) -> Result<Option<Removed>, VolumeError> {
        self.asks.ask(Turn { only_if_automatic }).await
    }

    /// Stops the rounds.
    pub fn stop(&self) {
        self.task.abort();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What the task works with.
struct Work {
    rounds: Arc<Mutex<Rounds>>,
    interval: Option<Duration>,
    grace: Duration,
    newest: NewestCheckpoint,
    marker: Option<Arc<Marker>>,
}

impl Work {
    async fn run(self, mut asking: Asking<Turn, Option<Removed>>) {
        let rounds = &self.rounds;
        let mut failures = 0_u32;
        let mut skipped = 0;
        let mut done: Option<CheckpointId> = None;
        // None once another server has the volume: whoever asks is told so, by the round that fails.
        let mut interval = self.interval;
        if let Err(e) = rounds.lock().await.settle(false).await {
            if ends(&e) {
                interval = None;
            }
            debug!(
                "what earlier servers were removing is settled later: {}",
                e.chain()
            );
        }
        let mut wait = interval;
        loop {
            let asked = tokio::select! {
                biased;
                asked = asking.recv() => match asked {
                    Some(asked) => Some(asked),
                    // Nobody is left who could ask: the volume has gone.
                    None => return,
                },
                () = passed(wait) => None,
            };
            let asked = match asked {
                Some(asked) if asked.question.only_if_automatic && interval.is_none() => {
                    asked.tell(Ok(None));
                    continue;
                }
                asked => asked,
            };
            wait = interval;
            let at = self.newest.get();
            // Names and pins that end are noticed now and then.
            if asked.is_none()
                && done.is_some()
                && done == at
                && skipped < SKIPPED_MAX
                && rounds.lock().await.is_policy_unchanged().await
            {
                skipped += 1;
                continue;
            }
            skipped = 0;
            self.follow().await;
            let turned = turn(rounds, PAUSE).await;
            match &turned {
                Ok(removed) => {
                    failures = 0;
                    done = at.filter(|_| removed.waiting == 0);
                    if asked.is_some() && removed.waiting > 0 {
                        // What somebody waits for goes as soon as it may.
                        wait = interval.map(|interval| interval.min(self.grace));
                    }
                }
                Err(e) if ends(e) => (interval, wait) = (None, None),
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
            if let Some(asked) = asked {
                asked.tell(turned.map(Some));
            }
        }
    }

    /// Lets the log's marker name a checkpoint that stays anyway.
    async fn follow(&self) {
        if let Some(marker) = &self.marker
            && let Err(e) = marker.follow(NEWEST_KEPT as u64).await
        {
            debug!(
                "the log's marker names an old checkpoint, which stays for that: {}",
                e.chain()
            );
        }
    }
}

/// Resolves after this time; without one never.
async fn passed(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

/// Rounds until a plan has room for what is left that may go now. A volume with more writes than one plan an interval has room for would
/// only grow otherwise. Returns what the rounds removed, and what waits after the last one.
pub(super) async fn turn(rounds: &Mutex<Rounds>, pause: Duration) -> Result<Removed, VolumeError> {
    let mut removed = rounds.lock().await.round(Instant::now()).await?;
    for _ in 1..ROUNDS_MAX {
        if !removed.is_cut {
            break;
        }
        tokio::time::sleep(pause).await;
        let next = rounds.lock().await.round(Instant::now()).await?;
        removed = removed.followed_by(&next);
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
