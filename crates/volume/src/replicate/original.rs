//! The original: which of its checkpoints the replica does not have, and which objects these need.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt, TryStreamExt};
use futures::try_join;
use log::warn;
use parking_lot::Mutex;

use super::Request;
use super::numbers::Numbers;
use super::sample;
use super::standing::{Continues, continues};
use crate::admin::{check_closed, ensure_stays, own_id, take_lease_only};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::engine::{parents, state_stored};
use crate::format::inode;
use crate::format::object_names::summaries_of;
use crate::format::stored_state::StoredState;
use crate::index::cache::IndexCache;
use crate::index::diff::{OnlyIn, Place, places};
use crate::lease::{self, Lease};
use crate::meta::checkpoint_list::{self, CatalogueEntry, Kind};
use crate::meta::label;
use crate::meta::snapshots::{self, Snapshot};
use crate::meta::wal_marker;
use crate::options::LeaseOptions;
use crate::past::{self, At, Point};
use crate::retention::{Policy, Reading, load_policy};
use crate::store::Store;

/// What can be done once the volume is not in its way any more.
const THEN: &str = "replicate it";
/// Checkpoints that are copied in one step.
const STEP_MAX: usize = 32;
/// Requests under way at once.
const READS_AT_ONCE: usize = 16;

/// The volume that a replica follows.
pub(super) struct Original {
    store: Store,
    volume_id: VolumeId,
    cache: IndexCache,
    /// Held where the original was taken from its server.
    lease: Option<Arc<Lease>>,
    /// Its lease as it was seen last, and since when: token and renewals.
    seen: Mutex<Option<((String, u64), Instant)>>,
}

/// A checkpoint that the replica does not have yet.
pub(super) struct NewPoint {
    /// What it is, with its inode.
    pub point: Point,
    /// Its entry of the list; none before the first checkpoint.
    pub entry: Option<CatalogueEntry>,
}

/// Checkpoints that the replica does not have yet, ascending, and pinned.
pub(super) struct News {
    pub points: Vec<NewPoint>,
    /// The number of the original's newest.
    pub newest: u64,
    /// The replica's newest, when the original has it, too. Pinned as well.
    from: Option<StoredState>,
    readings: Vec<Reading>,
}

/// How far a replica is behind.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Behind {
    pub checkpoints: u64,
    pub seconds: f64,
}

impl News {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.points.is_empty()
    }

    /// Takes the pins away.
    pub async fn release(self) {
        for reading in &self.readings {
            reading.end().await;
        }
    }
}

impl Original {
    /// Connects to the original.
    ///
    /// # Errors
    /// [`VolumeError::NotFound`]; [`VolumeError::InvalidInput`] when it is being deleted, or is to be taken and its log was not closed.
    pub async fn connect(request: &Request<'_>) -> Result<Self, VolumeError> {
        let store = parents::connect(request.url, request.store_options).await?;
        let (_, found) = try_join!(inode::load(&store), label::find(&store))?;
        ensure_stays(&store, found.as_ref(), THEN)?;
        let volume_id = own_id(&store, found, THEN).await?;
        if request.takes_over {
            check_closed(&store, THEN).await?;
        }
        Ok(Self {
            cache: IndexCache::default().of_container(&store),
            store,
            volume_id,
            lease: None,
            seen: Mutex::new(None),
        })
    }

    /// Takes the original from the server that holds it: that one publishes nothing from there on.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] when its log was not closed; when the store fails.
    pub async fn take_over(&mut self, request: &Request<'_>) -> Result<(), VolumeError> {
        let options = LeaseOptions {
            takeover: true,
            ..LeaseOptions::default()
        };
        let lease = take_lease_only(&self.store, request.store_options, &options).await?;
        self.lease = Some(lease);
        // The server may have begun one.
        check_closed(&self.store, THEN).await
    }

    /// Gives back the lease, if it was taken.
    pub async fn release(&self) {
        if let Some(lease) = &self.lease {
            lease.release(true).await;
        }
    }

    /// Where it is.
    pub fn url(&self) -> String {
        self.store.url.to_string()
    }

    /// As [`url`](Self::url), with its id.
    pub fn id(&self) -> (&VolumeUrl, VolumeId) {
        (&self.store.url, self.volume_id)
    }

    /// Its store, with what it has inherited.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Which checkpoints are kept.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn policy(&self) -> Result<Option<Policy>, VolumeError> {
        load_policy(&self.store).await
    }

    /// Names of its checkpoints.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn names(&self) -> Result<Vec<Snapshot>, VolumeError> {
        snapshots::load_all(&self.store).await
    }

    /// The entry of this very checkpoint, if there is one.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn entry_of(&self, id: CheckpointId) -> Result<Option<CatalogueEntry>, VolumeError> {
        let entry = checkpoint_list::load_entry(&self.store, id.cno).await?;
        Ok(entry.filter(|entry| entry.is_of(id) == Some(true)))
    }

    /// How far a replica with this checkpoint is behind.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn behind(&self, cno: u64, numbers: &mut Numbers) -> Result<Behind, VolumeError> {
        let (newest, _) = inode::load(&self.store).await?;
        let ahead = numbers.ahead(&self.store, cno).await?;
        let is_newest_listed = ahead.last.unwrap_or(cno) >= newest.i_last_cno;
        let since_ms = match (ahead.first, is_newest_listed) {
            (Some(first), _) => first.published_ms,
            (None, true) => return Ok(Behind::default()),
            (None, false) => inode::modified_ms(&newest),
        };
        Ok(Behind {
            checkpoints: ahead.count + u64::from(!is_newest_listed),
            seconds: now_ms().saturating_sub(since_ms) as f64 / 1000.0,
        })
    }

    /// Sees that what is here is still the volume that was here when this began.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] when it is another one, or being deleted; when the store fails.
    pub async fn ensure_same(&self) -> Result<(), VolumeError> {
        let found = label::find(&self.store).await?;
        ensure_stays(&self.store, found.as_ref(), THEN)?;
        match found {
            Some(found) if found.label.volume_id == self.volume_id => Ok(()),
            _ => Err(VolumeError::InvalidInput(format!(
                "the volume {} is at {} no more: it was deleted, or made anew; nothing more is copied over its replica",
                self.volume_id, self.store.url
            ))),
        }
    }

    /// The address of its log, where flushed writes may lie that no server is about to publish. `waits`: to find out whether a server
    /// holds the volume may take as long as its lease runs. Otherwise one counts as running until its lease was seen unchanged that long.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn wal_left(&self, waits: bool) -> Result<Option<String>, VolumeError> {
        let marker = wal_marker::load(&self.store).await?.map(|(marker, _)| marker);
        let Some(marker) = marker.filter(|marker| !marker.is_clean) else {
            return Ok(None);
        };
        let is_held = match waits {
            true => {
                let seen = lease::stored(&self.store).await?;
                match lease::probe(&self.store, &LeaseOptions::default(), seen).await {
                    Ok(_) => false,
                    Err(VolumeError::Held { .. }) => true,
                    Err(e) => return Err(e),
                }
            }
            false => self.is_renewed().await?,
        };
        Ok((!is_held).then(|| marker.address(&self.store)))
    }

    async fn is_renewed(&self) -> Result<bool, VolumeError> {
        let Some(lease) = lease::load(&self.store).await?.filter(|lease| lease.is_held()) else {
            return Ok(false);
        };
        let found = (lease.token, lease.renewals);
        let mut seen = self.seen.lock();
        match &*seen {
            Some((before, since)) if *before == found => {
                Ok(since.elapsed() <= Duration::from_millis(lease.duration_ms))
            }
            _ => {
                *seen = Some((found, Instant::now()));
                Ok(true)
            }
        }
    }

    /// The first checkpoints that are kept after the replica's newest, pinned. Of a replica that is not made yet the first one alone.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] when the replica's newest is not of this history; when the store fails.
    pub async fn news(
        &self,
        newest: Option<CheckpointId>,
        is_made: bool,
        replica: &Store,
        numbers: &mut Numbers,
    ) -> Result<News, VolumeError> {
        let mut news = News {
            points: Vec::new(),
            newest: 0,
            from: None,
            readings: Vec::new(),
        };
        let found = self.find_news(newest, is_made, replica, numbers, &mut news);
        match found.await {
            Ok(()) => Ok(news),
            Err(e) => {
                news.release().await;
                Err(e)
            }
        }
    }

    async fn find_news(
        &self,
        of_replica: Option<CheckpointId>,
        is_made: bool,
        replica: &Store,
        numbers: &mut Numbers,
        news: &mut News,
    ) -> Result<(), VolumeError> {
        self.ensure_same().await?;
        let (raw, _) = inode::load(&self.store).await?;
        let newest = StoredState::of_inode(&raw).id();
        news.newest = newest.cno;
        if let Some(of_replica) = of_replica {
            self.go_on_from(of_replica, newest, replica, news).await?;
            if newest.cno == of_replica.cno {
                return Ok(());
            }
        }
        let mut after = of_replica.map_or(0, |id| id.cno);
        let most = if is_made { STEP_MAX } else { 1 };
        while news.points.len() < most {
            let left = most - news.points.len();
            let some = numbers.some_after(&self.store, after, newest.cno, left).await?;
            let Some(last) = some.last().copied() else { break };
            after = last;
            let found = stream::iter(some).map(|cno| self.pinned(cno));
            let found: Vec<_> = found.buffered(READS_AT_ONCE).try_collect().await?;
            if found.iter().any(Option::is_none) {
                // Its retention is at work, and others may be gone as well.
                numbers.forget();
            }
            for (point, reading) in found.into_iter().flatten() {
                news.points.push(point);
                news.readings.push(reading);
            }
        }
        if newest.cno == 0 && of_replica.is_none() {
            news.points.push(self.without_checkpoint().await?);
        }
        Ok(())
    }

    /// Sees that the original's history goes on from this checkpoint of the replica.
    async fn go_on_from(
        &self,
        of_replica: CheckpointId,
        newest: CheckpointId,
        replica: &Store,
        news: &mut News,
    ) -> Result<(), VolumeError> {
        let (entry, stored) = match of_replica.cno {
            // What is at the newest, or beyond it, is told without.
            0 => (None, None),
            cno if cno >= newest.cno => (None, None),
            cno => try_join!(
                checkpoint_list::load_entry(&self.store, cno),
                state_stored(&self.store, cno)
            )?,
        };
        let stored = stored.map(|raw| StoredState::of_inode(&raw));
        let of_entry = entry.and_then(|entry| entry.is_of(of_replica));
        let kept = of_entry.or(stored.map(|state| state.id() == of_replica));
        let refused = |what: &str| {
            Err(VolumeError::InvalidInput(format!(
                "the replica is at checkpoint {}, and {} {what}: it was restored from a backup, rolled back by another tool, or made anew; \
                 replicate it into another place, or delete the replica first",
                of_replica.cno, self.store.url
            )))
        };
        match continues(of_replica, newest, kept) {
            Continues::Known => {
                // Pinned: its index is compared with those of later ones. Where it is going, all of theirs is looked at.
                if let Some(state) = stored
                    && let Ok(reading) = Reading::begin(&self.store, of_replica).await
                {
                    news.from = Some(state);
                    news.readings.push(reading);
                }
                Ok(())
            }
            Continues::Unknown => match sample::agree(&self.store, replica).await? {
                true => Ok(()),
                false => refused("has something else under the same numbers"),
            },
            Continues::WentBack => refused(&format!("is at {}", newest.cno)),
            Continues::Other => refused("has another one of that number"),
        }
    }

    /// The checkpoint of this number, pinned; nothing when it is going, or gone.
    async fn pinned(&self, cno: u64) -> Result<Option<(NewPoint, Reading)>, VolumeError> {
        let point = match past::find(&self.store, Some(&At::Number(cno))).await {
            Ok(point) => point,
            Err(VolumeError::NoCheckpoint { .. }) => {
                self.ensure_going(cno).await?;
                return Ok(None);
            }
            Err(e) => return Err(e),
        };
        let reading = match Reading::begin(&self.store, point.id()).await {
            Ok(reading) => reading,
            Err(VolumeError::NoCheckpoint { .. }) => return Ok(None),
            Err(e) => return Err(e),
        };
        let entry = checkpoint_list::load_entry(&self.store, cno).await;
        let entry = match entry {
            Ok(entry) => entry,
            Err(e) => {
                reading.end().await;
                return Err(e);
            }
        };
        // The newest one's entry may be on its way, or have been lost with its server.
        let entry = entry.unwrap_or_else(|| entry_lost(&point));
        let point = NewPoint {
            point,
            entry: Some(entry),
        };
        Ok(Some((point, reading)))
    }

    /// Sees that a checkpoint whose own object cannot be used is one that its retention removes.
    async fn ensure_going(&self, cno: u64) -> Result<(), VolumeError> {
        let Some(entry) = checkpoint_list::load_entry(&self.store, cno).await? else {
            return Ok(());
        };
        let Some(check) = entry.check else {
            warn!(
                "checkpoint {cno} of {} is not copied: its object is missing",
                self.store.url
            );
            return Ok(());
        };
        match Reading::begin(&self.store, CheckpointId { cno, check }).await {
            Ok(reading) => reading.end().await,
            Err(VolumeError::NoCheckpoint { .. }) => return Ok(()),
            Err(e) => return Err(e),
        }
        Err(VolumeError::Corrupt {
            what: format!(
                "the object that checkpoint {cno} of {} stored first",
                self.store.url
            ),
            reason: format!(
                "it is missing, or of another checkpoint, and the checkpoint is kept: hypernbd check {} says what that affects",
                self.store.url
            ),
        })
    }

    /// A volume that nothing was ever published to.
    async fn without_checkpoint(&self) -> Result<NewPoint, VolumeError> {
        let (raw, _) = inode::load(&self.store).await?;
        let point = past::state_of(&raw)?;
        Ok(NewPoint { point, entry: None })
    }

    /// The objects that these checkpoints need and the replica's newest does not.
    ///
    /// # Errors
    /// When an index cannot be read.
    pub async fn objects_of(&self, news: &News) -> Result<Needed, VolumeError> {
        let mut needed = Needed::default();
        let mut from = news.from.as_ref().map(|state| state.root);
        for new in &news.points {
            let to = new.point.state.root;
            let seen = places(&self.store, from.as_ref(), &to, &self.cache, |only_in, place| {
                let (Place::Node(object) | Place::Block(object)) = place;
                if only_in == OnlyIn::To {
                    needed.objects.insert(object);
                }
            });
            seen.await
                .map_err(|e| VolumeError::engine(format!("reading the index of {}", self.store.url), e))?;
            if new.point.number() > 0 {
                needed.first_objects.push(summaries_of(new.point.number()));
            }
            from = Some(to);
        }
        Ok(needed)
    }
}

/// The entry of a checkpoint whose own is not there.
pub(super) fn entry_lost(point: &Point) -> CatalogueEntry {
    CatalogueEntry {
        cno: point.number(),
        check: Some(point.id().check),
        published_ms: point.published_ms,
        size_bytes: point.size_bytes(),
        epoch: 0,
        generation: 0,
        is_repaired: true,
        kind: Kind::default(),
    }
}

/// Objects, by number.
#[derive(Debug, Default)]
pub(super) struct Needed {
    /// What indexes refer to.
    pub objects: BTreeSet<u64>,
    /// For each checkpoint the objects of which one has its inode.
    pub first_objects: Vec<[u64; 2]>,
}
