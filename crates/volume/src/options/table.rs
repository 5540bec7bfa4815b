//! The one list of parameters: names, defaults, help, and how a value is read.

use std::time::Duration;

use super::{
    CACHE_DISK_LEAST_BYTES, CACHE_MEMORY_LEAST_BYTES, Compaction, INDEX_MEMORY_LEAST_BYTES, LogFormat,
    NodeCacheConfig, PayloadSigning, SCRUB_INTERVAL_MOST, ServeOptions, ServerSideEncryption,
    ThreadModelOption, WRITE_BUFFER_LEAST_BYTES, WRITE_BUFFER_MOST_BYTES,
};
use crate::base::units::{format_duration, format_size, parse_duration, parse_size};
use crate::base::url::{UrlError, VolumeUrl};
use crate::index::cache_config::absolute;
use crate::metrics::address::{ControlSocket, ListenAddress};
use crate::store::options::{check_endpoint, check_region};

/// Which part of the program a parameter is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionGroup {
    /// Names the volume.
    Volume,
    /// How the store is reached: these are also global flags of the command line.
    Store,
    /// How the volume is served.
    Serve,
}

/// One parameter.
pub struct OptionSpec {
    /// First name, with underscores.
    pub key: &'static str,
    /// Other name, if there is one.
    pub alias: Option<&'static str>,
    /// What to write for the value, in capitals.
    pub value_name: &'static str,
    /// The default, in words or as a value.
    pub default: &'static str,
    /// Whether [`OptionSpec::default`] can be given as the value.
    pub default_is_value: bool,
    /// Help of one line, without a full stop.
    pub help: &'static str,
    /// Which part it is for.
    pub group: OptionGroup,
    /// Reads the value; the error says what is wrong and what to write.
    pub(super) apply: fn(&mut ServeOptions, &str) -> Result<(), String>,
}

/// Every parameter of the plugin, in the order of the documentation.
pub const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        key: "backend_url",
        alias: Some("backend_uri"),
        value_name: "URL",
        default: "required",
        default_is_value: false,
        help: "volume to serve: s3://BUCKET/PREFIX/ or file:///PATH/",
        group: OptionGroup::Volume,
        apply: |options, value| {
            options.url = Some(VolumeUrl::parse(value).map_err(|error| error.reason)?);
            Ok(())
        },
    },
    OptionSpec {
        key: "volumes",
        alias: None,
        value_name: "URL",
        default: "one volume",
        default_is_value: false,
        help: "instead of backend_url: every volume directly below this URL, each an export by its name",
        group: OptionGroup::Volume,
        apply: |options, value| {
            options.volumes = Some(VolumeUrl::parse(value).map_err(|error| error.reason)?);
            Ok(())
        },
    },
    OptionSpec {
        key: "volumes_open",
        alias: None,
        value_name: "N",
        default: "16",
        default_is_value: false,
        help: "with volumes: how many may be open at once, which share the server's memory; 1 to 1000",
        group: OptionGroup::Serve,
        apply: |options, value| {
            let open = value.parse().ok().filter(|open| (1..=1000).contains(open));
            options.volumes_open = Some(open.ok_or("write 1 to 1000")?);
            Ok(())
        },
    },
    OptionSpec {
        key: "endpoint_url",
        alias: None,
        value_name: "URL",
        default: "from the AWS configuration",
        default_is_value: false,
        help: "address of an S3 service other than AWS, as in http://127.0.0.1:9000",
        group: OptionGroup::Store,
        apply: |options, value| {
            options.store.endpoint_url = Some(check_endpoint(value)?);
            Ok(())
        },
    },
    OptionSpec {
        key: "region",
        alias: None,
        value_name: "REGION",
        default: "from the AWS configuration",
        default_is_value: false,
        help: "region of the bucket, as in eu-west-1",
        group: OptionGroup::Store,
        apply: |options, value| {
            options.store.region = Some(check_region(value)?);
            Ok(())
        },
    },
    OptionSpec {
        key: "path_style",
        alias: None,
        value_name: "auto|yes|no",
        default: "auto",
        default_is_value: true,
        help: "put the bucket in the path of requests, not in the host name; auto is yes with endpoint_url",
        group: OptionGroup::Store,
        apply: |options, value| {
            options.store.path_style = match value {
                "auto" => None,
                _ => Some(yes_or_no(value).map_err(|_| "write auto, yes or no")?),
            };
            Ok(())
        },
    },
    OptionSpec {
        key: "payload_signing",
        alias: None,
        value_name: "auto|always|never",
        default: "auto",
        default_is_value: true,
        help: "sign the bodies of uploads; auto does over plain http only, TLS protects them itself",
        group: OptionGroup::Store,
        apply: |options, value| {
            options.store.payload_signing = match value {
                "auto" => PayloadSigning::Auto,
                "always" => PayloadSigning::Always,
                "never" => PayloadSigning::Never,
                _ => return Err("write auto, always or never".to_string()),
            };
            Ok(())
        },
    },
    OptionSpec {
        key: "sse",
        alias: None,
        value_name: "AES256|aws:kms",
        default: "as the bucket says",
        default_is_value: false,
        help: "encryption by the store, asked for with every upload",
        group: OptionGroup::Store,
        apply: |options, value| {
            options.store.sse = match value {
                "AES256" => Some(ServerSideEncryption::Aes256),
                "aws:kms" => Some(ServerSideEncryption::Kms),
                _ => return Err("write AES256 or aws:kms".to_string()),
            };
            Ok(())
        },
    },
    OptionSpec {
        key: "sse_kms_key_id",
        alias: None,
        value_name: "KEY",
        default: "the account's key",
        default_is_value: false,
        help: "key for sse=aws:kms: its id, ARN or alias",
        group: OptionGroup::Store,
        apply: |options, value| {
            if value.is_empty() || !value.chars().all(|c| c.is_ascii_graphic()) {
                return Err("write the id, ARN or alias of a key, for sse=aws:kms".to_string());
            }
            options.store.sse_kms_key_id = Some(value.to_string());
            Ok(())
        },
    },
    OptionSpec {
        key: "allow_unsafe_store",
        alias: None,
        value_name: "yes|no",
        default: "no",
        default_is_value: true,
        help: "use a store that fails the probe of what keeps a volume safe",
        group: OptionGroup::Store,
        apply: |options, value| {
            options.store.allow_unsafe = yes_or_no(value)?;
            Ok(())
        },
    },
    OptionSpec {
        key: "backend_wal_url",
        alias: Some("backend_wal_uri"),
        value_name: "off|auto|URL",
        default: "off",
        default_is_value: true,
        help: "write-ahead log: auto, beside a volume on S3; s3://BUCKET/PREFIX/; file:///PATH/, a journal on this machine",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.wal = match value {
                "off" => None,
                place => Some(place.parse().map_err(|error: UrlError| error.reason)?),
            };
            Ok(())
        },
    },
    OptionSpec {
        key: "adopt",
        alias: None,
        value_name: "yes|no",
        default: "no",
        default_is_value: true,
        help: "yes says that a volume found in another place than it was made in was moved, and is no copy",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.adopt = yes_or_no(value)?;
            Ok(())
        },
    },
    OptionSpec {
        key: "discard_wal",
        alias: None,
        value_name: "yes|no",
        default: "no",
        default_is_value: true,
        help: "yes gives up a log that cannot be used, with the writes flushed to it since the last checkpoint",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.discard_wal = yes_or_no(value)?;
            Ok(())
        },
    },
    OptionSpec {
        key: "write_buffer",
        alias: None,
        value_name: "SIZE",
        default: "512M",
        default_is_value: true,
        help: "memory for writes that are not yet published; at least 16M",
        group: OptionGroup::Serve,
        apply: |options, value| {
            let bytes = parse_size(value).map_err(|error| error.to_string())?;
            if bytes < WRITE_BUFFER_LEAST_BYTES {
                return Err("too small; write 16M or more".to_string());
            }
            if bytes > WRITE_BUFFER_MOST_BYTES {
                return Err("more than any machine's memory; write 1T or less".to_string());
            }
            options.volume.write_buffer_bytes = bytes;
            Ok(())
        },
    },
    OptionSpec {
        key: "write_buffer_dir",
        alias: None,
        value_name: "DIR",
        default: "memory alone",
        default_is_value: false,
        help: "local directory, best on tmpfs, in which answered writes survive a server that is killed",
        group: OptionGroup::Serve,
        apply: |options, value| {
            let dir = absolute(value).ok_or("not a usable path; write the absolute path of a directory")?;
            options.volume.write_buffer_dir = Some(dir);
            Ok(())
        },
    },
    OptionSpec {
        key: "checkpoint_interval",
        alias: None,
        value_name: "TIME",
        default: "5s",
        default_is_value: true,
        help: "longest time from a write to the start of its checkpoint, 30s by default with a log; 100ms to 24h",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.checkpoint_interval = Some(parse_checkpoint_interval(value)?);
            Ok(())
        },
    },
    OptionSpec {
        key: "io_timeout",
        alias: None,
        value_name: "TIME",
        default: "1m",
        default_is_value: true,
        help: "how long a request may wait for a store that gets nothing done before it fails; 1s to 24h",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.io_timeout = duration_within(value, Duration::from_secs(1))?;
            Ok(())
        },
    },
    OptionSpec {
        key: "retention_interval",
        alias: None,
        value_name: "TIME",
        default: "5m",
        default_is_value: true,
        help: "how often checkpoints that the volume's retention does not keep are removed; off, or 1s to 24h",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.retention_interval = match value {
                "off" => None,
                value => Some(duration_within(value, Duration::from_secs(1))?),
            };
            Ok(())
        },
    },
    OptionSpec {
        key: "retention_grace",
        alias: None,
        value_name: "TIME",
        default: "10m",
        default_is_value: true,
        help: "how long something must not have been needed before it is removed; 1s to 24h",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.retention_grace = duration_within(value, Duration::from_secs(1))?;
            Ok(())
        },
    },
    OptionSpec {
        key: "compaction",
        alias: None,
        value_name: "auto|off",
        default: "off",
        default_is_value: true,
        help: "copy what is live out of objects that are mostly dead, so that they can be removed, when that is worth it",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.compaction = match value {
                "auto" => Compaction::Auto,
                "off" => Compaction::Off,
                _ => return Err("write auto or off".into()),
            };
            Ok(())
        },
    },
    OptionSpec {
        key: "compaction_rate",
        alias: None,
        value_name: "SIZE",
        default: "0",
        default_is_value: true,
        help: "bytes a second that compaction copies at most; 0 is without a bound",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.compaction_rate = parse_size(value).map_err(|error| error.to_string())?;
            Ok(())
        },
    },
    OptionSpec {
        key: "scrub_interval",
        alias: None,
        value_name: "TIME",
        default: "off",
        default_is_value: true,
        help: "how often all that the volume needs is read and compared with its check values; off, or 1s to 3650d",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.scrub_interval = match value {
                "off" => None,
                value => Some(duration_between(
                    value,
                    Duration::from_secs(1),
                    SCRUB_INTERVAL_MOST,
                )?),
            };
            Ok(())
        },
    },
    OptionSpec {
        key: "cache_memory",
        alias: None,
        value_name: "SIZE",
        default: "256M",
        default_is_value: true,
        help: "memory for data read from the store; 0 for none, else at least 16M",
        group: OptionGroup::Serve,
        apply: |options, value| {
            let bytes = parse_size(value).map_err(|error| error.to_string())?;
            if bytes != 0 && bytes < CACHE_MEMORY_LEAST_BYTES {
                return Err("too small; write 0 or 16M or more".to_string());
            }
            if bytes > WRITE_BUFFER_MOST_BYTES {
                return Err("more than any machine's memory; write 1T or less".to_string());
            }
            options.volume.read_cache.memory_bytes = bytes;
            Ok(())
        },
    },
    OptionSpec {
        key: "index_memory",
        alias: None,
        value_name: "SIZE",
        default: "64M",
        default_is_value: true,
        help: "memory for the index of what is stored, which is fetched after the start; at least 1M",
        group: OptionGroup::Serve,
        apply: |options, value| {
            let bytes = parse_size(value).map_err(|error| error.to_string())?;
            if bytes < INDEX_MEMORY_LEAST_BYTES {
                return Err("too small; write 1M or more".to_string());
            }
            if bytes > WRITE_BUFFER_MOST_BYTES {
                return Err("more than any machine's memory; write 1T or less".to_string());
            }
            options.volume.index_memory_bytes = bytes;
            Ok(())
        },
    },
    OptionSpec {
        key: "cache_dir",
        alias: None,
        value_name: "DIR",
        default: "no disk",
        default_is_value: false,
        help: "local directory for data read from the store and the index, kept over restarts",
        group: OptionGroup::Serve,
        apply: |options, value| {
            let dir = absolute(value).ok_or("not a usable path; write the absolute path of a directory")?;
            options.cache_dir = Some(dir);
            Ok(())
        },
    },
    OptionSpec {
        key: "cache_disk",
        alias: None,
        value_name: "SIZE",
        default: "10G",
        default_is_value: false,
        help: "room in cache_dir; at least 64M",
        group: OptionGroup::Serve,
        apply: |options, value| {
            let bytes = parse_size(value).map_err(|error| error.to_string())?;
            if bytes < CACHE_DISK_LEAST_BYTES {
                return Err("too small; write 64M or more".to_string());
            }
            options.cache_disk_bytes = Some(bytes);
            Ok(())
        },
    },
    OptionSpec {
        key: "lease_duration",
        alias: None,
        value_name: "TIME",
        default: "30s",
        default_is_value: true,
        help: "how long another server watches this one's lease before it takes it for dead; 2s to 24h",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.lease.duration = duration_within(value, Duration::from_secs(2))?;
            Ok(())
        },
    },
    OptionSpec {
        key: "lease_linger",
        alias: None,
        value_name: "TIME",
        default: "30s",
        default_is_value: true,
        help: "how long the volume stays open after its last client; off keeps it to the end, or 1s to 24h",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.lease_linger = match value {
                "off" => None,
                value => Some(duration_within(value, Duration::from_secs(1))?),
            };
            Ok(())
        },
    },
    OptionSpec {
        key: "takeover",
        alias: None,
        value_name: "yes|no",
        default: "no",
        default_is_value: true,
        help: "take the volume from the server that holds it, which can then write no more",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.volume.lease.takeover = yes_or_no(value)?;
            Ok(())
        },
    },
    OptionSpec {
        key: "node_cache_config",
        alias: None,
        value_name: "TYPE,PATH,SIZE,STRATEGY",
        default: "in cache_dir",
        default_is_value: false,
        help: "another place for the index than cache_dir, as in LocalDisk,/var/cache/hypernbd,1G,ReuseCache",
        group: OptionGroup::Serve,
        apply: |options, value| {
            let (config, raised_from) = NodeCacheConfig::parse(value).map_err(|error| error.to_string())?;
            if let (Some(config), Some(asked_bytes)) = (&config, raised_from) {
                options.warnings.push(format!(
                    "node_cache_config: a size of {asked_bytes} bytes is below the least and was raised to {} ({})",
                    config.size_bytes,
                    format_size(config.size_bytes)
                ));
            }
            options.volume.node_cache = config;
            Ok(())
        },
    },
    OptionSpec {
        key: "metrics",
        alias: None,
        value_name: "ADDRESS",
        default: "off",
        default_is_value: true,
        help: "where the server tells of itself over HTTP, without authentication: off, 127.0.0.1:9100 or unix:/PATH",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.metrics = match value {
                "off" => None,
                value => Some(ListenAddress::parse(value)?),
            };
            Ok(())
        },
    },
    OptionSpec {
        key: "control",
        alias: None,
        value_name: "auto|off|unix:/PATH",
        default: "auto",
        default_is_value: true,
        help: "socket on which this user and root tell the server what to do; auto is in the runtime directory",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.control = ControlSocket::parse(value)?;
            Ok(())
        },
    },
    OptionSpec {
        key: "log_format",
        alias: None,
        value_name: "text|json",
        default: "text",
        default_is_value: true,
        help: "how lines of the log look; json is one object a line",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.log_format = match value {
                "text" => LogFormat::Text,
                "json" => LogFormat::Json,
                _ => return Err("write text or json".to_string()),
            };
            Ok(())
        },
    },
    OptionSpec {
        key: "runtime_threads",
        alias: None,
        value_name: "N",
        default: "one a processor",
        default_is_value: false,
        help: "threads for requests to the store; at least two by default",
        group: OptionGroup::Serve,
        apply: |options, value| {
            let threads = value.parse().ok().filter(|n| (1..=256).contains(n));
            options.runtime_threads = Some(threads.ok_or("write a number, 1 to 256")?);
            Ok(())
        },
    },
    OptionSpec {
        key: "thread_model",
        alias: None,
        value_name: "auto|parallel|serialize_requests",
        default: "auto",
        default_is_value: true,
        help: "requests of one connection at once or one by one; auto is parallel on nbdkit 1.34 and newer",
        group: OptionGroup::Serve,
        apply: |options, value| {
            options.thread_model = match value {
                "auto" => ThreadModelOption::Auto,
                "parallel" => ThreadModelOption::Parallel,
                "serialize_requests" => ThreadModelOption::SerializeRequests,
                _ => return Err("write auto, parallel or serialize_requests".to_string()),
            };
            Ok(())
        },
    },
];

/// The parameter with this first or other name, underscores only.
pub fn find_option(name: &str) -> Option<&'static OptionSpec> {
    OPTIONS
        .iter()
        .find(|spec| spec.key == name || spec.alias == Some(name))
}

/// Help for nbdkit's `--help`, one line a parameter.
pub fn config_help() -> String {
    let lines = OPTIONS.iter().map(|spec| {
        let usage = format!("{}={}", spec.key, spec.value_name);
        let default = match spec.group {
            OptionGroup::Volume => "required".to_string(),
            _ => format!("default: {}", spec.default),
        };
        format!("{usage}  {} ({default})", spec.help)
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// All first names, for error texts.
pub(super) fn keys() -> String {
    OPTIONS.iter().map(|spec| spec.key).collect::<Vec<_>>().join(", ")
}

/// The key a misspelt name most likely stands for.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    let name = name.to_ascii_lowercase();
    let names = || {
        OPTIONS
            .iter()
            .flat_map(|spec| std::iter::once(spec.key).chain(spec.alias))
    };
    names()
        .min_by_key(|key| edit_distance(&name, key))
        // A short key is at most as far from anything as it is long.
        .filter(|key| edit_distance(&name, key) <= 3.min(key.len() - 1))
        .or_else(|| names().find(|key| name.len() >= 4 && key.contains(&name)))
}

/// Levenshtein's distance, in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

fn yes_or_no(value: &str) -> Result<bool, String> {
    match value {
        "yes" | "true" | "on" | "1" => Ok(true),
        "no" | "false" | "off" | "0" => Ok(false),
        _ => Err("write yes or no".to_string()),
    }
}

/// A `checkpoint_interval`; the error says what to write.
pub(crate) fn parse_checkpoint_interval(value: &str) -> Result<Duration, String> {
    duration_within(value, Duration::from_millis(100))
}

fn duration_within(value: &str, least: Duration) -> Result<Duration, String> {
    duration_between(value, least, Duration::from_secs(24 * 3600))
}

fn duration_between(value: &str, least: Duration, most: Duration) -> Result<Duration, String> {
    let duration = parse_duration(value).map_err(|error| error.to_string())?;
    if !(least..=most).contains(&duration) {
        return Err(format!(
            "out of range; write {} to {}",
            format_duration(least),
            format_duration(most)
        ));
    }
    Ok(duration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distances() {
        for (a, b, expected) in [
            ("", "", 0),
            ("abc", "", 3),
            ("", "ab", 2),
            ("kitten", "sitting", 3),
            ("ab", "ba", 2),
        ] {
            assert_eq!(edit_distance(a, b), expected, "{a} {b}");
        }
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = OPTIONS
            .iter()
            .flat_map(|s| std::iter::once(s.key).chain(s.alias))
            .collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }
}
