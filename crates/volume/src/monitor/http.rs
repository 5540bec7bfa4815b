//! The connections to a server that tells of itself: HTTP/1.1, one request each, bounded in time, size and number.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use log::{debug, warn};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

use super::listen::{Listener, Socket};
use super::{Monitor, page};

/// Connections at once; others wait.
const CONNECTIONS_MAX: usize = 16;
/// Time of a connection, from its beginning to its end.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(10);
/// Time that the head of a request may take: who connects and says nothing must not keep others waiting.
const HEAD_TIME_MAX: Duration = Duration::from_secs(2);
/// The largest head of a request.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Wait after a connection could not be accepted, as when there are no descriptors left.
const ACCEPT_WAIT: Duration = Duration::from_millis(100);

pub(super) const TEXT: &str = "text/plain; charset=utf-8";
pub(super) const JSON: &str = "application/json";

pub(super) type Answer = Response<Full<Bytes>>;

/// Answers at a socket until it is dropped.
#[derive(Debug)]
pub struct Serving(AbortHandle);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Begins to answer, on the current runtime.
///
/// # Errors
/// When the runtime cannot take the socket.
pub fn serve(listener: Listener, monitor: Arc<Monitor>) -> io::Result<Serving> {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let (socket, file) = listener.into_parts();
    let socket = Accepting::new(socket)?;
    let accepting = tokio::spawn(async move {
        let _file = file;
        loop {
            let Ok(turn) = connections.clone().acquire_owned().await else {
                return;
            };
            match socket.accept().await {
                Ok(stream) => {
                    tokio::spawn(connection(stream, turn, monitor.clone()));
                }
                Err(e) => {
                    warn!("a connection to the metrics could not be accepted: {e}");
                    tokio::time::sleep(ACCEPT_WAIT).await;
                }
            }
        }
    });
    Ok(Serving(accepting.abort_handle()))
}

/// A socket on the runtime.
enum Accepting {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

/// A connection of either kind.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

impl Accepting {
    fn new(socket: Socket) -> io::Result<Self> {
        Ok(match socket {
            Socket::Tcp(socket) => Self::Tcp(tokio::net::TcpListener::from_std(socket)?),
            Socket::Unix(socket) => Self::Unix(tokio::net::UnixListener::from_std(socket)?),
        })
    }

    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Tcp(socket) => Box::new(socket.accept().await?.0),
            Self::Unix(socket) => Box::new(socket.accept().await?.0),
        })
    }
}

async fn connection(stream: Box<dyn Stream>, turn: OwnedSemaphorePermit, monitor: Arc<Monitor>) {
    let _turn = turn;
    let service = service_fn(move |request: Request<Incoming>| {
        let monitor = monitor.clone();
        async move { Ok::<_, Infallible>(monitor.answer(request.method(), request.uri().path())) }
    });
    let mut connection = http1::Builder::new();
    connection
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false);
    let served = connection.serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_TIME_MAX, served).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => debug!("a connection to the metrics ended early: {e}"),
        Err(_) => debug!("a connection to the metrics took too long"),
    }
}

/// An answer with a body.
pub(super) fn answer(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    // What is true now is of no use later, to nobody.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    answer
}

impl Monitor {
    /// What is answered to a request.
    pub(super) fn answer(&self, method: &Method, path: &str) -> Answer {
        if method != Method::GET && method != Method::HEAD {
            let text = "only GET is answered here\n";
            let mut refused = answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, text);
            refused
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return refused;
        }
        match path {
            "/metrics" => answer(
                StatusCode::OK,
                page::CONTENT_TYPE,
                page::of(&self.status(), &self.metrics),
            ),
            "/status" => {
                let body = serde_json::to_vec(&self.status()).unwrap_or_default();
                answer(StatusCode::OK, JSON, body)
            }
            "/healthz" => answer(StatusCode::OK, TEXT, "ok\n"),
            "/readyz" => match self.status().not_ready() {
                None => answer(StatusCode::OK, TEXT, "ok\n"),
                Some(why) => answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
            },
            _ => answer(
                StatusCode::NOT_FOUND,
                TEXT,
                "there are /metrics, /status, /healthz and /readyz\n",
            ),
        }
    }
}
