//! Chooses what is removed. Pure: what is stored, what is kept and since when things are not needed, in; checkpoints
//! and objects, out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant, SystemTime};

use super::policy::{Policy, Reason};
use super::usage::{Accounted, Usage};
use crate::format::object_names;

/// The newest checkpoints are kept whatever the policy says. Records of a WAL and the buffer file name the checkpoint
/// that they continue, which is one of the last few.
pub(crate) const NEWEST_KEPT: usize = 16;
/// The most objects, and the most checkpoints, in one plan.
const PLANNED_MAX: usize = 10_000;

/// The numbers of checkpoints that must stay, besides those that the policy keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Protected {
    /// Checkpoints that have names.
    pub named: BTreeSet<u64>,
    /// Checkpoints that are read, or that a WAL or the accounting depends on.
    pub in_use: BTreeSet<u64>,
}

/// When the newest of a volume's objects was written, by the store's clock, in milliseconds since 1970-01-01 UTC. Every
/// checkpoint has an object, so none was published later.
pub(crate) fn newest_written_ms(written: impl Iterator<Item = SystemTime>) -> u64 {
    let since = written
        .max()
        .and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
    let ms = since.and_then(|since| u64::try_from(since.as_millis()).ok());
    // Some stores report whole seconds.
    ms.map_or(u64::MAX, |ms| ms.saturating_add(1000))
}

impl Protected {
    /// Whether this checkpoint must stay.
    pub fn contains(&self, cno: u64) -> bool {
        self.named.contains(&cno) || self.in_use.contains(&cno)
    }
}

/// Why each of these checkpoints is kept. They are given with the times of their publish, in milliseconds since
/// 1970-01-01 UTC, ascending. A checkpoint that nothing keeps is not in the result. `now_ms` is the latest time at
/// which the newest was stored, by the store's clock. Without a policy, and with an empty one, everything is kept.
pub(crate) fn kept(
    checkpoints: &[(u64, u64)],
    policy: Option<&Policy>,
    protected: &Protected,
    now_ms: u64,
) -> BTreeMap<u64, Vec<Reason>> {
    let mut kept = match policy.filter(|policy| !policy.is_empty()) {
        Some(policy) => policy.keep(checkpoints, now_ms),
        None => checkpoints
            .iter()
            .map(|&(cno, _)| (cno, vec![Reason::Everything]))
            .collect(),
    };
    let newest = checkpoints
        .iter()
        .rev()
        .take(NEWEST_KEPT)
        .map(|&(cno, _)| (cno, Reason::Newest));
    let has = |cno: &u64| checkpoints.binary_search_by_key(cno, |&(cno, _)| cno).is_ok();
    let named = protected
        .named
        .iter()
        .filter(|cno| has(cno))
        .map(|&cno| (cno, Reason::Name));
    let in_use = protected
        .in_use
        .iter()
        .filter(|cno| has(cno))
        .map(|&cno| (cno, Reason::InUse));
    for (cno, reason) in newest.chain(named).chain(in_use) {
        kept.entry(cno).or_default().push(reason);
    }
    for reasons in kept.values_mut() {
        reasons.sort_unstable();
    }
    kept
}

/// Since when each thing has not been needed, by a monotonic clock.
#[derive(Debug)]
struct Aging(HashMap<u64, Instant>);

impl Aging {
    fn new() -> Self {
        Self(HashMap::new())
    }

    /// Takes the things that are not needed at `now`. Returns those that have not been needed for `grace`, ascending.
    fn update(&mut self, current: &BTreeSet<u64>, now: Instant, grace: Duration) -> Vec<u64> {
        self.0.retain(|key, _| current.contains(key));
        for key in current {
            self.0.entry(*key).or_insert(now);
        }
        let is_ripe = |since: &Instant| now.saturating_duration_since(*since) >= grace;
        let ripe = self
            .0
            .iter()
            .filter(|(_, since)| is_ripe(since))
            .map(|(key, _)| *key);
        let mut ripe: Vec<u64> = ripe.collect();
        ripe.sort_unstable();
        ripe
    }
}

/// What is removed now, and what may be removed soon.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Checkpoints that are removed now.
    pub retired: Vec<u64>,
    /// Checkpoints that stay, ascending.
    pub kept: Vec<u64>,
    /// Objects that are removed now, by number.
    pub objects: Vec<u64>,
    /// Number of checkpoints and objects that are not needed and are removed later: after their time of grace, or with
    /// another plan.
    pub waiting: usize,
    /// Objects in the table that are not needed and not stored any more.
    pub gone: Vec<u64>,
    /// More could go now than a plan has room for.
    pub is_cut: bool,
}

impl Choice {
    /// Whether nothing is removed now.
    pub fn is_empty(&self) -> bool {
        self.retired.is_empty() && self.objects.is_empty()
    }
}

/// Chooses what is removed, and remembers since when things have not been needed.
#[derive(Debug)]
pub(crate) struct Chooser {
    grace: Duration,
    orphan_age: Duration,
    pub(super) at_once_max: usize,
    retiring: Aging,
    dying: Aging,
}

impl Chooser {
    /// Chooses things that have not been needed for `grace`, as far as this chooser was asked. An object that no
    /// checkpoint ever used must be older than `orphan_age`.
    pub fn new(grace: Duration, orphan_age: Duration) -> Self {
        Self {
            grace,
            orphan_age,
            at_once_max: PLANNED_MAX,
            retiring: Aging::new(),
            dying: Aging::new(),
        }
    }

    /// Chooses everything that is not needed now, without a limit.
    pub fn unlimited(orphan_age: Duration) -> Self {
        Self {
            at_once_max: usize::MAX,
            ..Self::new(Duration::ZERO, orphan_age)
        }
    }

    /// What goes of the checkpoints of `usage` and of the stored objects, when `kept` are the checkpoints that are kept. Under the
    /// numbers `under_way` copies are being stored that no checkpoint refers to yet.
    pub fn choose(
        &mut self,
        usage: &Usage,
        kept: &BTreeMap<u64, Vec<Reason>>,
        stored: &BTreeMap<u64, SystemTime>,
        under_way: &BTreeSet<u64>,
        now: Instant,
    ) -> Choice {
        let unkept: BTreeSet<u64> = usage
            .kept()
            .keys()
            .copied()
            .filter(|cno| !kept.contains_key(cno))
            .collect();
        let without = |gone: &BTreeSet<u64>| -> BTreeMap<u64, Accounted> {
            let stays = usage.kept().iter().filter(|(cno, _)| !gone.contains(cno));
            stays.map(|(cno, of)| (*cno, *of)).collect()
        };
        let needed = |object: u64, kept: &BTreeMap<u64, Accounted>| {
            (object_names::is_summary(object) && kept.contains_key(&object_names::cno_of(object)))
                || usage.is_needed(object, kept)
        };
        let staying = without(&unkept);
        let unneeded = stored.keys().copied();
        let newest = stored.values().max().copied();
        let unneeded: BTreeSet<u64> = unneeded
            .filter(|object| {
                !under_way.contains(&object_names::cno_of(*object))
                    && self.is_settled(*object, usage, stored, newest)
                    && !needed(*object, &staying)
            })
            .collect();
        let mut retired = self.retiring.update(&unkept, now, self.grace);
        let mut is_cut = retired.len() > self.at_once_max;
        retired.truncate(self.at_once_max);
        let staying = without(&retired.iter().copied().collect());
        let mut objects = self.dying.update(&unneeded, now, self.grace);
        objects.retain(|object| !needed(*object, &staying));
        // The part that shows to which checkpoint the others belong is removed last.
        objects.reverse();
        is_cut |= objects.len() > self.at_once_max;
        objects.truncate(self.at_once_max);
        let gone = usage.objects().keys().copied();
        let gone = gone.filter(|object| !stored.contains_key(object) && !usage.is_needed(*object, &staying));
        Choice {
            waiting: unkept.len() + unneeded.len() - retired.len() - objects.len(),
            gone: gone.collect(),
            kept: staying.into_keys().collect(),
            retired,
            objects,
            is_cut,
        }
    }
    /// Whether all uses that an object can ever have are accounted. Numbers are used in order and never again, and the one of the
    /// checkpoint accounted last is past it: no inode comes to name it. What no checkpoint that was accounted has used is of a publish
    /// or a relocation that failed; but parts under a number that is past may be those of a compaction by another tool, so such an object
    /// must have lain there for long, by the store's clock.
    /// `newest` is when the last of `stored` was written.
    fn is_settled(
        &self,
        object: u64,
        usage: &Usage,
        stored: &BTreeMap<u64, SystemTime>,
        newest: Option<SystemTime>,
    ) -> bool {
        let cno = object_names::cno_of(object);
        if cno >= usage.at_number() {
            return false;
        }
        if usage.objects().contains_key(&object) {
            return true;
        }
        let age = newest
            .zip(stored.get(&object))
            .and_then(|(newest, written)| newest.duration_since(*written).ok());
        age.is_some_and(|age| age >= self.orphan_age)
    }
}

#[cfg(test)]
mod tests {
    use super::super::usage::Delta;
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;

    const HOUR: Duration = Duration::from_secs(3600);

    /// The number of part `part` of a checkpoint.
    fn object(cno: u64, part: u64) -> u64 {
        cno << 32 | (part + 1)
    }

    /// Checkpoints 1 to `count`. Each overwrites what the previous one wrote to its part 1.
    fn overwritten(count: u64) -> Usage {
        let mut usage = Usage::default();
        for cno in 1..=count {
            let mut deltas = HashMap::from([(object(cno, 1), Delta { blocks: 1, nodes: 0 })]);
            if cno > 1 {
                deltas.insert(object(cno - 1, 1), Delta { blocks: -1, nodes: 0 });
            }
            let accounted = (InodeCheck::from_bits(cno), cno, 1).into();
            usage.step(cno, accounted, &deltas).unwrap();
        }
        usage
    }

    fn stored(objects: impl IntoIterator<Item = u64>) -> BTreeMap<u64, SystemTime> {
        objects
            .into_iter()
            .map(|object| (object, SystemTime::UNIX_EPOCH + HOUR))
            .collect()
    }

    fn keep(numbers: impl IntoIterator<Item = u64>) -> BTreeMap<u64, Vec<Reason>> {
        numbers.into_iter().map(|cno| (cno, vec![Reason::Last])).collect()
    }

    #[test]
    fn what_a_publish_under_way_has_stored_stays() {
        let usage = overwritten(5);
        let there = stored((1..=5).flat_map(|cno| [object(cno, 0), object(cno, 1)]));
        // One checkpoint is complete and not in the list yet, and one is being uploaded.
        let under_way = stored([object(6, 0), object(6, 1), object(7, 1)]);
        let all = there.into_iter().chain(under_way).collect();
        let mut chooser = Chooser::new(Duration::ZERO, Duration::ZERO);
        let choice = chooser.choose(&usage, &keep([5]), &all, &BTreeSet::new(), Instant::now());
        assert_eq!(choice.retired, [1, 2, 3, 4]);
        let going: BTreeSet<u64> = choice.objects.iter().copied().collect();
        assert_eq!(
            going,
            (1..=4).flat_map(|cno| [object(cno, 0), object(cno, 1)]).collect()
        );
        // The part that shows what the others are is removed after them.
        let place = |object| choice.objects.iter().position(|o| *o == object);
        assert!(place(object(3, 1)) < place(object(3, 0)));
    }

    #[test]
    fn what_a_checkpoint_needs_that_goes_later_stays_until_then() {
        let usage = overwritten(5);
        let all = stored((1..=5).flat_map(|cno| [object(cno, 0), object(cno, 1)]));
        let mut chooser = Chooser {
            at_once_max: 1,
            ..Chooser::new(Duration::ZERO, Duration::ZERO)
        };
        // Of the objects that nobody needs the last one comes first, and its checkpoint does not go with this plan.
        let choice = chooser.choose(&usage, &keep([5]), &all, &BTreeSet::new(), Instant::now());
        assert_eq!(
            (choice.retired.as_slice(), choice.objects.as_slice()),
            ([1].as_slice(), [object(1, 1)].as_slice())
        );
        assert_eq!(choice.kept, [2, 3, 4, 5]);
        assert_eq!(choice.waiting, 3 + 7);
        assert!(choice.is_cut);
        chooser.at_once_max = 8;
        let choice = chooser.choose(&usage, &keep([5]), &all, &BTreeSet::new(), Instant::now());
        assert!(!choice.is_cut && choice.waiting == 0, "{choice:?}");
    }

    #[test]
    fn what_was_never_used_goes_once_it_is_old_and_not_under_way() {
        let usage = overwritten(5);
        let mut all = stored((1..=5).flat_map(|cno| [object(cno, 0), object(cno, 1)]));
        // A publish that failed; copies that nobody came to refer to, and copies that are being stored.
        all.extend(stored([object(3, 7), object(4, 9), object(2, 9)]));
        all.remove(&object(4, 0));
        all.remove(&object(2, 0));
        let mut chosen = |newest: Duration| {
            all.insert(object(9, 0), SystemTime::UNIX_EPOCH + newest);
            let mut chooser = Chooser::new(Duration::ZERO, HOUR);
            let under_way = BTreeSet::from([2]);
            let choice = chooser.choose(&usage, &keep(1..=5), &all, &under_way, Instant::now());
            choice.objects
        };
        assert!(chosen(HOUR + HOUR / 2).is_empty());
        assert_eq!(chosen(2 * HOUR), [object(4, 9), object(3, 7)]);
    }

    #[test]
    fn the_newest_checkpoints_and_those_in_use_stay_whatever_the_policy_says() {
        let checkpoints: Vec<(u64, u64)> = (1..=40).map(|cno| (cno * 2, cno)).collect();
        let policy = Policy {
            keep_last: 1,
            ..Policy::default()
        };
        let protected = Protected {
            named: [4, 5].into(),
            in_use: [4, 8, 1000].into(),
        };
        let kept = kept(&checkpoints, Some(&policy), &protected, u64::MAX);
        assert_eq!(kept[&4], [Reason::Name, Reason::InUse]);
        assert_eq!(kept[&8], [Reason::InUse]);
        assert_eq!(kept[&80], [Reason::Newest, Reason::Last]);
        assert_eq!(kept.len(), 2 + NEWEST_KEPT);
        assert_eq!(super::kept(&checkpoints, None, &protected, u64::MAX).len(), 40);
        assert_eq!(
            super::kept(&checkpoints, Some(&Policy::default()), &protected, u64::MAX).len(),
            40
        );
    }
}
