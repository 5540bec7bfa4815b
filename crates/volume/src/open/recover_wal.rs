//! Opening a volume that has a log, or is to have one, before the first client.
//!
//! 1. The marker says whether there is a log. One with records is never ignored.
//! 2. The log is opened: older owners are shut out. From here on they acknowledge nothing.
//! 3. The marker is taken over, so that they cannot raise the watermark either.
//! 4. The container is opened, and its newest checkpoint entered in the catalogue: that is the watermark. A log that
//!    continues a checkpoint which the container does not have is not replayed.
//! 5. Groups above the watermark are applied, published and recorded under a new generation.
//! 6. Old groups are removed.
//!
//! A crash at any of these leaves a volume that the next opening finds as this one did, or further.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt};
use log::warn;

use crate::base::checkpoint_id::CheckpointId;
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::ids::GENERATIONS_AHEAD_MAX;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::checkpoint::fill_partial::complete_partial_blocks;
use crate::engine::{Beside, Engine};
use crate::meta::checkpoint_list::Recorder;
use crate::meta::wal_marker::{self, Marker, MarkerState};
use crate::open::history::{GENERATIONS_LEFT, Seen};
use crate::options::{InheritedLog, StoreOptions, VolumeOptions};
use crate::store::{self, ETag, Store};
use crate::wal::LogStore;
use crate::wal::journal::Journal;
use crate::wal::record::{Content, Entry, Group};
use crate::wal::replay::Replay;
use crate::wal::s3::{self, S3Log};
use crate::wal::unchanged::Unchanged;
use crate::write_buffer::overlay::Overlay;

/// Wait before a failed publish of a replay is tried again.
const RETRY_WAIT: Duration = Duration::from_millis(500);
/// A line of progress about every so many groups.
const PROGRESS_GROUPS: usize = 1000;
/// Groups read at once; each has at most a few MiB.
const READS_AT_ONCE: usize = 16;

const ADVICE_NAME_IT: &str = "name it with backend_wal_url, or give up the writes flushed to it since the last \
     checkpoint with discard_wal=yes";
const ADVICE_GIVE_UP: &str = "make it available again, or give up the writes flushed to it since the last checkpoint \
     with discard_wal=yes";
const ADVICE_OTHER_HISTORY: &str = "put the volume back to the state that the log continues, or give up the writes flushed \
     to it since then with discard_wal=yes";

const ADVICE_INHERITED: &str = "publish what it holds into this volume with hypernbd wal replay, which leaves the log as it \
     is; or give it up for this volume with discard_wal=yes; if the volume was moved and is no copy, say adopt=yes";

/// What an opening needs to know.
#[derive(Debug)]
pub struct Request<'a> {
    /// The volume's store.
    pub store: &'a Store,
    /// The volume's id.
    pub volume_id: VolumeId,
    /// The id of the volume that it is a copy of.
    pub parent: Option<VolumeId>,
    /// What becomes of that one's log.
    pub inherited: InheritedLog,
    /// How stores are reached.
    pub store_options: &'a StoreOptions,
    /// The log's URL, if there is to be a log.
    pub url: Option<&'a VolumeUrl>,
    /// Whether a log that cannot be used is given up.
    pub is_discard_allowed: bool,
    /// This owner's epoch.
    pub epoch: u64,
    /// The volume's newest checkpoint as it was seen before the lease was taken.
    pub newest_seen: CheckpointId,
}

/// A log that older owners are shut out of.
pub struct OpenLog {
    /// Its groups.
    pub store: Arc<dyn LogStore>,
    /// The volume's marker, taken over.
    pub marker: Arc<Marker>,
    /// Its URL.
    pub url: VolumeUrl,
    /// Whether what was found is to be removed, not replayed.
    is_discarded: bool,
    is_discard_allowed: bool,
}

/// What steps 1 to 3 found.
#[derive(Default)]
pub struct Begun {
    /// The log, if the volume is to have one.
    pub log: Option<OpenLog>,
    /// The watermark says at least this, whatever the catalogue says.
    pub least_watermark: u64,
    /// The marker of a log that was not closed and is not given up.
    unfinished: Option<MarkerState>,
}

impl Begun {
    /// Step 4, once the container is open: a log that does not continue what the container has is given up if that is
    /// allowed, else refused.
    ///
    /// # Errors
    /// [`VolumeError::Log`]; nothing is lost then.
    pub async fn judge(&mut self, history: &Seen) -> Result<(), VolumeError> {
        let Some((marker, log)) = self.unfinished.as_ref().zip(self.log.as_mut()) else {
            return Ok(());
        };
        let is_continued = match marker.checkpoint {
            Some(checkpoint) => history.has(checkpoint).await?,
            None => true,
        };
        if is_continued && !history.is_broken() {
            return Ok(());
        }
        let reason = match marker.checkpoint {
            Some(checkpoint) if !is_continued => history.other_history(checkpoint),
            _ => history.left_history(),
        };
        if !log.is_discard_allowed {
            return Err(other_history(&log.url, reason));
        }
        warn!("the log {}: {reason}", log.url);
        warn_given_up(Some(&log.url.to_string()));
        log.is_discarded = true;
        self.least_watermark = self.least_watermark.saturating_add(GENERATIONS_LEFT);
        Ok(())
    }
}

fn other_history(url: &VolumeUrl, reason: String) -> VolumeError {
    VolumeError::Log {
        url: url.to_string(),
        reason,
        advice: ADVICE_OTHER_HISTORY,
    }
}

/// What the marker allows.
///
/// # Errors
/// [`VolumeError::Log`] for a log that would be ignored, with the way out.
fn check_marker(
    marker: Option<&MarkerState>,
    url: Option<&VolumeUrl>,
    is_discard_allowed: bool,
) -> Result<(), VolumeError> {
    let Some(marker) = marker.filter(|m| !m.is_clean) else {
        return Ok(());
    };
    let is_same = url.is_some_and(|url| url.to_string() == marker.url);
    if is_same || is_discard_allowed {
        return Ok(());
    }
    let reason = match url {
        Some(url) => format!("backend_wal_url names another one, {url}"),
        None => "it is not named".to_owned(),
    };
    Err(VolumeError::Log {
        url: marker.url.clone(),
        reason: format!("{reason} (it was last open on {})", marker.host),
        advice: ADVICE_NAME_IT,
    })
}

/// Looks whether an opening that finds this marker would find the log it needs; changes nothing. Into a journal only the
/// opening looks.
///
/// # Errors
/// As [`begin`].
pub async fn check(
    marker: Option<&MarkerState>,
    store_options: &StoreOptions,
    url: Option<&VolumeUrl>,
    is_discard_allowed: bool,
) -> Result<(), VolumeError> {
    check_marker(marker, url, is_discard_allowed)?;
    if let Some(url @ VolumeUrl::S3 { .. }) = url {
        let log = store::connect(url, store_options).await?;
        let is_expected = marker.is_some_and(|m| !m.is_clean && m.url == url.to_string());
        if is_expected && !is_discard_allowed && s3::list(&log).await?.is_empty() {
            return Err(emptied(url));
        }
    }
    Ok(())
}

/// Looks whether the journal, if it is to be one, is free, and on a file system that one can be on. Before the volume's lease is taken from a server that has the
/// journal open: that one would be shut out, and this one could not serve.
///
/// # Errors
/// [`VolumeError::Journal`] when it is not.
pub async fn check_claimable(url: Option<&VolumeUrl>) -> Result<(), VolumeError> {
    match url {
        Some(VolumeUrl::File { path }) => Journal::check_claimable(path).await,
        _ => Ok(()),
    }
}

fn unusable(url: &VolumeUrl, reason: String) -> VolumeError {
    VolumeError::Log {
        url: url.to_string(),
        reason,
        advice: ADVICE_GIVE_UP,
    }
}

fn emptied(url: &VolumeUrl) -> VolumeError {
    unusable(url, "it is empty: its objects were removed".into())
}

/// Steps 1 to 3, with the marker that was found after the lease was taken.
///
/// # Errors
/// [`VolumeError::Log`] for a log that must not be ignored and cannot be used; what the log's place fails with.
pub async fn begin(request: &Request<'_>, found: Option<(MarkerState, ETag)>) -> Result<Begun, VolumeError> {
    let (state, etag) = match &found {
        Some((state, etag)) => (Some(state), Some(etag)),
        None => (None, None),
    };
    if let Some((state, etag)) = state.zip(etag)
        && let Some(begun) = begin_inherited(request, state, etag).await?
    {
        return Ok(begun);
    }
    check_marker(state, request.url, request.is_discard_allowed)?;
    let mut least_watermark = state.map_or(0, |s| s.watermark);
    let unfinished = state.filter(|s| !s.is_clean);
    let is_same = |s: &MarkerState| request.url.is_some_and(|url| url.to_string() == s.url);
    let mut given_up = unfinished.filter(|s| !is_same(s)).map(|s| s.url.clone());
    let expected = unfinished.filter(|s| is_same(s));
    let Some(url) = request.url else {
        if given_up.is_some() {
            least_watermark = give_up_marker(request.store).await?;
        }
        warn_given_up(given_up.as_deref());
        return Ok(Begun {
            least_watermark,
            ..Begun::default()
        });
    };
    let opened = match open_store(request, url, expected, false).await {
        Err(e @ VolumeError::Log { .. }) if request.is_discard_allowed => {
            warn!("{}", e.chain());
            given_up = Some(url.to_string());
            open_store(request, url, None, true).await?
        }
        other => other?,
    };
    let (store, journal_id) = opened;
    let is_discarded = given_up.is_some();
    if is_discarded {
        least_watermark += GENERATIONS_LEFT;
    }
    warn_given_up(given_up.as_deref());
    // A log that is taken over continues what it did.
    let checkpoint = expected
        .filter(|_| !is_discarded)
        .and_then(|state| state.checkpoint)
        .unwrap_or(request.newest_seen);
    let marker = take_marker(request, url, journal_id, least_watermark, checkpoint, etag).await?;
    let log = OpenLog {
        store,
        marker: Arc::new(marker),
        url: url.clone(),
        is_discarded,
        is_discard_allowed: request.is_discard_allowed,
    };
    Ok(Begun {
        unfinished: expected.filter(|_| !is_discarded).cloned(),
        log: Some(log),
        least_watermark,
    })
}

fn others_log(marker: &MarkerState, what: &str) -> VolumeError {
    VolumeError::Log {
        url: marker.url.clone(),
        reason: format!("it is that of volume {}, {what}", marker.volume_id),
        advice: ADVICE_INHERITED,
    }
}

/// Refuses a copy whose marker tells of a log that was not closed, before it gets an id of its own: until then the user can
/// still say that the volume was moved.
///
/// # Errors
/// [`VolumeError::Log`], with the choices.
pub fn check_copied(marker: Option<&MarkerState>, options: &VolumeOptions) -> Result<(), VolumeError> {
    let is_decided = options.adopt || options.discard_wal || options.inherited_log == InheritedLog::Replay;
    match marker.filter(|m| !m.is_clean && !is_decided) {
        Some(marker) => Err(others_log(marker, "of which this one is a copy")),
        None => Ok(()),
    }
}

/// As [`begin`], where the marker of a log that was not closed was copied along with the volume: the log is another
/// volume's. `None` where it is this one's, or given up.
async fn begin_inherited(
    request: &Request<'_>,
    state: &MarkerState,
    etag: &ETag,
) -> Result<Option<Begun>, VolumeError> {
    if state.is_clean || state.volume_id == request.volume_id {
        return Ok(None);
    }
    if request.is_discard_allowed {
        return Ok(None);
    }
    if request.parent != Some(state.volume_id) {
        return Err(others_log(state, "which this one has nothing to do with"));
    }
    let url = match (request.inherited, request.url) {
        (InheritedLog::Replay, Some(url)) => url,
        _ => return Err(others_log(state, "of which this one is a copy")),
    };
    let volume_id = state.volume_id.as_uuid();
    let store: Arc<dyn LogStore> = match url {
        VolumeUrl::S3 { .. } => {
            let log = store::connect(url, request.store_options).await?;
            if s3::list(&log).await?.is_empty() {
                return Err(emptied(url));
            }
            Arc::new(S3Log::peek(log, volume_id).await?)
        }
        VolumeUrl::File { path } => Arc::new(
            Journal::open(
                path,
                volume_id,
                Some(state.journal_id.clone().unwrap_or_default()),
            )
            .await?,
        ),
    };
    // Still the original's, so that an interrupted replay is taken up as what it is.
    let marker = Marker::take(request.store, state.clone(), Some(etag)).await?;
    Ok(Some(Begun {
        log: Some(OpenLog {
            store: Arc::new(Unchanged(store)),
            marker: Arc::new(marker),
            url: url.clone(),
            is_discarded: false,
            is_discard_allowed: false,
        }),
        least_watermark: state.watermark,
        unfinished: Some(state.clone()),
    }))
}

/// Says in the marker that nothing of the log is needed any more. It stays, because the records may: should the same URL
/// be used again, they are below the watermark, and so are never replayed over newer data.
///
/// # Errors
/// When the store fails.
pub async fn give_up_marker(store: &Store) -> Result<u64, VolumeError> {
    let Some((state, etag)) = wal_marker::load(store).await? else {
        return Ok(0);
    };
    let watermark = state.watermark + GENERATIONS_LEFT;
    let state = MarkerState {
        watermark,
        is_clean: true,
        ..state
    };
    Marker::take(store, state, Some(&etag)).await?;
    Ok(watermark)
}

fn warn_given_up(url: Option<&str>) {
    if let Some(url) = url {
        warn!("discard_wal=yes: the writes flushed to the log {url} since the last checkpoint are given up");
    }
}

async fn take_marker(
    request: &Request<'_>,
    url: &VolumeUrl,
    journal_id: Option<String>,
    watermark: u64,
    checkpoint: CheckpointId,
    before: Option<&ETag>,
) -> Result<Marker, VolumeError> {
    let state = MarkerState {
        url: url.to_string(),
        volume_id: request.volume_id,
        host: wal_marker::host(),
        journal_id,
        epoch: request.epoch,
        opened_ms: now_ms(),
        watermark,
        checkpoint: Some(checkpoint),
        is_clean: false,
    };
    Marker::take(request.store, state, before).await
}

/// Opens the log at `url`. `expected` is the marker of an unfinished log that must be there; `is_given_up` says that
/// nothing of what is there is needed.
async fn open_store(
    request: &Request<'_>,
    url: &VolumeUrl,
    expected: Option<&MarkerState>,
    is_given_up: bool,
) -> Result<(Arc<dyn LogStore>, Option<String>), VolumeError> {
    let volume_id = request.volume_id.as_uuid();
    match url {
        VolumeUrl::S3 { .. } => {
            let log = store::connect(url, request.store_options).await?;
            if expected.is_some() && s3::list(&log).await?.is_empty() {
                return Err(emptied(url));
            }
            let opened = S3Log::open(log, volume_id, request.epoch, is_given_up).await;
            let log = opened.map_err(|e| match e {
                VolumeError::Corrupt { .. } => unusable(url, e.to_string()),
                e => e,
            })?;
            Ok((Arc::new(log), None))
        }
        VolumeUrl::File { path } => {
            let expected_id = expected.map(|s| s.journal_id.clone().unwrap_or_default());
            let opened = Journal::open(path, volume_id, expected_id).await;
            let journal = opened.map_err(|e| match (e, expected) {
                (VolumeError::Journal { reason, .. }, Some(marker)) => unusable(
                    url,
                    format!(
                        "{reason} (this is host {}, it was last open on {})",
                        wal_marker::host(),
                        marker.host
                    ),
                ),
                (e @ VolumeError::Corrupt { .. }, _) => unusable(url, e.to_string()),
                (e, _) => e,
            })?;
            let id = journal.id().to_owned();
            Ok((Arc::new(journal), Some(id)))
        }
    }
}

impl OpenLog {
    /// Step 5: applies, publishes and records what is above `watermark`. Returns the newest generation used.
    ///
    /// # Errors
    /// When the log or the store fails; nothing is lost then, and the next opening does it again.
    pub async fn replay(
        &self,
        engine: &dyn Engine,
        recorder: &dyn Recorder,
        watermark: u64,
        history: &Seen,
        options: &ReplayOptions,
    ) -> Result<u64, VolumeError> {
        if self.is_discarded {
            self.store.remove_found().await?;
            return Ok(watermark);
        }
        match self.apply(engine, watermark, history, options).await {
            Ok(None) if self.store.found().is_empty() => Ok(watermark),
            // An older owner may still have groups on its way, beyond the gap that was sealed. They must not be applied
            // by a later opening, over what this one shows: an owner has so many generations beyond the watermark.
            Ok(None) => {
                let generation = watermark + GENERATIONS_AHEAD_MAX;
                recorder.published(generation, None).await?;
                Ok(generation)
            }
            Ok(Some((newest, checkpoint))) => {
                // Above every generation that an older owner may have on its way somewhere.
                let generation = newest + GENERATIONS_AHEAD_MAX;
                recorder.published(generation, checkpoint).await?;
                Ok(generation)
            }
            Err(e @ (VolumeError::Corrupt { .. } | VolumeError::Log { .. })) if self.is_discard_allowed => {
                warn!("{}", e.chain());
                warn_given_up(Some(&self.url.to_string()));
                // First the watermark: a log of which a part is removed must never be replayed.
                let generation = watermark + GENERATIONS_LEFT;
                recorder.published(generation, None).await?;
                self.store.remove_found().await?;
                Ok(generation)
            }
            Err(e @ VolumeError::Corrupt { .. }) => Err(VolumeError::Log {
                url: self.url.to_string(),
                reason: e.chain(),
                advice: ADVICE_GIVE_UP,
            }),
            Err(e) => Err(e),
        }
    }

    /// Applies and publishes. `None` when there was nothing to apply.
    async fn apply(
        &self,
        engine: &dyn Engine,
        watermark: u64,
        history: &Seen,
        options: &ReplayOptions,
    ) -> Result<Option<(u64, Option<crate::base::checkpoint_id::Checkpoint>)>, VolumeError> {
        // The newest first: of what is refused no part must be published.
        if let Some(&id) = self.store.found().last() {
            self.check_base(&self.store.read(id).await?, watermark, history)
                .await?;
        }
        let mut replay = Replay::new(watermark);
        let overlay = Overlay::new(engine.geometry());
        let (mut groups, mut changes, mut bytes) = (0, 0, 0);
        let mut checkpoint = None;
        let reads = self
            .store
            .found()
            .iter()
            .copied()
            .map(|id| async move { (id, self.store.read(id).await) });
        let mut reads = stream::iter(reads).buffered(READS_AT_ONCE).enumerate();
        while let Some((nth, (id, group))) = reads.next().await {
            if nth > 0 && nth % PROGRESS_GROUPS == 0 {
                warn!(
                    "replaying {}: record {nth} of {}",
                    self.url,
                    self.store.found().len()
                );
            }
            let corrupt = |reason: String| VolumeError::Corrupt {
                what: format!("the log {}", self.url),
                reason,
            };
            let group = group?;
            if self.store.is_suspect(id) && group.newest_generation() > watermark {
                return Err(corrupt(format!(
                    "what comes before record {} of epoch {} is damaged",
                    id.sequence, id.epoch
                )));
            }
            self.check_base(&group, watermark, history).await?;
            let entries = replay.next(id, group).map_err(|e| corrupt(e.to_string()))?;
            groups += usize::from(!entries.is_empty());
            for entry in entries {
                if !engine
                    .geometry()
                    .contains(entry.offset_bytes, entry.content.len_bytes())
                {
                    return Err(corrupt(format!("record {id} reaches past the volume's end")));
                }
                changes += 1;
                bytes += entry.content.len_bytes();
                apply_entry(&overlay, &entry);
            }
            // Publishing a part early is harmless: the next opening applies all of it again.
            if overlay.total_bytes() > options.write_buffer_bytes / 2 {
                checkpoint = publish(engine, &overlay, options).await?.or(checkpoint);
            }
        }
        if changes == 0 {
            return Ok(None);
        }
        checkpoint = publish(engine, &overlay, options).await?.or(checkpoint);
        // Worth saying by default: the server before this one did not end cleanly.
        warn!(
            "replayed {groups} records of the log {}: {changes} changes, {bytes} bytes",
            self.url
        );
        Ok(Some((replay.newest_generation(), checkpoint)))
    }

    /// Whether the container has the checkpoint that a group continues. One that is published already is not asked for it.
    async fn check_base(&self, group: &Group, watermark: u64, history: &Seen) -> Result<(), VolumeError> {
        if group.newest_generation() <= watermark {
            return Ok(());
        }
        let reason = match group.base {
            Some(base) if history.has(base).await? => return Ok(()),
            Some(base) => history.other_history(base),
            None if !history.is_broken() => return Ok(()),
            None => history.left_history(),
        };
        Err(other_history(
            &self.url,
            format!("record {} of epoch {}: {reason}", group.sequence, group.epoch),
        ))
    }

    /// The clean end: nothing unpublished is left, and `generation` was the last one. An older server that may only be
    /// paused stays shut out. The marker stays, clean: an older server may still have groups on their way, which its
    /// watermark keeps from being replayed; and this one may have been overtaken, so that the marker is another's by now.
    ///
    /// # Errors
    /// When the store or the log fails; what is left is then in the way of nobody.
    pub async fn finish(&self, generation: u64, is_older_alive: bool) -> Result<(), VolumeError> {
        self.marker.set_clean(generation).await?;
        self.store.clear(is_older_alive).await
    }
}

/// How a replay is published.
#[derive(Debug, Clone, Copy)]
pub struct ReplayOptions {
    /// Memory for unpublished changes, in bytes.
    pub write_buffer_bytes: u64,
    /// How long a failing store is tried.
    pub io_timeout: Duration,
}

fn apply_entry(overlay: &Overlay, entry: &Entry) {
    match &entry.content {
        Content::Data(bytes) => overlay.write(entry.offset_bytes, bytes),
        Content::Zero { len_bytes } => overlay.zero(entry.offset_bytes, *len_bytes),
    };
}

async fn publish(
    engine: &dyn Engine,
    overlay: &Overlay,
    options: &ReplayOptions,
) -> Result<Option<crate::base::checkpoint_id::Checkpoint>, VolumeError> {
    let frozen = overlay.freeze();
    let until = tokio::time::Instant::now() + options.io_timeout;
    let checkpoint = loop {
        let published = async {
            complete_partial_blocks(engine, &frozen, || {}).await?;
            engine.publish(frozen.clone(), Beside::default()).await
        };
        match published.await {
            Ok(checkpoint) => break checkpoint,
            Err(e @ VolumeError::Fenced { .. }) => return Err(e),
            Err(e) if tokio::time::Instant::now() >= until => return Err(e),
            Err(e) => warn!(
                "a replay could not be published and is tried again: {}",
                e.chain()
            ),
        }
        tokio::time::sleep(RETRY_WAIT).await;
        engine.recover().await?;
    };
    overlay.drop_frozen();
    Ok(checkpoint)
}

#[cfg(test)]
#[path = "recover_wal_tests.rs"]
mod tests;
