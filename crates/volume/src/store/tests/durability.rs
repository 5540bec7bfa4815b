//! A change is on disk before it is answered, and what could not be made durable is never taken for done.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use parking_lot::Mutex;

use super::*;
use crate::disk::Disk;
use crate::metrics::Metrics;

/// What a [`WatchedDisk`] is told to do and has seen.
#[derive(Default)]
struct Watch {
    root: std::path::PathBuf,
    fails_files: AtomicBool,
    fails_dirs: AtomicBool,
    /// Every sync: what was synced, and the names in `objects/` at that time.
    seen: Mutex<Vec<(&'static str, Vec<String>)>>,
}

/// A disk that notes each sync, and can fail.
struct WatchedDisk(Arc<Watch>);

impl WatchedDisk {
    fn note(&self, what: &'static str, fails: &AtomicBool) -> io::Result<()> {
        self.0.seen.lock().push((what, object_names(&self.0.root)));
        match fails.load(SeqCst) {
            true => Err(io::Error::other("the disk is broken")),
            false => Ok(()),
        }
    }
}

impl Disk for WatchedDisk {
    fn sync_file(&self, file: &File) -> io::Result<()> {
        self.note("file", &self.0.fails_files)?;
        file.sync_data()
    }

    fn sync_dir(&self, dir: &File) -> io::Result<()> {
        self.note("dir", &self.0.fails_dirs)?;
        dir.sync_all()
    }
}

/// The names in `objects/`, in order.
fn object_names(root: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(root.join("objects")) else {
        return Vec::new();
    };
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        // The marker of the directory is no object.
        .filter(|name| !name.starts_with('.'))
        .collect();
    names.sort();
    names
}

fn watched() -> (Store, Arc<Watch>, TempDir) {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path().join("vol");
    let watch = Arc::new(Watch {
        root: root.clone(),
        ..Default::default()
    });
    let dir = ObjectDir::create(&root, Box::new(WatchedDisk(watch.clone()))).unwrap();
    watch.seen.lock().clear();
    (
        Store::of_dir(&file_url(&root), Arc::new(dir), &root, &Metrics::default()),
        watch,
        temp,
    )
}

/// The two syncs of a write: the file before its name is there, the directory after.
fn syncs_of_a_write(before: &[&str], after: &[&str]) -> Vec<(&'static str, Vec<String>)> {
    let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect();
    vec![("file", names(before)), ("dir", names(after))]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_is_synced_before_it_is_answered() {
    let (store, watch, _temp) = watched();
    let seen = || std::mem::take(&mut *watch.seen.lock());

    store.put("a", "1").await.unwrap();
    assert_eq!(seen(), syncs_of_a_write(&[], &["a"]));

    let etag = store.put_create_only("b", "2").await.unwrap();
    assert_eq!(seen(), syncs_of_a_write(&["a"], &["a", "b"]));

    store.put_if_match("b", "3", &etag).await.unwrap();
    assert_eq!(seen(), syncs_of_a_write(&["a", "b"], &["a", "b"]));

    store
        .client
        .copy_object()
        .bucket(&store.bucket)
        .key("c")
        .copy_source("local/a")
        .send()
        .await
        .unwrap();
    assert_eq!(seen(), syncs_of_a_write(&["a", "b"], &["a", "b", "c"]));

    store.delete("a").await.unwrap();
    assert_eq!(seen(), [("dir", vec!["b".to_string(), "c".to_string()])]);

    let upload = store
        .client
        .create_multipart_upload()
        .bucket(&store.bucket)
        .key("d")
        .send()
        .await
        .unwrap();
    let id = upload.upload_id.unwrap();
    let part = store
        .client
        .upload_part()
        .bucket(&store.bucket)
        .key("d")
        .upload_id(&id)
        .part_number(1);
    let etag = part
        .body(ByteStream::from_static(b"part"))
        .send()
        .await
        .unwrap()
        .e_tag
        .unwrap();
    assert_eq!(seen(), []);
    let part = aws_sdk_s3::types::CompletedPart::builder()
        .part_number(1)
        .e_tag(etag)
        .build();
    let parts = aws_sdk_s3::types::CompletedMultipartUpload::builder()
        .parts(part)
        .build();
    let complete = store
        .client
        .complete_multipart_upload()
        .bucket(&store.bucket)
        .key("d")
        .upload_id(id);
    complete.multipart_upload(parts).send().await.unwrap();
    assert_eq!(seen(), syncs_of_a_write(&["b", "c"], &["b", "c", "d"]));

    store.delete_prefix("none/").await.unwrap();
    assert_eq!(seen(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_cannot_be_synced_never_gets_its_name() {
    let (store, watch, _temp) = watched();
    store.put("a", "old").await.unwrap();
    watch.fails_files.store(true, SeqCst);
    let error = store.put("a", "new").await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Unreachable);
    assert!(error.to_string().contains("the disk is broken"), "{error}");
    assert_eq!(store.get("a").await.unwrap().unwrap().0, Bytes::from("old"));
    // A full disk can have room again.
    watch.fails_files.store(false, SeqCst);
    store.put("a", "new").await.unwrap();
    assert_eq!(store.get("a").await.unwrap().unwrap().0, Bytes::from("new"));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_directory_that_could_not_be_synced_nothing_is_taken_for_done() {
    let (store, watch, temp) = watched();
    watch.fails_dirs.store(true, SeqCst);
    store.put_create_only("a", "1").await.unwrap_err();
    watch.fails_dirs.store(false, SeqCst);
    // Not PreconditionFailed, by which the writer would find its own mark and call it a success.
    let error = store.put_create_only("a", "1").await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Unreachable, "{error}");
    assert!(error.to_string().contains("check the disk"), "{error}");
    assert!(store.delete("b").await.is_err());
    // A new process may try again.
    let store = connect(&file_url(&temp.path().join("vol")), &StoreOptions::default())
        .await
        .unwrap();
    store.put("b", "2").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_object_is_an_error_that_names_the_file() {
    let (store, watch, _temp) = watched();
    store.put("a", vec![7; 5000]).await.unwrap();
    let path = watch.root.join("objects/a");
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4000)
        .unwrap();
    let error = store.get("a").await.unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
}
