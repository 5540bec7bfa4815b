//! Reading a checkpoint while others may remove it: pin it, then look whether it stays.

use std::sync::Arc;
use std::time::Duration;

use log::{debug, warn};
use parking_lot::Mutex;
use tokio::task::AbortHandle;
use tokio::time::sleep;

use super::{load_policy, pins, plan};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::{ErrorKind, VolumeError};
use crate::format::inode;
use crate::meta::{checkpoint_list, snapshots};
use crate::store::Store;

/// How often a reader of a volume of which nothing is removed looks whether that has changed.
const LOOKED_EVERY: Duration = Duration::from_secs(5 * 60);
/// How long the entry of a checkpoint that was published a moment ago is waited for, and how often it is asked for.
const ENTRY_WAITS: u32 = 50;
const ENTRY_WAIT: Duration = Duration::from_millis(100);

/// A checkpoint that is being read. It stays as long as this is there and the store is reached.
#[derive(Debug, Default)]
pub(crate) struct Reading {
    pin: Arc<Mutex<Option<Arc<pins::Held>>>>,
    watching: Option<AbortHandle>,
}

impl Reading {
    /// Begins to read a checkpoint. Where nothing is ever removed, nothing is written; where it may not be written, the checkpoint is
    /// read without a pin, and a warning says so.
    ///
    /// # Errors
    /// [`VolumeError::NoCheckpoint`] when it goes, or is gone.
    pub async fn begin(store: &Store, id: CheckpointId) -> Result<Self, VolumeError> {
        let mut reading = Self::default();
        if load_policy(store).await?.is_none() {
            ensure_readable(store, id).await?;
            let watching = tokio::spawn(watch(store.clone(), id, reading.pin.clone(), LOOKED_EVERY));
            reading.watching = Some(watching.abort_handle());
            return Ok(reading);
        }
        *reading.pin.lock() = pin(store, id).await?;
        match ensure_readable(store, id).await {
            Ok(()) => Ok(reading),
            Err(e) => {
                reading.end().await;
                Err(e)
            }
        }
    }

    /// Ends it.
    pub async fn end(&self) {
        if let Some(watching) = &self.watching {
            watching.abort();
        }
        let pin = self.pin.lock().take();
        if let Some(pin) = pin {
            pin.remove().await;
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        if let Some(watching) = &self.watching {
            watching.abort();
        }
    }
}

/// Pins a checkpoint, unless these keys may not.
async fn pin(store: &Store, id: CheckpointId) -> Result<Option<Arc<pins::Held>>, VolumeError> {
    match pins::put(store, id, pins::TIME_TO_LIVE).await {
        Ok(pin) => Ok(Some(pin)),
        Err(e) if e.kind() == ErrorKind::AccessDenied => {
            warn!(
                "checkpoint {} of {} is read without a pin, which these keys may not put: reads fail once its retention removes it",
                id.cno, store.url
            );
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Pins a checkpoint once the volume has a policy.
async fn watch(
    store: Store,
    id: CheckpointId,
    place: Arc<Mutex<Option<Arc<pins::Held>>>>,
    interval: Duration,
) {
    loop {
        sleep(interval).await;
        let pinned = async {
            Ok::<_, VolumeError>(match load_policy(&store).await? {
                Some(_) => Some(pin(&store, id).await?),
                None => None,
            })
        };
        match pinned.await {
            Ok(None) => {}
            Ok(Some(pin)) => {
                *place.lock() = pin;
                return;
            }
            Err(e) => debug!("whether {} has a retention policy cannot be told: {e}", store.url),
        }
    }
}

/// As [`ensure_kept`], of a checkpoint that may have no entry but a name: one that another tool published.
async fn ensure_readable(store: &Store, id: CheckpointId) -> Result<(), VolumeError> {
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

/// Whether the plan lets it stay.
async fn is_planned_to_stay(store: &Store, id: CheckpointId) -> Result<bool, VolumeError> {
    let plan = plan::load(store).await?.map(|(plan, _)| plan);
    let Some(plan) = plan.filter(|plan| !plan.keeps(id.cno)) else {
        return Ok(true);
    };
    let (newest, _) = inode::load(store).await?;
    Ok(!plan.is_of(newest.i_last_cno))
}

/// Whether a checkpoint stays, as far as the plan tells: the plan is read first, its entry afterwards. Whoever wants it to stay has
/// put a pin or a name before.
///
/// # Errors
/// [`VolumeError::NoCheckpoint`] when it goes, or is gone.
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
        // It was the newest a moment ago, and its entry is on its way; or it is gone.
        if checkpoint_list::numbers_after(store, id.cno).await?.len() > 1 {
            return Err(gone());
        }
        sleep(ENTRY_WAIT).await;
    }
    Err(gone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;
    use crate::base::url::VolumeUrl;
    use crate::retention::{Policy, put_policy};
    use crate::store;
    use crate::store::options::StoreOptions;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_reader_pins_what_it_reads_once_something_may_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
        let store = store::connect_for_create(&url, &StoreOptions::default())
            .await
            .unwrap();
        let id = CheckpointId {
            cno: 7,
            check: InodeCheck::from_bits(7),
        };
        let place: Arc<Mutex<Option<Arc<pins::Held>>>> = Arc::default();
        let watching = tokio::spawn(watch(store.clone(), id, place.clone(), Duration::from_millis(10)));
        sleep(Duration::from_millis(100)).await;
        assert!(pins::checkpoints(&store).await.unwrap().is_empty());
        put_policy(&store, &Policy::of_new_volumes()).await.unwrap();
        watching.await.unwrap();
        assert_eq!(pins::checkpoints(&store).await.unwrap(), [id]);
        assert!(place.lock().is_some());
    }
}
