//! Directories on file systems that a store must not be on.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::disk::tests::{LACKS, Lack, Lacking, Noting};
use crate::metrics::Metrics;
use crate::store::probe;

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn no_store_is_made_there_and_nothing_is_left() {
    for lack in LACKS {
        for path in ["", "a/b/vol"] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join("lost+found")).unwrap();
            let root = dir.path().join(path);
            let refused = ObjectDir::create(&root, Box::new(Lacking(lack))).err().unwrap();
            let text = refused.to_string();
            assert!(text.contains("the file system of "), "{lack:?}: {text}");
            assert!(text.contains("another file system"), "{lack:?}: {text}");
            assert_eq!(entries(dir.path()), ["lost+found"], "{lack:?} in {path:?}");
        }
    }
}

#[test]
fn what_somebody_else_has_there_stays() {
    for lack in LACKS {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("lock"), "mine").unwrap();
        std::fs::create_dir(dir.path().join("scratch")).unwrap();
        assert!(ObjectDir::create(dir.path(), Box::new(Lacking(lack))).is_err());
        assert_eq!(entries(dir.path()), ["lock", "scratch"], "{lack:?}");
    }
}

/// A store that was copied to such a file system, or whose file system is mounted otherwise than before.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_there_is_read_and_not_written_to() {
    let Tested { store, dir } = file_store().await;
    let root = dir.as_ref().unwrap().path().join("vol");
    let key = store.data_key("inode");
    store.put(&key, "before").await.unwrap();
    let all = || {
        [
            entries(&root),
            entries(&root.join("objects")),
            entries(&root.join("scratch")),
        ]
    };
    let before = all();
    for lack in LACKS {
        let opened = ObjectDir::open(&root, Box::new(Lacking(lack))).unwrap();
        let moved = Store::of_dir(&file_url(&root), Arc::new(opened), &root, &Metrics::default());
        // As the start of a server asks, whether or not unsafe stores are allowed.
        let refused = probe::ensure(&moved, true).await.unwrap_err().to_string();
        assert!(refused.contains("the file system of "), "{lack:?}: {refused}");
        assert!(refused.contains(root.to_str().unwrap()), "{lack:?}: {refused}");
        assert_eq!(moved.get(&key).await.unwrap().unwrap().0, "before");
        if matches!(lack, Lack::Exclusion | Lack::Locks) {
            let refused = moved.put(&key, "after").await.unwrap_err().to_string();
            assert!(refused.contains("the file system of "), "{lack:?}: {refused}");
        }
        assert_eq!(all(), before, "{lack:?}");
    }
    // What the other process has in its scratch directory was not taken for a dead one's.
    store.put(&key, "again").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trial_that_was_killed_leaves_no_object_and_is_no_hindrance() {
    let Tested { store, dir } = file_store().await;
    let root = dir.as_ref().unwrap().path().join("vol");
    std::fs::write(root.join("objects/.hypernbd-try"), "before").unwrap();
    assert_eq!(store.list("").await.unwrap(), []);
    probe::ensure(&store, false).await.unwrap();
    assert!(!root.join("objects/.hypernbd-try").exists());
    std::fs::write(root.join("objects/.hypernbd-try"), "before").unwrap();
    assert!(store.remove_if_empty(Directory::Removed).await.unwrap());
    assert!(!root.exists());
}

/// A creation was killed between making a directory and syncing the one it is in.
#[test]
fn a_directory_that_is_there_is_made_durable_with_its_parents() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("a/vol");
    std::fs::create_dir_all(&root).unwrap();
    let disk = Noting::default();
    ObjectDir::create(&root, Box::new(disk.clone())).unwrap();
    for parent in [dir.path().join("a"), dir.path().to_path_buf(), root] {
        assert!(disk.has_synced(&parent), "{}", parent.display());
    }
}

#[test]
fn parents_are_made_as_usual_and_the_store_for_its_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("usual")).unwrap();
    drop(ObjectDir::create(&dir.path().join("a/b/vol"), Box::new(RealDisk)).unwrap());
    let mode = |path: &str| {
        std::fs::metadata(dir.path().join(path))
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!((mode("a"), mode("a/b")), (mode("usual"), mode("usual")));
    for own in ["a/b/vol", "a/b/vol/objects", "a/b/vol/scratch"] {
        assert_eq!(mode(own), 0o700, "{own}");
    }
}
