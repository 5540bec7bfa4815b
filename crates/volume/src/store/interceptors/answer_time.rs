//! How long a request may be answered nothing.
//!
//! A connection can die without a word: a firewall forgot it, a machine behind a load balancer stopped. The SDK knows one
//! time for the answers to all requests, which must do for a large piece on a slow line. A read that waited that long on a
//! dead connection would have failed its client before it was sent again over another one. So what is answered soon by a
//! store that lives gets less: a third of the time that clients wait.

use std::time::Duration;

use aws_smithy_runtime_api::client::connector_metadata::ConnectorMetadata;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient,
    SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;

use super::upload::has_parameter;

/// What a body may need on its way. Pieces of uploads, which share a slow line with others, come to the SDK's own time by it.
const BODY_BYTES_PER_S: u64 = 100_000;
/// What a copy within the store is named by.
const COPY_SOURCE: &str = "x-amz-copy-source";

/// An HTTP client whose requests for single objects are given up after a silence.
#[derive(Debug)]
pub(crate) struct AnswerTime {
    /// What sends them.
    pub inner: SharedHttpClient,
    /// Time for the first byte of the answer to a request without a body.
    pub limit: Duration,
}

#[derive(Debug)]
struct InTime {
    inner: SharedHttpConnector,
    limit: Duration,
}

/// The time that a body adds to that; `None` leaves the request to the SDK.
///
/// A listing, a copy, a completed upload and the removal of many objects keep a store busy for as long as they are large.
fn time_for_body(request: &HttpRequest) -> Option<Duration> {
    let uri = request.uri();
    let is_of_object = match request.method() {
        "GET" | "HEAD" => !has_parameter(uri, "list-type") && !has_parameter(uri, "uploads"),
        "PUT" => request.headers().get(COPY_SOURCE).is_none(),
        // The beginning of an upload in parts.
        "POST" => has_parameter(uri, "uploads"),
        _ => false,
    };
    let len_bytes = request.body().content_length()?;
    is_of_object.then(|| Duration::from_secs(len_bytes / BODY_BYTES_PER_S))
}

impl HttpClient for AnswerTime {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(InTime {
            inner: self.inner.http_connector(settings, components),
            limit: self.limit,
        })
    }

    fn connector_metadata(&self) -> Option<ConnectorMetadata> {
        self.inner.connector_metadata()
    }
}

impl HttpConnector for InTime {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let Some(for_body) = time_for_body(&request) else {
            return self.inner.call(request);
        };
        let limit = self.limit + for_body;
        let answer = self.inner.call(request);
        HttpConnectorFuture::new(async move {
            let in_time = tokio::time::timeout(limit, answer).await;
            in_time.unwrap_or_else(|_| {
                let silence = format!("no answer within {} s", limit.as_secs());
                Err(ConnectorError::timeout(silence.into()))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use aws_smithy_types::body::SdkBody;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);
    const KEY: &str = "http://localhost/bucket/key?x-id=GetObject";

    /// Never answers.
    #[derive(Debug)]
    struct Silent;

    impl HttpConnector for Silent {
        fn call(&self, _: HttpRequest) -> HttpConnectorFuture {
            HttpConnectorFuture::new(std::future::pending())
        }
    }

    fn request(method: &str, uri: &str, len_bytes: usize) -> HttpRequest {
        let mut request = HttpRequest::new(SdkBody::from(vec![0; len_bytes]));
        request.set_method(method).unwrap();
        request.set_uri(uri).unwrap();
        request
    }

    /// After which time a request that is not answered fails, within an hour.
    async fn given_up_after(request: HttpRequest) -> Option<Duration> {
        let started = tokio::time::Instant::now();
        let call = InTime {
            inner: SharedHttpConnector::new(Silent),
            limit: LIMIT,
        }
        .call(request);
        let answer = tokio::time::timeout(Duration::from_secs(3600), call).await;
        let error = answer.ok()?.expect_err("a silent store");
        assert!(
            error.is_timeout(),
            "{error:?}: the SDK sends again what was in time for nothing"
        );
        Some(started.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_store_answers_soon_is_given_up_soon() {
        let begun = request("POST", "http://localhost/bucket/key?uploads", 0);
        assert_eq!(given_up_after(begun).await, Some(LIMIT));
        for method in ["GET", "HEAD", "PUT"] {
            assert_eq!(
                given_up_after(request(method, KEY, 0)).await,
                Some(LIMIT),
                "{method}"
            );
        }
        let large = given_up_after(request("PUT", KEY, 2_000_000)).await;
        assert_eq!(large, Some(LIMIT + Duration::from_secs(20)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_long_is_left_to_the_sdk() {
        let mut copy = request("PUT", KEY, 0);
        copy.headers_mut().insert(COPY_SOURCE, "bucket/other");
        let long = [
            copy,
            request("GET", "http://localhost/bucket?list-type=2&prefix=p", 0),
            request("GET", "http://localhost/bucket?uploads&prefix=p", 0),
            request("POST", "http://localhost/bucket/key?uploadId=u", 100),
            request("POST", "http://localhost/bucket?delete", 100),
            request("DELETE", KEY, 0),
        ];
        for request in long {
            let what = format!("{} {}", request.method(), request.uri());
            assert_eq!(given_up_after(request).await, None, "{what}");
        }
    }
}
