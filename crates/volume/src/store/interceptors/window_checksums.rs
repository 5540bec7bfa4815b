//! Check values of objects: CRC-32C of each window, as user metadata.
//!
//! The container's format has no checksums, so a damaged index or inode would be believed. Every object that is put in
//! one piece therefore carries the check values of its windows. They come back with every GET, of ranges too, and cost
//! no request of their own. With them comes the last part of the object's key, so that one object is not taken for another whose
//! place it was put in. Whoever reads through [`Store`](crate::store::Store) gets bytes that were checked as far as the
//! answer covers whole windows. Objects made by others, or uploaded in parts, carry none and are taken as they are.

use std::collections::HashMap;

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};

use super::upload::{has_parameter, in_one_piece};
use crate::base::checksum::crc32c;
use crate::store::ObjectInfo;
use crate::store::frames::Frames;

/// Size of a window in bytes.
pub(crate) const WINDOW_BYTES: u64 = 128 << 10;
/// Name of the user metadata: the windows' CRC-32C one after another, as 8 hexadecimal digits each.
pub(crate) const METADATA_KEY: &str = "hypernbd-crc32c";
const HEADER: &str = "x-amz-meta-hypernbd-crc32c";
/// Name of the user metadata that says which object it is: the last part of its key.
const NAME_METADATA_KEY: &str = "hypernbd-object";
const NAME_HEADER: &str = "x-amz-meta-hypernbd-object";
const DIGITS: usize = 8;
/// The largest body that is sealed: its check values take 512 of the 2048 bytes that S3 gives to user metadata.
const SEALED_BYTES_MAX: u64 = 8 << 20;

/// Interceptor that seals what is put.
#[derive(Debug)]
pub(crate) struct WindowChecksums;

impl Intercept for WindowChecksums {
    fn name(&self) -> &'static str {
        "WindowChecksums"
    }

    fn modify_before_retry_loop(
        &self,
        context: &mut BeforeTransmitInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request_mut();
        let is_copy = request.headers().get("x-amz-copy-source").is_some();
        if is_copy || !is_put_object(request.method(), request.uri()) {
            return Ok(());
        }
        let len = request.body().content_length().unwrap_or(u64::MAX);
        if len == 0 || len > SEALED_BYTES_MAX {
            return Ok(());
        }
        in_one_piece(request.body_mut(), "the body is not in memory")?;
        if let Some(seal) = request.body().bytes().map(seal) {
            let name = last_part(path_of(request.uri())).map(str::to_owned);
            request.headers_mut().insert(HEADER, seal);
            if let Some(name) = name {
                request.headers_mut().insert(NAME_HEADER, name);
            }
        }
        Ok(())
    }
}

fn is_put_object(method: &str, uri: &str) -> bool {
    method == "PUT" && !has_parameter(uri, "uploadId")
}

fn path_of(uri: &str) -> &str {
    uri.split('?').next().unwrap_or_default()
}

/// The last part of a key, or of a path that ends with one, where both are written alike.
fn last_part(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?;
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (!name.is_empty() && name.bytes().all(is_plain)).then_some(name)
}

/// Looks whether an object with this metadata is the one of this key, where it says which it is.
///
/// # Errors
/// That it is another.
pub(crate) fn check_name(metadata: &HashMap<String, String>, key: &str) -> Result<(), String> {
    match (metadata.get(NAME_METADATA_KEY), last_part(key)) {
        (Some(name), Some(own)) if name != own => {
            Err(format!("it is the object {name}, in the place of {own}"))
        }
        _ => Ok(()),
    }
}

/// Whether an object carries check values.
pub(crate) fn is_sealed(info: &ObjectInfo) -> bool {
    info.metadata.contains_key(METADATA_KEY)
}

/// The check values of an object.
pub(crate) fn seal(bytes: &[u8]) -> String {
    let windows = bytes.chunks(WINDOW_BYTES as usize);
    windows.map(|window| format!("{:08x}", crc32c(window))).collect()
}

/// Checks `bytes`, which were read at `offset_bytes` of an object of `object_bytes`, as far as they cover its windows.
///
/// # Errors
/// What is wrong.
pub(crate) fn verify(seal: &str, offset_bytes: u64, bytes: &Bytes, object_bytes: u64) -> Result<(), String> {
    verify_frames(seal, offset_bytes, &Frames::take(bytes.clone()), object_bytes)
}

/// As [`verify`], of bytes in pieces.
///
/// # Errors
/// What is wrong.
pub(crate) fn verify_frames(
    seal: &str,
    offset_bytes: u64,
    bytes: &Frames,
    object_bytes: u64,
) -> Result<(), String> {
    let windows = object_bytes.div_ceil(WINDOW_BYTES);
    if seal.len() as u64 != windows * DIGITS as u64 {
        return Err(format!("its check values are not those of {object_bytes} bytes"));
    }
    let end = offset_bytes + bytes.len() as u64;
    let mut window = offset_bytes.div_ceil(WINDOW_BYTES);
    while window < windows {
        let start = window * WINDOW_BYTES;
        let until = (start + WINDOW_BYTES).min(object_bytes);
        if until > end {
            break;
        }
        let digits = seal.get(window as usize * DIGITS..(window as usize + 1) * DIGITS);
        let expected = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
        let pieces = bytes.slices((start - offset_bytes) as usize..(until - offset_bytes) as usize);
        pieces
            .into_iter()
            .flatten()
            .for_each(|piece| digest.update(piece));
        // The result of a 32-bit algorithm.
        if expected != Some(digest.finalize() as u32) {
            return Err(format!(
                "bytes {start} to {} are not those that were written",
                until - 1
            ));
        }
        window += 1;
    }
    Ok(())
}

/// Where an answer starts in its object and how long the object is, by the answer's Content-Range header (`None`: the
/// answer is the whole object).
///
/// # Errors
/// When the header says nothing of the kind.
pub(crate) fn place_of(content_range: Option<&str>, answer_bytes: u64) -> Result<(u64, u64), String> {
    let Some(header) = content_range else {
        return Ok((0, answer_bytes));
    };
    let parse = || {
        let (range, total) = header.strip_prefix("bytes ")?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        let total: u64 = total.parse().ok()?;
        (first <= last && last < total && last - first + 1 == answer_bytes).then_some((first, total))
    };
    parse().ok_or_else(|| format!("its answer of {answer_bytes} bytes says it is {header}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn crc32c_is_the_castagnoli_one() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(seal(b"123456789"), "e3069283");
    }

    #[test]
    fn what_is_put_is_told_from_what_is_not() {
        assert!(is_put_object("PUT", "http://h/b/k?x-id=PutObject"));
        assert!(is_put_object("PUT", "http://h/b/k"));
        assert!(!is_put_object("PUT", "http://h/b/k?partNumber=1&uploadId=u"));
        assert!(!is_put_object("POST", "http://h/b/k?uploads"));
    }

    #[test]
    fn an_answer_says_where_it_belongs() {
        assert_eq!(place_of(None, 7), Ok((0, 7)));
        assert_eq!(place_of(Some("bytes 5-9/20"), 5), Ok((5, 20)));
        for wrong in [
            "bytes 5-9/*",
            "bytes 5-9/8",
            "bytes 9-5/20",
            "5-9/20",
            "bytes 5-8/20",
        ] {
            assert!(place_of(Some(wrong), 5).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_object_in_the_place_of_another_is_told() {
        let named = |name: &str| HashMap::from([(NAME_METADATA_KEY.to_owned(), name.to_owned())]);
        let key = "a/b.c/0000000001.0";
        assert_eq!(
            last_part(path_of("http://h/b/a/0000000001.0?x-id=PutObject")),
            Some("0000000001.0")
        );
        assert_eq!(check_name(&named("0000000001.0"), key), Ok(()));
        assert!(check_name(&named("0000000002.0"), key).is_err());
        // Of earlier releases; and where a key is written otherwise in a path.
        assert_eq!(check_name(&HashMap::new(), key), Ok(()));
        assert_eq!(check_name(&named("x"), "a/b c"), Ok(()));
        assert_eq!(last_part("http://h/b/"), None);
    }

    proptest! {
        /// Every flipped bit in a window that is covered is seen, and nothing else is called wrong.
        #[test]
        fn a_flipped_bit_is_seen_in_a_window_that_is_covered(
            len in 1usize..400_000, start in 0usize..400_000, count in 0usize..400_000, flip in 0usize..400_000, bit in 0u8..8,
        ) {
            let mut object: Vec<u8> = (0..len).map(|i| ((i * 31) >> 3) as u8).collect();
            let seal = seal(&object);
            let start = start % len;
            let end = (start + count).min(len);
            prop_assert_eq!(verify(&seal, start as u64, &Bytes::copy_from_slice(&object[start..end]), len as u64), Ok(()));
            let flip = flip % len;
            object[flip] ^= 1 << bit;
            let window = flip / WINDOW_BYTES as usize * WINDOW_BYTES as usize;
            let is_covered = start <= window && (window + WINDOW_BYTES as usize).min(len) <= end;
            let found = verify(&seal, start as u64, &Bytes::copy_from_slice(&object[start..end]), len as u64);
            prop_assert_eq!(found.is_err(), is_covered);
        }
    }

    #[test]
    fn an_object_of_another_length_is_not_the_one_sealed() {
        let seal = seal(&[7; 200_000]);
        assert!(verify(&seal, 0, &Bytes::from(vec![7; 100_000]), 100_000).is_err());
    }
}
