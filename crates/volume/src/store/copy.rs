//! Copies of objects from the place of one volume to that of another, with their user metadata: on the store's side, where both are in
//! one. From or to a directory, and between two stores, they are read and written here, and compared with their check values on the way.

use std::collections::HashMap;
use std::fmt::Write;
use std::sync::Arc;

use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use futures::stream::{self, StreamExt, TryStreamExt};

use super::interceptors::window_checksums;
use super::{ObjectInfo, Store, sums};
use crate::base::store_error::{StoreError, StoreErrorKind};

/// The largest object that is copied with one request. S3 takes 5 GiB; a fifth of that ends in time on a slow store.
const WHOLE_MAX_BYTES: u64 = 1 << 30;
/// What is larger is copied in parts of this size.
const PART_BYTES: u64 = 512 << 20;
/// Parts of one object that are copied at once.
const PARTS_AT_ONCE: usize = 8;
/// What passes through here is read and written in pieces of this size. What is not larger is put whole, and gets check values as it is.
const PIECE_BYTES: u64 = 8 << 20;
/// Pieces of one object that pass through here at once.
const PIECES_AT_ONCE: usize = 4;

/// What names the checksum of an upload.
const CHECKSUM_HEADERS: [&str; 2] = ["x-amz-checksum-algorithm", "x-amz-checksum-type"];

/// An object that was copied.
#[derive(Debug, Clone)]
pub(crate) struct Copied {
    /// What it is a copy of.
    pub original: ObjectInfo,
    /// What it is.
    pub copy: ObjectInfo,
}

impl Copied {
    fn of(original: &ObjectInfo, copy: ObjectInfo) -> Self {
        let original = original.clone();
        Self { original, copy }
    }
}

/// What may be at the place of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    /// Anything, which the copy replaces.
    Anything,
    /// Nothing, also once the copy arrives there. What a store copies itself then takes three requests: not every store knows such a
    /// condition on the one that copies a whole object, and all that a volume may be in know it on the end of an upload.
    Nothing,
}

/// How large things are when an object is copied. In bytes.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    whole_max: u64,
    part: u64,
}

impl Store {
    /// Copies the object `key` of `from`, which was looked at, to `to`.
    ///
    /// # Errors
    /// [`StoreError`], also when the copy is not as long as its original; `PreconditionFailed` when something is there that may not be.
    pub(crate) async fn copy_known(
        &self,
        from: &Self,
        key: &str,
        to: &str,
        original: ObjectInfo,
        over: Over,
    ) -> Result<Copied, StoreError> {
        let sizes = match self.copies_itself(from) {
            false => Sizes {
                whole_max: PIECE_BYTES,
                part: PIECE_BYTES,
            },
            true => Sizes {
                whole_max: WHOLE_MAX_BYTES,
                part: PART_BYTES,
            },
        };
        self.copy_in(from, key, to, original, sizes, over).await
    }

    /// Whether objects of `from` are copied on the store's side: that is so in one bucket or two of a store that is reached in one way.
    pub(crate) fn copies_itself(&self, from: &Self) -> bool {
        let is_one = Arc::ptr_eq(&self.endpoint, &from.endpoint);
        is_one && self.dir.is_none() && from.dir.is_none()
    }

    async fn copy_in(
        &self,
        from: &Self,
        key: &str,
        to: &str,
        original: ObjectInfo,
        sizes: Sizes,
        over: Over,
    ) -> Result<Copied, StoreError> {
        let copy = Copy {
            from,
            key,
            version: None,
            to,
            original: &original,
            passes_here: !self.copies_itself(from),
            over,
        };
        self.carry_out(&copy, sizes).await
    }

    /// Makes a version of an object the newest one again, as the store copies it itself.
    ///
    /// # Errors
    /// As [`Self::copy_known`].
    pub(crate) async fn copy_version(
        &self,
        key: &str,
        version: &str,
        original: &ObjectInfo,
        over: Over,
    ) -> Result<Copied, StoreError> {
        let copy = Copy {
            from: self,
            key,
            version: Some(version),
            to: key,
            original,
            passes_here: false,
            over,
        };
        let sizes = Sizes {
            whole_max: WHOLE_MAX_BYTES,
            part: PART_BYTES,
        };
        self.carry_out(&copy, sizes).await
    }

    async fn carry_out(&self, copy: &Copy<'_>, sizes: Sizes) -> Result<Copied, StoreError> {
        let (original, to, over) = (copy.original, copy.to, copy.over);
        let is_in_parts = over == Over::Nothing && !copy.passes_here && original.size_bytes > 0;
        let is_whole = original.size_bytes <= sizes.whole_max && !is_in_parts;
        let copied = match is_whole {
            true => self.copy_whole(copy).await,
            false => self.copy_parts(copy, sizes.part).await,
        };
        let there = self.head(to).await?;
        let is_perhaps_there = |kind| match kind {
            StoreErrorKind::PreconditionFailed => over == Over::Nothing,
            StoreErrorKind::NotFound => over == Over::Nothing && !is_whole,
            _ => false,
        };
        match copied {
            Ok(()) => {}
            // This very copy, of which the answer was lost (its upload is gone then), or one that somebody else has made.
            Err(e) if is_perhaps_there(e.kind) => {
                return match there.filter(|there| sums::may_be_copies(original, there)) {
                    Some(there) => Ok(Copied::of(original, there)),
                    None => Err(e),
                };
            }
            Err(e) => return Err(e),
        }
        match there.filter(|there| there.size_bytes == original.size_bytes) {
            Some(there) => Ok(Copied::of(original, there)),
            None => Err(StoreError::new(
                "copy to",
                self.target(to),
                StoreErrorKind::Other,
                format!(
                    "the copy is not {} bytes long, as its original is",
                    original.size_bytes
                ),
            )),
        }
    }

    async fn copy_whole(&self, copy: &Copy<'_>) -> Result<(), StoreError> {
        if copy.passes_here {
            let bytes = copy.read(0, copy.original.size_bytes).await?;
            let put = self
                .client
                .put_object()
                .bucket(&self.bucket)
                .key(copy.to)
                .set_metadata(Some(copy.metadata()))
                .set_if_none_match(copy.if_none_match())
                .body(bytes);
            let put = put.send().await;
            return put.map(drop).map_err(|e| self.error("copy to", copy.to, e));
        }
        let copied = self
            .client
            .copy_object()
            .bucket(&self.bucket)
            .key(copy.to)
            .copy_source(copy.source())
            .copy_source_if_match(&copy.original.etag.0)
            .send()
            .await;
        copied.map(drop).map_err(|e| self.error("copy to", copy.to, e))
    }

    async fn copy_parts(&self, copy: &Copy<'_>, part_bytes: u64) -> Result<(), StoreError> {
        let passes_here = copy.passes_here;
        let created = self
            .client
            .create_multipart_upload()
            .bucket(&self.bucket)
            .key(copy.to)
            .set_metadata(Some(copy.original.metadata.clone()))
            .customize()
            .mutate_request(move |request| {
                // Parts that the store copies itself come without a value from here, and MinIO wants one where this is named.
                for header in CHECKSUM_HEADERS.iter().filter(|_| !passes_here) {
                    request.headers_mut().remove(*header);
                }
            })
            .send()
            .await;
        let created = created.map_err(|e| self.error("copy to", copy.to, e))?;
        let upload_id = created.upload_id.unwrap_or_default();
        let copied = self.copy_into(copy, &upload_id, part_bytes).await;
        if copied.is_err() {
            let abort = self
                .client
                .abort_multipart_upload()
                .bucket(&self.bucket)
                .key(copy.to)
                .upload_id(&upload_id);
            if let Err(e) = abort.send().await {
                log::debug!(
                    "the unfinished copy of {} stays until uploads are aborted: {e}",
                    copy.key
                );
            }
        }
        copied
    }

    async fn copy_into(&self, copy: &Copy<'_>, upload_id: &str, part_bytes: u64) -> Result<(), StoreError> {
        let size_bytes = copy.original.size_bytes;
        let parts = (1..).zip((0..size_bytes).step_by(usize::try_from(part_bytes).unwrap_or(usize::MAX)));
        let parts = parts.map(|(number, start)| {
            let len_bytes = part_bytes.min(size_bytes - start);
            self.copy_part(copy, upload_id, number, start, len_bytes)
        });
        let at_once = match (copy.passes_here, &self.dir) {
            (true, Some(_)) => 1,
            (true, None) => PIECES_AT_ONCE,
            (false, _) => PARTS_AT_ONCE,
        };
        // Made first and then run: mapped inside the stream, the future would not be seen to be `Send`.
        let parts: Vec<_> = parts.collect();
        let parts: Vec<CompletedPart> = stream::iter(parts).buffered(at_once).try_collect().await?;
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let completed = self
            .client
            .complete_multipart_upload()
            .bucket(&self.bucket)
            .key(copy.to)
            .upload_id(upload_id)
            .multipart_upload(parts)
            .set_if_none_match(copy.if_none_match())
            .send()
            .await;
        completed.map(drop).map_err(|e| self.error("copy to", copy.to, e))
    }

    async fn copy_part(
        &self,
        copy: &Copy<'_>,
        upload_id: &str,
        number: i32,
        start: u64,
        len_bytes: u64,
    ) -> Result<CompletedPart, StoreError> {
        let etag = if copy.passes_here {
            let sent = self
                .client
                .upload_part()
                .bucket(&self.bucket)
                .key(copy.to)
                .upload_id(upload_id)
                .part_number(number)
                .body(copy.read(start, len_bytes).await?)
                .send()
                .await;
            sent.map_err(|e| self.error("copy to", copy.to, e))?.e_tag
        } else {
            let sent = self
                .client
                .upload_part_copy()
                .bucket(&self.bucket)
                .key(copy.to)
                .upload_id(upload_id)
                .part_number(number)
                .copy_source(copy.source())
                .copy_source_if_match(&copy.original.etag.0)
                // Of the whole of a small object S3 takes none: "you can copy a range only if the source object is greater than 5 MB"
                // (https://docs.aws.amazon.com/AmazonS3/latest/API/API_UploadPartCopy.html).
                .set_copy_source_range(
                    (len_bytes < copy.original.size_bytes)
                        .then(|| format!("bytes={start}-{}", start + len_bytes - 1)),
                )
                .send()
                .await;
            let sent = sent.map_err(|e| self.error("copy to", copy.to, e))?;
            sent.copy_part_result.and_then(|result| result.e_tag)
        };
        Ok(CompletedPart::builder()
            .part_number(number)
            .set_e_tag(etag)
            .build())
    }
}

/// A copy under way.
struct Copy<'a> {
    from: &'a Store,
    key: &'a str,
    /// Which version of it, where it is not the newest.
    version: Option<&'a str>,
    to: &'a str,
    original: &'a ObjectInfo,
    /// Its bytes are read and written here.
    passes_here: bool,
    over: Over,
}

impl Copy<'_> {
    fn if_none_match(&self) -> Option<String> {
        (self.over == Over::Nothing).then(|| "*".to_owned())
    }

    /// The original, as a copy's request names it.
    fn source(&self) -> String {
        let source = source_of(&self.from.bucket, self.key);
        match self.version {
            Some(version) => format!("{source}?versionId={}", escaped(version)),
            None => source,
        }
    }

    /// Its user metadata, but for check values that whoever puts it makes anew.
    fn metadata(&self) -> HashMap<String, String> {
        let mut metadata = self.original.metadata.clone();
        metadata.remove(window_checksums::METADATA_KEY);
        metadata.remove(window_checksums::NAME_METADATA_KEY);
        metadata
    }

    async fn read(&self, start: u64, len_bytes: u64) -> Result<ByteStream, StoreError> {
        let read = self.from.get_range(self.key, start, len_bytes).await?;
        let read = read.ok_or_else(|| {
            let detail = "the object is gone while it is copied";
            StoreError::new(
                "read",
                self.from.target(self.key),
                StoreErrorKind::NotFound,
                detail,
            )
        });
        read.map(ByteStream::from)
    }
}

/// Bucket and key with everything escaped that a header's value or a path may not have.
fn source_of(bucket: &str, key: &str) -> String {
    format!("{bucket}/{}", escaped(key))
}

fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                escaped.push(char::from(byte));
            }
            // Writing to a string does not fail.
            _ => drop(write!(escaped, "%{byte:02X}")),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::url::VolumeUrl;
    use crate::store::connect_for_create;
    use crate::store::options::StoreOptions;

    #[test]
    fn a_source_is_escaped() {
        assert_eq!(
            source_of("b", "a b/\u{e9}+%/0000000001.0"),
            "b/a%20b/%C3%A9%2B%25/0000000001.0"
        );
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_copy_has_bytes_and_metadata_of_its_original() {
        let dir = tempfile::tempdir().unwrap();
        let mut stores = Vec::new();
        for name in ["a", "b"] {
            let url = VolumeUrl::parse(&format!("file://{}/{name}/", dir.path().display())).unwrap();
            stores.push(connect_for_create(&url, &StoreOptions::default()).await.unwrap());
        }
        let (from, to) = (&stores[0], &stores[1]);
        let bytes: Vec<u8> = (0..12_000_000_u32).map(|n| (n ^ n >> 9) as u8).collect();
        let mark = HashMap::from([("of".to_owned(), "a test".to_owned())]);
        let etag = from.put("volume/x", "").await.unwrap();
        from.put_if_match_with("volume/x", bytes.clone(), &etag, mark)
            .await
            .unwrap();
        let parts = Sizes {
            whole_max: 1 << 20,
            part: 5 << 20,
        };
        let whole = Sizes {
            whole_max: 1 << 30,
            ..parts
        };
        for sizes in [parts, whole] {
            let original = from.head("volume/x").await.unwrap().unwrap();
            let copied = to
                .copy_in(from, "volume/x", "volume/y", original, sizes, Over::Anything)
                .await
                .unwrap();
            assert_eq!(copied.original.size_bytes, bytes.len() as u64);
            let (there, info) = to.get_with_info("volume/y").await.unwrap().unwrap();
            assert!(there == bytes);
            assert_eq!(info.etag, copied.copy.etag);
            assert_eq!(info.metadata.get("of").map(String::as_str), Some("a test"));
        }
        // In parts and whole: neither a copy that is there nor anything else is replaced.
        let before = to.head("volume/y").await.unwrap().unwrap();
        to.put("volume/other", "x").await.unwrap();
        for sizes in [parts, whole] {
            let original = from.head("volume/x").await.unwrap().unwrap();
            let copy = async |key| {
                to.copy_in(from, "volume/x", key, original.clone(), sizes, Over::Nothing)
                    .await
            };
            assert_eq!(copy("volume/y").await.unwrap().copy.etag, before.etag);
            let refused = copy("volume/other").await.unwrap_err();
            assert_eq!(refused.kind, StoreErrorKind::PreconditionFailed, "{refused}");
            assert_eq!(to.get("volume/other").await.unwrap().unwrap().0, "x");
        }
    }

    /// A copy that passes through here has values of wide windows, which a part of one is not compared with.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_part_of_a_wide_window_is_not_believed() {
        for has_sums in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let url = VolumeUrl::parse(&format!("file://{}/a/", dir.path().display())).unwrap();
            let store = connect_for_create(&url, &StoreOptions::default()).await.unwrap();
            let key = store.data_key("0000000001.0");
            let bytes: Vec<u8> = (0..6_000_000_u32).map(|n| (n ^ n >> 9) as u8).collect();
            store.put(&key, bytes.clone()).await.unwrap();
            if has_sums {
                let info = store.head(&key).await.unwrap().unwrap();
                let sums = sums::Sums {
                    write: sums::write_of(&info),
                    object_bytes: bytes.len() as u64,
                    values: window_checksums::CheckValues::of(&crate::store::Frames::take(&bytes[..])),
                };
                store.put_sums("0000000001.0", &sums).await.unwrap();
            }
            let read = store.get_verified(&key, 8192, 4096).await.unwrap().unwrap();
            assert!(read.together() == bytes[8192..][..4096]);
            let name = crate::store::local::object_file::name_of_key(&key).unwrap();
            let path = dir.path().join("a/objects").join(name);
            let mut file = std::fs::read(&path).unwrap();
            file[9000] ^= 1;
            std::fs::write(&path, file).unwrap();
            let read = store.get_verified(&key, 8192, 4096).await;
            assert_eq!(
                read.unwrap_err().kind,
                StoreErrorKind::Corrupt,
                "beside it: {has_sums}"
            );
        }
    }
}
