//! The inspection of a volume before anything is written to it, in one round trip.

use futures::future::BoxFuture;
use futures::{FutureExt, join, try_join};

use crate::base::checkpoint_id::InodeCheck;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::base::wal_place::WalPlace;
use crate::engine::parents;
use crate::format::inode as stored_inode;
use crate::format::stored_state::StoredState;
use crate::lease;
use crate::lease::sighting::Sighting;
use crate::lease::state::Stored;
use crate::meta::label::{self, Found, Label, Unpublished};
use crate::meta::origin::Origin;
use crate::meta::wal_marker::{self, MarkerState};
use crate::open::recover_wal::Wanted;
use crate::options::StoreOptions;
use crate::store::{self, Store, probe};

/// The result of an inspection. It exists only for a volume that exists.
#[derive(Debug)]
pub(crate) struct Inspection {
    /// The volume's store.
    pub store: Store,
    /// The state that was published at that time.
    pub newest: StoredState,
    /// Its lease, if there is one.
    pub lease: Option<Stored>,
    /// The WAL marker, if there is one. Another may be stored by the time the lease is taken.
    pub marker: Result<Option<MarkerState>, VolumeError>,
    label: Option<Found>,
    /// Where a clone comes from.
    clone_of: Option<Origin>,
    is_store_proved: bool,
}

/// Inspects the volume. All requests are sent at once, before it is known that the store answers, and nothing is
/// changed.
///
/// # Errors
/// The errors of [`store::connect`] come before all others; [`VolumeError::NotFound`] when there is no volume.
pub(crate) fn inspect<'a>(
    url: &'a VolumeUrl,
    options: &'a StoreOptions,
) -> BoxFuture<'a, Result<Inspection, VolumeError>> {
    async move {
        let store = store::unproved(url, options).await?;
        let asked = async {
            let asked = join!(
                stored_inode::load(&store),
                label::find(&store),
                lease::stored(&store),
                wal_marker::load(&store),
                probe::has_passed(&store),
            );
            Ok(asked)
        };
        // The check of the store comes first, because its errors describe a fault best.
        let ((), (inode, label, lease, marker, is_store_proved)) = try_join!(store.check(), asked)?;
        let (inode, _) = inode?;
        let label = label?;
        let (store, clone_of) = parents::attach(&store, label.as_ref()).await?;
        Ok(Inspection {
            newest: StoredState::of_inode(&inode),
            lease: lease?,
            label,
            clone_of,
            marker: marker.map(|found| found.map(|(marker, _)| marker)),
            is_store_proved: is_store_proved.unwrap_or(false),
            store,
        })
    }
    .boxed()
}

impl Inspection {
    /// What an open can start from, if the volume already has a lease, and a label that need not be changed.
    pub fn sighting(&self) -> Option<Sighting> {
        let is_settled = self.label.as_ref().is_some_and(|found| {
            let label = &found.label;
            // The note of a deletion, and a replica's mark, must be removed before anything is written.
            label.deletion.is_none()
                && label.replica_of.is_none()
                && label.place.is_some()
                && (label.origin.is_some() || self.newest.state_id.cno > 0)
        });
        if !is_settled || self.is_elsewhere() {
            return None;
        }
        Some(Sighting {
            volume_id: self.volume_id()?,
            newest: self.newest,
            origin: self.origin(),
            parent: self.label.as_ref().and_then(|found| found.label.parent),
            lease: self.lease.clone()?,
            has_wal_beside: self.has_wal_beside()?,
            clone_of: self.clone_of.clone(),
        })
    }

    /// Whether records of a WAL beside the volume are to be replayed, if the marker could be read.
    fn has_wal_beside(&self) -> Option<bool> {
        let marker = self.marker.as_ref().ok()?;
        Some(Wanted::of(marker.as_ref(), None).place.is_some())
    }

    /// The WAL of an opening of what was seen.
    pub fn wal(&self, asked: Option<&WalPlace>) -> Wanted {
        Wanted::found(self.has_wal_beside().unwrap_or(false), asked)
    }

    /// Checks, before the first write, that the store has the properties that a volume needs.
    ///
    /// # Errors
    /// As [`probe::ensure`].
    pub async fn ensure_safe(&self, allow_unsafe: bool) -> Result<(), VolumeError> {
        if self.is_store_proved {
            return Ok(());
        }
        probe::ensure(&self.store, allow_unsafe).await
    }

    /// The check value of the inode of the container when it was created, if the label has it.
    pub fn origin(&self) -> Option<InodeCheck> {
        self.label.as_ref().and_then(|found| found.label.origin)
    }

    /// The volume's id, if it has a label.
    pub fn volume_id(&self) -> Option<VolumeId> {
        self.label.as_ref().map(|found| found.label.volume_id)
    }

    /// Whether the volume is a copy, or was moved, and was not opened for writing since.
    pub fn is_elsewhere(&self) -> bool {
        self.label.as_ref().is_some_and(Found::is_elsewhere)
    }

    /// Makes the volume's label, or updates it; see [`label::settle`].
    ///
    /// # Errors
    /// As [`label::settle`].
    pub async fn settle_label(&mut self, adopt: bool) -> Result<Label, VolumeError> {
        let newest = self.newest.id();
        let unpublished = (newest.cno == 0).then_some(Unpublished(newest.check));
        label::settle(&self.store, self.label.take(), unpublished, adopt).await
    }
}
