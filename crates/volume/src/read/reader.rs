//! Reads pieces of stored objects: from the cache, from a fetch in flight, or with a fetch of its own.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use futures::future::{join_all, select_ok};
use parking_lot::Mutex;

use super::cache::{PageKey, ReadCache};
use super::coalesce::{self, Piece, Span};
use super::hedge::Hedge;
use super::priority_gate::{Class, PriorityGate, Turn};
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::single_flight::{Board, Flight, SingleFlight};
use crate::store::Frames;
use crate::store::lineage::RootId;

/// The most fetches in flight at once, for each volume.
const FETCHES_IN_FLIGHT: usize = 64;
/// The largest fetch that a client waits for. Longer runs are fetched in parallel.
const FETCH_BYTES_MAX: u64 = 1 << 20;
/// The largest fetch of read-ahead. Large fetches are fewer requests, and each request costs the processors of both
/// ends.
const AHEAD_BYTES_MAX: u64 = 4 << 20;
/// The largest fetch that is hedged.
const HEDGED_BYTES_MAX: u64 = 256 << 10;
/// The largest page. A small read of a large block fetches no more than this.
const PAGE_BYTES_MAX: u32 = 16 << 10;

/// The source of stored objects.
#[async_trait]
pub trait ObjectSource: Send + Sync + 'static {
    /// Reads exactly `len_bytes` bytes at `offset_bytes` of an object.
    async fn read(&self, object: u64, offset_bytes: u64, len_bytes: u64) -> Result<Frames, VolumeError>;

    /// Which container an object lies in. In another one the same name may be that of other bytes.
    fn root_of(&self, _object: u64) -> RootId {
        RootId::default()
    }
}

/// A run of stored bytes, and the wanted part of it. Pages are counted from the start of the run, which must be the
/// start of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The object.
    pub object: u64,
    /// The run, in bytes of the object. Nothing outside of it is read.
    pub run: Range<u64>,
    /// The wanted bytes, inside `run`.
    pub wanted: Range<u64>,
}

/// A page and the part of it that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    key: PageKey,
    page_len: u64,
    /// The wanted bytes, counted from the page's start.
    wanted: Range<u64>,
}

#[derive(Clone)]
struct Fetched {
    start: u64,
    bytes: Frames,
}

/// Reads stored bytes through the cache.
pub struct Reader {
    shared: Arc<Shared>,
    page_bytes: u64,
}

struct Shared {
    source: Box<dyn ObjectSource>,
    cache: ReadCache,
    gate: PriorityGate,
    hedge: Mutex<Hedge>,
    flights: SingleFlight<PageKey, Fetched>,
}

impl Reader {
    /// A reader of a container with blocks of `block_size` bytes.
    pub fn new(source: impl ObjectSource, cache: ReadCache, block_size: u32) -> Self {
        Self {
            shared: Arc::new(Shared {
                source: Box::new(source),
                cache,
                gate: PriorityGate::new(FETCHES_IN_FLIGHT),
                hedge: Mutex::default(),
                flights: SingleFlight::default(),
            }),
            page_bytes: u64::from(block_size.min(PAGE_BYTES_MAX)),
        }
    }

    /// The cache.
    pub fn cache(&self) -> &ReadCache {
        &self.shared.cache
    }

    fn parts(&self, stored: &Stored) -> impl Iterator<Item = Part> + use<> {
        let Stored { object, run, wanted } = stored.clone();
        let page_bytes = self.page_bytes;
        let root = self.shared.source.root_of(object);
        let first = (wanted.start - run.start) / page_bytes;
        let last = (wanted.end - run.start).div_ceil(page_bytes);
        (first..last).map(move |index| {
            let start = run.start + index * page_bytes;
            let end = run.end.min(start + page_bytes);
            Part {
                key: PageKey {
                    root,
                    object,
                    offset_bytes: start,
                },
                page_len: end - start,
                wanted: wanted.start.max(start) - start..wanted.end.min(end) - start,
            }
        })
    }

    /// Fills `out` from memory, if all of it is there. Returns `false` otherwise; `out` may then be filled in part.
    pub fn read_at_once(&self, stored: &Stored, out: &mut [u8]) -> bool {
        let (mut rest, mut found) = (out, 0);
        let is_all = self.parts(stored).all(|part| {
            let (to, after) = std::mem::take(&mut rest).split_at_mut(len(&part.wanted));
            rest = after;
            found += 1;
            self.copy_from_memory(&part, to)
        });
        // Otherwise all of it is looked up once more.
        if is_all {
            self.shared.cache.metrics().caches.data.memory.add(found);
        }
        is_all
    }

    fn copy_from_memory(&self, part: &Part, to: &mut [u8]) -> bool {
        let copied = self.shared.cache.with(part.key, |page| copy(part, page, to));
        copied.unwrap_or(false)
    }

    /// Fills each `out` with the wanted bytes of its run.
    ///
    /// # Errors
    /// When a fetch fails. Nothing is retried here.
    pub async fn read(&self, pieces: Vec<(Stored, &mut [u8])>, class: Class) -> Result<(), VolumeError> {
        let (mut missing, mut in_memory) = (Vec::new(), 0);
        for (stored, out) in pieces {
            let mut rest = out;
            for part in self.parts(&stored) {
                let (to, after) = rest.split_at_mut(len(&part.wanted));
                rest = after;
                match self.copy_from_memory(&part, to) {
                    true => in_memory += 1,
                    false => missing.push((part, to)),
                }
            }
        }
        let not_in_memory = missing.len() as u64;
        if self.shared.cache.has_disk() && !missing.is_empty() {
            let loads = missing.into_iter().map(|(part, to)| async move {
                let loaded = self
                    .shared
                    .cache
                    .load(part.key, |page| copy(&part, page, to))
                    .await;
                (!loaded.unwrap_or(false)).then_some((part, to))
            });
            missing = join_all(loads).await.into_iter().flatten().collect();
        }
        if class == Class::Foreground {
            let counted = &self.shared.cache.metrics().caches.data;
            counted.memory.add(in_memory);
            counted.disk.add(not_in_memory - missing.len() as u64);
            counted.misses.add(missing.len() as u64);
        }
        let flights = self.fetch_all(missing.iter().map(|(part, _)| part), class);
        for ((part, to), flight) in missing.into_iter().zip(flights) {
            let fetched = match flight.await {
                // What is wrong with what lies beside it is no reason to refuse this.
                Err(e) if e.kind() == ErrorKind::Corrupt => self.fetch_alone(&part, class).await?,
                fetched => fetched.map_err(VolumeError::Shared)?,
            };
            let at = (part.key.offset_bytes - fetched.start) as usize;
            if !fetched.bytes.copy_to(at + part.wanted.start as usize, to) {
                return Err(VolumeError::Internal(
                    "a fetch is shorter than what it was for".into(),
                ));
            }
        }
        Ok(())
    }

    /// One page, with a fetch of its own.
    async fn fetch_alone(&self, part: &Part, class: Class) -> Result<Fetched, VolumeError> {
        let start = part.key.offset_bytes;
        let page = start..start + part.page_len;
        let bytes = self.shared.fetch(part.key.object, &page, class).await?;
        if class != Class::Background
            && let Some(page) = bytes.to_vec(0, len(&page))
        {
            self.shared.cache.insert(part.key, page);
        }
        Ok(Fetched { start, bytes })
    }

    /// Brings the wanted bytes into the cache.
    ///
    /// # Errors
    /// When a fetch fails.
    pub async fn bring(&self, stored: Vec<Stored>) -> Result<(), VolumeError> {
        let mut missing = Vec::new();
        for part in stored.iter().flat_map(|s| self.parts(s)) {
            if self.shared.cache.with(part.key, |_| ()).is_some() {
                continue;
            }
            if !self.shared.cache.has_disk() || self.shared.cache.load(part.key, |_| ()).await.is_none() {
                missing.push(part);
            }
        }
        for flight in self.fetch_all(missing.iter(), Class::ReadAhead) {
            flight.await.map_err(VolumeError::Shared)?;
        }
        Ok(())
    }

    /// Adds bytes to the cache that were just stored at this place.
    pub fn keep(&self, stored: &Stored, bytes: &[u8]) {
        for part in self.parts(stored) {
            let at = (part.key.offset_bytes - stored.run.start) as usize;
            self.shared
                .cache
                .insert(part.key, bytes[at..at + part.page_len as usize].to_vec());
        }
    }

    /// Takes bytes out of the cache's memory that nobody will ask for any more.
    pub fn forget(&self, stored: &Stored) {
        for part in self.parts(stored) {
            self.shared.cache.forget(part.key);
        }
    }

    /// Bytes of an object for a copy of them, with one request of the lowest class. Nothing of them enters the cache.
    ///
    /// # Errors
    /// When the fetch fails.
    pub async fn read_for_copy(&self, object: u64, bytes: Range<u64>) -> Result<Frames, VolumeError> {
        self.shared.fetch(object, &bytes, Class::Background).await
    }

    /// A turn of the lowest class, for a request that goes another way; held until that is answered.
    pub async fn background_turn(&self) -> Turn<'_> {
        self.shared.gate.enter(Class::Background).await
    }

    /// What is in memory at one place is kept as what lies at another, too: the same bytes were copied there.
    pub fn follow(&self, from: &Stored, to: &Stored) {
        for (old, new) in self.parts(from).zip(self.parts(to)) {
            if let Some(page) = self.shared.cache.with(old.key, <[u8]>::to_vec) {
                self.shared.cache.insert(new.key, page);
            }
        }
    }

    /// The fetch that each page comes with: one under way, or a new one, which pages near each other in the store share.
    fn fetch_all<'a>(&self, parts: impl Iterator<Item = &'a Part>, class: Class) -> Vec<Flight<Fetched>> {
        let parts: Vec<&Part> = parts.collect();
        if parts.is_empty() {
            return Vec::new();
        }
        let most_bytes = match class {
            Class::ReadAhead => AHEAD_BYTES_MAX,
            Class::Foreground | Class::Background => FETCH_BYTES_MAX,
        };
        let mut board = self.shared.flights.board();
        let mut flights: Vec<Option<Flight<Fetched>>> =
            parts.iter().map(|part| board.get(&part.key)).collect();
        let missing = parts.iter().zip(&flights).enumerate();
        let missing = missing.filter_map(|(number, (part, flight))| match flight {
            Some(_) => None,
            None => Some(Piece {
                number,
                object: part.key.object,
                bytes: part.key.offset_bytes..part.key.offset_bytes + part.page_len,
            }),
        });
        for span in coalesce::spans(missing.collect(), most_bytes) {
            let numbers: Vec<usize> = span.pieces.iter().map(|piece| piece.number).collect();
            let flight = self.fetch_span(&mut board, span, class);
            for number in numbers {
                flights[number] = Some(flight.clone());
            }
        }
        flights.into_iter().flatten().collect()
    }

    fn fetch_span(
        &self,
        board: &mut Board<'_, PageKey, Fetched>,
        span: Span,
        class: Class,
    ) -> Flight<Fetched> {
        let root = self.shared.source.root_of(span.object);
        let key = move |piece: &Piece| PageKey {
            root,
            object: piece.object,
            offset_bytes: piece.bytes.start,
        };
        let keys = span.pieces.iter().map(key).collect();
        let shared = self.shared.clone();
        board.start(keys, async move {
            let bytes = shared
                .fetch(span.object, &span.bytes, class)
                .await
                .map_err(Arc::new)?;
            // Bytes that are read only to complete a block would evict pages that are read repeatedly.
            if class != Class::Background {
                for piece in &span.pieces {
                    let at = (piece.bytes.start - span.bytes.start) as usize;
                    if let Some(page) = bytes.to_vec(at, len(&piece.bytes)) {
                        shared.cache.insert(key(piece), page);
                    }
                }
            }
            Ok(Fetched {
                start: span.bytes.start,
                bytes,
            })
        })
    }
}

impl Shared {
    async fn fetch(&self, object: u64, bytes: &Range<u64>, class: Class) -> Result<Frames, VolumeError> {
        let _turn = self.gate.enter(class).await;
        let len_bytes = bytes.end - bytes.start;
        let read = || self.source.read(object, bytes.start, len_bytes);
        if class != Class::Foreground || len_bytes > HEDGED_BYTES_MAX {
            return read().await;
        }
        let wait = self.hedge.lock().begin();
        let began = Instant::now();
        let mut first = read();
        let answer = match wait {
            None => first.await,
            Some(wait) => match tokio::time::timeout(wait, &mut first).await {
                Ok(answer) => answer,
                Err(_) if self.hedge.lock().take() => {
                    log::debug!("a read is slow and asked for a second time");
                    select_ok([first, read()]).await.map(|(bytes, _)| bytes)
                }
                Err(_) => first.await,
            },
        };
        if answer.is_ok() {
            self.hedge.lock().ended(began.elapsed());
        }
        answer
    }
}

fn len(range: &Range<u64>) -> usize {
    (range.end - range.start) as usize
}

/// Copies the wanted part of a page. Returns `false` when the page is too short, as is a page that was kept before the
/// volume grew.
fn copy(part: &Part, page: &[u8], to: &mut [u8]) -> bool {
    match page.get(part.wanted.start as usize..part.wanted.end as usize) {
        Some(bytes) => {
            to.copy_from_slice(bytes);
            true
        }
        None => false,
    }
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
