//! A volume that lost its label and has clones: they know it by the id that it had, and refuse it under any other.
//!
//! So it gets no new id as other volumes without a label do. What its clones say of it is another's word, and the label says more than the
//! id: the owner puts the label back, or says with `adopt` that the volume is the one that they mean.

use std::collections::BTreeSet;

use futures::stream::{self, StreamExt};

use super::children::{self, Child, ChildRecord};
use super::{label, origin};
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::store::Store;

/// Clones that are asked at once.
const READS_AT_ONCE: usize = 16;

/// The id for the label of a volume that has none. `None` where no clone knows it by one.
///
/// # Errors
/// [`VolumeError::Corrupt`] when clones do, unless it is `adopt`ed and they name one id; when the store fails.
pub(super) async fn id_to_keep(store: &Store, adopt: bool) -> Result<Option<VolumeId>, VolumeError> {
    let clones = children::load_all(store).await?;
    if clones.is_empty() {
        return Ok(None);
    }
    let asked =
        stream::iter(clones).map(|(clone, record)| async move { ask(store, &clone, record.as_ref()).await });
    let mut said: Vec<Said> = asked.buffer_unordered(READS_AT_ONCE).collect().await;
    said.retain(|said| *said != Said::NoClone);
    if said.is_empty() {
        return Ok(None);
    }
    let named: BTreeSet<VolumeId> = said.into_iter().filter_map(Said::id).collect();
    // Of a clone the label says that it is one.
    let is_clone = store.head(&store.meta_key(origin::NAME)).await?.is_some();
    let id = named.first().filter(|_| named.len() == 1 && !is_clone);
    match id {
        Some(id) if adopt => {
            log::warn!(
                "{} has lost its label, and is the volume {id} again that its clones know",
                store.url
            );
            Ok(Some(*id))
        }
        id => Err(lost(store, id.copied(), is_clone)),
    }
}

/// What the place of a clone says of its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    /// There is no such clone: it is not made yet, or was given up or flattened.
    NoClone,
    /// That is its id.
    Is(VolumeId),
    /// Nothing: it is not reached, or speaks of a volume at another place, which may be this one by another name.
    Nothing,
}

impl Said {
    fn id(self) -> Option<VolumeId> {
        match self {
            Self::Is(id) => Some(id),
            Self::NoClone | Self::Nothing => None,
        }
    }
}

async fn ask(store: &Store, clone: &Child, record: Option<&ChildRecord>) -> Said {
    let Some(url) = record.and_then(|record| VolumeUrl::parse(&record.url).ok()) else {
        return Said::Nothing;
    };
    let Ok(place) = store.at(&url).await else {
        return Said::Nothing;
    };
    match origin::load(&place).await {
        Ok(None) => Said::NoClone,
        Ok(Some(origin)) if origin.child() != *clone => Said::NoClone,
        Ok(Some(origin)) if origin.parent().url.0 == store.url => Said::Is(origin.parent().volume_id),
        Ok(Some(_)) | Err(_) => Said::Nothing,
    }
}

fn lost(store: &Store, id: Option<VolumeId>, is_clone: bool) -> VolumeError {
    let put_back = "put it back from a backup or from the bucket's versions";
    let children = store.meta_key(children::CHILDREN);
    let reason = match (id, is_clone) {
        (Some(id), _) => format!(
            "it is not there, and the clones of {} know the volume by the id {id} that was in it: {put_back}, or open the volume for \
             writing once with adopt=yes, which gives it this id",
            store.url
        ),
        (None, true) => format!(
            "it is not there, and said that {} is a clone, which has clones of its own: {put_back}",
            store.url
        ),
        (None, false) => format!(
            "it is not there, and clones of {} know the volume by the id that was in it, which none of them tells: {put_back}; if the \
             clones are no more, or those of a volume that this one is a copy of, delete what is below {children}",
            store.url
        ),
    };
    VolumeError::Corrupt {
        what: format!("the label {}", store.meta_key(label::NAME)),
        reason,
    }
}
