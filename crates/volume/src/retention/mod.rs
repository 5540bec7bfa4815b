//! How long checkpoints are kept, and how the space of the others is freed.
//!
//! Three things decide what stays: the [`Policy`], names (`past/`), and the pins of those who read a checkpoint
//! ([`pins`]). The usage table ([`usage`], [`account`]) says which objects the remaining checkpoints need. Everything
//! that is about to be removed is first named in the plan ([`plan`]), so that an owner that was paused cannot remove
//! what a later owner keeps.
//!
//! * *Invariant H1:* every kept checkpoint always reads byte for byte as it did when it was published.
//! * *Invariant H2:* nothing that a kept checkpoint, a pin, a reader or a publish in flight refers to is ever removed,
//!   whichever owner removes and whenever it wakes up.

mod account;
mod alone;
mod choice;
mod keeper;
mod periods;
pub(crate) mod pins;
pub(crate) mod plan;
mod policy;
mod reading;
mod round;
mod seen;
mod survey;
mod under_way;
mod until;
pub(crate) mod usage;
mod victims;

pub(crate) use account::{Recent, TableCheck, check_table};
pub(crate) use choice::{NEWEST_KEPT, Protected, kept, newest_written_ms};
pub(crate) use keeper::Keeper;
pub(crate) use pins::Unusable;
pub use policy::{Policy, Reason};
pub(crate) use reading::{Reading, ensure_kept, ensure_readable, ensure_shares};
pub use round::Removed;
pub(crate) use round::{ORPHAN_AGE, Rounds};
pub use survey::Survey;
pub(crate) use survey::survey;
pub use under_way::UnderWay;
pub use until::Until;
pub(crate) use until::until;
pub use usage::Places;
pub use victims::{Debt, Victim};
pub(crate) use victims::{Victims, Want};

use std::collections::{BTreeMap, BTreeSet};

use crate::base::error::VolumeError;
use crate::meta::{children, wal_marker};
use crate::store::Store;

/// The name of the policy's object, below the volume's `.meta/`.
const POLICY: &str = "retention/policy";

/// The stored policy. With `None` nothing is removed.
///
/// # Errors
/// When the store fails, or the policy cannot be read.
pub(crate) async fn load_policy(store: &Store) -> Result<Option<Policy>, VolumeError> {
    let key = store.meta_key(POLICY);
    let Some((body, _)) = store.get(&key).await? else {
        return Ok(None);
    };
    let policy = Policy::decode(&body).map_err(|reason| VolumeError::Corrupt {
        what: format!("the retention policy {key}"),
        reason: format!(
            "{reason}; nothing is removed until it is set anew with hypernbd retention set or unset"
        ),
    })?;
    Ok(Some(policy).filter(|policy| !policy.is_empty()))
}

/// Stores a policy. The caller must read the plan afterwards.
///
/// # Errors
/// When the store fails.
pub(crate) async fn put_policy(store: &Store, policy: &Policy) -> Result<(), VolumeError> {
    let body = serde_json::to_vec(policy).map_err(|e| VolumeError::Internal(e.to_string()))?;
    store.put(&store.meta_key(POLICY), body).await?;
    Ok(())
}

/// Removes the policy, so that nothing is removed any more. The caller must read the plan afterwards.
///
/// # Errors
/// When the store fails.
pub(crate) async fn remove_policy(store: &Store) -> Result<(), VolumeError> {
    store.delete(&store.meta_key(POLICY)).await?;
    Ok(())
}

/// The accounted checkpoints, by number.
///
/// # Errors
/// When the store fails.
pub(crate) async fn accounted(store: &Store) -> Result<BTreeMap<u64, usage::Accounted>, VolumeError> {
    let account = account::Account::load(store).await?;
    Ok(account.usage().kept().clone())
}

/// The checkpoints that somebody reads, that clones began as, or that a log depends on.
///
/// # Errors
/// When the store fails.
pub(crate) async fn in_use(store: &Store, unusable: Unusable) -> Result<BTreeSet<u64>, VolumeError> {
    let (pinned, children, marker) = futures::try_join!(
        pins::checkpoints(store, unusable),
        children::list(store),
        wal_marker::load(store)
    )?;
    // The log goes on from it. One that was closed goes on from nothing.
    let of_wal = marker
        .filter(|(marker, _)| !marker.is_clean)
        .and_then(|(marker, _)| marker.checkpoint);
    let of_clones = children.into_iter().map(|child| child.checkpoint);
    let in_use = pinned.into_iter().chain(of_clones).chain(of_wal);
    Ok(in_use.map(|id| id.cno).collect())
}
