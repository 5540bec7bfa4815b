//! `clone --flatten` of a clone that is not served: the steps are those of `flatten/`.

use std::sync::Arc;

use tokio::sync::Mutex;

use super::retention::{rounds, shut_out};
use super::{check_closed, check_nothing_left, children as clones_of};
use crate::base::control::Control;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::engine::parents;
pub use crate::flatten::Flattened;
use crate::flatten::{Ending, ensure_childless, origin_of};
use crate::lease::Lease;
use crate::meta::origin::Origin;
use crate::options::{LeaseOptions, StoreOptions};
use crate::store::Store;

/// What is to be done once the log is closed.
const THEN: &str = "flatten it";

/// Ends the sharing of a clone, which no server may have open. Killed at any moment, it leaves a clone or a volume of its own, and
/// may be given again.
///
/// # Errors
/// [`VolumeError::InvalidInput`] when the volume is no clone, has clones of its own, or is read by others, for whom its parent goes on
/// keeping what they read; [`VolumeError::Held`] when a server has it open for writing.
pub async fn flatten(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    lease_options: &LeaseOptions,
) -> Result<Flattened, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let origin = origin_of(&store).await?;
    check_nothing_left(&store, THEN).await?;
    let lease = super::take_lease(&store, store_options, lease_options).await?;
    let flattened = flatten_owned(&store, &lease, &origin).await;
    lease.release(flattened.is_ok()).await;
    flattened
}

async fn flatten_owned(store: &Store, lease: &Arc<Lease>, origin: &Origin) -> Result<Flattened, VolumeError> {
    check_closed(store, THEN).await?;
    // What is left of clones that were never made is in nobody's way.
    clones_of::clear(store).await?;
    ensure_childless(store).await?;
    // Older owners publish nothing from here on, and every checkpoint is in the list.
    shut_out(store, lease).await?;
    super::settle_history(store, lease).await?;
    let ending = Ending {
        store,
        origin,
        lease,
        rounds: &Mutex::new(rounds(store, lease)),
        beside: None,
        control: &Control::default(),
    };
    ending.run().await
}
