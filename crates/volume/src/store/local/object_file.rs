//! One object as one file: the data, then what S3 knows about it, so that a rename publishes both at once.
//!
//! ```text
//! data (data_len bytes) | header as JSON | length of the JSON, u32 little-endian | "HNBDOBJ1"
//! ```
//!
//! The data comes first so that a range of the object is the same range of the file. File names are the keys with
//! every byte other than letters, digits, `-`, `_` and inner dots written as `%XX`.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Last bytes of every object file.
const MAGIC: &[u8; 8] = b"HNBDOBJ1";
/// Length of the part behind the JSON.
const FOOTER_LEN_BYTES: usize = 12;
/// Read at once from the end of a file: enough for the header of any object a volume has.
const TAIL_LEN_BYTES: usize = 4096;
/// S3 allows 2 KB of user metadata; anything much larger is not ours.
const HEADER_LEN_MAX_BYTES: usize = 64 << 10;
/// Longest file name of Linux file systems.
const NAME_LEN_MAX_BYTES: usize = 255;

/// What is known about an object besides its data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ObjectHeader {
    /// Different for every write; without quotes.
    pub etag: String,
    /// Time of the write, in milliseconds since 1970.
    pub modified_ms: u64,
    /// Length of the data.
    pub data_len_bytes: u64,
    /// User metadata (`x-amz-meta-*`).
    #[serde(default)]
    pub metadata: HashMap<String, String>,
}

impl ObjectHeader {
    /// A header for a write happening now.
    pub fn new(data_len_bytes: u64, metadata: HashMap<String, String>) -> Self {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            etag: uuid::Uuid::new_v4().simple().to_string(),
            modified_ms: u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX),
            data_len_bytes,
            metadata,
        }
    }

    /// Time of the write.
    pub fn modified(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.modified_ms)
    }

    /// The bytes that follow the data.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec(self)?;
        if bytes.len() > HEADER_LEN_MAX_BYTES {
            return Err(io::Error::new(ErrorKind::InvalidInput, "too much user metadata"));
        }
        let len = bytes.len() as u32;
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(MAGIC);
        Ok(bytes)
    }

    /// Reads the header of an object file.
    ///
    /// # Errors
    /// `InvalidData` when the file is not one: foreign, cut off or damaged.
    pub fn read(file: &File) -> io::Result<Self> {
        let damaged =
            |what: &str| io::Error::new(ErrorKind::InvalidData, format!("not an object file: {what}"));
        let file_len = file.metadata()?.len();
        let mut tail = read_tail(file, file_len, TAIL_LEN_BYTES)?;
        if tail.len() < FOOTER_LEN_BYTES || !tail.ends_with(MAGIC) {
            return Err(damaged("its end is missing"));
        }
        let len_at = tail.len() - FOOTER_LEN_BYTES;
        let json_len =
            u32::from_le_bytes([tail[len_at], tail[len_at + 1], tail[len_at + 2], tail[len_at + 3]]) as usize;
        if json_len > HEADER_LEN_MAX_BYTES {
            return Err(damaged("its header is too long"));
        }
        let trailer_len = json_len + FOOTER_LEN_BYTES;
        if trailer_len > tail.len() {
            tail = read_tail(file, file_len, trailer_len)?;
        }
        let Some(start) = tail.len().checked_sub(trailer_len) else {
            return Err(damaged("its header is cut off"));
        };
        let header: Self = serde_json::from_slice(&tail[start..start + json_len])
            .map_err(|error| damaged(&format!("its header cannot be read ({error})")))?;
        if header.data_len_bytes.checked_add(trailer_len as u64) != Some(file_len) {
            return Err(damaged("its length is wrong"));
        }
        Ok(header)
    }
}

/// The last `len` bytes of a file, or all of a shorter one.
fn read_tail(file: &File, file_len: u64, len: usize) -> io::Result<Vec<u8>> {
    let len = len.min(usize::try_from(file_len).unwrap_or(usize::MAX));
    let mut tail = vec![0; len];
    file.read_exact_at(&mut tail, file_len - len as u64)?;
    Ok(tail)
}

/// The file name of a key; `None` when it would be too long for a file system.
pub(crate) fn name_of_key(key: &str) -> Option<String> {
    let mut name = String::with_capacity(key.len() + 16);
    for (at, byte) in key.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => name.push(byte as char),
            b'.' if at > 0 => name.push('.'),
            _ => name.push_str(&format!("%{byte:02X}")),
        }
    }
    (!name.is_empty() && name.len() <= NAME_LEN_MAX_BYTES).then_some(name)
}

/// The key of a file name; `None` for names that [`name_of_key`] does not make.
pub(crate) fn key_of_name(name: &str) -> Option<String> {
    let mut key = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            key.push(byte);
            continue;
        }
        let hex = std::str::from_utf8(rest.get(..2)?).ok()?;
        key.push(u8::from_str_radix(hex, 16).ok()?);
        rest = &rest[2..];
    }
    let key = String::from_utf8(key).ok()?;
    (name_of_key(&key).as_deref() == Some(name)).then_some(key)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn file_of(parts: &[&[u8]]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        for part in parts {
            file.write_all(part).unwrap();
        }
        file
    }

    #[test]
    fn a_header_is_read_back() {
        for value_len in [0, 10, 2000, 20_000] {
            let metadata = HashMap::from([("hf-write".to_string(), "x".repeat(value_len))]);
            let header = ObjectHeader::new(4, metadata);
            let file = file_of(&[b"data", &header.encode().unwrap()]);
            assert_eq!(ObjectHeader::read(&file).unwrap(), header);
        }
    }

    #[test]
    fn every_cut_is_noticed() {
        let header = ObjectHeader::new(4, HashMap::from([("k".to_string(), "v".to_string())]));
        let whole = [b"data".as_slice(), &header.encode().unwrap()].concat();
        for len in 0..whole.len() {
            let error = ObjectHeader::read(&file_of(&[&whole[..len]])).expect_err("a cut file was taken");
            assert_eq!(error.kind(), ErrorKind::InvalidData, "cut at {len}");
        }
        assert!(
            ObjectHeader::read(&file_of(&[&whole[1..]])).is_err(),
            "the start is missing"
        );
    }

    #[test]
    fn too_much_metadata_is_refused() {
        let metadata = HashMap::from([("k".to_string(), "x".repeat(HEADER_LEN_MAX_BYTES))]);
        assert_eq!(
            ObjectHeader::new(0, metadata).encode().unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        for key in [".", "..", "../x", "/etc/passwd", "a/../b", ".hidden"] {
            let name = name_of_key(key).unwrap();
            assert!(!name.contains('/') && !name.starts_with('.'), "{name}");
        }
        assert_eq!(name_of_key(""), None);
        assert_eq!(name_of_key(&"x".repeat(256)), None);
        assert_eq!(
            name_of_key("volume/0000000001.0").unwrap(),
            "volume%2F0000000001.0"
        );
    }

    #[test]
    fn foreign_names_are_not_keys() {
        for name in ["a b", "%2f", "%zz", "%2", ".x", "lost+found", "%61", "a%"] {
            assert_eq!(key_of_name(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn names_are_keys_and_back(key in "\\PC{1,60}") {
            let name = name_of_key(&key).filter(|name| name.len() <= NAME_LEN_MAX_BYTES);
            if let Some(name) = name {
                prop_assert_eq!(key_of_name(&name), Some(key));
            }
        }
    }
}
