//! The format of the WAL's records (pure).
//!
//! ```text
//! header, 80 bytes, little endian
//!   magic "hnbd-wal" · version u32 · flags u32 (1: a seal, 2: names a checkpoint) · volume id, 16 bytes · epoch u64
//!   · sequence u64 · entry count u32 · unacknowledged u32 · body length u64 · CRC-32C of the body u32
//!   · generation before u64 · CRC-32C of the header u32
//! body
//!   with flag 2: checkpoint number u64 · its check value u64
//!   entries of 32 bytes: generation u64 · offset u64 · length u64 · kind u64 (0: zeros, 1: data)
//!   the data of the entries of kind 1, one after another
//! ```
//!
//! A record that names a checkpoint has version 2, which earlier releases refuse. All others have version 1.
//!
//! Whatever bytes it is given, a decoder must never accept a wrong one. So header and body have a checksum each, every
//! length is compared with the bytes that are there, and unused fields must be zero.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};
use uuid::Uuid;

use crate::base::checkpoint_id::{CheckpointId, InodeCheck};
use crate::base::checksum::crc32c;

const MAGIC: &[u8; 8] = b"hnbd-wal";
const VERSION: u32 = 2;
const VERSION_WITHOUT_BASE: u32 = 1;
const FLAG_SEAL: u32 = 1;
const FLAG_BASE: u32 = 2;
/// Length of a record's header in bytes.
pub const HEADER_BYTES: usize = 80;
/// Length in bytes of the checkpoint that a record names.
const BASE_BYTES: usize = 16;
/// Length of one entry in bytes, without its data.
pub const ENTRY_BYTES: usize = 32;
/// The longest body in bytes: far more than a flush writes to the WAL, and far less than would exhaust memory.
pub const BODY_MAX_BYTES: u64 = 256 << 20;
/// Value of [`Record::unacknowledged`] in a record before which no record of its owner was known to be durable.
pub const NONE_ACKNOWLEDGED: u32 = u32::MAX;
/// [`Record::unacknowledged`] of the record with the number `sequence`, when those up to `acknowledged` are durable. The first
/// record of its owner is `first_sequence`.
pub fn unacknowledged(sequence: u64, acknowledged: u64, first_sequence: u64) -> u32 {
    match acknowledged < first_sequence {
        true => NONE_ACKNOWLEDGED,
        false => (sequence - 1 - acknowledged) as u32,
    }
}

const KIND_ZERO: u64 = 0;
const KIND_DATA: u64 = 1;

/// The new content of a range of the volume.
#[derive(Clone, PartialEq, Eq)]
pub enum Content {
    /// These bytes.
    Data(Bytes),
    /// This number of zeros.
    Zero {
        /// Their number in bytes.
        len_bytes: u64,
    },
}

impl Content {
    /// Length of the range in bytes.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Data(bytes) => bytes.len() as u64,
            Self::Zero { len_bytes } => *len_bytes,
        }
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Data(_) => "data",
            Self::Zero { .. } => "zeros",
        };
        write!(f, "{} bytes of {kind}", self.len_bytes())
    }
}

/// One change of the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The generation that holds the change.
    pub generation: u64,
    /// Start of the changed range, in bytes from the volume's start.
    pub offset_bytes: u64,
    /// The new content of the range.
    pub content: Content,
}

/// One record, which is one object or one entry of a journal: the changes that a flush made durable, or a seal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The volume that the WAL belongs to.
    pub volume_id: Uuid,
    /// The writer's epoch.
    pub epoch: u64,
    /// Number of the record. An epoch's numbers have no gaps.
    pub sequence: u64,
    /// Whether it is a seal. A seal begins an owner's part of the WAL, or ends an older owner's. It has no entries.
    pub is_seal: bool,
    /// The highest generation in the earlier records of the same owner, 0 for the first record. If that generation is
    /// published, the earlier records may have been removed. If it is not, they must be there.
    pub after_generation: u64,
    /// How many of the records directly before this one were not known to be durable when this one was made. A crash
    /// may have left this record without them. All records before those were durable. [`NONE_ACKNOWLEDGED`] means that
    /// none of the owner's records was known to be durable.
    pub unacknowledged: u32,
    /// The newest checkpoint when the record was made. The changes apply on top of it. `None` in records of earlier
    /// releases and in seals.
    pub base: Option<CheckpointId>,
    /// The changes, in the order in which they are applied.
    pub entries: Vec<Entry>,
}

/// Why bytes are not a valid record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// There are fewer bytes than the header says.
    #[error("it is cut short")]
    Truncated,
    /// The bytes do not begin as a record does.
    #[error("it is no log record")]
    NotARecord,
    /// The format version is one that this release does not read.
    #[error("its format version is {0}; this release reads versions 1 to {VERSION}")]
    Version(u32),
    /// A checksum does not match.
    #[error("its checksum is wrong")]
    Checksum,
    /// The checksums are right, but the content is impossible.
    #[error("its content is impossible")]
    Malformed,
    /// Bytes follow that do not belong to it.
    #[error("there is more after its end")]
    Trailing,
}

impl Record {
    /// A seal.
    pub fn seal(volume_id: Uuid, epoch: u64, sequence: u64) -> Self {
        Self {
            volume_id,
            epoch,
            sequence,
            is_seal: true,
            after_generation: 0,
            unacknowledged: 0,
            base: None,
            entries: Vec::new(),
        }
    }

    /// The highest generation among the entries; 0 for a seal.
    pub fn newest_generation(&self) -> u64 {
        self.entries.iter().map(|e| e.generation).max().unwrap_or(0)
    }

    /// Encodes the record.
    pub fn encode(&self) -> Bytes {
        let data_bytes = self.entries.iter().map(|e| match &e.content {
            Content::Data(bytes) => bytes.len(),
            Content::Zero { .. } => 0,
        });
        let body_bytes = self.entries.len() * ENTRY_BYTES + data_bytes.sum::<usize>();
        let mut out = BytesMut::with_capacity(HEADER_BYTES + BASE_BYTES + body_bytes);
        out.put_bytes(0, HEADER_BYTES);
        if let Some(base) = self.base {
            out.put_u64_le(base.cno);
            out.put_u64_le(base.check.to_bits());
        }
        for e in &self.entries {
            out.put_u64_le(e.generation);
            out.put_u64_le(e.offset_bytes);
            out.put_u64_le(e.content.len_bytes());
            out.put_u64_le(match e.content {
                Content::Zero { .. } => KIND_ZERO,
                Content::Data(_) => KIND_DATA,
            });
        }
        for e in &self.entries {
            if let Content::Data(bytes) = &e.content {
                out.put_slice(bytes);
            }
        }
        let (header, body) = out.split_at_mut(HEADER_BYTES);
        let body_crc = crc32c(body);
        let mut fields = &mut header[..];
        fields.put_slice(MAGIC);
        fields.put_u32_le(match self.base {
            Some(_) => VERSION,
            None => VERSION_WITHOUT_BASE,
        });
        let is_seal = if self.is_seal { FLAG_SEAL } else { 0 };
        fields.put_u32_le(is_seal | if self.base.is_some() { FLAG_BASE } else { 0 });
        fields.put_slice(self.volume_id.as_bytes());
        fields.put_u64_le(self.epoch);
        fields.put_u64_le(self.sequence);
        fields.put_u32_le(self.entries.len() as u32);
        fields.put_u32_le(self.unacknowledged);
        fields.put_u64_le(body.len() as u64);
        fields.put_u32_le(body_crc);
        fields.put_u64_le(self.after_generation);
        let header_crc = crc32c(&header[..HEADER_BYTES - 4]);
        header[HEADER_BYTES - 4..].copy_from_slice(&header_crc.to_le_bytes());
        out.freeze()
    }

    /// Decodes a record that fills `bytes` exactly.
    ///
    /// # Errors
    /// [`RecordError`] for anything that [`Self::encode`] did not make.
    pub fn decode(bytes: &Bytes) -> Result<Self, RecordError> {
        let (group, len) = Self::decode_prefix(bytes)?;
        if len == bytes.len() {
            Ok(group)
        } else {
            Err(RecordError::Trailing)
        }
    }

    /// Decodes the record at the start of `bytes` and returns its length in bytes.
    ///
    /// # Errors
    /// As [`Self::decode`]; bytes that follow the record are no error.
    pub fn decode_prefix(bytes: &Bytes) -> Result<(Self, usize), RecordError> {
        let header = Header::decode(bytes)?;
        let end = header.group_bytes();
        if bytes.len() < end {
            return Err(RecordError::Truncated);
        }
        let body = bytes.slice(HEADER_BYTES..end);
        if crc32c(&body) != header.body_crc {
            return Err(RecordError::Checksum);
        }
        let (base, body) = if header.has_base {
            let id = CheckpointId {
                cno: u64_at(&body, 0),
                check: InodeCheck::from_bits(u64_at(&body, 8)),
            };
            (Some(id), body.slice(BASE_BYTES..))
        } else {
            (None, body)
        };
        let entries = decode_entries(&body, header.entry_count)?;
        if header.is_seal && !entries.is_empty() {
            return Err(RecordError::Malformed);
        }
        let group = Self {
            volume_id: header.volume_id,
            epoch: header.epoch,
            sequence: header.sequence,
            is_seal: header.is_seal,
            after_generation: header.after_generation,
            unacknowledged: header.unacknowledged,
            base,
            entries,
        };
        Ok((group, end))
    }
}

/// A record's header with a verified checksum.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// See [`Record::volume_id`].
    pub volume_id: Uuid,
    /// See [`Record::epoch`].
    pub epoch: u64,
    /// See [`Record::sequence`].
    pub sequence: u64,
    is_seal: bool,
    after_generation: u64,
    unacknowledged: u32,
    has_base: bool,
    entry_count: usize,
    body_bytes: usize,
    body_crc: u32,
}

impl Header {
    /// Decodes the header at the start of `bytes`.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let Some(h) = bytes.get(..HEADER_BYTES) else {
            return Err(RecordError::Truncated);
        };
        if &h[..8] != MAGIC {
            return Err(RecordError::NotARecord);
        }
        if u32_at(h, HEADER_BYTES - 4) != crc32c(&h[..HEADER_BYTES - 4]) {
            return Err(RecordError::Checksum);
        }
        let base_flag = match u32_at(h, 8) {
            VERSION => FLAG_BASE,
            VERSION_WITHOUT_BASE => 0,
            other => return Err(RecordError::Version(other)),
        };
        let (flags, entry_count, body_bytes) = (u32_at(h, 12), u32_at(h, 48), u64_at(h, 56));
        let has_base = base_flag != 0;
        let base_bytes = if has_base { BASE_BYTES as u64 } else { 0 };
        let is_possible = flags & !FLAG_SEAL == base_flag
            && body_bytes <= BODY_MAX_BYTES
            && base_bytes + u64::from(entry_count) * ENTRY_BYTES as u64 <= body_bytes;
        if !is_possible {
            return Err(RecordError::Malformed);
        }
        let mut volume_id = [0; 16];
        volume_id.copy_from_slice(&h[16..32]);
        Ok(Self {
            volume_id: Uuid::from_bytes(volume_id),
            epoch: u64_at(h, 32),
            sequence: u64_at(h, 40),
            is_seal: flags & FLAG_SEAL != 0,
            after_generation: u64_at(h, 68),
            unacknowledged: u32_at(h, 52),
            has_base,
            entry_count: entry_count as usize,
            body_bytes: body_bytes as usize,
            body_crc: u32_at(h, 64),
        })
    }

    /// Length of the whole record in bytes.
    pub fn group_bytes(&self) -> usize {
        HEADER_BYTES + self.body_bytes
    }
}

fn decode_entries(body: &Bytes, count: usize) -> Result<Vec<Entry>, RecordError> {
    let mut data_at = count * ENTRY_BYTES;
    let mut entries = Vec::with_capacity(count);
    for raw in body[..data_at].chunks_exact(ENTRY_BYTES) {
        let (offset_bytes, len_bytes) = (u64_at(raw, 8), u64_at(raw, 16));
        if len_bytes == 0 || offset_bytes.checked_add(len_bytes).is_none() {
            return Err(RecordError::Malformed);
        }
        let content = match u64_at(raw, 24) {
            KIND_ZERO => Content::Zero { len_bytes },
            KIND_DATA => {
                if len_bytes > (body.len() - data_at) as u64 {
                    return Err(RecordError::Malformed);
                }
                let end = data_at + len_bytes as usize;
                let data = body.slice(data_at..end);
                data_at = end;
                Content::Data(data)
            }
            _ => return Err(RecordError::Malformed),
        };
        entries.push(Entry {
            generation: u64_at(raw, 0),
            offset_bytes,
            content,
        });
    }
    if data_at != body.len() {
        return Err(RecordError::Malformed);
    }
    Ok(entries)
}

/// Corrects the checksums of the record at the start of `bytes`, whatever its other fields hold. For tests and fuzzing.
pub fn fix_checksums(bytes: &mut [u8]) {
    let Some(header) = bytes.get(..HEADER_BYTES) else {
        return;
    };
    let body_bytes = usize::try_from(u64_at(header, 56)).unwrap_or(usize::MAX);
    let end = HEADER_BYTES.saturating_add(body_bytes).min(bytes.len());
    let body_crc = crc32c(&bytes[HEADER_BYTES..end]);
    bytes[64..68].copy_from_slice(&body_crc.to_le_bytes());
    let header_crc = crc32c(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..HEADER_BYTES].copy_from_slice(&header_crc.to_le_bytes());
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
