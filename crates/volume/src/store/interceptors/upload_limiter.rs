//! Turns at the line for pieces of uploads.
//!
//! The pieces of a checkpoint begin all at once, share the line, end together, and leave it idle together until the store
//! has answered. Those of a second checkpoint beside it do the same. With fewer turns than pieces, those of the second
//! begin one by one, as those of the first end, and the line stays full.

use std::sync::Arc;
use std::time::Duration;

use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_http_client::{Builder, ConnectorBuilder};
use aws_smithy_runtime_api::client::connector_metadata::ConnectorMetadata;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient,
    SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use tokio::sync::Semaphore;

use super::answer_time::AnswerTime;
use super::upload::has_parameter;

/// Pieces of uploads on the line at once.
pub(crate) const UPLOAD_TURNS: usize = 10;
/// A piece that waited for this long goes without a turn: on a slow line it takes its share as ever. The SDK takes a
/// request that sends nothing for `STALL_GRACE` for a dead one.
const WAIT_MAX: Duration = Duration::from_secs(3);

/// An HTTP client whose uploads of pieces take turns.
#[derive(Debug)]
struct UploadLimiter {
    inner: SharedHttpClient,
    turns: Arc<Semaphore>,
}

#[derive(Debug)]
struct InTurn {
    inner: SharedHttpConnector,
    turns: Arc<Semaphore>,
}

/// The HTTP client that the SDK takes by itself, with turns. Over https, who vouches for the store: the certificates of
/// `ca_bundle` (PEM), or the system's.
///
/// # Errors
/// When the certificates cannot be used. Those of the system never vouch in their place.
pub(crate) fn client(
    ca_bundle: Option<Vec<u8>>,
    answer_time: Option<Duration>,
) -> Result<SharedHttpClient, String> {
    let trusted = ca_bundle.map_or_else(TrustStore::default, |pem| {
        TrustStore::empty().with_pem_certificate(pem)
    });
    let tls = TlsContext::builder().with_trust_store(trusted).build();
    let tls = tls.map_err(|e| format!("the certificates cannot be used: {e}"))?;
    let inner = Builder::new().build_with_connector_fn(move |settings, components| {
        let mut connector = ConnectorBuilder::default().tls_provider(Provider::Rustls(CryptoMode::AwsLc));
        connector.set_tls_context(tls.clone());
        connector.set_connector_settings(settings.cloned());
        connector.set_sleep_impl(components.and_then(RuntimeComponents::sleep_impl));
        connector.set_proxy_config(Some(ProxyConfig::from_env()));
        connector.build()
    });
    // Below the turns: who waits for one has not asked the store yet.
    let inner = match answer_time {
        Some(limit) => SharedHttpClient::new(AnswerTime { inner, limit }),
        None => inner,
    };
    Ok(SharedHttpClient::new(UploadLimiter {
        inner,
        turns: Arc::new(Semaphore::new(UPLOAD_TURNS)),
    }))
}

impl HttpClient for UploadLimiter {
    fn http_connector(
        &self,
        settings: &HttpConnectorSettings,
        components: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(InTurn {
            inner: self.inner.http_connector(settings, components),
            turns: self.turns.clone(),
        })
    }

    fn connector_metadata(&self) -> Option<ConnectorMetadata> {
        self.inner.connector_metadata()
    }
}

impl HttpConnector for InTurn {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let is_piece = request.method() == "PUT" && has_parameter(request.uri(), "partNumber");
        if !is_piece {
            return self.inner.call(request);
        }
        let (inner, turns) = (self.inner.clone(), self.turns.clone());
        HttpConnectorFuture::new(async move {
            let _turn = tokio::time::timeout(WAIT_MAX, turns.acquire()).await;
            inner.call(request).await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
    use aws_smithy_types::body::SdkBody;
    use futures::future::join_all;

    use super::*;

    /// Answers each request after a time, and counts those under way.
    #[derive(Debug, Clone, Default)]
    struct Slow {
        takes: Duration,
        under_way: Arc<AtomicUsize>,
        most: Arc<AtomicUsize>,
    }

    impl HttpConnector for Slow {
        fn call(&self, _: HttpRequest) -> HttpConnectorFuture {
            let slow = self.clone();
            HttpConnectorFuture::new(async move {
                let now = slow.under_way.fetch_add(1, Ordering::SeqCst) + 1;
                slow.most.fetch_max(now, Ordering::SeqCst);
                tokio::time::sleep(slow.takes).await;
                slow.under_way.fetch_sub(1, Ordering::SeqCst);
                Ok(HttpResponse::new(
                    200.try_into().expect("a status"),
                    SdkBody::empty(),
                ))
            })
        }
    }

    /// The most that were under way at once of 16 such requests, and how long all of them took.
    async fn of_sixteen(method: &str, uri: &str, takes: Duration) -> (usize, Duration) {
        let slow = Slow {
            takes,
            ..Slow::default()
        };
        let in_turn = InTurn {
            inner: SharedHttpConnector::new(slow.clone()),
            turns: Arc::new(Semaphore::new(UPLOAD_TURNS)),
        };
        let started = tokio::time::Instant::now();
        let requests = (0..16).map(|_| {
            let mut request = HttpRequest::new(SdkBody::empty());
            request.set_method(method).unwrap();
            request.set_uri(uri).unwrap();
            in_turn.call(request)
        });
        let answers = join_all(requests).await;
        assert!(answers.iter().all(Result::is_ok));
        (slow.most.load(Ordering::SeqCst), started.elapsed())
    }

    const PIECE: &str = "http://localhost/bucket/key?x-id=UploadPart&partNumber=3&uploadId=u";

    #[tokio::test(start_paused = true)]
    async fn pieces_take_turns_and_nothing_else_does() {
        let takes = Duration::from_secs(1);
        assert_eq!(of_sixteen("PUT", PIECE, takes).await, (UPLOAD_TURNS, 2 * takes));
        for (method, uri) in [
            ("GET", PIECE),
            ("PUT", "http://localhost/bucket/key?x-id=PutObject"),
            ("POST", "http://localhost/bucket/key?uploadId=u"),
        ] {
            assert_eq!(
                of_sixteen(method, uri, takes).await,
                (16, takes),
                "{method} {uri}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_long_for_a_turn() {
        let takes = Duration::from_secs(60);
        assert_eq!(of_sixteen("PUT", PIECE, takes).await, (16, takes + WAIT_MAX));
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_is_given_back_by_a_request_that_is_given_up() {
        let slow = Slow {
            takes: Duration::from_secs(60),
            ..Slow::default()
        };
        let turns = Arc::new(Semaphore::new(1));
        let in_turn = InTurn {
            inner: SharedHttpConnector::new(slow),
            turns: turns.clone(),
        };
        let mut request = HttpRequest::new(SdkBody::empty());
        request.set_method("PUT").unwrap();
        request.set_uri(PIECE).unwrap();
        let given_up = tokio::time::timeout(Duration::from_secs(1), in_turn.call(request)).await;
        assert!(given_up.is_err());
        assert_eq!(turns.available_permits(), 1);
    }
}
