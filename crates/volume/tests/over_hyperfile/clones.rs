//! Clones: they read what their parents have and write what is their own, plain Hyperfile calls find nothing of what they share,
//! and a copy of one, or one whose parent is not there, is refused.

use hyperfile::file::hyper::Hyper;
use hyperfile::meta_format::BlockPtrFormat;
use hypernbd_volume::admin::rollback::rollback;
use hypernbd_volume::admin::{self, Cloned, IfDamaged};
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::past::{self, At};
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::url::VolumeUrl;
use hypernbd_volume::{ErrorKind, Volume, VolumeError};

use crate::faults::{AtRequest, LIMIT, When};
use crate::fixture::{Fixture, pattern};
use crate::resize::{FORMATS, made_elsewhere, resize};

/// From here on the fixture is the volume of this name beside the one it was made with.
pub fn go(f: &mut Fixture, name: &str) {
    f.url = f.url_of(name);
}

fn try_clone(f: &Fixture, at: Option<u64>, to: &str) -> Result<Cloned, VolumeError> {
    let at = at.map(At::Number);
    f.run(admin::clone(&f.url, &f.store_options, at.as_ref(), &f.url_of(to)))
}

pub fn clone(f: &Fixture, to: &str) -> Cloned {
    try_clone(f, None, to).unwrap()
}

pub fn delete(f: &Fixture) -> Result<(), VolumeError> {
    let lease = LeaseOptions::default();
    f.run(admin::delete(&f.url, &f.store_options, &lease, IfDamaged::Refuse))
        .map(drop)
}

pub fn contents(f: &Fixture) -> Vec<u8> {
    let volume = f.open();
    let bytes = f.read(&volume, 0, volume.size_bytes() as usize);
    volume.close(LIMIT).unwrap();
    bytes
}

pub fn write(f: &Fixture, model: &mut [u8], at: usize, bytes: &[u8]) {
    let volume = f.open();
    volume.write(at as u64, bytes, true).unwrap();
    volume.close(LIMIT).unwrap();
    model[at..at + bytes.len()].copy_from_slice(bytes);
}

pub fn newest(f: &Fixture) -> u64 {
    f.run(admin::info(&f.url, &f.store_options))
        .unwrap()
        .last_checkpoint
}

pub use crate::provenance::copy_dir as copy_directory;

/// Ends the sharing of a clone, and deletes its parent, the volume of the fixture.
pub fn ending_of_sharing(f: &Fixture, child: &VolumeUrl) -> impl FnOnce() + Send + 'static {
    let (parent, child) = (f.url.clone(), child.clone());
    let (runtime, lease, store) = (f.handle(), LeaseOptions::default(), StoreOptions::default());
    move || {
        runtime.block_on(async {
            admin::flatten(&child, &store, &lease).await.unwrap();
            admin::delete(&parent, &store, &lease, IfDamaged::Refuse)
                .await
                .unwrap();
        });
    }
}

/// A volume with two checkpoints at `vol`, and a clone of it at `clone`.
pub fn cloned() -> (Fixture, Vec<u8>) {
    let (f, mut model) = made_elsewhere(BlockPtrFormat::PartedSegment, 300_000);
    write(&f, &mut model, 5000, &pattern(2, 100_000));
    clone(&f, "clone");
    (f, model)
}

#[test]
fn a_clone_and_its_parent_go_their_own_ways() {
    for format in FORMATS {
        // A short last block, which the clone changes in part without having it.
        let (mut f, mut parent) = made_elsewhere(format, 3 * 1024 * 1024 + 1001);
        f.open().close(LIMIT).unwrap();
        let made = clone(&f, "clone");
        assert_eq!(
            (made.checkpoint, made.size_bytes),
            (newest(&f), parent.len() as u64)
        );
        let fork = parent.clone();
        let mut child = parent.clone();
        let end = parent.len();
        write(&f, &mut parent, end - 7, b"parent!");
        go(&mut f, "clone");
        let first = newest(&f);
        assert!(first > made.checkpoint, "{format:?}");
        assert!(contents(&f) == fork, "{format:?}");
        write(&f, &mut child, end - 3, b"end");
        write(&f, &mut child, end - 1001, b"start of the last block");
        write(&f, &mut child, 4096 * 100 + 5, &pattern(9, 70_000));
        assert!(contents(&f) == child, "{format:?}");
        let volume = f.open();
        volume.zero(end as u64 - 5000, 5000, true).unwrap();
        volume.close(LIMIT).unwrap();
        child[end - 5000..].fill(0);
        assert!(contents(&f) == child, "{format:?}");
        // Smaller by a part of a block that is inherited, and larger again: zeros.
        let cut = 2 * 1024 * 1024 + 77;
        resize(&f, cut, true).unwrap();
        resize(&f, end, false).unwrap();
        child[cut..].fill(0);
        assert!(contents(&f) == child, "{format:?}");
        // Back to where it began.
        let lease = LeaseOptions::default();
        f.run(rollback(&f.url, &f.store_options, &At::Number(first), &lease))
            .unwrap_or_else(|e| panic!("{format:?}: {e}, {:?}", f.objects()));
        assert!(contents(&f) == fork, "{format:?}");
        let error = f
            .run(rollback(&f.url, &f.store_options, &At::Number(first - 1), &lease))
            .unwrap_err();
        assert!(matches!(error, VolumeError::NoCheckpoint { .. }), "{error}");
        go(&mut f, "vol");
        assert!(contents(&f) == parent, "{format:?}");
    }
}

/// What is at or below the fork is the parent's, what is above it the clone's, whatever numbers the parent uses later.
#[test]
fn the_same_number_is_another_checkpoint_in_a_clone() {
    let (mut f, fork) = cloned();
    let (mut parent, mut child) = (fork.clone(), fork.clone());
    for seed in 10..14 {
        go(&mut f, "vol");
        write(&f, &mut parent, 0, &pattern(seed, 20_000));
        go(&mut f, "clone");
        assert!(contents(&f) == child);
        write(&f, &mut child, 8192, &pattern(100 + seed, 20_000));
        assert!(contents(&f) == child);
    }
    go(&mut f, "vol");
    assert!(contents(&f) == parent);
}

#[test]
fn plain_hyperfile_calls_fail_on_a_clone_and_read_no_zeros() {
    for format in FORMATS {
        let (mut f, model) = made_elsewhere(format, 3 * 1024 * 1024 + 1001);
        f.open().close(LIMIT).unwrap();
        clone(&f, "clone");
        go(&mut f, "clone");
        let read = f.with_hyper_opened(|mut file: Hyper<'static>| async move {
            let mut out = vec![0xEE; 4096];
            file.fs_read(0, &mut out).await.map(|_| out)
        });
        // The engine says InvalidData where an object of the index is gone, and NotFound where one of data is.
        let error = read.expect_err("nothing is there to be read").to_string();
        assert!(error.contains("NoSuchKey"), "{format:?}: {error}");
        assert!(contents(&f) == model, "{format:?}");
    }
}

#[test]
fn a_clone_is_taken_over_as_any_volume() {
    let (mut f, mut model) = cloned();
    go(&mut f, "clone");
    let first = f.open();
    first.write(0, &pattern(3, 9000), true).unwrap();
    model[..9000].copy_from_slice(&pattern(3, 9000));
    let second = f.take_over();
    assert!(f.read(&second, 0, model.len()) == model);
    second.write(4096, &pattern(4, 9000), true).unwrap();
    model[4096..13096].copy_from_slice(&pattern(4, 9000));
    first.write(0, b"lost", false).unwrap();
    assert_eq!(first.flush().unwrap_err().kind(), ErrorKind::Fenced);
    second.close(LIMIT).unwrap();
    let _ = first.close(LIMIT);
    assert!(contents(&f) == model);
}

#[test]
fn a_clone_of_a_clone_reads_from_both() {
    let (mut f, fork) = cloned();
    let mut child = fork.clone();
    go(&mut f, "clone");
    write(&f, &mut child, 50_000, &pattern(5, 50_000));
    clone(&f, "grandchild");
    let mut grandchild = child.clone();
    write(&f, &mut child, 60_000, &pattern(6, 10));
    go(&mut f, "grandchild");
    assert!(contents(&f) == grandchild);
    write(&f, &mut grandchild, 0, &pattern(7, 30_000));
    assert!(contents(&f) == grandchild);
    let info = f.run(admin::info(&f.url, &f.store_options)).unwrap();
    assert_eq!(info.clone_of.unwrap().url, f.url_of("clone").to_string());
    for name in ["vol", "clone"] {
        go(&mut f, name);
        let error = delete(&f).unwrap_err();
        assert!(matches!(error, VolumeError::HasClones { .. }), "{name}: {error}");
    }
    assert!(contents(&f) == child);
    for name in ["grandchild", "clone", "vol"] {
        go(&mut f, name);
        delete(&f).unwrap();
    }
}

#[test]
fn a_parent_is_deleted_after_its_clones() {
    let (mut f, model) = cloned();
    let error = delete(&f).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(
        error.to_string().contains(&f.url_of("clone").to_string()),
        "{error}"
    );
    assert!(contents(&f) == model, "nothing is gone");
    let info = f.run(admin::info(&f.url, &f.store_options)).unwrap();
    assert_eq!(info.clones.len(), 1);
    go(&mut f, "clone");
    assert!(contents(&f) == model);
    delete(&f).unwrap();
    go(&mut f, "vol");
    assert!(f.meta_objects("children/").is_empty());
    delete(&f).unwrap();
    assert!(f.objects().is_empty());
}

/// Somebody who is making a clone, and sleeps, cannot end that once the parent was deleted.
#[test]
fn an_entry_without_a_clone_is_no_clone_and_cannot_become_one() {
    let (mut f, _) = cloned();
    go(&mut f, "clone");
    let store = f.store().unwrap();
    let key = store.data_key("inode");
    let (inode, _) = f.run(store.get(&key)).unwrap().unwrap();
    f.remove("inode");
    go(&mut f, "vol");
    delete(&f).unwrap();
    go(&mut f, "clone");
    let late = f.run(store.put_create_only(&key, inode)).unwrap_err();
    assert_eq!(VolumeError::from(late).kind(), ErrorKind::AlreadyExists);
    assert!(try_clone(&f, None, "other").is_err());
    delete(&f).unwrap();
    assert!(f.objects().is_empty());
}

#[test]
fn a_clone_that_cannot_be_looked_at_keeps_its_parent() {
    let (f, model) = cloned();
    std::fs::rename(f.path_of("clone"), f.path_of("elsewhere")).unwrap();
    let error = delete(&f).unwrap_err();
    assert!(matches!(error, VolumeError::HasClones { .. }), "{error}");
    assert!(error.to_string().contains("cannot be told"), "{error}");
    assert!(contents(&f) == model);
}

#[test]
fn a_copy_of_a_clone_is_refused() {
    let (mut f, model) = cloned();
    copy_directory(&f.path_of("clone"), &f.path_of("copy"));
    std::fs::rename(f.path_of("clone"), f.path_of("moved")).unwrap();
    for name in ["copy", "moved"] {
        go(&mut f, name);
        let error = f.try_open().err().unwrap();
        assert!(matches!(error, VolumeError::Parent { .. }), "{error}");
        assert!(error.to_string().contains("it was made at"), "{error}");
        let listed = f.run(past::list(&f.url, &f.store_options, 0, u64::MAX));
        assert!(listed.is_err(), "{listed:?}");
    }
    // Nothing of the original's is gone with the copy.
    go(&mut f, "copy");
    delete(&f).unwrap();
    std::fs::rename(f.path_of("moved"), f.path_of("clone")).unwrap();
    go(&mut f, "clone");
    assert!(contents(&f) == model);
}

#[test]
fn a_clone_whose_parent_is_not_there_is_refused() {
    let (mut f, model) = cloned();
    let refused = |f: &mut Fixture, why: &str| {
        go(f, "clone");
        let error = f.try_open().err().unwrap();
        assert!(matches!(error, VolumeError::Parent { .. }), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    };
    // Moved away, and another volume in its place.
    std::fs::rename(f.path_of("vol"), f.path_of("moved")).unwrap();
    refused(&mut f, "is not at");
    go(&mut f, "vol");
    f.create(1 << 20, 4096);
    refused(&mut f, "that is volume");
    go(&mut f, "vol");
    delete(&f).unwrap();
    let _ = std::fs::remove_dir_all(f.path_of("vol"));
    std::fs::rename(f.path_of("moved"), f.path_of("vol")).unwrap();
    go(&mut f, "clone");
    assert!(contents(&f) == model);
    // It was put back to before the fork, and has used the numbers again.
    go(&mut f, "other");
    f.create(300_000, 4096);
    let mut other = vec![0; 300_000];
    write(&f, &mut other, 0, b"another");
    write(&f, &mut other, 0, b"history");
    let object = |f: &Fixture| f.store().unwrap().data_key("0000000002.0");
    let key = object(&f);
    let (of_other, _) = f.run(f.store().unwrap().get(&key)).unwrap().unwrap();
    go(&mut f, "vol");
    assert_eq!(newest(&f), 2);
    copy_directory(&f.path_of("vol"), &f.path_of("kept"));
    f.run(f.store().unwrap().put(&object(&f), of_other)).unwrap();
    refused(&mut f, "does not have the checkpoint");
    std::fs::remove_dir_all(f.path_of("vol")).unwrap();
    std::fs::rename(f.path_of("kept"), f.path_of("vol")).unwrap();
    // It keeps nothing for the clone.
    go(&mut f, "vol");
    let entry = f.meta_objects("children/").remove(0);
    f.remove_meta(&entry);
    refused(&mut f, "does not know of it");
}

#[test]
fn what_is_in_the_way_of_a_clone_is_named_and_left() {
    let (mut f, model) = cloned();
    let error = try_clone(&f, None, "clone").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    for (to, why) in [("vol", "onto itself"), ("vol/inside", "inside")] {
        let error = try_clone(&f, None, to).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    let error = try_clone(&f, Some(77), "other").unwrap_err();
    assert!(matches!(error, VolumeError::NoCheckpoint { .. }), "{error}");
    assert!(!f.path_of("other").exists());
    assert_eq!(f.meta_objects("children/").len(), 1);
    go(&mut f, "clone");
    assert!(contents(&f) == model);
    go(&mut f, "empty");
    f.create(1 << 20, 4096);
    assert!(try_clone(&f, None, "other").is_err(), "nothing was published");
}

/// A refusal may be the answer to a second sending, and then the clone is there and in use.
#[test]
fn a_clone_that_is_in_use_is_not_taken_back() {
    let (mut f, mut model) = cloned();
    let url = f.url_of("second");
    let runtime = f.handle();
    let write = move || {
        let (store, options) = (StoreOptions::default(), VolumeOptions::default());
        let volume = runtime.block_on(Volume::open(&url, &store, &options)).unwrap();
        volume.write(0, b"mine", true).unwrap();
        volume.close(LIMIT).unwrap();
    };
    let sent_twice = AtRequest::inode(When::Stored, write).answered(412, "PreconditionFailed");
    f.store_options.hook = Hook::new(sent_twice);
    let error = try_clone(&f, None, "second").unwrap_err();
    f.store_options.hook = Hook::default();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    go(&mut f, "second");
    model[..4].copy_from_slice(b"mine");
    assert!(contents(&f) == model);
    go(&mut f, "clone");
    delete(&f).unwrap();
    go(&mut f, "vol");
    let error = delete(&f).unwrap_err();
    assert!(matches!(error, VolumeError::HasClones { .. }), "{error}");
}

/// Whoever waited for the lease of a flatten reads nothing from the parent, which keeps nothing for it any more.
#[test]
fn a_server_that_begins_while_the_clone_is_flattened_shares_nothing() {
    let (mut f, model) = cloned();
    let child = f.url_of("clone");
    let end_sharing = ending_of_sharing(&f, &child);
    let is_it = |method: &str, uri: &str| method == "PUT" && uri.contains(".meta/lease");
    f.store_options.hook = Hook::new(AtRequest::new(is_it, When::BeforeItIsSent, end_sharing));
    f.url = child;
    let volume = f.open();
    assert!(f.read(&volume, 0, model.len()) == model);
    volume.close(LIMIT).unwrap();
    f.store_options.hook = Hook::default();
    assert!(contents(&f) == model);
}

/// A label that was lost is made anew with another id; what the clone shares is told by its origin.
#[test]
fn a_clone_whose_label_was_lost_keeps_its_parent() {
    let (mut f, model) = cloned();
    go(&mut f, "clone");
    let store = f.store().unwrap();
    let key = store.meta_key("volume.json");
    let (label, _) = f.run(store.get(&key)).unwrap().unwrap();
    let mut anew: serde_json::Value = serde_json::from_slice(&label).unwrap();
    anew["volume_id"] = "423a30c5-ce77-40c3-9299-a143d31c733a".into();
    f.run(store.put(&key, anew.to_string())).unwrap();
    go(&mut f, "vol");
    let error = delete(&f).unwrap_err();
    assert!(matches!(error, VolumeError::HasClones { .. }), "{error}");
    f.run(store.put(&key, label)).unwrap();
    go(&mut f, "clone");
    assert!(contents(&f) == model);
}
