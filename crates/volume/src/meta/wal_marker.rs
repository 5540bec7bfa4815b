//! The WAL marker, `<root>.meta/wal`: it says that a volume has a WAL, where that is, and the watermark of publishes
//! that made no checkpoint.
//!
//! A WAL with records is never ignored, because whoever opens the volume for writing reads this object first. It is
//! written before the first record. A clean stop marks it as clean before it removes the records.

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use crate::base::checkpoint_id::{CheckpointId, NewestCheckpoint};
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::base::stored_text;
use crate::base::url::UrlError;
use crate::base::volume_id::VolumeId;
use crate::base::wal_place::WalPlace;
use crate::store::{ETag, Store};

/// The marker's name below the volume's `.meta/`.
pub const NAME: &str = "wal";
/// What the records of a WAL beside the volume are below, after the volume's `.meta/`. The id of the volume whose records they
/// are comes next, so that a copy, and a volume that is made anew, never takes those of another for its own.
const BESIDE: &str = "log";

/// The contents of the marker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkerState {
    /// The place of the WAL: its URL, or `auto` for one beside the volume.
    #[serde(deserialize_with = "stored_text::printable")]
    pub url: String,
    /// The volume's id.
    pub volume_id: VolumeId,
    /// The host that opened the WAL last.
    #[serde(deserialize_with = "stored_text::printable")]
    pub host: String,
    /// The identity of a journal's directory; `None` for a WAL on S3.
    #[serde(
        default,
        deserialize_with = "stored_text::printable_option",
        skip_serializing_if = "Option::is_none"
    )]
    pub journal_id: Option<String>,
    /// The epoch of the owner.
    #[serde(deserialize_with = "crate::base::counters::epoch")]
    pub epoch: u64,
    /// When the WAL was opened, in milliseconds since 1970-01-01 UTC.
    pub opened_ms: u64,
    /// Every generation up to this one is published, whatever the checkpoint list says.
    #[serde(deserialize_with = "crate::base::counters::generation")]
    pub watermark: u64,
    /// A checkpoint that the volume has if this marker belongs to its history. `None` in markers of earlier releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<CheckpointId>,
    /// Every record in the WAL is published, so the remaining ones may be removed.
    #[serde(default)]
    pub is_clean: bool,
}

impl MarkerState {
    /// Decodes a marker.
    ///
    /// # Errors
    /// A text that says what is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|e| e.to_string())
    }

    /// The place of the WAL.
    ///
    /// # Errors
    /// [`VolumeError::Corrupt`] for a place that this release does not know.
    pub fn place(&self) -> Result<WalPlace, VolumeError> {
        self.url.parse().map_err(|e: UrlError| VolumeError::Corrupt {
            what: "the place of the log in its marker".to_owned(),
            reason: e.to_string(),
        })
    }

    /// Whether the WAL is in this place.
    pub fn is_at(&self, place: &WalPlace) -> bool {
        place.to_string() == self.url
    }

    /// Whether the same opening wrote both. An epoch alone does not say it: a backup that was restored brings back its lease, too.
    fn is_of_owner_of(&self, other: &Self) -> bool {
        (self.volume_id, self.epoch, self.opened_ms, &self.host)
            == (other.volume_id, other.epoch, other.opened_ms, &other.host)
    }

    /// The address of the WAL of the volume with this store, for people.
    pub fn address(&self, volume: &Store) -> String {
        match self.is_at(&WalPlace::Beside) {
            true => beside(volume, self.volume_id).url.to_string(),
            false => self.url.clone(),
        }
    }
}

/// Warns of flushed writes that only the WAL may have. `consequence` says what becomes of them.
pub(crate) fn warn_of_unpublished(
    store: &Store,
    marker: Result<Option<MarkerState>, VolumeError>,
    consequence: &str,
) {
    match marker {
        Ok(Some(marker)) if !marker.is_clean => log::warn!(
            "the log {} may hold flushed writes that are not published: {consequence}",
            marker.address(store)
        ),
        Ok(_) => {}
        Err(e) => log::warn!(
            "it is unknown whether the volume has a write-ahead log: {}",
            e.chain()
        ),
    }
}

/// As [`warn_of_unpublished`], of a volume whose marker was not looked at yet. `lacks` says what those writes are not in.
pub(crate) async fn warn_if_unpublished(store: &Store, lacks: &str) {
    let marker = load(store).await.map(|found| found.map(|(marker, _)| marker));
    let consequence = format!(
        "they are not {lacks}; hypernbd snapshot create publishes them where the server runs on this host, and a server that stops \
         publishes them as well; of one that was killed, hypernbd wal replay does"
    );
    warn_of_unpublished(store, marker, &consequence);
}

/// The records of the WAL beside the volume with this store, of the volume with this id.
pub(crate) fn beside(volume: &Store, volume_id: VolumeId) -> Store {
    volume.beside(&format!("{BESIDE}/{volume_id}"))
}

/// Whether an object of this name, below the volume's `.meta/`, is of a WAL beside it.
pub(crate) fn is_beside(name: &str) -> bool {
    name.split_once('/').is_some_and(|(dir, _)| dir == BESIDE)
}

/// Removes the records beside the volume that carry the id of another one: they were copied along with it, and were replayed or
/// given up since. Returns how many there were.
///
/// # Errors
/// When the store fails.
pub(crate) async fn remove_inherited(volume: &Store, own: VolumeId) -> Result<usize, VolumeError> {
    let own = beside(volume, own).data_key("");
    let listed = volume.list(&volume.meta_key(&format!("{BESIDE}/"))).await?;
    let keys = listed.into_iter().map(|object| object.key);
    let keys: Vec<String> = keys.filter(|key| !key.starts_with(&own)).collect();
    volume.delete_keys(&keys).await?;
    Ok(keys.len())
}

/// Loads the marker, if there is one.
///
/// # Errors
/// When the store fails or the marker cannot be read.
pub async fn load(store: &Store) -> Result<Option<(MarkerState, ETag)>, VolumeError> {
    let key = store.meta_key(NAME);
    let Some((body, etag)) = store.get(&key).await? else {
        return Ok(None);
    };
    let state = MarkerState::decode(&body).map_err(|reason| VolumeError::Corrupt {
        what: format!("the log's marker {key}"),
        reason,
    })?;
    Ok(Some((state, etag)))
}

/// The name of this host, for people.
pub fn host() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_else(|_| "unknown".to_owned())
}

/// The marker of a WAL that this server has open.
#[derive(Debug)]
pub struct Marker {
    store: Store,
    current: Mutex<(MarkerState, ETag)>,
    newest: NewestCheckpoint,
}

impl Marker {
    /// Stores `state` in place of the marker `before`, or as a new object. From then on the marker's older owner cannot
    /// change it.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when another owner wrote it first.
    pub async fn take(store: &Store, state: MarkerState, before: Option<&ETag>) -> Result<Self, VolumeError> {
        let etag = write(store, &state, before).await?;
        Ok(Self {
            store: store.clone(),
            newest: state.checkpoint.map(NewestCheckpoint::new).unwrap_or_default(),
            current: Mutex::new((state, etag)),
        })
    }

    /// The newest recorded checkpoint. The next write of the marker names it.
    pub fn newest(&self) -> &NewestCheckpoint {
        &self.newest
    }

    /// Records that every generation up to this one is published.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when another server has the WAL now.
    pub async fn raise_watermark(&self, generation: u64) -> Result<(), VolumeError> {
        self.update(|state| state.watermark = state.watermark.max(generation))
            .await
    }

    /// Records that everything in the WAL is published, up to this generation.
    ///
    /// # Errors
    /// As [`Self::raise_watermark`].
    pub async fn set_clean(&self, generation: u64) -> Result<(), VolumeError> {
        self.update(|state| {
            state.watermark = state.watermark.max(generation);
            state.is_clean = true;
        })
        .await
    }

    /// Names a newer checkpoint, unless the named one is among the last `near`. Retention keeps the checkpoint that is
    /// named.
    ///
    /// # Errors
    /// As [`Self::raise_watermark`].
    pub async fn follow(&self, near: u64) -> Result<(), VolumeError> {
        let named = self.current.lock().await.0.checkpoint.map_or(0, |id| id.cno);
        match self.newest.get() {
            Some(newest) if newest.cno > named.saturating_add(near) => self.raise_watermark(0).await,
            _ => Ok(()),
        }
    }

    async fn update(&self, change: impl FnOnce(&mut MarkerState)) -> Result<(), VolumeError> {
        let mut current = self.current.lock().await;
        let mut state = current.0.clone();
        change(&mut state);
        state.checkpoint = self.newest.get().or(state.checkpoint);
        let etag = match write(&self.store, &state, Some(&current.1)).await {
            Ok(etag) => etag,
            // An earlier attempt may have been carried out, and its answer lost.
            Err(fenced @ VolumeError::Fenced { .. }) => match load(&self.store).await? {
                Some((there, etag)) if there == state => etag,
                // One that this owner wrote earlier, of which it never heard.
                Some((there, etag)) if there.is_of_owner_of(&state) => {
                    write(&self.store, &state, Some(&etag)).await?
                }
                _ => return Err(fenced),
            },
            Err(e) => return Err(e),
        };
        *current = (state, etag);
        Ok(())
    }
}

async fn write(store: &Store, state: &MarkerState, before: Option<&ETag>) -> Result<ETag, VolumeError> {
    let key = store.meta_key(NAME);
    let body = serde_json::to_vec(state).map_err(|e| VolumeError::Internal(e.to_string()))?;
    let written = match before {
        Some(etag) => store.put_if_match(&key, body, etag).await,
        None => store.put_create_only(&key, body).await,
    };
    written.map_err(|e| match e.kind {
        StoreErrorKind::PreconditionFailed | StoreErrorKind::NotFound => VolumeError::Fenced {
            reason: format!("another server has taken over the log at {}", state.url),
        },
        _ => e.into(),
    })
}
