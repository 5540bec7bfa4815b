//! The format of a buffer file (pure: no I/O).
//!
//! ```text
//! 0            magic, two headers, two floors; each with a checksum, the newer valid one counts
//! 8192         chunk 0: a table of 1024 entries of 64 bytes, then 960 KiB of data
//! 8192 + 1 MiB chunk 1 ...
//! ```
//!
//! An entry is one change, or the part of a change that fits into a chunk. Its data is written first and the entry
//! second, each with a checksum. So an incomplete entry was never answered. It hides no other entry, because each has a
//! place of its own. A chunk belongs to one generation. A chunk is used again once the *floor*, which is the newest
//! published generation, is stored and covers it. Its earlier contents are then at or below the floor and so do not
//! count.

use serde::{Deserialize, Serialize};

use crate::base::checkpoint_id::{CheckpointId, InodeCheck};
use crate::base::checksum::crc32c;
use crate::base::stored_text;
use crate::base::volume_id::VolumeId;

/// The first bytes of every buffer file.
pub(super) const MAGIC: &[u8; 8] = b"HNBDBUF1";
/// Bytes before the first chunk.
pub(super) const HEAD_BYTES: u64 = 8192;
/// The offsets of the two headers in bytes, and the space of each.
const HEADERS_AT: [usize; 2] = [64, 3136];
/// A URL has about 1,200 bytes at most, and a token has 32.
const HEADER_BYTES: usize = 3072;
/// The offsets of the two floors in bytes.
const FLOORS_AT: [usize; 2] = [6400, 6464];
const FLOOR_BYTES: usize = 64;

/// Bytes of a chunk.
pub(super) const CHUNK_BYTES: u64 = 1 << 20;
/// Entries of a chunk.
pub(super) const ENTRIES: u32 = 1024;
/// Bytes of an entry.
pub(super) const ENTRY_BYTES: usize = 64;
/// Bytes of a chunk's table of entries.
pub(super) const TABLE_BYTES: u64 = ENTRIES as u64 * ENTRY_BYTES as u64;
/// Bytes of data in a chunk.
pub(super) const DATA_BYTES: u32 = (CHUNK_BYTES - TABLE_BYTES) as u32;

/// The version of this format.
pub(super) const VERSION: u32 = 1;

/// The most claimants that a header names.
pub(super) const CLAIMANTS_MAX: usize = 32;

/// The offset of a chunk in the file, in bytes.
pub(super) fn chunk_at(chunk: u32) -> u64 {
    HEAD_BYTES + u64::from(chunk) * CHUNK_BYTES
}

/// A buffer file's header: which volume and owner the file belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Header {
    /// The version of the format.
    pub version: u32,
    /// The volume whose changes the file holds, and the volume's URL.
    pub volume_id: VolumeId,
    #[serde(deserialize_with = "stored_text::printable")]
    pub url: String,
    /// The id of the machine's boot. Data that was not synced before a reboot is lost.
    pub boot_id: String,
    /// Token of the lease under which the changes were answered, or that was taken to recover them.
    pub owner: String,
    /// Tokens of the leases with which servers were about to replace the owner's lease in order to recover the changes,
    /// the newest last. It is not known whether any of them was stored: the answer may have been lost, or the server
    /// killed.
    pub claimants: Vec<String>,
    /// The newest checkpoint when this use of the file began.
    pub base: Option<CheckpointId>,
    /// Distinguishes the entries of this use of the file from those of an earlier one.
    pub nonce: u64,
    /// The number of chunks in the file.
    pub chunks: u32,
}

/// A structure that is stored twice, so that one of its copies is whole at every moment.
#[derive(Debug, Clone, Copy)]
struct Twin {
    at: [usize; 2],
    len: usize,
}

const HEADERS: Twin = Twin {
    at: HEADERS_AT,
    len: HEADER_BYTES,
};
const FLOORS: Twin = Twin {
    at: FLOORS_AT,
    len: FLOOR_BYTES,
};

impl Twin {
    /// The offset for the copy with this count, and its bytes.
    fn encode(self, count: u64, body: &[u8]) -> Option<(u64, Vec<u8>)> {
        let mut bytes = vec![0; 4];
        bytes.extend(u32::try_from(body.len()).ok()?.to_le_bytes());
        bytes.extend(count.to_le_bytes());
        bytes.extend(body);
        if bytes.len() > self.len {
            return None;
        }
        let crc = crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        Some((self.at[(count % 2) as usize] as u64, bytes))
    }

    /// The whole copies, with their counts.
    fn whole(self, head: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
        let one = move |at: usize| {
            let bytes = head.get(at..at + self.len)?;
            let crc = u32::from_le_bytes(bytes[..4].try_into().ok()?);
            let len = u32::from_le_bytes(bytes[4..8].try_into().ok()?) as usize;
            let count = u64::from_le_bytes(bytes[8..16].try_into().ok()?);
            let body = bytes.get(16..16usize.checked_add(len)?)?;
            (crc32c(&bytes[4..16 + len]) == crc).then_some((count, body))
        };
        self.at.into_iter().filter_map(one)
    }
}

impl Header {
    /// The offset for the header with this count, and its bytes; `None` when the header is too long.
    pub fn encode(&self, count: u64) -> Option<(u64, Vec<u8>)> {
        HEADERS.encode(count, &serde_json::to_vec(self).ok()?)
    }

    /// Decodes the newest header, and its count, from the first bytes of a file.
    ///
    /// # Errors
    /// A text that says what is wrong.
    pub fn decode(head: &[u8]) -> Result<(u64, Self), String> {
        if !head.starts_with(MAGIC) {
            return Err("it does not begin as a write buffer's file".to_owned());
        }
        let newest = HEADERS.whole(head).max_by_key(|(count, _)| *count);
        let (count, body) = newest.ok_or("both of its headers are damaged")?;
        let header: Self = serde_json::from_slice(body).map_err(|e| format!("its header: {e}"))?;
        match header.version {
            VERSION => Ok((count, header)),
            other => Err(format!(
                "its format has version {other}, and this release reads version {VERSION}"
            )),
        }
    }
}

/// How far the generations of one use of a file are published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Floor {
    pub nonce: u64,
    /// The newest published generation.
    pub generation: u64,
    /// The newest checkpoint at that time. The changes above the floor were made on top of it.
    pub base: Option<CheckpointId>,
}

impl Floor {
    /// The floor's offset, and its bytes.
    pub fn encode(self) -> Option<(u64, Vec<u8>)> {
        let mut body = Vec::from(self.nonce.to_le_bytes());
        if let Some(base) = self.base {
            body.extend(base.cno.to_le_bytes());
            body.extend(base.check.to_bits().to_le_bytes());
        }
        FLOORS.encode(self.generation, &body)
    }

    /// Decodes the floor of this use of the file from the first bytes of the file.
    pub fn decode(head: &[u8], nonce: u64) -> Self {
        let found = FLOORS.whole(head).filter_map(|(generation, body)| {
            let number = |at: usize| Some(u64::from_le_bytes(body.get(at..at + 8)?.try_into().ok()?));
            let base = number(8).zip(number(16)).map(|(cno, check)| CheckpointId {
                cno,
                check: InodeCheck::from_bits(check),
            });
            (number(0)? == nonce).then_some(Self {
                nonce,
                generation,
                base,
            })
        });
        let newest = found.max_by_key(|floor| floor.generation);
        newest.unwrap_or(Self {
            nonce,
            ..Self::default()
        })
    }
}

/// Decodes the first bytes of a buffer file, and whatever part of the first chunk follows them.
///
/// # Errors
/// A text that says what is wrong.
pub(crate) fn check_head(bytes: &[u8]) -> Result<(), String> {
    let (_, header) = Header::decode(bytes)?;
    Floor::decode(bytes, header.nonce);
    let table = bytes.get(HEAD_BYTES as usize..).unwrap_or_default();
    for entry in table.chunks(ENTRY_BYTES) {
        Entry::decode(entry, header.nonce);
    }
    Ok(())
}

/// The kind of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Write,
    Zero,
    Trim,
}

/// One change, or a part of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its number in the order of all changes.
    pub sequence: u64,
    /// The generation of the change, counted from 1 in each use of a file.
    pub generation: u64,
    pub kind: Kind,
    /// Start of the changed range in the volume, in bytes.
    pub offset_bytes: u64,
    pub len_bytes: u64,
    /// Offset of its data, in bytes from the start of the chunk's data; 0 without data.
    pub data_at: u32,
    /// CRC-32C of its data; 0 without data.
    pub data_crc: u32,
}

impl Entry {
    /// Encodes the entry as it stands in the table.
    pub fn encode(&self, nonce: u64) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        let kind: u32 = match self.kind {
            Kind::Write => 1,
            Kind::Zero => 2,
            Kind::Trim => 3,
        };
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        for (at, value) in [
            (8, nonce),
            (16, self.sequence),
            (24, self.generation),
            (32, self.offset_bytes),
            (40, self.len_bytes),
        ] {
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        bytes[48..52].copy_from_slice(&self.data_at.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.data_crc.to_le_bytes());
        let crc = crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Decodes an entry. Returns `None` for an empty place, an incomplete entry, or an entry of another use of the
    /// file.
    pub fn decode(bytes: &[u8], nonce: u64) -> Option<Self> {
        let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if u32_at(0)? != crc32c(bytes.get(4..ENTRY_BYTES)?) || u64_at(8)? != nonce {
            return None;
        }
        let entry = Self {
            sequence: u64_at(16)?,
            generation: u64_at(24)?,
            kind: match u32_at(4)? {
                1 => Kind::Write,
                2 => Kind::Zero,
                3 => Kind::Trim,
                _ => return None,
            },
            offset_bytes: u64_at(32)?,
            len_bytes: u64_at(40)?,
            data_at: u32_at(48)?,
            data_crc: u32_at(52)?,
        };
        let ends = entry.offset_bytes.checked_add(entry.len_bytes).is_some();
        let has_data = entry.kind != Kind::Write
            || u64::from(entry.data_at).saturating_add(entry.len_bytes) <= u64::from(DATA_BYTES);
        (ends && has_data).then_some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            version: VERSION,
            volume_id: VolumeId::from_uuid(uuid::Uuid::from_u128(1)),
            url: "s3://bucket/vol/".into(),
            boot_id: "b".repeat(36),
            owner: "o".repeat(32),
            claimants: vec!["c".repeat(32); CLAIMANTS_MAX],
            base: None,
            nonce: 7,
            chunks: 3,
        }
    }

    fn head() -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES as usize];
        head[..8].copy_from_slice(MAGIC);
        head
    }

    fn put(head: &mut [u8], (at, bytes): (u64, Vec<u8>)) {
        head[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    }

    #[test]
    fn the_newest_whole_header_counts() {
        let mut head = head();
        assert!(Header::decode(&head).is_err());
        let later = Header {
            owner: "later".into(),
            ..header()
        };
        put(&mut head, header().encode(4).unwrap());
        put(&mut head, later.encode(5).unwrap());
        assert_eq!(Header::decode(&head), Ok((5, later)));
        head[HEADERS_AT[1] + 40] ^= 1;
        assert_eq!(Header::decode(&head), Ok((4, header())), "torn");
        head[0] ^= 1;
        assert!(Header::decode(&head).is_err());
    }

    #[test]
    fn another_version_is_refused_with_its_number() {
        let mut head = head();
        let other = Header {
            version: 9,
            ..header()
        };
        put(&mut head, other.encode(1).unwrap());
        assert!(Header::decode(&head).unwrap_err().contains("version 9"));
    }

    #[test]
    fn a_floor_is_that_of_its_own_use_of_the_file() {
        let mut head = head();
        let base = |cno| {
            let check = InodeCheck::from_bits(cno + 7);
            Some(CheckpointId { cno, check })
        };
        let floor = |nonce, generation| Floor {
            nonce,
            generation,
            base: base(generation),
        };
        assert_eq!(
            Floor::decode(&head, 7),
            Floor {
                nonce: 7,
                ..Floor::default()
            }
        );
        for generation in [0, 1, 2, 3] {
            put(&mut head, floor(7, generation).encode().unwrap());
            assert_eq!(Floor::decode(&head, 7), floor(7, generation));
        }
        assert_eq!(Floor::decode(&head, 8).generation, 0);
        // The file is used anew, and the floor left from the old use has the higher generation.
        put(&mut head, floor(8, 0).encode().unwrap());
        assert_eq!(Floor::decode(&head, 8), floor(8, 0));
        put(
            &mut head,
            Floor {
                base: None,
                ..floor(8, 1)
            }
            .encode()
            .unwrap(),
        );
        assert_eq!(Floor::decode(&head, 8).base, None);
    }

    #[test]
    fn entries_are_read_back_and_no_changed_bit_is_taken() {
        let entry = Entry {
            sequence: 11,
            generation: 3,
            kind: Kind::Write,
            offset_bytes: 1 << 40,
            len_bytes: 4096,
            data_at: DATA_BYTES - 4096,
            data_crc: 5,
        };
        let bytes = entry.encode(7);
        assert_eq!(Entry::decode(&bytes, 7), Some(entry));
        assert_eq!(Entry::decode(&bytes, 8), None);
        for bit in 0..ENTRY_BYTES * 8 {
            let mut changed = bytes;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Entry::decode(&changed, 7), None, "bit {bit}");
        }
        for len in 0..ENTRY_BYTES {
            assert_eq!(Entry::decode(&bytes[..len], 7), None);
        }
    }

    #[test]
    fn impossible_fields_with_a_right_checksum_are_no_entry() {
        let good = Entry {
            sequence: 1,
            generation: 1,
            kind: Kind::Write,
            offset_bytes: 0,
            len_bytes: 1,
            data_at: 0,
            data_crc: 0,
        };
        for bad in [
            Entry {
                offset_bytes: u64::MAX,
                ..good
            },
            Entry {
                len_bytes: u64::MAX,
                ..good
            },
            Entry {
                data_at: u32::MAX,
                ..good
            },
        ] {
            assert_eq!(Entry::decode(&bad.encode(7), 7), None, "{bad:?}");
        }
    }
}
