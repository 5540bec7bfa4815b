//! Answers that are not the store's own.
//!
//! A reverse proxy or an ingress whose backend restarts answers 404 for everything, a captive portal redirects, a page that says "back
//! soon" comes with 200. Taken for the store's word, that says "the lease is gone", and a server shuts itself out; or "it is written",
//! and what a flush was answered for is nowhere. A store marks each of its answers with
//! an id (`x-amz-request-id`: <https://docs.aws.amazon.com/AmazonS3/latest/userguide/get-request-ids.html>). From a store
//! that was seen to do so, an answer without one concludes nothing: it becomes a 503, for our own operations and the
//! engine's, and is tried again.
//!
//! Some stores mark their errors alone, so answers of success need the id only once one of them had it. A store that passes on what
//! other servers of its own send may leave the id out there: an answer with user metadata, as each object of ours has it, is the
//! store's as well.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_types::body::SdkBody;
use parking_lot::Mutex;

/// What a store marks its answers with.
const ID_HEADERS: [&str; 2] = ["x-amz-request-id", "x-amz-id-2"];
/// What the names of the headers with user metadata begin with.
const METADATA_HEADERS: &str = "x-amz-meta-";
const UNAVAILABLE: u16 = 503;

/// Whether an answer carries the id that a store marks its answers with.
pub(crate) fn is_marked(response: &HttpResponse) -> bool {
    let id = |name: &str| response.headers().get(name).filter(|id| !id.is_empty());
    ID_HEADERS.iter().any(|name| id(name).is_some())
}

/// How stores were seen to mark their answers, by the stores' addresses. Clones share it: the first request of a connection may be the
/// write of a lease, and what an earlier one has seen counts for it.
#[derive(Debug, Clone, Default)]
pub struct SeenMarks(Arc<Mutex<HashMap<String, Arc<Marks>>>>);

impl SeenMarks {
    /// How the store at this address was seen to mark.
    pub(crate) fn of(&self, endpoint: &str) -> Arc<Marks> {
        self.0.lock().entry(endpoint.to_owned()).or_default().clone()
    }
}

/// Options that they are handed on with say the same whatever was seen.
impl PartialEq for SeenMarks {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for SeenMarks {}

/// How one store was seen to mark its answers. What was seen of one kind of request counts for all: the first request of a kind may be the
/// write of a lease, and be answered by somebody else.
#[derive(Debug, Default)]
pub(crate) struct Marks {
    /// It has marked one.
    any: AtomicBool,
    /// It has marked one of success.
    success: AtomicBool,
}

/// Interceptor that takes the answers of others for none.
#[derive(Debug)]
pub(crate) struct ForeignAnswers(pub Arc<Marks>);

/// What an answer says of who gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// It has the id.
    Marked,
    /// It has user metadata of an object.
    OfObject,
    /// Nothing.
    Unknown,
}

impl Origin {
    fn of(response: &HttpResponse) -> Self {
        let mut names = response.headers().iter().map(|(name, _)| name);
        if is_marked(response) {
            Self::Marked
        } else if names.any(|name| name.starts_with(METADATA_HEADERS)) {
            Self::OfObject
        } else {
            Self::Unknown
        }
    }
}

/// Whether a refusal of this status, from something that is not the store, would be believed.
///
/// | status | what would be concluded |
/// |---|---|
/// | 301, 302, 303, 307, 308 | the store is elsewhere |
/// | 404 | the object is absent |
/// | 409, 412 | another writer was faster |
/// | 416 | the object was cut short |
///
/// Others conclude nothing: 401 and 403 without the id wait for better credentials, 429 and 5xx are tried again.
fn is_conclusive(status: u16) -> bool {
    matches!(status, 301 | 302 | 303 | 307 | 308 | 404 | 409 | 412 | 416)
}

impl ForeignAnswers {
    /// Whether the answer says nothing.
    fn is_foreign(&self, status: u16, origin: Origin) -> bool {
        let Self(marks) = self;
        // Of the answer to a write nothing but its headers is looked at, and data is not always compared with check values.
        let is_success = (200..300).contains(&status);
        match origin {
            Origin::Marked => {
                marks.any.store(true, Ordering::Relaxed);
                if is_success {
                    marks.success.store(true, Ordering::Relaxed);
                }
                false
            }
            Origin::OfObject if is_success => false,
            _ if is_success => marks.success.load(Ordering::Relaxed),
            _ => is_conclusive(status) && marks.any.load(Ordering::Relaxed),
        }
    }
}

impl Intercept for ForeignAnswers {
    fn name(&self) -> &'static str {
        "ForeignAnswers"
    }

    fn modify_before_deserialization(
        &self,
        context: &mut BeforeDeserializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let response = context.response_mut();
        let status = response.status().as_u16();
        if self.is_foreign(status, Origin::of(response)) {
            let body = format!(
                "<Error><Code>ServiceUnavailable</Code><Message>a {status} that is not the store's own: it has no request \
                 id; something between here and the store answers</Message></Error>"
            );
            *response = HttpResponse::new(UNAVAILABLE.try_into()?, SdkBody::from(body));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Origin::*;
    use super::*;

    fn new() -> ForeignAnswers {
        ForeignAnswers(Arc::default())
    }

    #[test]
    fn only_a_marked_answer_concludes_from_a_store_that_marks() {
        for status in 100..600 {
            let is_success = (200..300).contains(&status);
            let conclusive = [301, 302, 303, 307, 308, 404, 409, 412, 416].contains(&status);
            let answers = new();
            assert!(
                !answers.is_foreign(status, Unknown),
                "a store that is not known to mark"
            );
            assert!(!answers.is_foreign(200, Marked));
            assert!(!answers.is_foreign(status, Marked), "{status}: the store's own");
            assert_eq!(
                answers.is_foreign(status, Unknown),
                conclusive || is_success,
                "{status}"
            );
            assert_eq!(answers.is_foreign(status, OfObject), conclusive, "{status}");
        }
    }

    #[test]
    fn a_store_that_marks_its_refusals_alone_is_believed() {
        let answers = new();
        assert!(!answers.is_foreign(404, Marked));
        assert!(!answers.is_foreign(200, Unknown));
        assert!(answers.is_foreign(404, Unknown));
    }

    #[test]
    fn what_a_connection_has_seen_counts_for_the_next_to_the_same_store() {
        let seen = SeenMarks::default();
        let of = |endpoint: &str| ForeignAnswers(seen.clone().of(endpoint));
        assert!(!of("http://here").is_foreign(200, Marked));
        assert!(of("http://here").is_foreign(200, Unknown));
        assert!(!of("http://there").is_foreign(200, Unknown));
    }

    #[test]
    fn headers_say_who_answers() {
        let origin = |name: &'static str, value: &'static str| {
            let mut answer = HttpResponse::new(200.try_into().expect("a status"), SdkBody::empty());
            answer.headers_mut().insert(name, value);
            Origin::of(&answer)
        };
        assert_eq!(origin("x-amz-request-id", "1"), Marked);
        assert_eq!(origin("x-amz-meta-hypernbd-object", "inode"), OfObject);
        assert_eq!(origin("x-amz-cf-id", "1"), Unknown, "of a cache before a store");
        assert_eq!(origin("etag", "\"x\""), Unknown);
    }
}
