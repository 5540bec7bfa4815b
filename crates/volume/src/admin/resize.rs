//! `resize`: another size for a volume that is not being served.

use super::create::check_size;
use super::{VolumeInfo, info};
use crate::engine::guard::InodeGuard;
use crate::engine::index_cache::IndexCache;
use crate::engine::index_seal::IndexSeals;
use crate::engine::{Ownership, container};
use crate::error::VolumeError;
use crate::options::{LeaseOptions, StoreOptions};
use crate::store;
use crate::url::VolumeUrl;

/// Gives the volume a new size. A server running on it must be stopped first.
///
/// # Errors
/// [`VolumeError::InvalidInput`] for a smaller size unless `allow_shrink`: bytes past the new end are lost.
/// [`VolumeError::Held`] when a server has it open for writing.
pub async fn resize(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    new_size_bytes: u64,
    allow_shrink: bool,
    lease_options: &LeaseOptions,
) -> Result<VolumeInfo, VolumeError> {
    let store = store::connect(url, store_options).await?;
    let before = info::of_store(&store).await?;
    if let Some(wal_url) = &before.wal_url {
        return Err(VolumeError::InvalidInput(format!(
            "{url} was not closed cleanly, and its log {wal_url} may hold flushed writes: publish them first with \
             hypernbd wal replay {url}, then resize"
        )));
    }
    check_size(new_size_bytes, before.block_size_bytes)?;
    if new_size_bytes < before.size_bytes && !allow_shrink {
        return Err(VolumeError::InvalidInput(format!(
            "{url} has {} bytes; shrinking it to {new_size_bytes} loses what lies past that: confirm with \
             --allow-shrink",
            before.size_bytes
        )));
    }
    if new_size_bytes != before.size_bytes {
        let lease = super::take_lease(&store, store_options, lease_options).await?;
        let resized = super::on_owner_thread({
            let (store, lease) = (store.clone(), lease.clone());
            move || async move {
                let guard = InodeGuard::opening();
                let mut container = container::open(
                    &store,
                    &guard,
                    IndexSeals::new(store.clone()),
                    IndexCache::default(),
                    false,
                )
                .await?;
                guard.close();
                // Adopt, then check (Invariant O1).
                lease.check().await.map_err(std::io::Error::other)?;
                container.truncate(new_size_bytes as usize).await
            }
        })
        .await
        .map_err(|e| VolumeError::engine(format!("resizing {url}"), e));
        lease.release(resized.is_ok()).await;
        resized?;
    }
    info::of_store(&store).await
}
