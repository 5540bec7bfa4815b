//! Replicas: whatever request to their store is the last, they are at a checkpoint of their original, whole; they follow one history alone;
//! and one that was written to is followed no more.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use aws_sdk_s3::config::interceptors::{
    BeforeTransmitInterceptorContextMut, BeforeTransmitInterceptorContextRef,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use hyperfile::meta_format::BlockPtrFormat;
use hypernbd_volume::admin;
use hypernbd_volume::check;
use hypernbd_volume::options::{LeaseOptions, StoreOptions};
use hypernbd_volume::past;
use hypernbd_volume::replicate::{Replicated, Request, replicate};
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::transfer::Control;
use hypernbd_volume::{ErrorKind, Volume, VolumeError, VolumeUrl};

use crate::clones::{clone, copy_directory};
use crate::faults::{BoxError, LIMIT};
use crate::fixture::{Fixture, pattern};
use crate::replicas_at_risk::keep_last;
use crate::resize::{FORMATS, made_elsewhere};

/// A replication is ended after so many of its requests, and again after as many more; after each of them would take minutes. Every format
/// begins with another number.
const REQUESTS_STEP: usize = 7;

pub const SIZE: usize = 300_000;
/// More requests than a replication here has.
const REQUESTS_MAX: usize = 300;

/// What a volume reads as at each of its checkpoints.
pub type Contents = BTreeMap<u64, Vec<u8>>;

/// Lets so many requests that change something through, and none after them, as if the process had ended there.
#[derive(Debug)]
pub struct Until {
    pub left: AtomicUsize,
}

impl Intercept for Until {
    fn name(&self) -> &'static str {
        "Until"
    }

    fn modify_before_transmit(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if matches!(context.request().method(), "GET" | "HEAD") {
            return Ok(());
        }
        let took = self
            .left
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(1));
        took.map(drop).map_err(|_| "the process has ended".into())
    }
}

pub fn request<'a>(f: &'a Fixture, to: &'a VolumeUrl, to_options: &'a StoreOptions) -> Request<'a> {
    Request {
        url: &f.url,
        store_options: &f.store_options,
        to,
        to_options,
        takes_over: false,
        follows: None,
    }
}

pub fn run(f: &Fixture, to: &VolumeUrl, to_options: &StoreOptions) -> Result<Replicated, VolumeError> {
    f.run(replicate(
        &request(f, to, to_options),
        &Control::default(),
        |_| (),
    ))
}

pub fn again(f: &Fixture, to: &VolumeUrl) -> Replicated {
    run(f, to, &f.store_options).unwrap_or_else(|e| panic!("{}", e.chain()))
}

pub fn refused(f: &Fixture, to: &VolumeUrl) -> String {
    let e = run(f, to, &f.store_options).unwrap_err();
    e.chain()
}

pub fn newest(f: &Fixture, url: &VolumeUrl) -> u64 {
    f.run(admin::info(url, &f.store_options)).unwrap().last_checkpoint
}

pub fn whole(f: &Fixture, volume: &Volume) -> Vec<u8> {
    let bytes = f.read(volume, 0, volume.size_bytes() as usize);
    volume.close(LIMIT).unwrap();
    bytes
}

/// Writes, each write a checkpoint, and notes what the volume reads as at each.
pub fn write_on(f: &Fixture, contents: &mut Contents, seed: u64, times: usize) {
    let mut model = contents.last_key_value().unwrap().1.clone();
    let volume = f.open();
    for time in 0..times {
        let bytes = pattern(seed + time as u64, 20_000 + 7000 * time);
        let at = (seed as usize * 31_000 + time * 47_000) % (SIZE - bytes.len());
        volume.write(at as u64, &bytes, true).unwrap();
        model[at..at + bytes.len()].copy_from_slice(&bytes);
        contents.insert(newest(f, &f.url), model.clone());
    }
    volume.close(LIMIT).unwrap();
}

pub fn original(format: BlockPtrFormat) -> (Fixture, Contents) {
    let (f, model) = made_elsewhere(format, SIZE);
    let mut contents = Contents::from([(newest(&f, &f.url), model)]);
    write_on(&f, &mut contents, 2, 3);
    (f, contents)
}

/// Every checkpoint that a volume has is whole, and reads as the original's of that number. Returns the newest.
pub fn assert_whole(f: &mut Fixture, url: &VolumeUrl, contents: &Contents) -> u64 {
    let report = f.run(check::check(
        url,
        &f.store_options,
        &check::Request::with_data(),
        &Control::default(),
    ));
    let report = report.unwrap();
    assert!(report.is_clean(), "{report:?}");
    let own = std::mem::replace(&mut f.url, url.clone());
    let reading = f.open_read_only();
    let newest = newest(f, url);
    assert!(whole(f, &reading) == contents[&newest], "checkpoint {newest}");
    f.url = own;
    for listed in f.run(past::list(url, &f.store_options, 0, u64::MAX)).unwrap() {
        assert!(contents.contains_key(&listed.cno), "{}", listed.cno);
    }
    newest
}

/// What becomes of it when somebody opens it for writing: in a copy of it, so that it stays a replica.
fn assert_opens(f: &mut Fixture, of: &str, copy: &Path, expected: &[u8]) {
    let _ = std::fs::remove_dir_all(copy);
    copy_directory(&f.path_of(of), copy);
    // A copied lease may be held by whoever is copied, and would be watched for as long as it runs.
    let _ = std::fs::remove_file(copy.join("objects/volume.meta%2Flease"));
    let url = f.url_of(copy.file_name().unwrap().to_str().unwrap());
    let own = std::mem::replace(&mut f.url, url);
    let opened = f.open();
    assert!(
        whole(f, &opened) == expected,
        "nothing that was still being copied is taken up"
    );
    f.url = own;
}

#[test]
fn whatever_request_is_the_last_a_replica_is_at_a_checkpoint_of_its_original() {
    for (first, format) in FORMATS.into_iter().enumerate() {
        let (mut f, mut contents) = original(format);
        let policy = keep_last(&f, &f.url, 1000);
        let to = f.url_of("replica");
        let mut seen = std::collections::BTreeSet::new();
        for requests in (first * 2..).step_by(REQUESTS_STEP) {
            assert!(requests < REQUESTS_MAX);
            let to_options = StoreOptions {
                hook: Hook::new(Until {
                    left: AtomicUsize::new(requests),
                }),
                ..StoreOptions::default()
            };
            // Each attempt begins with nothing there.
            let done = run(&f, &to, &to_options);
            match f.run(admin::info(&to, &f.store_options)) {
                Ok(_) => {
                    let at = assert_whole(&mut f, &to, &contents);
                    let expected = contents[&at].clone();
                    let copy = f.path_of("copy");
                    assert_opens(&mut f, "replica", &copy, &expected);
                    seen.insert(at);
                }
                Err(e) => assert!(
                    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Store),
                    "{format:?}, {requests}: {e}"
                ),
            }
            let is_done = done.is_ok();
            again(&f, &to);
            let rules = f.run(admin::retention::policy(&to, &f.store_options));
            assert_eq!(rules.unwrap().as_ref(), Some(&policy), "{format:?}, {requests}");
            assert_eq!(
                assert_whole(&mut f, &to, &contents),
                *contents.last_key_value().unwrap().0
            );
            std::fs::remove_dir_all(f.path_of("replica")).unwrap();
            if is_done {
                break;
            }
        }
        assert!(seen.len() > 1, "{format:?}: some were ended half way: {seen:?}");
        // The same, of what comes later.
        again(&f, &to);
        for requests in (first..12).step_by(3) {
            write_on(&f, &mut contents, 10 + requests as u64, 2);
            let hook = Hook::new(Until {
                left: AtomicUsize::new(requests),
            });
            let to_options = StoreOptions {
                hook,
                ..StoreOptions::default()
            };
            let _ = run(&f, &to, &to_options);
            let at = assert_whole(&mut f, &to, &contents);
            let expected = contents[&at].clone();
            let copy = f.path_of("copy");
            assert_opens(&mut f, "replica", &copy, &expected);
        }
        again(&f, &to);
        assert_eq!(
            assert_whole(&mut f, &to, &contents),
            *contents.last_key_value().unwrap().0
        );
    }
}

#[test]
fn only_what_is_missing_is_copied() {
    let (mut f, mut contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    let first = again(&f, &to);
    assert_eq!(first.checkpoints, contents.len() as u64);
    assert_eq!((first.behind_checkpoints, first.copied.unverified_bytes), (0, 0));
    assert_eq!(first.copied.verified_bytes, first.copied.bytes);
    let nothing = again(&f, &to);
    assert_eq!((nothing.checkpoints, nothing.copied.objects), (0, 0));
    write_on(&f, &mut contents, 5, 1);
    let more = again(&f, &to);
    assert_eq!((more.checkpoints, more.copied.objects), (1, 1));
    assert!(more.copied.bytes < first.copied.bytes);
    assert_whole(&mut f, &to, &contents);
    let info = f.run(admin::info(&to, &f.store_options)).unwrap();
    assert_eq!(info.replica_of.unwrap().url, f.url.to_string());
    assert_ne!(
        info.volume_id,
        f.run(admin::info(&f.url, &f.store_options)).unwrap().volume_id
    );
}

/// After which checkpoint the list of checkpoints was read, each time.
#[derive(Debug, Clone, Default)]
struct ListedAfter(Arc<Mutex<Vec<u64>>>);

impl Intercept for ListedAfter {
    fn name(&self) -> &'static str {
        "ListedAfter"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let uri = context.request().uri();
        let mut query = uri.split(['?', '&']);
        let after = query.find_map(|pair| pair.strip_prefix("start-after="));
        if let Some(after) = after.filter(|after| after.contains("checkpoints")) {
            let number = &after[after.len() - 10..];
            self.0.lock().unwrap().push(number.parse()?);
        }
        Ok(())
    }
}

/// A replica that is far behind takes many steps, of 32 checkpoints each.
#[test]
fn the_list_of_checkpoints_is_read_once_however_many_steps_there_are() {
    const MANY: u64 = 70;
    const LAST: u64 = 32;
    let mut f = Fixture::new();
    f.create(1 << 20, 4096);
    keep_last(&f, &f.url, 1000);
    let volume = f.open();
    for seed in 0..MANY {
        volume.write(seed * 4096, &pattern(seed, 4096), true).unwrap();
    }
    volume.close(LIMIT).unwrap();
    assert_eq!(newest(&f, &f.url), MANY);
    let to = f.url_of("replica");
    let listed = ListedAfter::default();
    f.store_options.hook = Hook::new(listed.clone());
    let replicated = run(&f, &to, &StoreOptions::default()).unwrap();
    f.store_options.hook = Hook::default();
    assert_eq!((replicated.checkpoint, replicated.checkpoints), (MANY, MANY));
    assert_eq!(replicated.behind_checkpoints, 0);
    let listed = listed.0.lock().unwrap().clone();
    // The last few are listed again each time.
    let before_the_last = listed.iter().filter(|after| **after + LAST < MANY).count();
    assert_eq!(before_the_last, 1, "{listed:?}");
}

#[test]
fn what_was_written_to_is_followed_no_more() {
    let (mut f, mut contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    again(&f, &to);
    // What changes nothing leaves it a replica.
    f.run(admin::retention::prune(
        &to,
        &f.store_options,
        &LeaseOptions::default(),
    ))
    .unwrap();
    write_on(&f, &mut contents, 5, 1);
    again(&f, &to);
    let used = f
        .run(admin::info(&to, &f.store_options))
        .unwrap()
        .checkpoint_numbers_used;
    let own = std::mem::replace(&mut f.url, to.clone());
    let volume = f.open();
    volume.write(7, b"of its own", true).unwrap();
    let expected = {
        let mut model = contents.last_key_value().unwrap().1.clone();
        model[7..17].copy_from_slice(b"of its own");
        model
    };
    assert!(whole(&f, &volume) == expected);
    assert!(newest(&f, &to) > used, "no number is used twice");
    f.url = own;
    write_on(&f, &mut contents, 6, 1);
    let said = refused(&f, &to);
    assert!(said.contains("a volume of its own"), "{said}");
    f.url = to;
    assert!(whole(&f, &f.open()) == expected);
}

#[test]
fn a_volume_that_went_back_is_not_followed() {
    let (f, mut contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    let backup = f.path_of("backup");
    copy_directory(&f.path_of("vol"), &backup);
    let backed_up = contents.clone();
    write_on(&f, &mut contents, 5, 3);
    again(&f, &to);
    let restore = |contents: &mut Contents| {
        // In the same directory, which makes it the same volume.
        let objects = f.path_of("vol").join("objects");
        std::fs::remove_dir_all(&objects).unwrap();
        copy_directory(&backup.join("objects"), &objects);
        *contents = backed_up.clone();
    };
    restore(&mut contents);
    let said = refused(&f, &to);
    assert!(said.contains("restored from a backup"), "{said}");
    // As far as it was, and further, with other data.
    write_on(&f, &mut contents, 50, 3);
    let said = refused(&f, &to);
    assert!(said.contains("another one of that number"), "{said}");
    write_on(&f, &mut contents, 60, 3);
    let said = refused(&f, &to);
    assert!(said.contains("another one of that number"), "{said}");
    // Where neither entry nor object can tell any more, the objects that both have do.
    let store = f.store().unwrap();
    let at = newest(&f, &to);
    f.run(store.delete(&store.meta_key(&format!("checkpoints/{at:010}"))))
        .unwrap();
    f.run(store.delete(&store.data_key(&format!("{at:010}.0"))))
        .unwrap();
    let said = refused(&f, &to);
    assert!(
        said.contains("under the same numbers") || said.contains("missing"),
        "{said}"
    );
}

#[test]
fn damage_is_not_copied() {
    let (mut f, mut contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    again(&f, &to);
    let before = newest(&f, &to);
    write_on(&f, &mut contents, 5, 1);
    let name = format!("{:010}.0", newest(&f, &f.url));
    let file = f.object_file(&format!("volume/{name}"));
    let good = std::fs::read(&file).unwrap();
    let mut bad = good.clone();
    bad[9000] ^= 1;
    std::fs::write(&file, &bad).unwrap();
    let e = run(&f, &to, &f.store_options).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Corrupt, "{}", e.chain());
    assert!(e.chain().contains(&name), "{}", e.chain());
    assert_eq!(assert_whole(&mut f, &to, &contents), before);
    std::fs::write(&file, &good).unwrap();
    again(&f, &to);
    assert!(assert_whole(&mut f, &to, &contents) > before);
}

#[test]
fn a_replica_of_a_clone_has_what_the_clone_inherited() {
    let (mut f, contents) = original(BlockPtrFormat::PartedSegment);
    clone(&f, "clone");
    let url = f.url_of("clone");
    let parent = std::mem::replace(&mut f.url, url);
    let mut of_clone = Contents::from([(newest(&f, &f.url), contents.last_key_value().unwrap().1.clone())]);
    write_on(&f, &mut of_clone, 7, 2);
    let to = f.url_of("replica");
    again(&f, &to);
    for url in [f.url.clone(), parent] {
        let lease = LeaseOptions::default();
        f.run(admin::delete(
            &url,
            &f.store_options,
            &lease,
            admin::IfDamaged::Refuse,
        ))
        .unwrap();
    }
    assert_whole(&mut f, &to, &of_clone);
}

#[test]
fn another_volumes_place_is_refused_before_anything_is_written() {
    let (f, _) = original(BlockPtrFormat::PartedSegment);
    let other = f.url_of("other");
    let options = admin::CreateOptions {
        size_bytes: 1 << 20,
        block_size_bytes: 4096,
    };
    f.run(admin::create(&other, &f.store_options, &options)).unwrap();
    for (to, why) in [
        (other, "is another volume"),
        (f.url.clone(), "its own replica"),
        (f.url_of("vol/inside"), "inside the other"),
    ] {
        let said = refused(&f, &to);
        assert!(said.contains(why), "{said}");
    }
    assert!(!f.path_of("vol/inside").exists());
    let nothing = Fixture::new();
    let to = nothing.url_of("replica");
    assert!(run(&nothing, &to, &nothing.store_options).is_err());
    assert!(
        !nothing.path_of("replica").exists(),
        "nothing is made for a volume that is not there"
    );
}

/// A name keeps a checkpoint of the replica. One of the original's is not put over it; the original's own go where they go there.
#[test]
fn a_name_that_was_given_to_a_replica_stays_where_it_is() {
    let (f, mut contents) = original(BlockPtrFormat::PartedSegment);
    let to = f.url_of("replica");
    let [mine, theirs] = ["mine", "theirs"].map(|name| name.parse::<past::SnapshotName>().unwrap());
    let give = |url: &VolumeUrl, name| {
        let given = f.run(past::create(url, &f.store_options, name, None));
        given.unwrap().checkpoint.cno
    };
    give(&f.url, &theirs);
    again(&f, &to);
    let kept = give(&to, &mine);
    write_on(&f, &mut contents, 5, 2);
    f.run(past::delete(&f.url, &f.store_options, &theirs)).unwrap();
    let moved = give(&f.url, &theirs);
    assert_eq!(give(&f.url, &mine), moved);
    let named = || {
        let named = f.run(past::snapshots(&to, &f.store_options)).unwrap();
        let named = named.into_iter().map(|of| (of.name, of.checkpoint.cno));
        named.collect::<Vec<_>>()
    };
    for _ in 0..2 {
        again(&f, &to);
        assert_eq!(named(), [(mine.clone(), kept), (theirs.clone(), moved)]);
    }
    f.run(past::delete(&to, &f.store_options, &mine)).unwrap();
    again(&f, &to);
    assert_eq!(named(), [(mine.clone(), moved), (theirs.clone(), moved)]);
}
