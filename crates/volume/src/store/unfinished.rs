//! Multipart uploads that a killed process left unfinished. Nobody sees them, and S3 charges for their parts until somebody
//! aborts them: <https://docs.aws.amazon.com/AmazonS3/latest/userguide/abort-mpu.html>.

use std::time::{Duration, SystemTime};

use log::debug;

use super::Store;
use super::operations::time;
use crate::base::store_error::{StoreError, StoreErrorKind};

/// The most pages of uploads that are read. S3 lists a thousand uploads on each.
const PAGES_MAX: usize = 100;

impl Store {
    /// As [`Self::abort_uploads`], of those that began this long before the object at `written` was stored. So no clock but the store's
    /// decides: by one that is ahead an upload that goes on would be old.
    ///
    /// # Errors
    /// As [`Self::abort_uploads`].
    pub(crate) async fn abort_old_uploads(
        &self,
        is_ours: fn(&str) -> bool,
        age_min: Duration,
        written: &str,
    ) -> Result<usize, StoreError> {
        if self.dir.is_some() {
            return Ok(0);
        }
        match self.head(written).await? {
            Some(info) => self.abort_uploads(is_ours, info.last_modified - age_min).await,
            None => Ok(0),
        }
    }

    /// Aborts uploads to objects below the volume's root whose names `is_ours` accepts, and that began before this time
    /// by the store's clock. Returns how many. A store that lists no uploads (MinIO lists only those of one given
    /// object), or that refuses the request, has none. The uploads of a `file://` store end with the process that made
    /// them.
    ///
    /// # Errors
    /// When the store fails. Some may then be aborted.
    pub(crate) async fn abort_uploads(
        &self,
        is_ours: fn(&str) -> bool,
        begun_before: SystemTime,
    ) -> Result<usize, StoreError> {
        if self.dir.is_some() {
            return Ok(0);
        }
        let root = self.data_key("");
        let (mut key_marker, mut id_marker) = (None, None);
        let mut aborted = 0;
        for _ in 0..PAGES_MAX {
            let listed = self
                .client
                .list_multipart_uploads()
                .bucket(&self.bucket)
                .prefix(&root)
                .set_key_marker(key_marker)
                .set_upload_id_marker(id_marker)
                .send()
                .await
                .map_err(|error| self.error("list the uploads of", &root, error));
            let page = match listed {
                Ok(page) => page,
                Err(e) if matches!(e.kind, StoreErrorKind::AccessDenied | StoreErrorKind::Refused) => {
                    debug!("unfinished uploads are left to the bucket's lifecycle rules: {e}");
                    return Ok(aborted);
                }
                Err(e) => return Err(e),
            };
            for upload in page.uploads() {
                let (Some(key), Some(id)) = (upload.key(), upload.upload_id()) else {
                    continue;
                };
                let is_old = upload.initiated().is_some() && time(upload.initiated()) < begun_before;
                if !is_old || !key.strip_prefix(&root).is_some_and(is_ours) {
                    continue;
                }
                let sent = self
                    .client
                    .abort_multipart_upload()
                    .bucket(&self.bucket)
                    .key(key)
                    .upload_id(id)
                    .send()
                    .await;
                match sent.map_err(|error| self.error("abort the upload of", key, error)) {
                    Ok(_) => aborted += 1,
                    // The upload has ended meanwhile.
                    Err(e) if e.kind == StoreErrorKind::NotFound => {}
                    Err(e) => return Err(e),
                }
            }
            if !page.is_truncated().unwrap_or(false) || page.next_key_marker().is_none() {
                break;
            }
            key_marker = page.next_key_marker().map(str::to_owned);
            id_marker = page.next_upload_id_marker().map(str::to_owned);
        }
        Ok(aborted)
    }
}
