//! `clone --flatten`: a clone gets copies of all that it shares, and its parent need keep nothing for it any more.
//!
//! Copies have the names of their originals, which the clone has never used itself. So every checkpoint of it reads as before, and
//! what ends the sharing is one write: that of its label. The parent is told after that (R22 of the protocol).

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Serialize;

use super::copy_objects::copy_objects;
use super::retention::{rounds, shut_out};
use super::{check_closed, check_nothing_left, children as clones_of};
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::engine::Ownership;
use crate::engine::parents;
use crate::format::inode;
use crate::lease::{Holding, Lease};
use crate::meta::origin::{self, Origin};
use crate::meta::{children, label};
use crate::options::{LeaseOptions, StoreOptions};
use crate::retention::inherited_objects;
use crate::store::Store;

/// What is to be done once the log is closed.
const THEN: &str = "flatten it";

/// A clone that shares nothing any more.
#[derive(Debug, Clone, Serialize)]
pub struct Flattened {
    /// Where it is.
    pub url: String,
    /// The volume that it was a clone of.
    pub parent: String,
    /// Objects that were copied.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Ends the sharing of a clone, which no server may have open. Killed at any moment, it leaves a clone or a volume of its own, and
/// may be given again.
///
/// # Errors
/// [`VolumeError::InvalidInput`] when the volume is no clone, or has clones of its own; [`VolumeError::Held`] when a server has it open
/// for writing.
pub async fn flatten(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    lease_options: &LeaseOptions,
) -> Result<Flattened, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let Some(origin) = origin::load(&store).await? else {
        // Of a volume that is not there that is said.
        inode::load(&store).await?;
        return Err(VolumeError::InvalidInput(format!(
            "{url} is no clone: it shares nothing"
        )));
    };
    ensure_shares_or_shared(&store, &origin).await?;
    check_nothing_left(&store, THEN).await?;
    let lease = super::take_lease(&store, store_options, lease_options).await?;
    let flattened = flatten_owned(&store, &lease, &origin).await;
    lease.release(flattened.is_ok()).await;
    flattened
}

async fn flatten_owned(store: &Store, lease: &Arc<Lease>, origin: &Origin) -> Result<Flattened, VolumeError> {
    check_closed(store, THEN).await?;
    let mut flattened = Flattened {
        url: store.url.to_string(),
        parent: origin.parent().url.0.to_string(),
        objects: 0,
        bytes: 0,
    };
    // What is left of clones that were never made is in nobody's way.
    clones_of::clear(store).await?;
    ensure_childless(store).await?;
    ensure_shares_or_shared(store, origin).await?;
    // A plain label: an earlier attempt came so far.
    if store.lineage().fork() > 0 {
        // Older owners publish nothing from here on, and every checkpoint is in the list.
        shut_out(store, lease).await?;
        super::settle_history(store, lease).await?;
        rounds(store, lease).settle(true).await?;
        let needed: BTreeSet<u64> = inherited_objects(store).await?;
        // Copied to the clone's own place, whatever it has inherited.
        let copied = copy_objects(store, &needed, store, Holding::Lease(lease)).await?;
        (flattened.objects, flattened.bytes) = (copied.objects, copied.bytes);
        lease.check().await?;
        label::end_sharing(store).await?;
        // Whoever took the lease before the label was put goes on as a clone, and the parent keeps what that reads. Whoever takes
        // it later finds the label.
        lease.check().await?;
        // A clone of this one that was begun meanwhile has put its entry before it looked at the label.
        ensure_childless(store).await?;
    }
    let parent = store.at(&origin.parent().url.0).await?;
    children::remove(&parent, &origin.child()).await?;
    store.delete(&store.meta_key(origin::NAME)).await?;
    Ok(flattened)
}

/// Checks that the label is the clone's: one that says what it shares, or the plain one that an earlier attempt has put in its
/// place. Another label does not say which objects are shared, so none would be copied before the parent lets go of them.
async fn ensure_shares_or_shared(store: &Store, origin: &Origin) -> Result<(), VolumeError> {
    if store.lineage().fork() > 0 {
        return Ok(());
    }
    let found = label::find(store).await?;
    let is_own =
        found.is_some_and(|found| !found.is_elsewhere() && found.label.volume_id == origin.volume_id);
    match is_own && origin.url.0 == store.url {
        true => Ok(()),
        false => Err(VolumeError::Parent {
            url: store.url.to_string(),
            reason: format!(
                "its label {} is missing or is not the one that it was made with, which says what it shares: put that back from a \
                 backup, or delete the clone",
                store.meta_key(label::NAME)
            ),
        }),
    }
}

/// Clones of a clone read what it has inherited from where that lies, and its parent keeps that for this clone alone.
async fn ensure_childless(store: &Store) -> Result<(), VolumeError> {
    match children::list(store).await?.is_empty() {
        true => Ok(()),
        false => Err(VolumeError::InvalidInput(format!(
            "{} has clones of its own, which read what it has inherited: flatten or delete those first (hypernbd info {0} names \
             them; one that was begun and never made is none a day after that)",
            store.url
        ))),
    }
}
