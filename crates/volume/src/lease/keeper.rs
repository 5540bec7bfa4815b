//! The lease in the store: carries out what the state machines decide.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use log::{info, warn};
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::grower::{Grow, Grower};
use super::growth::{self, GrowthRequest, GrowthStage};
use super::host::{self, HeldHere};
use super::record::{LeaseRecord, LeaseState};
use super::state::{
    Keep, KeepAction, KeepEvent, Liveness, Refusal, Stored, Take, TakeAction, TakeEvent, TakeOptions, Taken,
};
use crate::base::clock::now_ms;
use crate::base::counters::OWNERS;
use crate::base::error::VolumeError;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::volume_id::VolumeId;
use crate::engine::{Ownership, fence};
use crate::lease::options::LeaseOptions;
use crate::meta::checkpoint_list;
use crate::store::{ETag, Store};

/// The lease's name below the volume's `.meta/`.
pub(crate) const NAME: &str = "lease";
/// The wait before a release that failed is written again ...
const RELEASE_PAUSE: Duration = Duration::from_millis(500);
/// ... and the time from then on in which that succeeds or is given up.
const RELEASE_AGAIN_MAX: Duration = Duration::from_secs(4);

/// Loads the lease of a volume, if there is one. A released lease is returned too.
///
/// # Errors
/// When the store fails, or the object is not a valid lease.
pub async fn load(store: &Store) -> Result<Option<LeaseRecord>, VolumeError> {
    Ok(stored(store).await?.map(|stored| stored.record))
}

/// Checks, without changing anything, whether a later open could take the lease `seen`. If the holder cannot be seen
/// from here, this may take as long as the lease's duration. Returns the lease that was watched, for
/// [`LeaseOptions::known_expired`], so that the open need not watch it again.
///
/// # Errors
/// [`VolumeError::Held`] when another server holds the volume.
pub async fn probe(
    store: &Store,
    options: &LeaseOptions,
    seen: Option<Stored>,
) -> Result<Option<ETag>, VolumeError> {
    // The lease that a put would write is never written, so its volume id does not matter.
    let nobody = VolumeId::from_uuid(uuid::Uuid::nil());
    let mut take = Take::new(take_options(options, nobody));
    match Looking::new(store, Some(seen), options.is_copied)
        .next(&mut take, FIRST_LOOK)
        .await?
    {
        TakeAction::Put { expected, .. } => Ok(expected),
        TakeAction::Refused { by, why } => Err(held(store, &by, why)),
        TakeAction::GiveUp | TakeAction::Taken(_) | TakeAction::Read { .. } => {
            let reason = format!("a look at the lease of {} did not end as one", store.url);
            Err(VolumeError::Internal(reason))
        }
    }
}

/// Called before each write of the lease, with the token of the lease that the write is to replace, if there is one.
pub type BeforePut<'a> = &'a mut (dyn FnMut(Option<&str>) -> Result<(), VolumeError> + Send);

/// A lease that this process holds and renews until it is released, lost or dropped.
///
/// Dropping it without release keeps the stored lease in force until it runs out or this process takes it again.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    record: LeaseRecord,
    predecessor: Option<String>,
    /// Why the lease was lost; `None` until it is.
    lost: watch::Sender<Option<String>>,
    release: Mutex<Option<oneshot::Sender<Release>>>,
    held: Mutex<Option<HeldHere>>,
    grower: Grower,
}

#[derive(Debug)]
struct Release {
    is_clean: bool,
    is_buffer_left: bool,
    done: oneshot::Sender<()>,
}

impl Lease {
    /// Takes the lease, shuts older owners out of the container, and renews the lease on the current runtime. `seen` is
    /// the lease that was stored a moment ago. Nothing is written when `before_put` fails.
    ///
    /// # Errors
    /// [`VolumeError::Held`] when another server holds the volume.
    pub async fn take(
        store: &Store,
        volume_id: VolumeId,
        options: &LeaseOptions,
        seen: Option<Stored>,
        before_put: BeforePut<'_>,
    ) -> Result<Arc<Self>, VolumeError> {
        let is_copied = options.is_copied;
        let options = take_options(options, volume_id);
        let held = HeldHere::new(&options.claim.token);
        let taken = take(store, options, seen, is_copied, before_put).await?;
        Self::begin(store, taken, held).await
    }

    /// As [`Self::take`], but with one request, and only if the stored lease is still `seen` and may be taken. Returns
    /// `None` when the lease was not taken or when that is unknown; the caller then knows nothing about the stored
    /// lease.
    pub(crate) async fn take_unchanged(
        store: &Store,
        volume_id: VolumeId,
        options: &LeaseOptions,
        seen: Stored,
        before_put: BeforePut<'_>,
    ) -> Option<Arc<Self>> {
        let options = take_options(options, volume_id);
        let held = HeldHere::new(&options.claim.token);
        let mut take = Take::new(options);
        let found = TakeEvent::Found {
            holder: host::liveness(&seen.record, &host::this_process()),
            stored: seen,
            now_ms: 0,
        };
        let TakeAction::Put { record, expected } = take.on(found) else {
            return None;
        };
        before_put(take.predecessor()).ok()?;
        let Put::Accepted(version) = put(store, &record, expected.as_ref()).await else {
            return None;
        };
        match take.on(TakeEvent::PutAccepted(version)) {
            TakeAction::Taken(taken) => Self::begin(store, taken, held).await.ok(),
            _ => None,
        }
    }

    /// Begins to hold a lease that has just been stored.
    async fn begin(store: &Store, taken: Taken, held: HeldHere) -> Result<Arc<Self>, VolumeError> {
        let Taken {
            stored,
            is_after_release,
            predecessor,
        } = taken;
        info!(
            "holding the lease of {}, epoch {}",
            store.url, stored.record.epoch
        );
        let lease = Self::keep(store.clone(), stored, predecessor, held);
        // An owner from before there was a lease, or one that is not proved to have ended, may wake up at any time.
        if !is_after_release && let Err(e) = fence::rewrite_inode(store).await {
            lease.release(false).await;
            return Err(e);
        }
        Ok(lease)
    }

    fn keep(store: Store, stored: Stored, predecessor: Option<String>, held: HeldHere) -> Arc<Self> {
        let (release, released) = oneshot::channel();
        let (lost, _) = watch::channel(None);
        let record = stored.record.clone();
        let counted = &store.metrics().lease;
        counted.is_held.set(1);
        counted.epoch.set(record.epoch);
        let grower = Grower::default();
        let keeping = keep(
            store.clone(),
            Keep::new(stored),
            released,
            lost.clone(),
            grower.clone(),
        );
        tokio::spawn(keeping);
        Arc::new(Self {
            store,
            record,
            predecessor,
            lost,
            release: Mutex::new(Some(release)),
            held: Mutex::new(Some(held)),
            grower,
        })
    }

    /// The owner's epoch, which is higher than that of every earlier owner.
    pub fn epoch(&self) -> u64 {
        self.record.epoch
    }

    /// The token of the lease that this one replaced, if there was one.
    pub fn predecessor(&self) -> Option<&str> {
        self.predecessor.as_deref()
    }

    /// Whether an earlier owner may still run without knowing that it lost the volume.
    pub fn older_may_run(&self) -> bool {
        self.record.older_may_run
    }

    /// From now on requests to grow that the lease brings are carried out by this.
    pub(crate) fn grow_with(&self, grow: Grow) {
        self.grower.set(grow);
    }

    /// Resolves to the reason when the lease is lost, or to `None` when the lease was dropped.
    pub fn lost(&self) -> impl Future<Output = Option<String>> + Send + use<> {
        let mut lost = self.lost.subscribe();
        async move { lost.wait_for(Option::is_some).await.ok()?.clone() }
    }

    /// Gives the lease back, so that the next server can take it at once. `is_clean` says that every request to the
    /// container is known to have arrived or to have failed. If it is not, the next owner fences this one.
    pub async fn release(&self, is_clean: bool) {
        self.release_leaving(is_clean, true).await;
    }

    /// As [`Self::release`]. Unless `is_buffer_left`, no buffer file is named any more: its directory has none that is needed.
    pub async fn release_leaving(&self, is_clean: bool, is_buffer_left: bool) {
        let release = self.release.lock().take();
        if let Some(release) = release {
            let (done, wait) = oneshot::channel();
            let wanted = Release {
                is_clean,
                is_buffer_left,
                done,
            };
            if release.send(wanted).is_ok() {
                let _ = wait.await;
            }
        }
        self.forget();
    }

    /// Stops renewing the lease and leaves it as it is stored. For a volume that is deleted, or dropped without close.
    pub(crate) fn forget(&self) {
        drop(self.release.lock().take());
        drop(self.held.lock().take());
    }
}

#[async_trait]
impl Ownership for Lease {
    async fn check(&self) -> Result<(), VolumeError> {
        let known = self.lost.borrow().clone();
        let reason = match known {
            Some(reason) => reason,
            None => {
                let stored = stored(&self.store).await?;
                if stored
                    .as_ref()
                    .is_some_and(|s| s.record.token == self.record.token)
                {
                    return Ok(());
                }
                let reason = lost_to(stored.map(|s| s.record).as_ref());
                self.store.metrics().lease.is_held.set(0);
                self.lost.send_replace(Some(reason.clone()));
                reason
            }
        };
        Err(VolumeError::Fenced { reason })
    }
}

/// A new random token.
pub(crate) fn new_token() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

fn take_options(options: &LeaseOptions, volume_id: VolumeId) -> TakeOptions {
    TakeOptions {
        claim: LeaseRecord {
            state: LeaseState::Held,
            epoch: options.epoch_above,
            token: options.token.clone().unwrap_or_else(new_token),
            renewals: 0,
            duration_ms: options.duration.as_millis() as u64,
            volume_id,
            holder: host::this_process(),
            taken_ms: now_ms(),
            write_buffer_dir: options.write_buffer_dir.clone(),
            control: options.control.clone(),
            older_may_run: false,
            growth: None,
        },
        takeover: options.takeover,
        known_expired: options.sighting.as_ref().map(|s| s.lease.version.clone()),
    }
}

async fn take(
    store: &Store,
    options: TakeOptions,
    seen: Option<Stored>,
    is_copied: bool,
    before_put: BeforePut<'_>,
) -> Result<Taken, VolumeError> {
    let mut take = Take::new(options);
    let mut looking = Looking::new(store, Some(seen), is_copied);
    let mut action = FIRST_LOOK;
    loop {
        action = match looking.next(&mut take, action).await? {
            TakeAction::Put { record, .. } if record.epoch > OWNERS.max => {
                return Err(OWNERS.exhausted());
            }
            TakeAction::Put { record, expected } => {
                before_put(take.predecessor())?;
                let event = match put(store, &record, expected.as_ref()).await {
                    Put::Accepted(version) => TakeEvent::PutAccepted(version),
                    Put::Refused => TakeEvent::PutRefused,
                    Put::Unknown(_) => TakeEvent::PutUnknown,
                    Put::Failed(e) => return Err(e),
                };
                take.on(event)
            }
            TakeAction::Taken(taken) => {
                OWNERS.note(0, taken.stored.record.epoch);
                return Ok(taken);
            }
            TakeAction::Refused { by, why } => return Err(held(store, &by, why)),
            TakeAction::GiveUp => {
                let detail =
                    "each answer to a write of it was lost; check the network between here and the store";
                return Err(StoreError::new(
                    "write the lease of",
                    &store.url,
                    StoreErrorKind::Unreachable,
                    detail,
                )
                .into());
            }
            TakeAction::Read { .. } => {
                let reason = format!("a look at the lease of {} did not end as one", store.url);
                return Err(VolumeError::Internal(reason));
            }
        };
    }
}

/// The first action whenever a lease is inspected.
const FIRST_LOOK: TakeAction = TakeAction::Read { wait_ms: 0 };

/// Reads the lease, repeatedly if need be.
struct Looking<'a> {
    store: &'a Store,
    /// The lease that was already read, if it was.
    seen: Option<Option<Stored>>,
    started: Instant,
    is_announced: bool,
    /// See [`LeaseOptions::is_copied`].
    is_copied: bool,
}

impl<'a> Looking<'a> {
    fn new(store: &'a Store, seen: Option<Option<Stored>>, is_copied: bool) -> Self {
        Self {
            store,
            seen,
            started: Instant::now(),
            is_announced: false,
            is_copied,
        }
    }

    /// Reads and waits until the machine asks for anything else.
    async fn next(&mut self, take: &mut Take, mut action: TakeAction) -> Result<TakeAction, VolumeError> {
        let (store, this) = (self.store, host::this_process());
        while let TakeAction::Read { wait_ms } = action {
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            let seen = match self.seen.take() {
                Some(seen) => seen,
                None => stored(store).await?,
            };
            let event = match seen {
                None => TakeEvent::Absent {
                    epoch_seen: checkpoint_list::newest_epoch(store).await?,
                },
                Some(stored) => {
                    let holder = match self.is_copied {
                        true => Liveness::Unknown,
                        false => host::liveness(&stored.record, &this),
                    };
                    if wait_ms > 0 && !self.is_announced {
                        self.is_announced = true;
                        warn!(
                            "{} is held by {}, which cannot be seen from here: waiting up to {} s to see whether it is \
                             alive (takeover=yes does not wait)",
                            store.url,
                            stored.record.holder,
                            stored.record.duration_ms.div_ceil(1000)
                        );
                    }
                    if holder == Liveness::Ended && stored.record.state == LeaseState::Held {
                        info!("{} held {} and has ended", stored.record.holder, store.url);
                    }
                    TakeEvent::Found {
                        stored,
                        holder,
                        now_ms: self.started.elapsed().as_millis() as u64,
                    }
                }
            };
            action = take.on(event);
        }
        Ok(action)
    }
}

async fn keep(
    store: Store,
    mut machine: Keep,
    mut released: oneshot::Receiver<Release>,
    lost: watch::Sender<Option<String>>,
    grower: Grower,
) {
    let mut growth: Option<JoinHandle<GrowthStage>> = None;
    // When the lease with the last request was stored, by the store's clock.
    let mut asked_at: Option<SystemTime> = None;
    let duration = machine.duration();
    let metrics = store.metrics().clone();
    let counted = &metrics.lease;
    loop {
        let mut done = None;
        let mut until: Option<Instant> = None;
        let mut event = tokio::select! {
            () = tokio::time::sleep(duration / 3) => KeepEvent::RenewDue,
            stage = end_of(&mut growth) => {
                growth = None;
                KeepEvent::GrowthEnded(stage)
            }
            asked = &mut released => match asked {
                Ok(release) => {
                    done = Some(release.done);
                    // Not at the end: whoever waits for that may give up, and the volume be opened anew meanwhile.
                    counted.is_held.set(0);
                    KeepEvent::ReleaseWanted {
                        is_clean: release.is_clean,
                        is_buffer_left: release.is_buffer_left,
                    }
                }
                // The lease was forgotten or dropped.
                Err(_) => return,
            },
        };
        loop {
            // For each request.
            let limit = until.map_or(duration, |until| {
                until.saturating_duration_since(Instant::now()).min(duration)
            });
            event = match machine.on(event) {
                KeepAction::Wait => break,
                KeepAction::Pause => {
                    tokio::time::sleep(RELEASE_PAUSE).await;
                    until = Some(Instant::now() + RELEASE_AGAIN_MAX);
                    KeepEvent::Paused
                }
                KeepAction::Put { record, expected } => {
                    let put = tokio::time::timeout(limit, put(&store, &record, Some(&expected))).await;
                    match put.unwrap_or_else(|_| Put::Unknown("no answer in time".into())) {
                        Put::Accepted(version) => {
                            counted.renewals.add(u64::from(record.is_held()));
                            KeepEvent::PutAccepted(version)
                        }
                        Put::Refused => KeepEvent::PutRefused,
                        Put::Unknown(why) => {
                            counted.failures.one();
                            warn_of(&store, &record, &why);
                            KeepEvent::PutUnknown
                        }
                        Put::Failed(e) => {
                            counted.failures.one();
                            warn_of(&store, &record, &e.chain());
                            KeepEvent::PutUnknown
                        }
                    }
                }
                KeepAction::Read => match tokio::time::timeout(limit, stored_with_time(&store)).await {
                    Ok(Ok(found)) => {
                        let (found, at) = found.unzip();
                        // Over the request is only what says that it is taken: the time stays the one of the request.
                        let is_asked = |found: &Stored| {
                            let growth = found.record.growth.as_ref();
                            growth.is_some_and(|growth| growth.stage == GrowthStage::Asked)
                        };
                        if found.as_ref().is_some_and(is_asked) {
                            asked_at = at;
                        }
                        KeepEvent::Found(found)
                    }
                    _ => KeepEvent::ReadFailed,
                },
                KeepAction::Grow(request) => {
                    let grown = grower.clone().carry_out(store.clone(), request, asked_at.take());
                    growth = Some(tokio::spawn(grown));
                    break;
                }
                KeepAction::Lost { to } => {
                    if done.is_none() {
                        counted.is_held.set(0);
                    }
                    lost.send_if_modified(|known| {
                        let is_new = known.is_none();
                        known.get_or_insert_with(|| lost_to(to.as_ref()));
                        is_new
                    });
                    return;
                }
                KeepAction::Ended => {
                    if let Some(done) = done {
                        let _ = done.send(());
                    }
                    return;
                }
            };
        }
    }
}

/// The end of the growth that is under way. Never resolves without one.
async fn end_of(growth: &mut Option<JoinHandle<GrowthStage>>) -> GrowthStage {
    match growth {
        Some(growth) => growth.await.unwrap_or_else(|e| GrowthStage::Failed {
            why: format!("it ended early: {e}"),
        }),
        None => std::future::pending().await,
    }
}

fn warn_of(store: &Store, record: &LeaseRecord, why: &str) {
    let what = match record.is_held() {
        true => "renewed",
        false => "given back",
    };
    warn!("the lease of {} could not be {what}: {why}", store.url);
}

enum Put {
    Accepted(ETag),
    Refused,
    Unknown(String),
    Failed(VolumeError),
}

async fn put(store: &Store, record: &LeaseRecord, expected: Option<&ETag>) -> Put {
    match serde_json::to_vec_pretty(record) {
        Ok(body) => put_body(store, body, expected).await,
        Err(e) => Put::Failed(VolumeError::Internal(e.to_string())),
    }
}

async fn put_body(store: &Store, body: Vec<u8>, expected: Option<&ETag>) -> Put {
    let key = store.meta_key(NAME);
    let written = match expected {
        Some(version) => store.put_if_match(&key, body, version).await,
        None => store.put_create_only(&key, body).await,
    };
    match written {
        Ok(version) => Put::Accepted(version),
        Err(e) => match e.kind {
            StoreErrorKind::PreconditionFailed | StoreErrorKind::NotFound => Put::Refused,
            StoreErrorKind::Unreachable => Put::Unknown(e.to_string()),
            StoreErrorKind::AccessDenied
            | StoreErrorKind::Unauthenticated
            | StoreErrorKind::Corrupt
            | StoreErrorKind::Refused
            | StoreErrorKind::Other => Put::Failed(e.into()),
        },
    }
}

/// Writes a request into the lease that is stored as `expected`, for somebody who asks its holder. All else in it stays, also what this
/// release does not know. Whether the store is known to have done it; if not, the stored lease tells.
///
/// # Errors
/// When the store refuses it for good.
pub(crate) async fn put_request(
    store: &Store,
    request: &GrowthRequest,
    expected: &ETag,
) -> Result<bool, VolumeError> {
    let key = store.meta_key(NAME);
    let stored = store.get(&key).await?;
    let Some((body, _)) = stored.filter(|(_, version)| version == expected) else {
        return Ok(false);
    };
    let internal = |e: serde_json::Error| VolumeError::Internal(e.to_string());
    let mut lease: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&body).map_err(internal)?;
    lease.insert(
        growth::FIELD.to_owned(),
        serde_json::to_value(request).map_err(internal)?,
    );
    let body = serde_json::to_vec_pretty(&lease).map_err(internal)?;
    match put_body(store, body, Some(expected)).await {
        Put::Accepted(_) => Ok(true),
        Put::Refused | Put::Unknown(_) => Ok(false),
        Put::Failed(e) => Err(e),
    }
}

/// Loads the lease with its ETag, if there is one.
///
/// # Errors
/// As [`load`].
pub(crate) async fn stored(store: &Store) -> Result<Option<Stored>, VolumeError> {
    Ok(stored_with_time(store).await?.map(|(stored, _)| stored))
}

/// As [`stored`], with the time at which it was stored, by the store's clock.
async fn stored_with_time(store: &Store) -> Result<Option<(Stored, SystemTime)>, VolumeError> {
    let key = store.meta_key(NAME);
    let Some((body, info)) = store.get_with_info(&key).await? else {
        return Ok(None);
    };
    let version = info.etag;
    let corrupt = |reason: String| VolumeError::Corrupt {
        what: format!("the lease {key}"),
        reason: format!("{reason}; if no server runs on the volume, delete that object"),
    };
    let record = LeaseRecord::decode(&body).map_err(corrupt)?;
    Ok(Some((Stored { record, version }, info.last_modified)))
}

fn held(store: &Store, by: &LeaseRecord, why: Refusal) -> VolumeError {
    let why = match why {
        Refusal::RunsHere => "it runs on this machine".to_owned(),
        Refusal::Renewed { watched_ms } => format!(
            "it renewed its lease while it was watched for {}.{} s",
            watched_ms / 1000,
            watched_ms % 1000 / 100
        ),
        Refusal::TookIt => "it took the volume just now".to_owned(),
    };
    VolumeError::Held {
        url: store.url.to_string(),
        holder: by.holder.to_string(),
        why,
    }
}

fn lost_to(other: Option<&LeaseRecord>) -> String {
    match other {
        Some(record) => format!(
            "{} took the volume over (lease epoch {})",
            record.holder, record.epoch
        ),
        None => {
            "the volume's lease is gone: the volume was deleted, or the lease was removed by hand".to_owned()
        }
    }
}
