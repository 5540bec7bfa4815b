//! What the checkpoint list may say of a container, and what follows from it.

use super::*;
use crate::base::url::VolumeUrl;
use crate::options::StoreOptions;

async fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
    let store = crate::store::connect_for_create(&url, &StoreOptions::default())
        .await
        .unwrap();
    (dir, store)
}

fn id(cno: u64, check: u64) -> CheckpointId {
    CheckpointId {
        cno,
        check: InodeCheck::from_bits(check),
    }
}

fn checkpoint(cno: u64, check: u64) -> Checkpoint {
    Checkpoint {
        id: id(cno, check),
        size_bytes: 7,
        published_ms: 1,
    }
}

async fn record(store: &Store, cno: u64, check: Option<u64>, generation: u64) {
    let entry = CatalogueEntry {
        cno,
        check: check.map(InodeCheck::from_bits),
        published_ms: 0,
        size_bytes: 7,
        epoch: 1,
        generation,
        is_repaired: false,
        kind: checkpoint_list::Kind::default(),
    };
    assert!(checkpoint_list::write_entry(store, &entry).await.unwrap());
}

#[tokio::test]
async fn a_container_that_the_catalogue_knows_is_taken_up_as_it_is() {
    let (_dir, store) = store().await;
    record(&store, 3, Some(33), 5).await;
    record(&store, 4, Some(44), 6).await;
    let seen = look(&store, checkpoint(4, 44), Known::default()).await.unwrap();
    assert!(!seen.is_broken());
    assert_eq!(seen.settle(0, 2).await.unwrap(), 6);
    for (asked, is_there) in [
        (id(4, 44), true),
        (id(3, 33), true),
        (id(3, 34), false),
        (id(4, 45), false),
        (id(5, 55), false),
        (id(2, 22), false),
    ] {
        assert_eq!(seen.has(asked).await.unwrap(), is_there, "{asked}");
    }
    assert_eq!(
        checkpoint_list::numbers(&store).await.unwrap(),
        [3, 4],
        "as it was"
    );
}

#[tokio::test]
async fn a_restored_backup_is_noticed_and_what_came_after_it_set_aside() {
    let (_dir, store) = store().await;
    for (cno, check, generation) in [(3, 33, 5), (4, 44, 6), (5, 55, 9)] {
        record(&store, cno, Some(check), generation).await;
    }
    let seen = look(&store, checkpoint(3, 33), Known::default()).await.unwrap();
    assert!(seen.is_broken() && seen.left_history().contains("up to checkpoint 5"));
    assert_eq!(
        checkpoint_list::numbers(&store).await.unwrap(),
        [3, 4, 5],
        "a look"
    );
    let generation = seen.settle(0, 2).await.unwrap();
    assert!(generation >= 9 + GENERATIONS_LEFT, "{generation}");
    assert_eq!(checkpoint_list::numbers(&store).await.unwrap(), [3]);
    let aside = store.list(&store.meta_key(ASIDE)).await.unwrap();
    let (body, _) = store.get(&aside[0].key).await.unwrap().unwrap();
    let kept: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert_eq!(kept["entries"].as_array().unwrap().len(), 2);
    let again = look(&store, checkpoint(3, 33), Known::default()).await.unwrap();
    assert!(!again.is_broken());
}

/// The same numbers come to be those of other blocks, which were not moved there.
#[tokio::test]
async fn where_blocks_came_from_in_a_history_that_was_left_is_forgotten() {
    use std::collections::HashSet;

    use crate::format::object_names::part_of;
    use crate::index::origins::{self, Origins};

    let (_dir, store) = store().await;
    for (cno, check) in [(3, 33), (5, 55)] {
        record(&store, cno, Some(check), cno).await;
    }
    let (kept, left) = (part_of(2, 1), part_of(5, 1));
    for object in [kept, left] {
        let origins = Origins {
            object,
            first_bytes: 4096,
            block_bytes: 4096,
            births: vec![7],
        };
        origins::put(&store, &origins).await.unwrap();
    }
    let as_it_was = look(&store, checkpoint(5, 55), Known::default()).await.unwrap();
    as_it_was.settle(0, 1).await.unwrap();
    assert_eq!(
        origins::listed(&store).await.unwrap(),
        HashSet::from([kept, left])
    );
    let restored = look(&store, checkpoint(3, 33), Known::default()).await.unwrap();
    restored.settle(0, 2).await.unwrap();
    assert_eq!(origins::listed(&store).await.unwrap(), HashSet::from([kept]));
    let made_anew = look(&store, checkpoint(3, 34), Known::default()).await.unwrap();
    made_anew.settle(0, 3).await.unwrap();
    assert_eq!(origins::listed(&store).await.unwrap(), HashSet::new());
}

/// An entry alone is not trusted: it may belong to an earlier volume at the same place.
#[tokio::test]
async fn the_entry_of_another_checkpoint_of_that_number_is_no_watermark() {
    let (_dir, store) = store().await;
    record(&store, 3, Some(33), 50).await;
    record(&store, 2, Some(22), 40).await;
    let seen = look(&store, checkpoint(3, 34), Known::default()).await.unwrap();
    assert!(seen.is_broken());
    assert!(!seen.has(id(2, 22)).await.unwrap() && seen.has(id(3, 34)).await.unwrap());
    let generation = seen.settle(7, 2).await.unwrap();
    assert!(generation >= 50 + GENERATIONS_LEFT);
    let (entry, _) = checkpoint_list::load_entry_with(&store, 3)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        (entry.is_of(id(3, 34)), entry.generation, entry.is_repaired),
        (Some(true), generation, true)
    );
    assert_eq!(checkpoint_list::numbers(&store).await.unwrap(), [3]);
}

/// A checkpoint without an entry continues the previous one only if the container has that one.
#[tokio::test]
async fn a_missing_entry_says_no_more_than_the_one_before_if_that_is_of_this_container() {
    let (_dir, store) = store().await;
    assert_eq!(
        look(&store, checkpoint(0, 1), Known::default())
            .await
            .unwrap()
            .settle(0, 1)
            .await
            .unwrap(),
        0
    );
    // The entry is of an earlier release: it is accepted once, as such releases did.
    record(&store, 4, None, 6).await;
    let seen = look(&store, checkpoint(9, 99), Known::default()).await.unwrap();
    assert_eq!(seen.settle(0, 1).await.unwrap(), 6);
    let added = checkpoint_list::load_entry(&store, 9).await.unwrap().unwrap();
    assert!(added.is_repaired && added.generation == 6);
    // No object of checkpoint 9 is stored here.
    let seen = look(&store, checkpoint(10, 100), Known::default()).await.unwrap();
    assert!(seen.is_broken());
}

/// Such an entry says that there was a checkpoint of this number, and not which: a log or a cache of another history may name one.
#[tokio::test(flavor = "multi_thread")]
async fn an_entry_of_an_earlier_release_speaks_for_the_stored_checkpoint_alone() {
    let dir = tempfile::tempdir().unwrap();
    let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
    let options = StoreOptions::default();
    let create = crate::admin::CreateOptions {
        size_bytes: 1 << 20,
        block_size_bytes: 4096,
    };
    crate::admin::create(&url, &options, &create).await.unwrap();
    let volume_options = crate::options::VolumeOptions::default();
    let volume = crate::Volume::open(&url, &options, &volume_options)
        .await
        .unwrap();
    let written = tokio::task::spawn_blocking(move || {
        for byte in 1..4 {
            volume.write(0, &[byte; 4096], true)?;
        }
        volume.close(std::time::Duration::from_secs(60))
    });
    written.await.unwrap().unwrap();
    let store = crate::store::connect(&url, &options).await.unwrap();
    let stored = checkpoint_stored(&store, 2).await.unwrap().unwrap();
    let newest = Checkpoint {
        id: checkpoint_stored(&store, 3).await.unwrap().unwrap(),
        size_bytes: 1 << 20,
        published_ms: 1,
    };
    let (entry, etag) = checkpoint_list::load_entry_with(&store, 2)
        .await
        .unwrap()
        .unwrap();
    let unmarked = CatalogueEntry { check: None, ..entry };
    checkpoint_list::replace_entry(&store, &unmarked, &etag)
        .await
        .unwrap();
    let seen = look(&store, newest, Known::default()).await.unwrap();
    assert!(!seen.has(id(2, !stored.check.to_bits())).await.unwrap());
    assert!(seen.has(stored).await.unwrap());
}

#[tokio::test]
async fn entries_of_earlier_releases_are_marked_once() {
    let (_dir, store) = store().await;
    record(&store, 3, None, 5).await;
    let seen = look(&store, checkpoint(3, 33), Known::default()).await.unwrap();
    assert_eq!(seen.settle(0, 2).await.unwrap(), 5);
    let entry = checkpoint_list::load_entry(&store, 3).await.unwrap().unwrap();
    assert_eq!(entry.is_of(id(3, 33)), Some(true));
    let other = look(&store, checkpoint(3, 34), Known::default()).await.unwrap();
    assert!(other.is_broken());
}

/// A container that was created again under the label and the checkpoint list of another.
#[tokio::test]
async fn an_empty_container_has_no_checkpoints() {
    let (_dir, store) = store().await;
    record(&store, 3, Some(33), 5).await;
    let seen = look(
        &store,
        checkpoint(0, 2),
        Known {
            origin: Some(InodeCheck::from_bits(1)),
            ..Known::default()
        },
    )
    .await
    .unwrap();
    assert!(seen.is_broken());
    assert!(!seen.has(id(3, 33)).await.unwrap());
    assert!(!seen.has(id(0, 1)).await.unwrap(), "the one that was here before");
    assert!(seen.settle(0, 2).await.unwrap() >= GENERATIONS_LEFT);
    assert!(checkpoint_list::numbers(&store).await.unwrap().is_empty());
}
