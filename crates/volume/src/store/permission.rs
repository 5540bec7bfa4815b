//! Whether the credentials may write, asked without writing anything.
//!
//! A store looks at the permission of a request before it looks at its condition. So a replacement of a write that was never
//! made is answered with a refusal for lack of permission, or with one because of the condition; nothing is written either
//! way. It may be sent only to a store that is known to honour conditions.

use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;

use super::Store;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::url::VolumeUrl;

/// The ETag of no write.
const NEVER: &str = "\"00000000000000000000000000000000\"";
/// What is asked for besides, by a name that nothing has.
pub(crate) const NAME: &str = "permission";
/// What S3 answers to a request that the credentials do not permit.
const ACCESS_DENIED: &str = "AccessDenied";
const ADVICE: &str = "a server that writes needs s3:PutObject there (docs/security.md), one that only reads is started with -r";

impl Store {
    /// Checks that the credentials may write an object with this key. `body` is what a store would write that ignores
    /// conditions. Directories are tried in another way. What else is wrong is told by the first write.
    ///
    /// # Errors
    /// [`StoreError`] when they may not.
    pub(crate) async fn ensure_writable(&self, key: &str, body: Vec<u8>) -> Result<(), StoreError> {
        if matches!(self.url, VolumeUrl::File { .. }) {
            return Ok(());
        }
        let sent = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .if_match(NEVER)
            .body(ByteStream::from(body))
            .send()
            .await;
        match sent {
            // Stores refuse for other reasons too, such as a quota, before they look at the condition.
            Err(error) if error.code() == Some(ACCESS_DENIED) => {
                Err(advised(self.error("write", key, error)))
            }
            _ => Ok(()),
        }
    }
}

/// The error of a probe, with what to do where the store permits no writes.
pub(super) fn advised(mut error: StoreError) -> StoreError {
    let is_write = ["write", "create", "replace"].contains(&error.operation);
    if is_write && error.kind == StoreErrorKind::AccessDenied {
        error.detail = format!("{}; {ADVICE}", error.detail);
    }
    error
}
