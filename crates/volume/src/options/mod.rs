//! What a user can set: the store's options, the volume's, the server's, and the builder that reads them as
//! `key=value`. The list of keys, with defaults and help, is [`OPTIONS`] and nothing else.

pub mod durability;
mod log_words;
mod many;
mod read_cache;
mod table;

use std::path::PathBuf;
use std::time::Duration;

pub use crate::index::cache_config::{
    INDEX_MEMORY_DEFAULT_BYTES, NODE_CACHE_LEAST_BYTES, NodeCacheConfig, NodeCacheError, NodeCacheStrategy,
};
pub use crate::lease::options::LeaseOptions;
pub use crate::metrics::address::{ControlSocket, ListenAddress};
pub use crate::read::cache_config::{ReadCacheConfig, ReadCacheDisk};
pub use crate::store::options::{PayloadSigning, ServerSideEncryption, StoreOptions};
pub use log_words::{LOG_LEVEL_DEFAULT, LOG_MODULE_NOISY, LogWords};
pub use many::VOLUMES_OPEN;
pub use read_cache::{CACHE_DISK_LEAST_BYTES, CACHE_MEMORY_LEAST_BYTES};
pub(crate) use table::parse_checkpoint_interval;
pub use table::{OPTIONS, OptionGroup, OptionSpec, config_help, find_option};

use crate::base::units::{MIB, format_size};
use crate::base::url::VolumeUrl;
use crate::base::wal_place::WalPlace;

/// The least `write_buffer`: two generations of a few large requests each.
pub const WRITE_BUFFER_LEAST_BYTES: u64 = 16 * MIB;
/// The most `write_buffer`: a larger one is a slip of the pen.
pub const WRITE_BUFFER_MOST_BYTES: u64 = 1 << 40;

/// What `backend_wal_url=auto` comes to in a directory. A flush there takes no request over a network, and whoever copies the
/// directory is to find everything in it that was flushed.
const NO_LOG_IN_DIRECTORY: &str = "backend_wal_url=auto makes no log for a volume in a directory, whose flushes need none; a \
     journal has a directory of its own, backend_wal_url=file:///PATH/";

/// The least `index_memory`.
pub const INDEX_MEMORY_LEAST_BYTES: u64 = MIB;

/// `checkpoint_interval` unless it is given.
pub const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(5);
/// The same with a log, which makes flushes durable in between.
pub const CHECKPOINT_INTERVAL_WITH_LOG: Duration = Duration::from_secs(30);

/// `lease_linger` unless it is given.
pub const LEASE_LINGER: Duration = Duration::from_secs(30);

/// How long a request waits for the store by default.
pub const IO_TIMEOUT: Duration = Duration::from_secs(60);
/// `retention_interval` unless it is given.
pub const RETENTION_INTERVAL: Duration = Duration::from_secs(5 * 60);
/// `retention_grace` unless it is given: well above the time that a read waits for the store.
pub const RETENTION_GRACE: Duration = Duration::from_secs(10 * 60);

/// The longest `scrub_interval`: ten years.
pub const SCRUB_INTERVAL_MOST: Duration = Duration::from_secs(3650 * 24 * 3600);

/// What becomes of the log of the volume that this one is a copy of, where its marker was copied along.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum InheritedWal {
    /// The open is refused, and says what to do: the log is the original's.
    #[default]
    Refuse,
    /// It is read and replayed into the copy, and not changed.
    Replay,
}

/// Whether a served volume is compacted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Compaction {
    /// When so much of what is stored is dead that it is worth it.
    Auto,
    /// Never.
    #[default]
    Off,
}

/// How a volume is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeOptions {
    /// Memory for unpublished writes, in bytes; at least [`WRITE_BUFFER_LEAST_BYTES`].
    pub write_buffer_bytes: u64,
    /// Directory of the file that keeps unpublished writes over the server's end.
    pub write_buffer_dir: Option<PathBuf>,
    /// Longest time from a write to the start of the checkpoint that holds it.
    pub checkpoint_interval: Duration,
    /// How long a request may wait for the store before it fails.
    pub io_timeout: Duration,
    /// Cache of the container's index on a local disk.
    pub node_cache: Option<NodeCacheConfig>,
    /// Cache of published data.
    pub read_cache: ReadCacheConfig,
    /// Memory for nodes of the index, in bytes.
    pub index_memory_bytes: u64,
    /// Where the write-ahead log is, if there is to be one.
    pub wal: Option<WalPlace>,
    /// Give up a log that cannot be used, with the writes flushed to it since the last checkpoint.
    pub discard_wal: bool,
    /// A volume that is found in another place than it was made in was moved, and is no copy.
    pub adopt: bool,
    /// What becomes of the log of the volume that this one is a copy of.
    pub inherited_wal: InheritedWal,
    /// Refuse every write and change nothing of the volume.
    pub read_only: bool,
    /// How often what is not kept of the volume is removed; never when `None`.
    pub retention_interval: Option<Duration>,
    /// How long something must not have been needed before it is removed.
    pub retention_grace: Duration,
    /// Whether what is live is copied out of objects that are mostly dead.
    pub compaction: Compaction,
    /// Bytes a second that are copied for that at most; 0 is without a bound.
    pub compaction_rate: u64,
    /// Everything that the volume needs is read and compared with its check values once in this time; never when `None`.
    pub scrub_interval: Option<Duration>,
    /// How the volume is kept from other servers.
    pub lease: LeaseOptions,
}

impl Default for VolumeOptions {
    fn default() -> Self {
        Self {
            write_buffer_bytes: 512 * MIB,
            write_buffer_dir: None,
            checkpoint_interval: CHECKPOINT_INTERVAL,
            io_timeout: IO_TIMEOUT,
            node_cache: None,
            read_cache: ReadCacheConfig::default(),
            index_memory_bytes: INDEX_MEMORY_DEFAULT_BYTES,
            wal: None,
            discard_wal: false,
            adopt: false,
            inherited_wal: InheritedWal::default(),
            read_only: false,
            retention_interval: Some(RETENTION_INTERVAL),
            retention_grace: RETENTION_GRACE,
            compaction: Compaction::default(),
            compaction_rate: 0,
            scrub_interval: None,
            lease: LeaseOptions::default(),
        }
    }
}

/// How lines of the log look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
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
    /// The volume to serve; or what the volumes to serve are directly below.
    pub url: VolumeUrl,
    /// How many of the volumes below the URL may be open at once; `None` where the URL is one volume.
    pub volumes_open: Option<usize>,
    /// How its store is reached.
    pub store: StoreOptions,
    /// How it is served.
    pub volume: VolumeOptions,
    /// Worker threads of the asynchronous runtime; at least 1.
    pub runtime_threads: usize,
    /// Which requests may run at the same time.
    pub thread_model: ThreadModelOption,
    /// How long the volume stays open after its last client; for ever when `None`.
    pub lease_linger: Option<Duration>,
    /// Where the server tells of itself, if anywhere.
    pub metrics: Option<ListenAddress>,
    /// Where it is told what to do.
    pub control: ControlSocket,
    /// How lines of the log look.
    pub log_format: LogFormat,
    /// What was given, by first names.
    pub given: Vec<(String, String)>,
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
    /// A parameter without the one it belongs to.
    #[error("parameter \"{key}\" {reason}")]
    Missing {
        /// The key given.
        key: &'static str,
        /// What it needs.
        reason: &'static str,
    },
    /// No volume named.
    #[error(
        "the parameter backend_url is missing: name the volume, as in backend_url=s3://bucket/volume/, or with volumes=URL what many \
         of them are below"
    )]
    MissingUrl,
    /// One volume is named, and many.
    #[error("backend_url is one volume, and volumes is many: give one of the two")]
    OneAndMany,
    /// The memory of the server is too little for so many volumes.
    #[error(
        "{key}={} is {} for each of volumes_open={open}, and the least is {}: raise it, or lower volumes_open",
        format_size(*.all_bytes),
        format_size(*.all_bytes / (*.open as u64)),
        format_size(*.least_bytes)
    )]
    Share {
        /// The parameter.
        key: &'static str,
        /// What all volumes together get.
        all_bytes: u64,
        /// How many they are.
        open: usize,
        /// What each needs.
        least_bytes: u64,
    },
    /// A directory of the server's own is another one's.
    #[error("{key}: {dir} is the directory of {other}, or in it: name one of its own")]
    SharedDirectory {
        /// The parameter that names it.
        key: &'static str,
        /// The directory.
        dir: String,
        /// The parameter that names it, too.
        other: &'static str,
    },
    /// The log's URL and the volume's name the same place.
    #[error(
        "backend_wal_url={wal} lies within the volume {volume}, or the volume within it: give the log a prefix of its own"
    )]
    WalInVolume {
        /// The log's URL.
        wal: VolumeUrl,
        /// The volume's URL.
        volume: VolumeUrl,
    },
}

/// Reads `key=value` parameters one at a time.
#[derive(Debug)]
pub struct ServeOptions {
    given: Vec<(&'static str, String)>,
    url: Option<VolumeUrl>,
    volumes: Option<VolumeUrl>,
    volumes_open: Option<usize>,
    store: StoreOptions,
    volume: VolumeOptions,
    cache_dir: Option<PathBuf>,
    cache_disk_bytes: Option<u64>,
    checkpoint_interval: Option<Duration>,
    runtime_threads: Option<usize>,
    thread_model: ThreadModelOption,
    lease_linger: Option<Duration>,
    metrics: Option<ListenAddress>,
    control: ControlSocket,
    log_format: LogFormat,
    warnings: Vec<String>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            given: Vec::new(),
            url: None,
            volumes: None,
            volumes_open: None,
            store: StoreOptions::default(),
            volume: VolumeOptions::default(),
            cache_dir: None,
            cache_disk_bytes: None,
            checkpoint_interval: None,
            runtime_threads: None,
            thread_model: ThreadModelOption::default(),
            lease_linger: Some(LEASE_LINGER),
            metrics: None,
            control: ControlSocket::default(),
            log_format: LogFormat::default(),
            warnings: Vec::new(),
        }
    }
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
        if self.given.iter().any(|(key, _)| *key == spec.key) {
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
        self.given.push((spec.key, value.to_string()));
        Ok(())
    }

    /// Ends the reading: what was not given takes its default.
    ///
    /// # Errors
    /// [`OptionError::MissingUrl`] when no volume was named, [`OptionError::OneAndMany`], [`OptionError::Missing`] when a parameter
    /// needs another, [`OptionError::Share`], [`OptionError::WalInVolume`].
    pub fn finish(mut self) -> Result<ServeConfig, OptionError> {
        let (url, volumes_open) = self.place()?;
        let mut store = self.store()?;
        let mut volume = self.volume;
        // A third of what clients wait: what is not answered is sent again twice before they hear of it.
        store.answer_time = Some(volume.io_timeout.max(IO_TIMEOUT) / 3);
        let named = volume.wal.as_ref().and_then(WalPlace::url);
        if let Some(wal) = named.filter(|wal| overlap(wal, &url)) {
            let wal = wal.clone();
            return Err(OptionError::WalInVolume { wal, volume: url });
        }
        if volume.wal == Some(WalPlace::Beside) && matches!(url, VolumeUrl::File { .. }) {
            volume.wal = None;
            self.warnings.push(NO_LOG_IN_DIRECTORY.to_owned());
        }
        let by_default = match volume.wal {
            Some(_) => CHECKPOINT_INTERVAL_WITH_LOG,
            None => CHECKPOINT_INTERVAL,
        };
        volume.checkpoint_interval = self.checkpoint_interval.unwrap_or(by_default);
        volume.read_cache.disk = read_cache::disk(
            volume.read_cache.memory_bytes,
            self.cache_dir.take(),
            self.cache_disk_bytes,
        )?;
        let has_own_place = self.given.iter().any(|(key, _)| *key == "node_cache_config");
        if let (Some(disk), false) = (&mut volume.read_cache.disk, has_own_place) {
            volume.node_cache = Some(read_cache::part_for_nodes(disk));
        }
        // Once all of them are known.
        let key_of_url = volumes_open.map_or("backend_url", |_| "volumes");
        check_directories(key_of_url, &url, &volume)?;
        if let Some(open) = volumes_open {
            many::check_shares(&volume, open)?;
            many::check_none_of_one(&volume)?;
        }
        Ok(ServeConfig {
            url,
            volumes_open,
            store,
            volume,
            runtime_threads: self.runtime_threads.unwrap_or_else(default_runtime_threads),
            thread_model: self.thread_model,
            lease_linger: self.lease_linger,
            metrics: self.metrics,
            control: self.control,
            log_format: self.log_format,
            given: self
                .given
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect(),
            warnings: self.warnings,
        })
    }

    /// The volume, or what many are below, and how many of those may be open.
    fn place(&mut self) -> Result<(VolumeUrl, Option<usize>), OptionError> {
        match (self.url.take(), self.volumes.take(), self.volumes_open) {
            (Some(_), Some(_), _) => Err(OptionError::OneAndMany),
            (Some(_), None, Some(_)) => Err(OptionError::Missing {
                key: "volumes_open",
                reason: "is for a server of many volumes: give volumes=URL instead of backend_url, or leave it out",
            }),
            (Some(url), None, None) => Ok((url, None)),
            (None, Some(url), open) => Ok((url, Some(open.unwrap_or(VOLUMES_OPEN)))),
            (None, None, _) => Err(OptionError::MissingUrl),
        }
    }

    /// The store's options alone, for commands that take no others.
    ///
    /// # Errors
    /// [`OptionError::BadValue`] for options that do not go together.
    pub fn store(&self) -> Result<StoreOptions, OptionError> {
        let store = self.store.clone();
        if let (Some(key_id), false) = (
            &store.sse_kms_key_id,
            store.sse == Some(ServerSideEncryption::Kms),
        ) {
            return Err(OptionError::BadValue {
                key: "sse_kms_key_id",
                value: key_id.clone(),
                reason: "a key is used with sse=aws:kms only; add that, or remove the key".to_string(),
            });
        }
        Ok(store)
    }
}

/// The directories of a server's own are none that others keep their files in, or that go with a volume.
fn check_directories(
    key_of_url: &'static str,
    url: &VolumeUrl,
    volume: &VolumeOptions,
) -> Result<(), OptionError> {
    let of_pages = volume.read_cache.disk.as_ref().map(|disk| &disk.dir);
    let of_nodes = volume.node_cache.as_ref().map(|nodes| &nodes.path);
    let given = [
        ("write_buffer_dir", volume.write_buffer_dir.as_ref()),
        ("cache_dir", of_pages),
        ("node_cache_config", of_nodes),
    ];
    for (key, dir) in given {
        let Some(dir) = dir else { continue };
        let is_within = |url: &VolumeUrl| matches!(url, VolumeUrl::File { path } if dir.starts_with(path));
        let other = match volume.wal.as_ref().and_then(WalPlace::url) {
            _ if is_within(url) => key_of_url,
            Some(wal) if is_within(wal) => "backend_wal_url",
            _ => continue,
        };
        return Err(OptionError::SharedDirectory {
            key,
            dir: dir.display().to_string(),
            other,
        });
    }
    Ok(())
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
