//! `rollback`: makes an earlier checkpoint the newest state of a volume that is not being served.
//!
//! A rollback is a checkpoint like any other, with the root and the size of an earlier one. So history continues: the
//! checkpoints that it undoes can still be read, and a rollback can be undone.

use std::sync::Arc;

use super::check_closed;
use crate::base::checkpoint_id::{Checkpoint, CheckpointId};
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::engine::parents;
use crate::engine::{bare, container};
use crate::format::inode;
use crate::format::stored_state::StoredState;
use crate::lease::Lease;
use crate::meta::checkpoint_list::{self, CatalogueEntry, Kind};
use crate::options::{LeaseOptions, StoreOptions};
use crate::past::{self, At, Point, SnapshotName};
use crate::retention::ensure_readable;
use crate::store::Store;

/// What the user can do once the WAL is closed.
const THEN: &str = "roll it back";
/// The prefix of the name that the state before a rollback gets.
const BEFORE: &str = "before-rollback-";
/// The same, where the volume goes back because it is damaged.
const BEFORE_REPAIR: &str = "before-repair-";

/// The result of a rollback.
#[derive(Debug, Clone)]
pub struct RolledBack {
    /// The checkpoint whose state is now the newest.
    pub to: Point,
    /// The number of the new checkpoint.
    pub number: u64,
    /// The name of the state that was the newest before.
    pub before: SnapshotName,
}

/// The checkpoint that a rollback would return to, and the one that is the newest now. Changes nothing.
///
/// # Errors
/// As [`past::find`]; [`VolumeError::InvalidInput`] when the two are the same.
pub async fn look(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    at: &At,
) -> Result<(Point, Point), VolumeError> {
    let store = parents::connect(url, store_options).await?;
    check_closed(&store, THEN).await?;
    let (to, newest) = futures::try_join!(past::find(&store, Some(at)), past::find(&store, None))?;
    match to.id() == newest.id() {
        true => Err(VolumeError::InvalidInput(format!(
            "checkpoint {} is the newest of {url} already: there is nothing to roll back",
            to.number()
        ))),
        false => Ok((to, newest)),
    }
}

/// Makes the volume read as it did at a checkpoint. A server running on it must be stopped first.
///
/// # Errors
/// [`VolumeError::NoCheckpoint`]; [`VolumeError::Held`] when a server has it open for writing;
/// [`VolumeError::InvalidInput`] when its WAL was not closed.
pub async fn rollback(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    at: &At,
    lease_options: &LeaseOptions,
) -> Result<RolledBack, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let to = past::find(&store, Some(at)).await?;
    rollback_in(&store, store_options, to, lease_options, BEFORE, None).await
}

/// As [`rollback`], to a checkpoint that [`look`] has found: by now its name or its age may mean another one.
///
/// # Errors
/// As [`rollback`].
pub async fn rollback_to(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    to: Point,
    lease_options: &LeaseOptions,
) -> Result<RolledBack, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    rollback_in(&store, store_options, to, lease_options, BEFORE, None).await
}

/// As [`rollback_to`], of a volume whose newest state, this one, is damaged: the name of that state says so.
///
/// # Errors
/// As [`rollback`]; [`VolumeError::InvalidInput`] when the volume has another newest state by now, of which nobody knows that it is damaged.
pub(crate) async fn rollback_damaged(
    store: &Store,
    store_options: &StoreOptions,
    to: Point,
    lease_options: &LeaseOptions,
    damaged: CheckpointId,
) -> Result<RolledBack, VolumeError> {
    rollback_in(
        store,
        store_options,
        to,
        lease_options,
        BEFORE_REPAIR,
        Some(damaged),
    )
    .await
}

async fn rollback_in(
    store: &Store,
    store_options: &StoreOptions,
    to: Point,
    lease_options: &LeaseOptions,
    before: &str,
    seen: Option<CheckpointId>,
) -> Result<RolledBack, VolumeError> {
    // Who takes the volume from a server gives up what that one has not flushed.
    if !lease_options.takeover {
        super::check_buffer(store, THEN).await?;
    }
    let lease = super::take_lease(store, store_options, lease_options).await?;
    let rolled_back = rollback_owned(store, &lease, to, before, seen).await;
    lease.release(rolled_back.is_ok()).await;
    rolled_back
}

/// Rolls back under the lease. The state that was seen before the lease was taken may have changed by then.
async fn rollback_owned(
    store: &Store,
    lease: &Arc<Lease>,
    to: Point,
    before: &str,
    seen: Option<CheckpointId>,
) -> Result<RolledBack, VolumeError> {
    check_closed(store, THEN).await?;
    // The state before gets its entry and its name first, so that both are there even if the rollback fails.
    let generation = super::settle_history(store, lease).await?;
    // From here on older owners remove nothing, and what they had begun to remove is gone.
    super::retention::rounds(store, lease).settle(true).await?;
    ensure_readable(store, to.id()).await?;
    let before = past::free_name(before)?;
    let newest = past::find(store, None).await?;
    if let Some(seen) = seen.filter(|seen| *seen != newest.id()) {
        return Err(VolumeError::InvalidInput(format!(
            "checkpoint {} of {} was looked at, and its newest is {} by now: give the command again",
            seen.cno,
            store.url,
            newest.number()
        )));
    }
    if past::put(store, &before, &newest).await?.is_none() {
        return Err(VolumeError::Internal(format!("the name {before} is taken")));
    }
    let (owned, of) = (store.clone(), lease.clone());
    let published =
        super::on_owner_thread(
            move || async move { Ok(rollback_adopted(&owned, &of, &to, newest.id()).await) },
        );
    let published = published
        .await
        .map_err(|e| VolumeError::Internal(format!("the thread that rolls back ended early: {e}")))??;
    // All generations used before are at or below this one.
    let entry = CatalogueEntry::of(published, generation, lease.epoch(), Kind::Change);
    checkpoint_list::write_entry(store, &entry).await?;
    Ok(RolledBack {
        to,
        number: published.id.cno,
        before,
    })
}

async fn rollback_adopted(
    store: &Store,
    lease: &Lease,
    to: &Point,
    newest: CheckpointId,
) -> Result<Checkpoint, VolumeError> {
    let failed = |e| VolumeError::engine(format!("rolling {} back", store.url), e);
    let mut container = super::adopt(store, lease, failed).await?;
    let (root, size_bytes) = (to.state.root.0, to.size_bytes());
    let opened = container::checkpoint_of(&container);
    if opened != newest {
        // A killed server had sent a checkpoint, and the open adopted it. The rollback would undo it without giving it
        // a name.
        return Err(VolumeError::InvalidInput(format!(
            "{} has a checkpoint more than was seen, {opened}, which a server that was killed had sent: look at what it has now, \
             and roll it back again",
            store.url
        )));
    }
    let raw = bare::publish(&mut container, |raw| {
        raw.i_bmap = root;
        raw.i_size = size_bytes;
    })
    .await
    .map_err(failed)?;
    let state = StoredState::of_inode(&raw);
    Ok(Checkpoint {
        id: state.id(),
        size_bytes: state.size_bytes(),
        published_ms: inode::modified_ms(&raw),
    })
}
