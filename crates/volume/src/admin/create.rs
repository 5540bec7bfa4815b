//! `create`: a new, empty volume.

use std::path::Path;

use super::children::{ensure_not_deleted, has_no_inode};
use super::{VolumeInfo, delete, info};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::base::geometry::SIZE_MAX_BYTES;
use crate::base::store_error::StoreErrorKind;
use crate::base::url::VolumeUrl;
use crate::engine::container;
use crate::format::inode;
use crate::meta::import_record::ImportRecord;
use crate::meta::label::{self, Label};
use crate::options::StoreOptions;
use crate::retention::{Policy, put_policy, remove_policy};
use crate::store::{self, Directory, Store, probe, probe_objects};

/// The default block size in bytes, chosen by measurement (docs/benchmarking.md).
pub const DEFAULT_BLOCK_SIZE_BYTES: u32 = 4096;
/// The format's smallest block.
const BLOCK_SIZE_MIN: u32 = 4 << 10;
/// The largest block. No client could write a block whole that is larger than an NBD request.
const BLOCK_SIZE_MAX: u32 = 32 << 20;

/// The properties of a new volume.
#[derive(Debug, Clone, Copy)]
pub struct CreateOptions {
    /// Size of the volume in bytes; space is taken as data is written.
    pub size_bytes: u64,
    /// Size of a data block in bytes: a power of two from 4 KiB to 32 MiB, fixed for the volume's life.
    pub block_size_bytes: u32,
}

/// Checks a size and block size before anything is sent.
pub(super) fn check_size(size_bytes: u64, block_size_bytes: u32) -> Result<(), VolumeError> {
    let invalid = |text: String| Err(VolumeError::InvalidInput(text));
    if !block_size_bytes.is_power_of_two() || !(BLOCK_SIZE_MIN..=BLOCK_SIZE_MAX).contains(&block_size_bytes) {
        return invalid(format!(
            "a block size of {block_size_bytes} bytes cannot be used: give a power of two from 4K to 32M"
        ));
    }
    if size_bytes > SIZE_MAX_BYTES {
        return invalid(format!(
            "a size of {size_bytes} bytes is beyond what NBD can address: give {SIZE_MAX_BYTES} bytes at most, as in --size 7E"
        ));
    }
    Ok(())
}

/// Creates a volume, unless something of an earlier one is left.
///
/// The label is written first, and the whole inode last. So an interruption leaves no volume, but a label that
/// [`delete`] removes.
///
/// [`delete`]: super::delete()
///
/// # Errors
/// [`VolumeError::AlreadyExists`] when there is one at `url`; [`VolumeError::Leftovers`] when part of one is;
/// [`VolumeError::InvalidInput`] for a size that makes no sense, before anything is written.
pub async fn create(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    options: &CreateOptions,
) -> Result<VolumeInfo, VolumeError> {
    create_noting(url, store_options, options, None).await
}

/// As [`create`], for an import: its record is there before the volume is, which so never looks whole before it is.
///
/// # Errors
/// As [`create`].
pub(crate) async fn create_noting(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    options: &CreateOptions,
    import: Option<&ImportRecord>,
) -> Result<VolumeInfo, VolumeError> {
    check_size(options.size_bytes, options.block_size_bytes)?;
    if let VolumeUrl::File { path } = url {
        check_path(url, path)?;
    }
    let store = store::connect_for_create(url, store_options).await?;
    if let VolumeUrl::S3 { bucket, prefix } = url {
        check_prefix(&store, bucket, prefix, |_| false).await?;
    }
    if let Err(e) = check_empty(&store).await {
        // The directory may have been made for this volume.
        store.remove_if_empty(Directory::AsFound).await?;
        return Err(e);
    }
    let CreateOptions {
        size_bytes,
        block_size_bytes,
    } = *options;
    let inode = container::new_inode(&store, block_size_bytes, size_bytes)
        .map_err(|e| VolumeError::engine(format!("creating a volume at {url}"), e))?;
    let made = CheckpointId::of_inode(&inode);
    let label = match label::make(&store, made.check).await {
        Ok(label) => label,
        Err(e) => {
            if !matches!(e, VolumeError::Leftovers { .. }) {
                remove_directory(&store).await;
            }
            return Err(e);
        }
    };
    let noted = async {
        put_policy(&store, &Policy::of_new_volumes()).await?;
        match import {
            Some(record) => record.put(&store).await,
            None => Ok(()),
        }
    };
    if let Err(e) = noted.await {
        undo(&store, &label, made).await;
        return Err(e);
    }
    let created = super::on_owner_thread({
        let store = store.clone();
        move || async move { container::create(&store, &inode).await }
    })
    .await;
    match created {
        Ok(()) => {
            ensure_not_deleted(&store, label.volume_id, made).await?;
            info(url, store_options).await
        }
        // Another tool created the container first. The label is now that volume's.
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            Err(VolumeError::AlreadyExists { url: url.to_string() })
        }
        Err(e) => {
            // If only the answer was lost, the stored container is whole. It is removed before its label.
            undo(&store, &label, made).await;
            Err(VolumeError::engine(format!("creating a volume at {url}"), e))
        }
    }
}

/// Looks whether a volume is to be made inside another one, with which it would be copied and removed.
pub(super) async fn check_prefix(
    store: &Store,
    bucket: &str,
    prefix: &str,
    is_known: impl Fn(&str) -> bool,
) -> Result<(), VolumeError> {
    let all = prefix.match_indices('/').map(|(at, _)| &prefix[..at]);
    let unknown: Vec<&str> = all.filter(|outer| !is_known(outer)).collect();
    for outer in unknown {
        match store.head(&format!("{outer}/{}", inode::NAME)).await {
            Ok(None) => {}
            Ok(Some(info)) if info.size_bytes == inode::GIVEN_UP.len() as u64 => {}
            Ok(Some(_)) => return Err(inside(&store.url, &format!("s3://{bucket}/{outer}/"))),
            // The credentials may be limited to the volume's own prefix.
            // A store that does not mark its answers cannot say so in the answer to a HEAD.
            Err(e)
                if matches!(
                    e.kind,
                    StoreErrorKind::AccessDenied | StoreErrorKind::Unauthenticated
                ) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

pub(crate) fn check_path(url: &VolumeUrl, path: &Path) -> Result<(), VolumeError> {
    match path.ancestors().skip(1).find(|outer| store::is_store(outer)) {
        None => Ok(()),
        Some(outer) => Err(inside(url, &format!("file://{}/", outer.display()))),
    }
}

fn inside(url: &VolumeUrl, outer: &str) -> VolumeError {
    VolumeError::InvalidInput(format!(
        "{url} is inside the volume at {outer}, and would be copied and removed with it: choose a place beside that"
    ))
}

/// Removes whatever may be stored of a volume that could not be created, if what is stored is `made`.
async fn undo(store: &Store, label: &Label, made: CheckpointId) {
    let undone = async {
        let is_made = match inode::load(store).await {
            Ok((there, _)) => CheckpointId::of_inode(&there) == made,
            Err(VolumeError::NotFound { .. }) => false,
            Err(e) => return Err(e),
        };
        if is_made {
            store.delete(&store.data_key(inode::NAME)).await?;
        }
        remove_policy(store).await?;
        ImportRecord::remove(store).await?;
        label::withdraw(store, label).await
    };
    if let Err(e) = undone.await {
        log::warn!(
            "something is left at {} of a volume that could not be created: {e}",
            store.url
        );
    }
    remove_directory(store).await;
}

async fn remove_directory(store: &Store) {
    if let Err(e) = store.remove_if_empty(Directory::AsFound).await {
        log::warn!("the directory of a volume that could not be created is left: {e}");
    }
}

/// Checks that nothing of a volume is stored.
async fn check_empty(store: &Store) -> Result<(), VolumeError> {
    if !has_no_inode(store).await? {
        return Err(VolumeError::AlreadyExists {
            url: store.url.to_string(),
        });
    }
    if let Err(e) = probe_objects::sweep(store).await {
        log::warn!("objects of earlier probes are left: {e}");
    }
    match delete::objects(store)
        .await?
        .into_iter()
        .find(|o| !probe::is_own(store, o))
    {
        Some(object) => Err(VolumeError::Leftovers {
            url: store.url.to_string(),
            found: object.key,
        }),
        None => Ok(()),
    }
}
