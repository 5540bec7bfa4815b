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
            checkpoint_interval: Duration::from_secs(5),
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
    /// A key of the write-ahead log.
    #[error(
        "parameter \"{key}\": the write-ahead log is not available in this release; remove the parameter \
         (without it, a flush is durable on S3 when it is answered)"
    )]
    NoLog {
        /// The key as given.
        key: String,
    },
}

/// Keys of the write-ahead log, refused until there is one.
const LOG_KEYS: [&str; 2] = ["backend_wal_url", "backend_wal_uri"];

/// Reads `key=value` parameters one at a time.
#[derive(Debug, Default)]
pub struct ServeOptions {
    given: Vec<&'static str>,
    url: Option<VolumeUrl>,
    store: StoreOptions,
    volume: VolumeOptions,
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
        if LOG_KEYS.contains(&name.as_str()) {
            return Err(OptionError::NoLog { key: key.to_string() });
        }
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
    /// [`OptionError::MissingUrl`] when no volume was named.
    pub fn finish(self) -> Result<ServeConfig, OptionError> {
        Ok(ServeConfig {
            url: self.url.ok_or(OptionError::MissingUrl)?,
            store: self.store,
            volume: self.volume,
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

/// One thread a processor; two at least, so that a busy one does not hold up the other's requests.
fn default_runtime_threads() -> usize {
    std::thread::available_parallelism().map_or(2, |n| n.get().max(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: (&str, &str) = ("backend_url", "s3://bucket/vol/");

    fn read(pairs: &[(&str, &str)]) -> Result<ServeConfig, OptionError> {
        let mut options = ServeOptions::default();
        for (key, value) in pairs {
            options.set(key, value)?;
        }
        options.finish()
    }

    fn bad_value(key: &str, value: &str) -> String {
        let error = read(&[URL, (key, value)]).expect_err(key);
        assert!(matches!(error, OptionError::BadValue { .. }), "{error}");
        let text = error.to_string();
        assert!(
            text.contains(key) && text.contains(&format!("\"{value}\"")),
            "{text}"
        );
        text
    }

    #[test]
    fn the_url_alone_gives_the_defaults() {
        let config = read(&[URL]).unwrap();
        assert_eq!(
            config.url,
            VolumeUrl::S3 {
                bucket: "bucket".into(),
                prefix: "vol".into()
            }
        );
        assert_eq!(config.store, StoreOptions::default());
        assert_eq!(config.volume, VolumeOptions::default());
        assert_eq!(config.thread_model, ThreadModelOption::Auto);
        assert!(config.runtime_threads >= 2);
        assert!(config.warnings.is_empty());
    }

    #[test]
    fn the_defaults_written_in_the_table_are_the_defaults() {
        for spec in OPTIONS.iter().filter(|spec| spec.default_is_value) {
            let given = read(&[URL, (spec.key, spec.default)]).unwrap();
            assert_eq!(given, read(&[URL]).unwrap(), "{}", spec.key);
        }
    }

    #[test]
    fn every_key_takes_effect_in_every_spelling() {
        for (hyphens, threads) in [(false, 3), (true, 5)] {
            let spell = |key: &str| {
                if hyphens {
                    key.replace('_', "-")
                } else {
                    key.to_string()
                }
            };
            let threads_text = threads.to_string();
            let pairs = [
                ("backend_uri", "file:///srv/vol"),
                ("node_cache_config", "LocalDisk,/var/cache/a,b,64M,ReuseCache"),
                ("write_buffer", "64M"),
                ("checkpoint_interval", "500ms"),
                ("endpoint_url", "http://127.0.0.1:9000"),
                ("region", "eu-west-1"),
                ("path_style", "yes"),
                ("payload_signing", "never"),
                ("runtime_threads", &threads_text),
                ("io_timeout", "2m"),
                ("thread_model", "serialize_requests"),
            ];
            assert_eq!(pairs.len(), OPTIONS.len(), "a key is not tested");
            let mut options = ServeOptions::default();
            for (key, value) in pairs {
                options.set(&spell(key), value).unwrap();
            }
            let config = options.finish().unwrap();
            let expected = ServeConfig {
                url: VolumeUrl::File {
                    path: "/srv/vol".into(),
                },
                store: StoreOptions {
                    endpoint_url: Some("http://127.0.0.1:9000".into()),
                    region: Some("eu-west-1".into()),
                    path_style: Some(true),
                    payload_signing: PayloadSigning::Never,
                },
                volume: VolumeOptions {
                    write_buffer_bytes: 64 * MIB,
                    checkpoint_interval: Duration::from_millis(500),
                    io_timeout: Duration::from_secs(120),
                    node_cache: Some(NodeCacheConfig {
                        path: "/var/cache/a,b".into(),
                        size_bytes: 64 * MIB,
                        strategy: NodeCacheStrategy::ReuseCache,
                    }),
                    read_only: false,
                },
                runtime_threads: threads,
                thread_model: ThreadModelOption::SerializeRequests,
                warnings: vec![],
            };
            assert_eq!(config, expected);
        }
    }

    #[test]
    fn unknown_keys_are_refused_with_the_nearest() {
        for (key, suggestion) in [
            ("backend-ulr", Some("backend_url")),
            ("write_bufer", Some("write_buffer")),
            ("endpoint", Some("endpoint_url")),
            ("Region", Some("region")),
            ("zzz", None),
        ] {
            let error = read(&[URL, (key, "1")]).unwrap_err();
            assert_eq!(
                error,
                OptionError::Unknown {
                    key: key.into(),
                    suggestion
                }
            );
            let text = error.to_string();
            assert!(
                text.contains(&format!("\"{key}\"")) && text.contains("checkpoint_interval"),
                "{text}"
            );
            assert_eq!(text.contains("did you mean"), suggestion.is_some(), "{text}");
        }
    }

    #[test]
    fn repeated_keys_are_refused_under_every_name() {
        for second in ["backend_url", "backend-url", "backend_uri", "backend-uri"] {
            let error = read(&[URL, (second, "s3://bucket/other/")]).unwrap_err();
            assert_eq!(
                error,
                OptionError::Repeated {
                    key: "backend_url",
                    alias: Some("backend_uri")
                }
            );
            assert!(error.to_string().contains("backend_uri"));
        }
        let error = read(&[URL, ("region", "a"), ("region", "a")]).unwrap_err();
        assert_eq!(
            error,
            OptionError::Repeated {
                key: "region",
                alias: None
            }
        );
    }

    #[test]
    fn the_log_is_refused_not_ignored() {
        for key in ["backend_wal_url", "backend_wal_uri", "backend-wal-url"] {
            let error = read(&[URL, (key, "s3://bucket/wal/")]).unwrap_err();
            assert_eq!(error, OptionError::NoLog { key: key.into() });
            assert!(error.to_string().contains("remove the parameter"), "{error}");
        }
    }

    #[test]
    fn a_volume_must_be_named() {
        assert_eq!(read(&[("region", "x")]), Err(OptionError::MissingUrl));
    }

    #[test]
    fn bad_values_say_what_to_write() {
        for (key, value, part) in [
            ("backend_url", "ftp://x/y", "s3://"),
            ("write_buffer", "15M", "16M"),
            ("write_buffer", "1E", "1T"),
            ("write_buffer", "lots", "as in 64K"),
            ("checkpoint_interval", "0", "100ms"),
            ("checkpoint_interval", "2000h", "24h"),
            ("io_timeout", "10ms", "1s"),
            ("endpoint_url", "127.0.0.1:9000", "http://"),
            ("endpoint_url", "http://", "http://"),
            ("region", "", "eu-west-1"),
            ("region", "a b", "eu-west-1"),
            ("path_style", "maybe", "auto, yes or no"),
            ("payload_signing", "sometimes", "auto, always or never"),
            ("runtime_threads", "0", "1 to 256"),
            ("runtime_threads", "many", "1 to 256"),
            ("thread_model", "fast", "serialize_requests"),
            (
                "node_cache_config",
                "LocalDisk,/tmp/x,64M",
                "TYPE,PATH,SIZE,STRATEGY",
            ),
        ] {
            if key == "backend_url" {
                let text = read(&[(key, value)]).unwrap_err().to_string();
                assert!(text.contains(part) && text.contains(key), "{text}");
                continue;
            }
            let text = bad_value(key, value);
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn the_seeds_node_cache_example_works_with_one_warning() {
        let config = read(&[
            URL,
            ("node_cache_config", "LocalDisk,/tmp/hypernbd/,16777216,Recreate"),
        ])
        .unwrap();
        let cache = config.volume.node_cache.unwrap();
        assert_eq!(cache.size_bytes, NODE_CACHE_LEAST_BYTES);
        assert_eq!(config.warnings.len(), 1);
        assert!(config.warnings[0].contains("16777216") && config.warnings[0].contains("32 MiB"));
    }

    #[test]
    fn the_documentation_lists_these_keys_and_defaults() {
        let documented: Vec<(&str, &str)> = include_str!("../../../docs/parameters.md")
            .lines()
            .filter_map(|line| line.strip_prefix("| `"))
            .map(|row| {
                let mut cells = row.split('|').map(|cell| cell.trim().trim_matches('`'));
                (cells.next().unwrap(), cells.next().unwrap())
            })
            .collect();
        let known: Vec<(&str, &str)> = OPTIONS.iter().map(|spec| (spec.key, spec.default)).collect();
        assert_eq!(documented, known);
    }

    #[test]
    fn the_man_page_lists_these_keys() {
        let documented: Vec<&str> = include_str!("../../../docs/man/nbdkit-hypernbd-plugin.1")
            .lines()
            .filter_map(|line| line.strip_prefix("\\fB")?.split_once('='))
            .map(|(key, _)| key)
            .filter(|key| !key.contains('\\'))
            .collect();
        assert_eq!(
            documented,
            OPTIONS.iter().map(|spec| spec.key).collect::<Vec<_>>()
        );
    }

    #[test]
    fn the_help_has_one_line_a_key() {
        let help = config_help();
        assert_eq!(help.lines().count(), OPTIONS.len());
        for (line, spec) in help.lines().zip(OPTIONS) {
            assert!(line.contains(spec.key) && line.contains(spec.help), "{line}");
        }
    }
}
