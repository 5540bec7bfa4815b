//! What shows that a place that is copied to is still the copier's.
//!
//! Whoever copies may be stopped for long, and another volume be made at that place meanwhile, which has other objects under the same
//! names. So the place is looked at again before each copy, and what is put there replaces nothing but what was there while the place was
//! seen to be the copier's.

use bytes::Bytes;

use super::Lease;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::store_error::StoreErrorKind;
use crate::base::volume_id::VolumeId;
use crate::engine::Ownership;
use crate::meta::label;
use crate::store::Store;

/// What the copier holds the place by.
#[derive(Clone, Copy)]
pub(crate) enum Holding<'a> {
    /// The lease of the volume there.
    Lease(&'a Lease),
    /// The id in its label, where nobody holds a lease for this: it is being made, or is repaired. None without a label.
    Label(Option<VolumeId>),
}

impl Holding<'_> {
    /// By the label that is there now.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn by_label(place: &Store) -> Result<Self, VolumeError> {
        Ok(Self::Label(id_at(place).await?))
    }

    /// Sees that the place is still the copier's.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] or [`VolumeError::Interfered`] when it is not; when the store fails.
    pub async fn ensure(self, place: &Store) -> Result<(), VolumeError> {
        match self {
            Self::Lease(lease) => lease.check().await,
            Self::Label(id) if id_at(place).await? == id => Ok(()),
            Self::Label(_) => Err(label::interfered(place)),
        }
    }

    /// Puts what lies beside a copy: where nothing is, or over what was there while the place was still the copier's.
    ///
    /// # Errors
    /// As [`Self::ensure`].
    pub async fn put(self, place: &Store, key: &str, body: impl Into<Bytes>) -> Result<(), VolumeError> {
        let body: Bytes = body.into();
        let is_there = |kind| matches!(kind, StoreErrorKind::PreconditionFailed | StoreErrorKind::Corrupt);
        match place.put_create_only(key, body.clone()).await {
            // Of an attempt before this one, or of an object that was removed since.
            Err(e) if is_there(e.kind) => {}
            put => return Ok(put.map(drop)?),
        }
        let there = place.head(key).await;
        // After that look: what was there then is the copier's own.
        self.ensure(place).await?;
        let put = match there {
            Ok(Some(there)) => place.put_if_match(key, body, &there.etag).await,
            Ok(None) => place.put_create_only(key, body).await,
            // Which write it is cannot be told of a file that was cut short.
            Err(e) if e.kind == StoreErrorKind::Corrupt => place.put(key, body).await,
            Err(e) => Err(e),
        };
        put.map(drop).map_err(|e| match e.kind {
            StoreErrorKind::PreconditionFailed | StoreErrorKind::NotFound => label::interfered(place),
            _ => e.into(),
        })
    }
}

/// The id of the volume in a place: none without a label that can be read, nor once the volume is being deleted.
async fn id_at(place: &Store) -> Result<Option<VolumeId>, VolumeError> {
    match label::load(place).await {
        Err(e) if e.kind() == ErrorKind::Corrupt => Ok(None),
        label => {
            let label = label?.filter(|label| label.deletion.is_none());
            Ok(label.map(|label| label.volume_id))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;
    use crate::base::url::VolumeUrl;
    use crate::options::StoreOptions;
    use crate::store::connect_for_create;

    /// The volume that is being made is deleted, and another one made there, while whoever copies is stopped.
    #[tokio::test(flavor = "multi_thread")]
    async fn only_what_is_the_copiers_own_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
        let place = connect_for_create(&url, &StoreOptions::default()).await.unwrap();
        label::make(&place, InodeCheck::from_bits(1)).await.unwrap();
        let holding = Holding::by_label(&place).await.unwrap();
        let key = place.meta_key("sums/0000000001.0");
        let body = async || place.get(&key).await.unwrap().unwrap().0;
        // Over nothing, and over what is its own.
        for text in ["first", "second"] {
            holding.put(&place, &key, text).await.unwrap();
            assert_eq!(body().await, text);
        }
        place.delete(&place.meta_key(label::NAME)).await.unwrap();
        let other = label::make(&place, InodeCheck::from_bits(2)).await.unwrap();
        place.put(&key, "of the other volume").await.unwrap();
        let put = holding.put(&place, &key, "third").await;
        assert!(matches!(put, Err(VolumeError::Interfered { .. })), "{put:?}");
        assert_eq!(body().await, "of the other volume");
        assert!(holding.ensure(&place).await.is_err());
        let of_other = Holding::Label(Some(other.volume_id));
        of_other.ensure(&place).await.unwrap();
        of_other.put(&place, &key, "fourth").await.unwrap();
        assert_eq!(body().await, "fourth");
    }
}
