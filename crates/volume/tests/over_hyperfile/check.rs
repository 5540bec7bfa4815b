//! What a check says of damage in every kind of object, and of a volume that is whole.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use hypernbd_volume::admin::retention::{prune, set_policy};
use hypernbd_volume::base::checksum::crc32c;
use hypernbd_volume::check::{self as checks, Kind, Report, Request};
use hypernbd_volume::options::{LeaseOptions, VolumeOptions};
use hypernbd_volume::past::{self, At, Past};
use hypernbd_volume::retention::Policy;
use hypernbd_volume::store::Store;
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::transfer::Control;
use hypernbd_volume::{ErrorKind, Volume, VolumeError, VolumeUrl};

use crate::faults::LIMIT;
use crate::fixture::{Fixture, pattern};

const BLOCK: usize = 4096;
/// Not whole blocks: the last one is stored in part.
const SIZE: usize = (6 << 20) + 1024;
/// Checkpoints made; the newest sixteen are kept whatever the policy says.
const LIVES: u64 = 20;
/// Bytes flipped in each object, and in what the directory keeps behind it.
const FLIPS: usize = 4;

pub fn check(f: &Fixture, request: &Request) -> Report {
    try_check(f, &f.url, request).unwrap()
}

fn try_check(f: &Fixture, url: &VolumeUrl, request: &Request) -> Result<Report, VolumeError> {
    let control = Control::default();
    f.run(checks::check(url, &f.store_options, request, &control))
}

fn whole(f: &Fixture) -> Report {
    check(f, &Request::with_data())
}

/// A volume with at least one object of every kind, and what its checkpoints read as, by number.
pub struct Rich {
    pub f: Fixture,
    pub store: Store,
    pub kept: BTreeMap<u64, Vec<u8>>,
}

impl Rich {
    fn new() -> Self {
        Self::of(SIZE, 5 << 20, 40_000)
    }

    /// Of a size in bytes, of which the first write fills so much, and those after the second so much at most.
    pub fn of(size: usize, first: usize, most: usize) -> Self {
        let f = Fixture::new();
        f.create(size as u64, BLOCK as u32);
        let mut model = vec![0; size];
        let mut states = BTreeMap::new();
        let volume = f.open_unaged();
        let mut rng = fastrand::Rng::with_seed(7);
        for step in 0..LIVES {
            // One is uploaded in parts, two leave nothing but an index behind.
            let (at, len) = match step {
                0 => (0, first),
                1 => (first + 77, size - first - 77),
                _ => (rng.usize(0..size - most), rng.usize(1..most)),
            };
            let bytes = pattern(step + 1, len);
            volume.write(at as u64, &bytes, false).unwrap();
            model[at..at + len].copy_from_slice(&bytes);
            if step % 5 == 4 {
                volume.zero(at as u64, 8192, false).unwrap();
                let end = size.min(at + 8192);
                model[at..end].fill(0);
            }
            volume.flush().unwrap();
            states.insert(step + 1, model.clone());
        }
        volume.close(LIMIT).unwrap();
        let name: past::SnapshotName = "third".parse().unwrap();
        f.run(past::create(
            &f.url,
            &f.store_options,
            &name,
            Some(&At::Number(3)),
        ))
        .unwrap();
        let policy = Policy {
            keep_last: 1,
            ..Policy::default()
        };
        f.run(set_policy(&f.url, &f.store_options, Some(&policy)))
            .unwrap();
        let removed = f.run(prune(&f.url, &f.store_options, &LeaseOptions::default()));
        assert!(removed.unwrap().checkpoints > 0);
        let store = f.store().unwrap();
        // As these have them that are killed or still at work.
        for (name, body) in [
            (
                "import",
                r#"{"source":null,"written_bytes":4,"epoch":5,"is_new":true}"#.to_owned(),
            ),
            (
                "wal",
                format!(
                    r#"{{"url":"s3://b/log/","volume_id":"{}","host":"h","epoch":1,"opened_ms":1,"watermark":9,"is_clean":true}}"#,
                    f.lease().unwrap().volume_id
                ),
            ),
            (
                "scrub",
                format!(
                    r#"{{"version":1,"volume_id":"{}","damage":[],"more":0}}"#,
                    f.lease().unwrap().volume_id
                ),
            ),
            (
                "retention/pins/0123456789abcdef",
                r#"{"checkpoint":{"cno":20,"check":"00000000000000ff"},"reader":"r","ttl_ms":1000}"#
                    .to_owned(),
            ),
        ] {
            f.run(store.put(&store.meta_key(name), body)).unwrap();
        }
        let listed = f.run(past::list(&f.url, &f.store_options, 0, u64::MAX)).unwrap();
        let kept: BTreeMap<u64, Vec<u8>> = listed
            .iter()
            .map(|one| (one.cno, states[&one.cno].clone()))
            .collect();
        assert!(
            kept.contains_key(&3) && kept.len() < LIVES as usize,
            "{:?}",
            kept.keys()
        );
        Self { f, store, kept }
    }

    /// By its number, or by its name where it has one.
    fn is_read(&self, cno: u64, expected: &[u8]) -> bool {
        let is = |at: At| self.read(Some(at)).is_ok_and(|read| read == *expected);
        is(At::Number(cno)) || cno == 3 && is("@third".parse().unwrap())
    }

    pub fn read(&self, at: Option<At>) -> Result<Vec<u8>, VolumeError> {
        let options = VolumeOptions {
            read_only: true,
            ..VolumeOptions::default()
        };
        let (url, store) = (&self.f.url, &self.f.store_options);
        let volume = match at {
            Some(at) => self.f.run(Volume::open_past(url, store, &options, &Past::At(at))),
            None => self.f.run(Volume::open(url, store, &options)),
        }?;
        let mut bytes = vec![0xEE; volume.size_bytes() as usize];
        let read = volume.read(0, &mut bytes);
        volume.close(LIMIT).unwrap();
        read.map(|()| bytes)
    }

    /// Whether everything that is kept reads as it did.
    fn is_right(&self) -> bool {
        let newest = self.kept.values().next_back().unwrap();
        self.read(None).is_ok_and(|read| read == *newest)
            && self
                .kept
                .iter()
                .all(|(cno, expected)| self.is_read(*cno, expected))
    }

    fn check_at(&self, url: &VolumeUrl) -> Result<Report, VolumeError> {
        try_check(&self.f, url, &Request::with_data())
    }

    pub fn keys(&self) -> Vec<String> {
        self.f.objects()
    }

    /// One object of each kind that there is one of, and every fourth of the others.
    fn some_keys(&self) -> Vec<String> {
        let is_many = |key: &str| key.contains("/00") && !key.contains("sums/");
        let keys = self.keys().into_iter().enumerate();
        let keys = keys.filter(|(number, key)| !is_many(key) || number % 4 == 0);
        keys.map(|(_, key)| key).collect()
    }
}

/// Whether a problem is told of this object.
fn names(report: &Report, key: &str) -> bool {
    report.problems.iter().any(|problem| problem.object == key)
}

#[test]
fn a_whole_volume_is_clean_and_counted() {
    let rich = Rich::new();
    let before = rich.keys();
    let report = whole(&rich.f);
    assert!(report.is_clean(), "{report:#?}");
    assert_eq!(report.checkpoints, rich.kept.len() as u64);
    assert_eq!(report.newest_checkpoint, LIVES);
    assert!(report.data_bytes > 6 << 20 && report.index_nodes > 20);
    assert!(report.verified_bytes.unwrap() >= report.data_bytes, "{report:?}");
    assert_eq!(report.unverified_bytes, Some(0));
    assert_eq!(rich.keys(), before, "a check writes nothing");
    // One checkpoint alone, and what came after one.
    let of = |snapshot: Option<At>, since: Option<At>| {
        let request = Request {
            snapshot,
            since,
            is_data: true,
            ..Request::default()
        };
        check(&rich.f, &request)
    };
    let third = of(Some("@third".parse().unwrap()), None);
    assert!(third.is_clean() && third.checkpoints == 1 && third.data_bytes < report.data_bytes);
    let since = of(None, Some(At::Number(LIVES - 2)));
    assert!(
        since.is_clean() && since.data_bytes > 0 && since.data_bytes < 300_000,
        "{since:?}"
    );
    let error = rich.check_at(&rich.f.url_of("nothing")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
}

/// In every object, and in what the directory keeps behind its bytes: found and named, or everything reads as it did.
#[test]
fn a_flipped_byte_is_found_or_is_no_harm() {
    let rich = Rich::new();
    let mut rng = fastrand::Rng::with_seed(18);
    let mut found = BTreeMap::<String, usize>::new();
    for key in rich.some_keys() {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(rich.f.object_file(&key))
            .unwrap();
        let len = file.metadata().unwrap().len();
        let body_len = rich.f.run(rich.store.head(&key)).unwrap().unwrap().size_bytes;
        for flip in 0..FLIPS {
            let at = match flip {
                0 => 0,
                1 => body_len - 1,
                2 => rng.u64(body_len..len),
                _ => rng.u64(0..body_len),
            };
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << rng.u8(0..8)], at).unwrap();
            let is_found = match rich.check_at(&rich.f.url) {
                Ok(report) => names(&report, &key),
                // A directory that cannot tell what an object is.
                Err(e) => at >= body_len && !e.chain().is_empty(),
            };
            if is_found {
                *found.entry(key.clone()).or_default() += 1;
            } else {
                assert!(rich.is_right(), "byte {at} of {body_len} of {key} was not found");
            }
            file.write_all_at(&byte, at).unwrap();
        }
    }
    println!("{found:#?}");
    // Of each kind some are found: in what is read for what it says, all.
    for (key, _) in found.iter().filter(|(key, _)| key.contains(".meta/")) {
        assert!(found[key] >= FLIPS - 1, "{key}: {}", found[key]);
    }
    let kinds = [
        "volume/inode",
        "volume.json",
        "lease",
        "wal",
        "import",
        "scrub",
        "checkpoints/",
        "snapshots/",
        "policy",
        "plan",
        "usage",
        "pins/",
        "sums/",
        "volume/00",
    ];
    for kind in kinds {
        assert!(found.keys().any(|key| key.contains(kind)), "{kind}: {found:?}");
    }
    assert!(whole(&rich.f).is_clean());
}

/// Each object gone, cut, put in another's place, or as it was before: named, with what it affects, or no harm.
#[test]
fn what_is_missing_cut_swapped_or_old_is_named() {
    let rich = Rich::new();
    let keys = rich.some_keys();
    let is_data = |key: &str| key.starts_with("volume/");
    let mut seen = BTreeMap::<Kind, usize>::new();
    for (number, key) in keys.iter().enumerate() {
        let file = rich.f.object_file(key);
        let own = std::fs::read(&file).unwrap();
        let (body, _) = rich.f.run(rich.store.get(key)).unwrap().unwrap();
        let mut others = keys.iter().filter(|other| is_data(other) == is_data(key)).cycle();
        let other = std::fs::read(rich.f.object_file(others.nth(number + 1).unwrap())).unwrap();
        for how in ["missing", "cut", "swapped"] {
            match how {
                "missing" => drop(rich.f.run(rich.store.delete(key)).unwrap()),
                // As a writer that was cut short would have stored it: with check values of its own.
                "cut" => drop(
                    rich.f
                        .run(rich.store.put(key, body.slice(..body.len() / 2)))
                        .unwrap(),
                ),
                _ => std::fs::write(&file, &other).unwrap(),
            }
            let report = whole(&rich.f);
            if !names(&report, key) {
                assert!(other == own || rich.is_right(), "{how} {key}: {report:#?}");
            }
            for problem in &report.problems {
                *seen.entry(problem.kind).or_default() += 1;
                assert!(!problem.advice.is_empty());
            }
            std::fs::write(&file, &own).unwrap();
        }
    }
    assert!(seen.len() >= 3, "{seen:?}");
    assert!(whole(&rich.f).is_clean());
}

/// Nothing reads differently without it, until the next server gives the volume another id.
#[test]
fn a_label_that_is_gone_is_told_with_what_to_do() {
    let f = Fixture::new();
    f.create(SIZE as u64, BLOCK as u32);
    let store = f.store().unwrap();
    let key = store.meta_key("volume.json");
    let (label, _) = f.run(store.get(&key)).unwrap().unwrap();
    f.remove_meta(&key);
    // As a container that another program made.
    let never_opened = check(&f, &Request::default());
    assert!(never_opened.is_clean(), "{never_opened:?}");
    assert!(
        never_opened.notes.iter().any(|note| note.contains("no label")),
        "{never_opened:?}"
    );
    f.run(store.put(&key, label.clone())).unwrap();
    let volume = f.open();
    volume.write(0, &pattern(1, BLOCK), true).unwrap();
    volume.close(LIMIT).unwrap();
    assert!(whole(&f).is_clean());
    f.remove_meta(&key);
    for request in [
        Request::default(),
        Request {
            snapshot: Some(At::Number(1)),
            ..Request::default()
        },
    ] {
        let report = check(&f, &request);
        let [problem] = &report.problems[..] else {
            panic!("{report:?}");
        };
        assert_eq!((problem.kind, &problem.object), (Kind::Missing, &key));
        assert!(problem.advice.contains("put it back"), "{problem:?}");
        assert!(problem.checkpoints.is_empty() && problem.ranges.is_empty());
    }
    f.run(store.put(&key, label)).unwrap();
    assert!(whole(&f).is_clean());
}

/// It says that the volume is a clone.
#[test]
fn a_clones_label_that_is_gone_is_named_before_what_is_not_found_without_it() {
    let (mut f, _) = crate::clones::cloned();
    crate::clones::go(&mut f, "clone");
    let key = f.store().unwrap().meta_key("volume.json");
    f.remove_meta(&key);
    let report = check(&f, &Request::default());
    let problem = &report.problems[0];
    assert_eq!((problem.kind, &problem.object), (Kind::Missing, &key));
    assert!(problem.advice.contains("is a clone"), "{problem:?}");
}

#[test]
fn damage_is_told_with_what_it_affects() {
    let f = Fixture::new();
    f.create(16 << 20, BLOCK as u32);
    let volume = f.open();
    for (at, len) in [(0_usize, 1 << 20), (8 << 20, 1 << 20), (0, 4096)] {
        volume
            .write(at as u64, &pattern(at as u64 + 1, len), true)
            .unwrap();
    }
    volume.close(LIMIT).unwrap();
    let name: past::SnapshotName = "middle".parse().unwrap();
    f.run(past::create(
        &f.url,
        &f.store_options,
        &name,
        Some(&At::Number(2)),
    ))
    .unwrap();
    let store = f.store().unwrap();
    let key = store.data_key("0000000002.0");
    // The block at 8 MiB + 600 KiB is in its last third.
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(f.object_file(&key))
        .unwrap();
    let (body, _) = f.run(store.get(&key)).unwrap().unwrap();
    let needle = &pattern((8 << 20) + 1, 1 << 20)[600 << 10..][..BLOCK];
    let at = body.windows(BLOCK).position(|window| window == needle).unwrap();
    file.write_all_at(&[!body[at]], at as u64).unwrap();
    // Metadata alone do not tell.
    assert!(check(&f, &Request::default()).is_clean());
    let report = whole(&f);
    let [problem] = &report.problems[..] else {
        panic!("{report:#?}")
    };
    assert_eq!(
        (problem.kind, problem.object.as_str()),
        (Kind::Damaged, key.as_str())
    );
    assert_eq!(
        (problem.checkpoints.as_slice(), problem.is_newest_affected),
        ([(2, 3)].as_slice(), true)
    );
    assert_eq!(problem.names, [name]);
    let bad = (8 << 20) + (600 << 10);
    let is_in =
        |range: &checks::Affected| (range.offset_bytes..range.offset_bytes + range.len_bytes).contains(&bad);
    assert!(problem.ranges.iter().any(is_in), "{:?}", problem.ranges);
    // What shares its checked piece of the object, and no more.
    let affected: u64 = problem.ranges.iter().map(|range| range.len_bytes).sum();
    assert!(affected <= 128 << 10, "{:?}", problem.ranges);
    file.write_all_at(&body[at..=at], at as u64).unwrap();
    assert!(whole(&f).is_clean());
    // The object of the first checkpoint alone: everything there was at first.
    f.remove("0000000001.0");
    let report = check(&f, &Request::default());
    let [lost] = &report.problems[..] else {
        panic!("{report:#?}")
    };
    assert_eq!(
        (lost.kind, lost.object.as_str()),
        (Kind::Missing, "volume/0000000001.0")
    );
    assert_eq!(
        (lost.checkpoints.as_slice(), lost.ranges.len()),
        ([(1, 3)].as_slice(), 1)
    );
}

/// A checkpoint that is listed and cannot be read is a problem, and not unknown.
#[test]
fn a_checkpoint_that_is_asked_for_and_unreadable_is_told_of() {
    for is_missing in [true, false] {
        let f = Fixture::new();
        f.create(4 << 20, BLOCK as u32);
        let volume = f.open();
        for seed in 1..4 {
            volume.write(0, &pattern(seed, 9000), true).unwrap();
        }
        volume.close(LIMIT).unwrap();
        let key = f.store().unwrap().data_key("0000000002.0");
        match is_missing {
            true => f.remove("0000000002.0"),
            false => std::fs::write(f.object_file(&key), "damaged").unwrap(),
        }
        let of = |number| Request {
            snapshot: Some(At::Number(number)),
            ..Request::with_data()
        };
        assert!(names(&check(&f, &of(2)), &key));
        assert!(check(&f, &of(3)).is_clean());
        assert!(try_check(&f, &f.url, &of(9)).is_err(), "it is unknown");
    }
}

/// An older inode is a whole state of the volume, and not the one that its list knows.
#[test]
fn an_older_inode_is_noticed() {
    let f = Fixture::new();
    f.create(4 << 20, BLOCK as u32);
    let store = f.store().unwrap();
    let mut inodes = Vec::new();
    for step in 1..4 {
        let volume = f.open();
        volume.write(0, &pattern(step, 9000), true).unwrap();
        volume.close(LIMIT).unwrap();
        inodes.push(std::fs::read(f.object_file(&store.data_key("inode"))).unwrap());
    }
    assert!(whole(&f).is_clean());
    std::fs::write(f.object_file(&store.data_key("inode")), &inodes[0]).unwrap();
    let report = whole(&f);
    assert!(
        report
            .problems
            .iter()
            .any(|problem| problem.kind == Kind::Contradiction && problem.reason.contains("goes up to 3")),
        "{report:#?}"
    );
}

/// As when what lies beside a volume is restored from a backup, without the rest.
#[test]
fn a_name_of_a_checkpoint_that_was_removed_is_told_of() {
    let f = Fixture::new();
    f.create(4 << 20, BLOCK as u32);
    let volume = f.open();
    for seed in 1..=LIVES {
        volume.write(0, &pattern(seed, 9000), true).unwrap();
    }
    volume.close(LIMIT).unwrap();
    let name: past::SnapshotName = "second".parse().unwrap();
    let at = At::Number(2);
    f.run(past::create(&f.url, &f.store_options, &name, Some(&at)))
        .unwrap();
    let store = f.store().unwrap();
    let key = store.meta_key("snapshots/second");
    let (body, _) = f.run(store.get(&key)).unwrap().unwrap();
    f.run(past::delete(&f.url, &f.store_options, &name)).unwrap();
    let policy = Policy {
        keep_last: 1,
        ..Policy::default()
    };
    f.run(set_policy(&f.url, &f.store_options, Some(&policy)))
        .unwrap();
    f.run(prune(&f.url, &f.store_options, &LeaseOptions::default()))
        .unwrap();
    assert!(whole(&f).is_clean());
    f.run(store.put(&key, body)).unwrap();
    let report = whole(&f);
    let [problem] = &report.problems[..] else {
        panic!("{report:#?}")
    };
    assert_eq!(
        (problem.kind, problem.object.as_str()),
        (Kind::Contradiction, key.as_str())
    );
}

/// A table that would let something go that is needed, or that counts otherwise.
#[test]
fn a_wrong_usage_table_is_noticed() {
    let rich = Rich::new();
    let key = rich.store.meta_key("retention/usage");
    let (body, _) = rich.f.run(rich.store.get(&key)).unwrap().unwrap();
    let stored: serde_json::Value = serde_json::from_slice(&body).unwrap();
    let table = &stored["table"];
    // Its check is right: it was counted so.
    let put = |table: &serde_json::Value| {
        let (version, table) = (&stored["version"], table.to_string());
        let crc32c = crc32c(table.as_bytes());
        let body = format!(r#"{{"version":{version},"crc32c":{crc32c},"table":{table}}}"#);
        rich.f.run(rich.store.put(&key, body)).unwrap();
    };
    put(table);
    assert!(check(&rich.f, &Request::default()).is_clean());
    let objects = table["objects"].as_object().unwrap();
    for (object, counts) in objects {
        let mut wrong = table.clone();
        // Gone from the table; and of a dead one: dead since before its last use.
        match counts[3].as_u64() == Some(u64::MAX) {
            true => drop(wrong["objects"].as_object_mut().unwrap().remove(object)),
            false => wrong["objects"][object][3] = counts[2].clone(),
        }
        put(&wrong);
        let report = check(&rich.f, &Request::default());
        assert!(names(&report, &key), "{object}: {counts}");
    }
    rich.f.run(rich.store.put(&key, body)).unwrap();
    assert!(whole(&rich.f).is_clean());
}

/// Refuses to put check values while it is told to.
#[derive(Debug, Clone, Default)]
struct NoSums(Arc<AtomicBool>);

impl Intercept for NoSums {
    fn name(&self) -> &'static str {
        "NoSums"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        let is_sums = request.method() == "PUT" && request.uri().contains("/sums/");
        match is_sums && self.0.load(Ordering::SeqCst) {
            true => Err("no check values now".into()),
            false => Ok(()),
        }
    }
}

/// They are stored before the inode: a checkpoint whose check values cannot be stored is not published, and its flush fails.
#[test]
fn nothing_is_published_before_its_check_values_are_stored() {
    let mut f = Fixture::new();
    f.create(16 << 20, BLOCK as u32);
    let refusing = NoSums::default();
    f.store_options.hook = Hook::new(refusing.clone());
    let options = VolumeOptions {
        io_timeout: std::time::Duration::from_secs(5),
        ..VolumeOptions::default()
    };
    let volume = f.run(Volume::open(&f.url, &f.store_options, &options)).unwrap();
    refusing.0.store(true, Ordering::SeqCst);
    let bytes = pattern(1, 10 << 20);
    volume.write(0, &bytes, false).unwrap();
    assert!(volume.flush().is_err(), "flushed without check values");
    let published = || {
        f.run(hypernbd_volume::admin::info(&f.url, &f.store_options))
            .unwrap()
            .last_checkpoint
    };
    assert_eq!(published(), 0);
    refusing.0.store(false, Ordering::SeqCst);
    assert!((0..60).any(|_| volume.flush().is_ok()));
    assert!(published() > 0);
    assert!(f.read(&volume, 0, bytes.len()) == bytes);
    volume.close(LIMIT).unwrap();
    let report = whole(&f);
    assert!(
        report.is_clean() && report.unverified_bytes == Some(0),
        "{report:#?}"
    );
}

/// Of an earlier release, or of another program: served, counted, and given check values when that is asked for.
#[test]
fn objects_without_check_values_get_some() {
    let f = Fixture::new();
    f.create(16 << 20, BLOCK as u32);
    let volume = f.open();
    let bytes = pattern(1, 10 << 20);
    volume.write(0, &bytes, true).unwrap();
    volume.close(LIMIT).unwrap();
    let [sums] = &f.meta_objects("sums/")[..] else {
        panic!("{:?}", f.meta_objects("sums/"))
    };
    f.remove_meta(sums);
    let without = whole(&f);
    assert!(
        without.is_clean() && without.unverified_bytes.unwrap() >= 10 << 20,
        "{without:#?}"
    );
    assert!(
        without.notes.iter().any(|note| note.contains("--write")),
        "{without:#?}"
    );
    assert!(f.meta_objects("sums/").is_empty());
    let request = Request {
        adds_check_values: true,
        ..Request::with_data()
    };
    assert!(check(&f, &request).is_clean());
    assert_eq!(f.meta_objects("sums/"), std::slice::from_ref(sums));
    let with = whole(&f);
    assert!(with.is_clean() && with.unverified_bytes == Some(0), "{with:#?}");
    // They are of what was there, and find what changes.
    let file = f.object_file("volume/0000000001.0");
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(&[!bytes[7_000_000]], (10 << 20) - 5).unwrap();
    assert!(names(&whole(&f), "volume/0000000001.0"));
}

/// Check values of a damaged index would make it valid: its reader then believes it, and reads wrong data.
#[test]
fn an_object_with_a_damaged_index_gets_no_check_values() {
    const WINDOW: usize = 128 << 10;
    let f = Fixture::new();
    f.create(64 << 20, BLOCK as u32);
    let volume = f.open();
    volume.write(0, &pattern(1, 48 << 20), true).unwrap();
    volume.close(LIMIT).unwrap();
    for sums in f.meta_objects("sums/") {
        f.remove_meta(&sums);
    }
    let store = f.store().unwrap();
    let key = store.data_key("0000000001.0");
    let (body, etag) = f.run(store.get(&key)).unwrap().unwrap();
    // As an earlier release remembered the index, and one window of it is not what is there now.
    let windows: Vec<String> = body[..2 * WINDOW]
        .chunks(WINDOW)
        .map(|window| format!("{:08x}", crc32c(window)))
        .collect();
    let request = Request {
        adds_check_values: true,
        ..Request::with_data()
    };
    for damaged in 0..windows.len() {
        let mut values = windows.clone();
        values[damaged] = "00000000".to_owned();
        let remembered = serde_json::json!({
            "etag": etag.0, "index_end_bytes": 2 * WINDOW, "crc32c": values.concat(),
        });
        let beside = store.meta_key("index/0000000001.0");
        f.run(store.put(&beside, remembered.to_string())).unwrap();
        let report = check(&f, &request);
        assert!(names(&report, &key), "{damaged}: {report:#?}");
        let sums = f.meta_objects("sums/");
        assert!(
            !sums.iter().any(|sums| sums.ends_with("0000000001.0")),
            "it got check values"
        );
    }
}

/// The check values of an object go when it goes, and not before.
#[test]
fn check_values_go_with_their_objects() {
    let f = Fixture::new();
    f.create(16 << 20, BLOCK as u32);
    let volume = f.open();
    for seed in 0..2 {
        volume.write(0, &pattern(seed, 10 << 20), true).unwrap();
    }
    for seed in 0..18 {
        volume.write(12 << 20, &pattern(seed, 4096), true).unwrap();
    }
    volume.close(LIMIT).unwrap();
    assert_eq!(f.meta_objects("sums/").len(), 2);
    let policy = Policy {
        keep_last: 1,
        ..Policy::default()
    };
    f.run(set_policy(&f.url, &f.store_options, Some(&policy)))
        .unwrap();
    f.run(prune(&f.url, &f.store_options, &LeaseOptions::default()))
        .unwrap();
    assert_eq!(f.meta_objects("sums/"), ["volume.meta/sums/0000000002.0"]);
    let report = whole(&f);
    assert!(
        report.is_clean() && report.unverified_bytes == Some(0),
        "{report:#?}"
    );
}
