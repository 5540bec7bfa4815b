//! Whether any checkpoint needs what seems wrong, and what of the volume that is.
//!
//! What needs it is listed here, after it was seen to be wrong. That order is what tells damage from what retention removed (see the top
//! of this folder).

use std::collections::BTreeMap;
use std::ops::Range;

use futures::FutureExt;
use futures::future::BoxFuture;
use log::debug;
use rangemap::RangeSet;

use super::needed::{Kept, Suspects, own_object};
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::format::block_lengths::BlockLengths;
use crate::format::node::NODE_BYTES;
use crate::format::object_names::{cno_of, name_of};
use crate::index::inspect::{Holder, Seen};
use crate::meta::scrub_record::{DamagedPlace, DamagedRange, RANGES_MAX};
use crate::store::Store;

/// What needs one suspect part.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Need {
    /// Blocks of the volume.
    blocks: RangeSet<u64>,
    /// The newest checkpoint is among those that need it.
    is_newest: bool,
}

/// What needs suspect parts, while indexes are walked, the newest one's first.
struct Needs<'a> {
    suspects: &'a Suspects,
    lengths: BlockLengths,
    /// The index that is walked: 0 is the newest one's.
    root: usize,
    /// By object, and by the part's place among those of the object.
    found: BTreeMap<(u64, usize), Need>,
}

impl<'a> Needs<'a> {
    fn new(suspects: &'a Suspects, lengths: BlockLengths) -> Self {
        Self {
            suspects,
            lengths,
            root: 0,
            found: BTreeMap::new(),
        }
    }

    fn see(&mut self, seen: Seen) {
        // What several indexes share is told of with the first one.
        if let Seen::Node { holder, .. } | Seen::Block { holder, .. } = &seen
            && let Holder::Root(root) = holder
        {
            self.root = *root;
        }
        match seen {
            // One that cannot be read is told of as damaged, too.
            Seen::Node { .. } => {}
            Seen::Block {
                block,
                object,
                offset_bytes,
                ..
            } => {
                let bytes = self.lengths.stored_at(block, offset_bytes);
                self.note(object, &bytes, block..block + 1);
            }
            Seen::Damaged {
                object,
                offset_bytes,
                blocks,
                ..
            } => {
                let bytes = offset_bytes..offset_bytes + NODE_BYTES as u64;
                self.note(object, &bytes, blocks);
            }
        }
    }

    fn note(&mut self, object: u64, bytes: &Range<u64>, blocks: Range<u64>) {
        let parts = self.suspects.get(&object).into_iter().flatten();
        for (at, part) in parts.enumerate() {
            if part.bytes.start < bytes.end && bytes.start < part.bytes.end {
                let need = self.found.entry((object, at)).or_default();
                need.is_newest |= self.root == 0;
                if !blocks.is_empty() {
                    need.blocks.insert(blocks.clone());
                }
            }
        }
    }
}

/// The damaged places of each suspect object: none where no checkpoint needs what is wrong with it.
///
/// # Errors
/// When the store fails.
pub(super) fn confirm<'a>(
    store: &'a Store,
    suspects: &'a Suspects,
) -> BoxFuture<'a, Result<BTreeMap<u64, Vec<DamagedPlace>>, VolumeError>> {
    confirm_unboxed(store, suspects).boxed()
}

async fn confirm_unboxed(
    store: &Store,
    suspects: &Suspects,
) -> Result<BTreeMap<u64, Vec<DamagedPlace>>, VolumeError> {
    let kept = Kept::load(store).await?;
    let mut needs = Needs::new(suspects, kept.lengths());
    kept.inspect(store, |seen| needs.see(seen)).await?;
    // A checkpoint that is listed, and whose own object cannot be read, needs all of that.
    let mut unreadable: BTreeMap<u64, u64> = BTreeMap::new();
    for (cno, ..) in &kept.unreadable {
        let own = own_object(*cno, |object| suspects.contains_key(&object));
        unreadable.insert(own, *cno);
        for at in 0..suspects.get(&own).map_or(0, Vec::len) {
            needs.found.entry((own, at)).or_default();
        }
    }
    let size_bytes = kept.states.iter().map(|state| state.size_bytes()).max();
    let volume = Volume {
        block_size_bytes: kept.block_size_bytes,
        size_bytes: size_bytes.unwrap_or_default(),
    };
    let mut confirmed = BTreeMap::new();
    for (&object, parts) in suspects {
        let holder = store.holder_of(cno_of(object));
        let key = holder.data_key(&name_of(object));
        let mut places: Vec<DamagedPlace> = Vec::new();
        for (at, part) in parts.iter().enumerate() {
            let Some(need) = needs.found.get(&(object, at)) else {
                debug!(
                    "{key} at {}: {}; no checkpoint needs that",
                    part.bytes.start, part.reason
                );
                continue;
            };
            let (ranges, affected_bytes) = volume.ranges(&need.blocks);
            let reason = match unreadable.get(&object) {
                // It is in the way of no data, but of the checkpoint itself.
                Some(cno) if ranges.is_empty() => {
                    format!("checkpoint {cno} cannot be read from it: {}", part.reason)
                }
                _ => part.reason.clone(),
            };
            places.push(DamagedPlace {
                object: key.clone(),
                offset_bytes: part.bytes.start,
                len_bytes: part.bytes.end - part.bytes.start,
                reason,
                is_newest_affected: need.is_newest,
                ranges,
                affected_bytes,
                found_ms: now_ms(),
            });
        }
        confirmed.insert(object, places);
    }
    Ok(confirmed)
}

/// The volume that blocks are of.
struct Volume {
    block_size_bytes: u64,
    size_bytes: u64,
}

impl Volume {
    /// The first ranges of these blocks, and the length of all of them, in bytes.
    fn ranges(&self, blocks: &RangeSet<u64>) -> (Vec<DamagedRange>, u64) {
        let ranges = blocks.iter().filter_map(|blocks| {
            let offset_bytes = blocks.start.saturating_mul(self.block_size_bytes);
            let end = blocks.end.saturating_mul(self.block_size_bytes);
            let len_bytes = end.min(self.size_bytes).saturating_sub(offset_bytes);
            (len_bytes > 0).then_some(DamagedRange {
                offset_bytes,
                len_bytes,
            })
        });
        let mut ranges: Vec<DamagedRange> = ranges.collect();
        let affected_bytes = ranges.iter().map(|range| range.len_bytes).sum();
        ranges.truncate(RANGES_MAX);
        (ranges, affected_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::verify::{BadPart, Wrong};

    const BLOCK: u64 = 4096;

    fn part(bytes: Range<u64>) -> BadPart {
        BadPart {
            bytes,
            wrong: Wrong::Damaged,
            reason: "r".into(),
        }
    }

    fn block(block: u64, object: u64, offset_bytes: u64, holder: Holder) -> Seen {
        Seen::Block {
            block,
            object,
            offset_bytes,
            holder,
        }
    }

    #[test]
    fn what_is_needed_of_what_is_wrong_is_told_with_the_checkpoints_that_need_it() {
        let suspects = Suspects::from([
            (7, vec![part(0..4096), part(16384..32768), part(65536..81920)]),
            (9, vec![part(0..4096)]),
        ]);
        let mut needs = Needs::new(&suspects, BlockLengths::new(&[], BLOCK));
        let node = |pointer, holder| Seen::Node {
            pointer,
            object: 7,
            offset_bytes: 0,
            holder,
        };
        for seen in [
            // A node that could be read says nothing of the damage that it lies in.
            node(1, Holder::Root(0)),
            block(5, 7, 16384, Holder::Node(1)),
            block(6, 7, 20480, Holder::Node(1)),
            // Beside the damage, and in another object.
            block(8, 7, 32768, Holder::Node(1)),
            block(9, 8, 16384, Holder::Node(1)),
            node(2, Holder::Root(1)),
            block(100, 7, 65536, Holder::Node(2)),
            Seen::Damaged {
                pointer: 3,
                object: 9,
                offset_bytes: 0,
                blocks: 200..300,
                reason: "r".into(),
            },
        ] {
            needs.see(seen);
        }
        let need = |blocks: Range<u64>, is_newest| Need {
            blocks: std::iter::once(blocks).collect(),
            is_newest,
        };
        let expected = BTreeMap::from([
            ((7, 1), need(5..7, true)),
            ((7, 2), need(100..101, false)),
            ((9, 0), need(200..300, false)),
        ]);
        assert_eq!(needs.found, expected);
    }

    #[test]
    fn ranges_end_with_the_volume() {
        let volume = Volume {
            block_size_bytes: BLOCK,
            size_bytes: 10 * BLOCK + 512,
        };
        let blocks: RangeSet<u64> = [1..3, 10..u64::MAX].into_iter().collect();
        let (ranges, affected_bytes) = volume.ranges(&blocks);
        let ranges: Vec<(u64, u64)> = ranges
            .iter()
            .map(|range| (range.offset_bytes, range.len_bytes))
            .collect();
        assert_eq!(ranges, [(BLOCK, 2 * BLOCK), (10 * BLOCK, 512)]);
        assert_eq!(affected_bytes, 2 * BLOCK + 512);
        let many: RangeSet<u64> = (0..100).map(|at| at * 2..at * 2 + 1).collect();
        let volume = Volume {
            size_bytes: 1 << 30,
            ..volume
        };
        let (ranges, affected_bytes) = volume.ranges(&many);
        assert_eq!((ranges.len(), affected_bytes), (RANGES_MAX, 100 * BLOCK));
    }
}
