//! Checksums of uploads, as S3 itself checks and keeps them.
//!
//! One sequence for every store, over http and https: CRC-64/NVME of whole objects. `CreateMultipartUpload` names the
//! algorithm and the type `FULL_OBJECT`, each part carries its value, and `CompleteMultipartUpload` repeats the values of
//! the parts, which AWS does not ask for and MinIO does. `PutObject` carries the value of its body. Left alone, the SDK names
//! no algorithm where an upload is created and sends CRC-32 with its parts, which S3 has refused at either end.
//! <https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity-upload.html>
//!
//! `AWS_REQUEST_CHECKSUM_CALCULATION=when_required` (or the profile's setting) leaves them out.

use std::collections::{BTreeMap, VecDeque};

use aws_sdk_s3::config::interceptors::{
    AfterDeserializationInterceptorContextRef, BeforeSerializationInterceptorContextMut,
    BeforeTransmitInterceptorContextMut,
};
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::operation::abort_multipart_upload::AbortMultipartUploadInput;
use aws_sdk_s3::operation::complete_multipart_upload::CompleteMultipartUploadInput;
use aws_sdk_s3::operation::create_multipart_upload::CreateMultipartUploadInput;
use aws_sdk_s3::operation::put_object::PutObjectInput;
use aws_sdk_s3::operation::upload_part::UploadPartInput;
use aws_sdk_s3::primitives::SdkBody;
use aws_sdk_s3::types::{ChecksumAlgorithm, ChecksumType};
use aws_smithy_types::base64;
use aws_smithy_types::config_bag::{Storable, StoreReplace};
use bytes::Buf;
use crc_fast::{CrcAlgorithm, Digest};
use parking_lot::Mutex;

use super::upload::pieces;

/// Carries the checksum of a body.
const HEADER: &str = "x-amz-checksum-crc64nvme";
const NOT_IN_MEMORY: &str = "only bodies that are in memory can be sent";
/// Uploads whose parts' values are kept. An upload that neither completes nor is aborted is forgotten in the end.
const UPLOADS_MAX: usize = 256;

/// Interceptor that adds checksums to uploads.
#[derive(Debug, Default)]
pub(crate) struct Checksums {
    uploads: Mutex<Uploads>,
}

/// The values of the parts of the uploads that are under way, the oldest upload first.
#[derive(Debug, Default)]
struct Uploads {
    parts: VecDeque<(String, BTreeMap<i32, String>)>,
}

impl Uploads {
    fn add(&mut self, upload_id: &str, number: i32, value: String) {
        if let Some((_, parts)) = self.parts.iter_mut().find(|(id, _)| id == upload_id) {
            parts.insert(number, value);
            return;
        }
        if self.parts.len() == UPLOADS_MAX {
            self.parts.pop_front();
        }
        self.parts
            .push_back((upload_id.to_owned(), [(number, value)].into()));
    }

    fn value(&self, upload_id: &str, number: i32) -> Option<&String> {
        let (_, parts) = self.parts.iter().find(|(id, _)| id == upload_id)?;
        parts.get(&number)
    }

    fn forget(&mut self, upload_id: &str) {
        self.parts.retain(|(id, _)| id != upload_id);
    }
}

/// What the request at hand sends, where its body gets a checksum.
#[derive(Debug)]
enum Sends {
    Object,
    Part { upload_id: String, number: i32 },
}

impl Storable for Sends {
    type Storer = StoreReplace<Self>;
}

/// The upload that the request at hand ends.
#[derive(Debug)]
struct Ends(String);

impl Storable for Ends {
    type Storer = StoreReplace<Self>;
}

impl Intercept for Checksums {
    fn name(&self) -> &'static str {
        "Checksums"
    }

    fn modify_before_serialization(
        &self,
        context: &mut BeforeSerializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let input = context.input_mut();
        if let Some(create) = input.downcast_mut::<CreateMultipartUploadInput>() {
            create.checksum_algorithm = Some(ChecksumAlgorithm::Crc64Nvme);
            create.checksum_type = Some(ChecksumType::FullObject);
        } else if input.downcast_ref::<PutObjectInput>().is_some() {
            config.interceptor_state().store_put(Sends::Object);
        } else if let Some(part) = input.downcast_ref::<UploadPartInput>() {
            if let (Some(upload_id), Some(number)) = (&part.upload_id, part.part_number) {
                let upload_id = upload_id.clone();
                config
                    .interceptor_state()
                    .store_put(Sends::Part { upload_id, number });
            }
        } else if let Some(complete) = input.downcast_mut::<CompleteMultipartUploadInput>() {
            if let Some(upload_id) = complete.upload_id.clone() {
                let uploads = self.uploads.lock();
                let parts = complete.multipart_upload.as_mut().and_then(|u| u.parts.as_mut());
                for part in parts.into_iter().flatten() {
                    let value = part.part_number.and_then(|n| uploads.value(&upload_id, n));
                    part.checksum_crc64_nvme = value.cloned();
                }
                config.interceptor_state().store_put(Ends(upload_id));
            }
        } else if let Some(abort) = input.downcast_ref::<AbortMultipartUploadInput>()
            && let Some(upload_id) = abort.upload_id.clone()
        {
            config.interceptor_state().store_put(Ends(upload_id));
        }
        Ok(())
    }

    fn modify_before_retry_loop(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Some(sends) = config.load::<Sends>() else {
            return Ok(());
        };
        let request = context.request_mut();
        let value = checksum(request.body())?;
        if let Sends::Part { upload_id, number } = sends {
            self.uploads.lock().add(upload_id, *number, value.clone());
        }
        request.headers_mut().insert(HEADER, value);
        Ok(())
    }

    /// An upload that its store has ended is forgotten. A completion that fails may be asked for again; its status may be 200 all the same,
    /// so that the body must have been read before.
    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if let Some(Ends(upload_id)) = config.load::<Ends>()
            && context.output_or_error().is_ok()
        {
            self.uploads.lock().forget(upload_id);
        }
        Ok(())
    }
}

/// The value of a body in memory, as the header has it.
fn checksum(body: &SdkBody) -> Result<String, BoxError> {
    let body = body.try_clone().ok_or(NOT_IN_MEMORY)?;
    let mut pieces = pieces(body, NOT_IN_MEMORY)?;
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    while pieces.has_remaining() {
        let piece = pieces.chunk();
        digest.update(piece);
        let len = piece.len();
        pieces.advance(len);
    }
    Ok(base64::encode(digest.finalize().to_be_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_is_that_of_crc_64_nvme() {
        // The check value of the algorithm's catalogue entry.
        let expected = base64::encode(0xae8b_1486_0a79_9888_u64.to_be_bytes());
        assert_eq!(
            checksum(&SdkBody::from("123456789")).expect("in memory"),
            expected
        );
    }

    #[test]
    fn values_of_parts_are_kept_until_their_upload_ends() {
        let mut uploads = Uploads::default();
        uploads.add("a", 1, "one".into());
        uploads.add("a", 1, "again".into());
        uploads.add("b", 1, "other".into());
        assert_eq!(uploads.value("a", 1).map(String::as_str), Some("again"));
        assert_eq!(uploads.value("a", 2), None);
        uploads.forget("a");
        assert_eq!(uploads.value("a", 1), None);
        assert_eq!(uploads.value("b", 1).map(String::as_str), Some("other"));
    }

    #[test]
    fn only_so_many_uploads_are_kept() {
        let mut uploads = Uploads::default();
        for n in 0..=UPLOADS_MAX {
            uploads.add(&n.to_string(), 1, "x".into());
        }
        assert_eq!(uploads.parts.len(), UPLOADS_MAX);
        assert_eq!(uploads.value("0", 1), None);
    }
}
