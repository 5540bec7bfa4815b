//! `file://`: an S3 server in this process, over a directory, without a socket.
//!
//! The SDK's client hands its requests to [`s3s`] through `s3s-aws`; what they mean is here, how they become durable
//! in [`object_dir`]. There is one bucket, [`BUCKET`]. The operations are those that a volume needs; all
//! others answer NotImplemented. Conditional writes answer as AWS S3 and MinIO do: 412 PreconditionFailed for an
//! object that is another one, 404 NoSuchKey for If-Match on an absent one. ETags are random, one a write, so that
//! nobody has to hash the data; an ETag therefore says more than that the bytes are equal.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};
use bytes::Bytes;
use futures::{TryStreamExt, stream};
use s3s::dto::*;
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use tokio::task::spawn_blocking;
use uuid::Uuid;

use super::interceptors::count_requests::CountRequests;
use super::interceptors::window_checksums::WindowChecksums;
use crate::metrics::Metrics;
use object_dir::{Condition, ObjectDir, OpenObject, Page, copy_exactly, read_at, write_all};
use object_file::ObjectHeader;
use scratch::Upload;

pub(super) mod layout;
mod multipart;
pub(crate) mod object_dir;
pub(super) mod object_file;
mod scratch;

/// The only bucket.
pub(super) const BUCKET: &str = "local";
/// A range is read in pieces of this size.
const READ_LEN_BYTES: u64 = 4 << 20;
/// S3's page size.
const LIST_KEYS_MAX: i32 = 1000;

/// The S3 server of a directory.
pub(super) fn service(dir: Arc<ObjectDir>) -> S3ServiceBuilder {
    S3ServiceBuilder::new(LocalS3 { dir })
}

/// A client of the store in a directory.
pub(super) fn client(dir: Arc<ObjectDir>, metrics: &Metrics) -> Client {
    // No network: nothing is signed, times out or is sent again, so every request is carried out once.
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::from_static("local"))
        .endpoint_url("http://local.invalid")
        .force_path_style(true)
        .allow_no_auth()
        .http_client(s3s_aws::Client::from(service(dir).build()))
        .interceptor(CountRequests(metrics.clone()))
        .interceptor(WindowChecksums)
        .retry_config(RetryConfig::disabled())
        .timeout_config(TimeoutConfig::disabled())
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
        .build();
    Client::from_conf(config)
}

struct LocalS3 {
    dir: Arc<ObjectDir>,
}

impl LocalS3 {
    /// Runs what blocks on the disk where it holds nobody up. It is finished even when nobody waits for it any more.
    async fn run<T, F>(&self, work: F) -> S3Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&ObjectDir) -> S3Result<T> + Send + 'static,
    {
        let dir = self.dir.clone();
        spawn_blocking(move || work(&dir))
            .await
            .map_err(S3Error::internal_error)?
    }

    async fn find(
        &self,
        key: &str,
        if_match: Option<IfMatch>,
        if_none_match: Option<IfNoneMatch>,
    ) -> S3Result<OpenObject> {
        let key = key.to_string();
        let object = self.run(move |dir| dir.get(&key)).await?;
        let is = |condition: &ETagCondition| {
            condition
                .as_etag()
                .is_none_or(|etag| etag.value() == object.header.etag)
        };
        if if_match.as_ref().is_some_and(|condition| !is(condition)) {
            return Err(s3_error!(PreconditionFailed));
        }
        if if_none_match.as_ref().is_some_and(is) {
            return Err(s3_error!(NotModified));
        }
        Ok(object)
    }
}

#[async_trait]
impl S3 for LocalS3 {
    async fn head_bucket(
        &self,
        request: S3Request<HeadBucketInput>,
    ) -> S3Result<S3Response<HeadBucketOutput>> {
        check_bucket(&request.input.bucket)?;
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        if input.part_number.is_some() || input.version_id.is_some() {
            return Err(s3_error!(NotImplemented));
        }
        let OpenObject { file, header } = self.find(&input.key, input.if_match, input.if_none_match).await?;
        let len_bytes = header.data_len_bytes;
        let range = match &input.range {
            // The end of an empty object is no range either.
            Some(_) if len_bytes == 0 => return Err(s3_error!(InvalidRange)),
            Some(range) => range.check(len_bytes)?,
            None => 0..len_bytes,
        };
        let output = GetObjectOutput {
            content_length: Some(signed(range.end - range.start)?),
            content_range: input
                .range
                .map(|_| format!("bytes {}-{}/{len_bytes}", range.start, range.end - 1)),
            e_tag: Some(ETag::Strong(header.etag.clone())),
            last_modified: Some(Timestamp::from(header.modified())),
            metadata: some_metadata(&header),
            body: Some(body_of(file, range)),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn head_object(
        &self,
        request: S3Request<HeadObjectInput>,
    ) -> S3Result<S3Response<HeadObjectOutput>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        if input.part_number.is_some() || input.version_id.is_some() || input.range.is_some() {
            return Err(s3_error!(NotImplemented));
        }
        let object = self.find(&input.key, input.if_match, input.if_none_match).await;
        let header = object.map_err(without_body)?.header;
        let output = HeadObjectOutput {
            content_length: Some(signed(header.data_len_bytes)?),
            e_tag: Some(ETag::Strong(header.etag.clone())),
            last_modified: Some(Timestamp::from(header.modified())),
            metadata: some_metadata(&header),
            ..Default::default()
        };
        let mut response = S3Response::new(output);
        // Servers send it with every answer; Hyperfile compares it with Last-Modified.
        let now =
            aws_smithy_types::DateTime::from_secs(aws_smithy_types::DateTime::from(SystemTime::now()).secs());
        let date = now
            .fmt(aws_smithy_types::date_time::Format::HttpDate)
            .map_err(S3Error::internal_error)?;
        response
            .headers
            .insert("date", date.parse().map_err(S3Error::internal_error)?);
        Ok(response)
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        let condition = condition_of(input.if_match, input.if_none_match)?;
        let body = collect(input.body, input.content_length).await?;
        let (key, metadata) = (input.key, input.metadata.unwrap_or_default());
        let header = self
            .run(move |dir| dir.put(&key, metadata, &condition, |file| write_all(file, &body)))
            .await?;
        let output = PutObjectOutput {
            e_tag: Some(ETag::Strong(header.etag)),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn copy_object(
        &self,
        request: S3Request<CopyObjectInput>,
    ) -> S3Result<S3Response<CopyObjectOutput>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        let CopySource::Bucket {
            bucket,
            key: source,
            version_id: None,
        } = input.copy_source
        else {
            return Err(s3_error!(NotImplemented));
        };
        check_bucket(&bucket)?;
        if input.copy_source_if_modified_since.is_some() || input.copy_source_if_unmodified_since.is_some() {
            return Err(s3_error!(NotImplemented));
        }
        let found = self
            .find(
                &source,
                input.copy_source_if_match,
                input.copy_source_if_none_match,
            )
            .await;
        let OpenObject { file, header } = found.map_err(|error| match error.code() {
            S3ErrorCode::NotModified => s3_error!(PreconditionFailed),
            _ => error,
        })?;
        let replaces = input
            .metadata_directive
            .is_some_and(|directive| directive.as_str() == MetadataDirective::REPLACE);
        let metadata = if replaces {
            input.metadata.unwrap_or_default()
        } else {
            header.metadata
        };
        let key = input.key;
        let copy = move |dir: &ObjectDir| {
            dir.put(&key, metadata, &Condition::None, |to| {
                let data = io::Read::take(&file, header.data_len_bytes);
                copy_exactly(data, to, header.data_len_bytes)
            })
        };
        let header = self.run(copy).await?;
        let result = CopyObjectResult {
            last_modified: Some(Timestamp::from(header.modified())),
            e_tag: Some(ETag::Strong(header.etag)),
            ..Default::default()
        };
        Ok(S3Response::new(CopyObjectOutput {
            copy_object_result: Some(result),
            ..Default::default()
        }))
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> S3Result<S3Response<DeleteObjectOutput>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        if input.version_id.is_some() {
            return Err(s3_error!(NotImplemented));
        }
        // `if_match_last_modified_time` and `if_match_size` say nothing that the ETag, one a write, does not.
        let condition = condition_of(input.if_match, None)?;
        self.run(move |dir| dir.delete(&input.key, &condition)).await?;
        Ok(S3Response::new(DeleteObjectOutput::default()))
    }

    async fn delete_objects(
        &self,
        request: S3Request<DeleteObjectsInput>,
    ) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        let quiet = input.delete.quiet == Some(true);
        let remove = move |dir: &ObjectDir| {
            let (mut deleted, mut errors) = (Vec::new(), Vec::new());
            for object in input.delete.objects {
                let condition = object
                    .e_tag
                    .map_or(Condition::None, |etag| Condition::Matches(etag.into_value()));
                let key = Some(object.key.clone());
                match dir.delete(&object.key, &condition) {
                    Ok(()) => deleted.push(DeletedObject {
                        key,
                        ..Default::default()
                    }),
                    Err(error) => errors.push(Error {
                        key,
                        code: Some(error.code().as_str().to_string()),
                        message: error.message().map(str::to_string),
                        version_id: None,
                    }),
                }
            }
            Ok((deleted, errors))
        };
        let (deleted, errors) = self.run(remove).await?;
        let output = DeleteObjectsOutput {
            deleted: (!quiet).then_some(deleted),
            errors: (!errors.is_empty()).then_some(errors),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn list_objects_v2(
        &self,
        request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        if input
            .delimiter
            .as_ref()
            .is_some_and(|delimiter| !delimiter.is_empty())
            || input.encoding_type.is_some()
        {
            return Err(s3_error!(NotImplemented));
        }
        let max_keys = input.max_keys.unwrap_or(LIST_KEYS_MAX).clamp(0, LIST_KEYS_MAX);
        let prefix = input.prefix.clone().unwrap_or_default();
        // The token is the key to go on after.
        let after = input.continuation_token.clone().or(input.start_after.clone());
        let Page { found, next } = self
            .run(move |dir| dir.list(&prefix, after.as_deref(), max_keys as usize))
            .await?;
        let contents: Vec<Object> = found
            .into_iter()
            .map(|(key, header)| {
                Ok(Object {
                    key: Some(key),
                    size: Some(signed(header.data_len_bytes)?),
                    last_modified: Some(Timestamp::from(header.modified())),
                    e_tag: Some(ETag::Strong(header.etag)),
                    ..Default::default()
                })
            })
            .collect::<S3Result<_>>()?;
        let output = ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: input.prefix,
            max_keys: Some(max_keys),
            key_count: Some(contents.len() as i32),
            is_truncated: Some(next.is_some()),
            continuation_token: input.continuation_token,
            next_continuation_token: next,
            start_after: input.start_after,
            contents: Some(contents),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        let id = Uuid::new_v4().simple().to_string();
        let upload = Upload {
            key: input.key.clone(),
            metadata: input.metadata.unwrap_or_default(),
            ..Default::default()
        };
        let upload_id = Some(id.clone());
        self.run(move |dir| Ok(dir.scratch()?.uploads.lock().insert(id, upload)))
            .await?;
        let output = CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id,
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn upload_part(
        &self,
        request: S3Request<UploadPartInput>,
    ) -> S3Result<S3Response<UploadPartOutput>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        if !(1..=10_000).contains(&input.part_number) {
            return Err(s3_error!(InvalidArgument));
        }
        let body = collect(input.body, input.content_length).await?;
        let store = move |dir: &ObjectDir| {
            multipart::store_part(dir, &input.upload_id, &input.key, input.part_number, &body)
        };
        let etag = self.run(store).await?;
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(ETag::Strong(etag)),
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        let condition = condition_of(input.if_match, input.if_none_match)?;
        let named = input
            .multipart_upload
            .and_then(|upload| upload.parts)
            .unwrap_or_default();
        let (key, upload_id) = (input.key.clone(), input.upload_id);
        let header = self
            .run(move |dir| multipart::complete(dir, &upload_id, &key, named, &condition))
            .await?;
        let output = CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(ETag::Strong(header.etag)),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = request.input;
        check_bucket(&input.bucket)?;
        self.run(move |dir| multipart::abort(dir, &input.upload_id))
            .await?;
        Ok(S3Response::new(AbortMultipartUploadOutput::default()))
    }
}

fn check_bucket(bucket: &str) -> S3Result<()> {
    if bucket == BUCKET {
        Ok(())
    } else {
        Err(s3_error!(NoSuchBucket))
    }
}

fn condition_of(if_match: Option<IfMatch>, if_none_match: Option<IfNoneMatch>) -> S3Result<Condition> {
    match (if_match, if_none_match) {
        (None, None) => Ok(Condition::None),
        (None, Some(ETagCondition::Any)) => Ok(Condition::Absent),
        (Some(ETagCondition::ETag(etag)), None) => Ok(Condition::Matches(etag.into_value())),
        // S3 itself knows no others for writes.
        _ => Err(s3_error!(NotImplemented)),
    }
}

fn some_metadata(header: &ObjectHeader) -> Option<Metadata> {
    (!header.metadata.is_empty()).then(|| header.metadata.clone())
}

fn signed(len_bytes: u64) -> S3Result<i64> {
    i64::try_from(len_bytes).map_err(S3Error::internal_error)
}

/// An error to a HEAD has no body, hence no code but the status: so that the SDK reads a 404 as `NotFound`.
fn without_body(error: S3Error) -> S3Error {
    match (error.code(), error.status_code()) {
        (S3ErrorCode::NoSuchKey, Some(status)) => {
            let mut absent = S3Error::new(S3ErrorCode::Custom("NotFound".into()));
            absent.set_status_code(status);
            absent
        }
        _ => error,
    }
}

/// The pieces of a request's body. They are the sender's own memory, not copies.
async fn collect(body: Option<StreamingBlob>, content_length: Option<i64>) -> S3Result<Vec<Bytes>> {
    let Some(body) = body else { return Ok(Vec::new()) };
    let pieces: Vec<Bytes> = body
        .try_collect()
        .await
        .map_err(|error| S3Error::with_source(S3ErrorCode::IncompleteBody, error))?;
    let len_bytes: usize = pieces.iter().map(Bytes::len).sum();
    if content_length.is_some_and(|expected| usize::try_from(expected) != Ok(len_bytes)) {
        return Err(s3_error!(IncompleteBody));
    }
    Ok(pieces)
}

/// A body that reads the range from the file piece by piece.
fn body_of(file: File, range: std::ops::Range<u64>) -> StreamingBlob {
    let pieces = stream::try_unfold((Arc::new(file), range), |(file, range)| async move {
        if range.is_empty() {
            return Ok(None);
        }
        let len_bytes = (range.end - range.start).min(READ_LEN_BYTES);
        let (source, at) = (file.clone(), range.start);
        let piece = spawn_blocking(move || read_at(&source, at, len_bytes as usize))
            .await
            .map_err(io::Error::other)??;
        Ok::<_, io::Error>(Some((piece, (file, at + len_bytes..range.end))))
    });
    StreamingBlob::wrap(pieces)
}
