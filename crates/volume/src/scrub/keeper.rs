//! The scrub of a served volume, beside everything else it does.

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::future::BoxFuture;
use log::{debug, error, info, warn};
use parking_lot::Mutex;
use tokio::task::AbortHandle;

use super::damage::Known;
use super::impact;
use super::needed::{self, Suspects};
use super::schedule::{self, Looked, Next, ReadObject, Schedule};
use crate::base::clock::now_ms;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::volume_id::VolumeId;
use crate::compaction::Pace;
use crate::engine::Ownership;
use crate::format::object_names::{cno_of, name_of};
use crate::meta::scrub_record::{DamagedPlace, ScrubRecord};
use crate::read::read_path::Reads;
use crate::store::verify::{READ_BYTES, Wrong};
use crate::store::{ETag, Store};

/// The first wait before the record is loaded again; doubled by each further one.
const LOAD_WAIT: Duration = Duration::from_secs(10);
const LOAD_WAIT_MAX: Duration = Duration::from_secs(600);

/// What a scrub works with.
pub(crate) struct Work {
    /// The volume's store.
    pub store: Store,
    /// Its id.
    pub volume_id: VolumeId,
    /// Whether this server may still write beside it.
    pub ownership: Arc<dyn Ownership>,
    /// What gives it its turns at the store.
    pub reads: Reads,
    /// See `scrub_interval` of the options.
    pub interval: Duration,
}

/// What is shown of the scrub: nothing until it is known what earlier servers left, and once it has ended.
type Shown = Arc<Mutex<Option<ScrubRecord>>>;

/// Scrubs until it is dropped.
#[derive(Debug)]
pub(crate) struct Keeper {
    running: AbortHandle,
    shown: Shown,
}

impl Keeper {
    /// Starts on the current runtime. It ends once `lost` resolves to a reason: another server has the volume.
    pub fn start(work: Work, lost: impl Future<Output = Option<String>> + Send + 'static) -> Self {
        let shown = Shown::default();
        let scrub = AssertUnwindSafe(run(work, shown.clone())).catch_unwind();
        let ended_shown = shown.clone();
        let running = tokio::spawn(async move {
            tokio::select! {
                ended = scrub => if ended.is_err() {
                    error!("the scrub has ended in this server by a defect: damage is found by reads alone");
                },
                Some(reason) = lost => info!("the scrub has stopped in this server: {reason}"),
            }
            *ended_shown.lock() = None;
        });
        Self {
            running: running.abort_handle(),
            shown,
        }
    }

    /// How far it is, and what it knows of; nothing before that was loaded, and once it has ended.
    pub fn status(&self) -> Option<ScrubRecord> {
        self.shown.lock().clone()
    }

    /// Ends it at once. The next server goes on where the record says.
    pub fn stop(&self) {
        self.running.abort();
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Scrubs until the volume is another server's.
fn run(work: Work, shown: Shown) -> BoxFuture<'static, ()> {
    async move {
        let mut scrub = Scrub::load(work, shown).await;
        loop {
            let done = match scrub.schedule.next(now_ms()) {
                Next::Wait(wait) => {
                    tokio::time::sleep(wait).await;
                    continue;
                }
                Next::Look => scrub.look().await,
                Next::Read { object, len_bytes } => scrub.read(object, len_bytes).await,
                Next::Confirm => scrub.confirm().await,
                Next::Save => scrub.save().await,
            };
            match done {
                Ok(()) => {}
                Err(e) if e.kind() == ErrorKind::Fenced => {
                    info!("the scrub has stopped in this server: {e}");
                    return;
                }
                Err(e) => {
                    let failures = scrub.schedule.failed(now_ms());
                    // Logged once and then at growing intervals: nothing is lost by it.
                    if failures.is_power_of_two() {
                        warn!(
                            "the scrub has failed {failures} times, and is tried again later: {}",
                            e.chain()
                        );
                    }
                }
            }
            scrub.show();
        }
    }
    .boxed()
}

/// The scrub of one volume.
struct Scrub {
    work: Work,
    schedule: Schedule,
    known: Known,
    suspects: Suspects,
    /// Objects that the last look found something wrong with, whatever their bytes are.
    doubted: BTreeSet<u64>,
    pace: Pace,
    /// The write of the record that this one goes over.
    stored: Option<ETag>,
    save_failures: u32,
    shown: Shown,
}

impl Scrub {
    /// Goes on with what an earlier server of the volume has stored.
    async fn load(work: Work, shown: Shown) -> Self {
        let mut wait = LOAD_WAIT;
        let (record, stored) = loop {
            match ScrubRecord::load_with(&work.store).await {
                Ok(loaded) => break loaded,
                Err(e) => debug!("the scrub begins later: {e}"),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LOAD_WAIT_MAX);
        };
        // A copy of a volume is read as a volume of its own.
        let record = record.filter(|record| record.volume_id == work.volume_id);
        let record = record.unwrap_or_else(|| ScrubRecord::new(work.volume_id));
        let mut schedule = Schedule::new(work.interval, now_ms(), record.pass, record.last);
        let known = Known::new(record.damage, record.more);
        schedule.remember_damage(!known.is_empty());
        let scrub = Self {
            pace: Pace::new(Some(schedule.rate())),
            work,
            schedule,
            known,
            suspects: Suspects::new(),
            doubted: BTreeSet::new(),
            stored,
            save_failures: 0,
            shown,
        };
        scrub.show();
        scrub
    }

    /// Looks up what is needed, and whether it is there.
    async fn look(&mut self) -> Result<(), VolumeError> {
        // Check values that it reads make nobody else's go, and are read anew for what they are now.
        self.work.store = self.work.store.apart();
        let turn = self.work.reads.background_turn().await;
        let needed = needed::look(&self.work.store).await?;
        drop(turn);
        if self.known.retain(|object| needed.objects.contains_key(&object)) {
            info!("the scrub forgets damage in objects that no checkpoint needs any more");
            self.schedule.damage_changed(!self.known.is_empty());
        }
        self.doubted = needed.suspects.keys().copied().collect();
        self.suspects.extend(needed.suspects);
        let mut again = self.known.objects();
        again.extend(&self.doubted);
        let looked = Looked {
            newest: needed.newest,
            there: &needed.there,
            again: &again,
            is_suspecting: !self.suspects.is_empty(),
        };
        if self.schedule.looked(now_ms(), &looked) {
            self.known.begin_pass();
            info!(
                "a scrub begins: {} objects, up to checkpoint {}",
                needed.there.len(),
                needed.newest
            );
        }
        self.pace = Pace::new(Some(self.schedule.rate()));
        Ok(())
    }

    /// Reads one object and compares it with its check values.
    async fn read(&mut self, object: u64, len_bytes: u64) -> Result<(), VolumeError> {
        let counted = self.work.store.metrics().clone();
        let mut read = ReadObject::default();
        let mut bad = Vec::new();
        let mut is_gone = false;
        for start in (0..len_bytes).step_by(READ_BYTES as usize) {
            let bytes = start..len_bytes.min(start + READ_BYTES);
            let len_bytes = bytes.end - bytes.start;
            let wait = self.pace.wait(schedule::cost_bytes(len_bytes), Instant::now());
            tokio::time::sleep(wait).await;
            let turn = self.work.reads.background_turn().await;
            // Anew for each part: a clone may get copies of its own meanwhile.
            let holder = self.work.store.holder_of(cno_of(object));
            let verified = holder.verify(&holder.data_key(&name_of(object)), &bytes).await?;
            drop((holder, turn));
            // Of what went meanwhile nothing is to be said: the next look notices what should be there.
            is_gone = verified.bad.iter().any(|part| part.wrong == Wrong::Missing);
            if is_gone {
                bad.clear();
                break;
            }
            let bad_bytes: u64 = verified
                .bad
                .iter()
                .map(|part| part.bytes.end - part.bytes.start)
                .sum();
            let good_bytes = len_bytes.saturating_sub(bad_bytes);
            match verified.is_checked {
                true => {
                    read.verified_bytes += good_bytes;
                    counted.scrub.verified_bytes.add(good_bytes);
                }
                false => {
                    read.unverified_bytes += good_bytes;
                    counted.scrub.unverified_bytes.add(good_bytes);
                }
            }
            bad.extend(verified.bad);
        }
        if !bad.is_empty() {
            read.is_suspect = true;
            self.suspects.insert(object, bad);
        } else if !is_gone && !self.doubted.contains(&object) {
            self.found(object, Vec::new());
        }
        self.schedule.read(now_ms(), read);
        Ok(())
    }

    /// Looks whether any checkpoint needs what seems wrong.
    async fn confirm(&mut self) -> Result<(), VolumeError> {
        let turn = self.work.reads.background_turn().await;
        let confirmed = impact::confirm(&self.work.store, &self.suspects).await?;
        drop(turn);
        self.suspects.clear();
        for (object, places) in confirmed {
            self.found(object, places);
        }
        self.schedule.confirmed(now_ms());
        Ok(())
    }

    /// This is what is damaged of an object.
    fn found(&mut self, object: u64, places: Vec<DamagedPlace>) {
        let is_whole = places.is_empty();
        let (new, is_changed) = self.known.replace(object, places);
        for place in &new {
            self.work.store.metrics().damage.scrub.one();
            warn!(
                "the scrub found damage in {place}; hypernbd check --data tells which checkpoints need it, hypernbd repair puts objects back"
            );
        }
        if is_changed {
            if is_whole {
                info!(
                    "the scrub finds nothing wrong any more with what is needed of {}",
                    name_of(object)
                );
            }
            self.schedule.damage_changed(!self.known.is_empty());
        }
    }

    /// Stores how far it is, and what is known.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] alone: whatever else fails is tried again later, and keeps nothing from being read.
    async fn save(&mut self) -> Result<(), VolumeError> {
        match self.put().await {
            Ok(etag) => {
                self.stored = Some(etag);
                self.save_failures = 0;
                self.schedule.saved(now_ms());
                Ok(())
            }
            Err(e) if e.kind() == ErrorKind::Fenced => Err(e),
            Err(e) => {
                self.schedule.save_failed(now_ms());
                self.save_failures = self.save_failures.saturating_add(1);
                // An earlier owner's write may have arrived late, or somebody removed the record. The volume is this server's.
                if matches!(e.kind(), ErrorKind::AlreadyExists | ErrorKind::NotFound) {
                    self.stored = ScrubRecord::write_of(&self.work.store).await;
                }
                if self.save_failures.is_power_of_two() {
                    warn!(
                        "how far the scrub is could not be stored {} times, and is tried again later: {}",
                        self.save_failures,
                        e.chain()
                    );
                }
                Ok(())
            }
        }
    }

    async fn put(&self) -> Result<ETag, VolumeError> {
        self.work.ownership.check().await?;
        let record = self.record();
        Ok(record.put(&self.work.store, self.stored.as_ref()).await?)
    }

    fn record(&self) -> ScrubRecord {
        let mut record = ScrubRecord::new(self.work.volume_id);
        record.pass = self.schedule.pass();
        record.last = self.schedule.last();
        record.damage = self.known.places().to_vec();
        record.more = self.known.more();
        record
    }

    fn show(&self) {
        *self.shown.lock() = Some(self.record());
    }
}
