//! What a server says of itself, and what it can be told, over HTTP.
//!
//! * [`listen`]: where it listens; sockets are made before the server goes to the background.
//! * [`runtime_dir`]: where the socket is on which it is told what to do.
//! * [`http`]: the connections, each with a bound on its time and its size.
//! * [`status`]: what is known now, as JSON.
//! * `page`: the same for Prometheus; `page.html`: for people.
//! * [`control`]: the verbs; [`subject`]: which of many volumes they are about.
//! * [`client`]: who asks.
//! * [`log_lines`]: the log as JSON.
//!
//! What is asked costs the store nothing.

use std::any::Any;
use std::sync::Arc;

use crate::base::url::VolumeUrl;
use crate::base::volume_name::VolumeName;
use crate::metrics::Metrics;
use crate::options::durability::Durability;
use crate::options::{ServeConfig, StoreOptions};
use crate::volume::Volume;

pub mod client;
pub mod control;
pub mod http;
pub mod listen;
pub mod log_lines;
mod page;
pub mod runtime_dir;
pub mod status;
mod subject;

/// Environment variable in which whoever starts a server says where its clients reach it, as an NBD URI.
pub const NBD_URI: &str = "HYPERNBD_NBD_URI";

/// What a server can be asked about itself.
pub trait Served: Send + Sync + 'static {
    /// What it serves now.
    fn now(&self) -> Now;

    /// What it serves now of each of many volumes that is open or was a moment ago, by name; nothing where it has one.
    fn named(&self) -> Vec<(String, Now)>;

    /// Until what this gives is dropped, the volume stays open if it is, also without a client. `None` is the only one.
    fn keep_open(&self, volume: Option<&VolumeName>) -> Box<dyn Any + Send>;

    /// Ends the server: now, or once the last client has gone.
    fn shut_down(&self, when_idle: bool);

    /// Logs what this filter says, in the words of `RUST_LOG`.
    ///
    /// # Errors
    /// When it is no filter.
    fn set_log(&self, filter: &str) -> Result<(), String>;

    /// The last lines of the log as [`log_lines::json`] writes them, the oldest first.
    fn last_lines(&self) -> Vec<String>;
}

/// What a server serves at one moment.
pub struct Now {
    /// Whether clients are served.
    pub state: State,
    /// The volume, while it is open; none where there are many.
    pub volume: Option<Arc<Volume>>,
    /// Connections of clients to the volume; those to earlier checkpoints are not counted.
    pub connections: u64,
}

/// Whether clients are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// The next client opens the volume.
    Waiting,
    /// A client waits for the volume.
    Opening,
    /// It is open.
    Open,
    /// Nobody used it for long enough: it is being closed. A client that comes waits for the end of that, and opens it again.
    Closing,
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
            Self::Closing => "closing",
            Self::Failed(_) => "failed",
            Self::Ending => "ending",
        }
    }
}

/// A server, as it is told of.
pub struct Monitor {
    served: Box<dyn Served>,
    metrics: Metrics,
    /// The volume, or what many are below, and how their store is reached.
    place: (VolumeUrl, StoreOptions),
    /// There are many volumes, each with a name.
    is_of_many: bool,
    /// Its parameters as they were given.
    given: Vec<(String, String)>,
    /// What does not change while it runs.
    about: About,
}

/// What does not change while a server runs.
#[derive(Debug, Clone, serde::Serialize)]
pub struct About {
    /// Version of this software.
    pub version: &'static str,
    /// The volume's URL, or that which many are below. It holds no credential.
    pub url: String,
    /// What a flush promises.
    pub durability: &'static str,
    /// Where clients reach it, where that is known.
    pub nbd_uri: Option<String>,
    /// Number of its process.
    pub pid: u32,
    /// When it started, in milliseconds since 1970-01-01 UTC.
    pub started_ms: u64,
}

impl Monitor {
    /// Tells of `served`, which this configuration is of.
    pub fn new(served: impl Served, config: &ServeConfig) -> Self {
        Self {
            served: Box::new(served),
            metrics: config.store.metrics.clone(),
            place: (config.url.clone(), config.store.clone()),
            is_of_many: config.volumes_open.is_some(),
            given: config.given.clone(),
            about: About {
                version: env!("CARGO_PKG_VERSION"),
                url: config.url.to_string(),
                durability: Durability::of(&config.url, config.volume.wal.as_ref()).sentence(),
                nbd_uri: std::env::var(NBD_URI).ok(),
                pid: std::process::id(),
                started_ms: crate::base::clock::now_ms(),
            },
        }
    }
}
