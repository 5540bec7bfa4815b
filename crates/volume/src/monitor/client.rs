//! Asks a server about itself, or tells it what to do.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};

use super::control::VOLUME_HEADER;
use crate::base::volume_id::VolumeId;

/// How long a connection, and the answer to a question, are waited for. What a server is told to do takes as long as it takes.
const ASK_TIME_MAX: Duration = Duration::from_secs(15);

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerAddress {
    /// Host and port.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Why a server did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection.
    #[error("no server answers at {place}")]
    Unreachable {
        /// Where.
        place: ServerAddress,
        /// Why.
        source: std::io::Error,
    },
    /// Something answers that is no such server.
    #[error(
        "what listens at {place} is no Hypernbd server that tells of itself: {why}; one with control=unix:PATH, as under systemd, is \
             named by that path or by its volume's URL"
    )]
    Foreign {
        /// Where.
        place: ServerAddress,
        /// Why it is none.
        why: String,
    },
    /// The server refused, or failed.
    #[error("{why}")]
    Refused {
        /// Status of the answer.
        status: u16,
        /// In the server's words.
        why: String,
    },
}

/// Asks for `path` and reads the JSON of the answer.
///
/// # Errors
/// [`ClientError`].
pub async fn ask<T: DeserializeOwned>(place: &ServerAddress, path: &str) -> Result<T, ClientError> {
    let asked = exchange(place, Method::GET, path, None, Bytes::new());
    let answer = tokio::time::timeout(ASK_TIME_MAX, asked).await;
    let answer = answer.unwrap_or_else(|_| Err(unreachable(place, timed_out())))?;
    read(place, &answer)
}

/// Tells the server to carry out a verb, and waits until it has.
///
/// # Errors
/// [`ClientError`].
pub async fn tell<T: DeserializeOwned>(
    place: &ServerAddress,
    verb: &str,
    arguments: &impl Serialize,
) -> Result<T, ClientError> {
    tell_of(place, None, verb, arguments).await
}

/// As [`tell`], about this volume: a server that has another one open refuses. Servers of earlier releases do not look at that.
///
/// # Errors
/// [`ClientError`].
pub async fn tell_of<T: DeserializeOwned>(
    place: &ServerAddress,
    volume: Option<VolumeId>,
    verb: &str,
    arguments: &impl Serialize,
) -> Result<T, ClientError> {
    let body = serde_json::to_vec(arguments).map_err(|e| foreign(place, e))?;
    let path = format!("{}{verb}", super::control::VERSION);
    let answer = exchange(place, Method::POST, &path, volume, body.into()).await?;
    read(place, &answer)
}

fn read<T: DeserializeOwned>(place: &ServerAddress, answer: &(u16, Bytes)) -> Result<T, ClientError> {
    let (status, body) = answer;
    if *status == 200 {
        return serde_json::from_slice(body).map_err(|e| foreign(place, e));
    }
    let why = serde_json::from_slice::<serde_json::Value>(body)
        .ok()
        .and_then(|body| Some(body.get("error")?.as_str()?.to_owned()))
        .unwrap_or_else(|| String::from_utf8_lossy(body).trim().to_owned());
    Err(ClientError::Refused { status: *status, why })
}

fn foreign(place: &ServerAddress, why: impl fmt::Display) -> ClientError {
    ClientError::Foreign {
        place: place.clone(),
        why: why.to_string(),
    }
}

fn unreachable(place: &ServerAddress, source: std::io::Error) -> ClientError {
    ClientError::Unreachable {
        place: place.clone(),
        source,
    }
}

fn timed_out() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::TimedOut, "it takes too long")
}

async fn exchange(
    place: &ServerAddress,
    method: Method,
    path: &str,
    volume: Option<VolumeId>,
    body: Bytes,
) -> Result<(u16, Bytes), ClientError> {
    match place {
        ServerAddress::Tcp(address) => {
            let stream = connected(place, tokio::net::TcpStream::connect(address)).await?;
            exchange_on(stream, place, method, path, volume, body).await
        }
        ServerAddress::Unix(socket) => {
            let stream = connected(place, tokio::net::UnixStream::connect(socket)).await?;
            exchange_on(stream, place, method, path, volume, body).await
        }
    }
}

async fn connected<S>(
    place: &ServerAddress,
    connect: impl Future<Output = std::io::Result<S>>,
) -> Result<S, ClientError> {
    let connected = tokio::time::timeout(ASK_TIME_MAX, connect).await;
    connected
        .unwrap_or_else(|_| Err(timed_out()))
        .map_err(|source| unreachable(place, source))
}

async fn exchange_on<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    place: &ServerAddress,
    method: Method,
    path: &str,
    volume: Option<VolumeId>,
    body: Bytes,
) -> Result<(u16, Bytes), ClientError> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| foreign(place, e))?;
    let carried = tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path);
    if let Some(volume) = volume {
        request = request.header(VOLUME_HEADER, volume.to_string());
    }
    let request = request
        .header(HOST, "localhost")
        .header(CONTENT_TYPE, super::http::JSON)
        .body(Full::new(body))
        .map_err(|e| foreign(place, e))?;
    let answered = async {
        let answer = sender.send_request(request).await?;
        let status = answer.status().as_u16();
        Ok::<_, hyper::Error>((status, answer.into_body().collect().await?.to_bytes()))
    };
    let answered = answered.await.map_err(|e| foreign(place, e));
    carried.abort();
    answered
}
