//! The versions of an object in a bucket that keeps them, and what is stored whatever its check values say.

use std::time::SystemTime;

use bytes::Bytes;

use super::operations::{absent_is_none, size, time};
use super::{ETag, ObjectInfo, Store};
use crate::base::store_error::{StoreError, StoreErrorKind};

/// The most pages of versions of one object that are read. S3 lists a thousand versions on each.
const PAGES_MAX: usize = 100;

/// A version of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Version {
    /// How the store names it.
    pub id: String,
    /// Whether it is what the object is now.
    pub is_latest: bool,
    /// When it was written, by the store's clock.
    pub last_modified: SystemTime,
    /// Its length in bytes.
    pub size_bytes: u64,
}

/// What a bucket keeps of one object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Versions {
    /// The newest first, as the store orders them.
    pub kept: Vec<Version>,
    /// When it was deleted, by the store's clock.
    pub deleted: Vec<SystemTime>,
}

impl Store {
    /// Whether the store may keep versions: a directory never does.
    pub(crate) fn may_keep_versions(&self) -> bool {
        self.dir.is_none()
    }

    /// Everything that the bucket keeps of an object. In a bucket that never kept versions that is the object alone. Needs
    /// `s3:ListBucketVersions` on the bucket.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) async fn versions_of(&self, key: &str) -> Result<Versions, StoreError> {
        let (mut key_marker, mut id_marker) = (None, None);
        let mut versions = Versions::default();
        for _ in 0..PAGES_MAX {
            let listed = self
                .client
                .list_object_versions()
                .bucket(&self.bucket)
                .prefix(key)
                .set_key_marker(key_marker)
                .set_version_id_marker(id_marker)
                .send()
                .await;
            let page = listed.map_err(|error| {
                named(
                    self.error("list the versions of", key, error),
                    "s3:ListBucketVersions",
                )
            })?;
            // Other keys that begin so come behind it.
            let kept = page
                .versions()
                .iter()
                .filter(|version| version.key() == Some(key));
            versions.kept.extend(kept.filter_map(|version| {
                Some(Version {
                    id: version.version_id()?.to_owned(),
                    is_latest: version.is_latest() == Some(true),
                    last_modified: time(version.last_modified()),
                    size_bytes: size(version.size()),
                })
            }));
            let deleted = page
                .delete_markers()
                .iter()
                .filter(|marker| marker.key() == Some(key));
            versions
                .deleted
                .extend(deleted.map(|marker| time(marker.last_modified())));
            (key_marker, id_marker) = (page.next_key_marker, page.next_version_id_marker);
            let is_cut = page.is_truncated == Some(true);
            // A part of the list would pass for all of it: of several writes one may seem to be the only one.
            if is_cut && key_marker.as_deref().is_none_or(str::is_empty) {
                let detail = format!(
                    "{} sends a part of the list and not how to go on with it",
                    self.endpoint
                );
                return Err(StoreError::new(
                    "list the versions of",
                    self.target(key),
                    StoreErrorKind::Other,
                    detail,
                ));
            }
            if !is_cut || key_marker.as_deref().is_some_and(|next| next > key) {
                return Ok(versions);
            }
        }
        Err(StoreError::new(
            "list the versions of",
            self.target(key),
            StoreErrorKind::Other,
            format!("there are more than {PAGES_MAX} pages of them; remove old ones by a lifecycle rule"),
        ))
    }

    /// What a HEAD says of a version of an object; `None` if it is gone. Needs `s3:GetObjectVersion`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) async fn head_version(&self, key: &str, id: &str) -> Result<Option<ObjectInfo>, StoreError> {
        let found = self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(key)
            .version_id(id)
            .send()
            .await;
        let found = found.map_err(|error| {
            named(
                self.error("look at a version of", key, error),
                "s3:GetObjectVersion",
            )
        });
        let Some(output) = absent_is_none(found)? else {
            return Ok(None);
        };
        Ok(Some(ObjectInfo {
            size_bytes: size(output.content_length()),
            etag: self.etag("look at a version of", key, output.e_tag)?,
            last_modified: time(output.last_modified.as_ref()),
            metadata: output.metadata.unwrap_or_default(),
        }))
    }

    /// Bytes of a version of an object, and what a HEAD says of it: compared with its check values, as those of every object that is read.
    /// `None` if it is gone; fewer bytes where it ends before. Needs `s3:GetObjectVersion`.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` when they are not those that were written.
    pub(crate) async fn get_version(
        &self,
        key: &str,
        id: &str,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Option<(Bytes, ObjectInfo)>, StoreError> {
        let last = offset_bytes.saturating_add(len_bytes.max(1) - 1);
        let range = format!("bytes={offset_bytes}-{last}");
        let got = self.fetch_version(key, Some(id), Some(range)).await;
        let got = got.map_err(|error| named(error, "s3:GetObjectVersion"))?;
        Ok(got.map(|(frames, info)| (frames.together(), info)))
    }

    /// What is stored of an object, whatever its check values say: to keep what is damaged, and to replace just that. `None` if it does
    /// not exist.
    ///
    /// # Errors
    /// [`StoreError`]; `Corrupt` for a file that does not say any more what it is.
    pub(crate) async fn get_unverified(&self, key: &str) -> Result<Option<(Bytes, ETag)>, StoreError> {
        let request = self.client.get_object().bucket(&self.bucket).key(key);
        let sent = request
            .send()
            .await
            .map_err(|error| self.error("read", key, error));
        let Some(output) = absent_is_none(sent)? else {
            return Ok(None);
        };
        let etag = self.etag("read", key, output.e_tag)?;
        match output.body.collect().await {
            Ok(body) => Ok(Some((body.into_bytes(), etag))),
            Err(e) => {
                let detail = format!("the answer of {} broke off ({e})", self.endpoint);
                Err(StoreError::new(
                    "read",
                    self.target(key),
                    StoreErrorKind::Unreachable,
                    detail,
                ))
            }
        }
    }
}

/// With the permission that is needed, where the store denies access.
fn named(error: StoreError, permission: &str) -> StoreError {
    match error.kind {
        StoreErrorKind::AccessDenied => StoreError {
            detail: format!("{}; it needs the permission {permission}", error.detail),
            ..error
        },
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::url::VolumeUrl;
    use crate::store::connect_for_create;
    use crate::store::options::StoreOptions;

    #[tokio::test(flavor = "multi_thread")]
    async fn what_is_damaged_can_be_read_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let url = VolumeUrl::parse(&format!("file://{}/a/", dir.path().display())).unwrap();
        let store = connect_for_create(&url, &StoreOptions::default()).await.unwrap();
        assert!(!store.may_keep_versions());
        let key = store.meta_key("x");
        assert!(store.get_unverified(&key).await.unwrap().is_none());
        let etag = store.put(&key, "as it was").await.unwrap();
        let name = crate::store::local::object_file::name_of_key(&key).unwrap();
        let path = dir.path().join("a/objects").join(name);
        let mut file = std::fs::read(&path).unwrap();
        file[0] = b'A';
        std::fs::write(&path, file).unwrap();
        assert_eq!(store.get(&key).await.unwrap_err().kind, StoreErrorKind::Corrupt);
        let (body, there) = store.get_unverified(&key).await.unwrap().unwrap();
        assert_eq!((&body[..], there), (&b"As it was"[..], etag));
    }

    #[test]
    fn who_is_denied_versions_learns_which_permission_is_missing() {
        let of = |kind| StoreError::new("read", "x", kind, "denied");
        let told = |kind| named(of(kind), "s3:GetObjectVersion").to_string();
        assert!(told(StoreErrorKind::AccessDenied).contains("s3:GetObjectVersion"));
        assert!(!told(StoreErrorKind::Unreachable).contains("s3:GetObjectVersion"));
    }
}
