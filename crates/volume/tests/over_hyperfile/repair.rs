//! What is put back into a damaged volume, and what is not.

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use hypernbd_volume::base::control::Control;
use hypernbd_volume::repair::{How, Outcome, Repaired, Request, from_versions, repair};
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::{ErrorKind, VolumeError, VolumeUrl};

use crate::clones::copy_directory;
use crate::faults::{BoxError, LIMIT};
use crate::fixture::{Fixture, pattern};
use crate::replicas::{Contents, again, assert_whole, newest};

pub const SIZE: usize = 16 << 20;
/// Uploaded in parts: its check values lie beside the container.
pub const LARGE: &str = "0000000001.0";
pub const SMALL: &str = "0000000002.0";
pub const GONE: &str = "0000000003.0";

/// A volume with three checkpoints, and its replica.
pub fn volume_and_replica() -> (Fixture, Contents, VolumeUrl) {
    let f = Fixture::new();
    f.create(SIZE as u64, 4096);
    let (mut contents, mut model) = (Contents::new(), vec![0; SIZE]);
    let volume = f.open();
    for (seed, at, len) in [(1, 0, 10 << 20), (2, 12 << 20, 1 << 20), (3, 14 << 20, 1 << 20)] {
        model[at..at + len].copy_from_slice(&pattern(seed, len));
        volume.write(at as u64, &model[at..at + len], true).unwrap();
        contents.insert(newest(&f, &f.url), model.clone());
    }
    volume.close(LIMIT).unwrap();
    let to = f.url_of("replica");
    again(&f, &to);
    (f, contents, to)
}

fn file(f: &Fixture, place: &str, name: &str) -> PathBuf {
    f.path_of(place).join(format!("objects/volume%2F{name}"))
}

/// Damages data at the end of an object.
pub fn flip(f: &Fixture, place: &str, name: &str) {
    let path = file(f, place, name);
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 700_000).unwrap();
    file.write_all_at(&[!byte[0]], 700_000).unwrap();
}

/// Cuts a file short: what it is stands at its end.
fn cut(f: &Fixture, place: &str, name: &str) {
    let path = file(f, place, name);
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(5000).unwrap();
}

fn run(f: &Fixture, from: &VolumeUrl, is_written: bool) -> Result<Repaired, VolumeError> {
    let request = Request {
        url: &f.url,
        store_options: &f.store_options,
        from,
        from_options: &f.store_options,
        is_data: true,
        is_written,
    };
    f.run(repair(&request, &Control::default()))
}

/// What became of each object, by its name.
pub fn outcomes(repaired: &Repaired) -> Vec<(String, Outcome)> {
    let name = |key: &str| key.rsplit('/').next().unwrap().to_owned();
    let found = repaired.found.iter();
    let mut all: Vec<_> = found
        .map(|one| (name(&one.problem.object), one.outcome.clone()))
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn all(outcome: &Outcome) -> Vec<(String, Outcome)> {
    let names = [LARGE, SMALL, GONE].into_iter();
    names.map(|name| (name.to_owned(), outcome.clone())).collect()
}

#[test]
fn what_a_replica_has_is_put_back() {
    let (mut f, contents, replica) = volume_and_replica();
    for _ in 0..2 {
        flip(&f, "vol", LARGE);
        flip(&f, "vol", SMALL);
        std::fs::remove_file(file(&f, "vol", GONE)).unwrap();
        let looked = run(&f, &replica, false).unwrap();
        assert_eq!(outcomes(&looked), all(&Outcome::Possible));
        assert!(!looked.is_whole() && looked.left.is_none());
        let still = run(&f, &replica, false).unwrap();
        assert_eq!(still, looked, "nothing was changed");
        let mended = run(&f, &replica, true).unwrap();
        assert_eq!(outcomes(&mended), all(&Outcome::Mended));
        assert!(mended.is_whole(), "{:?}", mended.left);
        let url = f.url.clone();
        assert_whole(&mut f, &url, &contents);
        assert!(run(&f, &replica, true).unwrap().found.is_empty());
    }
    // What was put back is checked as what was written: damage in it is found.
    flip(&f, "vol", LARGE);
    assert_eq!(run(&f, &replica, false).unwrap().found.len(), 1);
}

/// A replica is repaired from its original, and a file that was cut short has nothing left that says what it was.
#[test]
fn a_replica_is_repaired_from_its_original() {
    let (mut f, contents, replica) = volume_and_replica();
    cut(&f, "replica", SMALL);
    let original = std::mem::replace(&mut f.url, replica.clone());
    let mended = run(&f, &original, true).unwrap();
    assert_eq!(outcomes(&mended), [(SMALL.to_owned(), Outcome::Mended)]);
    assert!(mended.is_whole(), "{:?}", mended.left);
    assert_whole(&mut f, &replica, &contents);
}

#[test]
fn what_is_damaged_in_both_is_left() {
    let (f, _, replica) = volume_and_replica();
    for place in ["vol", "replica"] {
        flip(&f, place, LARGE);
        cut(&f, place, SMALL);
        std::fs::remove_file(file(&f, place, GONE)).unwrap();
    }
    let damaged = std::fs::read(file(&f, "vol", LARGE)).unwrap();
    let done = run(&f, &replica, true).unwrap();
    let outcomes = outcomes(&done);
    assert_eq!(outcomes.len(), 3);
    for ((name, outcome), said) in outcomes
        .iter()
        .zip(["damaged at", "damaged at", "does not have it"])
    {
        assert!(
            matches!(outcome, Outcome::Left(reason) if reason.contains(said)),
            "{name}: {outcome:?}"
        );
    }
    assert!(!done.is_whole() && done.left.is_none());
    assert!(std::fs::read(file(&f, "vol", LARGE)).unwrap() == damaged);
}

/// Its label is lost, and the next server gives the volume another id: its checkpoints are those that the replica has.
#[test]
fn a_volume_that_lost_its_label_is_repaired() {
    let (f, _, replica) = volume_and_replica();
    f.remove_meta("volume.meta/volume.json");
    f.open().close(LIMIT).unwrap();
    flip(&f, "vol", LARGE);
    let done = run(&f, &replica, true).unwrap();
    assert_eq!(outcomes(&done), [(LARGE.to_owned(), Outcome::Mended)]);
}

/// What is missing says nothing of itself: a checkpoint that both have must, with its number or a later one.
#[test]
fn without_a_checkpoint_in_common_nothing_is_put_where_nothing_is() {
    let (f, _, replica) = volume_and_replica();
    let entry = |number: u64| {
        f.path_of("replica")
            .join(format!("objects/volume.meta%2Fcheckpoints%2F{number:010}"))
    };
    flip(&f, "vol", LARGE);
    std::fs::remove_file(file(&f, "vol", SMALL)).unwrap();
    // One that cannot be read is as good as none.
    std::fs::write(entry(3), "damaged").unwrap();
    let with_the_second = run(&f, &replica, false).unwrap();
    let both = [
        (LARGE.to_owned(), Outcome::Possible),
        (SMALL.to_owned(), Outcome::Possible),
    ];
    assert_eq!(outcomes(&with_the_second), both);
    std::fs::remove_file(entry(2)).unwrap();
    let without = outcomes(&run(&f, &replica, false).unwrap());
    assert_eq!(without[0], both[0]);
    let Outcome::Left(reason) = &without[1].1 else {
        panic!("{without:?}");
    };
    assert!(reason.contains("no checkpoint in common from 2 on"), "{reason}");
}

/// Counts lists of the checkpoints of a volume.
#[derive(Debug, Clone, Default)]
struct Lists(Arc<AtomicUsize>);

impl Intercept for Lists {
    fn name(&self) -> &'static str {
        "Lists"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let uri = context.request().uri();
        if uri.contains("list-type") && uri.contains("checkpoints") {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// What the two have in common is found once, however much is missing.
#[test]
fn many_missing_objects_take_no_more_lists_than_one() {
    let (mut f, _, replica) = volume_and_replica();
    let lists = Lists::default();
    f.store_options.hook = Hook::new(lists.clone());
    let mut counted = Vec::new();
    for missing in [[GONE].as_slice(), &[LARGE, SMALL]] {
        for name in missing {
            std::fs::remove_file(file(&f, "vol", name)).unwrap();
        }
        lists.0.store(0, Ordering::Relaxed);
        run(&f, &replica, false).unwrap();
        counted.push(lists.0.load(Ordering::Relaxed));
    }
    assert!(counted[0] > 0 && counted[0] == counted[1], "{counted:?}");
}

#[test]
fn another_volumes_objects_are_not_taken() {
    let (f, ..) = volume_and_replica();
    let (other, ..) = volume_and_replica();
    copy_directory(&other.path_of("vol"), &f.path_of("other"));
    std::fs::remove_file(file(&f, "vol", GONE)).unwrap();
    let e = run(&f, &f.url_of("other"), true).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
    // A copy that went its own way has other objects under the same numbers from there on.
    let (mut f, ..) = volume_and_replica();
    copy_directory(&f.path_of("vol"), &f.path_of("copy"));
    let (own, copy) = (f.url.clone(), f.url_of("copy"));
    for (url, seed) in [(&copy, 8), (&own, 9)] {
        f.url = url.clone();
        let volume = f.open();
        volume.write(4096, &pattern(seed, 8192), true).unwrap();
        volume.close(LIMIT).unwrap();
    }
    std::fs::remove_file(file(&f, "vol", LARGE)).unwrap();
    let e = run(&f, &copy, true).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
}

/// A directory keeps no versions.
#[test]
fn versions_are_asked_of_a_bucket_alone() {
    let (f, ..) = volume_and_replica();
    let how = How::default();
    let asked = f.run(from_versions(&f.url, &f.store_options, how, &Control::default()));
    let e = asked.unwrap_err();
    assert_eq!(e.kind(), ErrorKind::InvalidInput, "{e}");
    assert!(e.to_string().contains("keeps no versions"), "{e}");
}
