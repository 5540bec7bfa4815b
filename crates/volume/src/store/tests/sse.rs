//! Which requests ask for encryption, as a server sees them.

use aws_config::{Region, SdkConfig};
use aws_sdk_s3::config::{BehaviorVersion, Credentials, SharedCredentialsProvider};
use parking_lot::Mutex;
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::SimpleAuth;

use super::*;
use crate::metrics::Metrics;
use crate::store::options::ServerSideEncryption;
use crate::store::probe;

type Seen = Arc<Mutex<Vec<(String, Option<String>, Option<String>)>>>;

/// Notes each operation and its two headers.
#[derive(Clone, Default)]
struct Witness(Seen);

#[async_trait::async_trait]
impl S3Access for Witness {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> s3s::S3Result<()> {
        let header = |name: &str| {
            let value = context.headers().get(name)?;
            Some(value.to_str().unwrap().to_owned())
        };
        self.0.lock().push((
            context.s3_op().name().to_owned(),
            header("x-amz-server-side-encryption"),
            header("x-amz-server-side-encryption-aws-kms-key-id"),
        ));
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_object_and_no_other_request_asks_for_encryption() {
    let kms = Some(ServerSideEncryption::Kms);
    for (sse, key_id, expected) in [
        (None, None, None),
        (Some(ServerSideEncryption::Aes256), None, Some(("AES256", None))),
        (kms, None, Some(("aws:kms", None))),
        (kms, Some("alias/disks"), Some(("aws:kms", Some("alias/disks")))),
    ] {
        let temp = tempfile::tempdir().unwrap();
        let dir = Arc::new(ObjectDir::create(&temp.path().join("vol"), Box::new(RealDisk)).unwrap());
        let witness = Witness::default();
        let mut service = local::service(dir.clone());
        service.set_auth(SimpleAuth::from_single("id", "secret"));
        service.set_access(witness.clone());
        let credentials = Credentials::new("id", "secret", None, None, "test");
        let config = SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::from_static("us-east-1"))
            .credentials_provider(SharedCredentialsProvider::new(credentials))
            .http_client(s3s_aws::Client::from(service.build()))
            .build();
        let options = StoreOptions {
            endpoint_url: Some("http://local.invalid".into()),
            sse,
            sse_kms_key_id: key_id.map(str::to_owned),
            ..Default::default()
        };
        let mut store = Store::of_dir(&file_url(temp.path()), dir, temp.path(), &Metrics::default());
        store.client = s3::client(&config, &options, Some("http://local.invalid"));
        // Every kind of request that a volume makes.
        let checks = probe::run(&store).await.unwrap();
        assert!(checks.iter().all(|check| check.failure.is_none()), "{checks:?}");

        let seen = witness.0.lock();
        let mut makers = 0;
        for (operation, with, key_id) in seen.iter() {
            let makes = ["PutObject", "CreateMultipartUpload"].contains(&operation.as_str());
            makers += u32::from(makes);
            let expected = expected.filter(|_| makes);
            assert_eq!(with.as_deref(), expected.map(|e| e.0), "{operation}");
            assert_eq!(key_id.as_deref(), expected.and_then(|e| e.1), "{operation}");
        }
        let has = |name: &str| seen.iter().any(|(operation, ..)| operation == name);
        assert!(makers > 10 && has("UploadPart") && has("CompleteMultipartUpload") && has("GetObject"));
    }
}
