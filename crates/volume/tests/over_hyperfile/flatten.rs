//! The sharing of a clone ends while it is served: it reads on without its parent, and the parent is told no sooner than nobody needs it.

use std::sync::{Arc, OnceLock};

use hypernbd_volume::admin;
use hypernbd_volume::base::control::Control;
use hypernbd_volume::check::{self, Request};
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::store::{self, hook::Hook};
use hypernbd_volume::{ErrorKind, Volume, VolumeError};

use crate::clones::{cloned, contents, delete, ending_of_sharing, go, newest};
use crate::faults::{AtRequest, LIMIT, When};
use crate::fixture::{Fixture, pattern};

/// To be filled in once it is there, and used by what happens at a request.
type Later<T> = Arc<OnceLock<T>>;

fn flatten(volume: &Volume) -> Result<admin::Flattened, VolumeError> {
    volume.flatten(&Arc::default())
}

/// A request that puts a copy of what a clone has inherited whose first own checkpoint has this number.
fn puts_copy(first: u64) -> impl Fn(&str, &str) -> bool + Send + Sync + 'static {
    move |method, uri| {
        let path = uri.split('?').next().unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default();
        let number = name.get(..10).and_then(|digits| digits.parse::<u64>().ok());
        method == "PUT" && !path.contains(".meta/") && number.is_some_and(|number| number < first)
    }
}

fn puts_label(method: &str, uri: &str) -> bool {
    method == "PUT" && uri.contains(".meta/volume.json")
}

fn delete_parent(f: &mut Fixture) {
    go(f, "vol");
    delete(f).unwrap_or_else(|e| panic!("{}", e.chain()));
    assert!(f.objects().is_empty());
    go(f, "clone");
}

fn assert_parent_stays(f: &mut Fixture) {
    go(f, "vol");
    let error = delete(f).unwrap_err();
    assert!(matches!(error, VolumeError::HasClones { .. }), "{error}");
    go(f, "clone");
}

#[test]
fn a_served_clone_is_flattened_beside_its_writer_and_reads_on_without_its_parent() {
    let (mut f, mut model) = cloned();
    go(&mut f, "clone");
    let server: Later<Arc<Volume>> = Arc::default();
    let (of, bytes) = (server.clone(), pattern(3, 70_000));
    model[20_001..90_001].copy_from_slice(&bytes);
    // A checkpoint that completes blocks with what is inherited, while that is copied.
    let publish = move || of.get().unwrap().write(20_001, &bytes, true).unwrap();
    let is_it = puts_copy(newest(&f));
    f.store_options.hook = Hook::new(AtRequest::new(is_it, When::BeforeItIsSent, publish));
    let volume = f.open();
    f.store_options.hook = Hook::default();
    assert!(server.set(volume.clone()).is_ok());
    let done = flatten(&volume).unwrap();
    assert!(done.objects > 0 && done.bytes > 50_000, "{done:?}");
    assert_eq!(done.parent, f.url_of("vol").to_string());
    delete_parent(&mut f);
    assert!(f.read(&volume, 0, model.len()) == model);
    volume.write(100, b"more", true).unwrap();
    model[100..104].copy_from_slice(b"more");
    assert!(f.read(&volume, 0, model.len()) == model);
    let error = flatten(&volume).unwrap_err();
    assert!(error.to_string().contains("is no clone"), "{error}");
    volume.close(LIMIT).unwrap();
    assert!(contents(&f) == model);
    let info = f.run(admin::info(&f.url, &f.store_options)).unwrap();
    assert!(info.clone_of.is_none());
}

/// What was copied is found by the next attempt.
#[test]
fn a_flattening_that_is_stopped_or_fails_leaves_a_clone() {
    let (mut f, model) = cloned();
    go(&mut f, "clone");
    f.store_options.hook = Hook::new(AtRequest::new(puts_label, When::BeforeItIsSent, || {}).refused());
    let volume = f.open();
    f.store_options.hook = Hook::default();
    let stopped = Arc::new(Control::default());
    stopped.stop();
    let error = volume.flatten(&stopped).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    assert_parent_stays(&mut f);
    flatten(&volume).unwrap_err();
    assert_parent_stays(&mut f);
    assert!(f.read(&volume, 0, model.len()) == model);
    flatten(&volume).unwrap_or_else(|e| panic!("{}", e.chain()));
    delete_parent(&mut f);
    assert!(f.read(&volume, 0, model.len()) == model);
    volume.close(LIMIT).unwrap();
    assert!(contents(&f) == model);
}

/// Right before the label is put: the next server has read it by then, and goes on as that of a clone.
#[test]
fn who_took_the_clone_over_meanwhile_keeps_its_parent() {
    let (mut f, mut model) = cloned();
    go(&mut f, "clone");
    let next: Later<Arc<Volume>> = Arc::default();
    let (runtime, url, into) = (f.handle(), f.url.clone(), next.clone());
    let take_over = move || {
        let options = VolumeOptions {
            lease: LeaseOptions {
                takeover: true,
                ..LeaseOptions::default()
            },
            ..VolumeOptions::default()
        };
        let opened = runtime.block_on(Volume::open(&url, &StoreOptions::default(), &options));
        assert!(into.set(opened.unwrap()).is_ok());
    };
    f.store_options.hook = Hook::new(AtRequest::new(puts_label, When::BeforeItIsSent, take_over));
    let first = f.open();
    f.store_options.hook = Hook::default();
    let error = flatten(&first).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Fenced, "{}", error.chain());
    assert_parent_stays(&mut f);
    let second = next.get().unwrap();
    assert!(f.read(second, 0, model.len()) == model);
    second.write(4096, &pattern(4, 9000), true).unwrap();
    model[4096..13096].copy_from_slice(&pattern(4, 9000));
    assert_eq!(flatten(second).unwrap().objects, 0, "all is copied");
    delete_parent(&mut f);
    assert!(f.read(second, 0, model.len()) == model);
    second.close(LIMIT).unwrap();
    let _ = first.close(LIMIT);
    assert!(contents(&f) == model);
}

#[test]
fn who_reads_the_clone_keeps_its_parent_until_it_has_ended() {
    let (mut f, model) = cloned();
    go(&mut f, "clone");
    let reader = f.open_read_only();
    let volume = f.open();
    for _ in 0..2 {
        let error = flatten(&volume).unwrap_err();
        assert!(error.to_string().contains("others read it"), "{error}");
        assert_parent_stays(&mut f);
    }
    assert!(f.read(&reader, 0, model.len()) == model);
    reader.close(LIMIT).unwrap();
    assert_eq!(flatten(&volume).unwrap().objects, 0, "all is copied");
    delete_parent(&mut f);
    assert!(f.read(&volume, 0, model.len()) == model);
    volume.close(LIMIT).unwrap();
    let reader = f.open_read_only();
    assert!(f.read(&reader, 0, model.len()) == model);
    reader.close(LIMIT).unwrap();
}

/// It had connected the parent, and nothing was known of it when the parent was told.
#[test]
fn a_reader_that_begins_while_the_clone_is_flattened_begins_again() {
    let (mut f, model) = cloned();
    let child = f.url_of("clone");
    let end_sharing = ending_of_sharing(&f, &child);
    let puts_pin = |method: &str, uri: &str| method == "PUT" && uri.contains("retention/pins/");
    f.store_options.hook = Hook::new(AtRequest::new(puts_pin, When::BeforeItIsSent, end_sharing));
    f.url = child;
    let options = VolumeOptions {
        read_only: true,
        ..VolumeOptions::default()
    };
    let opened = f.run(Volume::open(&f.url, &f.store_options, &options));
    f.store_options.hook = Hook::default();
    let error = opened.err().expect("what it would read is gone");
    assert!(error.to_string().contains("try again"), "{}", error.chain());
    assert!(f.meta_objects("retention/pins/").is_empty());
    let reader = f.open_read_only();
    assert!(f.read(&reader, 0, model.len()) == model);
    reader.close(LIMIT).unwrap();
}

/// Its pin has run out: the parent was told, and deleted, and another volume made there, with objects of the same names.
#[test]
fn a_reader_reads_nothing_of_a_volume_that_was_made_at_the_place_of_its_parent() {
    let (mut f, _) = cloned();
    let (place, other) = (f.url.clone(), f.url_of("other"));
    let options = admin::CreateOptions {
        size_bytes: 1 << 20,
        block_size_bytes: 4096,
    };
    f.run(admin::create(&other, &f.store_options, &options)).unwrap();
    go(&mut f, "clone");
    let reader = f.open_read_only();
    f.run(async {
        let parent = store::connect(&place, &f.store_options).await.unwrap();
        let other = store::connect(&other, &f.store_options).await.unwrap();
        let (label, _) = other.get(&other.meta_key("volume.json")).await.unwrap().unwrap();
        parent.put(&parent.meta_key("volume.json"), label).await.unwrap();
        for object in parent.list(&parent.data_key("")).await.unwrap() {
            let (body, _) = parent.get(&object.key).await.unwrap().unwrap();
            parent.put(&object.key, body).await.unwrap();
        }
    });
    let mut out = vec![0; 8192];
    let failed = reader.read(8192, &mut out).expect_err("it is of another volume");
    assert!(failed.chain().contains("was deleted"), "{}", failed.chain());
}

/// What the parent has removed since is missed by nobody.
#[test]
fn a_check_that_began_before_the_clone_was_flattened_finds_no_damage() {
    let (mut f, _) = cloned();
    let (place, child) = (f.url.clone(), f.url_of("clone"));
    go(&mut f, "clone");
    f.open().close(LIMIT).unwrap();
    let (runtime, lease, options) = (f.handle(), LeaseOptions::default(), StoreOptions::default());
    let of_child = child.clone();
    let end_sharing = move || {
        runtime.block_on(async {
            admin::flatten(&of_child, &options, &lease).await.unwrap();
            let parent = store::connect(&place, &options).await.unwrap();
            for object in parent.list(&parent.data_key("")).await.unwrap() {
                parent.delete(&object.key).await.unwrap();
            }
        });
    };
    let looks_at_list = |method: &str, uri: &str| method == "GET" && uri.contains("checkpoints");
    f.store_options.hook = Hook::new(AtRequest::new(looks_at_list, When::BeforeItIsSent, end_sharing));
    let control = Control::default();
    let checked = f.run(check::check(
        &child,
        &f.store_options,
        &Request::default(),
        &control,
    ));
    f.store_options.hook = Hook::default();
    let error = checked.expect_err("it looked for what its parent had");
    assert!(error.to_string().contains("try again"), "{}", error.chain());
    assert!(crate::check::check(&f, &Request::with_data()).problems.is_empty());
}

#[test]
fn a_volume_that_is_no_clone_is_not_flattened() {
    let (f, _) = cloned();
    let volume = f.open();
    let error = flatten(&volume).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    volume.close(LIMIT).unwrap();
}
