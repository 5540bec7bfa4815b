//! Makes partly written blocks whole: with published bytes, so that whole blocks are published.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};

use super::overlay::{Frozen, Overlay, PartialBlock};
use crate::engine::Engine;
use crate::error::VolumeError;
use crate::geometry::BlockIndex;

/// Reads in flight at once ...
const READS_IN_FLIGHT: u64 = 64;
/// ... fewer where blocks are so large that this much memory would be in flight, were each read by itself.
const BYTES_IN_FLIGHT: u64 = 16 << 20;
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
    complete: impl Fn(BlockIndex, u32, &[u8]) + Sync,
) -> Result<(), VolumeError> {
    let block_size = u64::from(engine.geometry().block_size());
    let in_flight = (BYTES_IN_FLIGHT / block_size).clamp(1, READS_IN_FLIGHT);
    let in_volume = |(block, gap): PartialBlock| {
        let start = block.0 * block_size;
        start + u64::from(gap.start)..start + u64::from(gap.end)
    };
    let groups = engine.grouped(partial.into_iter().map(in_volume).collect());
    let complete = &complete;
    futures::stream::iter(groups)
        .map(|ranges| async move {
            let mut each = |number: usize, bytes: &[u8]| {
                let start = ranges[number].start;
                complete(BlockIndex(start / block_size), (start % block_size) as u32, bytes);
            };
            engine.read_near(&ranges, &mut each).await
        })
        .buffer_unordered(in_flight as usize)
        .try_collect()
        .await
}
