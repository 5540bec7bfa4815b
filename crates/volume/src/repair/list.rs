//! Entries of the list of checkpoints that are missing or damaged are written again, from what the container says.
//!
//! An entry is written only for a checkpoint that is known to have been published (it had an entry that is damaged now, the usage table
//! counts it as kept, or it is the newest), whose own object is there, and whose index and objects are whole; never for one that the
//! retention removes or has removed. The volume's lease is held, and what was being removed is gone before anything is looked at, so that
//! nothing goes between the look and the entry.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use futures::try_join;
use uuid::Uuid;

use super::{How, Look, Mend, Outcome, Repaired};
use crate::admin;
use crate::base::checkpoint_id::CheckpointId;
use crate::base::control::Control;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::store_error::StoreErrorKind;
use crate::base::url::VolumeUrl;
use crate::check::{self, Kind, Problem};
use crate::engine::{Ownership, checkpoint_stored, parents, state_stored};
use crate::format::inode;
use crate::format::stored_state::StoredState;
use crate::lease::Lease;
use crate::meta::checkpoint_list::{self, CatalogueEntry, ENTRIES, entry_name};
use crate::meta::wal_marker;
use crate::open::history::{ASIDE, GENERATIONS_LEFT};
use crate::options::{LeaseOptions, StoreOptions};
use crate::retention::plan::{self, Plan};
use crate::retention::{self, usage::Accounted};
use crate::store::Store;

/// What the user can do once the WAL is closed.
const THEN: &str = "rebuild the list of its checkpoints";

/// Checks a volume, and writes the entries of its list of checkpoints again that are missing or damaged. A server running on it must be
/// stopped before anything is written.
///
/// # Errors
/// [`VolumeError::Held`] when a server has it open for writing; [`VolumeError::InvalidInput`] when its WAL was not closed; what
/// [`check()`](crate::check::check) returns; a store that fails.
pub async fn rebuild_list(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    lease_options: &LeaseOptions,
    how: How,
    control: &Control,
) -> Result<Repaired, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let look = Look {
        url,
        store_options,
        is_data: how.is_data,
        control,
    };
    if !how.is_written {
        return rebuild(&store, None, &look).await;
    }
    admin::check_nothing_left(&store, THEN).await?;
    let lease = admin::take_lease_only(&store, store_options, lease_options).await?;
    let rebuilt = rebuild_owned(&store, &lease, &look).await;
    lease.release(rebuilt.is_ok()).await;
    rebuilt
}

async fn rebuild_owned(store: &Store, lease: &Arc<Lease>, look: &Look<'_>) -> Result<Repaired, VolumeError> {
    admin::check_closed(store, THEN).await?;
    // From here on older owners remove nothing, and what they had begun to remove is gone.
    admin::retention::rounds(store, lease).settle(true).await?;
    rebuild(store, Some(lease), look).await
}

async fn rebuild(
    store: &Store,
    lease: Option<&Arc<Lease>>,
    look: &Look<'_>,
) -> Result<Repaired, VolumeError> {
    let mut problems = look.problems().await?;
    let way = FromContainer::load(store, lease, look).await?;
    problems.extend(way.newest_unlisted(&problems));
    look.mend_all(problems, &way, "the container".to_owned()).await
}

/// The entry of a checkpoint with this state.
///
/// * The time and the size are those of the usage table, which has them from the entry, or else of the container.
/// * The watermark of the WAL cannot be known. Of an earlier checkpoint it is taken from the entry before: the checkpoint holds at least
///   that, as it was published later. That of the newest must not be too low, or a later owner would give numbers to its changes that were
///   used before. The WAL is closed, so that nothing flushed is outside of the container, and a number above all that were ever used is
///   right: as where a history is left ([`GENERATIONS_LEFT`]).
/// * The epoch is that of who writes it, as for an entry that an opening adds: it is the highest there was.
/// * What the checkpoint was made for cannot be known either. That it may have changed something is what a comparison can take for granted.
fn entry_of(
    state: &StoredState,
    known: Option<&Accounted>,
    before: u64,
    is_newest: bool,
    epoch: u64,
) -> CatalogueEntry {
    let id = state.id();
    CatalogueEntry {
        cno: id.cno,
        check: Some(id.check),
        published_ms: known.map_or_else(|| state.state_id.modified_ms(), |known| known.published_ms),
        size_bytes: state.size_bytes(),
        epoch,
        generation: match is_newest {
            true => before.saturating_add(GENERATIONS_LEFT),
            false => before,
        },
        is_repaired: true,
        kind: checkpoint_list::Kind::default(),
    }
}

struct FromContainer<'a> {
    store: &'a Store,
    /// Nothing is written without it.
    lease: Option<&'a Arc<Lease>>,
    is_data: bool,
    control: &'a Control,
    /// The newest state, and the size of its blocks; neither when the inode cannot be read.
    newest: Option<(StoredState, u64)>,
    /// What is kept; the error is why that cannot be told.
    plan: Result<Option<Plan>, String>,
    accounted: BTreeMap<u64, Accounted>,
    /// The numbers of the list, ascending.
    listed: Vec<u64>,
}

impl<'a> FromContainer<'a> {
    async fn load(
        store: &'a Store,
        lease: Option<&'a Arc<Lease>>,
        look: &Look<'a>,
    ) -> Result<Self, VolumeError> {
        let newest = match inode::load(store).await {
            Ok((raw, _)) => {
                let block_size_bytes = inode::block_size_bytes(&raw).map_or(0, u64::from);
                Some((StoredState::of_inode(&raw), block_size_bytes))
            }
            Err(e) if e.kind() == ErrorKind::Corrupt => None,
            Err(e) => return Err(e),
        };
        let plan = match plan::load(store).await {
            Ok(found) => Ok(found.map(|(plan, _)| plan)),
            Err(e) if e.kind() == ErrorKind::Corrupt => Err(format!(
                "what the retention has removed cannot be read ({})",
                e.chain()
            )),
            Err(e) => return Err(e),
        };
        let accounted = match retention::accounted(store).await {
            Err(e) if e.kind() == ErrorKind::Corrupt => BTreeMap::new(),
            accounted => accounted?,
        };
        Ok(Self {
            store,
            lease,
            is_data: look.is_data,
            control: look.control,
            newest,
            plan,
            accounted,
            listed: checkpoint_list::numbers(store).await?,
        })
    }

    /// The newest checkpoint, where it has no entry and nobody has told of that: its server was killed before it wrote one.
    fn newest_unlisted(&self, told: &[Problem]) -> Option<Problem> {
        let (newest, _) = self.newest.as_ref()?;
        let cno = newest.state_id.cno;
        let key = self.store.meta_key(&entry_name(cno));
        if cno == 0 || self.listed.contains(&cno) || told.iter().any(|problem| problem.object == key) {
            return None;
        }
        Some(Problem {
            object: key,
            kind: Kind::Missing,
            reason: format!("the entry of checkpoint {cno}, the newest, is not there"),
            checkpoints: Vec::new(),
            is_newest_affected: false,
            names: Vec::new(),
            ranges: Vec::new(),
            advice: "nothing: the next server that opens the volume for writing adds it".to_owned(),
        })
    }

    /// The state of a checkpoint whose entry may be written, and the watermark of the entry before it; or why it may not.
    async fn proved(&self, cno: u64) -> Result<Result<(StoredState, u64), String>, VolumeError> {
        let Some((newest, block_size_bytes)) = &self.newest else {
            return Ok(Err(
                "the inode cannot be read, without which nothing says which checkpoints are the volume's"
                    .into(),
            ));
        };
        let newest_cno = newest.state_id.cno;
        if cno == 0 || cno > newest_cno {
            return Ok(Err(format!("the volume's newest checkpoint is {newest_cno}")));
        }
        match &self.plan {
            Err(reason) => return Ok(Err(reason.clone())),
            Ok(Some(plan)) if plan.is_of(newest_cno) && !plan.keeps(cno) => {
                return Ok(Err(
                    "the retention removes this checkpoint, or has removed it".into()
                ));
            }
            Ok(_) => {}
        }
        let state = match state_stored(self.store, cno).await {
            Ok(Some(raw)) => StoredState::of_inode(&raw),
            Ok(None) => return Ok(Err("the checkpoint's own object is not there".into())),
            Err(e) if e.kind() == ErrorKind::Corrupt => return Ok(Err(e.chain())),
            Err(e) => return Err(e),
        };
        let is_other = cno == newest_cno && state.id() != newest.id();
        let is_accounted = |known: &Accounted| known.check == state.id().check;
        if is_other || !self.accounted.get(&cno).is_none_or(is_accounted) {
            return Ok(Err(
                "what the container has under this number is another checkpoint".into(),
            ));
        }
        // What the table goes past without it, it gives back the space of.
        if self.accounted.last_key_value().is_some_and(|(at, _)| cno < *at)
            && !self.accounted.contains_key(&cno)
        {
            return Ok(Err(
                "the usage table was counted without it, so that its objects may be removed: delete the table first, while no server runs".into(),
            ));
        }
        let before = self.neighbour(self.listed.iter().rev().copied().filter(|n| *n < cno));
        let after = self.neighbour(self.listed.iter().copied().filter(|n| *n > cno));
        let (before, after) = try_join!(before, after)?;
        if let Some((other, _)) = before.iter().chain(&after).find(|(_, is_own)| !is_own) {
            return Ok(Err(format!(
                "the list is of another history than the volume: its checkpoint {} is none of the container's",
                other.cno
            )));
        }
        let is_known =
            cno == newest_cno || self.accounted.contains_key(&cno) || before.is_some() || after.is_some();
        if !is_known {
            return Ok(Err(
                "no other entry shows that the list is of the volume's own history".into(),
            ));
        }
        let lacks = check::lacks(self.store, state, *block_size_bytes, self.is_data, self.control).await?;
        if let Some(first) = lacks.first() {
            return Ok(Err(format!("the checkpoint is not whole: {first}")));
        }
        let mut generation = before.map_or(0, |(entry, _)| entry.generation);
        if cno == newest_cno {
            let marker = wal_marker::load(self.store).await?;
            generation = generation.max(marker.map_or(0, |(marker, _)| marker.watermark));
        }
        Ok(Ok((state, generation)))
    }

    /// The first of these entries that can be compared with the container, and whether it is of a checkpoint that the container has.
    /// Those of earlier releases do not say which it was.
    async fn neighbour(
        &self,
        numbers: impl Iterator<Item = u64> + Send,
    ) -> Result<Option<(CatalogueEntry, bool)>, VolumeError> {
        for cno in numbers {
            let entry = match checkpoint_list::load_entry(self.store, cno).await {
                Ok(Some(entry)) => entry,
                Ok(None) => continue,
                Err(e) if e.kind() == ErrorKind::Corrupt => continue,
                Err(e) => return Err(e),
            };
            let Some(check) = entry.check else {
                return Ok(Some((entry, true)));
            };
            match checkpoint_stored(self.store, cno).await {
                Ok(Some(stored)) => return Ok(Some((entry, stored == CheckpointId { cno, check }))),
                Ok(None) => {}
                Err(e) if e.kind() == ErrorKind::Corrupt => {}
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// Writes an entry where none can be read. Returns false where there is one now.
    async fn write(&self, lease: &Lease, key: &str, entry: &CatalogueEntry) -> Result<bool, VolumeError> {
        // It knows more than one that is made anew. It may have been damaged on its way here, when it was looked at.
        let there = checkpoint_list::load_entry(self.store, entry.cno).await;
        if matches!(&there, Ok(Some(there)) if (there.cno, there.check) == (entry.cno, entry.check)) {
            return Ok(false);
        }
        lease.check().await?;
        let body = serde_json::to_vec(entry).map_err(|e| VolumeError::Internal(e.to_string()))?;
        let put = match self.store.get_unverified(key).await {
            Ok(None) => self.store.put_create_only(key, body).await,
            Ok(Some((damaged, etag))) => {
                let aside = format!(
                    "{ASIDE}damaged-{}-{}",
                    entry_name(entry.cno).replace('/', "-"),
                    Uuid::new_v4().simple()
                );
                self.store
                    .put_create_only(&self.store.meta_key(&aside), damaged)
                    .await?;
                self.store.put_if_match(key, body, &etag).await
            }
            // A file that was cut short has nothing to be put aside. Only the owner of the lease writes entries.
            Err(e) if e.kind == StoreErrorKind::Corrupt => self.store.put(key, body).await,
            Err(e) => return Err(e.into()),
        };
        match put {
            Ok(_) => Ok(true),
            Err(e)
                if matches!(
                    e.kind,
                    StoreErrorKind::PreconditionFailed | StoreErrorKind::NotFound
                ) =>
            {
                Ok(false)
            }
            Err(e) => Err(e.into()),
        }
    }
}

#[async_trait]
impl Mend for FromContainer<'_> {
    async fn mend(&self, problem: &Problem) -> Result<Outcome, VolumeError> {
        let left = |reason: String| Ok(Outcome::Left(reason));
        let entries = self.store.meta_key(ENTRIES);
        let number = problem.object.strip_prefix(&entries);
        let Some(cno) = number.and_then(|number| number.parse::<u64>().ok()) else {
            return left("it is no entry of the list of checkpoints".to_owned());
        };
        let (state, before) = match self.proved(cno).await? {
            Ok(proved) => proved,
            Err(reason) => return left(reason),
        };
        let Some(lease) = self.lease else {
            return Ok(Outcome::Possible);
        };
        let is_newest = self
            .newest
            .as_ref()
            .is_some_and(|(newest, _)| newest.state_id.cno == cno);
        let entry = entry_of(&state, self.accounted.get(&cno), before, is_newest, lease.epoch());
        match self.write(lease, &problem.object, &entry).await? {
            true => Ok(Outcome::Mended),
            false => left("it was written or removed meanwhile".to_owned()),
        }
    }
}
