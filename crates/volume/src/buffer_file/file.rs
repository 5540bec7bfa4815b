//! A buffer file: how it is made, found and read back.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use super::dir::unusable;
use super::format::{
    CHUNK_BYTES, ENTRY_BYTES, Entry, Floor, HEAD_BYTES, Header, Kind, MAGIC, TABLE_BYTES, chunk_at,
};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::checksum::crc32c;
use crate::base::error::VolumeError;

/// A buffer file that was found in the directory.
#[derive(Debug)]
pub(super) struct Found {
    pub file: File,
    pub count: u64,
    pub header: Result<Header, String>,
}

/// The changes that an earlier server answered and did not publish.
#[derive(Debug)]
pub(crate) struct Recovered {
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// The checkpoint on top of which the changes were made.
    pub(super) base: Option<CheckpointId>,
    /// The entries in order, each with the chunk that holds its data.
    pub(super) entries: Vec<(u32, Entry)>,
}

/// A change that was read back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub kind: Kind,
    pub offset_bytes: u64,
    pub len_bytes: u64,
    /// The written bytes; empty for zeros.
    pub data: Vec<u8>,
}

impl Recovered {
    /// The checkpoint on top of which the changes were made: the newest that was published before them, or a later one.
    pub fn base(&self) -> Option<CheckpointId> {
        self.base
    }

    /// The number of changes, and the number of bytes that they write or zero.
    pub fn amount(&self) -> (usize, u64) {
        let bytes = self.entries.iter().map(|(_, entry)| entry.len_bytes).sum();
        (self.entries.len(), bytes)
    }

    /// Calls `apply` with each change, in order.
    ///
    /// # Errors
    /// The error of `apply`; [`VolumeError::BufferFile`] when the file cannot be read.
    pub fn each(&self, mut apply: impl FnMut(Change) -> Result<(), VolumeError>) -> Result<(), VolumeError> {
        for (chunk, entry) in &self.entries {
            let mut data = Vec::new();
            if entry.kind == Kind::Write {
                data = vec![0; entry.len_bytes as usize];
                let at = chunk_at(*chunk) + TABLE_BYTES + u64::from(entry.data_at);
                let read = self.file.read_exact_at(&mut data, at);
                read.map_err(|e| unusable(&self.path, &e))?;
                if crc32c(&data) != entry.data_crc {
                    // Data is written before its entry, so a killed server never leaves an entry without its data.
                    let dir = self.path.parent().unwrap_or(&self.path);
                    let reason = format!(
                        "the data of its change {} is damaged; what it holds is given up with: hypernbd buffer discard {}",
                        entry.sequence,
                        dir.display()
                    );
                    return Err(unusable(&self.path, &io::Error::other(reason)));
                }
            }
            apply(Change {
                kind: entry.kind,
                offset_bytes: entry.offset_bytes,
                len_bytes: entry.len_bytes,
                data,
            })?;
        }
        Ok(())
    }
}

/// The entries that count, in the order of their changes, each with its chunk.
pub(super) fn entries(file: &File, header: &Header) -> io::Result<Vec<(u32, Entry)>> {
    let mut head = vec![0; HEAD_BYTES as usize];
    file.read_exact_at(&mut head, 0)?;
    let floor = Floor::decode(&head, header.nonce).generation;
    let mut entries = Vec::new();
    let mut table = vec![0; TABLE_BYTES as usize];
    // The minimum keeps a damaged header from making this longer than the file.
    let chunks = (file.metadata()?.len().saturating_sub(HEAD_BYTES) / CHUNK_BYTES).min(header.chunks.into());
    for chunk in 0..chunks as u32 {
        file.read_exact_at(&mut table, chunk_at(chunk))?;
        let whole = table
            .chunks_exact(ENTRY_BYTES)
            .filter_map(|bytes| Entry::decode(bytes, header.nonce));
        entries.extend(whole.filter(|e| e.generation > floor).map(|e| (chunk, e)));
    }
    entries.sort_unstable_by_key(|(_, entry)| entry.sequence);
    Ok(entries)
}

pub(super) fn find(path: &Path) -> io::Result<Option<Found>> {
    let file = match OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
    {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut head = vec![0; HEAD_BYTES as usize];
    let is_ours = file.read_exact_at(&mut head, 0).is_ok() && head.starts_with(MAGIC);
    if !is_ours {
        return Err(io::Error::other(format!(
            "{} is there, and is not the file of a write buffer: remove it, or name another directory",
            path.display()
        )));
    }
    let is_whole = |header: &Header| {
        file.metadata()
            .is_ok_and(|file| file.len() >= chunk_at(header.chunks))
    };
    let (count, header) = match Header::decode(&head) {
        Ok((count, header)) if is_whole(&header) => (count, Ok(header)),
        Ok((count, _)) => (count, Err("it was cut short".to_owned())),
        Err(e) => (0, Err(e)),
    };
    Ok(Some(Found { file, count, header }))
}

/// The checkpoint on top of which the entries that count were made.
pub(super) fn base(file: &File, header: &Header) -> io::Result<Option<CheckpointId>> {
    let mut head = vec![0; HEAD_BYTES as usize];
    file.read_exact_at(&mut head, 0)?;
    let floor = Floor::decode(&head, header.nonce);
    Ok(match floor.generation {
        // Written before any generation was published, where a checkpoint came in which nothing of them is.
        0 => floor.base.or(header.base),
        _ => floor.base,
    })
}

pub(super) fn make(path: &Path, header: &Header) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_NOFOLLOW)
        .mode(0o600)
        .open(path)?;
    match fallocate(&file, FallocateFlags::empty(), 0, chunk_at(header.chunks)) {
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(chunk_at(header.chunks))?,
        reserved => reserved?,
    }
    file.write_all_at(MAGIC, 0)?;
    put_header(&file, header, &mut 0)?;
    Ok(file)
}

pub(super) fn put_header(file: &File, header: &Header, count: &mut u64) -> io::Result<()> {
    *count += 1;
    let (at, bytes) = header
        .encode(*count)
        .ok_or_else(|| io::Error::other("the header has no room"))?;
    file.write_all_at(&bytes, at)
}

/// Punches holes in place of the chunks that hold no entry that counts.
pub(super) fn give_room_back(file: &File, header: &Header) {
    let Ok(entries) = entries(file, header) else {
        return;
    };
    let used: BTreeSet<u32> = entries.iter().map(|(chunk, _)| *chunk).collect();
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for chunk in (0..header.chunks).filter(|chunk| !used.contains(chunk)) {
        if fallocate(file, flags, chunk_at(chunk), CHUNK_BYTES).is_err() {
            return;
        }
    }
}
