//! What is signed, as a server sees it that checks every signature.

use aws_config::{Region, SdkConfig};
use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::{
    BehaviorVersion, ConfigBag, Credentials, Intercept, RuntimeComponents, SharedCredentialsProvider,
};
use aws_sdk_s3::error::BoxError;
use aws_smithy_types::body::SdkBody;
use parking_lot::Mutex;
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::SimpleAuth;

use super::*;
use crate::store::options::PayloadSigning;
use PayloadSigning::*;

/// Lets signed requests pass and notes what they say of their body.
#[derive(Clone, Default)]
struct Gate(Arc<Mutex<Vec<String>>>);

#[async_trait::async_trait]
impl S3Access for Gate {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> s3s::S3Result<()> {
        let said = context
            .headers()
            .get("x-amz-content-sha256")
            .map(|said| said.to_str().unwrap().to_string());
        self.0.lock().push(said.unwrap_or_default());
        match context.credentials() {
            Some(_) => Ok(()),
            None => Err(s3s::s3_error!(AccessDenied)),
        }
    }
}

/// The client of an S3 volume at `endpoint`, talking to a server in this process.
fn guarded_client(
    dir: Arc<ObjectDir>,
    endpoint: &str,
    payload_signing: PayloadSigning,
    gate: Gate,
) -> Client {
    let mut service = local::service(dir);
    service.set_auth(SimpleAuth::from_single("id", "secret"));
    service.set_access(gate);
    let credentials = Credentials::new("id", "secret", None, None, "test");
    let config = SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::from_static("us-east-1"))
        .credentials_provider(SharedCredentialsProvider::new(credentials))
        .http_client(s3s_aws::Client::from(service.build()))
        .build();
    let options = StoreOptions {
        endpoint_url: Some(endpoint.into()),
        payload_signing,
        ..Default::default()
    };
    s3::client(&config, &options, Some(endpoint))
}

/// A body as Hyperfile sends it: a stream of pieces of memory.
fn stream_of(bytes: &[u8]) -> ByteStream {
    let pieces: Vec<Bytes> = bytes.chunks(10_000).map(Bytes::copy_from_slice).collect();
    ByteStream::new(SdkBody::retryable(move || {
        let pieces = pieces.clone().into_iter().map(Ok::<_, std::io::Error>);
        SdkBody::from_body_1_x(s3s::Body::from(s3s::dto::StreamingBlob::wrap(
            futures::stream::iter(pieces),
        )))
    }))
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_signed_as_chosen_and_arrive_as_they_are() {
    for (endpoint, signing, is_signed) in [
        ("http://local.invalid", Auto, true),
        ("http://local.invalid", Always, true),
        ("http://local.invalid", Never, false),
        ("https://local.invalid", Auto, false),
        ("https://local.invalid", Always, true),
        ("https://local.invalid", Never, false),
    ] {
        let temp = tempfile::tempdir().unwrap();
        let dir = Arc::new(ObjectDir::create(&temp.path().join("vol"), Box::new(RealDisk)).unwrap());
        let gate = Gate::default();
        let client = guarded_client(dir, endpoint, signing, gate.clone());
        let bytes = pattern(200_001, 1);
        for body in [ByteStream::from(bytes.clone()), stream_of(&bytes)] {
            let put = client
                .put_object()
                .bucket(local::BUCKET)
                .key("x")
                .content_length(bytes.len() as i64);
            put.body(body).send().await.unwrap();
            let said = gate.0.lock().pop().unwrap();
            let is_hash = said.len() == 64 && said.bytes().all(|byte| byte.is_ascii_hexdigit());
            assert_eq!(is_hash, is_signed, "{endpoint} {signing:?}: {said}");
            let got = client
                .get_object()
                .bucket(local::BUCKET)
                .key("x")
                .send()
                .await
                .unwrap();
            assert!(
                got.body.collect().await.unwrap().into_bytes() == bytes,
                "{endpoint} {signing:?}"
            );
        }
    }
}

/// Notes whether bodies are one piece by the time they are signed.
#[derive(Debug, Clone, Default)]
struct Joined(Arc<Mutex<Vec<bool>>>);

impl Intercept for Joined {
    fn name(&self) -> &'static str {
        "Joined"
    }

    fn read_before_signing(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        self.0.lock().push(context.request().body().bytes().is_some());
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_body_that_is_signed_is_made_one_piece() {
    for (endpoint, signing, is_joined) in [
        ("http://local.invalid", Auto, true),
        ("http://local.invalid", Never, false),
        ("https://local.invalid", Auto, false),
        ("https://local.invalid", Always, true),
    ] {
        let temp = tempfile::tempdir().unwrap();
        let dir = Arc::new(ObjectDir::create(&temp.path().join("vol"), Box::new(RealDisk)).unwrap());
        let client = guarded_client(dir, endpoint, signing, Gate::default());
        let joined = Joined::default();
        let config = client.config().to_builder().interceptor(joined.clone());
        let client = Client::from_conf(config.build());
        let upload = client.create_multipart_upload().bucket(local::BUCKET).key("x");
        let upload = upload.send().await.unwrap();
        let bytes = pattern(200_001, 1);
        let part = client
            .upload_part()
            .bucket(local::BUCKET)
            .key("x")
            .upload_id(upload.upload_id().unwrap())
            .part_number(1)
            .content_length(bytes.len() as i64);
        part.body(stream_of(&bytes)).send().await.unwrap();
        assert_eq!(joined.0.lock().last(), Some(&is_joined), "{endpoint} {signing:?}");
    }
}
