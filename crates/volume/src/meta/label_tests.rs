//! Copies, moves and labels of earlier releases.

use super::*;
use crate::store::options::StoreOptions;

async fn store_at(path: &std::path::Path) -> Store {
    let url = VolumeUrl::parse(&format!("file://{}/", path.display())).unwrap();
    crate::store::connect_for_create(&url, &StoreOptions::default())
        .await
        .unwrap()
}

fn origin(bits: u64) -> InodeCheck {
    InodeCheck::from_bits(bits)
}

/// The stored label after [`settle`].
async fn settled(store: &Store, adopt: bool) -> Label {
    let found = find(store).await.unwrap();
    let label = settle(store, found, None, adopt).await.unwrap();
    assert_eq!(load(store).await.unwrap().as_ref(), Some(&label), "stored");
    label
}

/// Stores `label` as it would be in a copy of its volume.
async fn copy_to(path: &std::path::Path, label: &Label) -> Store {
    let store = store_at(path).await;
    store
        .put(&store.meta_key(NAME), label.encode().unwrap())
        .await
        .unwrap();
    store
}

#[tokio::test]
async fn a_copy_gets_an_id_of_its_own_once_and_a_moved_volume_keeps_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let original = store_at(&dir.path().join("original")).await;
    let made = make(&original, origin(1)).await.unwrap();
    assert_eq!(settled(&original, false).await, made, "nothing to bring up");

    let copied = copy_to(&dir.path().join("copied"), &made).await;
    assert!(find(&copied).await.unwrap().unwrap().is_elsewhere());
    let copy = settled(&copied, false).await;
    assert_ne!(copy.volume_id, made.volume_id);
    assert_eq!((&copy.parent, copy.origin), (&Some(made.volume_id), made.origin));
    assert_eq!(settled(&copied, false).await, copy, "once");

    let moved = copy_to(&dir.path().join("moved"), &made).await;
    let label = settled(&moved, true).await;
    assert_eq!((&label.volume_id, &label.parent), (&made.volume_id, &None));
    assert_ne!(label.place, made.place);
    assert_eq!(settled(&moved, false).await, label, "it is at home now");
}

#[tokio::test]
async fn a_renamed_directory_is_no_copy() {
    let dir = tempfile::tempdir().unwrap();
    let original = store_at(&dir.path().join("original")).await;
    let made = make(&original, origin(1)).await.unwrap();
    drop(original);
    std::fs::rename(dir.path().join("original"), dir.path().join("renamed")).unwrap();
    let renamed = store_at(&dir.path().join("renamed")).await;
    assert_eq!(settled(&renamed, false).await, made);
}

#[tokio::test]
async fn labels_of_earlier_releases_are_marked_where_they_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(&dir.path().join("vol")).await;
    let id = "0192d6a8-0000-7000-8000-000000000001";
    let body = format!(r#"{{"volume_id":"{id}","created_ms":7}}"#);
    store.put(&store.meta_key(NAME), body).await.unwrap();
    let found = find(&store).await.unwrap();
    assert!(!found.as_ref().unwrap().is_elsewhere());
    let unpublished = Some(Unpublished(origin(9)));
    let label = settle(&store, found, unpublished, false).await.unwrap();
    assert_eq!((label.volume_id.to_string().as_str(), label.created_ms), (id, 7));
    assert!(label.place.is_some() && label.parent.is_none());
    assert_eq!(label.origin, Some(origin(9)));
}

#[test]
fn places_are_told_apart_as_far_as_a_file_system_tells() {
    let at = |inode, born_ns| Location::Directory { inode, born_ns };
    assert!(at(1, Some(5)).is_same(&at(1, Some(5))));
    assert!(!at(1, Some(5)).is_same(&at(1, Some(6))));
    assert!(!at(1, Some(5)).is_same(&at(2, Some(5))));
    assert!(
        at(1, None).is_same(&at(1, Some(6))),
        "not every file system tells"
    );
    let bucket = |bucket: &str, prefix: &str| Location::Bucket {
        bucket: bucket.into(),
        prefix: prefix.into(),
    };
    assert!(bucket("a", "b").is_same(&bucket("a", "b")));
    assert!(!bucket("a", "b").is_same(&bucket("a", "c")));
    assert!(!bucket("a", "b").is_same(&at(1, None)));
}

/// The id in a label becomes a directory's name, so nothing but a valid id is accepted.
#[tokio::test]
async fn a_label_with_something_else_for_an_id_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(&dir.path().join("vol")).await;
    for id in ["/etc", "../x", "", "x"] {
        let body = format!(r#"{{"volume_id":"{id}","created_ms":7}}"#);
        store.put(&store.meta_key(NAME), body).await.unwrap();
        let refused = load(&store).await.unwrap_err();
        assert!(matches!(refused, VolumeError::Corrupt { .. }), "{id}: {refused}");
    }
}

/// Of two creations at one place, one fails in the store, and the other makes its label before the first has cleaned
/// up.
#[tokio::test]
async fn a_creation_that_failed_takes_away_its_own_label_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(&dir.path().join("vol")).await;
    let failed = Label::new(&store, Some(origin(1))).unwrap();
    withdraw(&store, &failed).await.unwrap();
    let others = make(&store, origin(1)).await.unwrap();
    withdraw(&store, &failed).await.unwrap();
    assert_eq!(load(&store).await.unwrap(), Some(others.clone()));
    withdraw(&store, &others).await.unwrap();
    assert_eq!(load(&store).await.unwrap(), None);
}

/// The label as releases before clones read it.
#[derive(Debug, Deserialize)]
struct OldLabel {
    volume_id: VolumeId,
    created_ms: u64,
}

#[tokio::test]
async fn a_release_that_knows_no_clones_refuses_one_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(dir.path()).await;
    let plain = Label::new(&store, None).unwrap();
    let old: OldLabel = serde_json::from_slice(&plain.encode().unwrap()).unwrap();
    assert_eq!(
        (old.volume_id, old.created_ms),
        (plain.volume_id, plain.created_ms)
    );
    let clone = Label {
        is_clone: true,
        deletion: Some(7),
        ..plain.clone()
    };
    let stored = clone.encode().unwrap();
    assert_eq!(Label::decode(&stored), Ok(clone));
    let refused = serde_json::from_slice::<OldLabel>(&stored)
        .unwrap_err()
        .to_string();
    assert!(refused.contains("a clone, which takes hypernbd"), "{refused}");
    // Nothing in between is taken.
    let text = String::from_utf8(stored).unwrap();
    for (from, to) in [("a clone", "a clown"), ("made_ms", "mode_ms")] {
        assert!(Label::decode(text.replace(from, to).as_bytes()).is_err(), "{to}");
    }
}

/// Between the look at the lease and that at the label another clone may have been made at the place.
#[tokio::test]
async fn the_sharing_of_another_volume_does_not_end() {
    let dir = tempfile::tempdir().unwrap();
    let store = store_at(&dir.path().join("vol")).await;
    let clone = Label {
        is_clone: true,
        ..Label::new(&store, None).unwrap()
    };
    make_this(&store, clone.clone()).await.unwrap();
    let ended = end_sharing(&store, VolumeId::random()).await;
    assert!(matches!(ended, Err(VolumeError::Interfered { .. })), "{ended:?}");
    assert_eq!(load(&store).await.unwrap().as_ref(), Some(&clone));
    end_sharing(&store, clone.volume_id).await.unwrap();
    assert!(!load(&store).await.unwrap().unwrap().is_clone);
}
