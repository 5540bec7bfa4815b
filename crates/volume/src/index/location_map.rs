//! The location map: the places of published blocks, as extents in bounded memory (pure).
//!
//! An entry is a run of blocks that are stored one after another in one object, or a run that reads as zeros. Stored
//! objects never change, so an entry is true until one of its blocks is published again. The owner thread updates the
//! map with each publish, before the generation that held the blocks is dropped (*Invariant R1*). A block that is not
//! in the map is unknown, and must be looked up in the index.
//!
//! Look-ups run at the same time as publishes, and a look-up may end after a publish that began later. What it found of
//! the blocks published meanwhile is outdated and must not be entered. So the map keeps track of the look-ups in
//! progress, and of the blocks that were published since the oldest of them began.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use rangemap::RangeMap;

/// The place of a run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The blocks were never written, or were zeroed. They read as zeros and are stored nowhere.
    Nothing,
    /// The blocks are in the object with this number (in the engine's encoding), from this byte on.
    Stored {
        /// The object.
        object: u64,
        /// Offset of the run's first block in the object, in bytes.
        offset_bytes: u64,
    },
}

impl Place {
    /// The place of the block `blocks` further on in the same run.
    pub fn advanced(self, blocks: u64, block_size: u64) -> Self {
        match self {
            Self::Nothing => Self::Nothing,
            Self::Stored { object, offset_bytes } => Self::Stored {
                object,
                offset_bytes: offset_bytes.wrapping_add(blocks * block_size),
            },
        }
    }

    /// The place from which [`Self::advanced`] by `blocks` gives this one. It may be before the object's start.
    fn before(self, blocks: u64, block_size: u64) -> Self {
        match self {
            Self::Nothing => Self::Nothing,
            Self::Stored { object, offset_bytes } => Self::Stored {
                object,
                offset_bytes: offset_bytes.wrapping_sub(blocks * block_size),
            },
        }
    }
}

/// A run of blocks and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The blocks.
    pub blocks: Range<u64>,
    /// The place of the first block; the others follow it.
    pub place: Place,
}

/// A run's length in blocks and its place, in 24 bytes instead of 32, because there are many.
#[derive(Debug, Clone, Copy)]
struct PackedRun {
    len: u64,
    object: u64,
    offset_bytes: u64,
}

impl PackedRun {
    /// A value that is no object's number.
    const NOTHING: u64 = u64::MAX;

    fn new(len: u64, place: Place) -> Self {
        let (object, offset_bytes) = match place {
            Place::Nothing => (Self::NOTHING, 0),
            Place::Stored { object, offset_bytes } => (object, offset_bytes),
        };
        debug_assert!(place == Place::Nothing || object != Self::NOTHING);
        Self {
            len,
            object,
            offset_bytes,
        }
    }

    fn place(self) -> Place {
        match self.object {
            Self::NOTHING => Place::Nothing,
            object => Place::Stored {
                object,
                offset_bytes: self.offset_bytes,
            },
        }
    }
}

/// Identifies a look-up in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LookupId(u64);

/// The places of blocks, for a bounded number of runs.
#[derive(Debug)]
pub struct LocationMap {
    block_size: u64,
    runs_max: usize,
    /// The runs by their first block.
    runs: BTreeMap<u64, PackedRun>,
    /// Where the next eviction continues, so that evictions pass over the whole map in turn.
    forget_from: u64,
    /// Number of publishes entered so far.
    publishes: u64,
    /// What was published while look-ups were in progress: the number of each publish, and its blocks.
    recent: VecDeque<(u64, Vec<Range<u64>>)>,
    /// The look-ups in progress, with the number of publishes when each began.
    lookups: BTreeMap<LookupId, u64>,
    next_lookup: u64,
}

impl LocationMap {
    /// An empty map of at most `runs_max` runs (about 50 bytes each).
    pub fn new(block_size: u32, runs_max: usize) -> Self {
        let runs_max = runs_max.max(16);
        Self {
            block_size: u64::from(block_size),
            runs_max,
            runs: BTreeMap::new(),
            forget_from: 0,
            publishes: 0,
            recent: VecDeque::new(),
            lookups: BTreeMap::new(),
            next_lookup: 0,
        }
    }

    /// Begins a look-up in the index as it is published now.
    pub fn begin_lookup(&mut self) -> LookupId {
        let id = LookupId(self.next_lookup);
        self.next_lookup += 1;
        self.lookups.insert(id, self.publishes);
        id
    }

    /// Ends a look-up: enters the runs that it found and returns them, without the blocks that were published since it
    /// began. For those the map has the newer places, unless it has evicted them.
    pub fn end_lookup(&mut self, id: LookupId, found: Vec<Run>) -> Vec<Run> {
        let Some(&began) = self.lookups.get(&id) else {
            return Vec::new();
        };
        let mut still_true: RangeMap<u64, Place> = RangeMap::new();
        let block_size = self.block_size;
        // A range map needs one value for a whole range. That value is the place that block 0 would have if the run
        // began there.
        for run in &found {
            still_true.insert(run.blocks.clone(), run.place.before(run.blocks.start, block_size));
        }
        for (_, blocks) in self.recent.iter().filter(|(number, _)| *number > began) {
            for range in blocks {
                still_true.remove(range.clone());
            }
        }
        let found: Vec<Run> = still_true
            .into_iter()
            .map(|(blocks, origin)| Run {
                place: origin.advanced(blocks.start, block_size),
                blocks,
            })
            .collect();
        for run in &found {
            self.insert(run.clone());
        }
        self.abandon_lookup(id);
        found
    }

    /// Ends a look-up without a result.
    pub fn abandon_lookup(&mut self, id: LookupId) {
        self.lookups.remove(&id);
        let oldest = self.lookups.values().min().copied().unwrap_or(u64::MAX);
        while self.recent.front().is_some_and(|(number, _)| *number <= oldest) {
            self.recent.pop_front();
        }
    }

    /// Enters the changes of a checkpoint: the new places of blocks, or `None` for blocks whose places are not known.
    pub fn publish(&mut self, changed: Vec<(Range<u64>, Option<Place>)>) {
        self.publishes += 1;
        if !self.lookups.is_empty() {
            let blocks = changed.iter().map(|(blocks, _)| blocks.clone()).collect();
            self.recent.push_back((self.publishes, blocks));
        }
        for (blocks, place) in changed {
            match place {
                Some(place) => self.insert(Run { blocks, place }),
                None => self.forget(blocks),
            }
        }
    }

    /// The number of runs in the map.
    pub fn len(&self) -> usize {
        self.runs.len()
    }

    /// Whether the map is empty.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The known runs from `blocks.start` on, ascending and without gaps, up to `blocks.end` or the first unknown
    /// block.
    pub fn known_prefix(&self, blocks: Range<u64>) -> Vec<Run> {
        let mut known = Vec::new();
        let mut at = blocks.start;
        let before = self.runs.range(..=at).next_back();
        let rest = self
            .runs
            .range((std::ops::Bound::Excluded(at), std::ops::Bound::Unbounded));
        for (&start, held) in before.into_iter().chain(rest) {
            if at >= blocks.end || start > at {
                break;
            }
            let end = start + held.len;
            if end <= at {
                continue;
            }
            let until = end.min(blocks.end);
            known.push(Run {
                blocks: at..until,
                place: held.place().advanced(at - start, self.block_size),
            });
            at = until;
        }
        known
    }

    /// Replaces the places of `run.blocks`.
    pub fn insert(&mut self, run: Run) {
        if run.blocks.is_empty() {
            return;
        }
        self.cut(run.blocks.clone());
        let Run {
            mut blocks,
            mut place,
        } = run;
        if let Some((&start, &before)) = self.runs.range(..blocks.start).next_back()
            && start + before.len == blocks.start
            && before.place().advanced(before.len, self.block_size) == place
        {
            self.runs.remove(&start);
            (blocks.start, place) = (start, before.place());
        }
        if let Some(&after) = self.runs.get(&blocks.end)
            && place.advanced(blocks.end - blocks.start, self.block_size) == after.place()
        {
            self.runs.remove(&blocks.end);
            blocks.end += after.len;
        }
        self.hold(blocks, place);
        if self.runs.len() > self.runs_max {
            self.forget_some();
        }
    }

    fn hold(&mut self, blocks: Range<u64>, place: Place) {
        let held = PackedRun::new(blocks.end - blocks.start, place);
        self.runs.insert(blocks.start, held);
    }

    /// Removes the places of `blocks`.
    pub fn forget(&mut self, blocks: Range<u64>) {
        self.cut(blocks);
    }

    /// Removes `blocks` from the runs that touch them.
    fn cut(&mut self, blocks: Range<u64>) {
        if blocks.is_empty() {
            return;
        }
        if let Some((&start, &held)) = self.runs.range(..blocks.start).next_back()
            && start + held.len > blocks.start
        {
            self.hold(start..blocks.start, held.place());
            self.keep_after(start, held, blocks.end);
        }
        let inside = self.runs.extract_if(blocks.clone(), |_, _| true).last();
        if let Some((start, held)) = inside {
            self.keep_after(start, held, blocks.end);
        }
    }

    fn keep_after(&mut self, start: u64, held: PackedRun, from: u64) {
        let end = start + held.len;
        if end > from {
            let place = held.place().advanced(from - start, self.block_size);
            self.hold(from..end, place);
        }
    }

    /// Evicts an eighth of the runs, from where the last call stopped.
    fn forget_some(&mut self) {
        let count = self.runs_max / 8 + 1;
        let mut victims: Vec<u64> = self
            .runs
            .range(self.forget_from..)
            .take(count)
            .map(|(&s, _)| s)
            .collect();
        if victims.len() < count {
            victims.extend(self.runs.keys().take(count - victims.len()));
        }
        for v in &victims {
            self.runs.remove(v);
        }
        self.forget_from = victims.last().map_or(0, |v| v + 1);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCKS: u64 = 64;

    fn place() -> impl Strategy<Value = Place> {
        prop_oneof![
            Just(Place::Nothing),
            (0..3u64, 0..8u64).prop_map(|(object, at)| Place::Stored {
                object,
                offset_bytes: at * 4096
            }),
        ]
    }

    proptest! {
        #[test]
        fn answers_as_a_flat_array(
            ops in prop::collection::vec((0..BLOCKS, 0..BLOCKS, prop::option::of(place())), 1..60),
            (from, to) in (0..BLOCKS, 0..=BLOCKS),
        ) {
            let mut map = LocationMap::new(4096, 1 << 20);
            let mut flat: Vec<Option<Place>> = vec![None; BLOCKS as usize];
            for (a, b, place) in ops {
                let blocks = a.min(b)..a.max(b);
                for i in blocks.clone() {
                    flat[i as usize] = place.map(|p| p.advanced(i - blocks.start, 4096));
                }
                match place {
                    Some(place) => map.insert(Run { blocks, place }),
                    None => map.forget(blocks),
                }
            }
            let mut at = from;
            for run in map.known_prefix(from..to.max(from)) {
                prop_assert_eq!(run.blocks.start, at);
                for i in run.blocks.clone() {
                    prop_assert_eq!(flat[i as usize], Some(run.place.advanced(i - run.blocks.start, 4096)));
                }
                at = run.blocks.end;
            }
            prop_assert!(at >= to.max(from) || flat[at as usize].is_none(), "stopped at a known block");
        }

        #[test]
        fn stays_in_its_bound_and_never_lies(starts in prop::collection::vec(0..100_000u64, 1..400)) {
            let mut map = LocationMap::new(4096, 32);
            let mut newest = std::collections::HashMap::new();
            for (n, start) in starts.into_iter().enumerate() {
                let place = Place::Stored { object: n as u64, offset_bytes: 0 };
                map.insert(Run { blocks: start..start + 1, place });
                newest.insert(start, place);
                prop_assert!(map.len() <= 32);
            }
            for (start, place) in newest {
                let known = map.known_prefix(start..start + 1);
                prop_assert!(known.is_empty() || known[0].place == place);
            }
        }
    }

    proptest! {
        /// *Invariant R1*: look-ups that overlap publishes, in any order, never put back a place that a publish replaced.
        #[test]
        fn a_lookup_never_brings_back_what_was_published_over(
            steps in prop::collection::vec((0..3u8, 0..BLOCKS, 1..12u64), 1..80),
        ) {
            let mut map = LocationMap::new(4096, 1 << 20);
            // The published index: object by block.
            let mut index = vec![0u64; BLOCKS as usize];
            let mut under_way: VecDeque<(LookupId, Range<u64>, Vec<u64>)> = VecDeque::new();
            let place = |object, at: u64| Place::Stored { object, offset_bytes: at * 4096 };
            for (number, (step, at, len)) in steps.into_iter().enumerate() {
                let blocks = at..(at + len).min(BLOCKS);
                match step {
                    0 => {
                        let seen = index[blocks.start as usize..blocks.end as usize].to_vec();
                        under_way.push_back((map.begin_lookup(), blocks, seen));
                    }
                    1 => {
                        let object = number as u64 + 1;
                        index[blocks.start as usize..blocks.end as usize].fill(object);
                        let known = number % 3 != 0;
                        map.publish(vec![(blocks.clone(), known.then(|| place(object, blocks.start)))]);
                    }
                    _ => {
                        // It is not always the oldest look-up that ends first.
                        let ended = if at % 2 == 0 { under_way.pop_front() } else { under_way.pop_back() };
                        let Some((id, blocks, seen)) = ended else { continue };
                        let found = blocks.zip(seen).map(|(b, object)| Run { blocks: b..b + 1, place: place(object, b) });
                        for run in map.end_lookup(id, found.collect()) {
                            for b in run.blocks.clone() {
                                let told = run.place.advanced(b - run.blocks.start, 4096);
                                prop_assert_eq!(told, place(index[b as usize], b));
                            }
                        }
                    }
                }
                for run in (0..BLOCKS).flat_map(|b| map.known_prefix(b..b + 1)) {
                    let b = run.blocks.start;
                    prop_assert_eq!(run.place, place(index[b as usize], b));
                }
            }
            for (id, ..) in under_way {
                map.abandon_lookup(id);
            }
            prop_assert!(map.recent.is_empty() && map.lookups.is_empty());
        }
    }

    #[test]
    fn neighbours_in_one_object_are_one_run() {
        let mut map = LocationMap::new(4096, 100);
        for i in [0u64, 2, 1] {
            let place = Place::Stored {
                object: 7,
                offset_bytes: 1000 + i * 4096,
            };
            map.insert(Run {
                blocks: i..i + 1,
                place,
            });
        }
        assert_eq!(map.len(), 1);
        map.insert(Run {
            blocks: 1..2,
            place: Place::Nothing,
        });
        assert_eq!(map.len(), 3);
    }
}
