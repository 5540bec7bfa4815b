//! Reading, writing, listing and deleting objects, with the handling of lost answers and of conflicts.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use aws_smithy_checksums::body::validate::Error as ChecksumError;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::error::status_of;
use super::frames::Frames;
use super::interceptors::window_checksums;
use super::{ETag, ObjectEntry, ObjectInfo, Store};
use crate::base::store_error::{StoreError, StoreErrorKind};

/// User metadata key for the mark of a conditional write (the write mark). It distinguishes a write's own
/// retransmission from another writer's write.
const WRITE_MARK: &str = "hypernbd-write";
/// Attempts of a read whose body breaks off.
const READ_ATTEMPTS_MAX: usize = 4;
/// Attempts of a conditional write that meets another one in progress (409). S3 gives that answer to racing writers, of
/// which none may have won, and asks for another attempt:
/// <https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html>.
const CONFLICT_ATTEMPTS_MAX: u64 = 10;
/// Longest wait before the second such attempt, in milliseconds. It grows with each attempt, and is random, so that the
/// writers do not meet again.
const CONFLICT_PAUSE_MS: u64 = 100;
/// The most keys in one DeleteObjects request.
pub(crate) const DELETE_KEYS_MAX: usize = 1000;
/// Deletions in flight at once when a store accepts only one key for each request.
const DELETIONS_AT_ONCE: usize = 16;

impl Store {
    /// The result of a HEAD of the object; `None` if the object does not exist.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn head(&self, key: &str) -> Result<Option<ObjectInfo>, StoreError> {
        let found = self
            .client
            .head_object()
            .bucket(&self.bucket)
            .key(key)
            .send()
            .await;
        let Some(output) = absent_is_none(found.map_err(|error| self.error("look at", key, error)))? else {
            return Ok(None);
        };
        Ok(Some(ObjectInfo {
            size_bytes: size(output.content_length()),
            etag: self.etag("look at", key, output.e_tag)?,
            last_modified: time(output.last_modified.as_ref()),
            metadata: output.metadata.unwrap_or_default(),
        }))
    }

    /// The object's data and its ETag; `None` if the object does not exist.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn get(&self, key: &str) -> Result<Option<(Bytes, ETag)>, StoreError> {
        let got = self.fetch(key, None).await?;
        Ok(got.map(|(frames, info)| (frames.together(), info.etag)))
    }

    /// The object's data, and what a HEAD says of it; `None` if the object does not exist.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn get_with_info(&self, key: &str) -> Result<Option<(Bytes, ObjectInfo)>, StoreError> {
        let got = self.fetch(key, None).await?;
        Ok(got.map(|(frames, info)| (frames.together(), info)))
    }

    /// Exactly `len_bytes` bytes at `offset_bytes` of the object; `None` if the object does not exist.
    ///
    /// # Errors
    /// [`StoreError`], also when the object ends before the range does.
    pub async fn get_range(
        &self,
        key: &str,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Option<Bytes>, StoreError> {
        let found = self.get_frames(key, offset_bytes, len_bytes).await?;
        Ok(found.map(Frames::together))
    }

    /// As [`get_range`](Self::get_range), without joining the bytes into one piece.
    ///
    /// # Errors
    /// As [`get_range`](Self::get_range).
    pub async fn get_frames(
        &self,
        key: &str,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Option<Frames>, StoreError> {
        if len_bytes == 0 {
            return Ok(Some(Frames::default()));
        }
        let found = self.fetch_within(key, offset_bytes, len_bytes).await?;
        let found = found.map(|(frames, _)| frames);
        if let Some(frames) = &found
            && frames.len() as u64 != len_bytes
        {
            return Err(self.ends_early(key, offset_bytes, len_bytes));
        }
        Ok(found)
    }

    /// As [`get_frames`](Self::get_frames), of bytes that were compared with the check values of their object, where it has any: what
    /// is asked of the store is widened to whole windows of these.
    ///
    /// # Errors
    /// As [`get_range`](Self::get_range); `Corrupt` when they are not those that were written.
    pub async fn get_verified(
        &self,
        key: &str,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Option<Frames>, StoreError> {
        if len_bytes == 0 {
            return Ok(Some(Frames::default()));
        }
        let windows_of = |window_bytes: u64| {
            let start = offset_bytes - offset_bytes % window_bytes;
            start..(offset_bytes + len_bytes).next_multiple_of(window_bytes)
        };
        let mut asked = windows_of(window_checksums::WINDOW_BYTES);
        let Some((mut frames, info)) = self
            .fetch_within(key, asked.start, asked.end - asked.start)
            .await?
        else {
            return Ok(None);
        };
        let wide = windows_of(window_checksums::WIDE_WINDOW_BYTES);
        let is_all =
            wide.start == asked.start && asked.start + frames.len() as u64 >= info.size_bytes.min(wide.end);
        // Objects of earlier releases have values of wide windows alone, of which a part tells nothing.
        if !is_all
            && window_checksums::has_checksums(&info)
            && !window_checksums::is_narrow(&info)
            && self.sums_of(key, &info).await?.is_none()
        {
            let again = self.fetch_within(key, wide.start, wide.end - wide.start).await?;
            let Some((of_wide, _)) = again else {
                return Ok(None);
            };
            (frames, asked) = (of_wide, wide);
        }
        let before = offset_bytes - asked.start;
        let wanted = before as usize..(before + len_bytes) as usize;
        let wanted = frames.part(wanted);
        // It was cut short, as one that begins behind its end is.
        wanted.map(Some).ok_or_else(|| StoreError {
            kind: StoreErrorKind::Corrupt,
            ..self.ends_early(key, offset_bytes, len_bytes)
        })
    }

    /// The error of a read that reaches past the end of its object.
    fn ends_early(&self, key: &str, offset_bytes: u64, len_bytes: u64) -> StoreError {
        let detail = format!("the object ends within {len_bytes} bytes at {offset_bytes}");
        StoreError::new("read", self.target(key), StoreErrorKind::Other, detail)
    }

    /// Up to `len_bytes` bytes at `offset_bytes`, which must lie inside the object: fewer where it ends before. `None`
    /// if it does not exist.
    ///
    /// # Errors
    /// [`StoreError`], also when the store sends more than was requested.
    pub async fn get_within(
        &self,
        key: &str,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Option<Bytes>, StoreError> {
        if len_bytes == 0 {
            return Ok(Some(Bytes::new()));
        }
        let got = self.get_within_info(key, offset_bytes, len_bytes).await?;
        Ok(got.map(|(bytes, _)| bytes))
    }

    /// As [`get_within`](Self::get_within), with what a HEAD says of the object.
    ///
    /// # Errors
    /// As [`get_within`](Self::get_within).
    pub async fn get_within_info(
        &self,
        key: &str,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Option<(Bytes, ObjectInfo)>, StoreError> {
        let got = self.fetch_within(key, offset_bytes, len_bytes).await?;
        Ok(got.map(|(frames, info)| (frames.together(), info)))
    }

    async fn fetch_within(
        &self,
        key: &str,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Option<(Frames, ObjectInfo)>, StoreError> {
        let last = offset_bytes.saturating_add(len_bytes.max(1) - 1);
        let range = format!("bytes={offset_bytes}-{last}");
        let Some((bytes, info)) = self.fetch(key, Some(range)).await? else {
            return Ok(None);
        };
        if bytes.len() as u64 > len_bytes {
            let detail = format!("{} sent more than bytes {offset_bytes} to {last}", self.endpoint);
            return Err(StoreError::new(
                "read",
                self.target(key),
                StoreErrorKind::Other,
                detail,
            ));
        }
        Ok(Some((bytes, info)))
    }

    /// The answer to a GET with this Range header; `None` if the object does not exist.
    pub(super) async fn get_as(&self, key: &str, range: &str) -> Result<Option<Bytes>, StoreError> {
        let got = self.fetch(key, Some(range.to_owned())).await?;
        Ok(got.map(|(frames, _)| frames.together()))
    }

    /// Reads bytes and checks that they are those that were written, if the object carries checksums
    /// (`window_checksums`), and of the volume that is expected here (`continuity`).
    async fn fetch(
        &self,
        key: &str,
        range: Option<String>,
    ) -> Result<Option<(Frames, ObjectInfo)>, StoreError> {
        let got = self.fetch_version(key, None, range).await;
        let written = match &got {
            Ok(found) => found.as_ref().map(|(_, info)| info.last_modified),
            // In another volume's object other things are at these places, which looks like damage.
            Err(e) if e.kind == StoreErrorKind::Corrupt => None,
            Err(_) => return got,
        };
        self.ensure_own(key, written).await?;
        got
    }

    /// As [`fetch`](Self::fetch), of a version that is named, where one is.
    pub(super) async fn fetch_version(
        &self,
        key: &str,
        version: Option<&str>,
        range: Option<String>,
    ) -> Result<Option<(Frames, ObjectInfo)>, StoreError> {
        let mut attempt = 1;
        loop {
            let request = self
                .client
                .get_object()
                .bucket(&self.bucket)
                .key(key)
                .set_version_id(version.map(str::to_owned))
                .set_range(range.clone());
            let sent = request
                .send()
                .await
                .map_err(|error| self.error("read", key, error));
            let Some(output) = absent_is_none(sent)? else {
                return Ok(None);
            };
            let mut info = ObjectInfo {
                size_bytes: 0,
                etag: self.etag("read", key, output.e_tag)?,
                last_modified: time(output.last_modified.as_ref()),
                metadata: output.metadata.unwrap_or_default(),
            };
            // The SDK repeats requests, but not those whose bodies break off or are damaged on their way.
            let (kind, detail) = match output.body.collect().await.map(Frames::take) {
                Ok(bytes) => match self
                    .checked(
                        key,
                        &mut info,
                        range.as_deref(),
                        output.content_range.as_deref(),
                        &bytes,
                    )
                    .await?
                {
                    Ok(()) => return Ok(Some((bytes, info))),
                    Err(reason) => {
                        let detail = format!("what {} sends is damaged: {reason}", self.endpoint);
                        (StoreErrorKind::Corrupt, detail)
                    }
                },
                Err(error) if is_mismatch(&error) => {
                    let detail = format!("what {} sends is damaged: {error}", self.endpoint);
                    (StoreErrorKind::Corrupt, detail)
                }
                Err(error) => {
                    let detail = format!(
                        "the answer of {} broke off {attempt} times ({error})",
                        self.endpoint
                    );
                    (StoreErrorKind::Unreachable, detail)
                }
            };
            if attempt == READ_ATTEMPTS_MAX {
                return Err(StoreError::new("read", self.target(key), kind, detail));
            }
            attempt += 1;
        }
    }

    /// Checks an answer by its object's check values, if it has any, and enters the size of the object.
    async fn checked(
        &self,
        key: &str,
        info: &mut ObjectInfo,
        range: Option<&str>,
        content_range: Option<&str>,
        bytes: &Frames,
    ) -> Result<Result<(), String>, StoreError> {
        let sealed = window_checksums::check_name(&info.metadata, key)
            .and_then(|()| window_checksums::place_of(content_range, bytes.len() as u64))
            .and_then(|place| window_checksums::check_place(range, place, bytes.len() as u64).map(|()| place))
            .and_then(|(offset_bytes, object_bytes)| {
                if let Some(seal) = info.metadata.get(window_checksums::METADATA_KEY) {
                    window_checksums::verify_frames(seal, offset_bytes, bytes, object_bytes)?;
                }
                Ok((offset_bytes, object_bytes))
            });
        match sealed {
            Ok((offset_bytes, object_bytes)) => {
                info.size_bytes = object_bytes;
                self.verify_apart(key, info, offset_bytes, bytes).await
            }
            Err(reason) => Ok(Err(reason)),
        }
    }

    /// Writes the object, whatever was there.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn put(&self, key: &str, bytes: impl Into<Bytes>) -> Result<ETag, StoreError> {
        let request = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(key)
            .body(ByteStream::from(bytes.into()));
        let output = request
            .send()
            .await
            .map_err(|error| self.error("write", key, error))?;
        self.etag("write", key, output.e_tag)
    }

    /// Creates the object.
    ///
    /// # Errors
    /// `PreconditionFailed` if there is an object that this call did not write.
    pub async fn put_create_only(&self, key: &str, bytes: impl Into<Bytes>) -> Result<ETag, StoreError> {
        self.put_conditional("create", key, bytes.into(), None, HashMap::new())
            .await
    }

    /// Replaces the object if the stored one is the write `etag`.
    ///
    /// # Errors
    /// `PreconditionFailed` if the stored object is another one that this call did not write; `NotFound` (on some
    /// stores `PreconditionFailed`) if there is no object.
    pub async fn put_if_match(
        &self,
        key: &str,
        bytes: impl Into<Bytes>,
        etag: &ETag,
    ) -> Result<ETag, StoreError> {
        self.put_if_match_with(key, bytes, etag, HashMap::new()).await
    }

    /// As [`put_if_match`](Self::put_if_match), with this user metadata.
    ///
    /// # Errors
    /// As [`put_if_match`](Self::put_if_match).
    pub async fn put_if_match_with(
        &self,
        key: &str,
        bytes: impl Into<Bytes>,
        etag: &ETag,
        metadata: HashMap<String, String>,
    ) -> Result<ETag, StoreError> {
        self.put_conditional("replace", key, bytes.into(), Some(etag), metadata)
            .await
    }

    /// An attempt can be carried out and its answer lost; the first attempt then makes the SDK's next one fail. So each
    /// call puts its own write mark on the object. A refusal because of an object with that mark is a success.
    async fn put_conditional(
        &self,
        operation: &'static str,
        key: &str,
        bytes: Bytes,
        expected: Option<&ETag>,
        mut metadata: HashMap<String, String>,
    ) -> Result<ETag, StoreError> {
        let mark = uuid::Uuid::new_v4().simple().to_string();
        metadata.insert(WRITE_MARK.to_owned(), mark.clone());
        let mut attempt = 1;
        loop {
            let request = self
                .client
                .put_object()
                .bucket(&self.bucket)
                .key(key)
                .set_metadata(Some(metadata.clone()))
                .body(ByteStream::from(bytes.clone()));
            let request = match expected {
                Some(etag) => request.if_match(&etag.0),
                None => request.if_none_match("*"),
            };
            let refused = match request.send().await {
                Ok(output) => return self.etag(operation, key, output.e_tag),
                Err(refused) => refused,
            };
            // A 409 is not a refusal because of the stored object: another conditional write was in progress at the
            // same time, or something else that the store does not want to be disturbed.
            let is_conflict = status_of(&refused) == Some(409);
            let error = self.error(operation, key, refused);
            if error.kind != StoreErrorKind::PreconditionFailed && !is_conflict {
                return Err(error);
            }
            let found = self.head(key).await?;
            match &found {
                Some(info) if info.metadata.get(WRITE_MARK) == Some(&mark) => return Ok(info.etag.clone()),
                _ if is_conflict && attempt < CONFLICT_ATTEMPTS_MAX => {}
                // What is stored decides: over another one's write this one's condition never holds.
                Some(info) if is_conflict && expected != Some(&info.etag) => {
                    return Err(StoreError {
                        kind: StoreErrorKind::PreconditionFailed,
                        ..error
                    });
                }
                _ => return Err(error),
            }
            let pause_ms = fastrand::u64(1..=attempt * CONFLICT_PAUSE_MS);
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            attempt += 1;
        }
    }

    /// Removes the object, if there is one. Returns whether the bucket keeps versions, so that the object stays as a
    /// version.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn delete(&self, key: &str) -> Result<bool, StoreError> {
        let sent = self
            .client
            .delete_object()
            .bucket(&self.bucket)
            .key(key)
            .send()
            .await;
        let deleted = absent_is_none(sent.map_err(|error| self.error("delete", key, error)))?;
        Ok(deleted.is_some_and(|output| output.delete_marker().unwrap_or(false)))
    }

    /// All objects whose keys start with `prefix`, in the order of their keys.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        self.list_from(prefix, None).await
    }

    /// As [`Self::list`], for the objects after the key `after`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list_after(&self, prefix: &str, after: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        let mut entries = self.list_from(prefix, Some(after.to_owned())).await?;
        // Not every store knows the parameter.
        entries.retain(|entry| entry.key.as_str() > after);
        Ok(entries)
    }

    /// As [`Self::list_after`], for the objects up to the key `until`, with about as many requests as these objects
    /// alone need.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn list_between(
        &self,
        prefix: &str,
        after: &str,
        until: &str,
    ) -> Result<Vec<ObjectEntry>, StoreError> {
        let is_past = |entries: &[ObjectEntry]| entries.last().is_some_and(|last| last.key.as_str() >= until);
        let mut entries = self
            .list_until(prefix, Some(after.to_owned()), None, is_past)
            .await?;
        entries.retain(|entry| entry.key.as_str() > after && entry.key.as_str() <= until);
        Ok(entries)
    }

    /// Whether an object with this prefix is there whose key `is_wanted` takes. One request tells where the first ones have such a key.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn has_any(&self, prefix: &str, is_wanted: impl Fn(&str) -> bool) -> Result<bool, StoreError> {
        let is_any = |entries: &[ObjectEntry]| entries.iter().any(|entry| is_wanted(&entry.key));
        Ok(is_any(&self.list_until(prefix, None, None, is_any).await?))
    }

    /// The objects right below `prefix`, which must end with a slash: none of those further down. Not for a directory.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) async fn list_right_below(&self, prefix: &str) -> Result<Vec<ObjectEntry>, StoreError> {
        self.list_until(prefix, None, Some("/".to_owned()), |_| false)
            .await
    }

    async fn list_from(&self, prefix: &str, after: Option<String>) -> Result<Vec<ObjectEntry>, StoreError> {
        self.list_until(prefix, after, None, |_| false).await
    }

    /// Lists page by page, until `is_enough` of what was listed.
    async fn list_until(
        &self,
        prefix: &str,
        after: Option<String>,
        delimiter: Option<String>,
        is_enough: impl Fn(&[ObjectEntry]) -> bool,
    ) -> Result<Vec<ObjectEntry>, StoreError> {
        let request = self.client.list_objects_v2().bucket(&self.bucket).prefix(prefix);
        let request = request.set_start_after(after).set_delimiter(delimiter);
        let mut pages = request.into_paginator().send();
        let mut entries = Vec::new();
        while !is_enough(&entries)
            && let Some(page) = pages.next().await
        {
            let page = page.map_err(|error| self.error("list", prefix, error))?;
            let is_cut =
                page.is_truncated() == Some(true) && page.next_continuation_token().is_none_or(str::is_empty);
            entries.extend(
                page.contents
                    .unwrap_or_default()
                    .into_iter()
                    .filter_map(|object| {
                        Some(ObjectEntry {
                            size_bytes: size(object.size),
                            last_modified: time(object.last_modified.as_ref()),
                            key: object.key?,
                        })
                    }),
            );
            // The SDK takes such a page for the last one. A part of a listing passes for all of it then: records of a log, clones
            // and pins would be as good as gone.
            if is_cut && !is_enough(&entries) {
                let detail = format!(
                    "{} sends a part of the listing and no continuation token, so that the rest cannot be asked for",
                    self.endpoint
                );
                return Err(StoreError::new(
                    "list",
                    self.target(prefix),
                    StoreErrorKind::Other,
                    detail,
                ));
            }
        }
        Ok(entries)
    }

    /// Removes all objects whose keys start with `prefix`, which must end with a slash. Returns how many there were.
    ///
    /// # Errors
    /// [`StoreError`]. Some objects may then be removed.
    pub async fn delete_prefix(&self, prefix: &str) -> Result<usize, StoreError> {
        if prefix.len() < 2 || !prefix.ends_with('/') {
            let detail = "a prefix to delete must end with a slash, so that it names no neighbours";
            return Err(StoreError::new(
                "delete",
                self.target(prefix),
                StoreErrorKind::Other,
                detail,
            ));
        }
        let keys: Vec<String> = self
            .list(prefix)
            .await?
            .into_iter()
            .map(|entry| entry.key)
            .collect();
        self.delete_keys(&keys).await?;
        Ok(keys.len())
    }

    /// Removes these objects, many with each request. Missing objects are no error.
    ///
    /// # Errors
    /// [`StoreError`]. Some objects may then be removed, and not necessarily the first.
    pub async fn delete_keys(&self, keys: &[String]) -> Result<(), StoreError> {
        let Some(first) = keys.first() else { return Ok(()) };
        let fail = |kind, detail| StoreError::new("delete", self.target(first), kind, detail);
        for batch in keys.chunks(DELETE_KEYS_MAX) {
            let identifiers = batch
                .iter()
                .map(|key| ObjectIdentifier::builder().key(key).build());
            let delete = identifiers
                .collect::<Result<Vec<_>, _>>()
                .and_then(|objects| Delete::builder().set_objects(Some(objects)).quiet(true).build())
                .map_err(|error| fail(StoreErrorKind::Other, error.to_string()))?;
            let sent = self
                .client
                .delete_objects()
                .bucket(&self.bucket)
                .delete(delete)
                .send()
                .await;
            let output = match sent.map_err(|error| self.error("delete", first, error)) {
                // The store does not know the request.
                Err(error) if error.kind == StoreErrorKind::Refused => {
                    self.delete_one_by_one(batch).await?;
                    continue;
                }
                sent => sent?,
            };
            if let [refused, ..] = output.errors() {
                let code = refused.code().unwrap_or("an error without a code");
                let kind = if code == "AccessDenied" {
                    StoreErrorKind::AccessDenied
                } else {
                    StoreErrorKind::Other
                };
                let key = refused.key().unwrap_or("a key");
                return Err(fail(kind, format!("{} answers {code} for {key}", self.endpoint)));
            }
        }
        Ok(())
    }

    async fn delete_one_by_one(&self, keys: &[String]) -> Result<(), StoreError> {
        let mut deletions = stream::iter(keys.to_vec())
            .map(|key| async move { self.delete(&key).await })
            .buffer_unordered(DELETIONS_AT_ONCE);
        while deletions.try_next().await?.is_some() {}
        Ok(())
    }

    pub(super) fn error<E>(
        &self,
        operation: &'static str,
        key: &str,
        error: SdkError<E, HttpResponse>,
    ) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + Send + Sync + 'static,
    {
        StoreError::from_sdk(operation, self.target(key), &self.endpoint, error)
    }

    pub(super) fn etag(
        &self,
        operation: &'static str,
        key: &str,
        etag: Option<String>,
    ) -> Result<ETag, StoreError> {
        etag.map(ETag).ok_or_else(|| {
            let detail = format!(
                "{} sent no ETag, without which a volume cannot be kept safe",
                self.endpoint
            );
            StoreError::new(operation, self.target(key), StoreErrorKind::Other, detail)
        })
    }
}

/// Whether a body was read whole and is not the one that the store keeps the checksum of.
fn is_mismatch(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| (*error).source()).any(|error| error.is::<ChecksumError>())
}

pub(super) fn absent_is_none<T>(result: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match result {
        Ok(found) => Ok(Some(found)),
        // A missing bucket is not an absent object, if the store distinguishes the two.
        Err(error) if error.kind == StoreErrorKind::NotFound && !error.detail.contains("NoSuchBucket") => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

pub(super) fn size(len: Option<i64>) -> u64 {
    len.and_then(|len| u64::try_from(len).ok()).unwrap_or_default()
}

pub(super) fn time(time: Option<&aws_smithy_types::DateTime>) -> SystemTime {
    time.and_then(|time| SystemTime::try_from(*time).ok())
        .unwrap_or(SystemTime::UNIX_EPOCH)
}
