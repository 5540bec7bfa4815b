//! The parents of a clone: connected, and seen to be what the clone says.
//!
//! An origin is believed only when each volume that it names is there, is the very one, has the checkpoint that was cloned, and
//! knows of the clone ([`children`]). So a clone is never used whose parent keeps nothing for it, and nobody is made to read
//! what its owner has not shared.

use futures::future::try_join_all;
use futures::{TryFutureExt, try_join};

use super::checkpoint_stored;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::meta::children;
use crate::meta::label::{self, Found};
use crate::meta::origin::{self, Origin, Parent};
use crate::store::lineage::{Inherited, Lineage};
use crate::store::options::StoreOptions;
use crate::store::{self, Store};

/// The origin of the volume whose label this is: none of a plain volume. It is one that was made here, for this volume.
///
/// # Errors
/// [`VolumeError::Parent`] when the volume is a copy of a clone; as [`origin::load`].
async fn of_label(store: &Store, label: Option<&Found>) -> Result<Option<Origin>, VolumeError> {
    let Some(found) = label.filter(|found| found.label.is_clone) else {
        return Ok(None);
    };
    let refused = |reason: String| VolumeError::Parent {
        url: store.url.to_string(),
        reason,
    };
    let Some(origin) = origin::load(store).await? else {
        return Err(refused(format!("{} is missing", store.meta_key(origin::NAME))));
    };
    if found.is_elsewhere() || origin.url.0 != store.url || origin.volume_id != found.label.volume_id {
        return Err(refused(format!(
            "it was made at {}, and what is here is a copy that {} knows nothing of; use it there, or clone the volume again",
            origin.url.0,
            origin.parent().url.0
        )));
    }
    Ok(Some(origin))
}

/// The store of a volume with what the volume has inherited; nothing is asked of the parents.
///
/// # Errors
/// When a parent's directory cannot be opened.
pub(crate) async fn inheriting(
    store: &Store,
    volume_id: Option<VolumeId>,
    origin: Option<&Origin>,
) -> Result<Store, VolumeError> {
    let parents = origin.map(|origin| origin.parents.as_slice()).unwrap_or_default();
    let inherited = parents.iter().map(|parent| async move {
        let at = store.at(&parent.url.0).await;
        let at = at.map_err(|e| not_there(store, parent, &e.to_string()))?;
        Ok::<_, VolumeError>(Inherited {
            up_to: parent.up_to,
            volume_id: parent.volume_id,
            store: at.with_lineage(Lineage::new(Some(parent.volume_id), Vec::new())),
        })
    });
    Ok(store.with_lineage(Lineage::new(volume_id, try_join_all(inherited).await?)))
}

fn not_there(store: &Store, parent: &Parent, reason: &str) -> VolumeError {
    VolumeError::Parent {
        url: store.url.to_string(),
        reason: format!(
            "the volume {} is not at {}: {reason}",
            parent.volume_id, parent.url.0
        ),
    }
}

/// Makes sure that each volume that was inherited from is there, is the very one, and keeps what it shares.
///
/// # Errors
/// [`VolumeError::Parent`] when not; when a store fails.
async fn verify(store: &Store, origin: &Origin) -> Result<(), VolumeError> {
    let checks = origin.known_by().zip(store.lineage().inherited());
    let checks = checks.map(|((parent, child), inherited)| async move {
        let at = &inherited.store;
        let (label, is_known, forked) = try_join!(
            readable_label(at),
            children::is_known(at, &child),
            checkpoint_stored(at, parent.checkpoint.cno)
        )?;
        match label.map(|found| found.label.volume_id) {
            // A label that was lost or damaged says nothing else, and nobody gives the volume another id while it has clones.
            None if is_known => {}
            None => return Err(not_there(store, parent, "there is none")),
            Some(id) if id != parent.volume_id => {
                return Err(not_there(store, parent, &format!("that is volume {id}")));
            }
            Some(_) => {}
        }
        if !is_known {
            let reason = format!(
                "{} does not know of it, and keeps nothing for it: the clone was given up, or never made whole; delete it",
                parent.url.0
            );
            return Err(VolumeError::Parent {
                url: store.url.to_string(),
                reason,
            });
        }
        // A parent that was restored to an earlier state uses its numbers again, for other data.
        if forked != Some(parent.checkpoint) {
            let reason = format!(
                "{} does not have the checkpoint {} any more that it began as: it was restored from a backup, or rolled back by \
                 another tool",
                parent.url.0, parent.checkpoint.cno
            );
            return Err(VolumeError::Parent {
                url: store.url.to_string(),
                reason,
            });
        }
        Ok(())
    });
    try_join_all(checks).await.map(drop)
}

/// The store of the volume whose label this is, with all that it has inherited, seen to be there.
///
/// # Errors
/// As [`of_label`], [`verify`].
pub(crate) async fn attach(
    store: &Store,
    label: Option<&Found>,
) -> Result<(Store, Option<Origin>), VolumeError> {
    let origin = of_label(store, label).await?;
    let volume_id = label.map(|found| found.label.volume_id);
    let store = inheriting(store, volume_id, origin.as_ref()).await?;
    if let Some(origin) = &origin {
        verify(&store, origin).await?;
    }
    Ok((store, origin))
}

/// As [`store::connect`], with what the volume has inherited.
///
/// # Errors
/// As [`store::connect`], [`attach`].
pub(crate) async fn connect(url: &VolumeUrl, options: &StoreOptions) -> Result<Store, VolumeError> {
    let store = store::unproved(url, options).await?;
    let ((), label) = try_join!(store.check().map_err(VolumeError::from), readable_label(&store))?;
    Ok(attach(&store, label.as_ref()).await?.0)
}

/// The label, as far as it can be read. What a damaged one hides is not needed for a plain volume, and a clone without its
/// parents finds none of their objects.
pub(crate) async fn readable_label(store: &Store) -> Result<Option<Found>, VolumeError> {
    match label::find(store).await {
        Err(e) if e.kind() == ErrorKind::Corrupt => Ok(None),
        found => found,
    }
}
