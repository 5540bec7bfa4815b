//! Checkpoints that somebody reads: one object for each, `<root>.meta/retention/pins/<id>`, which is put again as long
//! as it is needed.
//!
//! Only the store's clock decides whether a pin has run out: by when the pin was written, and when something else was.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use futures::stream::{self, StreamExt, TryStreamExt};
use log::{debug, warn};
use serde::{Deserialize, Serialize};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::plan;
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::base::stored_text;
use crate::store::Store;

/// The prefix of pins, below the volume's `.meta/`.
const PINS: &str = "retention/pins/";
/// How long a pin is valid unless it is put again.
pub(crate) const TIME_TO_LIVE: Duration = Duration::from_secs(15 * 60);
/// How long after it ran out others may remove a pin.
const REMOVED_AFTER: Duration = Duration::from_secs(24 * 3600);
/// The longest validity that a stored pin may ask for.
const TIME_TO_LIVE_MAX: Duration = Duration::from_secs(24 * 3600);
/// How often a pin is put again during its validity.
const RENEWALS: u32 = 3;
/// How often the clock is looked at between two renewals.
const LOOKS: u32 = 30;
const READS_AT_ONCE: usize = 32;

/// A stored pin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pin {
    /// The checkpoint.
    pub checkpoint: CheckpointId,
    /// Who reads it, for people.
    #[serde(deserialize_with = "stored_text::printable")]
    pub reader: String,
    /// How long it is valid after it was written, in milliseconds.
    pub ttl_ms: u64,
}

impl Pin {
    /// Decodes a pin.
    ///
    /// # Errors
    /// A text that says what is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|e| e.to_string())
    }

    fn holds_until(&self, written: SystemTime) -> SystemTime {
        let ttl = Duration::from_millis(self.ttl_ms).min(TIME_TO_LIVE_MAX);
        // Some stores report whole seconds.
        written + ttl + Duration::from_secs(1)
    }
}

/// A pin of this process. It is put again until it is dropped. [`HeldPin::remove`] removes it at once.
#[derive(Debug)]
pub(crate) struct HeldPin {
    store: Store,
    key: String,
    renewing: AbortHandle,
    is_removed: AtomicBool,
}

impl HeldPin {
    /// The key of its object.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Removes the pin.
    pub async fn remove(&self) {
        self.renewing.abort();
        self.is_removed.store(true, Ordering::Relaxed);
        remove(&self.store, &self.key).await;
    }
}

async fn remove(store: &Store, key: &str) {
    if let Err(e) = store.delete(key).await {
        debug!("the pin {key} stays until it runs out: {e}");
    }
}

impl Drop for HeldPin {
    fn drop(&mut self) {
        self.renewing.abort();
        // Whoever was to read has given up before it began.
        if let Ok(runtime) = Handle::try_current()
            && !self.is_removed.load(Ordering::Relaxed)
        {
            let (store, key) = (self.store.clone(), self.key.clone());
            runtime.spawn(async move { remove(&store, &key).await });
        }
    }
}

/// Puts a pin on a checkpoint, and puts it again in time. The caller must read the plan afterwards.
///
/// # Errors
/// When the store fails.
pub(crate) async fn put(
    store: &Store,
    checkpoint: CheckpointId,
    ttl: Duration,
) -> Result<Arc<HeldPin>, VolumeError> {
    let pin = Pin {
        checkpoint,
        reader: format!(
            "{}, process {}",
            crate::meta::wal_marker::host(),
            std::process::id()
        ),
        ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
    };
    let key = store.meta_key(&format!("{PINS}{}", uuid::Uuid::new_v4().simple()));
    let body = serde_json::to_vec(&pin).map_err(|e| VolumeError::Internal(e.to_string()))?;
    store.put(&key, body.clone()).await?;
    let renewing = tokio::spawn(renew(store.clone(), key.clone(), pin, ttl, body));
    Ok(Arc::new(HeldPin {
        store: store.clone(),
        key,
        renewing: renewing.abort_handle(),
        is_removed: AtomicBool::new(false),
    }))
}

/// Puts a pin again and again, as long as its volume is there. Time is also told by the wall clock, because the other one stands still while the machine sleeps.
async fn renew(store: Store, key: String, pin: Pin, ttl: Duration, body: Vec<u8>) {
    let every = ttl / RENEWALS;
    let mut renewed = SystemTime::now();
    loop {
        let mut slept = Duration::ZERO;
        let mut since = Duration::ZERO;
        while slept < every && since < every {
            tokio::time::sleep(every / LOOKS).await;
            slept += every / LOOKS;
            since = renewed.elapsed().unwrap_or_default();
        }
        // A pin would be left over from a deletion, or lie in the volume that was made at its place.
        if let Err(e) = store.ensure_continues().await
            && store.is_over()
        {
            warn!("checkpoint {} is not pinned any more: {e}", pin.checkpoint);
            return;
        }
        let put = store.put(&key, body.clone()).await;
        match put {
            Ok(_) if since > ttl => {
                if let Err(e) = super::reading::ensure_readable(&store, pin.checkpoint).await {
                    warn!(
                        "this machine did not run for {} s, and checkpoint {}, which is read here, may be removed since: {}",
                        since.as_secs(),
                        pin.checkpoint,
                        e.chain()
                    );
                }
                renewed = SystemTime::now();
            }
            Ok(_) => renewed = SystemTime::now(),
            Err(e) => warn!(
                "the pin on checkpoint {} could not be renewed, and is tried again: {e}",
                pin.checkpoint
            ),
        }
    }
}

/// What happens to pins that are of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unusable {
    /// They are skipped. For callers that change nothing.
    Skip,
    /// A pin that cannot be read is an error, because its checkpoint must not be removed.
    Refuse,
    /// The same, and pins that ran out long ago are removed. For callers that have just written the plan: by one that was written while
    /// the store's clock was ahead, every pin would have run out long ago, also of those who read at this moment.
    Clear,
}

/// The checkpoints that have valid pins. A pin that had run out, by the store's clock, when the plan was last written
/// is left out.
///
/// # Errors
/// When the store fails; when a pin that was written recently is damaged, unless such pins are skipped.
pub(crate) async fn checkpoints(store: &Store, unusable: Unusable) -> Result<Vec<CheckpointId>, VolumeError> {
    let written_now = plan::written(store).await?;
    let listed = store.list(&store.meta_key(PINS)).await?;
    let read = stream::iter(listed).map(|object| async move {
        let Some((body, _)) = store.get(&object.key).await? else {
            return Ok(None);
        };
        let until = match Pin::decode(&body) {
            Ok(pin) if written_now <= pin.holds_until(object.last_modified) => {
                return Ok(Some(pin.checkpoint));
            }
            Ok(pin) => pin.holds_until(object.last_modified),
            Err(reason) => {
                let until = object.last_modified + TIME_TO_LIVE_MAX;
                if unusable != Unusable::Skip && written_now <= until {
                    return Err(VolumeError::Corrupt {
                        what: format!("the pin {}", object.key),
                        reason: format!("{reason}; nothing is removed for a day, unless you delete it"),
                    });
                }
                until
            }
        };
        if unusable == Unusable::Clear && written_now > until + REMOVED_AFTER {
            store.delete(&object.key).await?;
        }
        Ok::<_, VolumeError>(None)
    });
    let read: Vec<Option<CheckpointId>> = read.buffer_unordered(READS_AT_ONCE).try_collect().await?;
    Ok(read.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;
    use crate::base::url::VolumeUrl;
    use crate::store::continuity::Expected;
    use crate::store::{connect_for_create, options::StoreOptions};

    const LIMIT: Duration = Duration::from_secs(120);

    /// It would be left over from the deletion, or lie in another volume.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_pin_of_a_volume_that_is_gone_is_not_put_again() {
        let dir = tempfile::tempdir().unwrap();
        let url = VolumeUrl::File {
            path: dir.path().join("vol"),
        };
        let store = connect_for_create(&url, &StoreOptions::default()).await.unwrap();
        store.expect_here(Expected {
            identity: "one".to_owned(),
            key: store.meta_key("who"),
            is_of: |body, identity| Some(body == identity.as_bytes()),
            seen: SystemTime::now(),
        });
        let id = CheckpointId {
            cno: 1,
            check: InodeCheck::from_bits(1),
        };
        let pin = put(&store, id, Duration::from_millis(30)).await.unwrap();
        store.delete(pin.key()).await.unwrap();
        let is_given_up = async {
            while !pin.renewing.is_finished() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, is_given_up)
            .await
            .expect("it is put again and again");
        assert!(store.get(pin.key()).await.unwrap().is_none());
    }
}
