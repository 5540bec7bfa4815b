//! Opening a volume that has a WAL, or is to have one, before the first client.
//!
//! 1. The WAL marker says whether there is a WAL. A WAL with records is never ignored.
//! 2. The WAL is opened, which shuts older owners out. From here on they acknowledge nothing.
//! 3. The marker is taken over, so that older owners cannot raise the watermark either.
//! 4. The container is opened, and its newest checkpoint entered in the checkpoint list: that is the watermark. A WAL
//!    that continues a checkpoint that the container does not have is not replayed.
//! 5. Records above the watermark are applied, published and recorded under a new generation.
//! 6. Old records are removed.
//!
//! A crash at any of these steps leaves a volume that the next opening finds as this one did, or further on.

use std::sync::Arc;

use log::warn;

use crate::base::checkpoint_id::CheckpointId;
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::base::wal_place::WalPlace;
use crate::meta::wal_marker::{self, Marker, MarkerState};
use crate::open::history::{GENERATIONS_LEFT, Seen};
use crate::options::{InheritedWal, StoreOptions, VolumeOptions};
use crate::store::{self, ETag, Store, permission};
use crate::wal::WalStore;
use crate::wal::journal::Journal;
use crate::wal::place::{Located, locate};
use crate::wal::s3::{self, S3Wal};
use crate::wal::unchanged::Unchanged;

const ADVICE_NAME_IT: &str = "name it with backend_wal_url, publish what it holds with hypernbd wal replay, or give up the \
     writes flushed to it since the last checkpoint with discard_wal=yes";
pub(super) const ADVICE_GIVE_UP: &str = "make it available again, or give up the writes flushed to it since the last checkpoint \
     with discard_wal=yes";
pub(super) const ADVICE_DAMAGE: &str = "the log stays as it is, and with -r the volume is served meanwhile: bring the damaged object back \
     with hypernbd repair or from the bucket's versions, or give up the writes flushed to the log since the last checkpoint with hypernbd \
     wal discard";
const ADVICE_OTHER_HISTORY: &str = "put the volume back to the state that the log continues, or give up the writes flushed \
     to it since then with discard_wal=yes";

const ADVICE_INHERITED: &str = "publish what it holds into this volume with hypernbd wal replay, which leaves the log as it \
     is; or give it up for this volume with discard_wal=yes; if the volume was moved and is no copy, say adopt=yes";

/// The WAL of an opening.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Where it is, if the opening takes one.
    pub place: Option<WalPlace>,
    /// Nobody asked for it, but there are records in it: it is ended once they are replayed.
    pub is_ended: bool,
}

impl Wanted {
    /// The WAL for what was asked for, in a volume with this marker. A WAL beside the volume that was not closed is found without
    /// being asked for. One in a place of its own is not: a server goes only where it was told to go.
    pub fn of(marker: Option<&MarkerState>, asked: Option<&WalPlace>) -> Self {
        let has_records = marker.is_some_and(|marker| !marker.is_clean && marker.is_at(&WalPlace::Beside));
        Self::found(has_records, asked)
    }

    /// As [`Self::of`], where that is known of the marker.
    pub fn found(has_wal_beside: bool, asked: Option<&WalPlace>) -> Self {
        let is_ended = has_wal_beside && asked.is_none();
        Self {
            place: asked.cloned().or_else(|| is_ended.then_some(WalPlace::Beside)),
            is_ended,
        }
    }
}

/// What an opening needs to know.
#[derive(Debug)]
pub struct Request<'a> {
    /// The volume's store.
    pub store: &'a Store,
    /// The volume's id.
    pub volume_id: VolumeId,
    /// The id of the volume of which this one is a copy.
    pub parent: Option<VolumeId>,
    /// What happens to the WAL of that volume.
    pub inherited: InheritedWal,
    /// How stores are reached.
    pub store_options: &'a StoreOptions,
    /// Where the WAL is, if there is to be one.
    pub place: Option<&'a WalPlace>,
    /// Whether a WAL that cannot be used is given up.
    pub is_discard_allowed: bool,
    /// This owner's epoch.
    pub epoch: u64,
    /// The volume's newest checkpoint, as it was seen before the lease was taken.
    pub newest_seen: CheckpointId,
}

/// An open WAL, from which older owners are shut out.
pub struct OpenWal {
    /// Where its records are stored.
    pub store: Arc<dyn WalStore>,
    /// The volume's WAL marker, which this owner took over.
    pub marker: Arc<Marker>,
    /// The address of the WAL, for people.
    pub url: String,
    /// Whether the records that were found are to be removed and not replayed.
    pub(super) is_discarded: bool,
    pub(super) is_discard_allowed: bool,
}

/// The result of steps 1 to 3.
#[derive(Default)]
pub struct Begun {
    /// The WAL, if the volume is to have one.
    pub wal: Option<OpenWal>,
    /// A lower bound of the watermark, whatever the checkpoint list says.
    pub least_watermark: u64,
    /// The marker of a WAL that was not closed and is not given up.
    unfinished: Option<MarkerState>,
    /// The WAL is that of the volume that this one is a copy of.
    pub is_inherited: bool,
}

impl Begun {
    /// Step 4, once the container is open. A WAL that does not continue what the container has is given up if that is
    /// allowed, and otherwise refused.
    ///
    /// # Errors
    /// [`VolumeError::Wal`]. Nothing is lost then.
    pub async fn judge(&mut self, history: &Seen) -> Result<(), VolumeError> {
        let Some((marker, wal)) = self.unfinished.as_ref().zip(self.wal.as_mut()) else {
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
        if !wal.is_discard_allowed {
            return Err(other_history(&wal.url, reason));
        }
        warn!("the log {}: {reason}", wal.url);
        warn_given_up(Some(&wal.url));
        wal.is_discarded = true;
        self.least_watermark = self.least_watermark.saturating_add(GENERATIONS_LEFT);
        // Written before any record is removed or appended: this owner may be killed before it publishes, and the
        // marker then decides whether the records that it appended are refused or replayed.
        wal.marker.newest().set(history.newest());
        wal.marker.raise_watermark(self.least_watermark).await
    }
}

pub(super) fn other_history(url: &str, reason: String) -> VolumeError {
    VolumeError::Wal {
        url: url.to_string(),
        reason,
        advice: ADVICE_OTHER_HISTORY,
    }
}

/// Checks what the marker allows.
///
/// # Errors
/// [`VolumeError::Wal`] for a WAL that would be ignored. The error says what to do.
fn check_marker(
    store: &Store,
    marker: Option<&MarkerState>,
    place: Option<&WalPlace>,
    is_discard_allowed: bool,
) -> Result<(), VolumeError> {
    let Some(marker) = marker.filter(|m| !m.is_clean) else {
        return Ok(());
    };
    let is_same = place.is_some_and(|place| marker.is_at(place));
    if is_same || is_discard_allowed {
        return Ok(());
    }
    let reason = match place {
        Some(WalPlace::Beside) => "backend_wal_url=auto is another one, beside the volume".to_owned(),
        Some(WalPlace::At(url)) => format!("backend_wal_url names another one, {url}"),
        None => "it is not named".to_owned(),
    };
    Err(VolumeError::Wal {
        url: marker.address(store),
        reason: format!("{reason} (it was last open on {})", marker.host),
        advice: ADVICE_NAME_IT,
    })
}

/// Checks, without changing anything, whether an opening that finds this marker would find the WAL that it needs. Only
/// the opening itself reads a journal.
///
/// # Errors
/// As [`begin`].
pub async fn check(
    store: &Store,
    marker: Option<&MarkerState>,
    store_options: &StoreOptions,
    place: Option<&WalPlace>,
    is_discard_allowed: bool,
) -> Result<(), VolumeError> {
    check_marker(store, marker, place, is_discard_allowed)?;
    let is_expected =
        |m: &&MarkerState| !m.is_clean && !is_discard_allowed && place.is_some_and(|p| m.is_at(p));
    let expected = marker.filter(is_expected);
    let wal = match (place, expected) {
        (Some(WalPlace::Beside), Some(marker)) => wal_marker::beside(store, marker.volume_id),
        (Some(WalPlace::At(url @ VolumeUrl::S3 { .. })), _) => {
            let wal = store::connect(url, store_options).await?;
            // Of a directory's volume no S3 store was tried.
            if !store_options.allow_unsafe && matches!(store.url, VolumeUrl::S3 { .. }) {
                // It is at the address of the volume's store, which is known to honour conditions.
                wal.ensure_writable(&wal.data_key(permission::NAME), Vec::new())
                    .await?;
            }
            wal
        }
        // Before the lease is taken: the server that has it may go on to write to it, on another machine.
        (Some(place @ WalPlace::At(VolumeUrl::File { path })), Some(marker)) => {
            let journal_id = marker.journal_id.clone().unwrap_or_default();
            let found = Journal::check_is(path, journal_id).await;
            return found.map_err(|e| not_here(e, place, marker));
        }
        _ => return Ok(()),
    };
    match expected.is_some() && s3::is_empty(&wal).await? {
        true => Err(emptied(&wal)),
        false => Ok(()),
    }
}

/// Checks whether a journal, if there is to be one, is free and on a file system that can hold one. This comes before
/// the volume's lease is taken from a server that has the journal open. Otherwise that server would be shut out, and
/// this one could not serve.
///
/// # Errors
/// [`VolumeError::Journal`] when it is not free, or the file system is not fit.
/// [`VolumeError::Journal`] when it is not.
pub async fn check_claimable(place: Option<&WalPlace>) -> Result<(), VolumeError> {
    match place {
        Some(WalPlace::At(VolumeUrl::File { path })) => Journal::check_claimable(path).await,
        _ => Ok(()),
    }
}

fn unusable(url: impl ToString, reason: String) -> VolumeError {
    VolumeError::Wal {
        url: url.to_string(),
        reason,
        advice: ADVICE_GIVE_UP,
    }
}

/// A journal that is not where the marker says it is.
fn not_here(e: VolumeError, place: &WalPlace, marker: &MarkerState) -> VolumeError {
    match e {
        VolumeError::Journal { reason, .. } => unusable(
            place,
            format!(
                "{reason} (this is host {}, it was last open on {})",
                wal_marker::host(),
                marker.host
            ),
        ),
        e => e,
    }
}

fn emptied(wal: &Store) -> VolumeError {
    unusable(&wal.url, "it is empty: its objects were removed".into())
}

/// Steps 1 to 3, with the marker that was found after the lease was taken.
///
/// # Errors
/// [`VolumeError::Wal`] for a WAL that must not be ignored and cannot be used; the errors of the store or directory of
/// the WAL.
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
    check_marker(request.store, state, request.place, request.is_discard_allowed)?;
    let mut least_watermark = state.map_or(0, |s| s.watermark);
    let unfinished = state.filter(|s| !s.is_clean);
    // Records beside the volume are of one volume's id, so those that were copied along are others.
    let is_same = |s: &MarkerState| {
        let of_another = request.place == Some(&WalPlace::Beside) && s.volume_id != request.volume_id;
        !of_another && request.place.is_some_and(|place| s.is_at(place))
    };
    let mut given_up = unfinished
        .filter(|s| !is_same(s))
        .map(|s| s.address(request.store));
    let expected = unfinished.filter(|s| is_same(s));
    let Some(place) = request.place else {
        if given_up.is_some() {
            // Sealed first: once the marker is clean, nobody looks for an owner that still appends.
            shut_older_out(unfinished, request).await;
            least_watermark = give_up_marker(request.store).await?;
        }
        warn_given_up(given_up.as_deref());
        return Ok(Begun {
            least_watermark,
            ..Begun::default()
        });
    };
    if given_up.is_some() {
        shut_older_out(unfinished, request).await;
    }
    let opened = match open_store(request, place, expected, false).await {
        Err(VolumeError::Wal { url, reason, .. }) if request.is_discard_allowed => {
            warn!("the log {url}: {reason}");
            given_up = Some(url);
            open_store(request, place, None, true).await?
        }
        other => other?,
    };
    let (store, journal_id) = opened;
    let is_discarded = given_up.is_some();
    if is_discarded {
        least_watermark += GENERATIONS_LEFT;
    }
    warn_given_up(given_up.as_deref());
    // A WAL that is taken over continues the same checkpoint as before.
    let checkpoint = expected
        .filter(|_| !is_discarded)
        .and_then(|state| state.checkpoint)
        .unwrap_or(request.newest_seen);
    let marker = MarkerState {
        url: place.to_string(),
        volume_id: request.volume_id,
        host: wal_marker::host(),
        journal_id,
        epoch: request.epoch,
        opened_ms: now_ms(),
        watermark: least_watermark,
        checkpoint: Some(checkpoint),
        is_clean: false,
    };
    let wal = OpenWal {
        store,
        url: marker.address(request.store),
        marker: Arc::new(Marker::take(request.store, marker, etag).await?),
        is_discarded,
        is_discard_allowed: request.is_discard_allowed,
    };
    Ok(Begun {
        unfinished: expected.filter(|_| !is_discarded).cloned(),
        wal: Some(wal),
        least_watermark,
        is_inherited: false,
    })
}

async fn shut_older_out(given_up: Option<&MarkerState>, request: &Request<'_>) {
    if let Some(marker) = given_up.filter(|marker| marker.volume_id == request.volume_id) {
        seal_given_up(marker, request.store, request.store_options, request.epoch).await;
    }
}

/// Seals a volume's own WAL on S3 that is given up for another one or for none. An older owner that was only paused would go on
/// acknowledging flushes by it, which nobody would ever replay. A failure is logged: until that owner finds out that it has lost the
/// lease, nothing else stops it.
pub(crate) async fn seal_given_up(
    marker: &MarkerState,
    store: &Store,
    store_options: &StoreOptions,
    epoch: u64,
) {
    let sealed = async {
        let volume_id = marker.volume_id;
        match locate(&marker.place()?, store, volume_id, store_options).await? {
            // An owner keeps a record or a seal there as long as it runs.
            Located::Objects(wal) if !s3::is_empty(&wal).await? => {
                let opened = S3Wal::open(wal, volume_id.as_uuid(), epoch, true).await;
                opened.map(drop)
            }
            Located::Objects(_) | Located::Journal(_) => Ok(()),
        }
    };
    let sealed: Result<(), VolumeError> = sealed.await;
    if let Err(e) = sealed {
        warn!(
            "a server that still runs with the write-ahead log {} may acknowledge flushes there until it finds out that it has \
             lost the volume: {}",
            marker.address(store),
            e.chain()
        );
    }
}

fn others_wal(store: &Store, marker: &MarkerState, what: &str) -> VolumeError {
    VolumeError::Wal {
        url: marker.address(store),
        reason: format!("it is that of volume {}, {what}", marker.volume_id),
        advice: ADVICE_INHERITED,
    }
}

/// Refuses a copy whose marker names a WAL that was not closed. This comes before the copy gets an id of its own: until
/// then the user can still say that the volume was moved.
///
/// # Errors
/// [`VolumeError::Wal`], with the choices.
pub fn check_copied(
    store: &Store,
    marker: Option<&MarkerState>,
    options: &VolumeOptions,
) -> Result<(), VolumeError> {
    let is_decided = options.adopt || options.discard_wal || options.inherited_wal == InheritedWal::Replay;
    match marker.filter(|m| !m.is_clean && !is_decided) {
        Some(marker) => Err(others_wal(store, marker, "of which this one is a copy")),
        None => Ok(()),
    }
}

/// As [`begin`], for a marker that was copied along with the volume and names a WAL that was not closed. That WAL
/// belongs to another volume. Returns `None` when the WAL is this volume's own, or is given up.
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
        return Err(others_wal(
            request.store,
            state,
            "which this one has nothing to do with",
        ));
    }
    let place = match (request.inherited, request.place) {
        (InheritedWal::Replay, Some(place)) => place,
        _ => return Err(others_wal(request.store, state, "of which this one is a copy")),
    };
    let volume_id = state.volume_id.as_uuid();
    let located = locate(place, request.store, state.volume_id, request.store_options).await?;
    let store: Arc<dyn WalStore> = match located {
        Located::Objects(wal) => {
            if s3::is_empty(&wal).await? {
                return Err(emptied(&wal));
            }
            Arc::new(S3Wal::peek(wal, volume_id).await?)
        }
        Located::Journal(path) => Arc::new(
            Journal::open(
                path,
                volume_id,
                Some(state.journal_id.clone().unwrap_or_default()),
            )
            .await?,
        ),
    };
    // The marker stays the original volume's, so that an interrupted replay is continued as a replay of that volume's
    // WAL.
    let marker = Marker::take(request.store, state.clone(), Some(etag)).await?;
    Ok(Some(Begun {
        wal: Some(OpenWal {
            store: Arc::new(Unchanged(store)),
            marker: Arc::new(marker),
            url: state.address(request.store),
            is_discarded: false,
            is_discard_allowed: false,
        }),
        is_inherited: true,
        least_watermark: state.watermark,
        unfinished: Some(state.clone()),
    }))
}

/// Notes in the marker that no record of the WAL is needed any more. The marker stays, because the records may stay
/// too. If the same URL is used again, these records are below the watermark, and so are never replayed over newer
/// data.
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

pub(super) fn warn_given_up(url: Option<&str>) {
    if let Some(url) = url {
        warn!("discard_wal=yes: the writes flushed to the log {url} since the last checkpoint are given up");
    }
}

/// Opens the WAL. `expected` is the marker of an unfinished WAL that must be there. `is_given_up` says that no
/// record in it is needed.
async fn open_store(
    request: &Request<'_>,
    place: &WalPlace,
    expected: Option<&MarkerState>,
    is_given_up: bool,
) -> Result<(Arc<dyn WalStore>, Option<String>), VolumeError> {
    let volume_id = request.volume_id.as_uuid();
    match locate(place, request.store, request.volume_id, request.store_options).await? {
        Located::Objects(wal) => {
            if expected.is_some() && s3::is_empty(&wal).await? {
                return Err(emptied(&wal));
            }
            let url = wal.url.clone();
            let opened = S3Wal::open(wal, volume_id, request.epoch, is_given_up).await;
            let wal = opened.map_err(|e| match e {
                VolumeError::Corrupt { .. } => unusable(&url, e.to_string()),
                e => e,
            })?;
            Ok((Arc::new(wal), None))
        }
        Located::Journal(path) => {
            let expected_id = expected.map(|s| s.journal_id.clone().unwrap_or_default());
            let opened = Journal::open(path, volume_id, expected_id).await;
            let journal = opened.map_err(|e| match (e, expected) {
                (e @ VolumeError::Corrupt { .. }, _) => unusable(place, e.to_string()),
                (e, Some(marker)) => not_here(e, place, marker),
                (e, None) => e,
            })?;
            let id = journal.id().to_owned();
            Ok((Arc::new(journal), Some(id)))
        }
    }
}

#[cfg(test)]
#[path = "recover_wal_tests.rs"]
mod tests;
