//! A volume's label, `<root>.meta/volume.json`: who it is, apart from where it lies.
//!
//! The id is made when the volume is created, or at the first read-write open of a volume made elsewhere, so a volume
//! deleted and created again at the same URL never meets caches or logs of the one before.

use serde::{Deserialize, Serialize};

use crate::clock::now_ms;
use crate::error::VolumeError;
use crate::store::{Store, StoreErrorKind};

/// The label's name below the volume's `.meta/`.
pub(super) const NAME: &str = "volume.json";

/// The label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// A random UUID.
    pub volume_id: String,
    /// When the label was made, in milliseconds since 1970-01-01 UTC.
    pub created_ms: u64,
}

/// Reads the label, if there is one.
///
/// # Errors
/// When the store fails or the label is not one.
pub async fn load(store: &Store) -> Result<Option<Label>, VolumeError> {
    let key = store.meta_key(NAME);
    let Some((body, _)) = store.get(&key).await? else {
        return Ok(None);
    };
    serde_json::from_slice(&body)
        .map(Some)
        .map_err(|e| VolumeError::Corrupt {
            what: format!("the label {key}"),
            reason: e.to_string(),
        })
}

/// Reads the label, or makes it. Of several makers one wins, and all return its label.
///
/// # Errors
/// As [`load`].
pub async fn ensure(store: &Store) -> Result<Label, VolumeError> {
    if let Some(label) = load(store).await? {
        return Ok(label);
    }
    let (label, body) = new_label()?;
    match store.put_create_only(&store.meta_key(NAME), body).await {
        Ok(_) => Ok(label),
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => load(store)
            .await?
            .ok_or_else(|| VolumeError::Internal("a label appeared and vanished again".into())),
        Err(e) => Err(e.into()),
    }
}

/// Makes the label of a new volume. One that is there already is not believed.
///
/// # Errors
/// [`VolumeError::Leftovers`] when there is one; when the store fails.
pub(super) async fn make(store: &Store) -> Result<Label, VolumeError> {
    let key = store.meta_key(NAME);
    let (label, body) = new_label()?;
    match store.put_create_only(&key, body).await {
        Ok(_) => Ok(label),
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Err(VolumeError::Leftovers {
            url: store.url.to_string(),
            found: key,
        }),
        Err(e) => Err(e.into()),
    }
}

fn new_label() -> Result<(Label, Vec<u8>), VolumeError> {
    let label = Label {
        volume_id: uuid::Uuid::new_v4().to_string(),
        created_ms: now_ms(),
    };
    let body = serde_json::to_vec(&label).map_err(|e| VolumeError::Internal(e.to_string()))?;
    Ok((label, body))
}
