//! Multipart uploads, as Hyperfile makes them for large segments.

use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};

use super::*;

const MIB: usize = 1 << 20;

async fn begin(store: &Store, key: &str) -> String {
    let request = store
        .client
        .create_multipart_upload()
        .bucket(&store.bucket)
        .key(key)
        .metadata("hf-write", "mark");
    request.send().await.unwrap().upload_id.unwrap()
}

async fn upload(store: &Store, key: &str, id: &str, number: i32, bytes: Vec<u8>) -> CompletedPart {
    let request = store
        .client
        .upload_part()
        .bucket(&store.bucket)
        .key(key)
        .upload_id(id)
        .part_number(number);
    let etag = request.body(bytes.into()).send().await.unwrap().e_tag.unwrap();
    CompletedPart::builder().part_number(number).e_tag(etag).build()
}

/// Completes with If-Match, or with If-None-Match where there is nothing to match; the HTTP status and the error's code.
async fn complete(
    store: &Store,
    key: &str,
    id: &str,
    parts: Vec<CompletedPart>,
    expected: Option<&ETag>,
) -> Result<ETag, (u16, String)> {
    let request = store
        .client
        .complete_multipart_upload()
        .bucket(&store.bucket)
        .key(key)
        .upload_id(id);
    let request =
        request.multipart_upload(CompletedMultipartUpload::builder().set_parts(Some(parts)).build());
    let request = match expected {
        Some(etag) => request.if_match(&etag.0),
        None => request.if_none_match("*"),
    };
    match request.send().await {
        Ok(output) => Ok(ETag(output.e_tag.unwrap())),
        Err(error) => Err((status_of(&error).unwrap(), error.code().unwrap().to_string())),
    }
}

async fn abort(store: &Store, key: &str, id: &str) -> Result<(), String> {
    let request = store
        .client
        .abort_multipart_upload()
        .bucket(&store.bucket)
        .key(key)
        .upload_id(id);
    request
        .send()
        .await
        .map(drop)
        .map_err(|error| error.code().unwrap().to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_in_any_order_become_one_object() {
    for Tested { store, dir: _dir } in stores().await {
        let (key, bytes) = (store.data_key("0000000001"), pattern(64 * MIB, 1));
        let id = begin(&store, &key).await;
        assert_eq!(store.get(&key).await.unwrap(), None);
        let numbers: Vec<usize> = vec![8, 1, 3, 2, 4, 6, 5, 7];
        let uploads = numbers.iter().map(|&number| {
            let part = bytes[(number - 1) * 8 * MIB..number * 8 * MIB].to_vec();
            upload(&store, &key, &id, number as i32, part)
        });
        let mut parts = futures::future::join_all(uploads).await;
        // Hyperfile's last part is empty when the length is a multiple of the others'.
        parts.push(upload(&store, &key, &id, 9, Vec::new()).await);
        // A part sent again replaces the one before.
        parts[1] = upload(&store, &key, &id, 1, bytes[..8 * MIB].to_vec()).await;
        parts.sort_by_key(|part| part.part_number());
        let etag = complete(&store, &key, &id, parts, None).await.unwrap();
        let (got, got_etag) = store.get(&key).await.unwrap().unwrap();
        assert!(got == bytes, "the object is not its parts");
        assert_eq!(got_etag, etag);
        let info = store.head(&key).await.unwrap().unwrap();
        assert_eq!(info.metadata.get("hf-write").map(String::as_str), Some("mark"));
        let range = store
            .get_range(&key, 8 * MIB as u64 - 1, 2)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(range, bytes[8 * MIB - 1..8 * MIB + 1]);
        store.delete(&key).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conditional_completes() {
    for Tested { store, dir: _dir } in stores().await {
        let key = store.data_key("0000000002");
        let id = begin(&store, &key).await;
        let part = upload(&store, &key, &id, 1, b"uploaded".to_vec()).await;
        let parts = || vec![part.clone()];
        let nowhere = ETag("\"0123456789abcdef\"".into());
        let refused = complete(&store, &key, &id, parts(), Some(&nowhere))
            .await
            .unwrap_err();
        assert_eq!(refused, (404, "NoSuchKey".into()));

        let first = store.put(&key, "first").await.unwrap();
        let refused = complete(&store, &key, &id, parts(), None).await.unwrap_err();
        assert_eq!(refused, (412, "PreconditionFailed".into()));
        let second = store.put(&key, "second").await.unwrap();
        let refused = complete(&store, &key, &id, parts(), Some(&first))
            .await
            .unwrap_err();
        assert_eq!(refused, (412, "PreconditionFailed".into()));
        assert_eq!(store.get(&key).await.unwrap().unwrap().0, Bytes::from("second"));

        // A refused upload stays open.
        let third = complete(&store, &key, &id, parts(), Some(&second)).await.unwrap();
        assert_eq!(
            store.get(&key).await.unwrap().unwrap(),
            (Bytes::from("uploaded"), third)
        );
        store.delete(&key).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_completes_have_one_winner() {
    for Tested { store, dir: _dir } in stores().await {
        let key = store.data_key("0000000003");
        let racers = (0..16).map(|racer| {
            let (store, key) = (store.clone(), key.clone());
            tokio::spawn(async move {
                let id = begin(&store, &key).await;
                let part = upload(&store, &key, &id, 1, format!("racer {racer}").into_bytes()).await;
                let result = complete(&store, &key, &id, vec![part], None).await;
                if result.is_err() {
                    abort(&store, &key, &id).await.unwrap();
                }
                result.map(|etag| (Bytes::from(format!("racer {racer}")), etag))
            })
        });
        let mut won = Vec::new();
        for result in futures::future::join_all(racers).await {
            match result.unwrap() {
                Ok(winner) => won.push(winner),
                Err((status, code)) => assert_eq!((status, code.as_str()), (412, "PreconditionFailed")),
            }
        }
        assert_eq!(won.len(), 1);
        assert_eq!(store.get(&key).await.unwrap().unwrap(), won[0]);
        store.delete(&key).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_completes_are_refused_and_make_nothing() {
    for Tested { store, dir } in stores().await {
        let key = store.data_key("0000000004");
        let id = begin(&store, &key).await;
        let small = upload(&store, &key, &id, 1, vec![1; 1000]).await;
        let last = upload(&store, &key, &id, 2, vec![2; 1000]).await;
        let unknown = CompletedPart::builder()
            .part_number(1)
            .e_tag("\"0123456789abcdef\"")
            .build();
        for (parts, code) in [
            (vec![small.clone(), last.clone()], "EntityTooSmall"),
            (vec![last.clone(), small.clone()], "InvalidPartOrder"),
            (vec![unknown], "InvalidPart"),
        ] {
            let refused = complete(&store, &key, &id, parts, None).await.unwrap_err();
            assert_eq!(refused, (400, code.to_string()));
        }
        // The code for a complete without parts differs from service to service.
        assert_eq!(
            complete(&store, &key, &id, vec![], None).await.unwrap_err().0,
            400
        );
        abort(&store, &key, &id).await.unwrap();
        let refused = complete(&store, &key, &id, vec![last], None).await.unwrap_err();
        assert_eq!(refused, (404, "NoSuchUpload".into()));
        assert_eq!(store.get(&key).await.unwrap(), None);
        if let Some(dir) = dir {
            // Aborting an unknown upload is an error of S3, but not of every service.
            assert_eq!(abort(&store, &key, &id).await, Err("NoSuchUpload".into()));
            assert_eq!(scratch_files(dir.path()), ["alive"], "parts are left behind");
        }
    }
}

/// Names of all files in the scratch directories.
fn scratch_files(dir: &Path) -> Vec<String> {
    let scratch = std::fs::read_dir(dir.join("vol/scratch")).unwrap();
    let files = scratch.flat_map(|entry| std::fs::read_dir(entry.unwrap().path()).unwrap());
    files
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}
