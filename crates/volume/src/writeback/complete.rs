//! Makes partly written blocks whole: with published bytes, so that whole blocks are published.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use futures::StreamExt;

use super::overlay::{Frozen, Overlay, PartialBlock};
use crate::engine::Engine;
use crate::error::VolumeError;
use crate::geometry::BlockIndex;

/// Reads in flight at once ...
const READS_IN_FLIGHT: u64 = 64;
/// ... fewer where blocks are so large that this much memory would be in flight.
const BYTES_IN_FLIGHT: u64 = 16 << 20;
/// Gaps with no more than this between them are read together ...
const JOIN_OVER_BYTES: u64 = 64 << 10;
/// ... up to this much.
const JOINED_BYTES_MAX: u64 = 1 << 20;
/// A block of the active generation is completed ahead once it stayed partly written for one to two of these: what is
/// written in sequence is soon whole by itself.
const SETTLED_AFTER: Duration = Duration::from_millis(100);

/// Reads what the partly written blocks of a frozen generation lack.
///
/// # Errors
/// When a read fails.
pub(crate) async fn complete_partial_blocks(engine: &dyn Engine, frozen: &Frozen) -> Result<(), VolumeError> {
    let partial = frozen.with(|g| g.partial_blocks());
    read_gaps(engine, partial, |block, in_block, bytes| {
        frozen.complete(block, in_block, bytes);
    })
    .await
}

/// Completes blocks of the active generation while the frozen one is being uploaded, so that its own publish finds less
/// to do. Goes on until it is dropped, or a read fails: then the publish completes what is left, and says what is wrong.
pub(super) async fn complete_ahead(engine: &dyn Engine, overlay: &Overlay) {
    let mut seen = (0, BTreeSet::new());
    loop {
        tokio::time::sleep(SETTLED_AFTER).await;
        let (generation, partial) = overlay.partial_blocks();
        let blocks = partial.iter().map(|(block, _)| *block).collect();
        let (before, settled) = std::mem::replace(&mut seen, (generation, blocks));
        if before != generation {
            continue;
        }
        let settled = partial.into_iter().filter(|(block, _)| settled.contains(block));
        let completed = read_gaps(engine, settled.collect(), |block, in_block, bytes| {
            overlay.complete(generation, block, in_block, bytes);
        });
        if completed.await.is_err() {
            return;
        }
    }
}

/// Reads the gaps from the published state, many at once, and hands over each.
async fn read_gaps(
    engine: &dyn Engine,
    partial: Vec<PartialBlock>,
    complete: impl Fn(BlockIndex, u32, &[u8]),
) -> Result<(), VolumeError> {
    let block_size = u64::from(engine.geometry().block_size());
    let in_flight = (BYTES_IN_FLIGHT / block_size).clamp(1, READS_IN_FLIGHT);
    let mut reads = futures::stream::iter(joined(partial, block_size))
        .map(|gaps| async move {
            let range = gaps.range(block_size);
            let mut bytes = vec![0; (range.end - range.start) as usize];
            let read = engine.read_behind(range.start, &mut bytes).await;
            read.map(|()| (gaps, range.start, bytes))
        })
        .buffer_unordered(in_flight as usize);
    while let Some(read) = reads.next().await {
        let (gaps, start, bytes) = read?;
        for (block, gap) in gaps.0 {
            let at = (block.0 * block_size + u64::from(gap.start) - start) as usize;
            complete(block, gap.start, &bytes[at..at + gap.len()]);
        }
    }
    Ok(())
}

/// Gaps that are read as one, ascending, never none.
#[derive(Debug, PartialEq, Eq)]
struct Gaps(Vec<PartialBlock>);

impl Gaps {
    /// From the first to the last byte of them, in bytes from the volume's start.
    fn range(&self, block_size: u64) -> Range<u64> {
        let (first, last) = (&self.0[0], &self.0[self.0.len() - 1]);
        first.0.0 * block_size + u64::from(first.1.start)..last.0.0 * block_size + u64::from(last.1.end)
    }
}

/// Joins the gaps of blocks that follow each other: one request costs less than two.
fn joined(partial: Vec<PartialBlock>, block_size: u64) -> Vec<Gaps> {
    let mut all: Vec<Gaps> = Vec::new();
    for (block, gap) in partial {
        let start = block.0 * block_size + u64::from(gap.start);
        let end = block.0 * block_size + u64::from(gap.end);
        match all.last_mut() {
            Some(gaps)
                if gaps.0.last().is_some_and(|(last, _)| last.0 + 1 == block.0)
                    && start - gaps.range(block_size).end <= JOIN_OVER_BYTES
                    && end - gaps.range(block_size).start <= JOINED_BYTES_MAX =>
            {
                gaps.0.push((block, gap));
            }
            _ => all.push(Gaps(vec![(block, gap)])),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_read_together_unless_much_lies_between_or_it_is_too_much() {
        const K: u32 = 1024;
        let at = |block: u64, gap: Range<u32>| (BlockIndex(block), gap);
        let partial = vec![
            at(3, 4 * K..64 * K),
            at(4, 0..60 * K),
            at(6, 0..64 * K),
            at(7, 1..64 * K),
        ];
        let read = joined(partial.clone(), 64 << 10);
        assert_eq!(read, [Gaps(partial[..2].to_vec()), Gaps(partial[2..].to_vec())]);
        assert_eq!(read[0].range(64 << 10), (3 * 64 + 4) << 10..(4 * 64 + 60) << 10);

        let far = vec![at(0, 0..4 * K), at(1, 4 * K..512 * K)];
        assert_eq!(joined(far, 512 << 10).len(), 2);
        let many: Vec<_> = (0..40).map(|block| at(block, 0..63 * K)).collect();
        let read = joined(many.clone(), 64 << 10);
        assert!(
            read.len() > 1
                && read
                    .iter()
                    .all(|g| g.range(64 << 10).end - g.range(64 << 10).start <= JOINED_BYTES_MAX)
        );
        assert_eq!(read.into_iter().flat_map(|g| g.0).collect::<Vec<_>>(), many);
    }
}
