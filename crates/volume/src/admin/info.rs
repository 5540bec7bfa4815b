//! `info`: shows what is known of a volume.

use hyperfile::config::HyperFileMetaConfig;
use serde::Serialize;

use super::children::{self, CloneInfo, ParentInfo};
use crate::base::counters::{CounterUse, OWNERS};
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::engine::limits;
use crate::format::inode;
use crate::lease::{self, LeaseRecord};
use crate::meta::import_record::ImportRecord;
use crate::meta::label::Original;
use crate::meta::scrub_record::ScrubRecord;
use crate::meta::{label, origin, wal_marker};
use crate::options::StoreOptions;
use crate::options::durability::Durability;
use crate::store::{self, Store};

/// What is known of a volume without opening it.
#[derive(Debug, Clone, Serialize)]
pub struct VolumeInfo {
    /// Its URL.
    pub url: String,
    /// Its id; `None` when the volume was made elsewhere and never opened for writing here.
    pub volume_id: Option<VolumeId>,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Size of a data block in bytes.
    pub block_size_bytes: u32,
    /// How the container addresses its blocks.
    pub format: String,
    /// Number of the newest checkpoint; 0 before the first.
    pub last_checkpoint: u64,
    /// The newest checkpoint number used, including those of failed publishes; at most
    /// [`CHECKPOINT_NUMBER_MAX`](crate::engine::limits::CHECKPOINT_NUMBER_MAX).
    pub checkpoint_numbers_used: u64,
    /// The largest checkpoint number there is.
    pub checkpoint_numbers_max: u64,
    /// The volume's counter that ends first, if all go on as before.
    pub nearest_end: Option<CounterUse>,
    /// When the container last changed, in milliseconds since 1970-01-01 UTC, by its writer's clock.
    pub modified_ms: u64,
    /// Bytes of blocks that were ever written; an upper bound of the live data.
    pub mapped_bytes: u64,
    /// The write-ahead log with which it was last served, unless that was ended cleanly.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wal_url: Option<String>,
    /// What a flush means.
    pub durability: String,
    /// The import that is running or was interrupted. The volume then holds only a part of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub import: Option<ImportRecord>,
    /// How far the scrub of its servers is, and the damage that it found; `None` where there never was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scrub: Option<ScrubRecord>,
    /// The lease: which server may write to the volume, or was the last that might. `None` before the volume is first
    /// served.
    pub lease: Option<LeaseRecord>,
    /// The volume that it is a clone of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clone_of: Option<ParentInfo>,
    /// The volume that it is a replica of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica_of: Option<Original>,
    /// Its clones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub clones: Vec<CloneInfo>,
}

/// Inspects a volume. Changes nothing.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is none.
pub async fn info(url: &VolumeUrl, store_options: &StoreOptions) -> Result<VolumeInfo, VolumeError> {
    let store = store::connect(url, store_options).await?;
    of_store(&store).await
}

/// The lease of a volume, if it has one: which server may write to it, or was the last that might. Looks at nothing else.
///
/// # Errors
/// When the store fails, or the lease cannot be read.
pub async fn lease_of(
    url: &VolumeUrl,
    store_options: &StoreOptions,
) -> Result<Option<LeaseRecord>, VolumeError> {
    let store = store::connect(url, store_options).await?;
    lease::load(&store).await
}

/// As [`info`], for a connected store.
pub(crate) async fn of_store(store: &Store) -> Result<VolumeInfo, VolumeError> {
    let url = &store.url;
    let (inode, label, lease, marker, import, scrub, clones) = futures::join!(
        inode::load(store),
        label::load(store),
        lease::load(store),
        wal_marker::load(store),
        ImportRecord::load(store),
        ScrubRecord::load(store),
        children::known(store)
    );
    let (inode, _) = inode?;
    let meta = HyperFileMetaConfig::try_from_u32(inode.i_meta_config).map_err(|e| VolumeError::Corrupt {
        what: format!("the volume at {url}"),
        reason: e.to_string(),
    })?;
    let wal = marker?
        .map(|(marker, _)| marker)
        .filter(|marker| !marker.is_clean);
    let lease = lease?;
    let counters = [
        limits::CHECKPOINT_NUMBERS.used(inode.i_last_seq),
        OWNERS.used(lease.as_ref().map_or(0, |lease| lease.epoch)),
    ];
    let label = label?;
    let origin = match &label {
        Some(label) if label.is_clone => origin::load(store).await?,
        _ => None,
    };
    let place = wal.as_ref().and_then(|marker| marker.place().ok());
    // A volume that was copied has the original's record until its own scrub writes one.
    let scrub = scrub?.filter(|scrub| {
        label
            .as_ref()
            .is_some_and(|label| label.volume_id == scrub.volume_id)
    });
    let replica_of = label.as_ref().and_then(|label| label.replica_of.clone());
    Ok(VolumeInfo {
        url: url.to_string(),
        volume_id: label.map(|l| l.volume_id),
        size_bytes: inode.i_size,
        block_size_bytes: meta.data_block_size as u32,
        format: format!("{:?}", meta.block_ptr_format),
        last_checkpoint: inode.i_last_cno,
        checkpoint_numbers_used: inode.i_last_seq,
        checkpoint_numbers_max: limits::CHECKPOINT_NUMBER_MAX,
        nearest_end: CounterUse::nearest(counters),
        modified_ms: inode.i_mtime.saturating_mul(1000) + u64::from(inode.i_mtime_nsec) / 1_000_000,
        // Counted in sectors of 512 bytes, as st_blocks is.
        mapped_bytes: inode.i_blocks.saturating_mul(512),
        wal_url: wal.map(|marker| marker.address(store)),
        durability: Durability::of(url, place.as_ref()).sentence().to_owned(),
        import: import?,
        scrub,
        lease,
        clone_of: origin.as_ref().map(ParentInfo::of),
        replica_of,
        clones: clones?,
    })
}
