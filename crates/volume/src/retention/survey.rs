//! How much space a volume takes and how much of it could be freed. Changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use futures::try_join;

use super::account::{Account, Recent};
use super::alone;
use super::choice::Chooser;
use super::load_policy;
use super::pins::Unusable;
use super::plan::{self, Phase};
use super::round::{ORPHAN_AGE, bytes_of, choose, protected, stored};
use super::usage::ObjectUse;
use super::victims::{self, Debt, Victims, Want};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::format::object_names::cno_of;
use crate::index::cache::IndexCache;
use crate::store::Store;

/// The space that a volume takes in its store, by cause, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// Bytes of data blocks that the newest listed checkpoint refers to.
    pub live_blocks: u64,
    /// Bytes of the nodes of its index.
    pub live_nodes: u64,
    /// Of those blocks the ones that lie in what a clone has inherited.
    pub inherited_blocks: u64,
    /// Of those nodes the same.
    pub inherited_nodes: u64,
    /// What of the container no checkpoint that is kept needs.
    pub reclaimable_bytes: u64,
    /// Bytes of the objects that a plan names.
    pub grace_bytes: u64,
    /// Number of checkpoints that a round would remove, as in [`Removed`].
    pub checkpoints: u64,
    /// The same for objects.
    pub objects: u64,
    /// How much space the newest state's objects take for nothing.
    pub debt: Debt,
    /// Objects that compaction would free.
    pub victims: u64,
    /// Their bytes.
    pub victim_bytes: u64,
    /// What would be copied out of them, in bytes.
    pub copied_bytes: u64,
    /// What each checkpoint that is kept holds alone, in bytes.
    pub alone: BTreeMap<CheckpointId, u64>,
}

/// Counts what the volume, with blocks of `block_bytes`, takes and what could go. Changes nothing.
///
/// # Errors
/// When the store fails, or an index cannot be read.
pub(crate) async fn survey(store: &Store, block_bytes: u64) -> Result<Survey, VolumeError> {
    let policy = load_policy(store).await?;
    let plan = plan::load(store).await?.map(|(plan, _)| plan);
    let mut account = Account::load(store).await?;
    let cache = IndexCache::default();
    account.advance(store, &cache, &Recent::default()).await?;
    if let Some(plan) = &plan {
        account.follow(plan);
    }
    account.settle();
    let (protected, stored) = try_join!(protected(store, &account, Unusable::Skip), stored(store))?;
    let usage = account.usage();
    let mut chooser = Chooser::unlimited(ORPHAN_AGE);
    let choice = choose(
        &mut chooser,
        usage,
        policy.as_ref(),
        &protected,
        &stored,
        &BTreeSet::new(),
        Instant::now(),
    );
    let lengths = stored
        .iter()
        .map(|(object, (len_bytes, _))| (*object, *len_bytes));
    let kept: BTreeSet<u64> = choice.kept.iter().copied().collect();
    let alone = alone::alone(usage, &kept, lengths.clone());
    let alone = alone.into_iter().filter_map(|(cno, bytes)| {
        let check = usage.kept().get(&cno)?.check;
        Some((CheckpointId { cno, check }, bytes))
    });
    let is_inherited = |object| store.lineage().inherits(cno_of(object));
    let victims = match policy {
        Some(_) => victims::choose(
            usage,
            &lengths.collect(),
            block_bytes,
            Want::Everything,
            is_inherited,
        ),
        None => Victims::default(),
    };
    let planned = plan.filter(|plan| plan.phase != Phase::Empty);
    let planned = planned.map(|plan| plan.objects).unwrap_or_default();
    let live = |of: fn(&ObjectUse) -> u64| usage.objects().values().map(of).sum();
    let inherited = |of: fn(&ObjectUse) -> u64| {
        let inherited = usage
            .objects()
            .iter()
            .filter(|(object, _)| is_inherited(**object));
        inherited.map(|(_, uses)| of(uses)).sum()
    };
    let grace_bytes = bytes_of(&planned, &stored);
    Ok(Survey {
        live_blocks: live(|of| of.live.blocks),
        live_nodes: live(|of| of.live.nodes),
        inherited_blocks: inherited(|of| of.live.blocks),
        inherited_nodes: inherited(|of| of.live.nodes),
        reclaimable_bytes: bytes_of(&choice.objects, &stored).saturating_sub(grace_bytes),
        grace_bytes,
        checkpoints: choice.retired.len() as u64,
        objects: choice.objects.len() as u64,
        debt: victims.debt,
        victims: victims.objects,
        victim_bytes: victims.object_bytes,
        copied_bytes: victims.live_bytes,
        alone: alone.collect(),
    })
}
