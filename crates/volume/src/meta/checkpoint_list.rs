//! The list of published checkpoints: one small create-only object for each, `<root>.meta/checkpoints/<cno>`.
//!
//! The container's own objects do not show what was really published, because a failed publish leaves objects that look
//! alike. So this list is the one to trust. Each entry holds its checkpoint's generation, which is the watermark of the
//! WAL. With a WAL, a publish is reported only once its entry is written ([`Watermarks`]). Without a WAL nobody waits
//! for an entry ([`Catalogue`]), and the next open adds the newest one if it is missing.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures::stream::{self, StreamExt, TryStreamExt};
use log::{debug, warn};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

use crate::base::checkpoint_id::{Checkpoint, CheckpointId, InodeCheck, NewestCheckpoint};
use crate::base::error::VolumeError;
use crate::base::ownership::Ownership;
use crate::base::store_error::StoreErrorKind;
use crate::meta::wal_marker::{self, Marker};
use crate::store::{ETag, ObjectEntry, Store};

/// How long the writing of an entry is tried again, while those behind it wait.
const TRIED_FOR: Duration = Duration::from_secs(120);
/// The wait after its first failure. Each further failure doubles it.
const TRY_WAIT: Duration = Duration::from_millis(200);
/// The longest wait between attempts.
const TRY_WAIT_MAX: Duration = Duration::from_secs(5);

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
    /// Distinguishes the checkpoint from others with that number: an entry counts only for a container that has exactly
    /// this checkpoint. `None` in entries of earlier releases, until the first open with this release adds it to the
    /// newest entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<InodeCheck>,
    /// When it was published, in milliseconds since 1970-01-01 UTC, by the server's clock.
    pub published_ms: u64,
    /// Size of the volume at the checkpoint, in bytes.
    pub size_bytes: u64,
    /// The owner's epoch.
    #[serde(deserialize_with = "crate::base::counters::epoch")]
    pub epoch: u64,
    /// The checkpoint holds this generation and all before it: the watermark of the WAL. 0 in entries of releases
    /// without a WAL.
    #[serde(default, deserialize_with = "crate::base::counters::generation")]
    pub generation: u64,
    /// Whether a later open added the entry because it was missing. Its time is then that of the container.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_repaired: bool,
    /// What it was made for.
    #[serde(default, skip_serializing_if = "Kind::is_change")]
    pub kind: Kind,
}

/// Called for every publish.
#[async_trait]
pub trait Recorder: Send + Sync {
    /// Notes that a generation was published, as a checkpoint unless it changed nothing. The publish is reported to
    /// nobody before this returns.
    ///
    /// # Errors
    /// Only when the record is the watermark of a WAL; it is then tried again as a publish is. [`VolumeError::Fenced`]
    /// when another owner has recorded the checkpoint.
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

/// Number of checkpoint numbers that one request usually covers, because a page has 1,000 keys.
const PART_NUMBERS: u64 = 1000;
/// The most parts of a listing. Numbers may be far apart.
const PARTS_MAX: u64 = 128;
/// Number of requests of one listing that are in flight at once.
const LISTS_AT_ONCE: usize = 64;

/// The prefix of the entries, below the volume's `.meta/`.
pub(crate) const ENTRIES: &str = "checkpoints/";

/// The key of an entry below the volume's `.meta/`.
pub fn entry_name(cno: u64) -> String {
    format!("{ENTRIES}{cno:010}")
}

/// The checkpoint numbers that have entries, ascending.
///
/// # Errors
/// When the store fails.
pub(crate) async fn numbers(store: &Store) -> Result<Vec<u64>, VolumeError> {
    let listed = store.list(&store.meta_key(ENTRIES)).await?;
    Ok(numbers_of(store, &listed))
}

/// The entries of checkpoints up to this number, ascending, each with the time at which it was written, by the store's
/// clock. Lists as [`numbers`] does, but with many requests at once.
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

/// The checkpoint numbers above `cno` that have entries, ascending.
///
/// # Errors
/// When the store fails.
pub(crate) async fn numbers_after(store: &Store, cno: u64) -> Result<Vec<u64>, VolumeError> {
    let after = store.meta_key(&entry_name(cno));
    let listed = store.list_after(&store.meta_key(ENTRIES), &after).await?;
    Ok(numbers_of(store, &listed))
}

/// The checkpoint numbers of the entries among these objects.
pub(crate) fn numbers_of(store: &Store, listed: &[ObjectEntry]) -> Vec<u64> {
    let prefix = store.meta_key(ENTRIES);
    let name = |o: &ObjectEntry| Some(o.key.strip_prefix(&prefix)?.to_owned());
    // An object with any other form of name belongs to somebody else.
    let number = |name: String| name.parse().ok().filter(|&n| entry_name(n).ends_with(&name));
    listed.iter().filter_map(name).filter_map(number).collect()
}

enum Message {
    Entry(CatalogueEntry),
    Finish(oneshot::Sender<()>),
}

/// Tries until it succeeds or [`TRIED_FOR`] is over. Once `is_ending` says so, or its sender is gone, once more without a wait.
async fn insist<T, F: Future<Output = Result<T, VolumeError>>>(
    mut attempt: impl FnMut() -> F,
    is_ending: &mut watch::Receiver<bool>,
) -> Result<T, VolumeError> {
    let started = Instant::now();
    let (mut wait, mut is_last) = (TRY_WAIT, false);
    loop {
        match attempt().await {
            // Another one has the volume, or made one anew at its place, whose numbers these are.
            Err(e @ VolumeError::Fenced { .. }) => return Err(e),
            Err(e) if !is_last && started.elapsed() < TRIED_FOR => {
                debug!("an entry of the checkpoint list is tried again: {}", e.chain());
            }
            ended => return ended,
        }
        is_last = *is_ending.borrow() || is_ending.has_changed().is_err();
        // Whether that ended the wait is asked after the next attempt.
        let ends = is_ending.wait_for(|is_ending| *is_ending);
        let _ = timeout(wait, ends).await;
        wait = (wait * 2).min(TRY_WAIT_MAX);
    }
}

/// Writes entries after the publishes, in their order, while nobody waits for them.
///
/// An entry that fails is tried again before the next one is written, however late that makes both. So while it is owed, no later one is
/// in the list, and no round of the retention goes past it by the list. One that goes past it by a pin or a name of a later
/// checkpoint does not keep it, as with any entry that lands late: the plan says so to whoever reads.
#[derive(Debug)]
pub struct Catalogue {
    messages: mpsc::UnboundedSender<Message>,
    is_ending: watch::Sender<bool>,
    epoch: u64,
    newest: NewestCheckpoint,
}

impl Catalogue {
    /// Starts the writer on the current runtime. `newest` receives each published checkpoint. `ownership` is asked before an entry that is
    /// late is written: by then the volume may have been given to another one, or been deleted and made anew.
    pub fn start(
        store: Store,
        epoch: u64,
        newest: NewestCheckpoint,
        ownership: Arc<dyn Ownership>,
    ) -> Arc<Self> {
        let (messages, mut inbox) = mpsc::unbounded_channel();
        let (is_ending, mut ending) = watch::channel(false);
        tokio::spawn(async move {
            let mut is_late = false;
            while let Some(message) = inbox.recv().await {
                match message {
                    Message::Entry(entry) => {
                        let (store, entry, ownership) = (&store, &entry, &ownership);
                        let mut tries = 0;
                        let attempt = || {
                            tries += 1;
                            let is_asked = is_late || tries > 1;
                            async move {
                                if is_asked {
                                    ownership.check().await?;
                                }
                                write_entry(store, entry).await
                            }
                        };
                        let written = insist(attempt, &mut ending).await;
                        // Those that wait behind a late one are late, too.
                        is_late = !inbox.is_empty() && (is_late || tries > 1);
                        if let Err(e) = written {
                            // This is not fatal, because the next open adds the newest entry.
                            warn!(
                                "checkpoint {} is published, but could not be entered in the checkpoint list: {e}",
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
            is_ending,
            epoch,
            newest,
        })
    }

    fn enter(&self, checkpoint: Checkpoint, generation: u64, kind: Kind) {
        let entry = CatalogueEntry::of(checkpoint, generation, self.epoch, kind);
        self.newest.record(checkpoint, entry.published_ms);
        let _ = self.messages.send(Message::Entry(entry));
    }

    /// Waits until all entries are written, or have failed once more; takes none afterwards.
    pub async fn finish(&self) {
        self.is_ending.send_replace(true);
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

/// Writes entries before the publishes are reported, because they are the watermark of a WAL.
#[derive(Debug)]
pub struct Watermarks {
    store: Store,
    epoch: u64,
    marker: Arc<Marker>,
}

impl Watermarks {
    /// For the owner of this epoch. `marker` stores the watermark of publishes that made no checkpoint.
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
        // Either an earlier attempt's answer was lost, or the next owner wrote the entry first. The next owner has then
        // replayed the changes that this owner would now report as published.
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
    /// Decodes an entry.
    ///
    /// # Errors
    /// A text that says what is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|e| e.to_string())
    }

    /// Of a checkpoint that was published a moment ago.
    pub(crate) fn of(checkpoint: Checkpoint, generation: u64, epoch: u64, kind: Kind) -> Self {
        Self {
            cno: checkpoint.id.cno,
            check: Some(checkpoint.id.check),
            published_ms: checkpoint.published_ms,
            size_bytes: checkpoint.size_bytes,
            epoch,
            generation,
            is_repaired: false,
            kind,
        }
    }

    /// Whether this is the entry of exactly this checkpoint. `None` for an entry of an earlier release, which does not
    /// say.
    pub(crate) fn is_of(&self, id: CheckpointId) -> Option<bool> {
        self.check.map(|check| (self.cno, check) == (id.cno, id.check))
    }
}

/// The newest epoch that checkpoints and WAL marker hold; 0 without any. For a volume whose lease is missing.
///
/// # Errors
/// When the store fails.
pub async fn newest_epoch(store: &Store) -> Result<u64, VolumeError> {
    // The owner of the WAL may have published nothing yet.
    let of_wal = wal_marker::load(store)
        .await?
        .map_or(0, |(marker, _)| marker.epoch);
    let entries = store.list(&store.meta_key(ENTRIES)).await?;
    for entry in entries.iter().rev() {
        if let Some((body, _)) = store.get(&entry.key).await?
            && let Ok(entry) = CatalogueEntry::decode(&body)
        {
            return Ok(entry.epoch.max(of_wal));
        }
    }
    Ok(of_wal)
}

/// Loads the entry of a checkpoint, if there is one. Entries never change, except that an entry of an earlier release
/// gets its check value.
///
/// # Errors
/// When the store fails, or the object is not a valid entry.
pub(crate) async fn load_entry(store: &Store, cno: u64) -> Result<Option<CatalogueEntry>, VolumeError> {
    Ok(load_entry_with(store, cno).await?.map(|(entry, _)| entry))
}

/// As [`load_entry`], with the ETag of the entry.
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

/// Replaces the entry with the same number that was read with the ETag `before`. An entry that another owner changed
/// stays.
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

/// Creates an entry. Returns `false` when there is one already.
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
