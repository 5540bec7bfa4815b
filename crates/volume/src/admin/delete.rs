//! `delete`: a volume and all that is kept beside it.

use serde::Serialize;

use super::info;
use crate::error::VolumeError;
use crate::options::StoreOptions;
use crate::store::{self, Store};
use crate::url::VolumeUrl;

/// What a deletion destroys.
#[derive(Debug, Clone, Serialize)]
pub struct DeletePlan {
    /// The volume's URL.
    pub url: String,
    /// Its size in bytes, as clients see it.
    pub size_bytes: u64,
    /// Objects stored for it.
    pub objects: u64,
    /// Bytes stored for it.
    pub bytes: u64,
}

/// Says what [`delete`] would destroy.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is no volume.
pub async fn delete_plan(url: &VolumeUrl, store_options: &StoreOptions) -> Result<DeletePlan, VolumeError> {
    let store = store::connect(url, store_options).await?;
    plan(&store).await
}

async fn plan(store: &Store) -> Result<DeletePlan, VolumeError> {
    let info = info::of_store(store).await?;
    let mut plan = DeletePlan {
        url: info.url,
        size_bytes: info.size_bytes,
        objects: 0,
        bytes: 0,
    };
    for prefix in [store.data_key(""), store.meta_key("")] {
        for object in store.list(&prefix).await? {
            plan.objects += 1;
            plan.bytes += object.size_bytes;
        }
    }
    Ok(plan)
}

/// Deletes the volume: its inode first, so that what is left by an interruption is no volume any more.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is none.
pub async fn delete(url: &VolumeUrl, store_options: &StoreOptions) -> Result<DeletePlan, VolumeError> {
    let store = store::connect(url, store_options).await?;
    let plan = plan(&store).await?;
    remove(&store).await?;
    Ok(plan)
}

/// Removes everything below the volume's root and its `.meta`.
pub(super) async fn remove(store: &Store) -> Result<(), VolumeError> {
    store.delete(&store.data_key("inode")).await?;
    store.delete_prefix(&store.data_key("")).await?;
    store.delete_prefix(&store.meta_key("")).await?;
    Ok(())
}
