//! What happens to clones, copies and those who make or delete them while somebody else is at work at the same place. What a
//! directory cannot show, because it goes with the volume, is in tests/e2e/test_clones_at_risk.py.

use hypernbd_volume::admin::{self, Cloned, IfDamaged};
use hypernbd_volume::options::{LeaseOptions, StoreOptions, VolumeOptions};
use hypernbd_volume::store;
use hypernbd_volume::store::hook::Hook;
use hypernbd_volume::{ErrorKind, Volume, VolumeError, VolumeUrl};

use crate::clones::{clone, cloned, contents, copy_directory, delete, go, write};
use crate::faults::{AtRequest, LIMIT, When};
use crate::fixture::{Fixture, pattern};
use crate::resize::resize;

/// The two kinds of clone.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Linked,
    Full,
}

fn make(f: &Fixture, kind: Kind, to: &VolumeUrl) -> Result<Cloned, VolumeError> {
    match kind {
        Kind::Linked => f.run(admin::clone(&f.url, &f.store_options, None, to)),
        Kind::Full => f.run(admin::clone_full(&f.url, &f.store_options, None, to)),
    }
}

async fn delete_at(url: &VolumeUrl) {
    let (store, lease) = (StoreOptions::default(), LeaseOptions::default());
    admin::delete(url, &store, &lease, IfDamaged::Refuse)
        .await
        .unwrap();
}

#[test]
fn a_clone_whose_last_answer_alone_was_lost_is_made() {
    for kind in [Kind::Linked, Kind::Full] {
        let (mut f, model) = cloned();
        let to = f.url_of("other");
        let lost = AtRequest::inode(When::Stored, || {}).answered(400, "InvalidRequest");
        f.store_options.hook = Hook::new(lost);
        let made = make(&f, kind, &to);
        f.store_options.hook = Hook::default();
        assert!(made.is_ok(), "{kind:?}: {}", made.unwrap_err().chain());
        go(&mut f, "other");
        assert!(contents(&f) == model, "{kind:?}");
    }
}

/// What keeps a late request from making the clone is no volume, and can be taken away.
#[test]
fn a_place_that_was_given_up_is_free_once_it_is_deleted() {
    for kind in [Kind::Linked, Kind::Full] {
        let (mut f, model) = cloned();
        let to = f.url_of("other");
        f.store_options.hook = Hook::new(AtRequest::inode(When::BeforeItIsSent, || {}).refused());
        make(&f, kind, &to).unwrap_err();
        f.store_options.hook = Hook::default();
        let error = make(&f, kind, &to).unwrap_err();
        assert!(
            matches!(error, VolumeError::Leftovers { .. }),
            "{kind:?}: {error}"
        );
        go(&mut f, "other");
        let error = f.run(admin::info(&f.url, &f.store_options)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound, "{kind:?}: {error}");
        delete(&f).unwrap_or_else(|e| panic!("{kind:?}: {}", e.chain()));
        go(&mut f, "vol");
        make(&f, kind, &to).unwrap();
        go(&mut f, "other");
        assert!(contents(&f) == model, "{kind:?}");
    }
}

/// Somebody deletes what is being made, and makes another volume there, right before the check values of a copy are put.
#[test]
fn a_full_clone_puts_no_check_values_over_those_of_another_volume() {
    let mut f = Fixture::new();
    f.create(8 << 20, 4096);
    let volume = f.open();
    // So large that it is uploaded in parts, and its check values lie beside it.
    volume.write(0, &pattern(1, 6 << 20), true).unwrap();
    volume.close(LIMIT).unwrap();
    let key = f.meta_objects("sums/").pop().expect("check values");
    let to = f.url_of("other");
    let (runtime, at, sums) = (f.handle(), to.clone(), key.clone());
    let make_anew = move || {
        runtime.block_on(async {
            let store = store::connect(&at, &StoreOptions::default()).await.unwrap();
            let label = r#"{"volume_id":"00000000-0000-4000-8000-000000000001","created_ms":1}"#;
            store.put(&store.meta_key("volume.json"), label).await.unwrap();
            store.put(&sums, "of the other volume").await.unwrap();
        });
    };
    let is_it = |method: &str, uri: &str| method == "PUT" && uri.contains("sums/");
    f.store_options.hook = Hook::new(AtRequest::new(is_it, When::BeforeItIsSent, make_anew));
    let error = make(&f, Kind::Full, &to).unwrap_err();
    f.store_options.hook = Hook::default();
    assert!(matches!(error, VolumeError::Interfered { .. }), "{error}");
    go(&mut f, "other");
    let store = f.store().unwrap();
    let (there, _) = f.run(store.get(&key)).unwrap().unwrap();
    assert_eq!(there, "of the other volume");
}

/// They were copied along, and share the original's objects.
#[test]
fn a_copy_does_not_take_the_originals_clones_for_its_own() {
    for was_opened in [false, true] {
        let (mut f, model) = cloned();
        for name in ["copy", "later"] {
            copy_directory(&f.path_of("vol"), &f.path_of(name));
        }
        let delete_copy = |f: &mut Fixture, name: &str| {
            go(f, name);
            if was_opened {
                assert!(contents(f) == model);
                // Its own clone is one.
                clone(f, "of-copy");
                let error = delete(f).unwrap_err().to_string();
                assert!(error.contains("of-copy") && !error.contains("/clone/"), "{error}");
                go(f, "of-copy");
                assert!(contents(f) == model);
                delete(f).unwrap();
                go(f, name);
            }
            delete(f).unwrap_or_else(|e| panic!("opened: {was_opened}: {}", e.chain()));
        };
        delete_copy(&mut f, "copy");
        for name in ["clone", "vol"] {
            go(&mut f, name);
            assert!(contents(&f) == model, "{name}");
        }
        let error = delete(&f).unwrap_err();
        assert!(matches!(error, VolumeError::HasClones { .. }), "{error}");
        go(&mut f, "clone");
        delete(&f).unwrap();
        // The clone's place is somebody's to use again.
        go(&mut f, "later");
        for entry in f.meta_objects("children/") {
            let store = f.store().unwrap();
            let (body, _) = f.run(store.get(&entry)).unwrap().unwrap();
            let mut old: serde_json::Value = serde_json::from_slice(&body).unwrap();
            old["made_ms"] = 1.into();
            f.run(store.put(&entry, old.to_string())).unwrap();
        }
        delete_copy(&mut f, "later");
        go(&mut f, "clone");
        f.create(1 << 20, 4096);
        go(&mut f, "vol");
        delete(&f).unwrap();
    }
}

/// A volume that was put back in its place by a copy, and opened as one, is still what its clones read from.
#[test]
fn a_volume_that_was_replaced_by_a_copy_of_itself_keeps_its_clones() {
    let (mut f, model) = cloned();
    copy_directory(&f.path_of("vol"), &f.path_of("backup"));
    std::fs::rename(f.path_of("vol"), f.path_of("old")).unwrap();
    std::fs::rename(f.path_of("backup"), f.path_of("vol")).unwrap();
    assert!(contents(&f) == model);
    assert_eq!(f.meta_objects("children/").len(), 1);
    let error = delete(&f).unwrap_err();
    assert!(matches!(error, VolumeError::HasClones { .. }), "{error}");
    // Its label is put back.
    std::fs::remove_dir_all(f.path_of("vol")).unwrap();
    std::fs::rename(f.path_of("old"), f.path_of("vol")).unwrap();
    go(&mut f, "clone");
    assert!(contents(&f) == model);
}

/// The entries of clones as they are that long after the clones were begun.
fn let_a_day_pass(f: &Fixture) {
    let store = f.store().unwrap();
    for entry in f.meta_objects("children/") {
        let (body, _) = f.run(store.get(&entry)).unwrap().unwrap();
        let mut old: serde_json::Value = serde_json::from_slice(&body).unwrap();
        old["made_ms"] = 1.into();
        f.run(store.put(&entry, old.to_string())).unwrap();
    }
}

/// Whoever made it was killed before its inode was put: there is nothing that could be deleted.
#[test]
fn a_clone_that_was_never_made_keeps_nothing_for_ever() {
    for verb in ["prune", "flatten"] {
        let (mut f, model) = cloned();
        let of = match verb {
            "prune" => "vol",
            _ => "clone",
        };
        go(&mut f, of);
        clone(&f, "half");
        go(&mut f, "half");
        let store = f.store().unwrap();
        let key = store.data_key("inode");
        let (late, _) = f.run(store.get(&key)).unwrap().unwrap();
        f.remove("inode");
        go(&mut f, of);
        let entries = f.meta_objects("children/").len();
        let lease = LeaseOptions::default();
        let run = || match verb {
            "prune" => f
                .run(admin::retention::prune(&f.url, &f.store_options, &lease))
                .map(drop),
            _ => f.run(admin::flatten(&f.url, &f.store_options, &lease)).map(drop),
        };
        // Somebody may be making it still.
        assert_eq!(run().is_ok(), verb == "prune");
        assert_eq!(f.meta_objects("children/").len(), entries, "{verb}");
        let_a_day_pass(&f);
        run().unwrap_or_else(|e| panic!("{verb}: {}", e.chain()));
        assert_eq!(f.meta_objects("children/").len(), entries - 1, "{verb}");
        let refused = f.run(store.put_create_only(&key, late)).unwrap_err();
        assert_eq!(VolumeError::from(refused).kind(), ErrorKind::AlreadyExists);
        // One that is there is another matter, however old it is.
        go(&mut f, "clone");
        assert!(contents(&f) == model, "{verb}");
    }
}

/// By whatever path the volume is reached: its clones are its own.
#[test]
fn a_volume_by_another_path_keeps_its_clones() {
    let (mut f, model) = cloned();
    std::os::unix::fs::symlink(f.path_of("vol"), f.path_of("link")).unwrap();
    go(&mut f, "link");
    let error = delete(&f).unwrap_err();
    assert!(matches!(error, VolumeError::HasClones { .. }), "{error}");
    go(&mut f, "clone");
    assert!(contents(&f) == model);
}

/// Another id would shut all its clones out.
#[test]
fn a_parent_that_lost_its_label_gets_no_other_id_and_its_clones_go_on() {
    let (mut f, model) = cloned();
    let id = |f: &Fixture| {
        let info = f.run(admin::info(&f.url, &f.store_options)).unwrap();
        info.volume_id.map(|id| id.to_string())
    };
    let before = id(&f).unwrap();
    f.remove_meta("volume.meta/volume.json");
    let lease = LeaseOptions::default();
    let refused = |f: &Fixture| {
        let clone = f.run(admin::clone(&f.url, &f.store_options, None, &f.url_of("other")));
        let pruned = f.run(admin::retention::prune(&f.url, &f.store_options, &lease));
        let errors = [f.try_open().err(), clone.err(), pruned.err()];
        assert_eq!(id(f), None);
        errors.map(|error| {
            let error = error.unwrap();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
            error.to_string()
        })
    };
    for said in refused(&f) {
        assert!(said.contains(&before) && said.contains("adopt=yes"), "{said}");
    }
    let deleted = admin::delete(&f.url, &f.store_options, &lease, IfDamaged::Delete);
    let error = f.run(deleted).unwrap_err();
    assert!(matches!(error, VolumeError::HasClones { .. }), "{error}");
    assert_eq!(id(&f), None, "nor by a deletion that was refused");
    go(&mut f, "clone");
    assert!(contents(&f) == model);
    // Nobody tells the id.
    std::fs::rename(f.path_of("clone"), f.path_of("elsewhere")).unwrap();
    go(&mut f, "vol");
    for said in refused(&f) {
        assert!(said.contains("none of them tells"), "{said}");
    }
    std::fs::rename(f.path_of("elsewhere"), f.path_of("clone")).unwrap();
    let options = VolumeOptions {
        adopt: true,
        ..VolumeOptions::default()
    };
    let opened = f.run(Volume::open(&f.url, &f.store_options, &options));
    opened.unwrap().close(LIMIT).unwrap();
    assert_eq!(id(&f), Some(before));
    for name in ["vol", "clone"] {
        go(&mut f, name);
        assert!(contents(&f) == model, "{name}");
    }
}

#[test]
fn a_deletion_that_is_refused_leaves_no_lease() {
    let (f, model) = cloned();
    let error = delete(&f).unwrap_err();
    assert!(matches!(error, VolumeError::HasClones { .. }), "{error}");
    let info = f.run(admin::info(&f.url, &f.store_options)).unwrap();
    assert!(!info.lease.is_some_and(|lease| lease.is_held()));
    assert!(contents(&f) == model);
}

/// What waited for the lease of a flatten changes nothing by what it has seen of the parent.
#[test]
fn a_command_that_waited_for_a_flatten_is_to_be_given_again() {
    let (mut f, mut model) = cloned();
    let (parent, child) = (f.url.clone(), f.url_of("clone"));
    let (runtime, of_child) = (f.handle(), child.clone());
    let end_sharing = move || {
        runtime.block_on(async {
            let (store, lease) = (StoreOptions::default(), LeaseOptions::default());
            admin::flatten(&of_child, &store, &lease).await.unwrap();
            delete_at(&parent).await;
        });
    };
    let is_it = |method: &str, uri: &str| method == "PUT" && uri.contains(".meta/lease");
    f.url = child;
    f.store_options.hook = Hook::new(AtRequest::new(is_it, When::BeforeItIsSent, end_sharing));
    let error = resize(&f, 100_100, true).unwrap_err();
    f.store_options.hook = Hook::default();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{}", error.chain());
    assert!(error.to_string().contains("give the command again"), "{error}");
    assert!(contents(&f) == model, "nothing was changed");
    resize(&f, 100_100, true).unwrap();
    model.truncate(100_100);
    write(&f, &mut model, 100, b"more");
    assert!(contents(&f) == model);
}
