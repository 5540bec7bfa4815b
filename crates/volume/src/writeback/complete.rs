//! Makes the blocks of a frozen generation whole.

use futures::StreamExt;

use super::overlay::Frozen;
use crate::engine::Engine;
use crate::error::VolumeError;
use crate::geometry::Geometry;

/// Reads that complete partly written blocks, in flight at once.
const COMPLETIONS_IN_FLIGHT: usize = 64;

/// Reads what partly written blocks lack from the published state, many at once, so that whole blocks are published.
pub(crate) async fn complete_partial_blocks(engine: &dyn Engine, frozen: &Frozen) -> Result<(), VolumeError> {
    let geometry: Geometry = engine.geometry();
    let partial = frozen.with(|g| g.partial_blocks());
    let mut reads = futures::stream::iter(partial)
        .map(|(block, gap)| async move {
            let mut bytes = vec![0; gap.len()];
            let at = block.0 * u64::from(geometry.block_size()) + u64::from(gap.start);
            engine
                .read_behind(at, &mut bytes)
                .await
                .map(|()| (block, gap.start, bytes))
        })
        .buffer_unordered(COMPLETIONS_IN_FLIGHT);
    while let Some(read) = reads.next().await {
        let (block, in_block, bytes) = read?;
        frozen.complete(block, in_block, &bytes);
    }
    Ok(())
}
