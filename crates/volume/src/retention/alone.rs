//! What a checkpoint alone holds. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::usage::Usage;
use crate::format::object_names::{cno_of, is_summary};

/// How many bytes each of the `kept` checkpoints holds alone: those of the objects that nothing needs any more once it is not kept, while
/// the others are. `stored` are the objects with their lengths in bytes.
pub(super) fn alone(
    usage: &Usage,
    kept: &BTreeSet<u64>,
    stored: impl Iterator<Item = (u64, u64)>,
) -> BTreeMap<u64, u64> {
    let mut bytes: BTreeMap<u64, u64> = kept.iter().map(|cno| (*cno, 0)).collect();
    for (object, len_bytes) in stored {
        let of = usage.objects().get(&object);
        if of.is_some_and(|of| !of.live.is_empty() || of.dead_since == u64::MAX) {
            continue;
        }
        let used = of.filter(|of| of.born < of.dead_since);
        let users = used.into_iter().flat_map(|of| kept.range(of.born..of.dead_since));
        // A checkpoint needs the object with its inode, whatever else is in it.
        let own = is_summary(object)
            .then(|| cno_of(object))
            .filter(|cno| kept.contains(cno));
        let others = users.copied().filter(|cno| Some(*cno) != own);
        let mut users = own.into_iter().chain(others);
        if let (Some(only), None) = (users.next(), users.next()) {
            *bytes.entry(only).or_default() += len_bytes;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::super::usage::{Accounted, Delta};
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;
    use crate::format::object_names::part_of;

    fn needed(usage: &Usage, kept: &BTreeSet<u64>, object: u64) -> bool {
        let accounted: BTreeMap<u64, Accounted> = usage
            .kept()
            .iter()
            .filter(|(cno, _)| kept.contains(cno))
            .map(|(cno, of)| (*cno, *of))
            .collect();
        (is_summary(object) && kept.contains(&cno_of(object))) || usage.is_needed(object, &accounted)
    }

    /// Of random histories, the checkpoints kept at random: what is told is what is not needed any more once one of them goes.
    #[test]
    fn what_one_holds_alone_is_what_goes_with_it() {
        let mut all_alone = 0;
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut usage = Usage::default();
            let mut live: BTreeMap<u64, i64> = BTreeMap::new();
            let mut stored: BTreeMap<u64, u64> = BTreeMap::new();
            for cno in 1..=12_u64 {
                let mut deltas: HashMap<u64, Delta> = HashMap::new();
                for part in 0..random.u16(1..3) {
                    let object = part_of(cno, part);
                    stored.insert(object, random.u64(1..1000));
                    let blocks = random.i64(0..3);
                    if blocks > 0 {
                        live.insert(object, blocks);
                        deltas.insert(object, Delta { blocks, nodes: 0 });
                    }
                }
                for (object, blocks) in &mut live {
                    if cno_of(*object) < cno && *blocks > 0 && random.bool() {
                        *blocks -= 1;
                        deltas.insert(*object, Delta { blocks: -1, nodes: 0 });
                    }
                }
                let accounted = (InodeCheck::from_bits(cno), cno, 1).into();
                usage.step(cno, accounted, &deltas).unwrap();
            }
            let kept: BTreeSet<u64> = (1..=12).filter(|cno| *cno == 12 || random.bool()).collect();
            let told = alone(&usage, &kept, stored.iter().map(|(object, len)| (*object, *len)));
            assert_eq!(told.keys().copied().collect::<BTreeSet<u64>>(), kept);
            for (cno, bytes) in told {
                let mut without = kept.clone();
                without.remove(&cno);
                let goes = stored.iter().filter(|(object, _)| {
                    needed(&usage, &kept, **object) && !needed(&usage, &without, **object)
                });
                assert_eq!(bytes, goes.map(|(_, len)| len).sum::<u64>(), "{seed}: {cno}");
                all_alone += bytes;
            }
        }
        assert!(all_alone > 0);
    }
}
