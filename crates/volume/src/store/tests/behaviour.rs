//! Single requests: conditions, ranges, metadata, listing, deleting.

use super::*;
use crate::store::interceptors::window_checksums;
use StoreErrorKind::*;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_put_is_got_and_found() {
    for Tested { store, dir: _dir } in stores().await {
        let key = store.data_key("inode");
        assert_eq!(store.get(&key).await.unwrap(), None);
        assert_eq!(store.head(&key).await.unwrap(), None);
        for len in [0, 1, 5000, 9 << 20] {
            let bytes = pattern(len, len as u64);
            let before = SystemTime::now() - Duration::from_secs(5);
            let etag = store.put(&key, bytes.clone()).await.unwrap();
            let (got, got_etag) = store.get(&key).await.unwrap().unwrap();
            assert!(got == bytes, "{len} bytes differ");
            assert_eq!(got_etag, etag);
            let info = store.head(&key).await.unwrap().unwrap();
            assert_eq!((info.size_bytes, &info.etag), (len as u64, &etag));
            assert!(info.last_modified > before && info.last_modified < before + Duration::from_secs(60));
            let listed = store.list(&store.data_key("")).await.unwrap();
            assert_eq!(listed.len(), 1);
            assert_eq!(
                (listed[0].key.as_str(), listed[0].size_bytes),
                (key.as_str(), len as u64)
            );
        }
        store.delete_prefix(&store.data_key("")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conditional_puts() {
    for Tested { store, dir: _dir } in stores().await {
        let key = store.meta_key("conditional");
        let absent = store
            .put_if_match(&key, "x", &ETag("\"0123456789abcdef\"".into()))
            .await
            .unwrap_err();
        assert_eq!(absent.kind, NotFound, "{absent}");
        assert_eq!(store.get(&key).await.unwrap(), None);

        let first = store.put_create_only(&key, "first").await.unwrap();
        assert_eq!(
            store.put_create_only(&key, "again").await.unwrap_err().kind,
            PreconditionFailed
        );
        assert_eq!(
            store.get(&key).await.unwrap().unwrap(),
            (Bytes::from("first"), first.clone())
        );

        let second = store.put_if_match(&key, "second", &first).await.unwrap();
        assert_ne!(first, second);
        assert_eq!(
            store.put_if_match(&key, "late", &first).await.unwrap_err().kind,
            PreconditionFailed
        );
        assert_eq!(
            store.get(&key).await.unwrap().unwrap(),
            (Bytes::from("second"), second.clone())
        );

        // Hyperfile sends ETags without quotes.
        let bare = ETag(second.0.trim_matches('"').to_string());
        store.put_if_match(&key, "third", &bare).await.unwrap();

        store.delete(&key).await.unwrap();
        store.put_create_only(&key, "reborn").await.unwrap();
        store.delete(&key).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_writers_have_one_winner() {
    for Tested { store, dir: _dir } in stores().await {
        for round in 0..5 {
            let key = store.meta_key(&format!("race/{round}"));
            let mut expected = None;
            for step in 0..3 {
                let racers = (0..16).map(|racer| {
                    let (store, key, expected) = (store.clone(), key.clone(), expected.clone());
                    tokio::spawn(async move {
                        let bytes = format!("{step}/{racer}");
                        let result = match &expected {
                            None => store.put_create_only(&key, bytes.clone()).await,
                            Some(etag) => store.put_if_match(&key, bytes.clone(), etag).await,
                        };
                        result.map(|etag| (etag, bytes))
                    })
                });
                let mut won = Vec::new();
                for result in futures::future::join_all(racers).await {
                    match result.unwrap() {
                        Ok(winner) => won.push(winner),
                        Err(error) => assert_eq!(error.kind, PreconditionFailed, "{error}"),
                    }
                }
                assert_eq!(won.len(), 1, "round {round} step {step}");
                let (etag, bytes) = won.remove(0);
                assert_eq!(
                    store.get(&key).await.unwrap().unwrap(),
                    (Bytes::from(bytes), etag.clone())
                );
                expected = Some(etag);
            }
        }
        store.delete_prefix(&store.meta_key("race/")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges() {
    for Tested { store, dir: _dir } in stores().await {
        let (key, bytes) = (store.data_key("ranges"), pattern(9_000_001, 3));
        store.put(&key, bytes.clone()).await.unwrap();
        for (at, len) in [
            (0, 1),
            (0, 9_000_001),
            (1, 4096),
            (4_194_303, 4_194_306),
            (9_000_000, 1),
        ] {
            let got = store
                .get_range(&key, at as u64, len as u64)
                .await
                .unwrap()
                .unwrap();
            assert!(got == bytes[at..at + len], "{len} bytes at {at}");
        }
        assert_eq!(store.get_range(&key, 7, 0).await.unwrap(), Some(Bytes::new()));
        assert_eq!(store.get_range(&key, 9_000_000, 2).await.unwrap_err().kind, Other);
        assert_eq!(
            store.get_range(&key, 9_000_001, 1).await.unwrap_err().kind,
            Corrupt
        );
        assert_eq!(
            store.get_range(&store.data_key("none"), 0, 1).await.unwrap(),
            None
        );

        for (range, start, end) in [
            ("bytes=-1", 9_000_000, 9_000_001),
            ("bytes=-10000000", 0, 9_000_001),
            ("bytes=8999999-", 8_999_999, 9_000_001),
        ] {
            let sent = store
                .client
                .get_object()
                .bucket(&store.bucket)
                .key(&key)
                .range(range)
                .send()
                .await
                .unwrap();
            let expected = format!("bytes {start}-{}/9000001", end - 1);
            assert_eq!(sent.content_range(), Some(expected.as_str()), "{range}");
            assert_eq!(sent.content_length(), Some((end - start) as i64), "{range}");
            assert!(
                sent.body.collect().await.unwrap().into_bytes() == bytes[start..end],
                "{range}"
            );
        }
        store.delete(&key).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_object_has_no_ranges() {
    for Tested { store, dir: _dir } in stores().await {
        let key = store.data_key("empty");
        store.put(&key, "").await.unwrap();
        let request = store
            .client
            .get_object()
            .bucket(&store.bucket)
            .key(&key)
            .range("bytes=0-0");
        assert_eq!(status_of(&request.send().await.unwrap_err()), Some(416));
        store.delete(&key).await.unwrap();
    }
    // Services differ in what they make of its last byte.
    let Tested { store, dir: _dir } = file_store().await;
    store.put("empty", "").await.unwrap();
    let request = store
        .client
        .get_object()
        .bucket(&store.bucket)
        .key("empty")
        .range("bytes=-1");
    assert_eq!(status_of(&request.send().await.unwrap_err()), Some(416));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_absent_object_is_a_true_404() {
    for Tested { store, dir: _dir } in stores().await {
        let key = store.data_key("none");
        let head = store
            .client
            .head_object()
            .bucket(&store.bucket)
            .key(&key)
            .send()
            .await
            .unwrap_err();
        assert!(head.as_service_error().unwrap().is_not_found(), "{head:?}");
        let get = store
            .client
            .get_object()
            .bucket(&store.bucket)
            .key(&key)
            .send()
            .await
            .unwrap_err();
        assert!(get.as_service_error().unwrap().is_no_such_key(), "{get:?}");
        store.delete(&key).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn user_metadata_comes_back_and_is_copied() {
    for Tested { store, dir: _dir } in stores().await {
        // A copy is the same object, and so has its name.
        let (from, to) = (store.data_key("from"), store.data_key("copy/from"));
        let request = store
            .client
            .put_object()
            .bucket(&store.bucket)
            .key(&from)
            .metadata("hf-write", "01HX/y z");
        request
            .body(ByteStream::from_static(b"data"))
            .send()
            .await
            .unwrap();
        let info = store.head(&from).await.unwrap().unwrap();
        // Its own, and what every object has: a check value, and which it is.
        let seal = (window_checksums::METADATA_KEY.into(), "aed87dd1".into());
        assert_eq!(
            info.metadata,
            HashMap::from([
                ("hf-write".into(), "01HX/y z".into()),
                (window_checksums::NAME_METADATA_KEY.into(), "from".into()),
                seal
            ])
        );
        let got = store
            .client
            .get_object()
            .bucket(&store.bucket)
            .key(&from)
            .send()
            .await
            .unwrap();
        assert_eq!(got.metadata(), Some(&info.metadata));

        let source = format!("{}/{from}", store.bucket);
        let copy = store
            .client
            .copy_object()
            .bucket(&store.bucket)
            .key(&to)
            .copy_source(&source);
        copy.send().await.unwrap();
        assert_eq!(store.get(&to).await.unwrap().unwrap().0, Bytes::from("data"));
        assert_eq!(store.head(&to).await.unwrap().unwrap().metadata, info.metadata);
        let missing = format!("{}/{}", store.bucket, store.data_key("none"));
        let copy = store
            .client
            .copy_object()
            .bucket(&store.bucket)
            .key(&to)
            .copy_source(missing);
        assert_eq!(
            copy.send().await.unwrap_err().into_service_error().code(),
            Some("NoSuchKey")
        );

        // An overwrite without metadata leaves none behind.
        store.put(&from, "plain").await.unwrap();
        let metadata = store.head(&from).await.unwrap().unwrap().metadata;
        assert!(metadata.contains_key(window_checksums::METADATA_KEY) && !metadata.contains_key("hf-write"));
        store.delete_prefix(&store.data_key("")).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn listing_pages_in_order_and_deleting_a_prefix_spares_its_neighbours() {
    for Tested { store, dir: _dir } in stores().await {
        let mut keys: Vec<String> = (0..2345)
            .map(|i| store.data_key(&format!("{:010}", i * 7919 % 2345)))
            .collect();
        let neighbours = [
            store.meta_key("lease"),
            format!("{}-other/x", store.root),
            store.meta_key("checkpoints/1"),
        ];
        for batch in keys.iter().chain(&neighbours).collect::<Vec<_>>().chunks(64) {
            let puts = batch.iter().map(|key| store.put(key, key.to_string()));
            futures::future::try_join_all(puts).await.unwrap();
        }
        keys.sort();
        let listed = store.list(&store.data_key("")).await.unwrap();
        assert_eq!(
            listed.iter().map(|entry| entry.key.clone()).collect::<Vec<_>>(),
            keys
        );
        assert!(
            listed
                .iter()
                .all(|entry| entry.size_bytes == entry.key.len() as u64)
        );
        assert_eq!(
            store.list(&store.meta_key("checkpoints/")).await.unwrap().len(),
            1
        );

        for refused in ["", "/", &store.root] {
            assert_eq!(
                store.delete_prefix(refused).await.unwrap_err().kind,
                Other,
                "{refused:?}"
            );
        }
        assert_eq!(store.delete_prefix(&store.data_key("")).await.unwrap(), 2345);
        assert_eq!(store.list(&store.data_key("")).await.unwrap(), []);
        for key in &neighbours {
            assert_eq!(store.get(key).await.unwrap().unwrap().0, key.as_str());
            store.delete(key).await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conditional_delete_removes_only_what_was_seen() {
    // MinIO ignores the condition, so this is a promise of file:// alone.
    let Tested { store, dir: _dir } = file_store().await;
    let key = store.data_key("inode");
    let old = store.put(&key, "old").await.unwrap();
    let new = store.put(&key, "new").await.unwrap();
    let delete = |etag: &ETag| {
        store
            .client
            .delete_object()
            .bucket(&store.bucket)
            .key(&key)
            .if_match(&etag.0)
            .send()
    };
    let refused = delete(&old).await.unwrap_err();
    assert_eq!(status_of(&refused), Some(412));
    assert_eq!(store.get(&key).await.unwrap().unwrap().0, Bytes::from("new"));
    delete(&new).await.unwrap();
    assert_eq!(store.get(&key).await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn operations_that_a_volume_does_not_need_are_refused() {
    let Tested { store, dir: _dir } = file_store().await;
    let key = store.data_key("x");
    store.put(&key, "x").await.unwrap();
    let tagging = store
        .client
        .get_object_tagging()
        .bucket(&store.bucket)
        .key(&key)
        .send()
        .await
        .unwrap_err();
    assert_eq!(status_of(&tagging), Some(501));
    let delimited = store
        .client
        .list_objects_v2()
        .bucket(&store.bucket)
        .delimiter("/")
        .send()
        .await
        .unwrap_err();
    assert_eq!(status_of(&delimited), Some(501));
    let elsewhere = store
        .client
        .get_object()
        .bucket("elsewhere")
        .key(&key)
        .send()
        .await
        .unwrap_err();
    assert_eq!(elsewhere.code(), Some("NoSuchBucket"));
}
