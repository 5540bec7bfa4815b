//! Answers that are not the store's own.
//!
//! A reverse proxy or an ingress whose backend restarts answers 404 for everything, a captive portal redirects. Taken for
//! the store's word, that says "the lease is gone", and a server shuts itself out. A store marks each of its answers with
//! an id (`x-amz-request-id`: <https://docs.aws.amazon.com/AmazonS3/latest/userguide/get-request-ids.html>). From a store
//! that was seen to do so, an answer without one concludes nothing: it becomes a 503, for our own operations and the
//! engine's, and is tried again.

use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_s3::config::interceptors::BeforeDeserializationInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_types::body::SdkBody;

/// What a store marks its answers with.
const ID_HEADERS: [&str; 2] = ["x-amz-request-id", "x-amz-id-2"];
const UNAVAILABLE: u16 = 503;

/// Whether an answer carries the id that a store marks its answers with.
pub(crate) fn is_marked(response: &HttpResponse) -> bool {
    let id = |name: &str| response.headers().get(name).filter(|id| !id.is_empty());
    ID_HEADERS.iter().any(|name| id(name).is_some())
}

/// Interceptor that takes the answers of others for none.
#[derive(Debug, Default)]
pub(crate) struct ForeignAnswers {
    /// The store was seen to mark its answers.
    is_marking: AtomicBool,
}

/// Whether an answer of this status, from something that is not the store, would be believed.
///
/// | status | what would be concluded |
/// |---|---|
/// | 301, 302, 303, 307, 308 | the store is elsewhere |
/// | 404 | the object is absent |
/// | 409, 412 | another writer was faster |
///
/// Others conclude nothing: 2xx are checked by their content, 401 and 403 without the id wait for better credentials, 429 and 5xx are tried
/// again.
fn is_conclusive(status: u16) -> bool {
    matches!(status, 301 | 302 | 303 | 307 | 308 | 404 | 409 | 412)
}

impl ForeignAnswers {
    /// Whether the answer says nothing.
    fn is_foreign(&self, status: u16, is_marked: bool) -> bool {
        if is_marked {
            self.is_marking.store(true, Ordering::Relaxed);
            return false;
        }
        is_conclusive(status) && self.is_marking.load(Ordering::Relaxed)
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
        if self.is_foreign(status, is_marked(response)) {
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
    use super::*;

    #[test]
    fn only_a_marked_answer_concludes_from_a_store_that_marks() {
        for status in 100..600 {
            let conclusive = [301, 302, 303, 307, 308, 404, 409, 412].contains(&status);
            let answers = ForeignAnswers::default();
            assert!(
                !answers.is_foreign(status, false),
                "a store that is not known to mark"
            );
            assert!(!answers.is_foreign(200, true));
            assert!(!answers.is_foreign(status, true), "{status}: the store's own");
            assert_eq!(answers.is_foreign(status, false), conclusive, "{status}");
        }
    }
}
