//! What a server says of itself, over HTTP.
//!
//! * [`listen`]: where it listens; sockets are made before the server goes to the background.
//! * [`http`]: the connections, each with a bound on its time and its size.
//! * [`status`]: what is known now, as JSON.
//! * `page`: the same for Prometheus.
//!
//! What is asked costs the store nothing.

use std::sync::Arc;

use crate::metrics::Metrics;
use crate::volume::Volume;

pub mod http;
pub mod listen;
mod page;
pub mod status;

/// What a server can be asked about itself.
pub trait Served: Send + Sync + 'static {
    /// What it serves now.
    fn now(&self) -> Now;
}

/// What a server serves at one moment.
pub struct Now {
    /// Whether clients are served.
    pub state: State,
    /// The volume, while it is open.
    pub volume: Option<Arc<Volume>>,
    /// Connections of clients to the volume; those to earlier checkpoints are not counted.
    pub connections: u64,
}

/// Whether clients are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// The first client opens the volume.
    Waiting,
    /// A client waits for the volume.
    Opening,
    /// It is open.
    Open,
    /// The last opening failed, for this reason. The next client tries again.
    Failed(String),
    /// The server ends.
    Ending,
}

impl State {
    /// Its name where it is shown.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Opening => "opening",
            Self::Open => "open",
            Self::Failed(_) => "failed",
            Self::Ending => "ending",
        }
    }
}

/// A server, as it is told of.
pub struct Monitor {
    served: Box<dyn Served>,
    metrics: Metrics,
    /// What does not change while it runs.
    about: About,
}

/// What does not change while a server runs.
#[derive(Debug, Clone, serde::Serialize)]
pub struct About {
    /// Version of this software.
    pub version: &'static str,
    /// The volume's URL. It holds no credential.
    pub url: String,
    /// What a flush promises.
    pub durability: &'static str,
    /// Number of its process.
    pub pid: u32,
    /// When it started, in milliseconds since 1970-01-01 UTC.
    pub started_ms: u64,
}

impl Monitor {
    /// Tells of `served`, which counts in `metrics`.
    pub fn new(served: impl Served, metrics: Metrics, url: String, durability: &'static str) -> Self {
        Self {
            served: Box::new(served),
            metrics,
            about: About {
                version: env!("CARGO_PKG_VERSION"),
                url,
                durability,
                pid: std::process::id(),
                started_ms: crate::base::clock::now_ms(),
            },
        }
    }
}
