//! Replicas: a volume in another place that follows this one, checkpoint by checkpoint.
//!
//! Objects never change, so a replica is made of what is missing there. What is published to it is, one after another, the checkpoints that
//! the original keeps, as its own owner published them: first the objects, then the inode with `If-Match`, then the entry of the list.
//! So a replica is at every moment what a server that was killed leaves: a volume at its last complete checkpoint.
//!
//! * [`original`]: the checkpoints that are not there yet, pinned while they are copied, and the objects that they need.
//! * [`numbers`]: the numbers of its checkpoints, read off their list once a round.
//! * [`standing`] (pure): whether a place may be written to, and whether what is there is of the original's history.
//! * [`place`]: the replica: made, owned, published to.
//! * [`sample`]: whether two places have the same under the same numbers.
//! * [`objects`]: the copies, with what lies beside each object.

use std::time::Duration;

use log::warn;
use serde::Serialize;

use crate::base::control::{Control, Phase};
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::options::StoreOptions;

mod numbers;
mod objects;
mod original;
mod place;
mod sample;
mod standing;

use numbers::Numbers;
use objects::Amount;
pub(crate) use objects::Copies;
use original::{News, Original};
use place::Replica;
pub(crate) use sample::{agree, newest_shared};

/// How often a pause is looked up from.
const PAUSE_STEP: Duration = Duration::from_millis(100);

/// What is replicated, and to where.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// The original, which a server may have open.
    pub url: &'a VolumeUrl,
    /// How its store is reached.
    pub store_options: &'a StoreOptions,
    /// Where the replica is.
    pub to: &'a VolumeUrl,
    /// How that store is reached.
    pub to_options: &'a StoreOptions,
    /// The original is taken from the server that holds it first: that one publishes nothing any more.
    pub takes_over: bool,
    /// Goes on until it is stopped, and looks for new checkpoints this often; otherwise it ends once all are there.
    pub follows: Option<Duration>,
}

/// How far the replica is, and what was copied for it.
#[derive(Debug, Clone, Serialize)]
pub struct Replicated {
    /// Where the replica is.
    pub url: String,
    /// Its id.
    pub volume_id: Option<VolumeId>,
    /// The volume that it follows.
    pub original: String,
    /// Its newest checkpoint, which has this number in the original, too; 0 before the first.
    pub checkpoint: u64,
    /// Checkpoints that were published to it.
    pub checkpoints: u64,
    /// What was copied.
    #[serde(flatten)]
    pub copied: Amount,
    /// Checkpoints of the original that are not there yet.
    pub behind_checkpoints: u64,
    /// For how long the oldest of these has been published, by the clocks of the original's server and of this machine.
    pub behind_seconds: f64,
    /// The original's log, when flushed writes may lie there alone: it was not closed, and no server has the volume that publishes them.
    #[serde(rename = "log_left")]
    pub wal_left: Option<String>,
}

/// Copies to the replica what it does not have yet, and tells after each pass how far it is. Stopped or killed at any moment, it leaves a
/// replica at its last complete checkpoint, or none, and may be given again.
///
/// # Errors
/// [`VolumeError::InvalidInput`] when the places cannot be those of a volume and its replica, when the place is another volume's, and when
/// the original's history is not the replica's; [`VolumeError::Held`] when another server has the replica;
/// [`VolumeError::Fenced`] when one takes it; [`VolumeError::Closed`] when `control` said to stop before all was copied; when a store fails,
/// or an object is not what was written.
pub async fn replicate(
    request: &Request<'_>,
    control: &Control,
    mut tell: impl FnMut(&Replicated),
) -> Result<Replicated, VolumeError> {
    standing::check_places(request)?;
    let mut original = Original::connect(request).await?;
    let replicated = match Replica::connect(request, &original).await {
        Ok(mut replica) => {
            let taken = match request.takes_over {
                true => original.take_over(request).await,
                false => Ok(()),
            };
            let pass = Pass {
                original: &original,
                control,
            };
            let replicated = match taken {
                Ok(()) => pass.all(&mut replica, request.follows, &mut tell).await,
                Err(e) => Err(e),
            };
            replica.release(replicated.is_ok()).await;
            replicated
        }
        Err(e) => Err(e),
    };
    original.release().await;
    replicated
}

/// The work on one replica.
struct Pass<'a> {
    original: &'a Original,
    control: &'a Control,
}

impl Pass<'_> {
    async fn all(
        &self,
        replica: &mut Replica,
        follows: Option<Duration>,
        tell: &mut impl FnMut(&Replicated),
    ) -> Result<Replicated, VolumeError> {
        let mut so_far = Replicated {
            url: replica.url(),
            volume_id: None,
            original: self.original.url(),
            checkpoint: 0,
            checkpoints: 0,
            copied: Amount::default(),
            behind_checkpoints: 0,
            behind_seconds: 0.0,
            wal_left: None,
        };
        loop {
            match self.catch_up(replica, &mut so_far, follows.is_some(), tell).await {
                Ok(()) => {}
                // With --follow the end is a word from outside.
                Err(VolumeError::Closed) if follows.is_some() => return Ok(so_far),
                Err(e) if follows.is_some() && is_passing(&e) => {
                    warn!(
                        "{} is not brought up to date, which is tried on: {}",
                        so_far.url,
                        e.chain()
                    );
                }
                Err(e) => return Err(e),
            }
            let Some(interval) = follows else {
                return Ok(so_far);
            };
            self.control.begin(Phase::Preparing, 0);
            let mut left = interval;
            while !left.is_zero() && !self.control.is_stopped() {
                let step = left.min(PAUSE_STEP);
                tokio::time::sleep(step).await;
                left -= step;
            }
            if self.control.is_stopped() {
                return Ok(so_far);
            }
        }
    }

    /// Copies until nothing is missing, or, unless `is_following`, until it has what was there as it began: beside a writer who publishes
    /// as fast there would be no end.
    async fn catch_up(
        &self,
        replica: &mut Replica,
        so_far: &mut Replicated,
        is_following: bool,
        tell: &mut impl FnMut(&Replicated),
    ) -> Result<(), VolumeError> {
        let mut newest_at_first = None;
        let mut numbers = Numbers::default();
        loop {
            stopped(self.control)?;
            replica.complete(self.original).await?;
            let (newest, is_made) = (replica.newest(), replica.is_made());
            let news = self.original.news(newest, is_made, replica.store(), &mut numbers);
            let news = news.await?;
            let enough = *newest_at_first.get_or_insert(news.newest);
            let is_empty = news.is_empty();
            let done = match is_empty {
                true => Ok(()),
                false => self.step(replica, &news, so_far).await,
            };
            news.release().await;
            done?;
            so_far.volume_id = Some(replica.volume_id());
            so_far.checkpoint = replica.newest().map_or(0, |id| id.cno);
            let behind = self.original.behind(so_far.checkpoint, &mut numbers).await?;
            (so_far.behind_checkpoints, so_far.behind_seconds) = (behind.checkpoints, behind.seconds);
            replica.name_as(&self.original.names().await?).await?;
            let is_over = is_empty || !is_following && so_far.checkpoint >= enough;
            if is_over {
                so_far.wal_left = self.original.wal_left(!is_following).await?;
            }
            tell(so_far);
            if is_over {
                return Ok(());
            }
        }
    }

    /// One step: everything that some checkpoints need is copied, then each of them is published.
    async fn step(
        &self,
        replica: &mut Replica,
        news: &News,
        so_far: &mut Replicated,
    ) -> Result<(), VolumeError> {
        let needed = self.original.objects_of(news).await?;
        replica.expect(news, &needed).await?;
        let copies = objects::Copies {
            from: self.original.store(),
            to: replica.store(),
            control: self.control,
            holding: replica.holding(),
        };
        let copied = copies.all(&needed).await;
        so_far.copied.add(&copied.amount);
        copied.end?;
        // What was read since it was looked at last is of this volume, if this is it still.
        self.original.ensure_same().await?;
        for point in &news.points {
            stopped(self.control)?;
            replica.publish(point).await?;
            so_far.checkpoints += 1;
        }
        Ok(())
    }
}

/// Whether a failure is one of a store or of the way to it, which may be over soon.
fn is_passing(e: &VolumeError) -> bool {
    // Other credentials may be there a moment later.
    matches!(
        e.kind(),
        ErrorKind::Store | ErrorKind::Timeout | ErrorKind::Unauthenticated
    )
}

/// Ends work that is to stop.
fn stopped(control: &Control) -> Result<(), VolumeError> {
    match control.is_stopped() {
        true => Err(VolumeError::Closed),
        false => Ok(()),
    }
}
