//! `delete`: removes a volume and everything that is kept beside it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::tombstone::Tombstone;
use super::{children, info, wal};
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::store_error::StoreErrorKind;
use crate::base::url::VolumeUrl;
use crate::engine::Ownership;
use crate::format::inode;
use crate::format::object_names::is_container_object;
use crate::lease::{self, Lease};
use crate::meta::origin::{self, Origin};
use crate::meta::{self, label};
use crate::options::{LeaseOptions, StoreOptions};
use crate::store::{self, DELETE_KEYS_MAX, Directory, ObjectEntry, Store, probe, probe_objects};

/// How far the store's clock may be ahead of this machine's: S3 refuses requests beyond a quarter of an hour.
const CLOCKS_APART_MAX: Duration = Duration::from_secs(24 * 3600);

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

/// What [`delete`] removed.
#[derive(Debug, Clone)]
pub struct Deleted {
    /// What was planned.
    pub plan: DeletePlan,
    /// What was planned to be destroyed.
    pub is_kept_as_versions: bool,
}

/// Lists what [`delete`] would destroy.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is no volume; [`VolumeError::HasClones`] when it has clones.
pub async fn delete_plan(url: &VolumeUrl, store_options: &StoreOptions) -> Result<DeletePlan, VolumeError> {
    let store = store::connect(url, store_options).await?;
    children::ensure_none(&store).await?;
    plan(&store).await
}

async fn plan(store: &Store) -> Result<DeletePlan, VolumeError> {
    let size_bytes = match info::of_store(store).await {
        Ok(info) => info.size_bytes,
        // An interrupted deletion has removed the inode and left the label, which is removed last.
        Err(e @ VolumeError::NotFound { .. }) => {
            if !has_leftovers(store).await? {
                return Err(e);
            }
            0
        }
        // A volume that is too damaged to be read can still be deleted.
        Err(e) if may_be_damage(&e) => {
            log::warn!("the size of {} cannot be told: {}", store.url, e.chain());
            0
        }
        Err(e) => return Err(e),
    };
    let mut plan = DeletePlan {
        url: store.url.to_string(),
        size_bytes,
        objects: 0,
        bytes: 0,
    };
    let objects = objects(store).await?;
    for object in objects.iter().filter(|o| !probe_objects::is_of_probe(store, o)) {
        plan.objects += 1;
        plan.bytes += object.size_bytes;
    }
    Ok(plan)
}

/// Whether something of a volume that is not there is beside its container, where only this project stores objects, or stands in the
/// place of its inode.
async fn has_leftovers(store: &Store) -> Result<bool, VolumeError> {
    let beside = store.list(&store.meta_key("")).await?;
    let is_left = beside.iter().any(|o| !probe::is_own(store, o));
    Ok(is_left || store.head(&store.data_key(inode::NAME)).await?.is_some())
}

/// What happens to a volume when damage hides whether a server holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfDamaged {
    /// It stays, and the caller gets an error.
    Refuse,
    /// It is deleted, because the user says that no server runs on it.
    Delete,
}

/// Deletes the volume. Its label is marked first. The inode is removed before everything else, so that an interruption
/// leaves no volume, and the label last, so that the deletion can be continued.
///
/// The WAL with which the volume was last served is removed too, if it can be reached. Objects below the root that are
/// not a container's are left alone.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is none, [`VolumeError::Held`] when a server has it open for writing; any failure
/// of finding that out, and then nothing is deleted. [`VolumeError::HasClones`] when it has clones. [`VolumeError::Interfered`] when another command is at work there.
pub async fn delete(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    lease_options: &LeaseOptions,
    if_damaged: IfDamaged,
) -> Result<Deleted, VolumeError> {
    let store = store::connect(url, store_options).await?;
    probe_objects::sweep(&store).await?;
    let plan = plan(&store).await?;
    let claim = claim(&store, store_options, lease_options, if_damaged).await?;
    let removed = remove(&store, store_options, &claim).await;
    if let (Err(_), Claim::Lease(lease)) = (&removed, &claim) {
        lease.release(false).await;
    }
    Ok(Deleted {
        plan,
        is_kept_as_versions: removed?,
    })
}

/// What keeps others out of a volume that is about to be deleted.
enum Claim {
    /// Its lease.
    Lease(Arc<Lease>),
    /// There is no inode, because a deletion was interrupted. So no server can open the volume.
    NoInode,
    /// Damage keeps the lease from being taken, and the user says that no server runs on the volume.
    UsersWord,
}

async fn claim(
    store: &Store,
    store_options: &StoreOptions,
    lease_options: &LeaseOptions,
    if_damaged: IfDamaged,
) -> Result<Claim, VolumeError> {
    let taken = async {
        if children::has_no_inode(store).await? {
            return Ok(Claim::NoInode);
        }
        super::take_lease_only(store, store_options, lease_options)
            .await
            .map(Claim::Lease)
    };
    match taken.await {
        Err(e) if may_be_damage(&e) && if_damaged == IfDamaged::Delete => {
            log::warn!(
                "deleted although damage hides whether a server holds {}: {}",
                store.url,
                e.chain()
            );
            Ok(Claim::UsersWord)
        }
        Err(e) if may_be_damage(&e) => Err(VolumeError::Corrupt {
            what: format!("what tells whether a server holds {}", store.url),
            reason: format!(
                "{}; nothing was deleted: stop every server of the volume, then delete it with --damaged",
                e.chain()
            ),
        }),
        other => other,
    }
}

/// Whether the cause may be damage of stored data, rather than the connection to the store or missing permission.
fn may_be_damage(e: &VolumeError) -> bool {
    match e {
        VolumeError::Store(e) => matches!(e.kind, StoreErrorKind::Corrupt | StoreErrorKind::Other),
        e => e.kind() == ErrorKind::Corrupt,
    }
}

/// Removes everything that belongs to the volume. Returns whether the bucket keeps versions of it.
async fn remove(store: &Store, store_options: &StoreOptions, claim: &Claim) -> Result<bool, VolumeError> {
    let inode_key = store.data_key(inode::NAME);
    let label = store.meta_key(label::NAME);
    let lease_key = store.meta_key(lease::NAME);
    let origin_key = store.meta_key(origin::NAME);
    let tombstone = Tombstone::put(store).await?;
    // Whoever clones it has told so by now, or finds the mark.
    if let Err(e) = children::settle(store).await {
        tombstone.withdraw(store).await?;
        return Err(e);
    }
    let origin = given_origin(store).await?;
    let is_kept_as_versions = match claim {
        Claim::NoInode => {
            // Somebody may be making a clone or a copy still, and its inode may arrive at any time. Whoever puts one looks at the label
            // afterwards, which is marked by now: of the two one sees the other.
            if !children::give_up(store).await? {
                return Err(label::interfered(store));
            }
            false
        }
        Claim::Lease(_) | Claim::UsersWord => {
            if let Claim::Lease(lease) = claim {
                lease.check().await?;
            }
            tombstone.check(store).await?;
            store.delete(&inode_key).await?
        }
    };
    // This comes first, while the marker and the label still say which WAL it is.
    wal::remove_wal(store, store_options, None).await;
    let rest: Vec<String> = objects(store)
        .await?
        .into_iter()
        .map(|object| object.key)
        .filter(|key| ![&inode_key, &label, &lease_key].contains(&key))
        // Whose parent it was must be known until that is told.
        .filter(|key| origin.is_none() || *key != origin_key)
        .collect();
    tombstone.check(store).await?;
    // These are uploads of servers that were killed. The server that could still complete one is fenced.
    store
        .abort_uploads(is_container_object, SystemTime::now() + CLOCKS_APART_MAX)
        .await?;
    for batch in rest.chunks(DELETE_KEYS_MAX) {
        tombstone.check(store).await?;
        store.delete_keys(batch).await?;
    }
    if let Some(origin) = &origin {
        tombstone.check(store).await?;
        leave_parent(store, origin).await?;
        store.delete(&origin_key).await?;
    }
    if matches!(claim, Claim::NoInode) {
        tombstone.check(store).await?;
        children::take_given_up(store).await?;
    }
    // Held until nothing is left that another server could open.
    if let Claim::Lease(lease) = claim {
        lease.forget();
    }
    tombstone.check(store).await?;
    store.delete(&lease_key).await?;
    tombstone.remove(store).await?;
    store.remove_if_empty(Directory::Removed).await?;
    Ok(is_kept_as_versions)
}

/// Where a clone comes from, if that can be read. What cannot be read keeps the parent as it is.
async fn given_origin(store: &Store) -> Result<Option<Origin>, VolumeError> {
    match origin::load(store).await {
        Err(e) if e.kind() == ErrorKind::Corrupt => {
            log::warn!(
                "the parent of the clone {} is unknown, and goes on keeping the shared objects: {}",
                store.url,
                e.chain()
            );
            Ok(None)
        }
        origin => origin,
    }
}

/// Tells the parent that it need keep nothing any more for this clone, of which nothing is left.
async fn leave_parent(store: &Store, origin: &Origin) -> Result<(), VolumeError> {
    let parent = origin.parent();
    // A copy of a clone has told nobody anything.
    if origin.url.0 != store.url {
        return Ok(());
    }
    match store.at(&parent.url.0).await {
        Ok(at) => meta::children::remove(&at, &origin.child()).await,
        Err(e) if e.kind == StoreErrorKind::NotFound => {
            log::warn!(
                "the volume that {} was a clone of is not at {}: {e}",
                store.url,
                parent.url.0
            );
            Ok(())
        }
        Err(e) => Err(e.into()),
    }
}

/// Everything stored for the volume, and what probes have left or are about to remove: one that runs while the volume is deleted
/// is for a server that cannot open it any more.
pub(super) async fn objects(store: &Store) -> Result<Vec<ObjectEntry>, VolumeError> {
    let root = store.data_key("");
    let mut objects = store.list(&root).await?;
    objects.retain(|o| o.key.strip_prefix(&root).is_some_and(is_container_object));
    objects.extend(store.list(&store.meta_key("")).await?);
    Ok(objects)
}
