//! The catalogue of published checkpoints: one small create-only object each, `<root>.meta/checkpoints/<cno>`.
//!
//! The container's own objects do not tell what was really published (a failed publish leaves objects that look
//! alike), so this is the list to trust. Without a log nobody waits for an entry; an entry missing at the end is
//! added when the volume is opened.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use log::warn;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::engine::Checkpoint;
use crate::error::VolumeError;
use crate::store::{Store, StoreErrorKind};

/// One published checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogueEntry {
    /// Number of the checkpoint in the container.
    pub cno: u64,
    /// When it was published, in milliseconds since 1970-01-01 UTC, by the server's clock.
    pub published_ms: u64,
    /// Size of the volume at it, in bytes.
    pub size_bytes: u64,
    /// The owner's epoch.
    pub epoch: u64,
    /// Whether the entry was added later, by an open that found it missing; its time is then the container's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_repaired: bool,
}

/// Told of every publish. Must not block.
pub trait Recorder: Send + Sync {
    /// A checkpoint was published.
    fn published(&self, checkpoint: Checkpoint);
}

/// Records nothing.
#[derive(Debug, Clone, Copy)]
pub struct NoRecorder;

impl Recorder for NoRecorder {
    fn published(&self, _: Checkpoint) {}
}

/// The key of an entry below the volume's `.meta/`.
pub fn entry_name(cno: u64) -> String {
    format!("checkpoints/{cno:010}")
}

enum Message {
    Entry(CatalogueEntry),
    Finish(oneshot::Sender<()>),
}

/// Writes entries behind the publishes, in order.
#[derive(Debug)]
pub struct Catalogue {
    messages: mpsc::UnboundedSender<Message>,
    epoch: u64,
}

impl Catalogue {
    /// Starts the writer on the current runtime.
    pub fn start(store: Store, epoch: u64) -> Arc<Self> {
        let (messages, mut inbox) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(message) = inbox.recv().await {
                match message {
                    Message::Entry(entry) => {
                        if let Err(e) = write_entry(&store, &entry).await {
                            // Not fatal: the next open adds the newest one.
                            warn!(
                                "checkpoint {} is published but not in the catalogue: {e}",
                                entry.cno
                            );
                        }
                    }
                    Message::Finish(done) => {
                        let _ = done.send(());
                        return;
                    }
                }
            }
        });
        Arc::new(Self { messages, epoch })
    }

    /// Waits until all entries are written; takes none afterwards.
    pub async fn finish(&self) {
        let (done, wait) = oneshot::channel();
        if self.messages.send(Message::Finish(done)).is_ok() {
            let _ = wait.await;
        }
    }
}

impl Recorder for Catalogue {
    fn published(&self, checkpoint: Checkpoint) {
        let entry = CatalogueEntry {
            cno: checkpoint.cno,
            published_ms: now_ms(),
            size_bytes: checkpoint.size_bytes,
            epoch: self.epoch,
            is_repaired: false,
        };
        let _ = self.messages.send(Message::Entry(entry));
    }
}

/// The entry of a checkpoint, if there is one. Entries never change.
///
/// # Errors
/// When the store fails.
pub async fn load(store: &Store, cno: u64) -> Result<Option<CatalogueEntry>, VolumeError> {
    let key = store.meta_key(&entry_name(cno));
    let Some((body, _)) = store.get(&key).await? else {
        return Ok(None);
    };
    serde_json::from_slice(&body)
        .map(Some)
        .map_err(|e| VolumeError::Corrupt {
            what: format!("the catalogue's entry {key}"),
            reason: e.to_string(),
        })
}

/// Adds the entry of the newest published checkpoint when it is missing: the server that published it was killed
/// before it could. `seen` is an entry that was loaded before, perhaps that one.
///
/// # Errors
/// When the store fails.
pub async fn repair(
    store: &Store,
    newest: Checkpoint,
    modified_ms: u64,
    epoch: u64,
    seen: Option<CatalogueEntry>,
) -> Result<(), VolumeError> {
    if newest.cno == 0 || seen.is_some_and(|seen| seen.cno == newest.cno) {
        return Ok(());
    }
    // Create-only: where there is one, this does nothing.
    let entry = CatalogueEntry {
        cno: newest.cno,
        published_ms: modified_ms,
        size_bytes: newest.size_bytes,
        epoch,
        is_repaired: true,
    };
    write_entry(store, &entry).await
}

/// The epoch of the newest checkpoint; 0 where there is none. For a volume whose lease is gone.
///
/// # Errors
/// When the store fails.
pub async fn newest_epoch(store: &Store) -> Result<u64, VolumeError> {
    let entries = store.list(&store.meta_key("checkpoints/")).await?;
    for entry in entries.iter().rev() {
        if let Some((body, _)) = store.get(&entry.key).await?
            && let Ok(entry) = serde_json::from_slice::<CatalogueEntry>(&body)
        {
            return Ok(entry.epoch);
        }
    }
    Ok(0)
}

async fn write_entry(store: &Store, entry: &CatalogueEntry) -> Result<(), VolumeError> {
    let body = serde_json::to_vec(entry).map_err(|e| VolumeError::Internal(e.to_string()))?;
    match store
        .put_create_only(&store.meta_key(&entry_name(entry.cno)), body)
        .await
    {
        // An earlier attempt's answer was lost; the entry is there.
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Ok(()),
        other => Ok(other.map(|_| ())?),
    }
}

fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_millis() as u64)
}
