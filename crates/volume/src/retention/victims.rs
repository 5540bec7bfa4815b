//! Which objects are worth copying what is live in them away. Pure: the usage table and what is stored in, objects out.
//!
//! An object goes only as a whole, so what is dead in one that has anything live takes space for nothing: unless kept checkpoints need
//! it, for then it would stay all the same. *Bound:* what the newest state's objects hold, without what kept checkpoints need of them
//! besides, stays at 1.3 times what is live, and 256 MiB.

use std::collections::BTreeMap;

use super::usage::{ObjectUse, Places, Usage};
use crate::format::node::NODE_BYTES;

/// What the bound lets be stored, in percent of what is live ...
const BOUND_PERCENT: u64 = 130;
/// ... and besides, in bytes.
const BOUND_BYTES: u64 = 256 << 20;
/// From where on a served volume is compacted: so early that the bound is kept by copies that are not in a hurry.
const START_PERCENT: u64 = 125;
const START_BYTES: u64 = 192 << 20;
/// Live blocks that one relocation moves, where there are so many: with fewer, the index that it writes anew costs as much.
pub(crate) const BATCH_BLOCKS: u64 = 16 * 1024;
/// Whether a block of an object is live is looked up for each that the object was stored with: for about this many in a batch.
const BATCH_LOOKUPS: u64 = 64 * BATCH_BLOCKS;
/// Bytes copied for ten that come back, at most; and when the bound is passed, which is what it takes to go back to it.
const COPIED_PER_TEN: u64 = 25;
const COPIED_PER_TEN_OVER: u64 = 34;
/// What an object takes besides what is live in it, whoever writes it: its summary. So a copy gives nothing of that back.
const SUMMARY_BYTES: u64 = 4096;
/// What looking into an object costs, in bytes copied: a request or two.
const LOOK_COST_BYTES: u64 = 128 << 10;

/// How much space is taken for nothing. In bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Debt {
    /// What the objects hold that the newest accounted checkpoint refers to.
    pub stored_bytes: u64,
    /// What it refers to in them.
    pub live_bytes: u64,
    /// What kept checkpoints need of them besides.
    pub history_bytes: u64,
}

impl Debt {
    fn above(&self, percent: u64, bytes: u64) -> u64 {
        let live = u128::from(self.live_bytes) * u128::from(percent) / 100;
        let allowed = u64::try_from(live).unwrap_or(u64::MAX).saturating_add(bytes);
        self.stored_bytes
            .saturating_sub(self.history_bytes)
            .saturating_sub(allowed)
    }

    /// How far it is above the bound.
    pub fn over_bytes(&self) -> u64 {
        self.above(BOUND_PERCENT, BOUND_BYTES)
    }

    /// How far it is below where compaction begins.
    pub fn slack_bytes(&self) -> u64 {
        let live = u128::from(self.live_bytes) * u128::from(START_PERCENT) / 100;
        let start = u64::try_from(live)
            .unwrap_or(u64::MAX)
            .saturating_add(START_BYTES);
        start.saturating_sub(self.stored_bytes.saturating_sub(self.history_bytes))
    }

    /// How far it is above where compaction begins.
    pub fn pressure_bytes(&self) -> u64 {
        self.above(START_PERCENT, START_BYTES)
    }

    /// The part of the way from where compaction begins to the bound, in percent: 100 at the bound, and more above it.
    pub fn urgency_percent(&self) -> u64 {
        let way = u128::from(BOUND_PERCENT - START_PERCENT) * u128::from(self.live_bytes) / 100
            + u128::from(BOUND_BYTES - START_BYTES);
        let gone = u128::from(self.pressure_bytes()) * 100;
        u64::try_from(gone / way.max(1)).unwrap_or(u64::MAX)
    }
}

/// An object that what is live in it is to be copied out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Victim {
    /// Its number.
    pub object: u64,
    /// Its length in bytes.
    pub object_bytes: u64,
    /// What is live in it.
    pub live: Places,
    /// Bytes of it that nobody needs.
    pub free_bytes: u64,
}

/// What is to be compacted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// As much as it takes to stay below the bound.
    Bound,
    /// Whatever gives back enough for what its copy costs.
    Everything,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Victims {
    /// The checkpoint that it was found for.
    pub accounted: u64,
    /// How much space is taken for nothing.
    pub debt: Debt,
    /// The objects of the next relocation: those that give back most for what they cost.
    pub next: Vec<Victim>,
    /// All that could be taken, those of `next` among them: objects, their bytes, and what is live in them.
    pub objects: u64,
    /// See `objects`.
    pub object_bytes: u64,
    /// See `objects`.
    pub live_bytes: u64,
}

/// Chooses among the objects that the table knows, whose lengths are `stored`, of a volume with blocks of `block_bytes`. What
/// `is_excluded` says is passed over: objects that are not the volume's own.
pub(crate) fn choose(
    usage: &Usage,
    stored: &BTreeMap<u64, u64>,
    block_bytes: u64,
    want: Want,
    is_excluded: impl Fn(u64) -> bool,
) -> Victims {
    let bytes_of = |places: Places| places.blocks * block_bytes + places.nodes * NODE_BYTES as u64;
    let mut victims = Victims {
        accounted: usage.at_number(),
        ..Victims::default()
    };
    let mut candidates: Vec<(Victim, u64)> = Vec::new();
    let own = usage
        .objects()
        .iter()
        .filter(|(object, of)| !of.live.is_empty() && !is_excluded(**object));
    for (&object, of) in own {
        let Some(&object_bytes) = stored.get(&object) else {
            continue;
        };
        let ObjectUse { live, held, .. } = *of;
        let live_bytes = bytes_of(live).min(object_bytes);
        let held_bytes = bytes_of(held).clamp(live_bytes, object_bytes);
        victims.debt.stored_bytes += object_bytes;
        victims.debt.live_bytes += live_bytes;
        victims.debt.history_bytes += held_bytes - live_bytes;
        let victim = Victim {
            object,
            object_bytes,
            live,
            free_bytes: object_bytes - held_bytes,
        };
        candidates.push((victim, live_bytes));
    }
    let per_ten = match victims.debt.over_bytes() {
        0 => COPIED_PER_TEN,
        _ => COPIED_PER_TEN_OVER,
    };
    candidates.retain(|(victim, live_bytes)| {
        let back_bytes = victim.free_bytes.saturating_sub(SUMMARY_BYTES);
        back_bytes > 0 && live_bytes * 10 <= back_bytes * per_ten
    });
    if want == Want::Bound && victims.debt.pressure_bytes() == 0 {
        return victims;
    }
    // Copied bytes for each that comes back, compared without dividing.
    candidates.sort_by(|(one, one_live), (other, other_live)| {
        let left = u128::from(one_live + LOOK_COST_BYTES) * u128::from(other.free_bytes);
        let right = u128::from(other_live + LOOK_COST_BYTES) * u128::from(one.free_bytes);
        left.cmp(&right).then(one.object.cmp(&other.object))
    });
    let (mut blocks, mut looked_up) = (0, 0);
    for (victim, live_bytes) in candidates {
        victims.objects += 1;
        victims.object_bytes += victim.object_bytes;
        victims.live_bytes += live_bytes;
        if blocks < BATCH_BLOCKS && looked_up < BATCH_LOOKUPS {
            looked_up += victim.object_bytes / block_bytes;
            // Nodes of the index are read and written anew by the flip, while publishes wait.
            blocks += victim.live.blocks + victim.live.nodes;
            victims.next.push(victim);
        }
    }
    victims
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};

    use super::super::usage::Delta;
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;

    const BLOCK: u64 = 1 << 20;

    /// A volume in small: which object each block lies in.
    struct World {
        place: Vec<u64>,
        usage: Usage,
        stored: BTreeMap<u64, u64>,
        cno: u64,
        kept: usize,
        copied: u64,
        freed: u64,
    }

    impl World {
        fn new(blocks: usize, kept: usize) -> Self {
            let mut world = Self {
                place: vec![0; blocks],
                usage: Usage::default(),
                stored: BTreeMap::new(),
                cno: 0,
                kept,
                copied: 0,
                freed: 0,
            };
            for first in (0..blocks).step_by(64) {
                world.publish(first..(first + 64).min(blocks));
            }
            world
        }

        /// A checkpoint in which these blocks lie in one new object.
        fn publish(&mut self, blocks: impl IntoIterator<Item = usize>) {
            self.cno += 1;
            let object = self.cno << 32 | 1;
            let mut deltas: HashMap<u64, Delta> = HashMap::new();
            let blocks: BTreeSet<usize> = blocks.into_iter().collect();
            self.stored.insert(object, blocks.len() as u64 * BLOCK);
            for block in blocks {
                let old = std::mem::replace(&mut self.place[block], object);
                if old != 0 {
                    deltas.entry(old).or_default().blocks -= 1;
                }
                deltas.entry(object).or_default().blocks += 1;
            }
            let accounted = (InodeCheck::from_bits(self.cno), self.cno, 1).into();
            self.usage.step(self.cno, accounted, &deltas).unwrap();
            let kept = self.kept as u64;
            let gone: Vec<u64> = self
                .usage
                .kept()
                .keys()
                .copied()
                .filter(|c| c + kept <= self.cno)
                .collect();
            self.usage.forget(&gone, &[]);
            self.usage.settle();
            let kept = self.usage.kept().clone();
            let unneeded = self
                .stored
                .keys()
                .copied()
                .filter(|o| !self.usage.is_needed(*o, &kept));
            for object in unneeded.collect::<Vec<_>>() {
                self.stored.remove(&object);
                self.usage.forget(&[], &[object]);
            }
        }

        fn choose(&self, want: Want) -> Victims {
            choose(&self.usage, &self.stored, BLOCK, want, |_| false)
        }

        /// Relocates until nothing is to be done, and returns what is owed then.
        fn compact(&mut self, want: Want) -> Debt {
            for _ in 0..1000 {
                let victims = self.choose(want);
                if victims.next.is_empty() {
                    return victims.debt;
                }
                let objects: BTreeSet<u64> = victims.next.iter().map(|victim| victim.object).collect();
                let live = (0..self.place.len()).filter(|block| objects.contains(&self.place[*block]));
                let live: Vec<usize> = live.collect();
                self.copied += live.len() as u64;
                self.freed += victims
                    .next
                    .iter()
                    .map(|victim| victim.free_bytes / BLOCK)
                    .sum::<u64>();
                self.publish(live);
            }
            panic!("compaction does not end");
        }
    }

    /// Random overwrites for long: what is stored for nothing stays within the bound, and copying costs what it may.
    #[test]
    fn random_overwrites_stay_within_the_bound() {
        for (seed, kept) in [(1, 1), (2, 16), (3, 40)] {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut world = World::new(6000, kept);
            for step in 0..1500 {
                let blocks = rng.usize(1..100);
                world.publish((0..blocks).map(|_| rng.usize(0..6000)).collect::<Vec<_>>());
                let debt = world.compact(Want::Bound);
                assert_eq!(debt.over_bytes(), 0, "kept {kept}, step {step}: {debt:?}");
                assert_eq!(debt.live_bytes, 6000 * BLOCK);
                // What no object of the newest state takes is what kept checkpoints need.
                let of_newest: u64 = debt.stored_bytes;
                let others: u64 = world.stored.values().sum::<u64>() - of_newest;
                assert!(others == 0 || kept > 1);
            }
            assert!(world.copied > 1000, "it compacts at all");
            let ratio = world.copied as f64 / world.freed as f64;
            assert!(
                ratio <= 2.5,
                "kept {kept}: {ratio} copied for each byte that came back"
            );
        }
    }

    #[test]
    fn what_kept_checkpoints_need_is_left_where_it_is() {
        let mut world = World::new(2000, 1000);
        for _ in 0..40 {
            world.publish((0..2000).step_by(3));
        }
        let victims = world.choose(Want::Everything);
        assert!(victims.next.is_empty(), "every checkpoint is kept: {victims:?}");
        assert!(victims.debt.history_bytes > 0);
        assert_eq!(victims.debt.over_bytes(), 0);
        // Once they are gone the same is worth it.
        let gone: Vec<u64> = world
            .usage
            .kept()
            .keys()
            .copied()
            .filter(|cno| *cno < world.cno)
            .collect();
        world.usage.forget(&gone, &[]);
        world.usage.settle();
        world.usage.settle();
        assert!(!world.choose(Want::Everything).next.is_empty());
    }

    #[test]
    fn the_emptiest_come_first_and_no_more_than_a_batch() {
        let mut world = World::new(64 * 600, 1);
        // A part of each object, a little more of each than of the one before.
        let dead = (0..600).flat_map(|object| (0..16 + object / 15).map(move |at| object * 64 + at));
        world.publish(dead.collect::<Vec<_>>());
        world.usage.settle();
        let victims = world.choose(Want::Everything);
        let live: Vec<u64> = victims.next.iter().map(|victim| victim.live.blocks).collect();
        assert!(live.is_sorted() && live[0] < 12, "{live:?}");
        let moved: u64 = live.iter().sum();
        let last = live.last().copied().unwrap_or(0);
        assert!(victims.objects > live.len() as u64, "not all at once");
        assert!((BATCH_BLOCKS..BATCH_BLOCKS + last).contains(&moved), "{moved}");
        // One that is not the volume's own is passed over.
        let first = victims.next[0].object;
        let others = choose(&world.usage, &world.stored, BLOCK, Want::Everything, |object| {
            object == first
        });
        assert!(others.next.iter().all(|victim| victim.object != first));
        assert!(others.debt.stored_bytes < victims.debt.stored_bytes);
    }

    /// Nodes of the index are written anew by the flip while publishes wait, so they count in a batch as blocks do.
    #[test]
    fn a_batch_of_index_nodes_is_no_larger_than_one_of_blocks() {
        let (nodes, objects) = (BATCH_BLOCKS / 8, 40_u64);
        let mut usage = Usage::default();
        let mut stored = BTreeMap::new();
        for cno in 1..=objects {
            let object = cno << 32 | 1;
            let live = Delta {
                blocks: 0,
                nodes: nodes as i64,
            };
            let accounted = (InodeCheck::from_bits(cno), cno, 1).into();
            usage
                .step(cno, accounted, &HashMap::from([(object, live)]))
                .unwrap();
            stored.insert(object, 8 * nodes * NODE_BYTES as u64);
        }
        let victims = choose(&usage, &stored, BLOCK, Want::Everything, |_| false);
        assert_eq!((victims.objects, victims.next.len()), (objects, 8));
    }

    /// Whether what an object was stored with is live is looked up for all of it.
    #[test]
    fn a_batch_of_nearly_empty_objects_has_an_end() {
        let (mut usage, mut stored) = (Usage::default(), BTreeMap::new());
        for cno in 1..=200 {
            let object = cno << 32 | 1;
            let live = Delta { blocks: 1, nodes: 0 };
            let accounted = (InodeCheck::from_bits(cno), cno, 1).into();
            usage
                .step(cno, accounted, &HashMap::from([(object, live)]))
                .unwrap();
            stored.insert(object, BATCH_BLOCKS * BLOCK);
        }
        let victims = choose(&usage, &stored, BLOCK, Want::Everything, |_| false);
        assert_eq!((victims.objects, victims.next.len()), (200, 64));
    }

    /// What its copy would be is no victim: else compacting a small volume would not end.
    #[test]
    fn an_object_with_nothing_but_what_is_live_and_its_summary_stays() {
        let chosen = |dead_bytes: u64| {
            let mut usage = Usage::default();
            let live = Delta { blocks: 0, nodes: 1 };
            let accounted = (InodeCheck::from_bits(1), 1, 1).into();
            usage
                .step(1, accounted, &HashMap::from([(1 << 32 | 1, live)]))
                .unwrap();
            let object_bytes = NODE_BYTES as u64 + SUMMARY_BYTES + dead_bytes;
            let stored = BTreeMap::from([(1 << 32 | 1, object_bytes)]);
            choose(&usage, &stored, BLOCK, Want::Everything, |_| false)
                .next
                .len()
        };
        assert_eq!(chosen(0), 0);
        assert_eq!(chosen(NODE_BYTES as u64), 1);
    }

    #[test]
    fn urgency_is_a_hundred_at_the_bound() {
        let at = |stored_mib: u64| Debt {
            stored_bytes: stored_mib << 20,
            live_bytes: 1000 << 20,
            history_bytes: 0,
        };
        assert_eq!(at(1442).urgency_percent(), 0);
        assert_eq!(
            (at(1442).pressure_bytes(), at(1443).pressure_bytes()),
            (0, 1 << 20)
        );
        assert_eq!((at(1556).urgency_percent(), at(1556).over_bytes()), (100, 0));
        assert_eq!(at(1557).over_bytes(), 1 << 20);
        assert_eq!(at(1670).urgency_percent(), 200);
    }
}
