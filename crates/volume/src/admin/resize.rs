//! `resize`: changes the size of a volume that is not being served.

use std::sync::Arc;

use hyperfile::file::HyperTrait;

use super::create::check_size;
use super::{VolumeInfo, check_buffer, check_closed, check_log, info};
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::engine;
use crate::engine::parents;
use crate::lease::Lease;
use crate::options::{LeaseOptions, StoreOptions};
use crate::store::Store;

/// What the user can do once the WAL is closed.
const THEN: &str = "resize it";

/// Gives the volume a new size. A server running on it must be stopped first; it may be asked to grow it (`ask_to_grow`).
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
    let store = parents::connect(url, store_options).await?;
    let before = info::of_store(&store).await?;
    // Who takes the volume from a server gives up what that one has not flushed.
    if !lease_options.takeover {
        check_buffer(&store, THEN).await?;
    }
    check_log(url, before.wal_url.as_deref(), THEN)?;
    check_size(new_size_bytes, before.block_size_bytes)?;
    let wanted = Wanted {
        url: url.clone(),
        size_bytes: new_size_bytes,
        is_shrinking_allowed: allow_shrink,
    };
    if wanted.differs_from(before.size_bytes)? {
        let lease = super::take_lease(&store, store_options, lease_options).await?;
        let resized = resize_owned(&store, &lease, wanted).await;
        lease.release(resized.is_ok()).await;
        resized?;
    }
    info::of_store(&store).await
}

/// The requested change.
struct Wanted {
    url: VolumeUrl,
    size_bytes: u64,
    is_shrinking_allowed: bool,
}

impl Wanted {
    /// Whether a volume of `size_bytes` needs the change.
    fn differs_from(&self, size_bytes: u64) -> Result<bool, VolumeError> {
        let Self {
            url,
            size_bytes: new_size_bytes,
            is_shrinking_allowed,
        } = self;
        if *new_size_bytes < size_bytes && !is_shrinking_allowed {
            return Err(VolumeError::InvalidInput(format!(
                "{url} has {size_bytes} bytes; shrinking it to {new_size_bytes} loses what lies past that: confirm with \
                 --allow-shrink"
            )));
        }
        Ok(*new_size_bytes != size_bytes)
    }
}

/// Resizes under the lease. The state that was seen before the lease was taken may have changed by then.
async fn resize_owned(store: &Store, lease: &Arc<Lease>, wanted: Wanted) -> Result<(), VolumeError> {
    check_closed(store, THEN).await?;
    // A checkpoint that a killed server left without an entry gets one before there is a newer one: it has what shrinking loses.
    super::settle_history(store, lease).await?;
    let (owned, of) = (store.clone(), lease.clone());
    super::on_owner_thread(move || async move { Ok(resize_adopted(&owned, &of, &wanted).await) })
        .await
        .map_err(|e| VolumeError::Internal(format!("the thread that resizes ended early: {e}")))??;
    // Adds the checkpoint to the checkpoint list. Otherwise the next open would add it.
    super::settle_history(store, lease).await?;
    Ok(())
}

async fn resize_adopted(store: &Store, lease: &Lease, wanted: &Wanted) -> Result<(), VolumeError> {
    let failed = |e| VolumeError::engine(format!("resizing {}", wanted.url), e);
    let mut container = super::adopt(store, lease, failed).await?;
    if wanted.differs_from(container.inode().size() as u64)? {
        engine::resize::resize(store, &mut container, wanted.size_bytes)
            .await
            .map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::{CreateOptions, create};
    use crate::base::error::ErrorKind;
    use crate::meta::wal_marker::{Marker, MarkerState};
    use crate::store;

    /// A server may have come and gone between the inspection and the lease.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_seen_before_the_lease_is_looked_at_again_under_it() {
        let dir = tempfile::tempdir().unwrap();
        let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
        let store_options = StoreOptions::default();
        let options = CreateOptions {
            size_bytes: 1 << 20,
            block_size_bytes: 4096,
        };
        create(&url, &store_options, &options).await.unwrap();
        let store = store::connect(&url, &store_options).await.unwrap();
        let lease = super::super::take_lease(&store, &store_options, &LeaseOptions::default()).await;
        let lease = lease.unwrap();
        let wanted = |size_bytes| Wanted {
            url: url.clone(),
            size_bytes,
            is_shrinking_allowed: false,
        };
        let shrunk = resize_owned(&store, &lease, wanted(1 << 19)).await.unwrap_err();
        assert_eq!(shrunk.kind(), ErrorKind::InvalidInput, "{shrunk}");
        let state = serde_json::json!({
            "url": "s3://bucket/log/", "volume_id": "423a30c5-ce77-40c3-9299-a143d31c733a", "host": "h", "epoch": 1, "opened_ms": 1, "watermark": 0,
        });
        let state: MarkerState = serde_json::from_value(state).unwrap();
        Marker::take(&store, state, None).await.unwrap();
        let refused = resize_owned(&store, &lease, wanted(1 << 21)).await.unwrap_err();
        assert!(refused.to_string().contains("wal replay"), "{refused}");
        assert_eq!(info::of_store(&store).await.unwrap().size_bytes, 1 << 20);
        lease.release(true).await;
    }
}
