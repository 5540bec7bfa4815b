//! The catalogue as the watermark of a log.

use super::*;
use crate::log::marker::MarkerState;
use crate::options::StoreOptions;
use crate::url::VolumeUrl;

async fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
    let store = crate::store::connect_for_create(&url, &StoreOptions::default())
        .await
        .unwrap();
    (dir, store)
}

fn checkpoint(cno: u64) -> Checkpoint {
    Checkpoint { cno, size_bytes: 7 }
}

async fn watermarks(store: &Store, epoch: u64) -> Watermarks {
    let before = crate::log::marker::load(store).await.unwrap();
    let state = MarkerState {
        url: "s3://bucket/log/".into(),
        volume_id: String::new(),
        host: "here".into(),
        journal_id: None,
        epoch,
        opened_ms: 0,
        watermark: 0,
        is_clean: false,
    };
    let marker = Marker::take(store, state, before.as_ref().map(|b| &b.1))
        .await
        .unwrap();
    Watermarks::new(store.clone(), epoch, Arc::new(marker))
}

#[tokio::test]
async fn an_entry_added_later_says_no_more_than_the_one_before() {
    let (_dir, store) = store().await;
    assert_eq!(take_up(&store, checkpoint(0), 0, 1, None).await.unwrap(), 0);
    let watermarks = watermarks(&store, 1).await;
    watermarks.published(5, Some(checkpoint(3))).await.unwrap();
    watermarks.published(6, Some(checkpoint(4))).await.unwrap();
    assert_eq!(take_up(&store, checkpoint(4), 0, 1, None).await.unwrap(), 6);
    assert_eq!(take_up(&store, checkpoint(9), 0, 1, None).await.unwrap(), 6);
    let added = load_entry(&store, 9).await.unwrap().unwrap();
    assert!(added.is_repaired && added.generation == 6);
}

/// L2: the next owner has replayed the log over the checkpoint, so the older one must not call it published.
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
    assert_eq!(take_up(&store, checkpoint(4), 0, 1, None).await.unwrap(), 5);
    let _newer = watermarks(&store, 1).await;
    for checkpoint in [Some(checkpoint(4)), None] {
        let late = older.published(7, checkpoint).await;
        assert!(matches!(late, Err(VolumeError::Fenced { .. })), "{late:?}");
    }
}

#[test]
fn entries_of_earlier_releases_are_read() {
    let entry: CatalogueEntry =
        serde_json::from_str(r#"{"cno":3,"published_ms":1,"size_bytes":2,"epoch":1}"#).unwrap();
    assert_eq!((entry.generation, entry.is_repaired), (0, false));
}
