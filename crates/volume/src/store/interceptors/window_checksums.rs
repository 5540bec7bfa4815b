//! Check values of objects: CRC-32C of each window, as user metadata.
//!
//! The container's format has no checksums, so a damaged index or inode would be believed. Every object that is put in
//! one piece therefore carries the check values of its windows. They come back with every GET, of ranges too, and cost
//! no request of their own. With them comes the last part of the object's key, so that one object is not taken for another whose
//! place it was put in. Whoever reads through [`Store`](crate::store::Store) gets bytes that were checked as far as the
//! answer covers whole windows. Windows are small enough that a small read of data is widened to whole ones. Objects uploaded in parts
//! have theirs beside the container (`store/sums.rs`); objects made by others carry none and are taken as they are.

use std::collections::HashMap;

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextMut;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use aws_smithy_types::base64;
use bytes::Bytes;
use crc_fast::{CrcAlgorithm, Digest};

use super::upload::{has_parameter, in_one_piece};
use crate::store::ObjectInfo;
use crate::store::frames::Frames;

/// Size of a window in bytes.
pub(crate) const WINDOW_BYTES: u64 = 16 << 10;
/// Size of a window of objects of earlier releases, and of those that have too many of the others.
pub(crate) const WIDE_WINDOW_BYTES: u64 = 128 << 10;
/// Stands before values of [`WINDOW_BYTES`]: 4 bytes each, little-endian, all of them in base64. Without it they are those of wide
/// windows, 8 hexadecimal digits each.
const NARROW: &str = "16k:";
/// The largest body with values of [`WINDOW_BYTES`]: they take 1707 of the 2048 bytes that S3 gives to user metadata.
const NARROW_BYTES_MAX: u64 = 5 << 20;
/// Name of the user metadata: the windows' CRC-32C one after another.
pub(crate) const METADATA_KEY: &str = "hypernbd-crc32c";
const HEADER: &str = "x-amz-meta-hypernbd-crc32c";
/// Name of the user metadata that says which object it is: the last part of its key.
pub(crate) const NAME_METADATA_KEY: &str = "hypernbd-object";
const NAME_HEADER: &str = "x-amz-meta-hypernbd-object";
const DIGITS: usize = 8;
/// The largest body that is sealed: the values of its wide windows take 512 bytes.
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

pub(crate) fn path_of(uri: &str) -> &str {
    uri.split('?').next().unwrap_or_default()
}

/// The last part of a key, or of a path that ends with one, where both are written alike.
pub(crate) fn last_part(path: &str) -> Option<&str> {
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
pub(crate) fn has_checksums(info: &ObjectInfo) -> bool {
    info.metadata.contains_key(METADATA_KEY)
}

/// Whether an object carries check values of each [`WINDOW_BYTES`].
pub(crate) fn is_narrow(info: &ObjectInfo) -> bool {
    let values = info.metadata.get(METADATA_KEY);
    // A single value of an object of an earlier release may be of a wide window.
    let is_one = |values: &str| values.len() <= DIGITS && info.size_bytes <= WINDOW_BYTES;
    values.is_some_and(|values| values.starts_with(NARROW) || is_one(values))
}

/// Check values of an object, or of a part of one: CRC-32C of each of its windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CheckValues {
    window_bytes: u64,
    values: Vec<u32>,
}

impl CheckValues {
    /// Of these bytes, in pieces, by windows of [`WINDOW_BYTES`].
    pub fn of(bytes: &Frames) -> Self {
        Self::by(WINDOW_BYTES, bytes)
    }

    fn by(window_bytes: u64, bytes: &Frames) -> Self {
        let len = bytes.len();
        let starts = (0..len).step_by(window_bytes as usize);
        let values = starts.map(|start| checksum(bytes, start, len.min(start + window_bytes as usize)));
        Self {
            window_bytes,
            values: values.collect(),
        }
    }

    /// Of bytes of which these are the parts, in order. None when one that is not the last ends within a window.
    pub fn joined<'a>(parts: impl Iterator<Item = (&'a Self, u64)>) -> Option<(Self, u64)> {
        let (mut values, mut len_bytes) = (Vec::new(), 0_u64);
        for (part, part_bytes) in parts {
            if !len_bytes.is_multiple_of(WINDOW_BYTES) {
                return None;
            }
            values.extend_from_slice(&part.values);
            len_bytes += part_bytes;
        }
        let window_bytes = WINDOW_BYTES;
        Some((Self { window_bytes, values }, len_bytes))
    }

    /// As text.
    pub fn encode(&self) -> String {
        let digits = || self.values.iter().map(|value| format!("{value:08x}")).collect();
        match self.window_bytes {
            WINDOW_BYTES => {
                let bytes: Vec<u8> = self.values.iter().flat_map(|value| value.to_le_bytes()).collect();
                format!("{NARROW}{}", base64::encode(bytes))
            }
            _ => digits(),
        }
    }

    /// Reads what [`Self::encode`] wrote.
    ///
    /// # Errors
    /// That it is none.
    pub fn decode(text: &str) -> Result<Self, String> {
        let wrong = || "its check values are none".to_owned();
        if let Some(narrow) = text.strip_prefix(NARROW) {
            let bytes = base64::decode(narrow).map_err(|_| wrong())?;
            if !bytes.len().is_multiple_of(4) {
                return Err(wrong());
            }
            let values = bytes
                .chunks_exact(4)
                .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            return Ok(Self {
                window_bytes: WINDOW_BYTES,
                values: values.collect(),
            });
        }
        let values = (0..text.len()).step_by(DIGITS).map(|at| {
            let digits = text.get(at..at + DIGITS)?;
            u32::from_str_radix(digits, 16).ok()
        });
        let values: Option<Vec<u32>> = values.collect();
        Ok(Self {
            window_bytes: WIDE_WINDOW_BYTES,
            values: values.ok_or_else(wrong)?,
        })
    }

    /// Checks `bytes`, which were read at `offset_bytes` of an object of `object_bytes`, as far as they cover its windows.
    ///
    /// # Errors
    /// What is wrong.
    pub fn verify(&self, offset_bytes: u64, bytes: &Frames, object_bytes: u64) -> Result<(), String> {
        let windows = object_bytes.div_ceil(self.window_bytes);
        if self.values.len() as u64 != windows {
            return Err(format!("its check values are not those of {object_bytes} bytes"));
        }
        let end = offset_bytes + bytes.len() as u64;
        let mut window = offset_bytes.div_ceil(self.window_bytes);
        while window < windows {
            let start = window * self.window_bytes;
            let until = (start + self.window_bytes).min(object_bytes);
            if until > end {
                break;
            }
            let (from, to) = ((start - offset_bytes) as usize, (until - offset_bytes) as usize);
            if self.values[window as usize] != checksum(bytes, from, to) {
                return Err(format!(
                    "bytes {start} to {} are not those that were written",
                    until - 1
                ));
            }
            window += 1;
        }
        Ok(())
    }
}

fn checksum(bytes: &Frames, from: usize, to: usize) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    let pieces = bytes.slices(from..to).into_iter().flatten();
    pieces.for_each(|piece| digest.update(piece));
    // The result of a 32-bit algorithm.
    digest.finalize() as u32
}

/// The check values of an object, as its metadata has them.
pub(crate) fn seal(bytes: &[u8]) -> String {
    let len = bytes.len() as u64;
    // One window is one value, whatever its size.
    let window_bytes = match len > WINDOW_BYTES && len <= NARROW_BYTES_MAX {
        true => WINDOW_BYTES,
        false => WIDE_WINDOW_BYTES,
    };
    CheckValues::by(window_bytes, &Frames::take(bytes)).encode()
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
    CheckValues::decode(seal)?.verify(offset_bytes, bytes, object_bytes)
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

/// Checks that an answer is of the bytes that were asked for: what another range has is as valid. `range` is the request's header,
/// `place` what [`place_of`] says of the answer.
///
/// # Errors
/// What is wrong.
pub(crate) fn check_place(
    range: Option<&str>,
    (offset_bytes, object_bytes): (u64, u64),
    answer_bytes: u64,
) -> Result<(), String> {
    let asked = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
    // Of an object's last bytes it is not known before where they begin.
    let Some((first, last)) =
        asked.and_then(|(first, last)| Some((first.parse::<u64>().ok()?, last.parse::<u64>().ok()?)))
    else {
        return Ok(());
    };
    let end = last.saturating_add(1).min(object_bytes);
    match offset_bytes == first && offset_bytes + answer_bytes >= end {
        true => Ok(()),
        false => Err(format!(
            "bytes {offset_bytes} to {} are not the bytes {first} to {last} that were asked for",
            offset_bytes + answer_bytes
        )),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn crc32c_is_the_castagnoli_one() {
        assert_eq!(crate::base::checksum::crc32c(b"123456789"), 0xE306_9283);
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
    fn an_answer_of_other_bytes_than_were_asked_for_is_none() {
        let range = Some("bytes=16384-32767");
        assert_eq!(check_place(range, (16384, 100_000), 16384), Ok(()));
        assert_eq!(check_place(range, (16384, 20_000), 3616), Ok(()), "it ends there");
        assert!(
            check_place(range, (0, 100_000), 16384).is_err(),
            "of another place"
        );
        assert!(check_place(range, (16384, 100_000), 16383).is_err(), "cut short");
        assert!(check_place(range, (0, 16384), 16384).is_err(), "all of it");
        assert_eq!(check_place(Some("bytes=-5"), (95, 100), 5), Ok(()));
        assert_eq!(check_place(None, (0, 100), 100), Ok(()));
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
    fn values_of_parts_are_those_of_the_whole() {
        let bytes: Vec<u8> = (0..200_001_u32).map(|i| ((i * 7) >> 3) as u8).collect();
        let whole = CheckValues::of(&Frames::take(&bytes[..]));
        let parts: Vec<(CheckValues, u64)> = bytes
            .chunks(2 * WINDOW_BYTES as usize)
            .map(|part| (CheckValues::of(&Frames::take(part)), part.len() as u64))
            .collect();
        let of = |parts: &[(CheckValues, u64)]| CheckValues::joined(parts.iter().map(|(v, len)| (v, *len)));
        assert_eq!(of(&parts), Some((whole.clone(), 200_001)));
        assert_eq!(CheckValues::decode(&whole.encode()), Ok(whole));
        let mut odd = parts;
        odd[0].1 -= 1;
        assert_eq!(of(&odd), None);
        // The most that metadata take.
        let most = seal(&vec![7; NARROW_BYTES_MAX as usize]);
        assert!(most.starts_with(NARROW) && most.len() < 1720, "{}", most.len());
        assert!(seal(&vec![7; NARROW_BYTES_MAX as usize + 1]).len() < 400);
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
            let size = CheckValues::decode(&seal).unwrap().window_bytes as usize;
            let window = flip / size * size;
            let is_covered = start <= window && (window + size).min(len) <= end;
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
