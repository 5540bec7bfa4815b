//! What the indexes of the checkpoints need: read whole, each node once, and compared with the objects that are there.

use std::collections::{BTreeMap, BTreeSet};

use rangemap::RangeSet;

use super::report::{Findings, Kind, OBJECT_ADVICE};
use super::{Looker, Stored};
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::base::url::VolumeUrl;
use crate::format::block_lengths::BlockLengths;
use crate::format::node::NODE_BYTES;
use crate::format::object_names::{cno_of, is_summary};
use crate::format::stored_state::{Root, StoredState};
use crate::index::inspect::{FETCHES_AT_ONCE, Seen, inspect};

/// What is needed of the container's objects, by number, in bytes of each.
#[derive(Debug, Default)]
pub(super) struct Needed {
    /// Blocks of data.
    pub data: BTreeMap<u64, RangeSet<u64>>,
    /// Where the last node of an index ends.
    nodes_end: BTreeMap<u64, u64>,
    /// Nodes that were read.
    pub nodes: u64,
}

pub(super) fn roots(states: &[StoredState]) -> Vec<Root> {
    states.iter().map(|state| state.root).collect()
}

/// Reads the indexes of the checkpoints.
///
/// # Errors
/// When the store fails.
pub(super) async fn look(looker: &Looker<'_>, findings: &mut Findings) -> Result<Needed, VolumeError> {
    let states = &looker.checkpoints.all;
    let lengths = BlockLengths::new(states, looker.checkpoints.block_size_bytes);
    let mut needed = Needed::default();
    let mut damaged = Vec::new();
    let each = |seen| match seen {
        Seen::Node {
            object, offset_bytes, ..
        } => {
            let end = needed.nodes_end.entry(object).or_default();
            *end = (*end).max(offset_bytes + NODE_BYTES as u64);
        }
        Seen::Block {
            block,
            object,
            offset_bytes,
            ..
        } => {
            let bytes = lengths.stored_at(block, offset_bytes);
            needed.data.entry(object).or_default().insert(bytes);
        }
        Seen::Damaged {
            pointer,
            object,
            offset_bytes,
            blocks,
            reason,
        } => damaged.push((pointer, (object, offset_bytes), blocks, reason)),
    };
    let (roots, scope) = (roots(states), &looker.scope);
    let nodes = inspect(looker.store, &roots, scope, looker.cache, FETCHES_AT_ONCE, each).await?;
    needed.nodes = nodes;
    for (pointer, (object, offset_bytes), blocks, reason) in damaged {
        let at = findings.add(
            Kind::Damaged,
            looker.place(object).1,
            format!("its index node at {offset_bytes} cannot be used: {reason}"),
            OBJECT_ADVICE,
        );
        findings.bad_nodes.insert(pointer, (at, blocks));
    }
    Ok(needed)
}

impl Needed {
    /// The number of objects.
    pub fn objects(&self) -> usize {
        let all: BTreeSet<&u64> = self.data.keys().chain(self.nodes_end.keys()).collect();
        all.len()
    }

    /// Bytes of the blocks of data.
    pub fn data_bytes(&self) -> u64 {
        self.data.values().map(len_bytes).sum()
    }

    fn needs(&self, object: u64) -> bool {
        self.data.contains_key(&object) || self.nodes_end.contains_key(&object)
    }

    /// Where what is needed of an object ends.
    fn end(&self, object: u64) -> u64 {
        let of_data = self
            .data
            .get(&object)
            .and_then(|ranges| ranges.iter().next_back());
        let of_nodes = self.nodes_end.get(&object).copied().unwrap_or(0);
        of_data.map_or(0, |range| range.end).max(of_nodes)
    }

    /// Looks whether all of it is there.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn compare(
        &self,
        looker: &Looker<'_>,
        stored: &mut Stored,
        findings: &mut Findings,
    ) -> Result<(), VolumeError> {
        let all: BTreeSet<u64> = self.data.keys().chain(self.nodes_end.keys()).copied().collect();
        for object in all {
            let end = self.end(object);
            let (holder, key) = looker.place(object);
            // A directory lists what cannot be read, too.
            let is_told = matches!(holder.url, VolumeUrl::S3 { .. });
            if is_told && stored.get(&object).is_some_and(|len| *len >= end) {
                continue;
            }
            // It may be a list that was not up to date.
            let (kind, from, reason) = match holder.head(&key).await {
                Ok(Some(info)) if info.size_bytes >= end => {
                    // So that what is in it is read.
                    let listed = stored.entry(object).or_default();
                    *listed = info.size_bytes.max(*listed);
                    continue;
                }
                Ok(Some(info)) => (
                    Kind::Short,
                    info.size_bytes,
                    format!("it has {} bytes, and {end} are needed", info.size_bytes),
                ),
                Ok(None) => (Kind::Missing, 0, "it is not there".to_owned()),
                // A file that was cut short: what it is stands at its end.
                Err(e) if e.kind == StoreErrorKind::Corrupt => (Kind::Damaged, 0, e.detail),
                Err(e) => return Err(e.into()),
            };
            findings.add_place(kind, object, key, from..u64::MAX, reason);
        }
        Ok(())
    }

    /// Tells of objects that nothing needs.
    pub fn note_orphans(&self, looker: &Looker<'_>, stored: &Stored, findings: &mut Findings) {
        let newest = looker.checkpoints.newest.map_or(0, |id| id.cno);
        let kept: BTreeSet<u64> = looker
            .checkpoints
            .all
            .iter()
            .map(|state| state.state_id.cno)
            .collect();
        let is_orphan = |object: u64| {
            let is_own = is_summary(object) && kept.contains(&cno_of(object));
            let fork = looker.store.lineage().fork();
            (fork + 1..=newest).contains(&cno_of(object)) && !is_own && !self.needs(object)
        };
        let orphans = stored.iter().filter(|(object, _)| is_orphan(**object));
        let (count, bytes) = orphans.fold((0, 0), |(count, bytes), (_, len)| (count + 1, bytes + len));
        findings.note_orphans(count, bytes);
    }
}

fn len_bytes(ranges: &RangeSet<u64>) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}
