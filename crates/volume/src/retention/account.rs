//! Advances the usage table from the checkpoint that was accounted last to the newest listed one.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use futures::stream::{self, StreamExt, TryStreamExt};
use futures::try_join;
use log::{debug, warn};
use parking_lot::Mutex;

use super::pins::{self, Unusable};
use super::plan::{self, Phase, Plan};
use super::usage::{Accounted, Delta, Usage};
use crate::base::checkpoint_id::{CheckpointId, NewestCheckpoint};
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::store_error::StoreErrorKind;
use crate::engine::{checkpoint_stored, state_stored};
use crate::format::inode;
use crate::format::stored_state::{Root, StoredState};
use crate::index::cache::IndexCache;
use crate::index::diff::{OnlyIn, Place, places};
use crate::index::lookup::Published;
use crate::meta::{checkpoint_list, children, snapshots};
use crate::store::Store;

/// The name of the table's object, below the volume's `.meta/`.
const NAME: &str = "retention/usage";
/// Number of entries and states that are read at once, ahead of the one that is being accounted.
const READ_AHEAD: usize = 16;

/// The table, and the checkpoint up to which it is accounted.
#[derive(Clone)]
pub(crate) struct Account {
    usage: Usage,
    /// Root of the index at that checkpoint; `None` before the first checkpoint.
    root: Option<Root>,
    /// The checkpoint of the stored table.
    stored_at: Option<CheckpointId>,
    /// The table was counted anew, and the stored one may differ although it is of the same checkpoint.
    is_counted_anew: bool,
}

impl Account {
    /// Loads the stored table if it belongs to a checkpoint that the volume has, and otherwise begins with an empty
    /// one.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn load(store: &Store) -> Result<Self, VolumeError> {
        let key = store.meta_key(NAME);
        let decoded = match store.get(&key).await {
            Ok(None) => return Ok(Self::new()),
            Ok(Some((body, _))) => Usage::decode(&body),
            Err(e) if e.kind == StoreErrorKind::Corrupt => Err(e.detail),
            Err(e) => return Err(e.into()),
        };
        let usage = match decoded {
            Ok(usage) => usage,
            // The table is computed from other stored data, so it can be computed again.
            Err(e) => {
                warn!("the usage table {key} cannot be read, and is made anew: {e}");
                return Ok(Self::new());
            }
        };
        let Some(at) = usage.at() else {
            return Ok(Self::new());
        };
        let ((newest, _), stored) = try_join!(inode::load(store), state_stored(store, at.cno))?;
        // A volume that continues from an earlier state may soon have another checkpoint with that number.
        let stored = stored.filter(|raw| newest.i_last_cno >= at.cno && CheckpointId::of_inode(raw) == at);
        let Some(raw) = stored else {
            warn!("the usage table {key} is of another history than the volume, and is made anew");
            return Ok(Self::new());
        };
        Ok(Self {
            root: Some(StoredState::of_inode(&raw).root),
            stored_at: Some(at),
            is_counted_anew: false,
            usage,
        })
    }

    fn new() -> Self {
        Self {
            usage: Usage::default(),
            root: None,
            stored_at: None,
            is_counted_anew: false,
        }
    }

    /// The table.
    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// The checkpoints on which accounting depends: the one that the table has reached, and the one of the stored
    /// table.
    pub fn depends_on(&self) -> impl Iterator<Item = u64> {
        [self.usage.at(), self.stored_at]
            .into_iter()
            .flatten()
            .map(|at| at.cno)
    }

    /// Accounts every listed checkpoint up to the newest. Index nodes are taken from `cache`, and checkpoints from
    /// `recent`, if they are there.
    ///
    /// # Errors
    /// When the store fails or an index cannot be read.
    pub async fn advance(
        &mut self,
        store: &Store,
        cache: &IndexCache,
        recent: &Recent,
    ) -> Result<(), VolumeError> {
        match self.advance_once(store, cache, recent, u64::MAX).await {
            Err(e) if e.kind() == ErrorKind::Corrupt && self.usage.at().is_some() => {
                warn!(
                    "the usage of the checkpoints of {} is counted anew: {}",
                    store.url,
                    e.chain()
                );
                // The stored table's checkpoint is kept until another table is stored.
                *self = Self {
                    stored_at: self.stored_at,
                    is_counted_anew: true,
                    ..Self::new()
                };
                self.advance_once(store, cache, recent, u64::MAX).await
            }
            advanced => advanced,
        }
    }

    async fn advance_once(
        &mut self,
        store: &Store,
        cache: &IndexCache,
        recent: &Recent,
        until: u64,
    ) -> Result<(), VolumeError> {
        let (newest, _) = inode::load(store).await?;
        let until = until.min(newest.i_last_cno);
        let at = self.usage.at_number();
        let (numbers, needed) = try_join!(checkpoint_list::numbers_after(store, at), needed(store))?;
        if self.lacks(store, &needed, |_| true).await?.is_some() {
            let plan = super::plan::load(store).await?;
            let keeps = |cno| plan.as_ref().is_none_or(|(plan, _)| plan.keeps(cno));
            if let Some(id) = self.lacks(store, &needed, keeps).await? {
                return Err(VolumeError::Corrupt {
                    what: "the usage table".into(),
                    reason: format!("checkpoint {} is needed, and is missing in it", id.cno),
                });
            }
        }
        // One that another tool published, or a server that was killed, has no entry once it is not the newest.
        let named = needed.into_iter().filter(|id| id.cno > at);
        let named: BTreeMap<u64, CheckpointId> = named.map(|id| (id.cno, id)).collect();
        let numbers: BTreeSet<u64> = numbers.into_iter().chain(named.keys().copied()).collect();
        let gone = match at {
            0 => plan_of(store).await?,
            _ => None,
        };
        let is_gone = |cno| gone.as_ref().is_some_and(|plan| !plan.keeps(cno));
        let numbers = numbers.into_iter().filter(|cno| *cno <= until && !is_gone(*cno));
        let listed = numbers.map(|cno| listed(store, cno, recent, named.get(&cno).copied()));
        let mut listed = stream::iter(listed).buffered(READ_AHEAD);
        while let Some(next) = listed.try_next().await? {
            let Some(Found {
                cno,
                checkpoint,
                root,
            }) = next
            else {
                continue;
            };
            let mut deltas: HashMap<u64, Delta> = HashMap::new();
            places(store, self.root.as_ref(), &root, cache, |only_in, place| {
                let change = match only_in {
                    OnlyIn::From => -1,
                    OnlyIn::To => 1,
                };
                match place {
                    Place::Node(object) => deltas.entry(object).or_default().nodes += change,
                    Place::Block(object) => deltas.entry(object).or_default().blocks += change,
                }
            })
            .await
            .map_err(|e| VolumeError::engine(format!("reading the index of checkpoint {cno}"), e))?;
            self.usage
                .step(cno, checkpoint, &deltas)
                .map_err(|reason| VolumeError::Corrupt {
                    what: "the usage table".into(),
                    reason,
                })?;
            self.root = Some(root);
        }
        debug!(
            "{}: accounted up to checkpoint {}, {} objects, {} checkpoints",
            store.url,
            self.usage.at_number(),
            self.usage.objects().len(),
            self.usage.kept().len()
        );
        Ok(())
    }

    /// A checkpoint among these, which somebody reads or has named, that the table lacks although it is stored and the plan keeps it.
    /// Its entry came late, after its number was accounted, when a server before this one had it on its way. What it alone needs would
    /// be removed.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn lacks(
        &self,
        store: &Store,
        needed: &[CheckpointId],
        keeps: impl Fn(u64) -> bool,
    ) -> Result<Option<CheckpointId>, VolumeError> {
        let (at, kept) = (self.usage.at_number(), self.usage.kept());
        let lacking = needed
            .iter()
            .filter(|id| (1..=at).contains(&id.cno) && !kept.contains_key(&id.cno) && keeps(id.cno));
        for id in lacking {
            if checkpoint_stored(store, id.cno).await? == Some(*id) {
                return Ok(Some(*id));
            }
        }
        Ok(None)
    }

    /// Stores the table, unless the stored one is of the same checkpoint. Until then the stored table's checkpoint is
    /// kept.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn store(&mut self, store: &Store) -> Result<(), VolumeError> {
        if self.usage.at() == self.stored_at && !self.is_counted_anew {
            return Ok(());
        }
        let body = self.usage.encode().map_err(VolumeError::Internal)?;
        store.put(&store.meta_key(NAME), body).await?;
        self.stored_at = self.usage.at();
        self.is_counted_anew = false;
        Ok(())
    }

    /// Drops the accounted checkpoints that `plan` does not keep.
    pub fn follow(&mut self, plan: &Plan) {
        self.usage.retain(|cno| plan.keeps(cno));
    }

    /// Notes what checkpoints that are gone no longer hold.
    pub fn settle(&mut self) {
        self.usage.settle();
    }

    /// These checkpoints and objects are gone.
    pub fn forget(&mut self, checkpoints: &[u64], objects: &[u64]) {
        self.usage.forget(checkpoints, objects);
    }
}

/// The result of comparing the stored table with a new count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TableCheck {
    /// The table agrees with the count.
    Same,
    /// The table belongs to no checkpoint that the volume has.
    OtherHistory,
    /// Meanwhile another table was stored, or a checkpoint removed.
    Changed,
    /// The table differs from the count.
    Different {
        /// Its key.
        key: String,
        /// The differences.
        differences: Vec<String>,
    },
}

/// Counts again what the stored table says, and compares. Changes nothing. Index nodes are taken from `cache` if they
/// are there.
///
/// # Errors
/// When the store fails or an index cannot be read.
pub(crate) async fn check_table(store: &Store, cache: &IndexCache) -> Result<TableCheck, VolumeError> {
    let stored = Account::load(store).await?;
    let Some(at) = stored.usage.at() else {
        return Ok(TableCheck::OtherHistory);
    };
    let plan = super::plan::load(store).await?;
    let mut counted = Account::new();
    let count = counted
        .advance_once(store, cache, &Recent::default(), at.cno)
        .await;
    let (table_now, plan_now) = try_join!(Account::load(store), super::plan::load(store))?;
    let is_changed = table_now.usage != stored.usage || plan_now != plan || counted.usage.at() != Some(at);
    if is_changed {
        // What could not be read may be what was removed.
        return Ok(TableCheck::Changed);
    }
    count?;
    // Objects that the plan names may be removed already.
    if let Some((plan, _)) = &plan {
        counted.follow(plan);
    }
    let differences = stored.usage.differences(&counted.usage);
    Ok(match differences.is_empty() {
        true => TableCheck::Same,
        false => TableCheck::Different {
            key: store.meta_key(NAME),
            differences,
        },
    })
}

/// What a count from the beginning is told of checkpoints that went: an entry that came late stands for nothing that can be read any more.
/// A count that goes on is past all of them. None where that is not certain: what is only planned may stay, and what another history
/// left says nothing.
///
/// # Errors
/// When the store fails.
async fn plan_of(store: &Store) -> Result<Option<Plan>, VolumeError> {
    let plan = plan::load(store).await?.map(|(plan, _)| plan);
    let Some(plan) = plan.filter(|plan| plan.phase != Phase::Planned) else {
        return Ok(None);
    };
    match plan.at {
        Some(at) if has(store, at).await? => Ok(Some(plan)),
        _ => Ok(None),
    }
}

/// The checkpoints that have names, are read, or are what clones began as.
///
/// # Errors
/// When the store fails.
pub(super) async fn needed(store: &Store) -> Result<Vec<CheckpointId>, VolumeError> {
    let (names, pinned, children) = try_join!(
        snapshots::load_all(store),
        pins::checkpoints(store, Unusable::Skip),
        children::list(store)
    )?;
    let of_clones = children.into_iter().map(|child| child.checkpoint);
    let named = names.iter().map(|name| name.checkpoint);
    Ok(named.chain(pinned).chain(of_clones).collect())
}

/// Whether the volume still has this checkpoint, and continues from it.
///
/// # Errors
/// When the store fails.
pub(super) async fn has(store: &Store, id: CheckpointId) -> Result<bool, VolumeError> {
    let (newest, _) = inode::load(store).await?;
    Ok(newest.i_last_cno >= id.cno && checkpoint_stored(store, id.cno).await? == Some(id))
}

/// What this process remembers of the checkpoints that it published last.
#[derive(Default)]
pub(crate) struct Recent {
    /// Their entries.
    pub recorded: NewestCheckpoint,
    /// Their roots.
    pub published: Option<Arc<Mutex<Published>>>,
}

impl Recent {
    fn of(&self, cno: u64) -> Option<Found> {
        let (checkpoint, published_ms) = self.recorded.recent(cno)?;
        let root = self.published.as_ref()?.lock().recent.of(checkpoint.id)?;
        Some(Found {
            cno,
            checkpoint: (checkpoint.id.check, published_ms, checkpoint.size_bytes).into(),
            root,
        })
    }
}

/// A checkpoint that is listed and stored.
struct Found {
    cno: u64,
    checkpoint: Accounted,
    root: Root,
}

/// The checkpoint of a listed number, or of a name or a pin, if it is stored.
async fn listed(
    store: &Store,
    cno: u64,
    recent: &Recent,
    named: Option<CheckpointId>,
) -> Result<Option<Found>, VolumeError> {
    if let Some(found) = recent.of(cno) {
        return Ok(Some(found));
    }
    let (entry, raw) = try_join!(checkpoint_list::load_entry(store, cno), state_stored(store, cno))?;
    Ok(raw.and_then(|raw| {
        let (id, state) = (CheckpointId::of_inode(&raw), StoredState::of_inode(&raw));
        let of_entry = entry.filter(|entry| entry.is_of(id) != Some(false));
        let is_named = (named == Some(id)).then(|| inode::modified_ms(&raw));
        let published_ms = of_entry.map(|entry| entry.published_ms).or(is_named)?;
        Some(Found {
            cno,
            checkpoint: (id.check, published_ms, state.size_bytes()).into(),
            root: state.root,
        })
    }))
}
