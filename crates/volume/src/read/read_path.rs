//! Reads of published data: finds the places, then reads them. Nothing here uses the owner thread.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use log::{debug, error};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::base::error::{ErrorKind, VolumeError};
use crate::base::geometry::LiveGeometry;
use crate::format::object_names::{cno_of, name_of, of_pointer};
use crate::index::location_map::{Place, Run};
use crate::index::lookup::{Index, Published};
use crate::index::relocation::{Move, offset_of};
use crate::read::cache::ReadCache;
use crate::read::coalesce::{self, Piece};
use crate::read::priority_gate::{Class, Turn};
use crate::read::read_ahead::Windows;
use crate::read::reader::{ObjectSource, Reader, Stored};
use crate::read::write_through;
use crate::store::lineage::RootId;
use crate::store::{Frames, Store};
use crate::write_buffer::overlay::Frozen;

/// The fewest blocks that are looked up at once, so that a stream of reads seldom needs a look-up.
const LOOKUP_BLOCKS_MIN: u64 = 1024;
/// The most look-ups for one request for extents.
const EXTENT_LOOKUPS: u32 = 8;
/// The largest window of read-ahead: what a connection of 4 Gbit/s carries in 30 ms.
const WINDOW_MAX_BYTES: u64 = 16 << 20;
/// The most bytes that completing blocks reads with one call, which bounds the memory that many such reads take.
const GROUP_BYTES_MAX: u64 = 512 << 10;
/// Time between the open and the warm-up of the index.
const WARM_UP_WAIT: Duration = Duration::from_millis(300);
/// Places that damage is told of, at most: the log need not grow with every attempt.
const TOLD_MAX: usize = 1000;
/// Part of the cache that one window may take, and that one publish may.
const CACHE_PARTS: u64 = 16;

/// Reads of one container. All clones share one state.
#[derive(Clone)]
pub(crate) struct Reads {
    shared: Arc<Shared>,
}

struct Shared {
    geometry: LiveGeometry,
    known: Arc<Mutex<Published>>,
    index: Index,
    reader: Reader,
    windows: Mutex<Windows>,
    /// First blocks of the reads that damage was told of.
    told: Mutex<HashSet<u64>>,
}

/// Reads the objects of a container.
pub(crate) struct Objects(pub Store);

#[async_trait]
impl ObjectSource for Objects {
    async fn read(&self, object: u64, offset_bytes: u64, len_bytes: u64) -> Result<Frames, VolumeError> {
        let name = name_of(object);
        let holder = self.0.holder_of(cno_of(object));
        let read = holder
            .get_verified(&holder.data_key(&name), offset_bytes, len_bytes)
            .await?;
        read.ok_or_else(|| VolumeError::Corrupt {
            what: format!(
                "{len_bytes} bytes at {offset_bytes} of the object {name} of {}",
                holder.url
            ),
            reason: "the object is missing".into(),
        })
    }

    fn root_of(&self, object: u64) -> RootId {
        self.0.lineage().root_of(cno_of(object))
    }
}

impl Reads {
    pub(crate) fn new(
        geometry: LiveGeometry,
        known: Arc<Mutex<Published>>,
        index: Index,
        reader: Reader,
    ) -> Self {
        let window_max_bytes = WINDOW_MAX_BYTES.min(reader.cache().memory_bytes() / CACHE_PARTS);
        Self {
            shared: Arc::new(Shared {
                geometry,
                known,
                index,
                reader,
                windows: Mutex::new(Windows::new(window_max_bytes)),
                told: Mutex::default(),
            }),
        }
    }

    /// The read cache.
    pub(crate) fn cache(&self) -> &ReadCache {
        self.shared.reader.cache()
    }

    /// The places of blocks from `blocks.start` on: of all of them, or of as many as `lookups` look-ups find.
    async fn locate(&self, blocks: Range<u64>, mut lookups: u32) -> Result<Vec<Run>, VolumeError> {
        let mut runs: Vec<Run> = Vec::new();
        loop {
            let at = runs.last().map_or(blocks.start, |r| r.blocks.end);
            if at >= blocks.end {
                return Ok(runs);
            }
            let known = self.shared.known.lock().locations.known_prefix(at..blocks.end);
            if !known.is_empty() {
                runs.extend(known);
                continue;
            }
            if lookups == 0 {
                return Ok(runs);
            }
            lookups -= 1;
            // A wide range costs little more, and spares the next reads a look-up.
            let until = blocks
                .end
                .max(at + LOOKUP_BLOCKS_MIN)
                .min(self.shared.geometry.now().blocks());
            let mut next = at;
            for mut run in self.shared.index.look_up(at..until).await? {
                if run.blocks.start != next || next >= blocks.end {
                    // The blocks in between were published meanwhile, and the map knows them.
                    break;
                }
                run.blocks.end = run.blocks.end.min(blocks.end);
                next = run.blocks.end;
                runs.push(run);
            }
        }
    }

    /// The places at which the bytes of a request are stored, each with the range of the request that it serves, in
    /// bytes from the request's start. A range that is stored nowhere has no place.
    fn stored(&self, runs: &[Run], offset_bytes: u64, len_bytes: u64) -> Vec<(Range<u64>, Option<Stored>)> {
        let block_size = u64::from(self.shared.geometry.now().block_size());
        let end = offset_bytes + len_bytes;
        let pieces = runs.iter().map(|run| {
            let (start, until) = (run.blocks.start * block_size, run.blocks.end * block_size);
            let wanted = start.max(offset_bytes)..until.min(end);
            let stored = match run.place {
                Place::Nothing => None,
                Place::Stored {
                    object,
                    offset_bytes: base,
                } => Some(Stored {
                    object,
                    // The last block of a volume is stored only up to the volume's end.
                    run: base..base + until.min(self.shared.geometry.now().size_bytes()) - start,
                    wanted: base + (wanted.start - start)..base + (wanted.end - start),
                }),
            };
            (wanted.start - offset_bytes..wanted.end - offset_bytes, stored)
        });
        pieces.collect()
    }

    /// Reads without waiting for anything, if possible. Returns `false` otherwise; `out` may then be filled in part.
    pub(crate) fn read_at_once(&self, offset_bytes: u64, out: &mut [u8]) -> bool {
        let len_bytes = out.len() as u64;
        let blocks = self.shared.geometry.now().touched_blocks(offset_bytes, len_bytes);
        let runs = self.shared.known.lock().locations.known_prefix(blocks.clone());
        if runs.last().is_none_or(|r| r.blocks.end < blocks.end) {
            return false;
        }
        let mut rest = out;
        self.stored(&runs, offset_bytes, len_bytes)
            .into_iter()
            .all(|(range, stored)| {
                let (part, after) =
                    std::mem::take(&mut rest).split_at_mut((range.end - range.start) as usize);
                rest = after;
                match stored {
                    Some(stored) => self.shared.reader.read_at_once(&stored, part),
                    None => {
                        part.fill(0);
                        true
                    }
                }
            })
    }

    /// The stored pieces of a request, each with the part of `out` that it fills. The rest of `out` is zeroed.
    async fn pieces<'a>(
        &self,
        offset_bytes: u64,
        out: &'a mut [u8],
    ) -> Result<Vec<(Stored, &'a mut [u8])>, VolumeError> {
        let len_bytes = out.len() as u64;
        let blocks = self.shared.geometry.now().touched_blocks(offset_bytes, len_bytes);
        let runs = self.locate(blocks, u32::MAX).await?;
        let mut pieces = Vec::new();
        let mut rest = out;
        for (range, stored) in self.stored(&runs, offset_bytes, len_bytes) {
            let (part, after) = rest.split_at_mut((range.end - range.start) as usize);
            rest = after;
            match stored {
                Some(stored) => pieces.push((stored, part)),
                None => part.fill(0),
            }
        }
        Ok(pieces)
    }

    pub(crate) async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        let len_bytes = out.len() as u64;
        let pieces = self.pieces(offset_bytes, out).await?;
        let read = self.shared.reader.read(pieces, Class::Foreground).await;
        if let Err(e) = &read
            && e.kind() == ErrorKind::Corrupt
        {
            self.tell_damage(offset_bytes, len_bytes, e);
        }
        read
    }

    /// Says what of the volume cannot be read, and where that is stored, once for each place.
    fn tell_damage(&self, offset_bytes: u64, len_bytes: u64, e: &VolumeError) {
        let blocks = self.shared.geometry.now().touched_blocks(offset_bytes, len_bytes);
        let mut told = self.shared.told.lock();
        if told.len() < TOLD_MAX && told.insert(blocks.start) {
            error!(
                "{len_bytes} bytes at {offset_bytes} of the volume (blocks {} to {}) cannot be read, and are answered with an I/O error: \
                 {}; hypernbd check --data tells what else is damaged",
                blocks.start,
                blocks.end - 1,
                e.chain()
            );
        }
    }

    /// Sorts ranges into groups, each for one call of [`Self::read_near`]. A range whose place is unknown is grouped by
    /// its offset in the volume.
    pub(crate) fn grouped(&self, ranges: Vec<Range<u64>>) -> Vec<Vec<Range<u64>>> {
        let piece_of = |(number, range): (usize, &Range<u64>)| {
            let (offset_bytes, len_bytes) = (range.start, range.end - range.start);
            let blocks = self.shared.geometry.now().touched_blocks(offset_bytes, len_bytes);
            let runs = self.shared.known.lock().locations.known_prefix(blocks);
            let stored = self.stored(&runs, offset_bytes, len_bytes).into_iter().next();
            let (object, bytes) = match stored {
                Some((_, Some(stored))) => (stored.object, stored.wanted),
                _ => (u64::MAX, range.clone()),
            };
            Piece {
                number,
                object,
                bytes,
            }
        };
        let pieces = ranges.iter().enumerate().map(piece_of).collect();
        let groups = coalesce::spans(pieces, GROUP_BYTES_MAX).into_iter().map(|span| {
            let numbers = span.pieces.into_iter().map(|piece| piece.number);
            numbers.map(|number| ranges[number].clone()).collect()
        });
        groups.collect()
    }

    /// Calls `each` with the bytes of each range. The places are looked up now, so it does no harm when the grouping is outdated.
    ///
    /// What is read here is part of blocks that are about to be published anew, at other places. Until then `each` has it, so it
    /// leaves the cache. Otherwise it would stay, for it was used, and push out what replaces it.
    pub(crate) async fn read_near(
        &self,
        ranges: &[Range<u64>],
        each: &mut (dyn for<'b> FnMut(usize, &'b [u8]) + Send),
    ) -> Result<(), VolumeError> {
        let mut all: Vec<Vec<u8>> = ranges
            .iter()
            .map(|range| vec![0; (range.end - range.start) as usize])
            .collect();
        let mut pieces = Vec::with_capacity(ranges.len());
        for (range, bytes) in ranges.iter().zip(&mut all) {
            pieces.extend(self.pieces(range.start, bytes).await?);
        }
        let stored: Vec<Stored> = pieces.iter().map(|(stored, _)| stored.clone()).collect();
        self.shared.reader.read(pieces, Class::Background).await?;
        for (number, bytes) in all.iter().enumerate() {
            each(number, bytes);
        }
        for one in &stored {
            self.shared.reader.forget(one);
        }
        Ok(())
    }

    /// Bytes of an object, for a copy of them: nothing is kept of them, and everything else goes first.
    pub(crate) async fn read_for_copy(&self, object: u64, bytes: Range<u64>) -> Result<Frames, VolumeError> {
        self.shared.reader.read_for_copy(object, bytes).await
    }

    /// See [`Reader::background_turn`].
    pub(crate) async fn background_turn(&self) -> Turn<'_> {
        self.shared.reader.background_turn().await
    }

    /// These blocks have other places now: what is in memory of them is kept for those.
    pub(crate) fn follow(&self, moves: &[Move]) {
        let block_size = u64::from(self.shared.geometry.now().block_size());
        for one in moves {
            let start = one.block * block_size;
            let len_bytes = block_size.min(self.shared.geometry.now().size_bytes().saturating_sub(start));
            let stored = |pointer| {
                let at = offset_of(pointer);
                Stored {
                    object: of_pointer(pointer),
                    run: at..at + len_bytes,
                    wanted: at..at + len_bytes,
                }
            };
            self.shared.reader.follow(&stored(one.from), &stored(one.to));
        }
    }

    /// Brings the index into memory, once the first reads have had the line for themselves.
    pub(crate) async fn warm_index(self) {
        tokio::time::sleep(WARM_UP_WAIT).await;
        let began = Instant::now();
        match self.shared.index.bring_into_memory().await {
            Ok(leaves) => debug!(
                "{leaves} leaves of the index are in memory after {:?}",
                began.elapsed()
            ),
            Err(e) => debug!("the index was not brought into memory: {e}"),
        }
    }

    /// Brings a range into the cache.
    async fn bring(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), VolumeError> {
        if self.shared.reader.cache().memory_bytes() == 0 {
            return Ok(());
        }
        let blocks = self.shared.geometry.now().touched_blocks(offset_bytes, len_bytes);
        let runs = self.locate(blocks, u32::MAX).await?;
        let stored = self.stored(&runs, offset_bytes, len_bytes);
        let stored = stored.into_iter().filter_map(|(_, stored)| stored).collect();
        self.shared.reader.bring(stored).await
    }

    /// Brings a range into the cache, but at most as much as half of the cache holds.
    pub(crate) async fn prefetch(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), VolumeError> {
        let most = self.shared.reader.cache().memory_bytes() / 2;
        self.bring(offset_bytes, len_bytes.min(most)).await
    }

    /// Notes a client's read, and brings what it will probably read next into the cache, in the background.
    pub(crate) fn note_read(&self, runtime: &Handle, offset_bytes: u64, len_bytes: u64) {
        if let Some(ahead) = self.ahead_of(offset_bytes, len_bytes) {
            runtime.spawn(self.clone().read_ahead(ahead));
        }
    }

    /// The range to read ahead of a read, if any.
    fn ahead_of(&self, offset_bytes: u64, len_bytes: u64) -> Option<Range<u64>> {
        if self.shared.reader.cache().memory_bytes() == 0 {
            return None;
        }
        let (ahead, tally) = {
            let mut windows = self.shared.windows.lock();
            (windows.read(offset_bytes, len_bytes), windows.take_tally())
        };
        let counted = &self.shared.reader.cache().metrics().read_ahead;
        counted.bytes.add(tally.asked);
        counted.useful_bytes.add(tally.useful);
        counted.wasted_bytes.add(tally.wasted);
        let ahead = ahead?;
        let ahead = ahead.start..ahead.end.min(self.shared.geometry.now().size_bytes());
        (!ahead.is_empty()).then_some(ahead)
    }

    /// Reads a range ahead, cut at the end of the volume.
    pub(crate) async fn read_ahead(self, range: Range<u64>) {
        let range = range.start..range.end.min(self.shared.geometry.now().size_bytes());
        if let Err(e) = self.bring(range.start, range.end - range.start).await {
            debug!("reading ahead at {}: {}", range.start, e.chain());
        }
    }

    pub(crate) async fn block_runs(
        &self,
        blocks: Range<u64>,
    ) -> Result<Vec<(Range<u64>, bool)>, VolumeError> {
        let runs = self.locate(blocks, EXTENT_LOOKUPS).await?;
        Ok(runs.into_iter().map(is_data).collect())
    }

    /// As [`Self::block_runs`], for the whole range, if the location map knows all of it.
    pub(crate) fn block_runs_at_once(&self, blocks: Range<u64>) -> Option<Vec<(Range<u64>, bool)>> {
        let runs = self.shared.known.lock().locations.known_prefix(blocks.clone());
        let is_all = runs.last().is_some_and(|r| r.blocks.end >= blocks.end);
        is_all.then(|| runs.into_iter().map(is_data).collect())
    }

    /// Adds blocks that checkpoint `cno` published to the cache, as [`write_through`] says. It must be stored: the number of one that
    /// is not may come to be another's.
    pub(crate) fn keep(&self, frozen: &Frozen, cno: u64) {
        let reader = &self.shared.reader;
        let room_bytes = reader.cache().memory_bytes() / CACHE_PARTS;
        frozen.with(|generation| {
            let block_size = u64::from(self.shared.geometry.now().block_size());
            for run in write_through::kept(generation, room_bytes, block_size) {
                let known = self.shared.known.lock().locations.known_prefix(run);
                // A later publish may have stored other bytes of the same blocks, at other places.
                let own = |place| matches!(place, Place::Stored { object, .. } if cno_of(object) == cno);
                for known in known.into_iter().filter(|run| own(run.place)) {
                    let offset_bytes = known.blocks.start * block_size;
                    let until = (known.blocks.end * block_size).min(self.shared.geometry.now().size_bytes());
                    let mut bytes = vec![0; (until - offset_bytes) as usize];
                    if !generation.copy_complete(offset_bytes, &mut bytes) {
                        return;
                    }
                    for (_, stored) in self.stored(&[known], offset_bytes, until - offset_bytes) {
                        if let Some(stored) = stored {
                            reader.keep(&stored, &bytes);
                        }
                    }
                }
            }
        });
    }
}

fn is_data(run: Run) -> (Range<u64>, bool) {
    (run.blocks, run.place != Place::Nothing)
}
