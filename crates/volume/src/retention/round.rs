//! One round of removing what nobody needs: account, choose, plan, check again, remove. Whoever is next continues an
//! interrupted round.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::try_join;
use log::{info, warn};

use super::account::{self, Account, Recent};
use super::choice::{Choice, Chooser};
use super::load_policy;
use super::pins::{self, Unusable};
use super::plan::{self, Phase, Plan, runs};
use super::policy::Policy;
use super::seen::Stored;
pub(super) use super::seen::{bytes_of, choose, protected, stored};
use super::under_way::UnderWay;
use super::usage::{ObjectUse, Usage};
use super::victims::{self, Victims, Want};
use crate::base::clock::now_ms;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::store_error::StoreErrorKind;
use crate::engine::Ownership;
use crate::format::{inode, object_names};
use crate::index::cache::IndexCache;
use crate::index::{checksums, origins};
use crate::meta::checkpoint_list;
use crate::store::{DELETE_KEYS_MAX, ETag, Store, sums};

/// How old an object that no checkpoint has used must be before it is removed, by the store's clock.
pub(crate) const ORPHAN_AGE: Duration = Duration::from_secs(24 * 3600);
/// The table is stored at least this often, so that the next server has little to account.
const STORED_EVERY: Duration = Duration::from_secs(600);

/// Pins are judged by the time at which the plan was written. So one that nothing else replaces is written anew after this long: else a
/// pin that ran out, or is damaged, would hold for as long as the server lives.
const PLAN_RENEWED_AFTER: Duration = Duration::from_secs(3600);

/// The result of a round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Removed {
    /// Checkpoints that were removed.
    pub checkpoints: u64,
    /// Objects that were removed.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Checkpoints and objects that are not needed and may go in a later round.
    pub waiting: u64,
    /// Some of these may go in another round at once: the plan of this one had no room for them.
    pub is_cut: bool,
}

impl Removed {
    /// Of these rounds and the next one together.
    pub(super) fn followed_by(&self, next: &Self) -> Self {
        Self {
            checkpoints: self.checkpoints + next.checkpoints,
            objects: self.objects + next.objects,
            bytes: self.bytes + next.bytes,
            waiting: next.waiting,
            is_cut: next.is_cut,
        }
    }
}

/// Removes what nobody needs, for the owner of a volume.
pub(crate) struct Rounds {
    store: Store,
    epoch: u64,
    ownership: Arc<dyn Ownership>,
    cache: IndexCache,
    recent: Recent,
    chooser: Chooser,
    account: Option<Account>,
    stored: Instant,
    /// The plan that this owner stored; `None` before it has settled what earlier owners left.
    plan: Option<(Plan, ETag)>,
    /// When that was.
    planned: Option<Instant>,
    /// The policy of the last round.
    policy: Option<Policy>,
    under_way: UnderWay,
    /// Bytes of a block, where it is shown how far the volume is from where compaction keeps it.
    block_bytes: Option<u64>,
}

impl Rounds {
    /// For the owner of this epoch, which has fenced older owners. Nothing is removed before it has not been needed for
    /// `grace`.
    pub fn new(
        store: Store,
        epoch: u64,
        ownership: Arc<dyn Ownership>,
        cache: IndexCache,
        grace: Duration,
        orphan_age: Duration,
    ) -> Self {
        Self {
            store,
            epoch,
            ownership,
            cache,
            recent: Recent::default(),
            chooser: Chooser::new(grace, orphan_age),
            account: None,
            stored: Instant::now(),
            plan: None,
            planned: None,
            policy: None,
            under_way: UnderWay::default(),
            block_bytes: None,
        }
    }

    /// The numbers that copies are being stored under, to be kept up by who stores them.
    pub fn under_way(&self) -> UnderWay {
        self.under_way.clone()
    }

    /// What is worth copying, so that the objects that it lies in can go. Nothing where nothing ever goes, or while another tool's
    /// compaction waits to be taken in.
    ///
    /// # Errors
    /// When the store fails, or an index cannot be read.
    pub async fn victims(&mut self, block_bytes: u64, want: Want) -> Result<Victims, VolumeError> {
        if load_policy(&self.store).await?.is_none() || is_compacted_elsewhere(&self.store).await? {
            return Ok(Victims::default());
        }
        let mut account = match self.account.take() {
            Some(account) => account,
            None => Account::load(&self.store).await?,
        };
        account.advance(&self.store, &self.cache, &self.recent).await?;
        let (plan, stored) = try_join!(plan::load(&self.store), stored(&self.store))?;
        // In a copy: the stored plan may be void, and a checkpoint that the table once dropped does not come back to it.
        let mut followed = account.clone();
        self.account = Some(account);
        if let Some((plan, _)) = &plan {
            followed.follow(plan);
        }
        followed.settle();
        Ok(self.victims_of(followed.usage(), &stored, block_bytes, want))
    }

    /// The inherited objects that any checkpoint of a clone needs which is not being removed, by number. What is published later needs no
    /// others.
    ///
    /// # Errors
    /// When the store fails, or an index cannot be read; [`VolumeError::Fenced`] when there is another owner.
    pub async fn inherited_objects(&mut self) -> Result<BTreeSet<u64>, VolumeError> {
        self.settle(true).await?;
        let mut account = match self.account.take() {
            Some(account) => account,
            None => Account::load(&self.store).await?,
        };
        account.advance(&self.store, &self.cache, &self.recent).await?;
        // In a copy, as for victims.
        let mut followed = account.clone();
        self.account = Some(account);
        if let Some((plan, _)) = &self.plan {
            followed.follow(plan);
        }
        let usage = followed.usage();
        let inherited = usage
            .objects()
            .keys()
            .copied()
            .filter(|object| self.store.lineage().inherits(object_names::cno_of(*object)));
        Ok(inherited
            .filter(|object| usage.is_needed(*object, usage.kept()))
            .collect())
    }

    /// Whether anybody reads a checkpoint of the volume, by a pin that has not run out.
    ///
    /// # Errors
    /// When the store fails, or a pin that was put lately is damaged; [`VolumeError::Fenced`] when there is another owner.
    pub async fn has_readers(&mut self) -> Result<bool, VolumeError> {
        self.settle(true).await?;
        // Pins are judged by the time at which the plan was written.
        if let Some((plan, _)) = &self.plan {
            let anew = plan.emptied(self.epoch);
            self.replace(anew).await?;
        }
        Ok(!pins::checkpoints(&self.store, Unusable::Refuse).await?.is_empty())
    }

    /// What is worth copying by this table, and these objects. The debt is shown from then on.
    fn victims_of(&self, usage: &Usage, stored: &Stored, block_bytes: u64, want: Want) -> Victims {
        let lengths = stored
            .iter()
            .map(|(object, (len_bytes, _))| (*object, *len_bytes));
        // What a clone has inherited is its parents'.
        let is_inherited = |object| self.store.lineage().inherits(object_names::cno_of(object));
        let victims = victims::choose(usage, &lengths.collect(), block_bytes, want, is_inherited);
        let space = &self.store.metrics().space;
        space.debt_bytes.set(victims.debt.over_bytes());
        victims
    }

    /// The same with what this process remembers, which need not be read then.
    pub fn remembering(self, recent: Recent) -> Self {
        Self { recent, ..self }
    }

    /// The same of a volume with blocks of this size, of which it is shown how far it is from where compaction keeps it. That costs no
    /// request.
    pub fn showing_debt(self, block_bytes: u64) -> Self {
        Self {
            block_bytes: Some(block_bytes),
            ..self
        }
    }

    /// Whether the policy is the one of the last round, as far as can be told.
    pub async fn is_policy_unchanged(&self) -> bool {
        matches!(load_policy(&self.store).await, Ok(policy) if policy == self.policy)
    }

    /// Settles what earlier owners left: a removal that was begun is finished, and a plan that was not is void.
    /// Afterwards earlier owners cannot decide on anything more. If there never was a plan, nothing is written unless
    /// `is_forced`. Returns the plan of the removal that was finished: whoever decided on it may be sending its requests still.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when a later owner removes checkpoints.
    pub async fn settle(&mut self, is_forced: bool) -> Result<Option<Plan>, VolumeError> {
        let found = plan::load(&self.store).await?;
        let Some((found, etag)) = found else {
            if is_forced {
                self.put(Plan::empty(self.epoch), None).await?;
            }
            return Ok(None);
        };
        if found.epoch > self.epoch {
            // It belongs to a later owner, or to one from before the lease was deleted, after which epochs began again.
            self.ownership.check().await?;
        }
        let is_own = self.plan.is_some() && found.epoch == self.epoch;
        let is_old = self.planned.is_some_and(|at| at.elapsed() >= PLAN_RENEWED_AFTER);
        if is_own && found.phase == Phase::Empty && !is_old {
            self.plan = Some((found, etag));
            return Ok(None);
        }
        let is_of_volume = match found.at {
            Some(at) => account::has(&self.store, at).await?,
            None => found.phase == Phase::Empty,
        };
        if !is_of_volume {
            warn!(
                "the removal plan of {} belongs to another history of the volume, and is not carried out: the volume was restored from a backup, \
                 rolled back by another tool, or made anew",
                self.store.url
            );
            self.put(Plan::empty(self.epoch), Some(&etag)).await?;
            return Ok(None);
        }
        if found.phase == Phase::Deleting
            && let Err(e) = self.remove(&found).await
        {
            if e.kind() != ErrorKind::AccessDenied {
                return Err(e);
            }
            // These objects are not needed, and the next rounds try to remove them again.
            warn!(
                "the store denies the removal of objects of {} that no kept checkpoint needs: {e}",
                self.store.url
            );
        }
        self.put(found.emptied(self.epoch), Some(&etag)).await?;
        Ok(Some(found).filter(|found| found.phase == Phase::Deleting))
    }

    async fn put(&mut self, plan: Plan, before: Option<&ETag>) -> Result<(), VolumeError> {
        let etag = plan::replace(&self.store, &plan, before).await?;
        self.plan = Some((plan, etag));
        self.planned = Some(Instant::now());
        Ok(())
    }

    /// Replaces this owner's plan.
    async fn replace(&mut self, plan: Plan) -> Result<(), VolumeError> {
        let before = self.plan.as_ref().map(|(_, etag)| etag.clone());
        self.put(plan, before.as_ref()).await
    }

    /// Removes what can be removed at `now`.
    ///
    /// # Errors
    /// When the store fails; a later round does the rest. [`VolumeError::Fenced`] when there is another owner.
    pub async fn round(&mut self, now: Instant) -> Result<Removed, VolumeError> {
        self.policy = load_policy(&self.store).await?;
        let Some(policy) = self.policy.clone() else {
            self.settle(false).await?;
            return Ok(Removed::default());
        };
        self.settle(true).await?;
        if is_compacted_elsewhere(&self.store).await? {
            return Ok(Removed::default());
        }
        let mut account = match self.account.take() {
            Some(account) => account,
            None => Account::load(&self.store).await?,
        };
        account.advance(&self.store, &self.cache, &self.recent).await?;
        if let Some((plan, _)) = &self.plan {
            account.follow(plan);
        }
        account.settle();
        let removed = self.round_of(&mut account, &policy, now).await;
        // After a failure the table is read again, because what it dropped may belong to a plan that is void.
        if removed.is_ok() {
            self.account = Some(account);
        }
        removed
    }

    async fn round_of(
        &mut self,
        account: &mut Account,
        policy: &Policy,
        now: Instant,
    ) -> Result<Removed, VolumeError> {
        let (protected, stored) = try_join!(
            protected(&self.store, account, Unusable::Refuse),
            stored(&self.store)
        )?;
        let under_way = self.under_way.at(account.usage().at_number());
        let choice = choose(
            &mut self.chooser,
            account.usage(),
            Some(policy),
            &protected,
            &stored,
            &under_way,
            now,
        );
        self.count_space(account.usage(), &stored, &choice);
        // What is inherited is stored elsewhere: that it is not here says nothing.
        let gone = choice.gone.iter().copied();
        let gone: Vec<u64> = gone
            .filter(|object| !self.store.lineage().inherits(object_names::cno_of(*object)))
            .collect();
        let mut removed = Removed {
            waiting: choice.waiting as u64,
            ..Removed::default()
        };
        if choice.is_empty() {
            account.forget(&[], &gone);
            if self.stored.elapsed() >= STORED_EVERY {
                account.store(&self.store).await?;
                self.stored = Instant::now();
            }
            return Ok(removed);
        }
        // The plan names the table's checkpoint.
        account.store(&self.store).await?;
        self.stored = Instant::now();
        if !self.carry_out(account, policy, &choice).await? {
            removed.waiting += (choice.retired.len() + choice.objects.len()) as u64;
            return Ok(removed);
        }
        account.forget(&choice.retired, &choice.objects);
        // Not before: a checkpoint that was to go may stay, and what it lacks may be put back by a repair.
        account.forget(&[], &gone);
        removed.is_cut = choice.is_cut;
        removed.checkpoints = choice.retired.len() as u64;
        removed.objects = choice.objects.len() as u64;
        removed.bytes = bytes_of(&choice.objects, &stored);
        // What the checkpoints held that are gone is debt from here on.
        account.settle();
        let mut left = stored;
        for object in &choice.objects {
            left.remove(object);
        }
        self.count_debt(account.usage(), &left);
        let space = &self.store.metrics().space;
        space.removed_bytes.add(removed.bytes);
        space.removed_objects.add(removed.objects);
        space.removed_checkpoints.add(removed.checkpoints);
        space
            .stored_bytes
            .set(space.stored_bytes.get().saturating_sub(removed.bytes));
        space.garbage_bytes.set(0);
        info!(
            "removed {} checkpoints of {} and {} objects with {} bytes",
            removed.checkpoints, self.store.url, removed.objects, removed.bytes
        );
        Ok(removed)
    }

    fn count_space(&self, usage: &Usage, stored: &Stored, choice: &Choice) {
        let space = &self.store.metrics().space;
        let live = |of: fn(&ObjectUse) -> u64| usage.objects().values().map(of).sum();
        space.live_blocks.set(live(|of| of.live.blocks));
        space.live_nodes.set(live(|of| of.live.nodes));
        space
            .stored_bytes
            .set(stored.values().map(|(len_bytes, _)| len_bytes).sum());
        space.garbage_bytes.set(bytes_of(&choice.objects, stored));
        self.count_debt(usage, stored);
        space.counted_ms.set(now_ms());
    }

    fn count_debt(&self, usage: &Usage, stored: &Stored) {
        if let Some(block_bytes) = self.block_bytes {
            self.victims_of(usage, stored, block_bytes, Want::Bound);
        }
    }

    /// Plans, looks again, removes. `false` when somebody needs what was to go: then all of it stays.
    async fn carry_out(
        &mut self,
        account: &Account,
        policy: &Policy,
        choice: &Choice,
    ) -> Result<bool, VolumeError> {
        let before = self.plan.as_ref().map(|(plan, _)| plan.clone());
        let before = before.unwrap_or_else(|| Plan::empty(self.epoch));
        let planned = self.plan(account, choice).await?;
        if let Some(void) = self.in_the_way(account, policy, &before, &planned).await? {
            self.replace(void).await?;
            return Ok(false);
        }
        let deleting = self.decide(planned).await?;
        self.remove(&deleting).await?;
        self.replace(deleting.emptied(self.epoch)).await?;
        Ok(true)
    }

    /// Phase one: stores the plan.
    pub(super) async fn plan(&mut self, account: &Account, choice: &Choice) -> Result<Plan, VolumeError> {
        let planned = Plan {
            at: account.usage().at(),
            phase: Phase::Planned,
            up_to: account.usage().at_number(),
            kept: runs(choice.kept.iter().copied()),
            retired: choice.retired.clone(),
            objects: choice.objects.clone(),
            ..Plan::empty(self.epoch)
        };
        self.replace(planned.clone()).await?;
        Ok(planned)
    }

    /// The plan to put in place of `planned` when somebody needs what it removes. Whoever puts a pin, a name or a policy that is
    /// not seen here reads the plan afterwards.
    async fn in_the_way(
        &self,
        account: &Account,
        policy: &Policy,
        before: &Plan,
        planned: &Plan,
    ) -> Result<Option<Plan>, VolumeError> {
        let (protected, policy_now) = try_join!(
            protected(&self.store, account, Unusable::Clear),
            load_policy(&self.store)
        )?;
        // One whose entry came late, after its number was accounted. The next round counts it; the planned plan would say for good
        // that it is gone.
        let needed = account::needed(&self.store).await?;
        let lacking = account.lacks(&self.store, &needed, |cno| before.keeps(cno));
        if lacking.await?.is_some() {
            return Ok(Some(before.emptied(self.epoch)));
        }
        let is_protected = planned.retired.iter().any(|cno| protected.contains(*cno));
        let is_void = is_protected || policy_now.as_ref() != Some(policy);
        Ok(is_void.then(|| planned.emptied(self.epoch)))
    }

    /// Phase two: from here on everything that the plan names is gone, whoever removes it.
    pub(super) async fn decide(&mut self, planned: Plan) -> Result<Plan, VolumeError> {
        self.ownership.check().await?;
        let deleting = Plan {
            phase: Phase::Deleting,
            ..planned
        };
        self.replace(deleting.clone()).await?;
        Ok(deleting)
    }

    /// Removes what a plan names: the entries first, so that nobody begins to read what is being removed.
    async fn remove(&self, plan: &Plan) -> Result<(), VolumeError> {
        let entries = plan.retired.iter().map(|&cno| checkpoint_list::entry_name(cno));
        let entries: Vec<String> = entries.map(|name| self.store.meta_key(&name)).collect();
        self.delete(&entries).await?;
        let own = plan
            .objects
            .iter()
            .filter(|object| !self.store.lineage().inherits(object_names::cno_of(**object)));
        let names = own.map(|&object| object_names::name_of(object));
        let names: Vec<String> = names.collect();
        let objects: Vec<String> = names.iter().map(|name| self.store.data_key(name)).collect();
        self.delete(&objects).await?;
        let beside = plan
            .objects
            .iter()
            .map(|&object| match origins::may_have(object) {
                true => origins::key(&self.store, object),
                false => checksums::key(&self.store, &object_names::name_of(object)),
            });
        // After the objects: one that is there is never without its check values.
        let sums = names.iter().map(|name| sums::key(&self.store, name));
        let beside: Vec<String> = beside.chain(sums).collect();
        self.delete(&beside).await?;
        Ok(())
    }
}

impl Rounds {
    /// Deletes those objects that may be deleted. Returns the error of the last refusal.
    async fn delete(&self, keys: &[String]) -> Result<(), VolumeError> {
        let mut refused = None;
        for keys in keys.chunks(DELETE_KEYS_MAX) {
            match self.store.delete_keys(keys).await {
                Err(e) if e.kind == StoreErrorKind::AccessDenied => refused = Some(e),
                deleted => deleted?,
            }
        }
        refused.map_or(Ok(()), |e| Err(e.into()))
    }
}

/// Whether a compaction by another tool waits to be adopted. No checkpoint names its objects yet.
async fn is_compacted_elsewhere(store: &Store) -> Result<bool, VolumeError> {
    let (raw, _) = inode::load(store).await?;
    Ok(raw.is_compaction_pending())
}

#[cfg(test)]
#[path = "round_tests.rs"]
mod tests;
