//! What is in the way of what: the ranges of the volume, and the checkpoints, that need what is damaged or missing.
//!
//! The indexes are walked a second time, for that alone: where nothing is wrong it costs nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::Range;

use futures::try_join;

use super::Looker;
use super::needed::roots;
use super::report::Findings;
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::format::block_lengths::BlockLengths;
use crate::format::inode;
use crate::format::node::NODE_BYTES;
use crate::index::inspect::{FETCHES_AT_ONCE, Holder, Seen, inspect};
use crate::meta::checkpoint_list;
use crate::retention::plan;

/// What one node or root has in it of the findings: blocks, by finding.
type Hits = BTreeMap<usize, Vec<Range<u64>>>;

/// Tells each finding which checkpoints it affects, and what of them.
///
/// # Errors
/// When the store fails.
pub(super) async fn tell(looker: &Looker<'_>, findings: &mut Findings) -> Result<(), VolumeError> {
    if findings.bad.is_empty() && findings.bad_nodes.is_empty() {
        return Ok(());
    }
    let states = &looker.checkpoints.all;
    let block_size = looker.checkpoints.block_size_bytes;
    let lengths = BlockLengths::new(states, block_size);
    let mut holders: HashMap<u64, Vec<Holder>> = HashMap::new();
    let mut hits: HashMap<Holder, Hits> = HashMap::new();
    // Nodes that cannot be read any more: what they lead to went meanwhile, and nothing of it is seen.
    let mut gone = BTreeSet::new();
    let each = |seen| match seen {
        Seen::Node {
            pointer,
            object,
            offset_bytes,
            holder,
        } => {
            holders.entry(pointer).or_default().push(holder);
            let bytes = offset_bytes..offset_bytes + NODE_BYTES as u64;
            for finding in findings.bad_at(object, &bytes) {
                hits.entry(holder).or_default().entry(finding).or_default();
            }
        }
        Seen::Block {
            block,
            object,
            offset_bytes,
            holder,
        } => {
            let bytes = lengths.stored_at(block, offset_bytes);
            for finding in findings.bad_at(object, &bytes) {
                let of = hits.entry(holder).or_default().entry(finding).or_default();
                of.push(block..block + 1);
            }
        }
        Seen::Damaged { pointer, blocks, .. } => match findings.bad_nodes.get(&pointer) {
            Some((finding, _)) => {
                let of = hits.entry(Holder::Node(pointer)).or_default();
                of.entry(*finding).or_default().push(blocks);
            }
            None => drop(gone.insert(pointer)),
        },
    };
    let (roots, scope) = (roots(states), &looker.scope);
    inspect(looker.store, &roots, scope, looker.cache, FETCHES_AT_ONCE, each).await?;
    let of_gone: BTreeSet<usize> = gone
        .iter()
        .flat_map(|pointer| roots_of(Holder::Node(*pointer), &holders))
        .collect();
    for (holder, hits) in hits {
        for root in roots_of(holder, &holders) {
            let state = &states[root];
            for (finding, blocks) in &hits {
                let finding = &mut findings.found[*finding];
                finding.checkpoints.insert(state.id());
                for blocks in blocks {
                    let start = blocks.start.saturating_mul(block_size);
                    let end = blocks.end.saturating_mul(block_size).min(state.size_bytes());
                    if start < end {
                        finding.ranges.insert(start..end);
                    }
                }
            }
        }
    }
    let places: BTreeSet<usize> = findings
        .bad
        .values()
        .flatten()
        .map(|(_, finding)| *finding)
        .collect();
    for finding in places {
        let checkpoints = &mut findings.found[finding].checkpoints;
        if checkpoints.is_empty() {
            checkpoints.extend(of_gone.iter().map(|root| states[*root].id()));
        }
    }
    Ok(())
}

/// The roots from which something is reached.
fn roots_of(from: Holder, holders: &HashMap<u64, Vec<Holder>>) -> BTreeSet<usize> {
    let mut found = BTreeSet::new();
    let mut seen = HashSet::new();
    let mut open = vec![from];
    while let Some(holder) = open.pop() {
        match holder {
            Holder::Root(root) => drop(found.insert(root)),
            Holder::Node(pointer) if seen.insert(pointer) => {
                open.extend(holders.get(&pointer).into_iter().flatten());
            }
            Holder::Node(_) => {}
        }
    }
    found
}

/// Forgets what is in the way of checkpoints alone that were removed while they were looked at.
///
/// # Errors
/// When the store fails.
pub(super) async fn forget_what_went(
    looker: &Looker<'_>,
    findings: &mut Findings,
) -> Result<(), VolumeError> {
    if findings.found.is_empty() {
        return Ok(());
    }
    let store = looker.store;
    // The plan before the list, as whoever reads a checkpoint does it: what is removed stands in one, or is not in the other.
    let plan = plan::load(store).await.ok().flatten().map(|(plan, _)| plan);
    let (numbers, newest) = try_join!(checkpoint_list::numbers(store), async {
        Ok(inode::load(store).await.ok().map(|(raw, _)| raw))
    })?;
    let up_to = newest.as_ref().map_or(u64::MAX, |raw| raw.i_last_cno);
    let plan = plan.filter(|plan| plan.is_of(up_to));
    let numbers: BTreeSet<u64> = numbers.into_iter().collect();
    let newest = newest.map(|raw| CheckpointId::of_inode(&raw));
    // The newest may have got its entry after the list was read, and a later one come.
    let newest_then = looker
        .checkpoints
        .newest
        .filter(|id| numbers.range(id.cno + 1..).nth(1).is_none());
    let is_there = |id: &CheckpointId| {
        let is_planned = plan.as_ref().is_some_and(|plan| !plan.keeps(id.cno));
        !is_planned
            && (numbers.contains(&id.cno)
                || looker.checkpoints.is_named(*id)
                || newest == Some(*id)
                || newest_then == Some(*id))
    };
    findings.retain(|finding| {
        let had_some = !finding.checkpoints.is_empty();
        finding.checkpoints.retain(is_there);
        !had_some || !finding.checkpoints.is_empty()
    });
    Ok(())
}
