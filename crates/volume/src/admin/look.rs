//! The look at a volume that comes before anything is written to it, in one round trip.

use futures::{join, try_join};

use super::info;
use super::label::{self, Label};
use crate::engine::{StoredState, inode};
use crate::error::VolumeError;
use crate::lease;
use crate::lease::state::Stored;
use crate::log::marker::{self, MarkerState};
use crate::options::StoreOptions;
use crate::store::{self, Store, probe};
use crate::url::VolumeUrl;

/// What a look at a volume found. That there is one means that the volume exists.
#[derive(Debug)]
pub(crate) struct Looked {
    /// Where the volume is.
    pub store: Store,
    /// What was published then.
    pub newest: StoredState,
    /// Its lease, if there is one.
    pub lease: Option<Stored>,
    /// The marker of its log, if there is one. It may be another once the lease is taken.
    pub marker: Result<Option<MarkerState>, VolumeError>,
    label: Option<Label>,
    is_store_proved: bool,
}

/// Looks at the volume. Everything is asked for at once, before it is known that the store answers, and nothing is
/// changed.
///
/// # Errors
/// What [`store::connect`] says, before all else; [`VolumeError::NotFound`] when there is no volume.
pub(crate) async fn look(url: &VolumeUrl, options: &StoreOptions) -> Result<Looked, VolumeError> {
    let store = store::unproved(url, options).await?;
    let asked = async {
        let asked = join!(
            inode::load(&store),
            label::load(&store),
            lease::stored(&store),
            marker::load(&store),
            probe::has_passed(&store),
        );
        Ok(asked)
    };
    // The check of the store first: its errors say best what is wrong.
    let ((), (inode, label, lease, marker, is_store_proved)) = try_join!(store.check(), asked)?;
    let (inode, _) = inode?;
    info::meta_of(&inode, url)?;
    Ok(Looked {
        newest: StoredState::of_inode(&inode),
        lease: lease?,
        label: label?,
        marker: marker.map(|found| found.map(|(marker, _)| marker)),
        is_store_proved: is_store_proved.unwrap_or(false),
        store,
    })
}

/// What an open may start from that comes some time after a look: it holds as long as the lease is still that one,
/// because nobody changes or deletes a volume without taking the lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    pub(crate) volume_id: String,
    pub(crate) newest: StoredState,
    pub(crate) lease: Stored,
}

impl Looked {
    /// What is handed on to an open, if the volume has a label and a lease already.
    pub fn sighting(&self) -> Option<Sighting> {
        Some(Sighting {
            volume_id: self.volume_id()?,
            newest: self.newest,
            lease: self.lease.clone()?,
        })
    }

    /// Makes sure that the store keeps what a volume needs of it, before the first write.
    ///
    /// # Errors
    /// As [`probe::ensure`].
    pub async fn ensure_safe(&self, allow_unsafe: bool) -> Result<(), VolumeError> {
        if self.is_store_proved {
            return Ok(());
        }
        probe::ensure(&self.store, allow_unsafe).await
    }

    /// The volume's id, if it has a label.
    pub fn volume_id(&self) -> Option<String> {
        self.label.as_ref().map(|l| l.volume_id.clone())
    }

    /// The volume's id; makes the label that is missing.
    ///
    /// # Errors
    /// As [`label::ensure`].
    pub async fn ensure_volume_id(&self) -> Result<String, VolumeError> {
        match self.volume_id() {
            Some(id) => Ok(id),
            None => Ok(label::ensure(&self.store).await?.volume_id),
        }
    }
}
