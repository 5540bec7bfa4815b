//! Where a volume's objects are stored: an S3 bucket, or a directory that an S3 server in this process serves.
//!
//! [`connect`] gives a [`Store`]. It holds the S3 client that the engine uses, and a few operations for everything else
//! of a volume, with their conditions, errors and the handling of lost answers. The data of a volume is under
//! `<root>/`, and everything beside it (checkpoint list, lease, label) under `<root>.meta/`.

pub(crate) mod below;
pub(crate) mod continuity;
pub(crate) mod copy;
pub(crate) mod environment;
mod error;
mod frames;
#[cfg(feature = "testing")]
pub mod hook;
pub(crate) mod interceptors;
pub(crate) mod lineage;
mod local;
mod operations;
pub(crate) mod options;
pub(crate) mod permission;
pub mod probe;
pub(crate) mod probe_objects;
mod s3;
pub(crate) mod sums;
#[cfg(test)]
mod tests;
mod unfinished;
pub(crate) mod verify;
pub(crate) mod versions;

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use aws_sdk_s3::Client;

pub use frames::Frames;
pub use interceptors::foreign::SeenMarks;

use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::url::VolumeUrl;
use crate::disk::RealDisk;
use crate::metrics::Metrics;
use crate::store::options::StoreOptions;
use lineage::Lineage;
pub(crate) use local::object_dir::Directory;
use local::object_dir::ObjectDir;
pub(crate) use operations::DELETE_KEYS_MAX;

/// Key prefix of the volume in a `file://` store.
const LOCAL_ROOT: &str = "volume";

/// Identifies one write of an object; as the store sent it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ETag(pub String);

/// An object as a listing describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectEntry {
    /// The whole key.
    pub key: String,
    /// Length of the object in bytes.
    pub size_bytes: u64,
    /// When it was written, by the store's clock.
    pub last_modified: SystemTime,
}

/// An object as a HEAD describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Length of the object in bytes.
    pub size_bytes: u64,
    /// The write that stored it.
    pub etag: ETag,
    /// When it was written, by the store's clock.
    pub last_modified: SystemTime,
    /// User metadata (`x-amz-meta-*`).
    pub metadata: HashMap<String, String>,
}

/// The place of one volume. All clones share connections.
#[derive(Clone)]
pub struct Store {
    /// The S3 client, set up for [`bucket`](Self::bucket)'s store.
    pub client: Client,
    /// The bucket.
    pub bucket: String,
    /// Key prefix of the volume, without a slash at either end.
    pub root: String,
    /// The volume's address.
    pub url: VolumeUrl,
    /// The server, for messages.
    endpoint: Arc<str>,
    /// The directory of a `file://` store.
    dir: Option<Arc<ObjectDir>>,
    /// Check values that were read.
    remembered: Arc<sums::Remembered>,
    /// Which volume is expected, for those who read without its lease.
    continuity: Arc<continuity::Continuity>,
    /// Whose objects the container reads: its own alone, until that is said.
    lineage: Arc<Lineage>,
    /// Where its requests are counted.
    metrics: Metrics,
}

/// Connects to the store of a volume. Needs a tokio runtime with time and, for `s3://`, I/O enabled. Creates nothing.
///
/// # Errors
/// Within about 15 s, a [`StoreError`]: `NotFound` for a missing bucket or directory, `AccessDenied`, `Unreachable`
/// naming the endpoint.
pub async fn connect(url: &VolumeUrl, options: &StoreOptions) -> Result<Store, StoreError> {
    let store = unproved(url, options).await?;
    store.check().await?;
    Ok(store)
}

/// As [`connect`], without checking that an `s3://` store answers. [`Store::check`] does that.
///
/// # Errors
/// As [`connect`].
pub(crate) async fn unproved(url: &VolumeUrl, options: &StoreOptions) -> Result<Store, StoreError> {
    let store = match url {
        VolumeUrl::S3 { bucket, prefix } => s3::unproved(url, bucket, prefix, options).await,
        VolumeUrl::File { path } => {
            let open = |path: &Path| ObjectDir::open(path, Box::new(RealDisk));
            connect_dir(url, path, &options.metrics, open).await
        }
    };
    store.map(|store| hooked(store, options))
}

/// Adds what tests put between a volume and its store.
#[cfg_attr(
    not(feature = "testing"),
    expect(unused_mut, unused_variables, reason = "for tests")
)]
fn hooked(mut store: Store, options: &StoreOptions) -> Store {
    #[cfg(feature = "testing")]
    options.hook.attach(&mut store);
    store
}

/// As [`connect`], for the creation of a volume: makes the directory of a `file://` store if it is missing or empty.
/// Buckets are never made.
///
/// # Errors
/// As [`connect`]; also for a directory that holds other things.
pub async fn connect_for_create(url: &VolumeUrl, options: &StoreOptions) -> Result<Store, StoreError> {
    match url {
        VolumeUrl::S3 { .. } => connect(url, options).await,
        VolumeUrl::File { path } => {
            let create = |path: &Path| ObjectDir::create(path, Box::new(RealDisk));
            let store = connect_dir(url, path, &options.metrics, create).await?;
            Ok(hooked(store, options))
        }
    }
}

/// Whether the directory is a `file://` store.
pub(crate) fn is_store(path: &Path) -> bool {
    path.join(local::layout::MARKER).is_file()
}

async fn connect_dir(
    url: &VolumeUrl,
    path: &Path,
    metrics: &Metrics,
    open: impl FnOnce(&Path) -> std::io::Result<ObjectDir> + Send + 'static,
) -> Result<Store, StoreError> {
    let owned = path.to_path_buf();
    let opened = tokio::task::spawn_blocking(move || open(&owned))
        .await
        .map_err(std::io::Error::other);
    let dir = opened
        .and_then(|opened| opened)
        .map_err(|error| dir_error("open", url, &error))?;
    Ok(Store::of_dir(url, Arc::new(dir), path, metrics))
}

/// The error of a directory, with what the user can do.
fn dir_error(operation: &'static str, url: &VolumeUrl, error: &std::io::Error) -> StoreError {
    let (kind, advice) = match error.kind() {
        ErrorKind::NotFound => (
            StoreErrorKind::NotFound,
            "; correct the path, or create the volume first",
        ),
        ErrorKind::PermissionDenied => (
            StoreErrorKind::AccessDenied,
            "; check the directory's permissions; a server that only reads is started with -r",
        ),
        ErrorKind::ReadOnlyFilesystem => (
            StoreErrorKind::AccessDenied,
            "; mount it for writing; a server that only reads is started with -r",
        ),
        _ => (StoreErrorKind::Other, ""),
    };
    StoreError::new(operation, url, kind, format!("{error}{advice}"))
}

impl Store {
    /// Checks that the store answers.
    ///
    /// # Errors
    /// As [`connect`].
    pub(crate) async fn check(&self) -> Result<(), StoreError> {
        match self.url {
            VolumeUrl::S3 { .. } => s3::check(self).await,
            VolumeUrl::File { .. } => Ok(()),
        }
    }

    /// Tests whether the file system of a `file://` store has the properties that a volume needs. Does nothing for
    /// `s3://`.
    ///
    /// # Errors
    /// [`StoreError`] that says what it does not do.
    pub(crate) async fn try_directory(&self) -> Result<(), StoreError> {
        let Some(dir) = self.dir.clone() else {
            return Ok(());
        };
        let tried = tokio::task::spawn_blocking(move || dir.try_out()).await;
        let tried = tried.map_err(std::io::Error::other).and_then(|tried| tried);
        tried.map_err(|error| dir_error("write to", &self.url, &error))
    }

    fn of_dir(url: &VolumeUrl, dir: Arc<ObjectDir>, path: &Path, metrics: &Metrics) -> Self {
        Self {
            client: local::client(dir.clone(), metrics),
            bucket: local::BUCKET.to_string(),
            root: LOCAL_ROOT.to_string(),
            url: url.clone(),
            endpoint: path.display().to_string().into(),
            dir: Some(dir),
            remembered: Arc::default(),
            continuity: Arc::default(),
            lineage: Arc::default(),
            metrics: metrics.clone(),
        }
    }

    /// The store that a client of the engine uses, for reading only.
    pub(crate) fn of_client(client: &Client, bucket: &str, root: &str) -> Self {
        let url = VolumeUrl::S3 {
            bucket: bucket.to_string(),
            prefix: root.to_string(),
        };
        Self {
            client: client.clone(),
            bucket: bucket.to_string(),
            root: root.to_string(),
            endpoint: "the store".into(),
            url,
            dir: None,
            remembered: Arc::default(),
            continuity: Arc::default(),
            lineage: Arc::default(),
            metrics: Metrics::default(),
        }
    }

    /// The place of another volume in the same store, reached as this one is.
    ///
    /// # Errors
    /// [`StoreError`], when a directory cannot be opened.
    pub(crate) async fn at(&self, url: &VolumeUrl) -> Result<Self, StoreError> {
        match (&self.url, url) {
            (VolumeUrl::S3 { .. }, VolumeUrl::S3 { bucket, prefix }) => Ok(Self {
                client: self.client.clone(),
                bucket: bucket.clone(),
                root: prefix.clone(),
                url: url.clone(),
                endpoint: self.endpoint.clone(),
                dir: None,
                remembered: Arc::default(),
                continuity: Arc::default(),
                lineage: Arc::default(),
                metrics: self.metrics.clone(),
            }),
            (VolumeUrl::File { .. }, VolumeUrl::File { path }) => {
                connect_dir(url, path, &self.metrics, |path| {
                    ObjectDir::open(path, Box::new(RealDisk))
                })
                .await
            }
            _ => Err(StoreError::new(
                "use",
                url,
                StoreErrorKind::Refused,
                format!("it is in another kind of store than {}", self.url),
            )),
        }
    }

    /// The objects below `<root>.meta/NAME/`, as a store of their own that is reached as this one is.
    pub(crate) fn beside(&self, name: &str) -> Self {
        let root = self.meta_key(name);
        let url = match &self.url {
            VolumeUrl::S3 { bucket, .. } => VolumeUrl::S3 {
                bucket: bucket.clone(),
                prefix: root.clone(),
            },
            directory @ VolumeUrl::File { .. } => directory.clone(),
        };
        Self {
            root,
            url,
            remembered: Arc::default(),
            continuity: Arc::default(),
            lineage: Arc::default(),
            ..self.clone()
        }
    }

    /// The key of an object of the container.
    pub fn data_key(&self, name: &str) -> String {
        format!("{}/{name}", self.root)
    }

    /// The key of an object beside the container.
    pub fn meta_key(&self, name: &str) -> String {
        format!("{}.meta/{name}", self.root)
    }

    /// What is counted of the volume that it is the store of.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The server or directory behind this store, for messages.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Ends all changes through this store and releases its resources in a directory. Does nothing for `s3://`. A
    /// caller that ends the process then need not wait until the last clone of the store is dropped.
    pub(crate) async fn end_changes(&self) {
        if let Some(dir) = self.dir.clone() {
            let _ = tokio::task::spawn_blocking(move || dir.end_changes()).await;
        }
    }

    /// Removes a `file://` store without objects, with or without its directory. Returns whether there was one to
    /// remove, which is always false for `s3://`. The store cannot be used afterwards.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) async fn remove_if_empty(&self, directory: Directory) -> Result<bool, StoreError> {
        let Some(dir) = self.dir.clone() else {
            return Ok(false);
        };
        let fail = |detail| StoreError::new("remove", &self.url, StoreErrorKind::Other, detail);
        match tokio::task::spawn_blocking(move || dir.remove_if_empty(directory)).await {
            Ok(Ok(removed)) => Ok(removed),
            Ok(Err(error)) => Err(fail(error.message().unwrap_or("unknown failure").to_string())),
            Err(panic) => Err(fail(panic.to_string())),
        }
    }

    /// The error for an object whose bytes are not those that were written.
    pub(crate) fn corrupt(&self, key: &str, reason: impl Into<String>) -> StoreError {
        StoreError::new("use", self.target(key), StoreErrorKind::Corrupt, reason)
    }

    fn target(&self, key: &str) -> String {
        match &self.url {
            VolumeUrl::S3 { bucket, .. } => format!("s3://{bucket}/{key}"),
            VolumeUrl::File { .. } => format!("{} ({key})", self.url),
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store")
            .field("url", &self.url)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}
