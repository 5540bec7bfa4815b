//! What a user can set: the store's options, the volume's, the server's, and the builder that reads them as
//! `key=value`. The list of keys, with defaults and help, is [`OPTIONS`] and nothing else.

mod node_cache;
mod table;

use std::time::Duration;

pub use node_cache::{NODE_CACHE_LEAST_BYTES, NodeCacheConfig, NodeCacheError, NodeCacheStrategy};
pub use table::{OPTIONS, OptionGroup, OptionSpec, config_help, find_option};

use crate::units::MIB;
use crate::url::VolumeUrl;

/// The least `write_buffer`: two generations of a few large requests each.
pub const WRITE_BUFFER_LEAST_BYTES: u64 = 16 * MIB;
/// The most `write_buffer`: a larger one is a slip of the pen.
pub const WRITE_BUFFER_MOST_BYTES: u64 = 1 << 40;

/// `checkpoint_interval` unless it is given.
pub const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);
/// The same with a log, which makes flushes durable in between.
pub const CHECKPOINT_INTERVAL_WITH_LOG: Duration = Duration::from_secs(30);

/// What is logged unless `RUST_LOG` says otherwise.
pub const LOG_FILTER_DEFAULT: &str = "warn";

/// The engine's module that warns each time an object is not there, which is how it looks for the newest ones. Of it
/// only errors are logged, unless `RUST_LOG` names it.
pub const LOG_MODULE_NOISY: &str = "hyperfile::s3commons";

/// How the store is reached. What is not given comes from the AWS environment, profile and credential chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreOptions {
    /// Address of an S3 service other than AWS, `http://` or `https://`.
    pub endpoint_url: Option<String>,
    /// Region of the bucket.
    pub region: Option<String>,
    /// Bucket in the path (`true`) or in the host name (`false`); `None` chooses by the endpoint.
    pub path_style: Option<bool>,
    /// Whether the bodies of uploads are part of the request's signature.
    pub payload_signing: PayloadSigning,
}

/// Whether the bodies of uploads are signed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PayloadSigning {
    /// Unsigned over TLS, which protects the body itself; signed over plain http.
    #[default]
    Auto,
    /// Always signed.
    Always,
    /// Never signed, for stores and networks that are trusted.
    Never,
}

/// How a volume is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeOptions {
    /// Memory for unpublished writes, in bytes; at least [`WRITE_BUFFER_LEAST_BYTES`].
    pub write_buffer_bytes: u64,
    /// Longest time from a write to the start of the checkpoint that holds it.
    pub checkpoint_interval: Duration,
    /// How long a request may wait for the store before it fails.
    pub io_timeout: Duration,
    /// Cache of the container's index on a local disk.
    pub node_cache: Option<NodeCacheConfig>,
    /// The write-ahead log, if there is to be one.
    pub wal_url: Option<VolumeUrl>,
    /// Give up a log that cannot be used, with the writes flushed to it since the last checkpoint.
    pub discard_wal: bool,
    /// Refuse every write and change nothing on the store.
    pub read_only: bool,
}

impl Default for VolumeOptions {
    fn default() -> Self {
        Self {
            write_buffer_bytes: 512 * MIB,
            checkpoint_interval: CHECKPOINT_INTERVAL,
            io_timeout: Duration::from_secs(60),
            node_cache: None,
            wal_url: None,
            discard_wal: false,
            read_only: false,
        }
    }
}

/// Which requests nbdkit may hand over at the same time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ThreadModelOption {
    /// Parallel, except on servers that are known to crash with it.
    #[default]
    Auto,
    /// Any number of requests of every connection.
    Parallel,
    /// One request of each connection at a time.
    SerializeRequests,
}

/// Everything `key=value` says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeConfig {
    /// The volume to serve.
    pub url: VolumeUrl,
    /// How its store is reached.
    pub store: StoreOptions,
    /// How it is served.
    pub volume: VolumeOptions,
    /// Worker threads of the asynchronous runtime; at least 1.
    pub runtime_threads: usize,
    /// Which requests may run at the same time.
    pub thread_model: ThreadModelOption,
    /// Values that were adjusted, one sentence each, for the log.
    pub warnings: Vec<String>,
}

/// A key or value that cannot be used. The text names the key and says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// No such key.
    #[error("unknown parameter \"{key}\"{}; the parameters are {}", .suggestion.map(|s| format!(
        ", did you mean \"{s}\"?")).unwrap_or_default(), table::keys())]
    Unknown {
        /// The key as given.
        key: String,
        /// The nearest key, if one is near.
        suggestion: Option<&'static str>,
    },
    /// A key given twice, under one of its names.
    #[error("parameter \"{key}\" is given more than once{}; give it once", .alias.map(|a| format!(
        " (\"{a}\" is the same parameter)")).unwrap_or_default())]
    Repeated {
        /// The key's first name.
        key: &'static str,
        /// The key's other name, if it has one.
        alias: Option<&'static str>,
    },
    /// A value that cannot be used.
    #[error("parameter {key}=\"{value}\": {reason}")]
    BadValue {
        /// The key's first name.
        key: &'static str,
        /// The value as given.
        value: String,
        /// What is wrong and what to write.
        reason: String,
    },
    /// No volume named.
    #[error("the parameter backend_url is missing: name the volume, as in backend_url=s3://bucket/volume/")]
    MissingUrl,
    /// The log's URL and the volume's name the same place.
    #[error(
        "backend_wal_url={wal} lies within the volume {volume}, or the volume within it: give the log a prefix of its own"
    )]
    LogInVolume {
        /// The log's URL.
        wal: VolumeUrl,
        /// The volume's URL.
        volume: VolumeUrl,
    },
}

/// Reads `key=value` parameters one at a time.
#[derive(Debug, Default)]
pub struct ServeOptions {
    given: Vec<&'static str>,
    url: Option<VolumeUrl>,
    store: StoreOptions,
    volume: VolumeOptions,
    checkpoint_interval: Option<Duration>,
    runtime_threads: Option<usize>,
    thread_model: ThreadModelOption,
    warnings: Vec<String>,
}

impl ServeOptions {
    /// Takes in one parameter. `-` and `_` are the same in keys. Relative paths are made absolute at once.
    ///
    /// # Errors
    /// [`OptionError`] for unknown and repeated keys, and for values that cannot be used.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), OptionError> {
        let name = key.replace('-', "_");
        let spec = find_option(&name).ok_or_else(|| OptionError::Unknown {
            key: key.to_string(),
            suggestion: table::nearest(&name),
        })?;
        if self.given.contains(&spec.key) {
            return Err(OptionError::Repeated {
                key: spec.key,
                alias: spec.alias,
            });
        }
        (spec.apply)(self, value).map_err(|reason| OptionError::BadValue {
            key: spec.key,
            value: value.to_string(),
            reason,
        })?;
        self.given.push(spec.key);
        Ok(())
    }

    /// Ends the reading: what was not given takes its default.
    ///
    /// # Errors
    /// [`OptionError::MissingUrl`] when no volume was named, [`OptionError::LogInVolume`].
    pub fn finish(self) -> Result<ServeConfig, OptionError> {
        let url = self.url.ok_or(OptionError::MissingUrl)?;
        let mut volume = self.volume;
        if let Some(wal) = volume.wal_url.as_ref().filter(|wal| overlap(wal, &url)) {
            let wal = wal.clone();
            return Err(OptionError::LogInVolume { wal, volume: url });
        }
        let by_default = match volume.wal_url {
            Some(_) => CHECKPOINT_INTERVAL_WITH_LOG,
            None => CHECKPOINT_INTERVAL,
        };
        volume.checkpoint_interval = self.checkpoint_interval.unwrap_or(by_default);
        Ok(ServeConfig {
            url,
            store: self.store,
            volume,
            runtime_threads: self.runtime_threads.unwrap_or_else(default_runtime_threads),
            thread_model: self.thread_model,
            warnings: self.warnings,
        })
    }

    /// The store's options alone, for commands that take no others.
    pub fn into_store(self) -> StoreOptions {
        self.store
    }
}

/// Whether one of two places lies within the other.
fn overlap(a: &VolumeUrl, b: &VolumeUrl) -> bool {
    let (a, b) = (a.to_string(), b.to_string());
    a.starts_with(&b) || b.starts_with(&a)
}

/// One thread a processor; two at least, so that a busy one does not hold up the other's requests.
fn default_runtime_threads() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get().max(2))
}

#[cfg(test)]
mod tests;
