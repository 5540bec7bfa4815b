//! `s3://`: the SDK's client, set up for a volume.
//!
//! Environment, profiles and the credential chain are the SDK's own, checked before ([`environment`]); options given to us
//! come before them. Retries are the SDK's too (`AWS_MAX_ATTEMPTS`, `AWS_RETRY_MODE`).

use std::sync::Arc;
use std::time::Duration;

use aws_config::imds::region::ImdsRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::{ProfileFileCredentialsProvider, ProfileFileRegionProvider};
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    Region, RequestChecksumCalculation, SharedCredentialsProvider, SharedHttpClient,
    StalledStreamProtectionConfig,
};

use super::Store;
use super::environment::{self, Environment};
use super::error::CONNECT;
use super::interceptors::checksums::Checksums;
use super::interceptors::count_requests::CountRequests;
use super::interceptors::foreign::ForeignAnswers;
use super::interceptors::signing::SignPayload;
use super::interceptors::sse::Encrypt;
use super::interceptors::upload_limiter;
use super::interceptors::window_checksums::WindowChecksums;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::url::VolumeUrl;
use crate::store::options::StoreOptions;

/// Region where nobody names one: the one that S3 services other than AWS take to be theirs.
const DEFAULT_REGION: &str = "us-east-1";
/// Time to establish a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Time from the start of any request to the first byte of its answer: a 16 MiB part on a line of 2 Mbit/s. Most get less
/// ([`answer_time`](super::interceptors::answer_time)).
const READ_TIMEOUT: Duration = Duration::from_secs(70);
/// Time of one attempt.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(90);
/// Time a transfer may stand still.
const STALL_GRACE: Duration = Duration::from_secs(20);
/// Time of the request that [`check`] makes, one attempt and all of them.
const CHECK_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
const CHECK_ATTEMPTS_MAX: u32 = 2;
/// Time of [`check`] as a whole, finding credentials included; and of finding the configuration.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(15);

/// The store of a volume's bucket, not yet asked for anything.
pub(super) async fn unproved(
    url: &VolumeUrl,
    bucket: &str,
    prefix: &str,
    options: &StoreOptions,
) -> Result<Store, StoreError> {
    let credentials = options.profile.as_ref().map(|profile| {
        let of_profile = ProfileFileCredentialsProvider::builder().profile_name(profile);
        SharedCredentialsProvider::new(of_profile.build())
    });
    unproved_as(url, bucket, prefix, options, credentials).await
}

/// As [`unproved`], with the given credentials instead of those of the environment.
async fn unproved_as(
    url: &VolumeUrl,
    bucket: &str,
    prefix: &str,
    options: &StoreOptions,
    credentials: Option<SharedCredentialsProvider>,
) -> Result<Store, StoreError> {
    let environment = environment::read(options.profile.as_deref()).await;
    let environment =
        environment.map_err(|wrong| StoreError::new(CONNECT, url, StoreErrorKind::Refused, wrong))?;
    let endpoint_url = options
        .endpoint_url
        .clone()
        .or_else(|| environment.endpoint_url.clone());
    let http_client = upload_limiter::client(environment.ca_bundle.clone(), options.answer_time)
        .map_err(|wrong| StoreError::new(CONNECT, url, StoreErrorKind::Other, wrong))?;
    let config = load(
        options,
        &environment,
        http_client,
        endpoint_url.is_some(),
        credentials,
    );
    let config = in_time(url, endpoint_url.as_deref().unwrap_or("AWS S3"), config).await?;
    Ok(store(url, bucket, prefix, options, endpoint_url, &config))
}

async fn in_time<R>(url: &VolumeUrl, endpoint: &str, work: impl Future<Output = R>) -> Result<R, StoreError> {
    tokio::time::timeout(CONNECT_TIME_MAX, work).await.map_err(|_| {
        let detail = format!(
            "no answer from {endpoint} within {} s; check endpoint_url, the credentials and the network",
            CONNECT_TIME_MAX.as_secs()
        );
        StoreError::new("connect to", url, StoreErrorKind::Unreachable, detail)
    })
}

fn store(
    url: &VolumeUrl,
    bucket: &str,
    prefix: &str,
    options: &StoreOptions,
    endpoint_url: Option<String>,
    config: &SdkConfig,
) -> Store {
    let region = config.region().map_or(DEFAULT_REGION, |region| region.as_ref());
    let endpoint = match &endpoint_url {
        Some(endpoint) => endpoint.clone(),
        None => format!("https://s3.{region}.amazonaws.com"),
    };
    Store {
        client: client(config, options, endpoint_url.as_deref()),
        bucket: bucket.to_string(),
        root: prefix.to_string(),
        url: url.clone(),
        endpoint: endpoint.into(),
        dir: None,
        remembered: Arc::default(),
        continuity: Arc::default(),
        lineage: Arc::default(),
        metrics: options.metrics.clone(),
    }
}

async fn load(
    options: &StoreOptions,
    environment: &Environment,
    http_client: SharedHttpClient,
    has_endpoint: bool,
    credentials: Option<SharedCredentialsProvider>,
) -> SdkConfig {
    let named = options.region.clone().or_else(|| environment.region.clone());
    let of_profile = ProfileFileRegionProvider::builder().profile_name(&environment.profile);
    let region = RegionProviderChain::first_try(named.map(Region::new)).or_else(of_profile.build());
    // Only a machine of AWS can say which region it is in, and asking elsewhere takes seconds.
    let region = if has_endpoint {
        region
    } else {
        region.or_else(ImdsRegionProvider::builder().build())
    };
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(READ_TIMEOUT)
        .operation_attempt_timeout(ATTEMPT_TIMEOUT)
        .build();
    let loader = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http_client)
        .retry_config(environment.retries.clone())
        .profile_name(&environment.profile)
        .region(region.or_else(Region::from_static(DEFAULT_REGION)))
        .timeout_config(timeouts)
        .stalled_stream_protection(
            StalledStreamProtectionConfig::enabled()
                .grace_period(STALL_GRACE)
                .build(),
        );
    let loader = match credentials {
        Some(credentials) => loader.credentials_provider(credentials),
        None => loader,
    };
    loader.load().await
}

pub(super) fn client(config: &SdkConfig, options: &StoreOptions, endpoint_url: Option<&str>) -> Client {
    let marks = options.seen_marks.of(endpoint_url.unwrap_or_default());
    let mut builder = aws_sdk_s3::config::Builder::from(config)
        .interceptor(CountRequests(options.metrics.clone()))
        .interceptor(WindowChecksums)
        .interceptor(ForeignAnswers(marks))
        .interceptor(SignPayload::new(options.payload_signing, endpoint_url));
    if let Some(encrypt) = Encrypt::from_options(options) {
        builder = builder.interceptor(encrypt);
    }
    builder.set_endpoint_url(endpoint_url.map(str::to_string));
    let foreign = endpoint_url.is_some_and(|endpoint| !is_aws(endpoint));
    if let Some(path_style) = options.path_style.or(foreign.then_some(true)) {
        builder.set_force_path_style(Some(path_style));
    }
    if config.request_checksum_calculation() != Some(RequestChecksumCalculation::WhenRequired) {
        builder = builder.interceptor(Checksums::default());
    }
    // The SDK's own are of another kind for each request, and over plain http each chunk of their bodies is signed, at a
    // quarter of the speed.
    builder = builder.request_checksum_calculation(RequestChecksumCalculation::WhenRequired);
    Client::from_conf(builder.build())
}

/// A listing of one key: needs what a volume needs anyway, and its errors, unlike a HEAD's, say what is wrong.
pub(super) async fn check(store: &Store) -> Result<(), StoreError> {
    in_time(&store.url, &store.endpoint, list_one(store)).await?
}

async fn list_one(store: &Store) -> Result<(), StoreError> {
    let request = store
        .client
        .list_objects_v2()
        .bucket(&store.bucket)
        .prefix(store.data_key(""))
        .max_keys(1);
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .operation_attempt_timeout(CHECK_ATTEMPT_TIMEOUT)
        .build();
    let config = aws_sdk_s3::Config::builder()
        .timeout_config(timeouts)
        .retry_config(RetryConfig::standard().with_max_attempts(CHECK_ATTEMPTS_MAX));
    request
        .customize()
        .config_override(config)
        .send()
        .await
        .map(drop)
        .map_err(|error| StoreError::from_sdk(CONNECT, &store.url, &store.endpoint, error))
}

fn is_aws(endpoint_url: &str) -> bool {
    let host = endpoint_url
        .split_once("://")
        .map_or(endpoint_url, |(_, rest)| rest);
    let host = host.split(['/', ':']).next().unwrap_or_default();
    [".amazonaws.com", ".amazonaws.com.cn", ".api.aws"]
        .iter()
        .any(|suffix| host.ends_with(suffix))
}

#[cfg(test)]
pub(super) mod tests {
    use aws_sdk_s3::config::Credentials;

    use super::*;

    fn parts(url: &VolumeUrl) -> (&str, &str) {
        match url {
            VolumeUrl::S3 { bucket, prefix } => (bucket, prefix),
            VolumeUrl::File { .. } => panic!("{url} is not on S3"),
        }
    }

    /// Connects with credentials that only a test's own server accepts.
    pub async fn connect_with_keys(url: &VolumeUrl, options: &StoreOptions) -> Result<Store, StoreError> {
        let (bucket, prefix) = parts(url);
        let credentials = Credentials::new("test-key-id", "test-secret", None, None, "test");
        let credentials = Some(SharedCredentialsProvider::new(credentials));
        let store = unproved_as(url, bucket, prefix, options, credentials).await?;
        check(&store).await?;
        Ok(store)
    }

    /// Connects where there are no credentials.
    pub async fn connect_without_keys(url: &VolumeUrl, options: &StoreOptions) -> Result<Store, StoreError> {
        let (bucket, prefix) = parts(url);
        let profile =
            aws_config::profile::ProfileFileCredentialsProvider::builder().profile_name("no-such-profile");
        let credentials = SharedCredentialsProvider::new(profile.build());
        let store = unproved_as(url, bucket, prefix, options, Some(credentials)).await?;
        check(&store).await?;
        Ok(store)
    }

    /// The store of a bucket that need not exist.
    pub async fn unchecked(url: &VolumeUrl, options: &StoreOptions) -> Store {
        let (bucket, prefix) = parts(url);
        let http_client = upload_limiter::client(None, None).expect("the system's certificates");
        let config = load(options, &Environment::default(), http_client, true, None).await;
        store(
            url,
            bucket,
            prefix,
            options,
            options.endpoint_url.clone(),
            &config,
        )
    }

    #[test]
    fn aws_is_told_from_others() {
        for (endpoint, expected) in [
            ("https://s3.eu-west-1.amazonaws.com", true),
            (
                "https://bucket.vpce-1a2b.s3.us-east-1.vpce.amazonaws.com:443/",
                true,
            ),
            ("http://127.0.0.1:9000", false),
            ("https://minio.example.com/amazonaws.com", false),
            ("https://amazonaws.com.example.org", false),
        ] {
            assert_eq!(is_aws(endpoint), expected, "{endpoint}");
        }
    }
}
