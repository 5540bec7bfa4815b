//! Reaching a store: what is missing is said and never made.

use super::*;
use StoreErrorKind::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_directory_is_said_and_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("typo");
    let error = connect(&file_url(&path), &StoreOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind, NotFound);
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    assert!(!path.exists());

    let error = connect(&file_url(dir.path()), &StoreOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind, NotFound, "a directory that is no store: {error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_with_other_things_is_not_made_a_store() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("thesis.tex"), "x").unwrap();
    let error = connect_for_create(&file_url(dir.path()), &StoreOptions::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("thesis.tex"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// Names prove nothing: what somebody else called so is kept, and the directory stays as it was found.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_with_things_that_are_called_as_ours_is_not_made_a_store() {
    for (name, is_dir) in [
        ("scratch", true),
        ("objects", true),
        ("lock", false),
        ("hypernbd-store.new", false),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        if is_dir {
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("thesis.tex"), "x").unwrap();
        } else {
            std::fs::write(&path, "mine").unwrap();
        }
        let refused = connect_for_create(&file_url(dir.path()), &StoreOptions::default()).await;
        assert!(refused.unwrap_err().to_string().contains(name));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let kept = if is_dir { path.join("thesis.tex") } else { path };
        assert!(!std::fs::read(kept).unwrap().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_made_for_a_look_leaves_directories_as_they_were() {
    let dir = tempfile::tempdir().unwrap();
    for (path, first_made) in [("", None), ("a/b/c", Some("a"))] {
        let url = file_url(&dir.path().join(path));
        let made = connect_for_create(&url, &StoreOptions::default()).await.unwrap();
        assert!(made.remove_if_empty(Directory::AsFound).await.unwrap());
        assert!(dir.path().exists(), "it was there");
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "{first_made:?}"
        );
    }
}

/// What somebody else put into a store is not removed with it, and a store that was there before is not removed by a look.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_goes_leaves_what_is_not_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vol");
    let store = connect_for_create(&file_url(&path), &StoreOptions::default())
        .await
        .unwrap();
    drop(store);
    let mine = path.join("scratch/mine");
    let named = path
        .join("scratch")
        .join(uuid::Uuid::new_v4().hyphenated().to_string());
    for foreign in [&mine, &named] {
        std::fs::create_dir(foreign).unwrap();
        std::fs::write(foreign.join("thesis.tex"), "x").unwrap();
    }
    let found = connect_for_create(&file_url(&path), &StoreOptions::default())
        .await
        .unwrap();
    assert!(
        !found.remove_if_empty(Directory::AsFound).await.unwrap(),
        "it was there before"
    );
    found.put(&found.data_key("inode"), "x").await.unwrap();
    found.delete(&found.data_key("inode")).await.unwrap();
    assert!(found.remove_if_empty(Directory::Removed).await.unwrap());
    for foreign in [&mine, &named] {
        assert!(foreign.join("thesis.tex").exists(), "{}", foreign.display());
    }
    assert!(!path.join("objects").exists());
}

/// Nothing else is there before the first file is whole. A creation that is killed later: see `crash`.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_hardly_begun_is_made_and_what_was_not_begun_is_somebodys() {
    for text in ["", "Objects of a hypern"] {
        let dir = tempfile::tempdir().unwrap();
        let begun = dir.path().join("hypernbd-store.new");
        std::fs::write(&begun, text).unwrap();
        std::fs::write(dir.path().join("lock"), "mine").unwrap();
        let refused = connect_for_create(&file_url(dir.path()), &StoreOptions::default()).await;
        assert!(refused.unwrap_err().to_string().contains("lock"), "{text:?}");
        std::fs::remove_file(dir.path().join("lock")).unwrap();
        let store = connect_for_create(&file_url(dir.path()), &StoreOptions::default())
            .await
            .unwrap();
        store.put(&store.data_key("inode"), "x").await.unwrap();
        assert!(!begun.exists());
    }
}

/// A directory that is away for a moment (unmounted, renamed) says nothing of what is in it.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_absent_while_the_directory_is_away() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vol");
    let store = connect_for_create(&file_url(&path), &StoreOptions::default())
        .await
        .unwrap();
    let key = store.data_key("inode");
    let etag = store.put(&key, "inode").await.unwrap();
    for is_place_left in [false, true] {
        for away in [path.clone(), path.join("objects")] {
            let kept = dir.path().join("kept");
            std::fs::rename(&away, &kept).unwrap();
            if is_place_left {
                // Where it was mounted.
                std::fs::create_dir(&away).unwrap();
            }
            let missing = store.data_key("missing");
            let answers = [
                store.head(&key).await.map(drop),
                store.get(&key).await.map(drop),
                store.list("").await.map(drop),
                store.put_if_match(&key, "later", &etag).await.map(drop),
                store.put_create_only(&missing, "new").await.map(drop),
                store.delete(&missing).await.map(drop),
            ];
            for answer in answers {
                assert_eq!(answer.unwrap_err().kind, Unreachable, "{}", away.display());
            }
            if is_place_left {
                std::fs::remove_dir_all(&away).unwrap();
            }
            std::fs::rename(&kept, &away).unwrap();
            assert_eq!(store.get(&key).await.unwrap().unwrap().1, etag);
            assert!(store.get(&missing).await.unwrap().is_none());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_is_made_once_found_again_and_removed_when_empty() {
    let dir = tempfile::tempdir().unwrap();
    let url = file_url(&dir.path().join("a/b/vol"));
    let made = connect_for_create(&url, &StoreOptions::default()).await.unwrap();
    let key = made.data_key("inode");
    made.put(&key, "inode").await.unwrap();
    let found = connect(&url, &StoreOptions::default()).await.unwrap();
    let again = connect_for_create(&url, &StoreOptions::default()).await.unwrap();
    for store in [&found, &again] {
        assert_eq!(store.get(&key).await.unwrap().unwrap().0, Bytes::from("inode"));
    }
    assert!(!found.remove_if_empty(Directory::Removed).await.unwrap());
    found.delete(&key).await.unwrap();
    assert!(found.remove_if_empty(Directory::Removed).await.unwrap());
    assert!(!dir.path().join("a/b/vol").exists());
    assert_eq!(
        connect(&url, &StoreOptions::default()).await.unwrap_err().kind,
        NotFound
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_can_be_read_without_changing_anything() {
    let Tested { store, dir } = file_store().await;
    let path = dir.as_ref().unwrap().path().join("vol");
    let key = store.data_key("inode");
    store.put(&key, "inode").await.unwrap();
    drop(store);
    let entries = || {
        let mut all: Vec<_> = std::fs::read_dir(path.join("scratch"))
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect();
        all.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        all.sort();
        all
    };
    let before = entries();
    let store = connect(&file_url(&path), &StoreOptions::default()).await.unwrap();
    assert_eq!(store.get(&key).await.unwrap().unwrap().0, Bytes::from("inode"));
    assert_eq!(store.list("").await.unwrap().len(), 1);
    assert_eq!(entries(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_ended_leaves_nothing_of_its_process_and_takes_no_change() {
    let Tested { store, dir } = file_store().await;
    let scratch = dir.as_ref().unwrap().path().join("vol/scratch");
    let scratches = || std::fs::read_dir(&scratch).unwrap().count();
    let (key, clone) = (store.data_key("inode"), store.clone());
    store.put(&key, "inode").await.unwrap();
    assert_eq!(scratches(), 1);
    store.end_changes().await;
    assert_eq!(scratches(), 0, "although a clone is there");
    let refused = clone.put(&key, "other").await.unwrap_err();
    assert!(refused.to_string().contains("the store is closed"), "{refused}");
    assert_eq!(scratches(), 0);
    assert_eq!(clone.get(&key).await.unwrap().unwrap().0, Bytes::from("inode"));
}
