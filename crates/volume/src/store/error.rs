//! What can go wrong between a volume and its store.

use std::error::Error;
use std::fmt;

use super::durable::{DAMAGED, DAMAGED_STATUS};
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

/// The class of a [`StoreError`]: what a caller may decide by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StoreErrorKind {
    /// No such object, bucket or directory.
    NotFound,
    /// The credentials are missing, wrong, expired, or not allowed to do this.
    AccessDenied,
    /// A conditional write was refused: somebody else wrote the object.
    PreconditionFailed,
    /// No answer, a cut-off answer, or a store that is overloaded or failing (429, 5xx): worth trying again. Whether
    /// a write that ended so was carried out is not known.
    Unreachable,
    /// What came back is not what was written.
    Corrupt,
    /// Anything else.
    Other,
}

/// A failed operation on the store. Its `Display` is one complete sentence: what was tried, on what, what came of it
/// and, where somebody can do something about it, what.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {target}: {detail}")]
pub struct StoreError {
    /// What was tried, as a verb: `read`, `list`, `connect to`.
    pub operation: &'static str,
    /// The object, prefix or directory: `s3://bucket/key`, `file:///path (key)`.
    pub target: String,
    /// The class of the failure.
    pub kind: StoreErrorKind,
    /// What happened, and what to do.
    pub detail: String,
    /// The error below. Not its `source()`, because `detail` already tells what it says.
    pub cause: Option<Box<dyn Error + Send + Sync>>,
}

impl StoreError {
    /// An error that does not come from the SDK.
    pub(super) fn new(
        operation: &'static str,
        target: impl fmt::Display,
        kind: StoreErrorKind,
        detail: impl Into<String>,
    ) -> Self {
        Self {
            operation,
            target: target.to_string(),
            kind,
            detail: detail.into(),
            cause: None,
        }
    }

    /// The error of an SDK call on `target`, sent to `endpoint`.
    pub(super) fn from_sdk<E>(
        operation: &'static str,
        target: impl fmt::Display,
        endpoint: &str,
        error: SdkError<E, HttpResponse>,
    ) -> Self
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        let kind = match kind_of(&error) {
            // Of a bucket that was there when the volume was opened: nothing can be told of what is in it.
            StoreErrorKind::NotFound if operation != CONNECT && error.code() == Some(NO_SUCH_BUCKET) => {
                StoreErrorKind::Unreachable
            }
            kind => kind,
        };
        let detail = detail_of(&error, kind, endpoint);
        Self {
            operation,
            target: target.to_string(),
            kind,
            detail,
            cause: Some(Box::new(error)),
        }
    }
}

/// The operation that finds out whether the store is there.
pub(super) const CONNECT: &str = "connect to";
const NO_SUCH_BUCKET: &str = "NoSuchBucket";

fn kind_of<E: ProvideErrorMetadata + Error + 'static>(error: &SdkError<E, HttpResponse>) -> StoreErrorKind {
    use StoreErrorKind::*;
    if lacks_credentials(error) {
        return AccessDenied;
    }
    match error {
        SdkError::TimeoutError(_) | SdkError::DispatchFailure(_) | SdkError::ResponseError(_) => {
            return Unreachable;
        }
        SdkError::ConstructionFailure(_) => return Other,
        _ => {}
    }
    // The code first: CompleteMultipartUpload can answer 200 with an error in the body.
    match error.code() {
        Some("NoSuchKey" | NO_SUCH_BUCKET | "NoSuchUpload" | "NotFound") => return NotFound,
        Some("PreconditionFailed") => return PreconditionFailed,
        // Two conditional writes met: neither is known to have won, and S3 asks for another attempt.
        // <https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html>
        Some("ConditionalRequestConflict" | "OperationAborted") => return Unreachable,
        Some(
            "AccessDenied"
            | "AllAccessDisabled"
            | "InvalidAccessKeyId"
            | "SignatureDoesNotMatch"
            | "ExpiredToken"
            | "InvalidToken"
            | "RequestTimeTooSkewed",
        ) => return AccessDenied,
        Some(DAMAGED) => return Corrupt,
        Some("SlowDown" | "InternalError" | "ServiceUnavailable" | "RequestTimeout") => return Unreachable,
        _ => {}
    }
    match status_of(error) {
        Some(401 | 403) => AccessDenied,
        Some(404) => NotFound,
        Some(409 | 412) => PreconditionFailed,
        // Of a `file://` store, which answers a HEAD without a code, too.
        Some(DAMAGED_STATUS) => Corrupt,
        Some(408 | 429 | 500 | 502..=504) => Unreachable,
        _ => Other,
    }
}

pub(super) fn status_of<E>(error: &SdkError<E, HttpResponse>) -> Option<u16> {
    error.raw_response().map(|response| response.status().as_u16())
}

fn detail_of<E: ProvideErrorMetadata + Error + 'static>(
    error: &SdkError<E, HttpResponse>,
    kind: StoreErrorKind,
    endpoint: &str,
) -> String {
    if lacks_credentials(error) {
        return format!(
            "there are no AWS credentials to send to {endpoint} ({}); set AWS_ACCESS_KEY_ID and \
             AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
            root_cause(error)
        );
    }
    match error {
        SdkError::TimeoutError(_) => {
            return format!("{endpoint} does not answer in time; check endpoint_url and the network");
        }
        SdkError::DispatchFailure(_) => {
            return format!(
                "{endpoint} cannot be reached ({}); check endpoint_url and the network",
                root_cause(error)
            );
        }
        SdkError::ResponseError(_) => {
            return format!(
                "{endpoint} sent an answer that cannot be read ({})",
                root_cause(error)
            );
        }
        SdkError::ConstructionFailure(_) => {
            return format!("the request is not possible ({})", root_cause(error));
        }
        _ => {}
    }
    if let (Some(message), true) = (error.message(), endpoint.starts_with('/')) {
        // A directory: no server, and the message names the file.
        return message.to_string();
    }
    let status = status_of(error).map_or_else(String::new, |status| format!("HTTP {status} "));
    let code = error.code().unwrap_or("without an error code");
    let message = error
        .message()
        .map_or_else(String::new, |message| format!(": {message}"));
    let answer = format!("{endpoint} answers {status}{code}{message}");
    let region = error
        .raw_response()
        .and_then(|response| response.headers().get("x-amz-bucket-region"));
    match (kind, error.code(), region) {
        (_, Some("NoSuchBucket"), _) => format!("{answer}; create the bucket or correct its name"),
        (StoreErrorKind::AccessDenied, ..) => {
            format!("{answer}; check the credentials and the bucket's policy")
        }
        (StoreErrorKind::Other, _, Some(region)) => {
            format!("{answer}; the bucket is in region {region}, set region={region}")
        }
        _ => answer,
    }
}

/// Whether no credentials could be had at all (as opposed to credentials that the store refused). The SDK reports it as
/// a failed dispatch; the type below it is not exported, but all its texts say what it is about.
fn lacks_credentials<E: Error + 'static>(error: &SdkError<E, HttpResponse>) -> bool {
    matches!(error, SdkError::DispatchFailure(_))
        && chain(error).any(|error| error.to_string().contains("credential"))
}

/// The innermost error's text: the SDK's outer ones only say that something failed.
fn root_cause(error: &(dyn Error + 'static)) -> String {
    chain(error)
        .last()
        .map_or_else(|| error.to_string(), ToString::to_string)
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| (*error).source())
}
