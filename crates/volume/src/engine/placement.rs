//! The places of blocks as the owner's own container has them, unpublished changes included.

use std::ops::Range;

use hyperfile::SegmentId;
use hyperfile::file::ReadPolicy;

use super::container::Container;
use crate::base::error::VolumeError;
use crate::base::geometry::Geometry;
use crate::format::object_names::object_of;
use crate::index::location_map::{Place, Run};
use crate::index::lookup::push;

/// Blocks looked up in the index at a time.
const LOOKUP_BLOCKS: u64 = 2048;
/// The most blocks that one call looks up. For a longer range it answers for the first part.
const FIND_BLOCKS_MAX: u64 = 64 * 1024;

/// Start and length of a range of blocks in bytes, cut at the end of the volume.
pub(super) fn bytes_of(geometry: Geometry, blocks: &Range<u64>) -> (usize, usize) {
    let bs = u64::from(geometry.block_size());
    let start = blocks.start * bs;
    let end = (blocks.end * bs).min(geometry.size_bytes());
    (start as usize, (end - start) as usize)
}

/// Finds the places of a range of blocks, or of the first part of it.
///
/// # Errors
/// [`VolumeError::Engine`] when the index cannot be read.
pub(super) async fn find(
    container: &mut Container,
    geometry: Geometry,
    blocks: Range<u64>,
) -> Result<Vec<Run>, VolumeError> {
    let bs = u64::from(geometry.block_size());
    let failed = |e| VolumeError::engine(format!("looking up blocks {}..{}", blocks.start, blocks.end), e);
    let mut runs: Vec<Run> = Vec::new();
    let mut looked_up = 0;
    let mut at = blocks.start;
    while at < blocks.end && looked_up < FIND_BLOCKS_MAX {
        let (_, bytes_left) = bytes_of(geometry, &(at..blocks.end));
        // A hole is skipped as a whole, however long it is.
        let data = container.seek_data((at * bs) as usize).await.map_err(failed)?;
        let data = data.map_or(geometry.blocks(), |offset| offset as u64 / bs);
        if data > at {
            push(&mut runs, at..data, Place::Nothing, bs);
            at = data;
            continue;
        }
        let count = LOOKUP_BLOCKS.min(blocks.end - at);
        // Planning searches the index for all the blocks at once, level by level. Without it, the look-ups below would
        // cost one round trip for each index node that is not in memory.
        let window = (at * bs, (count * bs).min(bytes_left as u64));
        container
            .plan_reads(&[window], &ReadPolicy::default())
            .await
            .map_err(failed)?;
        for placed in container
            .block_placement(at, count as usize)
            .await
            .map_err(failed)?
        {
            push(&mut runs, at..at + 1, place(placed), bs);
            at += 1;
        }
        looked_up += count;
    }
    Ok(runs)
}

/// The places of blocks that were just published. The engine places the blocks of a run in order. So when the places of
/// the first and the last block are as far apart as the blocks, all blocks in between have the places in between.
///
/// # Errors
/// When the index cannot be read.
pub(super) async fn places_of(
    container: &mut Container,
    block_size_bytes: u64,
    blocks: Range<u64>,
) -> std::io::Result<Vec<Run>> {
    let mut runs = Vec::new();
    let mut at = blocks.start;
    while at < blocks.end {
        let first = place_of(container, at).await?;
        let expected = |block: u64| first.advanced(block - at, block_size_bytes);
        let mut end = blocks.end;
        // The run is halved until it is one piece, because a run is split where an object is full.
        while end - at > 1 && place_of(container, end - 1).await? != expected(end - 1) {
            end = at + (end - at) / 2;
        }
        if cfg!(debug_assertions) {
            for block in at..end {
                assert_eq!(
                    place_of(container, block).await?,
                    expected(block),
                    "laid out in order"
                );
            }
        }
        push(&mut runs, at..end, first, block_size_bytes);
        at = end;
    }
    Ok(runs)
}

async fn place_of(container: &mut Container, block: u64) -> std::io::Result<Place> {
    let placed = container.block_placement(block, 1).await?;
    Ok(place(placed.first().copied().flatten()))
}

fn place(placed: Option<(SegmentId, u64)>) -> Place {
    placed.map_or(Place::Nothing, |(segment, offset_bytes)| Place::Stored {
        object: object_of(segment),
        offset_bytes,
    })
}
