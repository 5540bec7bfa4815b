//! `retention` and `prune`: how long checkpoints are kept, and the removal of the others from a volume that is not
//! being served.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{check_closed, check_nothing_left, children};
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::engine::parents;
use crate::format::inode;
use crate::index::cache::IndexCache;
use crate::lease::Lease;
use crate::options::{LeaseOptions, StoreOptions};
use crate::past::{self, Listed};
use crate::retention::plan::{self, Phase};
use crate::retention::{self, ORPHAN_AGE, Policy, Removed, Rounds, Survey};
use crate::store::Store;

/// What the user can do once the WAL is closed.
const THEN: &str = "prune it";

/// The policy of a volume; `None` when everything is kept.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is no volume; when the policy cannot be read.
pub async fn policy(url: &VolumeUrl, store_options: &StoreOptions) -> Result<Option<Policy>, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    inode::load(&store).await?;
    retention::load_policy(&store).await
}

/// Sets or removes the policy of a volume, whether it is served or not. Returns the checkpoints that were being removed
/// under the previous policy and may still be removed.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is no volume.
pub async fn set_policy(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    policy: Option<&Policy>,
) -> Result<Vec<u64>, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    inode::load(&store).await?;
    match policy {
        Some(policy) => retention::put_policy(&store, policy).await?,
        None => retention::remove_policy(&store).await?,
    }
    // A removal reads the policy after it has stored its plan. A removal that did so earlier is seen here.
    let plan = plan::load(&store).await?.map(|(plan, _)| plan);
    let going = plan.filter(|plan| plan.phase != Phase::Empty);
    Ok(going.map(|plan| plan.retired).unwrap_or_default())
}

/// The checkpoints that would be removed if the volume had this policy, oldest first.
///
/// # Errors
/// As [`past::list`].
pub async fn preview(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    policy: &Policy,
) -> Result<Vec<Listed>, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let mut listed = past::list_by(&store, 0, u64::MAX, Some(policy)).await?;
    listed.retain(|listed| listed.kept_by.is_empty());
    Ok(listed)
}

/// What [`prune`] would remove. Changes nothing, and may run beside a server.
///
/// # Errors
/// When the store fails, or an index cannot be read.
pub async fn prune_preview(url: &VolumeUrl, store_options: &StoreOptions) -> Result<Survey, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let (raw, _) = inode::load(&store).await?;
    let block_size_bytes = inode::block_size_bytes(&raw).map_err(|reason| VolumeError::Corrupt {
        what: format!("the inode of the volume at {url}"),
        reason,
    })?;
    retention::survey(&store, u64::from(block_size_bytes)).await
}

/// Removes the checkpoints that the volume's policy does not keep. A server running on it must be stopped first; a
/// running server removes them itself.
///
/// # Errors
/// [`VolumeError::Held`] when a server has it open for writing; [`VolumeError::InvalidInput`] when its WAL was not
/// closed.
pub async fn prune(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    lease_options: &LeaseOptions,
) -> Result<Removed, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    check_nothing_left(&store, THEN).await?;
    let lease = super::take_lease_only(&store, store_options, lease_options).await?;
    let pruned = prune_owned(&store, &lease).await;
    lease.release(pruned.is_ok()).await;
    pruned
}

async fn prune_owned(store: &Store, lease: &Arc<Lease>) -> Result<Removed, VolumeError> {
    check_closed(store, THEN).await?;
    shut_out(store, lease).await?;
    super::settle_history(store, lease).await?;
    // What is left of clones that were never made keeps nothing.
    children::clear(store).await?;
    let mut rounds = rounds(store, lease);
    let mut all = Removed::default();
    loop {
        let removed = rounds.round(Instant::now()).await?;
        all.checkpoints += removed.checkpoints;
        all.objects += removed.objects;
        all.bytes += removed.bytes;
        all.waiting = removed.waiting;
        if removed.objects == 0 && removed.checkpoints == 0 {
            return Ok(all);
        }
    }
}

/// Opens the container as its owner: what older ones have on the way to it is taken up, or refused from here on.
pub(super) async fn shut_out(store: &Store, lease: &Arc<Lease>) -> Result<(), VolumeError> {
    let (owned, of) = (store.clone(), lease.clone());
    let opened = super::on_owner_thread(move || async move {
        let failed = |e| VolumeError::engine(format!("opening {}", owned.url), e);
        Ok(super::adopt(&owned, &of, failed).await.map(drop))
    });
    opened
        .await
        .map_err(|e| VolumeError::Internal(format!("the thread that opens the container ended early: {e}")))?
}

/// The rounds of a command that has the lease. They remove at once what is not needed, because no request of a server
/// is in flight.
pub(crate) fn rounds(store: &Store, lease: &Arc<Lease>) -> Rounds {
    Rounds::new(
        store.clone(),
        lease.epoch(),
        lease.clone(),
        IndexCache::default(),
        Duration::ZERO,
        ORPHAN_AGE,
    )
}
