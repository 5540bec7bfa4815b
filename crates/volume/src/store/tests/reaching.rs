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
    assert!(!found.remove_if_empty().await.unwrap());
    found.delete(&key).await.unwrap();
    assert!(found.remove_if_empty().await.unwrap());
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
