//! The connections to a server that tells of itself: HTTP/1.1, one request each, bounded in time, size and number.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, X_CONTENT_TYPE_OPTIONS,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use log::{debug, warn};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;

use super::control::{self, Refusal, Verb};
use super::listen::{Listener, Socket};
use super::{Monitor, page, subject};
use crate::base::control::Control;
use crate::base::volume_name::VolumeName;

/// Connections at once; others wait.
const CONNECTIONS_MAX: usize = 16;
/// Time of a connection, from its beginning to its end.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(10);
/// Time that the head of a request may take: who connects and says nothing must not keep others waiting.
const HEAD_TIME_MAX: Duration = Duration::from_secs(2);
/// The largest head of a request.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// The largest body of a request.
const BODY_BYTES_MAX: usize = 64 << 10;
/// What is known now, under the name that the control socket has for it.
const STATUS_OF_CONTROL: &str = "/v1/status";
/// What somebody gets who was not there.
const REPORT: &str = "/v1/report";
/// Wait after a connection could not be accepted, as when there are no descriptors left.
const ACCEPT_WAIT: Duration = Duration::from_millis(100);

pub(super) const TEXT: &str = "text/plain; charset=utf-8";
pub(super) const JSON: &str = "application/json";

/// What people look at; it asks for `/status` again and again.
const PAGE: &str = include_str!("page.html");
/// It needs nothing from elsewhere, and may send nothing there.
const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; \
                           base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

pub(super) type Answer = Response<Full<Bytes>>;

/// Answers at a socket until it is dropped.
#[derive(Debug)]
pub struct Serving(AbortHandle);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What who connects may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Ask.
    Look,
    /// Ask, and tell the server what to do. Only this user and root may connect, to a Unix socket.
    Control,
}

/// Begins to answer, on the current runtime.
///
/// # Errors
/// When the runtime cannot take the socket.
pub fn serve(listener: Listener, monitor: Arc<Monitor>, access: Access) -> io::Result<Serving> {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let name = listener.address().to_string();
    let (socket, file) = listener.into_parts();
    let socket = Accepting::new(socket)?;
    let accepting = tokio::spawn(async move {
        let _file = file;
        loop {
            let Ok(turn) = connections.clone().acquire_owned().await else {
                return;
            };
            match socket.accept(access).await {
                Ok(Some(stream)) => {
                    tokio::spawn(connection(stream, turn, monitor.clone(), access));
                }
                Ok(None) => warn!("a request of another user to the control socket was refused"),
                Err(e) => {
                    warn!("a connection to {name} could not be accepted: {e}");
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

    /// The next connection; `None` for one of somebody who may not have this access.
    async fn accept(&self, access: Access) -> io::Result<Option<Box<dyn Stream>>> {
        match self {
            // Nobody can tell whose that is.
            Self::Tcp(socket) => {
                let (stream, _) = socket.accept().await?;
                Ok((access == Access::Look).then(|| Box::new(stream) as Box<dyn Stream>))
            }
            Self::Unix(socket) => {
                let (stream, _) = socket.accept().await?;
                let peer = stream.peer_cred()?.uid();
                let is_ours = peer == rustix::process::geteuid().as_raw() || peer == 0;
                Ok((access == Access::Look || is_ours).then(|| Box::new(stream) as Box<dyn Stream>))
            }
        }
    }
}

async fn connection(
    stream: Box<dyn Stream>,
    turn: OwnedSemaphorePermit,
    monitor: Arc<Monitor>,
    access: Access,
) {
    let _turn = turn;
    let ending = Ending::default();
    let (of_service, asked) = (monitor.clone(), ending.clone());
    let service = service_fn(move |request: Request<Incoming>| {
        let (monitor, asked) = (of_service.clone(), asked.clone());
        async move { Ok::<_, Infallible>(respond(monitor, access, request, &asked).await) }
    });
    let mut connection = http1::Builder::new();
    connection
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false);
    let served = connection.serve_connection(TokioIo::new(stream), service);
    // What a server is told to do takes as long as it takes, and bounds that itself.
    let ended = match access {
        Access::Look => tokio::time::timeout(CONNECTION_TIME_MAX, served).await,
        Access::Control => Ok(served.await),
    };
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(e)) => debug!("a connection that asked about the server ended early: {e}"),
        Err(_) => debug!("a connection that asked about the server took too long"),
    }
    if let Some(when_idle) = ending.take() {
        monitor.end(when_idle);
    }
}

/// Whether the server was told to end, and whether only once its last client has gone. It ends once that is answered: with the server
/// this connection goes, too.
#[derive(Debug, Clone, Default)]
struct Ending(Arc<Mutex<Option<bool>>>);

impl Ending {
    fn take(&self) -> Option<bool> {
        self.0.lock().take()
    }

    fn note(&self, verb: &Verb) {
        if let Verb::Shutdown { when_idle } = verb {
            *self.0.lock() = Some(*when_idle);
        }
    }
}

async fn respond(
    monitor: Arc<Monitor>,
    access: Access,
    request: Request<Incoming>,
    ending: &Ending,
) -> Answer {
    let path = request.uri().path().to_owned();
    let volume = subject::named(request.uri().query());
    let is_verb = path.starts_with(control::VERSION) && path != STATUS_OF_CONTROL;
    if access == Access::Look || !is_verb {
        return monitor.answer(
            request.method(),
            if access == Access::Control {
                of_control(&path)
            } else {
                &path
            },
        );
    }
    if path == REPORT && request.method() == Method::GET {
        let body = serde_json::to_vec(&monitor.report()).unwrap_or_default();
        return answer(StatusCode::OK, JSON, body);
    }
    if request.method() != Method::POST {
        return refused_method("only POST is answered here\n", "POST");
    }
    let id = request.headers().get(control::VOLUME_HEADER);
    let id = id.map(|id| String::from_utf8_lossy(id.as_bytes()).into_owned());
    let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect();
    let done = match tokio::time::timeout(CONNECTION_TIME_MAX, body).await {
        Ok(Ok(body)) => match volume {
            Ok(volume) => told(monitor, path, volume, id, body.to_bytes(), ending).await,
            Err(refusal) => Err(refusal),
        },
        Ok(Err(_)) => Err(Refusal {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            why: format!("the body broke off, or is longer than {BODY_BYTES_MAX} bytes"),
        }),
        Err(_) => Err(Refusal {
            status: StatusCode::REQUEST_TIMEOUT,
            why: "the body took too long".into(),
        }),
    };
    let (status, body) = match done {
        Ok(value) => (StatusCode::OK, value),
        Err(refusal) => (refusal.status, serde_json::json!({ "error": refusal.why })),
    };
    answer(status, JSON, body.to_string())
}

/// Ends what was asked for once nobody waits for it any more: with the connection of who hangs up this goes, too.
#[derive(Default)]
struct Waiting(Arc<Control>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.stop();
    }
}

async fn told(
    monitor: Arc<Monitor>,
    path: String,
    volume: Option<VolumeName>,
    id: Option<String>,
    body: Bytes,
    ending: &Ending,
) -> Result<serde_json::Value, Refusal> {
    let verb = control::verb(&path, &body)?;
    monitor.check_subject(&verb, volume.as_ref())?;
    monitor.check_volume(volume.as_ref(), id.as_deref())?;
    ending.note(&verb);
    let runtime = tokio::runtime::Handle::current();
    let waiting = Waiting::default();
    let control = waiting.0.clone();
    let done =
        tokio::task::spawn_blocking(move || monitor.carry_out(&verb, volume.as_ref(), &runtime, &control))
            .await;
    done.unwrap_or_else(|e| {
        Err(Refusal {
            status: StatusCode::INTERNAL_SERVER_ERROR,
            why: format!("internal error: {e}"),
        })
    })
}

/// The path that this one is another name of.
fn of_control(path: &str) -> &str {
    match path {
        STATUS_OF_CONTROL => "/status",
        other => other,
    }
}

fn refused_method(text: &'static str, allowed: &'static str) -> Answer {
    let mut refused = answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, text);
    refused
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static(allowed));
    refused
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
            return refused_method("only GET is answered here\n", "GET, HEAD");
        }
        match path {
            "/metrics" => answer(
                StatusCode::OK,
                page::CONTENT_TYPE,
                page::of(&self.status().of_all(), &self.metrics),
            ),
            "/status" => {
                let body = serde_json::to_vec(&self.status()).unwrap_or_default();
                answer(StatusCode::OK, JSON, body)
            }
            "/" => {
                let mut page = answer(StatusCode::OK, "text/html; charset=utf-8", PAGE);
                let policy = HeaderValue::from_static(PAGE_POLICY);
                page.headers_mut().insert(CONTENT_SECURITY_POLICY, policy);
                page
            }
            "/healthz" => answer(StatusCode::OK, TEXT, "ok\n"),
            "/readyz" => match self.status().not_ready() {
                None => answer(StatusCode::OK, TEXT, "ok\n"),
                Some(why) => answer(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
            },
            _ => answer(
                StatusCode::NOT_FOUND,
                TEXT,
                "there are /, /metrics, /status, /healthz and /readyz\n",
            ),
        }
    }
}
