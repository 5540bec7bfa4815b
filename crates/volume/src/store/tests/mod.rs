//! What a volume relies on, tried against a `file://` store always and against the S3 service named by
//! `HYPERNBD_TEST_S3_ENDPOINT` (bucket `HYPERNBD_TEST_S3_BUCKET`, made if absent; credentials from the environment)
//! when it is set.

mod answers;
mod behaviour;
mod crash;
mod durability;
mod hyperfile;
mod multipart;
mod probe;
mod reaching;
mod signing;
mod sse;
mod unfit;

use std::time::Duration;

use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use tempfile::TempDir;

use super::error::status_of;
use super::*;

/// A store under test, empty at first.
pub(super) struct Tested {
    pub(super) store: Store,
    /// The directory of a `file://` store.
    dir: Option<TempDir>,
}

fn file_url(path: &Path) -> VolumeUrl {
    VolumeUrl::File {
        path: path.to_path_buf(),
    }
}

pub(super) async fn file_store() -> Tested {
    let dir = tempfile::tempdir().unwrap();
    let store = connect_for_create(&file_url(&dir.path().join("vol")), &StoreOptions::default())
        .await
        .unwrap();
    Tested {
        store,
        dir: Some(dir),
    }
}

async fn s3_store(endpoint: String) -> Tested {
    let bucket = std::env::var("HYPERNBD_TEST_S3_BUCKET").unwrap_or_else(|_| "hypernbd-test".into());
    let prefix = format!("store/{}", uuid::Uuid::new_v4().simple());
    let url = VolumeUrl::S3 {
        bucket: bucket.clone(),
        prefix,
    };
    let options = StoreOptions {
        endpoint_url: Some(endpoint),
        ..Default::default()
    };
    if let Err(error) = connect(&url, &options).await {
        assert_eq!(error.kind, StoreErrorKind::NotFound, "{error}");
        let unchecked = s3::tests::unchecked(&url, &options).await;
        // Another test may make it at the same time.
        let _ = unchecked.client.create_bucket().bucket(&bucket).send().await;
    }
    Tested {
        store: connect(&url, &options).await.unwrap(),
        dir: None,
    }
}

/// Every kind of store there is to test.
async fn stores() -> Vec<Tested> {
    let mut stores = vec![file_store().await];
    if let Ok(endpoint) = std::env::var("HYPERNBD_TEST_S3_ENDPOINT") {
        stores.push(s3_store(endpoint).await);
    }
    stores
}

/// `len` bytes that differ by place and seed.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
