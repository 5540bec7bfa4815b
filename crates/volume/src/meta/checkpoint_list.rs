//! The catalogue of published checkpoints: one small create-only object each, `<root>.meta/checkpoints/<cno>`.
//!
//! The container's own objects do not tell what was really published (a failed publish leaves objects that look
//! alike), so this is the list to trust. Each entry carries the generation it holds, which is the watermark of the log:
//! with a log a publish is reported only once its entry is written ([`Watermarks`]). Without one nobody waits for an entry
//! ([`Catalogue`]); one missing at the end is added when the volume is opened.

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use futures::stream::{self, StreamExt, TryStreamExt};
use log::warn;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use crate::base::checkpoint_id::{Checkpoint, CheckpointId, InodeCheck, NewestCheckpoint};
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::meta::wal_marker::{self, Marker};
use crate::store::{ETag, ObjectEntry, Store};

/// What a checkpoint was made for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A change of what the volume holds, or of its size.
    #[default]
    Change,
    /// A relocation: the volume reads as at the checkpoint before.
    Relocation,
    /// Something that only later releases know.
    #[serde(other)]
    Other,
}

impl Kind {
    fn is_change(&self) -> bool {
        *self == Self::Change
    }
}

/// One published checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatalogueEntry {
    /// Number of the checkpoint in the container.
    pub cno: u64,
    /// What tells it from others of that number: an entry speaks for a container that has this very checkpoint. None in
    /// entries of earlier releases, until the first open of this one marks the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<InodeCheck>,
    /// When it was published, in milliseconds since 1970-01-01 UTC, by the server's clock.
    pub published_ms: u64,
    /// Size of the volume at it, in bytes.
    pub size_bytes: u64,
    /// The owner's epoch.
    #[serde(deserialize_with = "crate::base::counters::epoch")]
    pub epoch: u64,
    /// The generation it holds, and all before it: the watermark of the log. 0 in entries of releases without a log.
    #[serde(default, deserialize_with = "crate::base::counters::generation")]
    pub generation: u64,
    /// Whether the entry was added later, by an open that found it missing; its time is then the container's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_repaired: bool,
    /// What it was made for.
    #[serde(default, skip_serializing_if = "Kind::is_change")]
    pub kind: Kind,
}

/// Told of every publish.
#[async_trait]
pub trait Recorder: Send + Sync {
    /// A generation was published, as a checkpoint unless it changed nothing. The publish is reported to nobody before
    /// this returns.
    ///
    /// # Errors
    /// Only where the record is the watermark of a log: it is tried again as a publish is. [`VolumeError::Fenced`] when
    /// another owner has recorded the checkpoint.
    async fn published(&self, generation: u64, checkpoint: Option<Checkpoint>) -> Result<(), VolumeError>;

    /// A relocation was published as this checkpoint. It holds no other generation than the one before, `generation`.
    ///
    /// # Errors
    /// As [`Recorder::published`].
    async fn relocated(&self, generation: u64, checkpoint: Checkpoint) -> Result<(), VolumeError> {
        self.published(generation, Some(checkpoint)).await
    }
}

/// Records nothing.
#[derive(Debug, Clone, Copy)]
pub struct NoRecorder;

#[async_trait]
impl Recorder for NoRecorder {
    async fn published(&self, _: u64, _: Option<Checkpoint>) -> Result<(), VolumeError> {
        Ok(())
    }
}

/// Numbers that one request lists, most often: a page has 1,000 keys.
const PART_NUMBERS: u64 = 1000;
/// The most parts: numbers may be far apart.
const PARTS_MAX: u64 = 128;
/// Requests of one listing at once.
const LISTS_AT_ONCE: usize = 64;

/// Where the entries are, below the volume's `.meta/`.
pub(crate) const ENTRIES: &str = "checkpoints/";

/// The key of an entry below the volume's `.meta/`.
pub fn entry_name(cno: u64) -> String {
    format!("{ENTRIES}{cno:010}")
}

/// The numbers that have entries, ascending.
///
/// # Errors
/// When the store fails.
pub(crate) async fn numbers(store: &Store) -> Result<Vec<u64>, VolumeError> {
    let listed = store.list(&store.meta_key(ENTRIES)).await?;
    Ok(numbers_of(store, &listed))
}

/// The entries of checkpoints up to this number, ascending: as [`numbers`], with many requests at once, and when each entry was
/// written, by the store's clock.
///
/// # Errors
/// When the store fails.
pub(crate) async fn numbers_up_to(store: &Store, newest: u64) -> Result<Vec<(u64, SystemTime)>, VolumeError> {
    listed_in_parts(store, newest, PART_NUMBERS.max(newest.div_ceil(PARTS_MAX))).await
}

async fn listed_in_parts(
    store: &Store,
    newest: u64,
    part: u64,
) -> Result<Vec<(u64, SystemTime)>, VolumeError> {
    let key = |cno: u64| store.meta_key(&entry_name(cno));
    let prefix = store.meta_key(ENTRIES);
    let listed = stream::iter((0..newest).step_by(part as usize)).map(|from| {
        let (after, until) = (key(from), key((from + part).min(newest)));
        let prefix = &prefix;
        async move { store.list_between(prefix, &after, &until).await }
    });
    let listed: Vec<Vec<ObjectEntry>> = listed.buffered(LISTS_AT_ONCE).try_collect().await?;
    let numbered = listed.iter().flatten().filter_map(|object| {
        let number = numbers_of(store, std::slice::from_ref(object)).first().copied()?;
        Some((number, object.last_modified))
    });
    Ok(numbered.collect())
}

/// The numbers above `cno` that have entries, ascending.
///
/// # Errors
/// When the store fails.
pub(crate) async fn numbers_after(store: &Store, cno: u64) -> Result<Vec<u64>, VolumeError> {
    let after = store.meta_key(&entry_name(cno));
    let listed = store.list_after(&store.meta_key(ENTRIES), &after).await?;
    Ok(numbers_of(store, &listed))
}

/// The numbers of the entries among these objects.
pub(crate) fn numbers_of(store: &Store, listed: &[ObjectEntry]) -> Vec<u64> {
    let prefix = store.meta_key(ENTRIES);
    let name = |o: &ObjectEntry| Some(o.key.strip_prefix(&prefix)?.to_owned());
    // A name that entries do not have is somebody else's object.
    let number = |name: String| name.parse().ok().filter(|&n| entry_name(n).ends_with(&name));
    listed.iter().filter_map(name).filter_map(number).collect()
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
    newest: NewestCheckpoint,
}

impl Catalogue {
    /// Starts the writer on the current runtime. `newest` gets each checkpoint that is published.
    pub fn start(store: Store, epoch: u64, newest: NewestCheckpoint) -> Arc<Self> {
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
        Arc::new(Self {
            messages,
            epoch,
            newest,
        })
    }

    fn enter(&self, checkpoint: Checkpoint, generation: u64, kind: Kind) {
        let entry = CatalogueEntry::of(checkpoint, generation, self.epoch, kind);
        self.newest.record(checkpoint, entry.published_ms);
        let _ = self.messages.send(Message::Entry(entry));
    }

    /// Waits until all entries are written; takes none afterwards.
    pub async fn finish(&self) {
        let (done, wait) = oneshot::channel();
        if self.messages.send(Message::Finish(done)).is_ok() {
            let _ = wait.await;
        }
    }
}

#[async_trait]
impl Recorder for Catalogue {
    async fn published(&self, generation: u64, checkpoint: Option<Checkpoint>) -> Result<(), VolumeError> {
        if let Some(checkpoint) = checkpoint {
            self.enter(checkpoint, generation, Kind::Change);
        }
        Ok(())
    }

    async fn relocated(&self, generation: u64, checkpoint: Checkpoint) -> Result<(), VolumeError> {
        self.enter(checkpoint, generation, Kind::Relocation);
        Ok(())
    }
}

/// Writes entries before the publishes are reported: they are the watermark of a log.
#[derive(Debug)]
pub struct Watermarks {
    store: Store,
    epoch: u64,
    marker: Arc<Marker>,
}

impl Watermarks {
    /// For the owner of this epoch. `marker` takes the watermark of publishes that made no checkpoint.
    pub fn new(store: Store, epoch: u64, marker: Arc<Marker>) -> Self {
        Self { store, epoch, marker }
    }
}

#[async_trait]
impl Recorder for Watermarks {
    async fn published(&self, generation: u64, checkpoint: Option<Checkpoint>) -> Result<(), VolumeError> {
        match checkpoint {
            Some(checkpoint) => self.enter(checkpoint, generation, Kind::Change).await,
            None => self.marker.raise_watermark(generation).await,
        }
    }

    async fn relocated(&self, generation: u64, checkpoint: Checkpoint) -> Result<(), VolumeError> {
        self.enter(checkpoint, generation, Kind::Relocation).await
    }
}

impl Watermarks {
    async fn enter(&self, checkpoint: Checkpoint, generation: u64, kind: Kind) -> Result<(), VolumeError> {
        let entry = CatalogueEntry::of(checkpoint, generation, self.epoch, kind);
        if write_entry(&self.store, &entry).await? {
            self.marker.newest().record(checkpoint, entry.published_ms);
            return Ok(());
        }
        // An earlier attempt's answer was lost, or the next owner was faster: it has then replayed what this one would
        // now call published.
        match load_entry(&self.store, entry.cno).await? {
            Some(there)
                if there.generation == generation
                    && there.epoch == self.epoch
                    && there.check == entry.check
                    && !there.is_repaired =>
            {
                self.marker.newest().set(checkpoint.id);
                Ok(())
            }
            _ => Err(VolumeError::Fenced {
                reason: format!("checkpoint {} was recorded by another server", entry.cno),
            }),
        }
    }
}

impl CatalogueEntry {
    /// Reads an entry.
    ///
    /// # Errors
    /// What is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|e| e.to_string())
    }

    /// Of a checkpoint that was published a moment ago.
    pub(crate) fn of(checkpoint: Checkpoint, generation: u64, epoch: u64, kind: Kind) -> Self {
        Self {
            cno: checkpoint.id.cno,
            check: Some(checkpoint.id.check),
            published_ms: now_ms(),
            size_bytes: checkpoint.size_bytes,
            epoch,
            generation,
            is_repaired: false,
            kind,
        }
    }

    /// Whether it is the entry of this very checkpoint. `None` when it does not say: one of an earlier release.
    pub(crate) fn is_of(&self, id: CheckpointId) -> Option<bool> {
        self.check.map(|check| (self.cno, check) == (id.cno, id.check))
    }
}

/// The newest epoch that checkpoints and log tell of; 0 where there are none. For a volume whose lease is gone.
///
/// # Errors
/// When the store fails.
pub async fn newest_epoch(store: &Store) -> Result<u64, VolumeError> {
    // The log's owner may have published nothing yet.
    let of_log = wal_marker::load(store)
        .await?
        .map_or(0, |(marker, _)| marker.epoch);
    let entries = store.list(&store.meta_key(ENTRIES)).await?;
    for entry in entries.iter().rev() {
        if let Some((body, _)) = store.get(&entry.key).await?
            && let Ok(entry) = CatalogueEntry::decode(&body)
        {
            return Ok(entry.epoch.max(of_log));
        }
    }
    Ok(of_log)
}

/// The entry of a checkpoint, if there is one. Entries never change, but for the mark that one of an earlier release is
/// given.
///
/// # Errors
/// When the store fails, or the entry is not one.
pub(crate) async fn load_entry(store: &Store, cno: u64) -> Result<Option<CatalogueEntry>, VolumeError> {
    Ok(load_entry_with(store, cno).await?.map(|(entry, _)| entry))
}

/// As [`load_entry`], with what identifies the write of it.
///
/// # Errors
/// As [`load_entry`].
pub(crate) async fn load_entry_with(
    store: &Store,
    cno: u64,
) -> Result<Option<(CatalogueEntry, ETag)>, VolumeError> {
    let key = store.meta_key(&entry_name(cno));
    let Some((body, etag)) = store.get(&key).await? else {
        return Ok(None);
    };
    let corrupt = |reason: String| VolumeError::Corrupt {
        what: format!("the catalogue entry {key}"),
        reason,
    };
    let entry = CatalogueEntry::decode(&body).map_err(corrupt)?;
    if entry.cno != cno {
        return Err(corrupt(format!("it is that of checkpoint {}", entry.cno)));
    }
    Ok(Some((entry, etag)))
}

/// Puts `entry` in the place of the one of its number that was read with `before`; one that another owner changed stays.
///
/// # Errors
/// When the store fails.
pub(crate) async fn replace_entry(
    store: &Store,
    entry: &CatalogueEntry,
    before: &ETag,
) -> Result<(), VolumeError> {
    let body = serde_json::to_vec(entry).map_err(|e| VolumeError::Internal(e.to_string()))?;
    let key = store.meta_key(&entry_name(entry.cno));
    match store.put_if_match(&key, body, before).await {
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Ok(()),
        other => Ok(other.map(drop)?),
    }
}

/// `false` when there is an entry already.
pub(crate) async fn write_entry(store: &Store, entry: &CatalogueEntry) -> Result<bool, VolumeError> {
    let body = serde_json::to_vec(entry).map_err(|e| VolumeError::Internal(e.to_string()))?;
    match store
        .put_create_only(&store.meta_key(&entry_name(entry.cno)), body)
        .await
    {
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Ok(false),
        other => Ok(other.map(|_| true)?),
    }
}

#[cfg(test)]
#[path = "checkpoint_list_tests.rs"]
mod tests;
