//! The buffer file while its volume is served.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::format::{DATA_BYTES, ENTRIES, ENTRY_BYTES, Entry, Floor, Kind, TABLE_BYTES, chunk_at};
use crate::base::checkpoint_id::NewestCheckpoint;
use crate::base::checksum::crc32c;
use crate::base::error::VolumeError;

/// No chunk is free for a change. A generation must be published first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoRoom;

/// Chunks that hold no entry that counts.
#[derive(Debug)]
struct Free(Mutex<Vec<u32>>);

/// A chunk in use: its generation holds it, and so do changes that are being written to it.
#[derive(Debug)]
struct Chunk {
    number: u32,
    free: Arc<Free>,
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.free.0.lock().push(self.number);
    }
}

/// The place for the next entries.
#[derive(Debug)]
struct Tail {
    chunk: Arc<Chunk>,
    entries: u32,
    data_bytes: u32,
}

#[derive(Debug)]
struct Places {
    sequence: u64,
    /// The number of the active generation.
    generation: u64,
    tail: Option<Tail>,
    /// Chunks of the unpublished generations; the active generation is the last.
    generations: VecDeque<Vec<Arc<Chunk>>>,
    /// Chunks of published generations that count still, since the file could be neither written nor removed.
    stuck: Vec<Arc<Chunk>>,
}

impl Places {
    /// The number of the newest published generation.
    fn published(&self) -> u64 {
        self.generation - self.generations.len() as u64
    }
}

/// A buffer file that is in use.
#[derive(Debug)]
pub(crate) struct Kept {
    path: PathBuf,
    file: File,
    /// Keeps other servers out of the directory.
    _lock: File,
    nonce: u64,
    chunks: u32,
    free: Arc<Free>,
    /// The newest published checkpoint.
    newest: NewestCheckpoint,
    places: Mutex<Places>,
    /// Held while the file is removed.
    removing: Mutex<()>,
    /// Held from when a floor is known until it is written.
    floors: Mutex<()>,
    /// The file could not be written and was removed. Changes are not kept any more.
    is_given_up: AtomicBool,
    /// The file could not even be removed. Its contents are wrong from now on, so changes are refused.
    is_stale: AtomicBool,
}

/// Part of a change: its entry, and the place of the entry.
#[derive(Debug)]
struct Part {
    chunk: Arc<Chunk>,
    slot: u32,
    entry: Entry,
    /// Offset of its data within the data of the whole change, in bytes.
    from: usize,
}

/// The places reserved for a change that was added to the overlay. The change may be answered once [`Kept::store`] has
/// written it.
#[derive(Debug, Default)]
#[must_use]
pub(crate) struct Ticket {
    parts: Vec<Part>,
    /// Whether the active generation fills half of the file since this change. It must then be published before it
    /// fills all of it.
    pub is_half_full: bool,
}

impl Kept {
    /// For a file whose header has this nonce, and that has no entry with it yet.
    pub(super) fn new(
        path: &Path,
        file: File,
        lock: File,
        nonce: u64,
        chunks: u32,
        newest: NewestCheckpoint,
    ) -> Self {
        let free = (0..chunks).rev().collect();
        Self {
            path: path.to_owned(),
            file,
            _lock: lock,
            nonce,
            chunks,
            free: Arc::new(Free(Mutex::new(free))),
            newest,
            places: Mutex::new(Places {
                sequence: 0,
                generation: 1,
                tail: None,
                generations: VecDeque::from([Vec::new()]),
                stuck: Vec::new(),
            }),
            removing: Mutex::default(),
            floors: Mutex::default(),
            is_given_up: AtomicBool::new(false),
            is_stale: AtomicBool::new(false),
        }
    }

    /// Whether there is space now for a change with this much data.
    pub fn has_room(&self, data_bytes: u64) -> bool {
        self.is_given_up.load(Ordering::Acquire)
            || self.free.0.lock().len() as u64 >= data_bytes.div_ceil(DATA_BYTES.into()).max(1)
    }

    /// Gives a change its number in the order and its place in the file. The change is split into as many parts as it
    /// needs chunks. Called under the overlay's lock, before the change is added.
    ///
    /// # Errors
    /// [`NoRoom`]. Nothing is reserved then.
    pub fn reserve(&self, kind: Kind, offset_bytes: u64, len_bytes: u64) -> Result<Ticket, NoRoom> {
        if self.is_given_up.load(Ordering::Acquire) {
            return Ok(Ticket::default());
        }
        let places = &mut *self.places.lock();
        let has_data = kind == Kind::Write;
        let tail_data = places.tail.as_ref().map_or(0, Tail::room_bytes);
        let beyond = if has_data {
            len_bytes.saturating_sub(tail_data.into())
        } else {
            u64::from(tail_data == 0)
        };
        // Takes all the chunks that are needed, or none.
        let mut fresh = {
            let mut free = self.free.0.lock();
            let needed = beyond.div_ceil(DATA_BYTES.into()) as usize;
            let Some(left) = free.len().checked_sub(needed) else {
                return Err(NoRoom);
            };
            free.split_off(left)
        };
        let mut ticket = Ticket::default();
        let mut done = 0;
        loop {
            let is_full = places.tail.as_ref().is_none_or(|tail| tail.room_bytes() == 0);
            if is_full {
                let Some(number) = fresh.pop() else { break };
                let chunk = Arc::new(Chunk {
                    number,
                    free: self.free.clone(),
                });
                if let Some(active) = places.generations.back_mut() {
                    active.push(chunk.clone());
                    ticket.is_half_full |= active.len() as u32 == (self.chunks / 2).max(1);
                }
                places.tail = Some(Tail {
                    chunk,
                    entries: 0,
                    data_bytes: 0,
                });
            }
            let Some(tail) = &mut places.tail else { break };
            let (part_bytes, data_at) = match has_data {
                true => ((len_bytes - done).min(tail.room_bytes().into()), tail.data_bytes),
                false => (len_bytes, 0),
            };
            places.sequence += 1;
            ticket.parts.push(Part {
                chunk: tail.chunk.clone(),
                slot: tail.entries,
                entry: Entry {
                    sequence: places.sequence,
                    generation: places.generation,
                    kind,
                    offset_bytes: offset_bytes + done,
                    len_bytes: part_bytes,
                    data_at,
                    data_crc: 0,
                },
                from: done as usize,
            });
            tail.entries += 1;
            if has_data {
                tail.data_bytes += part_bytes as u32;
            }
            done += part_bytes;
            if done >= len_bytes {
                break;
            }
        }
        Ok(ticket)
    }

    /// Writes a change to its places. `data` holds the written bytes; it is empty for zeros.
    ///
    /// # Errors
    /// [`VolumeError::BufferFile`] when the file can be neither written nor removed. If it can be removed, it is, a
    /// line in the log says so, and the volume is served without a buffer file.
    pub fn store(&self, ticket: Ticket, data: &[u8]) -> Result<(), VolumeError> {
        for mut part in ticket.parts {
            if let Err(e) = self.store_part(&mut part, data) {
                self.give_up(&e);
            }
        }
        if !self.is_stale.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(VolumeError::BufferFile {
            path: self.path.display().to_string(),
            reason: "it can be neither written nor removed".to_owned(),
        })
    }

    fn store_part(&self, part: &mut Part, data: &[u8]) -> io::Result<()> {
        let at = chunk_at(part.chunk.number);
        if part.entry.kind == Kind::Write {
            let data = &data[part.from..part.from + part.entry.len_bytes as usize];
            part.entry.data_crc = crc32c(data);
            self.file
                .write_all_at(data, at + TABLE_BYTES + u64::from(part.entry.data_at))?;
        }
        let slot_at = at + u64::from(part.slot) * ENTRY_BYTES as u64;
        self.file.write_all_at(&part.entry.encode(self.nonce), slot_at)
    }

    fn give_up(&self, error: &io::Error) {
        // Until the file is gone, every change is still written to it or waits here. A change that was answered without
        // being in the file would be undone when the file's older changes are applied.
        let _removing = self.removing.lock();
        if self.is_given_up.load(Ordering::Acquire) || self.is_stale.load(Ordering::Acquire) {
            return;
        }
        log::error!(
            "the write buffer's file {} cannot be written and is given up: {error}; a server that is killed loses what was \
             not flushed from now on",
            self.path.display()
        );
        match self.remove() {
            Err(e) => {
                log::error!("it cannot be removed either: {e}; changes are refused");
                self.is_stale.store(true, Ordering::Release);
            }
            Ok(()) => self.is_given_up.store(true, Ordering::Release),
        }
    }

    fn remove(&self) -> io::Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// The path of the file, as long as it holds every change that counts.
    pub fn kept_in(&self) -> Option<&Path> {
        let is_whole = !self.is_given_up.load(Ordering::Acquire) && !self.is_stale.load(Ordering::Acquire);
        is_whole.then_some(self.path.as_path())
    }

    /// Ends the active generation and begins the next one. Called under the overlay's lock.
    pub fn freeze(&self) {
        let mut places = self.places.lock();
        places.generation += 1;
        places.generations.push_back(Vec::new());
        places.tail = None;
    }

    /// Notes that the oldest generation is published, so that its entries no longer count.
    pub fn drop_oldest(&self) {
        let _floors = self.floors.lock();
        let (published, chunks) = {
            let mut places = self.places.lock();
            if places.generations.len() < 2 {
                return;
            }
            let chunks = places.generations.pop_front().unwrap_or_default();
            (places.published(), chunks)
        };
        // Comes before the chunks become free, because an entry must not count once its chunk can be overwritten.
        self.put_floor(published);
        if self.is_stale.load(Ordering::Acquire) {
            // The file counts still, with the floor from before: its entries must stay.
            self.places.lock().stuck.extend(chunks);
            return;
        }
        drop(chunks);
    }

    /// Notes that a checkpoint follows in which nothing else was changed: from now on the changes are made upon that one.
    pub fn rebase(&self) {
        let _floors = self.floors.lock();
        let published = self.places.lock().published();
        self.put_floor(published);
    }

    /// Called under `floors`: a later floor is never written before an earlier one, which would make chunks count that are in use again.
    fn put_floor(&self, published: u64) {
        if self.is_given_up.load(Ordering::Acquire) {
            return;
        }
        let floor = Floor {
            nonce: self.nonce,
            generation: published,
            base: self.newest.get(),
        };
        let written = match floor.encode() {
            Some((at, bytes)) => self.file.write_all_at(&bytes, at),
            None => Err(io::Error::other("the floor has no room")),
        };
        if let Err(e) = written {
            self.give_up(&e);
        }
    }

    /// Removes the file and gives its space back. The volume is closed, and everything is published.
    pub fn close(&self) {
        if let Err(e) = self.remove() {
            log::warn!("the write buffer's file {} is left: {e}", self.path.display());
        }
    }
}

impl Tail {
    /// Bytes of data that still fit into the chunk; 0 also when it has no free entry.
    fn room_bytes(&self) -> u32 {
        match self.entries < ENTRIES {
            true => DATA_BYTES - self.data_bytes,
            false => 0,
        }
    }
}
