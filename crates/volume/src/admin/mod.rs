//! Operations on volumes that are not being served.

use std::path::Path;
use std::sync::Arc;

use futures::try_join;

use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::base::volume_name::VolumeName;
use crate::buffer_file::{BufferDir, is_left_empty};
use crate::engine::Ownership;
use crate::engine::container::{self, Container};
use crate::engine::guard::InodeGuard;
use crate::format::inode;
use crate::format::stored_state::StoredState;
use crate::index::cache::IndexCache;
use crate::index::checksums::IndexChecksums;
use crate::lease::state::Stored;
use crate::lease::{self, Lease};
use crate::meta::label::{self, Found};
use crate::meta::wal_marker;
use crate::open::history::{self, Known};
use crate::open::inspect::{Inspection, inspect};
use crate::open::recover_wal::{self, Wanted};
use crate::options::{LeaseOptions, StoreOptions, VolumeOptions};
use crate::store::below;
use crate::store::permission;
use crate::store::probe::Check;
use crate::store::{self, Directory, Store};

mod children;
mod clone;
mod clone_full;
pub mod compact;
mod create;
mod delete;
mod flatten;
mod grow;
mod info;
mod resize;
pub mod retention;
pub mod rollback;
mod space;
mod tombstone;
pub mod wal;

pub use crate::lease::sighting::Sighting;
pub(crate) use children::ensure_not_deleted;
pub use children::{CloneInfo, ParentInfo};
pub use clone::{Cloned, clone};
pub(crate) use clone::{ensure_free, ensure_stays, own_id, remove_directory};
pub use clone_full::clone_full;
pub use create::{CreateOptions, DEFAULT_BLOCK_SIZE_BYTES, create};
pub(crate) use create::{check_path, create_noting};
pub use delete::{DeletePlan, Deleted, IfDamaged, delete, delete_plan};
pub use flatten::{Flattened, flatten};
pub use grow::{AskedToGrow, ask_to_grow};
pub use info::{VolumeInfo, info, lease_of};
pub use resize::resize;
pub use space::{SnapshotSpace, Space, space};

/// Finds the volume and checks whether a server could open it now, for writing unless `read_only`. Changes nothing of
/// the volume; it probes a store that was not probed yet. Returns what was seen, for [`LeaseOptions::sighting`].
///
/// # Errors
/// [`VolumeError::NotFound`]; [`VolumeError::Held`] when another server has it open for writing, which may take as long
/// as the lease's duration to find out; [`VolumeError::Wal`] when it has another WAL than the one named.
pub async fn check_servable(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    options: &VolumeOptions,
) -> Result<Option<Sighting>, VolumeError> {
    let looked = inspect(url, store_options).await?;
    if options.read_only {
        return Ok(None);
    }
    looked.ensure_safe(store_options.allow_unsafe).await?;
    let sighting = looked.sighting();
    let lease_options = LeaseOptions {
        is_copied: looked.is_elsewhere(),
        ..options.lease.clone()
    };
    let Inspection {
        store, lease, marker, ..
    } = looked;
    let marker = marker?;
    if lease_options.is_copied {
        recover_wal::check_copied(&store, marker.as_ref(), options)?;
    }
    let wanted = Wanted::of(marker.as_ref(), options.wal.as_ref());
    let permitted = ensure_writable(&store, store_options, lease.as_ref());
    let free = async {
        recover_wal::check(
            &store,
            marker.as_ref(),
            store_options,
            wanted.place.as_ref(),
            options.discard_wal,
        )
        .await?;
        lease::probe(&store, &lease_options, lease.clone()).await
    };
    let ((), takeable) = try_join!(permitted, free)?;
    recover_wal::check_claimable(options.wal.as_ref()).await?;
    if let Some(dir) = &options.write_buffer_dir {
        BufferDir::check(dir, &url.to_string(), options.write_buffer_bytes)?;
    }
    Ok(sighting.filter(|seen| takeable.as_ref() == Some(&seen.lease.version)))
}

/// The volumes directly below a URL, by their names. Costs a request for a thousand of them.
///
/// # Errors
/// When there is no such bucket or directory, or it cannot be listed.
pub async fn volumes_below(
    url: &VolumeUrl,
    store_options: &StoreOptions,
) -> Result<Vec<VolumeName>, VolumeError> {
    Ok(below::volumes_below(url, store_options).await?)
}

/// Checks that the credentials may write the volume and its lease. A store that was probed earlier is written to by the first
/// client only, which is too late to say on the terminal that it never can be.
async fn ensure_writable(
    store: &Store,
    store_options: &StoreOptions,
    lease: Option<&Stored>,
) -> Result<(), VolumeError> {
    if store_options.allow_unsafe {
        // A store that ignores conditions would write what it is asked about.
        return Ok(());
    }
    let (key, body) = match lease {
        Some(lease) => {
            let stored = serde_json::to_vec_pretty(&lease.record);
            let stored = stored.map_err(|e| VolumeError::Internal(e.to_string()))?;
            (store.meta_key(lease::NAME), stored)
        }
        None => (store.meta_key(permission::NAME), Vec::new()),
    };
    let data = store.data_key(permission::NAME);
    try_join!(
        store.ensure_writable(&key, body),
        store.ensure_writable(&data, Vec::new()),
    )?;
    Ok(())
}

/// Tests the properties that a volume needs of the store at `url`. There need not be a volume. Leaves nothing behind.
///
/// # Errors
/// When the store is not reached, or refuses the credentials.
pub async fn probe(url: &VolumeUrl, store_options: &StoreOptions) -> Result<Vec<Check>, VolumeError> {
    let store = store::connect_for_create(url, store_options).await?;
    let checks = store::probe::run(&store).await;
    store.remove_if_empty(Directory::AsFound).await?;
    Ok(checks?)
}

/// Takes the volume's lease for a change, as a server does before it serves. A replica is one no more from there on.
async fn take_lease(
    store: &Store,
    store_options: &StoreOptions,
    options: &LeaseOptions,
) -> Result<Arc<Lease>, VolumeError> {
    let lease = take_lease_only(store, store_options, options).await?;
    match label::end_replica(store).await {
        Ok(()) => Ok(lease),
        Err(e) => {
            lease.release(false).await;
            Err(e)
        }
    }
}

/// As [`take_lease`], for what changes nothing that the volume reads as: a replica stays one.
pub(crate) async fn take_lease_only(
    store: &Store,
    store_options: &StoreOptions,
    options: &LeaseOptions,
) -> Result<Arc<Lease>, VolumeError> {
    store::probe::ensure(store, store_options.allow_unsafe).await?;
    let (found, seen) = futures::try_join!(label::find(store), lease::stored(store))?;
    let options = LeaseOptions {
        is_copied: found.as_ref().is_some_and(label::Found::is_elsewhere),
        ..options.clone()
    };
    let label = match found {
        Some(found) => found.label,
        None => label::settle(store, None, None, false).await?,
    };
    let lease = Lease::take(store, label.volume_id, &options, seen, &mut |_| Ok(())).await?;
    // What the store was opened as may be of the past by now: taking a lease can take long.
    let is_still = async {
        match store.lineage().fork() > 0 && !label::load(store).await?.is_some_and(|label| label.is_clone) {
            false => Ok(()),
            true => Err(VolumeError::InvalidInput(format!(
                "{} was flattened, or deleted, while it was waited for: give the command again",
                store.url
            ))),
        }
    };
    match is_still.await {
        Ok(()) => Ok(lease),
        Err(e) => {
            lease.release(false).await;
            Err(e)
        }
    }
}

/// Refuses a volume whose WAL was not ended, because the WAL may hold flushed writes. `then` names what the user can do
/// afterwards.
pub(crate) async fn check_closed(store: &Store, then: &str) -> Result<(), VolumeError> {
    let marker = wal_marker::load(store).await?.map(|(marker, _)| marker);
    let unfinished = marker.filter(|m| !m.is_clean).map(|m| m.address(store));
    check_log(&store.url, unfinished.as_deref(), then)
}

/// As [`check_buffer`] and [`check_closed`]. The buffer's file comes first: what the other advises takes the lease, and what lies in the
/// file is not applied after that.
pub(crate) async fn check_nothing_left(store: &Store, then: &str) -> Result<(), VolumeError> {
    check_buffer(store, then).await?;
    check_closed(store, then).await
}

/// Refuses a volume whose server was killed on this machine and left answered writes: no later server may apply them once somebody
/// else had the volume.
async fn check_buffer(store: &Store, then: &str) -> Result<(), VolumeError> {
    let Some(lease) = lease::load(store).await? else {
        return Ok(());
    };
    let Some(dir) = lease.left_buffer() else {
        return Ok(());
    };
    // Its server ended well, and the store then refused that it give the lease back.
    if lease.holder.is_on_this_machine() && is_left_empty(Path::new(dir)) {
        return Ok(());
    }
    // A copy has the lease of its original, whose server left them.
    let found = label::find(store).await?;
    let is_own = |found: &Found| !found.is_elsewhere() && found.label.volume_id == lease.volume_id;
    match found.as_ref().is_none_or(is_own) {
        true => Err(VolumeError::InvalidInput(format!(
            "a server of {0} runs, or did not end cleanly, and has answered writes in {dir}: stop it if it runs (hypernbd info {0}); \
             else serve the volume with write_buffer_dir={dir} first, and stop that server; then {then}",
            store.url
        ))),
        false => Ok(()),
    }
}

/// As [`check_closed`], for a marker that was already read.
fn check_log(url: &VolumeUrl, unfinished: Option<&str>, then: &str) -> Result<(), VolumeError> {
    match unfinished {
        Some(wal_url) => Err(VolumeError::InvalidInput(format!(
            "{url} is served, or was not closed cleanly, and its log {wal_url} may hold flushed writes: stop its server if it runs \
             (hypernbd info {url}); else publish them first with hypernbd wal replay {url}; then {then}"
        ))),
        None => Ok(()),
    }
}

/// Opens the container for one change by the owner of this lease. Must be called on a thread of its own. `failed` makes
/// the error when the engine fails.
async fn adopt(
    store: &Store,
    lease: &Lease,
    failed: impl FnOnce(std::io::Error) -> VolumeError,
) -> Result<Container, VolumeError> {
    let guard = InodeGuard::opening();
    let checksums = IndexChecksums::default();
    let opened = container::open(store, &guard, checksums, IndexCache::default(), false).await;
    let container = opened.map_err(failed)?;
    guard.close();
    // Adopt, then check (Invariant O1).
    lease.check().await?;
    Ok(container)
}

/// Makes the checkpoint list agree with the container, for the owner of this lease. Returns the generation that is
/// published.
async fn settle_history(store: &Store, lease: &Lease) -> Result<u64, VolumeError> {
    let (raw, _) = inode::load(store).await?;
    let newest = StoredState::of_inode(&raw);
    let checkpoint = Checkpoint {
        id: newest.id(),
        size_bytes: newest.size_bytes(),
        published_ms: inode::modified_ms(&raw),
    };
    let seen = history::look(store, checkpoint, Known::default()).await?;
    seen.settle(inode::modified_ms(&raw), lease.epoch()).await
}

/// Runs an engine operation, whose futures are not `Send`, on a thread of its own and waits for it.
async fn on_owner_thread<F, Fut, R>(operation: F) -> std::io::Result<R>
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = std::io::Result<R>>,
    R: Send + 'static,
{
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || runtime.block_on(operation()))
        .await
        .map_err(std::io::Error::other)?
}
