//! Changes the size of a container that nobody serves.
//!
//! The engine's own `truncate` is not used: it publishes with retries that read the inode again, and it writes the
//! inode once more after a failure.

use std::io;

use hyperfile::file::HyperTrait;

use super::container::Container;
use super::{bare, placement};
use crate::base::geometry::Geometry;
use crate::index::location_map::Place;
use crate::index::walk::Walk;
use crate::read::read_path::Objects;
use crate::read::reader::ObjectSource;
use crate::store::Store;

/// The most blocks that one checkpoint cuts off. Each costs an index entry in memory until it is published.
const CUT_BLOCKS_MAX: u64 = 2 << 20;
/// Blocks that one call of the engine cuts off.
const CUT_CALL_BLOCKS: u64 = 64 * 1024;

/// Publishes the container with this size. One checkpoint is enough when at most [`CUT_BLOCKS_MAX`] stored blocks lie
/// past the new end. An interruption leaves the old size or the new one; with more than one checkpoint, the old size, and zeros in a part of
/// what lies past the new end. The container must be opened again afterwards.
///
/// The caller adopts, then checks: it checks the lease after it opened the container and before it calls this.
///
/// # Errors
/// After any error it is not known what was stored.
pub(crate) async fn resize(store: &Store, container: &mut Container, new_size_bytes: u64) -> io::Result<()> {
    let old_size_bytes = container.inode().size() as u64;
    if new_size_bytes < old_size_bytes {
        cut(store, container, old_size_bytes, new_size_bytes).await?;
    }
    if bare::holds_unpublished(container) {
        return flush(container, new_size_bytes).await;
    }
    bare::publish(container, |raw| raw.i_size = new_size_bytes).await?;
    Ok(())
}

/// Lets go of everything past the new end: a volume that grows again must read zeros there.
async fn cut(
    store: &Store,
    container: &mut Container,
    old_size_bytes: u64,
    new_size_bytes: u64,
) -> io::Result<()> {
    let block_bytes = container.config().meta.data_block_size as u64;
    let geometry = u32::try_from(block_bytes)
        .map(|bytes| Geometry::new(old_size_bytes, bytes))
        .map_err(io::Error::other)?;
    let kept = new_size_bytes.div_ceil(block_bytes);
    let mut walk = Walk::of_container(container)?;
    let mut unpublished = 0;
    let mut at = kept;
    while at < geometry.blocks() {
        let part = walk.next(at..geometry.blocks()).await?;
        at = part.end;
        for blocks in part.mapped() {
            let mut from = blocks.start;
            while from < blocks.end {
                let until = blocks.end.min(from + CUT_CALL_BLOCKS);
                // Whole blocks are zeroed, also the last one, because the engine would store the zeros of a partial
                // block. This may move the end of the volume, so the size is set before each checkpoint.
                let (start, len) = (from * block_bytes, (until - from) * block_bytes);
                container.write_zero(start as usize, len as usize).await?;
                unpublished += until - from;
                from = until;
            }
        }
        if unpublished >= CUT_BLOCKS_MAX {
            flush(container, old_size_bytes).await?;
            unpublished = 0;
            walk = Walk::of_container(container)?;
        }
    }
    let end = (kept * block_bytes).min(old_size_bytes);
    if end > new_size_bytes {
        let last = placement::find(container, geometry, kept - 1..kept).await;
        let last = last.map_err(io::Error::other)?;
        if let Some(Place::Stored { object, offset_bytes }) = last.first().map(|run| run.place) {
            // As a whole block: of a part the engine would read the rest, and not from where a clone has it.
            let start = (kept - 1) * block_bytes;
            let objects = Objects(store.clone());
            let left = objects.read(object, offset_bytes, new_size_bytes - start).await;
            let mut bytes = left.map_err(io::Error::other)?.together().to_vec();
            bytes.resize(block_bytes as usize, 0);
            container.write(start as usize, &bytes).await?;
        }
    }
    Ok(())
}

/// Publishes the applied changes with this size. There is one attempt, in place of the inode that the container was
/// opened with or published last.
async fn flush(container: &mut Container, size_bytes: u64) -> io::Result<()> {
    bare::check_number_left(container)?;
    container.inode_mut().set_size(size_bytes as usize);
    let lock = container.flush_lock().await;
    let flushed = container.flush_process().await;
    container.flush_unlock(lock);
    flushed.map(drop)
}
