//! `resize` of a volume that is served elsewhere: its server is asked through the lease to grow it.
//!
//! The rules are those of `lease/growth.rs`. A request that is given up is withdrawn first, so that it does not come true later.

use std::time::{Duration, Instant};

use futures::try_join;

use super::create::check_size;
use super::info;
use crate::base::clock::now_ms;
use crate::base::control::Control;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::engine::parents;
use crate::lease::state::Stored;
use crate::lease::{self, GrowthRequest, GrowthStage, Outlook, outlook};
use crate::meta::label;
use crate::options::StoreOptions;
use crate::store::{Store, probe};

/// How often the request is written at most, while the holder renews its lease at the same moments.
const ASKED_MAX: u32 = 5;
/// The lease is read this many times in its duration, but neither more nor less often than this.
const LOOKS: u32 = 15;
const LOOK_MIN: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_secs(1);
/// Longer than the asker waits, so that a request never is too old while it is waited for.
const VALID_LONGER: Duration = Duration::from_secs(5);

/// What became of asking the holder of a volume's lease to grow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AskedToGrow {
    /// Nobody is known to have the volume open who could be asked, or not any more: then the lease says what may be done.
    Nobody,
    /// Somebody else has asked, and waits.
    Pending {
        /// What for.
        request: Box<GrowthRequest>,
    },
    /// The volume has grown.
    Grown {
        /// Its size in bytes.
        size_bytes: u64,
        /// Who did it.
        holder: String,
    },
    /// The holder did not grow it.
    Failed {
        /// Why, in its words.
        why: String,
        /// Who.
        holder: String,
    },
    /// The holder renewed its lease and took no notice: it is of an earlier release.
    Ignored {
        /// Who.
        holder: String,
    },
    /// Neither answer nor renewal came in time. The request is withdrawn.
    NoAnswer {
        /// Who did not answer.
        holder: String,
        /// How long that was waited for.
        waited: Duration,
    },
    /// The holder has taken the request up, and its end was not waited for or is not known.
    Unfinished {
        /// Who.
        holder: String,
    },
    /// The asker was told to stop. The request is withdrawn.
    Stopped,
}

/// Asks whoever holds the lease of the volume to grow it, and waits for the answer: for a third of the lease's duration and `patience`, but
/// no less than two thirds, until the holder takes that up, then for as long as it renews its lease. `control` ends it.
///
/// # Errors
/// [`VolumeError::InvalidInput`] for a size that no volume may have; when the store fails. When it fails so that the request could not be
/// withdrawn, the error says so.
pub async fn ask_to_grow(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    size_bytes: u64,
    patience: Duration,
    control: &Control,
) -> Result<AskedToGrow, VolumeError> {
    // Where conditions are ignored the lease of another owner might be replaced.
    if store_options.allow_unsafe {
        return Ok(AskedToGrow::Nobody);
    }
    let store = parents::connect(url, store_options).await?;
    let (found, lease) = try_join!(label::find(&store), lease::stored(&store))?;
    let is_asked = |lease: &Stored| lease.record.is_held() && !lease.record.is_of_killed();
    let (Some(found), Some(lease)) = (found, lease.filter(is_asked)) else {
        return Ok(AskedToGrow::Nobody);
    };
    // A copy has the lease of its original.
    if found.is_elsewhere() || found.label.volume_id != lease.record.volume_id {
        return Ok(AskedToGrow::Nobody);
    }
    check_size(size_bytes, info::of_store(&store).await?.block_size_bytes)?;
    probe::ensure(&store, false).await?;
    let duration = Duration::from_millis(lease.record.duration_ms);
    // A server of an earlier release that meets a request renews its lease a third of its duration later. It must not meet a second write,
    // the withdrawal, then: whoever watches the lease could take it.
    let limit = (duration / 3 + patience).max(duration * 2 / 3 + LOOK_MAX);
    let request = GrowthRequest {
        id: lease::new_token(),
        volume_id: found.label.volume_id,
        size_bytes,
        asked_ms: now_ms(),
        valid_ms: u64::try_from((limit + VALID_LONGER).as_millis()).unwrap_or(u64::MAX),
        asked_by: lease::asker(),
        stage: GrowthStage::Asked,
    };
    let asking = Asking {
        store: &store,
        token: lease.record.token.clone(),
        holder: lease.record.holder.to_string(),
        look: (duration / LOOKS).clamp(LOOK_MIN, LOOK_MAX),
        // As long as another server would watch it, and some more.
        silence: duration * 2 + patience,
        limit,
        request,
    };
    match asking.ask(lease).await? {
        Some(refused) => Ok(refused),
        None => asking.wait(control).await,
    }
}

/// A request, and whom it is for.
struct Asking<'a> {
    store: &'a Store,
    request: GrowthRequest,
    token: String,
    holder: String,
    look: Duration,
    /// How long it is waited until the request is taken up.
    limit: Duration,
    /// How long a holder that has taken it up may leave its lease as it is.
    silence: Duration,
}

impl Asking<'_> {
    /// Stores the request. Gives what is in the way of that.
    async fn ask(&self, mut lease: Stored) -> Result<Option<AskedToGrow>, VolumeError> {
        for attempt in 0..ASKED_MAX {
            match &lease.record.growth {
                Some(own) if own.id == self.request.id => return Ok(None),
                // Whoever is not there any more leaves its request where its holder is not, either.
                Some(other) if other.is_pending() && other.is_stale(now_ms()) => {
                    return Ok(Some(AskedToGrow::Nobody));
                }
                Some(other) if other.is_pending() => {
                    let request = Box::new(other.clone());
                    return Ok(Some(AskedToGrow::Pending { request }));
                }
                _ => {}
            }
            match self.put(&lease, GrowthStage::Asked).await {
                Ok(true) => return Ok(None),
                Ok(false) => {}
                // Nothing was written, or it was refused.
                Err(e) if attempt == 0 => return Err(e),
                Err(e) => return Err(self.unsettled(&e.chain())),
            }
            // Whether it is stored is seen there, unless its answer was lost and an earlier release has dropped it since.
            let stored = lease::stored(self.store).await;
            match stored.map_err(|e| self.unsettled(&e.chain()))? {
                Some(found) if found.record.is_held() && found.record.token == self.token => lease = found,
                _ => return Ok(Some(AskedToGrow::Nobody)),
            }
        }
        // The last one may have been stored.
        match outlook(&self.request, &self.token, Some(&lease.record)) {
            Outlook::Ignored => Err(self.unsettled("each write of it met another one, or had no answer")),
            _ => Ok(None),
        }
    }

    /// Writes the request over this lease. Whether it is known to be stored.
    async fn put(&self, over: &Stored, stage: GrowthStage) -> Result<bool, VolumeError> {
        lease::put_request(self.store, &self.request.at(stage), &over.version).await
    }

    /// Waits for the end of the request, which is stored.
    async fn wait(&self, control: &Control) -> Result<AskedToGrow, VolumeError> {
        let holder = self.holder.clone();
        let started = Instant::now();
        let mut renewed = (0, started);
        let mut is_withdrawal_sent = false;
        loop {
            tokio::time::sleep(self.look).await;
            let is_over = started.elapsed() >= self.limit;
            let found = match lease::stored(self.store).await {
                Ok(found) => found,
                // It is asked again for as long as an answer may come, and as long once more to withdraw the request.
                Err(e) if started.elapsed() >= self.limit * 2 || control.is_stopped() => {
                    return Err(self.unsettled(&e.chain()));
                }
                Err(_) => continue,
            };
            match outlook(
                &self.request,
                &self.token,
                found.as_ref().map(|found| &found.record),
            ) {
                Outlook::Grown(size_bytes) => return Ok(AskedToGrow::Grown { size_bytes, holder }),
                Outlook::Failed(why) => return Ok(AskedToGrow::Failed { why, holder }),
                Outlook::Ignored if !is_withdrawal_sent => return Ok(AskedToGrow::Ignored { holder }),
                // The withdrawal had no answer. Once it is stored the next renewal drops it.
                Outlook::Withdrawn | Outlook::Ignored => return Ok(self.withdrawn(control, started)),
                Outlook::Gone => return Ok(AskedToGrow::Nobody),
                Outlook::Taken => {
                    let renewals = found.map_or(0, |found| found.record.renewals);
                    if renewals != renewed.0 {
                        renewed = (renewals, Instant::now());
                    }
                    if control.is_stopped() || renewed.1.elapsed() >= self.silence {
                        return Ok(AskedToGrow::Unfinished { holder });
                    }
                }
                Outlook::Asked => {
                    let (true, Some(lease)) = (is_over || control.is_stopped(), &found) else {
                        continue;
                    };
                    let withdrawn = self.put(lease, GrowthStage::Withdrawn).await;
                    match withdrawn {
                        Ok(true) => return Ok(self.withdrawn(control, started)),
                        // The holder was faster, or it is not known: the stored lease tells.
                        Ok(false) if started.elapsed() < self.limit * 2 => is_withdrawal_sent = true,
                        Ok(false) => return Err(self.unsettled("its withdrawal had no answer")),
                        Err(e) => return Err(self.unsettled(&e.chain())),
                    }
                }
            }
        }
    }

    fn withdrawn(&self, control: &Control, started: Instant) -> AskedToGrow {
        match control.is_stopped() {
            true => AskedToGrow::Stopped,
            false => AskedToGrow::NoAnswer {
                holder: self.holder.clone(),
                waited: started.elapsed(),
            },
        }
    }

    fn unsettled(&self, why: &str) -> VolumeError {
        let (holder, url) = (&self.holder, &self.store.url);
        let within = self.request.valid_ms.div_ceil(1000);
        VolumeError::Timeout {
            operation: "asking the volume's server to grow it",
            waited: self.limit,
            last: format!(
                "{why}; {holder} may still do it within {within} s: look at hypernbd info {url} then"
            ),
        }
    }
}
