//! Asks for encryption by the store with every upload, the engine's own included.

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;

use super::upload::has_parameter;
use crate::store::options::{ServerSideEncryption, StoreOptions};

/// Interceptor that adds the headers.
#[derive(Debug)]
pub(crate) struct Encrypt {
    with: ServerSideEncryption,
    kms_key_id: Option<String>,
}

impl Encrypt {
    /// What the options ask for, if they do.
    pub(crate) fn from_options(options: &StoreOptions) -> Option<Self> {
        Some(Self {
            with: options.sse?,
            kms_key_id: options.sse_kms_key_id.clone(),
        })
    }
}

impl Intercept for Encrypt {
    fn name(&self) -> &'static str {
        "Encrypt"
    }

    fn modify_before_signing(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request_mut();
        if !makes_an_object(request.method(), request.uri()) {
            return Ok(());
        }
        let headers = request.headers_mut();
        headers.insert("x-amz-server-side-encryption", self.with.name());
        if let (ServerSideEncryption::Kms, Some(key_id)) = (self.with, &self.kms_key_id) {
            headers.insert("x-amz-server-side-encryption-aws-kms-key-id", key_id.clone());
        }
        Ok(())
    }
}

/// PutObject, CopyObject and CreateMultipartUpload decide on encryption; S3 refuses the headers with the parts of an
/// upload and with its end.
fn makes_an_object(method: &str, uri: &str) -> bool {
    match method {
        "PUT" => !has_parameter(uri, "uploadId"),
        "POST" => has_parameter(uri, "uploads"),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_made_by_puts_and_the_starts_of_uploads() {
        for (method, uri, expected) in [
            ("PUT", "http://h/b/k?x-id=PutObject", true),
            ("PUT", "http://h/b/k", true),
            ("POST", "http://h/b/k?uploads", true),
            ("POST", "http://h/b/k?uploads=&x-id=CreateMultipartUpload", true),
            (
                "PUT",
                "http://h/b/k?x-id=UploadPart&partNumber=1&uploadId=u",
                false,
            ),
            (
                "POST",
                "http://h/b/k?x-id=CompleteMultipartUpload&uploadId=u",
                false,
            ),
            ("POST", "http://h/b?delete", false),
            ("GET", "http://h/b/k?x-id=GetObject", false),
            ("DELETE", "http://h/b/k", false),
        ] {
            assert_eq!(makes_an_object(method, uri), expected, "{method} {uri}");
        }
    }
}
