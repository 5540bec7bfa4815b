//! Where the records of a WAL are: a place that was named, found.

use std::path::Path;

use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::base::wal_place::WalPlace;
use crate::meta::wal_marker;
use crate::store::options::StoreOptions;
use crate::store::{self, Store};

/// A place where records are.
pub(crate) enum Located<'a> {
    /// Objects of this store.
    Objects(Store),
    /// A journal's directory.
    Journal(&'a Path),
}

/// Finds the records of the volume with this id. `volume` is the store of the volume that they are opened for. Changes nothing.
///
/// # Errors
/// When the store of the records is not reached.
pub(crate) async fn locate<'a>(
    place: &'a WalPlace,
    volume: &Store,
    volume_id: VolumeId,
    store_options: &StoreOptions,
) -> Result<Located<'a>, VolumeError> {
    Ok(match place {
        WalPlace::Beside => Located::Objects(wal_marker::beside(volume, volume_id)),
        WalPlace::At(url @ VolumeUrl::S3 { .. }) => {
            Located::Objects(store::connect(url, store_options).await?)
        }
        WalPlace::At(VolumeUrl::File { path }) => Located::Journal(path),
    })
}
