//! Every parameter, read from `key=value`.

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
    let store = StoreOptions {
        answer_time: Some(Duration::from_secs(20)),
        ..StoreOptions::default()
    };
    assert_eq!(config.store, store);
    assert_eq!(config.volume, VolumeOptions::default());
    assert_eq!(config.thread_model, ThreadModelOption::Auto);
    assert_eq!(config.lease_linger, Some(LEASE_LINGER));
    assert!(config.runtime_threads >= 2);
    assert!(config.warnings.is_empty());
}

#[test]
fn the_defaults_written_in_the_table_are_the_defaults() {
    for spec in OPTIONS.iter().filter(|spec| spec.default_is_value) {
        let mut given = read(&[URL, (spec.key, spec.default)]).unwrap();
        let said = given.given.pop();
        assert_eq!(said, Some((spec.key.to_owned(), spec.default.to_owned())));
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
            ("backend_wal_uri", "file:///srv/wal"),
            ("discard_wal", "yes"),
            ("adopt", "yes"),
            ("node_cache_config", "LocalDisk,/var/cache/a,b,64M,ReuseCache"),
            ("write_buffer", "64M"),
            ("checkpoint_interval", "500ms"),
            ("endpoint_url", "http://127.0.0.1:9000"),
            ("region", "eu-west-1"),
            ("path_style", "yes"),
            ("payload_signing", "never"),
            ("sse", "aws:kms"),
            ("sse_kms_key_id", "alias/disks"),
            ("allow_unsafe_store", "yes"),
            ("metrics", "unix:/run/metrics"),
            ("control", "unix:/run/control"),
            ("log_format", "json"),
            ("runtime_threads", &threads_text),
            ("io_timeout", "2m"),
            ("lease_duration", "10s"),
            ("lease_linger", "5m"),
            ("takeover", "yes"),
            ("thread_model", "serialize_requests"),
            ("cache_memory", "32M"),
            ("index_memory", "8M"),
            ("cache_dir", "/var/cache/pages"),
            ("cache_disk", "1G"),
            ("write_buffer_dir", "/run/hypernbd/disk"),
            ("retention_interval", "90s"),
            ("retention_grace", "1h"),
            ("compaction", "auto"),
            ("compaction_rate", "10M"),
            ("scrub_interval", "30d"),
        ];
        // All but those of a server of many volumes.
        assert_eq!(pairs.len() + 2, OPTIONS.len(), "a key is not tested");
        let mut options = ServeOptions::default();
        for (key, value) in pairs {
            options.set(&spell(key), value).unwrap();
        }
        let config = options.finish().unwrap();
        let expected = ServeConfig {
            url: VolumeUrl::File {
                path: "/srv/vol".into(),
            },
            volumes_open: None,
            store: StoreOptions {
                endpoint_url: Some("http://127.0.0.1:9000".into()),
                region: Some("eu-west-1".into()),
                path_style: Some(true),
                payload_signing: PayloadSigning::Never,
                sse: Some(ServerSideEncryption::Kms),
                sse_kms_key_id: Some("alias/disks".into()),
                allow_unsafe: true,
                // A third of io_timeout.
                answer_time: Some(Duration::from_secs(40)),
                ..StoreOptions::default()
            },
            volume: VolumeOptions {
                write_buffer_bytes: 64 * MIB,
                write_buffer_dir: Some("/run/hypernbd/disk".into()),
                checkpoint_interval: Duration::from_millis(500),
                io_timeout: Duration::from_secs(120),
                node_cache: Some(NodeCacheConfig {
                    path: "/var/cache/a,b".into(),
                    size_bytes: 64 * MIB,
                    strategy: NodeCacheStrategy::ReuseCache,
                }),
                wal: Some(WalPlace::At(VolumeUrl::File {
                    path: "/srv/wal".into(),
                })),
                discard_wal: true,
                adopt: true,
                inherited_wal: InheritedWal::Refuse,
                read_cache: ReadCacheConfig {
                    memory_bytes: 32 * MIB,
                    disk: Some(ReadCacheDisk {
                        dir: "/var/cache/pages".into(),
                        size_bytes: 1 << 30,
                    }),
                },
                index_memory_bytes: 8 * MIB,
                read_only: false,
                retention_interval: Some(Duration::from_secs(90)),
                retention_grace: Duration::from_secs(3600),
                compaction: Compaction::Auto,
                compaction_rate: 10 << 20,
                scrub_interval: Some(Duration::from_secs(30 * 24 * 3600)),
                lease: LeaseOptions {
                    duration: Duration::from_secs(10),
                    takeover: true,
                    sighting: None,
                    is_retry: false,
                    is_copied: false,
                    epoch_above: 0,
                    write_buffer_dir: None,
                    token: None,
                    control: None,
                },
            },
            runtime_threads: threads,
            thread_model: ThreadModelOption::SerializeRequests,
            lease_linger: Some(Duration::from_secs(300)),
            metrics: Some(ListenAddress::Unix("/run/metrics".into())),
            control: ControlSocket::At("/run/control".into()),
            log_format: LogFormat::Json,
            given: config.given.clone(),
            warnings: vec![],
        };
        assert_eq!(config, expected);
    }
}

#[test]
fn a_directory_of_the_servers_own_is_in_no_volume_and_no_journal() {
    for (dir, other) in [
        ("/srv/vol", Some("backend_url")),
        ("/srv/vol/buffer", Some("backend_url")),
        ("/srv/wal", Some("backend_wal_url")),
        ("/srv/volume-buffer", None),
    ] {
        let nodes = format!("LocalDisk,{dir},64M,ReuseCache");
        for (key, value) in [
            ("write_buffer_dir", dir),
            ("cache_dir", dir),
            ("node_cache_config", &nodes),
        ] {
            let read = read(&[
                ("backend_url", "file:///srv/vol/"),
                ("backend_wal_url", "file:///srv/wal/"),
                (key, value),
            ]);
            match (read, other) {
                (Ok(_), None) => {}
                (Err(error), Some(other)) => {
                    let text = error.to_string();
                    assert!(
                        text.starts_with(&format!("{key}: ")) && text.contains(other),
                        "{text}"
                    );
                }
                unexpected => panic!("{key} {dir}: {unexpected:?}"),
            }
        }
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
fn a_log_makes_checkpoints_rarer() {
    let seeds = [
        ("backend_uri", "s3://mybucket/root/of/backend/"),
        ("backend_wal_uri", "s3://mybucket/wal"),
    ];
    let config = read(&seeds).unwrap();
    assert_eq!(config.volume.wal, Some("s3://mybucket/wal/".parse().unwrap()));
    assert_eq!(config.volume.checkpoint_interval, CHECKPOINT_INTERVAL_WITH_LOG);
    let given = [seeds[0], ("checkpoint_interval", "7s"), seeds[1]];
    let config = read(&given).unwrap();
    assert_eq!(config.volume.checkpoint_interval, Duration::from_secs(7));
}

#[test]
fn a_log_beside_the_volume_is_for_volumes_on_s3() {
    let config = read(&[("backend_url", "s3://bucket/vol/"), ("backend_wal_url", "auto")]).unwrap();
    assert_eq!(config.volume.wal, Some(WalPlace::Beside));
    assert_eq!(config.volume.checkpoint_interval, CHECKPOINT_INTERVAL_WITH_LOG);
    assert!(config.warnings.is_empty());

    let config = read(&[("backend_url", "file:///vol/"), ("backend_wal_url", "auto")]).unwrap();
    assert_eq!(config.volume.wal, None);
    assert_eq!(config.volume.checkpoint_interval, CHECKPOINT_INTERVAL);
    assert_eq!(config.warnings.len(), 1);
    assert!(
        config.warnings[0].contains("file:///PATH/"),
        "{}",
        config.warnings[0]
    );

    let config = read(&[("backend_url", "s3://bucket/vol/"), ("backend_wal_url", "off")]).unwrap();
    assert_eq!(
        config.volume,
        read(&[("backend_url", "s3://bucket/vol/")]).unwrap().volume
    );
}

#[test]
fn a_log_within_the_volume_is_refused() {
    for wal in ["s3://bucket/vol", "s3://bucket/vol/wal/"] {
        let error = read(&[URL, ("backend_wal_url", wal)]).unwrap_err();
        assert!(matches!(error, OptionError::WalInVolume { .. }), "{error}");
        assert!(error.to_string().contains("a prefix of its own"), "{error}");
    }
    for wal in ["s3://bucket/vol2/", "s3://other/vol/", "file:///vol/"] {
        assert!(read(&[URL, ("backend_wal_url", wal)]).is_ok(), "{wal}");
    }
}

#[test]
fn a_volume_may_be_kept_to_the_end() {
    assert_eq!(read(&[URL, ("lease_linger", "off")]).unwrap().lease_linger, None);
}

const VOLUMES: (&str, &str) = ("volumes", "s3://bucket/all/");

#[test]
fn many_volumes_share_the_memory_and_have_places_of_their_own() {
    let config = read(&[
        VOLUMES,
        ("volumes_open", "4"),
        ("write_buffer", "64M"),
        ("cache_memory", "64M"),
        ("index_memory", "4M"),
        ("write_buffer_dir", "/run/buffers"),
        ("backend_wal_url", "file:///srv/logs/"),
    ])
    .unwrap();
    assert_eq!(config.volumes_open, Some(4));
    let disk = config.of_volume(&"disk".parse().unwrap()).unwrap();
    assert_eq!(
        (disk.url.to_string().as_str(), disk.volumes_open),
        ("s3://bucket/all/disk/", None)
    );
    let volume = &disk.volume;
    assert_eq!(
        (
            volume.write_buffer_bytes,
            volume.read_cache.memory_bytes,
            volume.index_memory_bytes
        ),
        (16 * MIB, 16 * MIB, MIB)
    );
    assert_eq!(volume.write_buffer_dir, Some("/run/buffers/disk".into()));
    let wal = volume.wal.as_ref().and_then(WalPlace::url).unwrap();
    assert_eq!(wal.to_string(), "file:///srv/logs/disk/");
    // The usual memory is enough for the usual number.
    assert_eq!(read(&[VOLUMES]).unwrap().volumes_open, Some(VOLUMES_OPEN));
}

#[test]
fn too_little_memory_for_many_volumes_is_refused() {
    for (key, value) in [
        ("write_buffer", "63M"),
        ("cache_memory", "63M"),
        ("index_memory", "3M"),
    ] {
        let error = read(&[VOLUMES, ("volumes_open", "4"), (key, value)]).unwrap_err();
        assert!(
            matches!(error, OptionError::Share { key: found, .. } if found == key),
            "{error}"
        );
        assert!(error.to_string().contains("lower volumes_open"), "{error}");
    }
    assert!(read(&[VOLUMES, ("volumes_open", "4"), ("cache_memory", "0")]).is_ok());
}

#[test]
fn one_volume_and_many_are_not_given_together() {
    assert_eq!(read(&[URL, VOLUMES]), Err(OptionError::OneAndMany));
    for key in ["takeover", "discard_wal", "adopt"] {
        let error = read(&[VOLUMES, (key, "yes")]).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("one volume"), "{error}");
    }
    let within = [
        ("volumes", "file:///srv/all/"),
        ("write_buffer_dir", "/srv/all/own"),
    ];
    let within = read(&within).unwrap_err().to_string();
    assert!(within.contains("the directory of volumes,"), "{within}");
    let alone = read(&[URL, ("volumes_open", "4")]).unwrap_err();
    assert!(alone.to_string().contains("volumes=URL"), "{alone}");
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
        ("retention_interval", "0", "1s"),
        ("retention_grace", "0", "1s"),
        ("compaction", "yes", "auto or off"),
        ("compaction_rate", "fast", "as in 64K"),
        ("scrub_interval", "never", "as in 500ms"),
        ("scrub_interval", "999ms", "1s to 3650d"),
        ("scrub_interval", "3651d", "1s to 3650d"),
        ("endpoint_url", "127.0.0.1:9000", "http://"),
        ("endpoint_url", "http://", "http://"),
        ("region", "", "eu-west-1"),
        ("region", "a b", "eu-west-1"),
        ("path_style", "maybe", "auto, yes or no"),
        ("payload_signing", "sometimes", "auto, always or never"),
        ("lease_duration", "1s", "2s"),
        ("lease_linger", "0", "1s"),
        ("volumes", "s3://bucket", "s3://bucket/"),
        ("volumes_open", "0", "1 to 1000"),
        ("takeover", "maybe", "yes or no"),
        ("allow_unsafe_store", "maybe", "yes or no"),
        ("sse", "yes", "AES256 or aws:kms"),
        ("sse_kms_key_id", "", "aws:kms"),
        ("sse_kms_key_id", "alias/a", "sse=aws:kms"),
        ("runtime_threads", "0", "1 to 256"),
        ("runtime_threads", "many", "1 to 256"),
        ("thread_model", "fast", "serialize_requests"),
        ("backend_wal_url", "http://x/y", "s3://"),
        ("discard_wal", "maybe", "yes or no"),
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
fn the_index_is_in_the_cache_directory_unless_it_has_another_place() {
    let of = |nodes: Option<&str>| {
        let given = nodes.map(|nodes| ("node_cache_config", nodes));
        let pairs: Vec<_> = [URL, ("cache_dir", "/c")].into_iter().chain(given).collect();
        let volume = read(&pairs).unwrap().volume;
        let disk = volume.read_cache.disk.unwrap();
        (
            volume.node_cache.map(|nodes| (nodes.path, nodes.size_bytes)),
            disk.size_bytes,
        )
    };
    let (gib, part) = (1 << 30, 640 * MIB);
    assert_eq!(of(None), (Some(("/c".into(), part)), 10 * gib - part));
    let elsewhere = of(Some("LocalDisk,/n,1G,ReuseCache"));
    assert_eq!(elsewhere, (Some(("/n".into(), gib)), 10 * gib));
    assert_eq!(of(Some("LocalDisk,/n,1G,Disabled")), (None, 10 * gib));
    assert_eq!(read(&[URL]).unwrap().volume.node_cache, None);
}

#[test]
fn the_documentation_lists_these_keys_and_defaults() {
    let documented: Vec<(&str, &str)> = include_str!("../../../../docs/parameters.md")
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
    let documented: Vec<&str> = include_str!("../../../../docs/man/nbdkit-hypernbd-plugin.1")
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
