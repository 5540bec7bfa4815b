//! Reading a checkpoint while others may remove it: pin it, then look whether it stays.

use std::sync::Arc;

use log::warn;

use super::{load_policy, pins, plan};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::ErrorKind;
use crate::base::error::VolumeError;
use crate::format::inode;
use crate::meta::checkpoint_list;
use crate::store::Store;

/// A checkpoint that is being read. It stays as long as this is there and the store is reached.
#[derive(Debug, Default)]
pub(crate) struct Reading(Option<Arc<pins::Held>>);

impl Reading {
    /// Begins to read a checkpoint. Where nothing is ever removed, nothing is written; where it may not be written, the checkpoint is
    /// read without a pin, and a warning says so.
    ///
    /// # Errors
    /// [`VolumeError::NoCheckpoint`] when it goes, or is gone.
    pub async fn begin(store: &Store, id: CheckpointId) -> Result<Self, VolumeError> {
        if load_policy(store).await?.is_none() {
            ensure_kept(store, id).await?;
            return Ok(Self::default());
        }
        let pin = match pins::put(store, id, pins::TIME_TO_LIVE).await {
            Ok(pin) => Some(pin),
            Err(e) if e.kind() == ErrorKind::AccessDenied => {
                warn!(
                    "checkpoint {} of {} is read without a pin, which these keys may not put: reads fail once its retention \
                     removes it",
                    id.cno, store.url
                );
                None
            }
            Err(e) => return Err(e),
        };
        let reading = Self(pin);
        match ensure_kept(store, id).await {
            Ok(()) => Ok(reading),
            Err(e) => {
                reading.end().await;
                Err(e)
            }
        }
    }

    /// Ends it.
    pub async fn end(&self) {
        if let Some(pin) = &self.0 {
            pin.remove().await;
        }
    }
}

/// Whether a checkpoint stays, as far as the plan tells: the plan is read first, its entry afterwards. Whoever wants it to stay has
/// put a pin or a name before.
///
/// # Errors
/// [`VolumeError::NoCheckpoint`] when it goes, or is gone.
pub(crate) async fn ensure_kept(store: &Store, id: CheckpointId) -> Result<(), VolumeError> {
    let gone = || VolumeError::NoCheckpoint {
        url: store.url.to_string(),
        at: format!("@{}, which its retention removes", id.cno),
    };
    if let Some((plan, _)) = plan::load(store).await?
        && !plan.keeps(id.cno)
    {
        return Err(gone());
    }
    match checkpoint_list::load_entry(store, id.cno).await? {
        Some(entry) if entry.is_of(id) != Some(false) => Ok(()),
        Some(_) => Err(gone()),
        None => {
            // The newest one's entry may be on its way.
            let (newest, _) = inode::load(store).await?;
            match CheckpointId::of_inode(&newest) == id || id.cno == 0 {
                true => Ok(()),
                false => Err(gone()),
            }
        }
    }
}
