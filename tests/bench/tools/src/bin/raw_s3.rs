//! Plain S3 requests at a chosen size and concurrency: the ceiling of the store for the benchmarks.
//!
//! The client is set as the volume's is over plain http (checksums only where required, payload signing chosen
//! by the caller), without retries: a request that fails ends the run, because a figure with failures in it
//! means nothing. Prints one JSON object.

#![deny(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use aws_runtime::auth::PayloadSigningOverride;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextMut;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, ConfigBag, Credentials, Intercept, Region, RequestChecksumCalculation,
    ResponseChecksumValidation, RuntimeComponents,
};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use clap::{Parser, ValueEnum};
use hypernbd_bench_tools::latency::summarise;
use serde_json::json;
use tokio::task::JoinSet;

#[derive(Clone, Copy, ValueEnum)]
enum Operation {
    /// Range reads at random places of one object.
    Get,
    /// Whole objects, each under its own key.
    Put,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Signing {
    Signed,
    Unsigned,
}

/// Sends S3 requests of one size, some at a time, and prints how fast they were as JSON.
///
/// Credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
#[derive(Parser)]
struct Args {
    operation: Operation,
    /// For example http://127.0.0.1:9000
    #[arg(long)]
    endpoint: String,
    #[arg(long)]
    bucket: String,
    #[arg(long, default_value = "us-east-1")]
    region: String,
    /// Keys are made below this prefix.
    #[arg(long, default_value = "raw")]
    prefix: String,
    /// Bytes of each request.
    #[arg(long)]
    size_bytes: usize,
    /// Requests in flight.
    #[arg(long, default_value_t = 1)]
    concurrency: usize,
    /// Stop after this many requests.
    #[arg(long, required_unless_present = "seconds")]
    count: Option<u64>,
    /// Start no request after this many seconds.
    #[arg(long)]
    seconds: Option<f64>,
    /// Send no faster than this, in 1,000,000 bytes per second.
    #[arg(long)]
    mb_per_s: Option<f64>,
    /// Whether the payload of a PUT is hashed into the signature.
    #[arg(long, value_enum, default_value = "unsigned")]
    payload_signing: Signing,
    /// Size of the object that GETs read from; written first, outside the measured time.
    #[arg(long, default_value_t = 64 << 20)]
    object_bytes: usize,
}

/// Leaves the payload out of the signature.
#[derive(Debug)]
struct UnsignedPayload;

impl Intercept for UnsignedPayload {
    fn name(&self) -> &'static str {
        "unsigned payload"
    }

    fn modify_before_signing(
        &self,
        _: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        bag: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        bag.interceptor_state()
            .store_put(PayloadSigningOverride::unsigned_payload());
        Ok(())
    }
}

/// What the requests have in common.
struct Load {
    client: Client,
    args: Args,
    payload: Bytes,
    next: AtomicU64,
    start: Instant,
    stop_at: Option<Instant>,
}

impl Load {
    /// When a request may start at the rate that is asked for.
    fn due_at(&self, number: u64) -> Instant {
        let seconds = |rate| number as f64 * self.args.size_bytes as f64 / (rate * 1e6);
        self.start
            + self
                .args
                .mb_per_s
                .map_or(Duration::ZERO, |rate| Duration::from_secs_f64(seconds(rate)))
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    if args.size_bytes == 0 || args.concurrency == 0 {
        bail!("--size-bytes and --concurrency must be at least 1");
    }
    if args
        .mb_per_s
        .is_some_and(|rate| !rate.is_normal() || rate < 0.001)
    {
        bail!("--mb-per-s must be at least 0.001");
    }
    let client = client(&args)?;
    if let Operation::Get = args.operation {
        let body = payload(args.object_bytes.max(args.size_bytes));
        put(&client, &args.bucket, &source_key(&args), body).await?;
    }
    // One request before the clock starts: connecting is not what is measured.
    client
        .head_bucket()
        .bucket(&args.bucket)
        .send()
        .await
        .with_context(|| format!("bucket {}", args.bucket))?;

    let start = Instant::now();
    let stop_at = args
        .seconds
        .map(|seconds| start + Duration::from_secs_f64(seconds));
    let payload = payload(args.size_bytes);
    let load = Arc::new(Load {
        client,
        payload,
        next: AtomicU64::new(0),
        start,
        stop_at,
        args,
    });
    let mut workers = JoinSet::new();
    for _ in 0..load.args.concurrency {
        workers.spawn(work(load.clone()));
    }
    let mut latencies = Vec::new();
    while let Some(done) = workers.join_next().await {
        latencies.extend(done??);
    }
    let elapsed_s = start.elapsed().as_secs_f64();

    let requests = latencies.len();
    let summary =
        summarise(&mut latencies).context("no request was sent: --seconds or --count is too small")?;
    let report = json!({
        "requests": requests,
        "elapsed_s": elapsed_s,
        "requests_per_s": requests as f64 / elapsed_s,
        "mb_per_s": (requests * load.args.size_bytes) as f64 / 1e6 / elapsed_s,
        "latency": summary,
    });
    println!("{report}");
    Ok(())
}

fn client(args: &Args) -> Result<Client> {
    let variable = |name: &str| std::env::var(name).with_context(|| format!("environment variable {name}"));
    let credentials = Credentials::new(
        variable("AWS_ACCESS_KEY_ID")?,
        variable("AWS_SECRET_ACCESS_KEY")?,
        None,
        None,
        "environment",
    );
    let mut config = aws_sdk_s3::config::Builder::new()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(args.region.clone()))
        .credentials_provider(credentials)
        .endpoint_url(&args.endpoint)
        .force_path_style(true)
        .retry_config(RetryConfig::disabled())
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
    if args.payload_signing == Signing::Unsigned {
        config = config.interceptor(UnsignedPayload);
    }
    Ok(Client::from_conf(config.build()))
}

/// Sends requests until the count or the time is used up; returns how long each took.
async fn work(load: Arc<Load>) -> Result<Vec<Duration>> {
    let mut latencies = Vec::new();
    loop {
        let number = load.next.fetch_add(1, Relaxed);
        tokio::time::sleep_until(load.due_at(number).into()).await;
        let start = Instant::now();
        let enough = load.args.count.is_some_and(|count| number >= count);
        if enough || load.stop_at.is_some_and(|stop_at| start >= stop_at) {
            return Ok(latencies);
        }
        match load.args.operation {
            Operation::Get => get_range(&load, number).await?,
            Operation::Put => {
                let key = format!("{}/{number:010}", load.args.prefix);
                put(&load.client, &load.args.bucket, &key, load.payload.clone()).await?;
            }
        }
        latencies.push(start.elapsed());
    }
}

async fn put(client: &Client, bucket: &str, key: &str, body: Bytes) -> Result<()> {
    let request = client
        .put_object()
        .bucket(bucket)
        .key(key)
        .body(ByteStream::from(body));
    request
        .send()
        .await
        .with_context(|| format!("PUT {bucket}/{key}"))?;
    Ok(())
}

async fn get_range(load: &Load, number: u64) -> Result<()> {
    let args = &load.args;
    let places = (args.object_bytes / args.size_bytes).max(1);
    let start = scatter(number) as usize % places * args.size_bytes;
    let end = start + args.size_bytes - 1;
    let key = source_key(args);
    let request = load
        .client
        .get_object()
        .bucket(&args.bucket)
        .key(&key)
        .range(format!("bytes={start}-{end}"));
    let mut answer = request
        .send()
        .await
        .with_context(|| format!("GET {}/{key}", args.bucket))?;
    let mut len = 0;
    while let Some(piece) = answer.body.next().await {
        len += piece
            .with_context(|| format!("GET {}/{key}: body", args.bucket))?
            .len();
    }
    if len != args.size_bytes {
        bail!(
            "GET {}/{key}: {len} bytes came back, {} were asked for",
            args.bucket,
            args.size_bytes
        );
    }
    Ok(())
}

fn source_key(args: &Args) -> String {
    format!("{}/source", args.prefix)
}

/// Bytes that do not compress.
fn payload(len_bytes: usize) -> Bytes {
    let words = len_bytes.div_ceil(8) as u64;
    let mut bytes: Vec<u8> = (0..words).flat_map(|word| scatter(word).to_le_bytes()).collect();
    bytes.truncate(len_bytes);
    bytes.into()
}

/// Spreads consecutive numbers over the whole range (SplitMix64, public domain, Sebastiano Vigna).
fn scatter(number: u64) -> u64 {
    let mut z = number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
