//! The write-ahead log (WAL) of a volume that is not being served: inspect it, replay it, give it up.

use serde::Serialize;

use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::base::wal_place::WalPlace;
use crate::lease::Lease;
use crate::meta::label;
use crate::meta::wal_marker::{self, MarkerState};
use crate::open::recover_wal::{give_up_marker, seal_given_up};
use crate::options::{InheritedWal, LeaseOptions, StoreOptions, VolumeOptions};
use crate::store::{self, Store};
use crate::volume::Volume;
use crate::wal::WalStore;
use crate::wal::journal::Journal;
use crate::wal::place::{Located, locate};
use crate::wal::s3::{self, S3Wal};

/// What the user can do once the buffer's file was applied.
const REPLAY: &str = "replay its log";

/// What is known of a volume's WAL.
#[derive(Debug, Clone, Serialize)]
pub struct WalInfo {
    /// The volume's URL.
    pub url: String,
    /// The contents of the volume's WAL marker; `None` when the last server ended cleanly, or had no WAL.
    #[serde(rename = "log")]
    pub wal: Option<MarkerState>,
    /// The address of the WAL.
    pub address: Option<String>,
    /// Number of objects of the WAL, including the seals of older servers' parts; `None` for a journal.
    pub records: Option<u64>,
}

/// Inspects a volume's WAL. Changes nothing.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is no volume; when the bucket of the WAL cannot be reached.
pub async fn info(url: &VolumeUrl, store_options: &StoreOptions) -> Result<WalInfo, VolumeError> {
    let store = store::connect(url, store_options).await?;
    super::info::of_store(&store).await?;
    let wal = wal_marker::load(&store).await?.map(|(marker, _)| marker);
    let wal = wal.filter(|marker| !marker.is_clean);
    let records = match &wal {
        Some(marker) => match locate(&marker.place()?, &store, marker.volume_id, store_options).await? {
            Located::Objects(wal) => Some(s3::list(&wal).await?.len() as u64),
            Located::Journal(_) => None,
        },
        None => None,
    };
    Ok(WalInfo {
        url: url.to_string(),
        address: wal.as_ref().map(|marker| marker.address(&store)),
        wal,
        records,
    })
}

/// Publishes the changes in a WAL and removes it. `wal_url` may be left out, because the volume knows it. If this
/// volume is a copy, the original's WAL is read and left as it is; with `adopt` the volume was moved, and the WAL is
/// its own. Returns whether there was a WAL.
///
/// # Errors
/// As opening the volume. Nothing is lost then.
pub async fn replay(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    wal_url: Option<&VolumeUrl>,
    lease: &LeaseOptions,
    adopt: bool,
) -> Result<bool, VolumeError> {
    let found = info(url, store_options).await?;
    let Some(marker) = found.wal else {
        return Ok(false);
    };
    // The opening takes the lease without the directory, and what lies in it is not applied after that.
    super::check_buffer(&store::connect(url, store_options).await?, REPLAY).await?;
    let known = marker.place()?;
    let options = VolumeOptions {
        wal: Some(wal_url.cloned().map_or(known, WalPlace::At)),
        adopt,
        inherited_wal: InheritedWal::Replay,
        lease: lease.clone(),
        ..VolumeOptions::default()
    };
    let volume = Volume::open(url, store_options, &options).await?;
    // Closing blocks its thread.
    tokio::task::spawn_blocking(move || volume.close(options.io_timeout))
        .await
        .map_err(|e| VolumeError::Internal(e.to_string()))??;
    Ok(true)
}

/// Gives up a WAL: the writes that were flushed to it since the last checkpoint are lost. Its records are removed if
/// they can be reached. Returns whether there was a WAL.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is no volume, [`VolumeError::Held`] when a server has it open for writing; when
/// its store fails.
pub async fn discard(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    lease_options: &LeaseOptions,
) -> Result<bool, VolumeError> {
    let store = store::connect(url, store_options).await?;
    super::info::of_store(&store).await?;
    let found = wal_marker::load(&store).await?;
    let Some((marker, _)) = found.filter(|(marker, _)| !marker.is_clean) else {
        return Ok(false);
    };
    let lease = super::take_lease(&store, store_options, lease_options).await?;
    let given_up = async {
        let found = label::find(&store).await?;
        if found.is_some_and(|found| !found.is_elsewhere() && found.label.volume_id == marker.volume_id) {
            // Before the marker, which would let nobody look for an owner that still appends.
            seal_given_up(&marker, &store, store_options, lease.epoch()).await;
        }
        // The marker comes before the records are removed, so that a half-removed WAL is never replayed.
        give_up_marker(&store).await?;
        // Records that cannot be removed are never replayed, because the marker stays and is clean.
        let is_older_alive = lease.older_may_run();
        remove_wal(&store, store_options, Some((&lease, is_older_alive))).await;
        Ok(true)
    }
    .await;
    lease.release(given_up.is_ok()).await;
    given_up
}

/// Removes the records of the WAL that the volume's marker names. With a lease, older servers are shut out first, and
/// stay shut out if one may be alive. Returns `false` when it failed; the log says why.
pub(super) async fn remove_wal(
    store: &Store,
    store_options: &StoreOptions,
    owner: Option<(&Lease, bool)>,
) -> bool {
    let removed = async {
        let Some((marker, _)) = wal_marker::load(store).await? else {
            return Ok(());
        };
        let Some(found) = label::find(store).await? else {
            return Ok(());
        };
        let is_copied = found.is_elsewhere();
        let label = found.label;
        if is_copied || marker.volume_id != label.volume_id {
            // The original volume may be using it.
            log::info!(
                "the log {} stays: it is that of volume {}, of which this one is a copy",
                marker.address(store),
                marker.volume_id
            );
            return Ok(());
        }
        let volume_id = label.volume_id.as_uuid();
        match locate(&marker.place()?, store, label.volume_id, store_options).await? {
            Located::Objects(wal) => match owner {
                Some((lease, is_older_alive)) => {
                    let wal = S3Wal::open(wal, volume_id, lease.epoch(), true).await?;
                    wal.clear(is_older_alive).await
                }
                None => s3::remove_all(&wal, volume_id).await.map(drop),
            },
            Located::Journal(path) => {
                let id = marker.journal_id.clone().unwrap_or_default();
                Journal::open(path, volume_id, Some(id)).await?.clear(false).await
            }
        }
    };
    let removed: Result<(), VolumeError> = removed.await;
    if let Err(e) = &removed {
        log::warn!(
            "the records of the volume's log could not be removed: {}",
            e.chain()
        );
    }
    removed.is_ok()
}
