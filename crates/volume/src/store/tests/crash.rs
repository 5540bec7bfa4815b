//! Processes that are killed, and processes that share a directory. The test's own binary is the other process.

use std::fs::File;
use std::io;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::*;
use crate::disk::Disk;
use crate::metrics::Metrics;

/// Tells the child that it is one, and which store to write to.
const CHILD_STORE: &str = "HYPERNBD_STORE_TEST_CHILD";
/// Tells the child at which sync to stop for ever: `file` or `dir`.
const CHILD_STOPS_AT: &str = "HYPERNBD_STORE_TEST_STOPS_AT";
/// Appears beside the store when it has stopped there.
const STOPPED: &str = "stopped";
const OBJECT_LEN: usize = 3 << 20;

/// This test again, in a process of its own, with the given store.
fn child(test: &str, path: &Path) -> Child {
    child_with(test, path, &[])
}

fn child_with(test: &str, path: &Path, environment: &[(&str, &str)]) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("store::tests::crash::{test}"), "--nocapture"])
        .env(CHILD_STORE, path)
        .envs(environment.iter().copied())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

/// Waits a little for a child that must not end by itself.
async fn still_running(child: &mut Child) {
    assert!(child.try_wait().unwrap().is_none(), "the writer ended by itself");
    tokio::time::sleep(Duration::from_millis(1)).await;
}

async fn store_of_child() -> Option<Store> {
    let path = std::env::var_os(CHILD_STORE)?;
    Some(
        connect(&file_url(Path::new(&path)), &StoreOptions::default())
            .await
            .unwrap(),
    )
}

/// An object that shows which write made it, and whether it is whole.
fn object(seed: u64) -> Vec<u8> {
    let mut bytes = seed.to_le_bytes().to_vec();
    bytes.extend(pattern(OBJECT_LEN, seed));
    bytes
}

fn seed_of(bytes: &[u8]) -> u64 {
    let seed = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes == object(seed), "a torn object of write {seed}");
    seed
}

/// Writes for ever: `whole` and `parts` get the same write, `done` says which write was answered last.
async fn write_until_killed(store: Store) {
    let parts_key = store.data_key("parts");
    for seed in 1u64.. {
        store.put(&store.data_key("whole"), object(seed)).await.unwrap();
        let request = store
            .client
            .create_multipart_upload()
            .bucket(&store.bucket)
            .key(&parts_key);
        let id = request.send().await.unwrap().upload_id.unwrap();
        let part = store
            .client
            .upload_part()
            .bucket(&store.bucket)
            .key(&parts_key)
            .upload_id(&id)
            .part_number(1);
        let etag = part
            .body(object(seed).into())
            .send()
            .await
            .unwrap()
            .e_tag
            .unwrap();
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
            .key(&parts_key);
        complete
            .upload_id(id)
            .multipart_upload(parts)
            .send()
            .await
            .unwrap();
        store
            .put(&store.meta_key("done"), seed.to_string())
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_writer_leaves_whole_objects_and_everything_it_was_answered() {
    if let Some(store) = store_of_child().await {
        return write_until_killed(store).await;
    }
    let Tested { store, dir } = file_store().await;
    let path = dir.as_ref().unwrap().path().join("vol");
    for round in 0..12 {
        let mut writer = child(
            "a_killed_writer_leaves_whole_objects_and_everything_it_was_answered",
            &path,
        );
        // Killed at a different place of the loop each time, after at least one turn of it.
        let done_before = store
            .head(&store.meta_key("done"))
            .await
            .unwrap()
            .map(|info| info.etag);
        while store
            .head(&store.meta_key("done"))
            .await
            .unwrap()
            .map(|info| info.etag)
            == done_before
        {
            still_running(&mut writer).await;
        }
        tokio::time::sleep(Duration::from_millis(round * 3)).await;
        writer.kill().unwrap();
        writer.wait().unwrap();

        let (done, _) = store.get(&store.meta_key("done")).await.unwrap().unwrap();
        let done: u64 = std::str::from_utf8(&done).unwrap().parse().unwrap();
        let (whole, _) = store.get(&store.data_key("whole")).await.unwrap().unwrap();
        let (parts, _) = store.get(&store.data_key("parts")).await.unwrap().unwrap();
        for seed in [seed_of(&whole), seed_of(&parts)] {
            assert!(
                seed == done || seed == done + 1,
                "write {done} was answered, {seed} is there"
            );
        }
        assert_eq!(store.list("").await.unwrap().len(), 3);
        // What the killed process left in scratch/ goes with the next one that writes.
        let next = connect(&file_url(&path), &StoreOptions::default()).await.unwrap();
        next.put(&next.meta_key("done"), done.to_string()).await.unwrap();
        drop(next);
        assert_eq!(leftovers(&path), 0, "files of a dead process");
        store.delete_prefix("volume/").await.unwrap();
    }
}

/// A disk that stops its process at one of the two syncs of a write.
struct StoppingDisk {
    stops_at: String,
    says_so: std::path::PathBuf,
}

impl StoppingDisk {
    fn pass(&self, what: &str) {
        if what == self.stops_at {
            File::create(&self.says_so).unwrap();
            loop {
                std::thread::park();
            }
        }
    }
}

impl Disk for StoppingDisk {
    fn sync_file(&self, file: &File) -> io::Result<()> {
        self.pass("file");
        file.sync_data()
    }

    fn sync_dir(&self, dir: &File) -> io::Result<()> {
        self.pass("dir");
        dir.sync_all()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_killed_between_the_steps_of_a_write_leaves_the_old_object_or_the_new() {
    let test = "a_writer_killed_between_the_steps_of_a_write_leaves_the_old_object_or_the_new";
    if let Some(path) = std::env::var_os(CHILD_STORE).map(std::path::PathBuf::from) {
        let stops_at = std::env::var(CHILD_STOPS_AT).unwrap();
        let disk = StoppingDisk {
            stops_at,
            says_so: path.with_file_name(STOPPED),
        };
        let dir = ObjectDir::open(&path, Box::new(disk)).unwrap();
        let store = Store::of_dir(&file_url(&path), Arc::new(dir), &path, &Metrics::default());
        store.put(&store.data_key("inode"), object(2)).await.unwrap();
        panic!("the write was answered");
    }
    for (stops_at, seed, files_left) in [("file", 1, 1), ("dir", 2, 0)] {
        let Tested { store, dir } = file_store().await;
        let path = dir.as_ref().unwrap().path().join("vol");
        let key = store.data_key("inode");
        store.put(&key, object(1)).await.unwrap();
        let mut writer = child_with(test, &path, &[(CHILD_STOPS_AT, stops_at)]);
        while !path.with_file_name(STOPPED).exists() {
            still_running(&mut writer).await;
        }
        writer.kill().unwrap();
        writer.wait().unwrap();
        assert_eq!(
            seed_of(&store.get(&key).await.unwrap().unwrap().0),
            seed,
            "killed at the sync of the {stops_at}"
        );
        assert_eq!(leftovers(&path), files_left);
        let next = connect(&file_url(&path), &StoreOptions::default()).await.unwrap();
        next.put(&key, object(3)).await.unwrap();
        assert_eq!(leftovers(&path), 0, "files of a dead process");
        assert_eq!(seed_of(&store.get(&key).await.unwrap().unwrap().0), 3);
    }
}

/// Ends its process at a call, as a kill there would.
struct DyingDisk {
    dies_at: usize,
    calls: AtomicUsize,
}

impl DyingDisk {
    fn pass(&self) {
        if self.calls.fetch_add(1, SeqCst) == self.dies_at {
            std::process::abort();
        }
    }
}

impl Disk for DyingDisk {
    fn sync_file(&self, file: &File) -> io::Result<()> {
        self.pass();
        file.sync_data()
    }

    fn sync_dir(&self, dir: &File) -> io::Result<()> {
        self.pass();
        dir.sync_all()
    }

    fn lock(&self, file: &File) -> io::Result<()> {
        self.pass();
        file.lock()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.pass();
        std::fs::rename(from, to)
    }

    fn create_new(&self, path: &Path) -> io::Result<File> {
        self.pass();
        File::create_new(path)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_killed_at_any_step_is_taken_up() {
    let test = "a_creation_killed_at_any_step_is_taken_up";
    if let Some(path) = std::env::var_os(CHILD_STORE).map(std::path::PathBuf::from) {
        let dies_at = std::env::var(CHILD_STOPS_AT).unwrap().parse().unwrap();
        let calls = AtomicUsize::new(0);
        ObjectDir::create(&path, Box::new(DyingDisk { dies_at, calls })).unwrap();
        return;
    }
    let mut states = std::collections::BTreeSet::new();
    for dies_at in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vol");
        let mut maker = child_with(test, &path, &[(CHILD_STOPS_AT, &dies_at.to_string())]);
        let is_whole = maker.wait().unwrap().success();
        let mut found: Vec<_> = std::fs::read_dir(&path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        found.sort();
        states.insert(found);
        let store = connect_for_create(&file_url(&path), &StoreOptions::default())
            .await
            .unwrap();
        assert_eq!(store.list("").await.unwrap(), [], "killed at call {dies_at}");
        store.put(&store.data_key("inode"), "x").await.unwrap();
        assert_eq!(leftovers(&path), 0, "killed at call {dies_at}");
        if is_whole {
            break;
        }
    }
    assert!(states.len() >= 4, "killed at too few places: {states:?}");
}

/// How many files other than `alive` there are in the scratch directories.
fn leftovers(path: &Path) -> usize {
    let dirs = std::fs::read_dir(path.join("scratch")).unwrap();
    let files = dirs.flat_map(|dir| std::fs::read_dir(dir.unwrap().path()).unwrap());
    files
        .filter(|file| file.as_ref().unwrap().file_name() != "alive")
        .count()
}

/// Adds 1 to a number in an object, 50 times, by compare and swap.
async fn count(store: &Store) {
    let key = store.meta_key("counter");
    for _ in 0..50 {
        loop {
            let (bytes, etag) = store.get(&key).await.unwrap().unwrap();
            let number: u64 = std::str::from_utf8(&bytes).unwrap().parse().unwrap();
            match store.put_if_match(&key, (number + 1).to_string(), &etag).await {
                Ok(_) => break,
                Err(error) => assert_eq!(error.kind, StoreErrorKind::PreconditionFailed, "{error}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_and_handles_exclude_each_other() {
    if let Some(store) = store_of_child().await {
        return count(&store).await;
    }
    let Tested { store, dir } = file_store().await;
    let path = dir.as_ref().unwrap().path().join("vol");
    store.put(&store.meta_key("counter"), "0").await.unwrap();
    let mut others: Vec<Child> = (0..3)
        .map(|_| child("processes_and_handles_exclude_each_other", &path))
        .collect();
    let second = connect(&file_url(&path), &StoreOptions::default()).await.unwrap();
    tokio::join!(count(&store), count(&second), count(&store));
    for other in &mut others {
        assert!(other.wait().unwrap().success());
    }
    let (bytes, _) = store.get(&store.meta_key("counter")).await.unwrap().unwrap();
    assert_eq!(bytes, (6 * 50).to_string());
}
