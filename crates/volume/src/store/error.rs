//! What an answer of the SDK, or the lack of one, means to a volume.

use std::error::Error;
use std::fmt;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_smithy_types::DateTime;
use aws_smithy_types::date_time::Format;

use super::interceptors::foreign::is_marked;
use super::local::object_dir::{DAMAGED, DAMAGED_STATUS};
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::units::format_duration;

impl StoreError {
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
        return Unauthenticated;
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
        Some("AccessDenied" | "AllAccessDisabled") => return AccessDenied,
        Some(
            "InvalidAccessKeyId"
            | "SignatureDoesNotMatch"
            | "ExpiredToken"
            | "InvalidToken"
            | "RequestTimeTooSkewed",
        ) => return Unauthenticated,
        Some(DAMAGED) => return Corrupt,
        Some("SlowDown" | "InternalError" | "ServiceUnavailable" | "RequestTimeout") => return Unreachable,
        _ => {}
    }
    match status_of(error) {
        // An answer to a HEAD has no code. One without the store's id may be a proxy's, which asks for a login.
        Some(403) if error.raw_response().is_some_and(is_marked) => AccessDenied,
        Some(401 | 403) => Unauthenticated,
        Some(404) => NotFound,
        Some(412) => PreconditionFailed,
        // A conflict with something else, which may be over the next time: whether a condition holds is told by what is stored.
        Some(409) => Unreachable,
        // A range that begins past the end: the object is shorter than what refers to it says.
        Some(416) => Corrupt,
        // Of a `file://` store, which answers a HEAD without a code, too.
        Some(DAMAGED_STATUS) => Corrupt,
        Some(408 | 429 | 500 | 502..=504) => Unreachable,
        Some(400 | 405 | 411 | 501) if !is_about_content(error.code()) => Refused,
        _ => Other,
    }
}

/// Whether a refusal is about the bytes that were sent, now or before, rather than the form of the request.
fn is_about_content(code: Option<&str>) -> bool {
    const CODES: [&str; 8] = [
        "BadDigest",
        "EntityTooLarge",
        "EntityTooSmall",
        "IncompleteBody",
        "InvalidPart",
        "InvalidPartOrder",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    ];
    code.is_some_and(|code| CODES.contains(&code))
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
            let cause = root_cause(error);
            let advice = if cause.contains("certificate") {
                "name the certificates of the authority that vouches for it in AWS_CA_BUNDLE, in ca_bundle of the profile \
                 or in SSL_CERT_FILE"
            } else {
                "check endpoint_url and the network"
            };
            return format!("{endpoint} cannot be reached ({cause}); {advice}");
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
    let response = error.raw_response();
    let region = response.and_then(|response| response.headers().get("x-amz-bucket-region"));
    let other = response.filter(|_| error.code().is_none()).and_then(who_else);
    match (kind, error.code(), region) {
        _ if other.is_some() => format!("{answer}; {}", other.unwrap_or_default()),
        (_, Some("NoSuchBucket"), _) => match path_of(endpoint) {
            Some(path) => format!(
                "{answer}; endpoint_url ends in the path {path}: remove it, the bucket is named by the volume's URL alone"
            ),
            None => format!("{answer}; create the bucket or correct its name"),
        },
        (_, Some("RequestTimeTooSkewed"), _) => {
            let date = response.and_then(|response| response.headers().get("date"));
            format!("{answer}; {}", clock_advice(date))
        }
        (StoreErrorKind::AccessDenied | StoreErrorKind::Unauthenticated, ..) => {
            format!("{answer}; check the credentials and the bucket's policy")
        }
        (StoreErrorKind::Other | StoreErrorKind::Refused, _, Some(region)) => {
            format!("{answer}; the bucket is in region {region}, set region={region}")
        }
        (StoreErrorKind::Refused, ..) => format!(
            "{answer}; it does not take a request of this form: try AWS_REQUEST_CHECKSUM_CALCULATION=when_required, which \
             sends no checksums, path_style and payload_signing"
        ),
        _ => answer,
    }
}

/// Says that an answer without S3's own code and id is something else's, and by what name that goes.
fn who_else(response: &HttpResponse) -> Option<String> {
    if is_marked(response) {
        return None;
    }
    let header = |name: &str| response.headers().get(name).filter(|value| !value.is_empty());
    let name = header("server").or_else(|| header("via"));
    let name = name.map_or_else(String::new, |name| format!(", it calls itself {name:?}"));
    let leads = header("location").map_or_else(String::new, |to| format!(" and leads to {to:?}"));
    Some(format!(
        "that is no answer of S3: something at that address or on the way there gives it{name}{leads}; check endpoint_url, \
         proxies and the network"
    ))
}

/// The path of an endpoint, if it has one.
fn path_of(endpoint: &str) -> Option<&str> {
    let (_, rest) = endpoint.split_once("://")?;
    let path = &rest[rest.find('/')?..];
    (path != "/").then_some(path)
}

/// What to do about a clock that the store does not accept, given the `Date` of its answer.
fn clock_advice(date: Option<&str>) -> String {
    let store = date.and_then(|date| DateTime::from_str(date, Format::HttpDate).ok());
    let here = DateTime::from(SystemTime::now());
    let behind_seconds = store.map_or(0, |store| store.secs() - here.secs());
    match behind_seconds {
        0 => "set this machine's clock".to_owned(),
        _ => format!(
            "this machine's clock is {} {} the store's: set it",
            format_duration(Duration::from_secs(behind_seconds.unsigned_abs())),
            if behind_seconds > 0 { "behind" } else { "ahead of" }
        ),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_of_an_endpoint_is_seen() {
        for (endpoint, expected) in [
            ("http://h:9000", None),
            ("http://h:9000/", None),
            ("https://h/bucket", Some("/bucket")),
            ("/srv/volume", None),
        ] {
            assert_eq!(path_of(endpoint), expected, "{endpoint}");
        }
    }

    #[test]
    fn a_wrong_clock_is_told_by_how_much() {
        let advice = clock_advice(Some("Wed, 21 Oct 2015 07:28:00 GMT"));
        assert!(advice.starts_with("this machine's clock is ") && advice.contains("ahead of the store's"));
        assert_eq!(clock_advice(Some("soon")), "set this machine's clock");
        assert_eq!(clock_advice(None), "set this machine's clock");
    }

    #[test]
    fn an_answer_of_something_else_names_it() {
        let mut answer = HttpResponse::new(502.try_into().expect("a status"), "".into());
        answer.headers_mut().insert("server", "nginx");
        let told = who_else(&answer).expect("not the store's");
        assert!(told.contains("it calls itself \"nginx\""), "{told}");
        answer.headers_mut().insert("x-amz-request-id", "1");
        assert_eq!(who_else(&answer), None);
    }
}
