//! Reading a checkpoint that others may remove: pin it, then check that it stays. It stays with its volume alone: of one that is deleted,
//! and made anew at its address, nothing more is read.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::future::join_all;
use futures::try_join;
use log::warn;
use tokio::time::sleep;

use super::{load_policy, pins, plan};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::base::volume_id::VolumeId;
use crate::format::inode;
use crate::meta::{checkpoint_list, label, snapshots};
use crate::store::Store;
use crate::store::continuity::Expected;

/// How often the entry of a checkpoint that was published just now is requested; below, the wait between the requests.
const ENTRY_WAITS: u32 = 50;
const ENTRY_WAIT: Duration = Duration::from_millis(100);

/// A checkpoint that is being read. It stays as long as this value exists and the store can be reached.
#[derive(Debug, Default)]
pub(crate) struct Reading(Option<Arc<pins::HeldPin>>);

impl Reading {
    /// Begins to read a checkpoint. It is pinned even if nothing is removed now, because that may change at any time.
    /// If no pin can be put, as with keys that may only read, the checkpoint is read without one, with a warning if
    /// something may be removed.
    ///
    /// # Errors
    /// [`VolumeError::NoCheckpoint`] when it is being removed, or is gone.
    pub async fn begin(store: &Store, id: CheckpointId) -> Result<Self, VolumeError> {
        let pin = match pins::put(store, id, pins::TIME_TO_LIVE).await {
            Ok(pin) => Some(pin),
            Err(e) => {
                if load_policy(store).await?.is_some() {
                    warn!(
                        "checkpoint {} of {} is read without a pin, and reads fail once its retention removes it: {}",
                        id.cno,
                        store.url,
                        e.chain()
                    );
                }
                None
            }
        };
        let reading = Self(pin);
        let ready = async {
            // Before the entry, which shows that the volume whose label was read is the one that has the checkpoint.
            reading.expect_volume(store).await?;
            try_join!(ensure_readable(store, id), ensure_shares(store))
        };
        match ready.await {
            Ok(_) => Ok(reading),
            Err(e) => {
                reading.end().await;
                Err(e)
            }
        }
    }

    /// From now on data of a volume that is made at the same place is not taken for this one's. One without a label has nothing by
    /// which it could be told.
    async fn expect_volume(&self, store: &Store) -> Result<(), VolumeError> {
        let inode = store.data_key(inode::NAME);
        // The label comes after what tells the time: what was written before that is the volume's then.
        let seen = store
            .head(self.0.as_ref().map_or(inode.as_str(), |pin| pin.key()))
            .await?;
        let seen = seen.map_or(SystemTime::UNIX_EPOCH, |seen| seen.last_modified);
        let expect = |store: &Store, volume_id: VolumeId| {
            store.expect_here(Expected {
                identity: volume_id.to_string(),
                key: store.meta_key(label::NAME),
                is_of: label::is_of,
                seen,
            });
        };
        if let Some(label) = label::load(store).await? {
            expect(store, label.volume_id);
        }
        // Once a clone was flattened its parents may go, too, and who is not pinned any more reads on there.
        let parents = store.lineage().inherited().iter().map(|part| async move {
            // What cannot be read says nothing, as where it was connected.
            let label = label::load(&part.store).await.ok().flatten();
            (part, label)
        });
        for (part, label) in join_all(parents).await {
            if label.is_some_and(|label| label.volume_id == part.volume_id) {
                expect(&part.store, part.volume_id);
            }
        }
        Ok(())
    }

    /// Whether a pin could be put.
    pub fn is_pinned(&self) -> bool {
        self.0.is_some()
    }

    /// Ends the reading and removes the pin.
    pub async fn end(&self) {
        if let Some(pin) = &self.0 {
            pin.remove().await;
        }
    }
}

/// Refuses a clone that was flattened since its parents were connected: they need keep nothing for it any more. Who flattens it looks at
/// the pins once the label is put, and here it is the other way round.
pub(crate) async fn ensure_shares(store: &Store) -> Result<(), VolumeError> {
    if store.lineage().pass().is_none() || label::load(store).await?.is_some_and(|label| label.is_clone) {
        return Ok(());
    }
    Err(VolumeError::InvalidInput(format!(
        "{} was flattened, or deleted, meanwhile: try again",
        store.url
    )))
}

/// As [`ensure_kept`], for a checkpoint of another tool, which may have a name and no entry.
///
/// # Errors
/// As [`ensure_kept`].
pub(crate) async fn ensure_readable(store: &Store, id: CheckpointId) -> Result<(), VolumeError> {
    match ensure_kept(store, id).await {
        Err(VolumeError::NoCheckpoint { .. })
            if is_planned_to_stay(store, id).await?
                && checkpoint_list::load_entry(store, id.cno).await?.is_none() =>
        {
            let names = snapshots::load_all(store).await?;
            match names.iter().any(|name| name.checkpoint == id) {
                true => Ok(()),
                false => Err(gone(store, id)),
            }
        }
        other => other,
    }
}

fn gone(store: &Store, id: CheckpointId) -> VolumeError {
    VolumeError::NoCheckpoint {
        url: store.url.to_string(),
        at: format!("@{}, which its retention removes", id.cno),
    }
}

/// Whether the plan keeps the checkpoint.
async fn is_planned_to_stay(store: &Store, id: CheckpointId) -> Result<bool, VolumeError> {
    let plan = plan::load(store).await?.map(|(plan, _)| plan);
    let Some(plan) = plan.filter(|plan| !plan.keeps(id.cno)) else {
        return Ok(true);
    };
    let (newest, _) = inode::load(store).await?;
    Ok(!plan.is_of(newest.i_last_cno))
}

/// Checks that a checkpoint stays, as far as the plan says: the plan is read first, and then the checkpoint's entry.
/// The caller must have put a pin or a name before.
///
/// # Errors
/// [`VolumeError::NoCheckpoint`] when it is being removed, or is gone.
pub(crate) async fn ensure_kept(store: &Store, id: CheckpointId) -> Result<(), VolumeError> {
    let gone = || gone(store, id);
    if !is_planned_to_stay(store, id).await? {
        return Err(gone());
    }
    if id.cno == 0 {
        return Ok(());
    }
    for _ in 0..ENTRY_WAITS {
        match checkpoint_list::load_entry(store, id.cno).await? {
            Some(entry) if entry.is_of(id) != Some(false) => return Ok(()),
            Some(_) => return Err(gone()),
            None => {}
        }
        let (newest, _) = inode::load(store).await?;
        if CheckpointId::of_inode(&newest) == id {
            return Ok(());
        }
        // Either it was the newest a moment ago and its entry is still being written, or it is gone.
        if checkpoint_list::numbers_after(store, id.cno).await?.len() > 1 {
            return Err(gone());
        }
        sleep(ENTRY_WAIT).await;
    }
    Err(gone())
}
