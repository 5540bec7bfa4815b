//! The checkpoint list as the watermark of a WAL.

use super::*;
use crate::base::url::VolumeUrl;
use crate::meta::wal_marker::MarkerState;
use crate::open::history;
use crate::store::options::StoreOptions;

async fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
    let store = crate::store::connect_for_create(&url, &StoreOptions::default())
        .await
        .unwrap();
    (dir, store)
}

fn checkpoint(cno: u64) -> Checkpoint {
    Checkpoint {
        id: CheckpointId {
            cno,
            check: InodeCheck::from_bits(cno),
        },
        size_bytes: 7,
        published_ms: 1,
    }
}

async fn watermarks(store: &Store, epoch: u64) -> Watermarks {
    let before = crate::meta::wal_marker::load(store).await.unwrap();
    let state = MarkerState {
        url: "s3://bucket/log/".into(),
        volume_id: crate::base::volume_id::VolumeId::from_uuid(uuid::Uuid::from_u128(42)),
        host: "here".into(),
        journal_id: None,
        epoch,
        // No two openings are of one moment.
        opened_ms: before.as_ref().map_or(0, |b| b.0.opened_ms + 1),
        watermark: 0,
        checkpoint: None,
        is_clean: false,
    };
    let marker = Marker::take(store, state, before.as_ref().map(|b| &b.1))
        .await
        .unwrap();
    Watermarks::new(store.clone(), epoch, Arc::new(marker))
}

/// L2: the next owner has replayed the WAL on top of the checkpoint, so the older owner must not report it as
/// published.
#[tokio::test]
async fn a_watermark_cannot_be_written_behind_the_next_owners_back() {
    let (_dir, store) = store().await;
    let older = watermarks(&store, 1).await;
    older.published(5, Some(checkpoint(3))).await.unwrap();
    older
        .published(5, Some(checkpoint(3)))
        .await
        .expect("its own, once more");
    older.published(6, None).await.unwrap();
    let next = history::look(&store, checkpoint(4), history::Known::default())
        .await
        .unwrap();
    // The container here is empty, and cannot show the previous checkpoint.
    assert!(next.settle(0, 1).await.unwrap() >= 5);
    let _newer = watermarks(&store, 1).await;
    for checkpoint in [Some(checkpoint(4)), None] {
        let late = older.published(7, checkpoint).await;
        assert!(matches!(late, Err(VolumeError::Fenced { .. })), "{late:?}");
    }
}

/// Each attempt at a write of the marker is carried out, and none answered: the owner knows nothing of what it wrote.
#[tokio::test]
async fn an_owner_goes_on_from_a_marker_that_it_never_heard_of() {
    let (_dir, store) = store().await;
    let owner = watermarks(&store, 1).await;
    let (mut unheard, _) = crate::meta::wal_marker::load(&store).await.unwrap().unwrap();
    unheard.watermark = 5;
    let key = store.meta_key(crate::meta::wal_marker::NAME);
    store
        .put(&key, serde_json::to_vec(&unheard).unwrap())
        .await
        .unwrap();
    owner.published(6, None).await.expect("it is its own");
    let (there, _) = crate::meta::wal_marker::load(&store).await.unwrap().unwrap();
    assert_eq!(there.watermark, 6);
}

/// A lease that somebody removed is made again with an epoch above that of the WAL's owner, who may have published
/// nothing yet.
#[tokio::test]
async fn the_newest_epoch_is_that_of_log_or_catalogue() {
    let (_dir, store) = store().await;
    assert_eq!(newest_epoch(&store).await.unwrap(), 0);
    let older = watermarks(&store, 3).await;
    assert_eq!(newest_epoch(&store).await.unwrap(), 3);
    older.published(5, Some(checkpoint(1))).await.unwrap();
    let _newer = watermarks(&store, 4).await;
    assert_eq!(newest_epoch(&store).await.unwrap(), 4);
}

#[test]
fn entries_of_earlier_releases_are_read() {
    let entry: CatalogueEntry =
        serde_json::from_str(r#"{"cno":3,"published_ms":1,"size_bytes":2,"epoch":1}"#).unwrap();
    assert_eq!((entry.generation, entry.is_repaired), (0, false));
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_are_listed_in_parts_as_they_are_in_one() {
    let (_dir, store) = store().await;
    let mut all = Vec::new();
    for cno in (1..=90).filter(|cno| cno % 7 != 0 && !(30..50).contains(cno)) {
        let entry = CatalogueEntry::of(checkpoint(cno), cno, 1, Kind::Change);
        write_entry(&store, &entry).await.unwrap();
        all.push(cno);
    }
    for (newest, part) in [
        (90, 1000),
        (90, 10),
        (90, 1),
        (55, 8),
        (1, 1000),
        (0, 1000),
        (5000, 1000),
    ] {
        let listed = listed_in_parts(&store, newest, part).await.unwrap();
        let listed: Vec<u64> = listed.into_iter().map(|(number, _)| number).collect();
        let expected: Vec<u64> = all.iter().copied().filter(|cno| *cno <= newest).collect();
        assert_eq!(listed, expected, "up to {newest} by {part}");
    }
}

/// Tries what fails `failures` times, with this word on the end. Returns how often it was tried, and what came of it.
async fn tried(failures: u32, mut is_ending: watch::Receiver<bool>) -> (u32, Result<(), VolumeError>) {
    let mut tries = 0;
    let attempt = || {
        tries += 1;
        let is_failed = tries <= failures;
        async move {
            match is_failed {
                true => Err(VolumeError::Closed),
                false => Ok(()),
            }
        }
    };
    let ended = insist(attempt, &mut is_ending).await;
    (tries, ended)
}

#[tokio::test(start_paused = true)]
async fn an_entry_that_fails_is_tried_again_for_a_time() {
    let (_word, is_ending) = watch::channel(false);
    let (tries, ended) = tried(7, is_ending.clone()).await;
    ended.expect("the store works again");
    assert_eq!(tries, 8);
    let started = Instant::now();
    let (_, ended) = tried(u32::MAX, is_ending).await;
    ended.expect_err("those behind it wait");
    assert!((TRIED_FOR..TRIED_FOR + TRY_WAIT_MAX).contains(&started.elapsed()));
}

#[tokio::test(start_paused = true)]
async fn an_end_waits_for_one_more_attempt_alone() {
    let (word, is_ending) = watch::channel(true);
    let started = Instant::now();
    let (tries, ended) = tried(1, is_ending.clone()).await;
    ended.expect("the second time");
    assert_eq!(tries, 2);
    assert_eq!(tried(u32::MAX, is_ending.clone()).await.0, 2);
    word.send_replace(false);
    drop(word);
    assert_eq!(tried(u32::MAX, is_ending).await.0, 2, "nobody is there any more");
    assert_eq!(started.elapsed(), Duration::ZERO);
}

/// By then the volume may have been deleted, and another one made at its place, of which an entry of this number would be in the way.
#[tokio::test(start_paused = true)]
async fn who_lost_the_volume_tries_no_more() {
    let (_word, mut is_ending) = watch::channel(false);
    let mut tries = 0;
    let attempt = || {
        tries += 1;
        async {
            Err::<(), _>(VolumeError::Fenced {
                reason: "of a test".into(),
            })
        }
    };
    let ended = insist(attempt, &mut is_ending).await;
    assert!(matches!(ended, Err(VolumeError::Fenced { .. })));
    assert_eq!(tries, 1);
}
