//! Completes partly written blocks with published bytes, because only whole blocks are published.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;

use futures::future::select;
use futures::{StreamExt, TryStreamExt};
use log::info;
use tokio::sync::oneshot;

use crate::base::error::{ErrorKind, VolumeError};
use crate::base::geometry::BlockIndex;
use crate::engine::Engine;
use crate::write_buffer::overlay::{Frozen, Overlay, PartialBlock};

/// The highest number of reads in flight at once ...
const READS_IN_FLIGHT: u64 = 64;
/// ... which is lower for large blocks: if each were read by itself, their reads together may take this much memory.
const BYTES_IN_FLIGHT: u64 = 16 << 20;
/// A block of the active generation is completed ahead of its publish once it has stayed partly written for one to two
/// of these periods. A block that a sequential stream writes soon becomes whole without that.
const SETTLED_AFTER: Duration = Duration::from_millis(100);

/// Reads the missing bytes of a frozen generation's partly written blocks. Calls `all_begun` once the last read has
/// begun.
///
/// Missing bytes that are damaged where they are stored are taken from what was written since, if that covers them:
/// a client heals a block by writing all of it, and not before that.
///
/// # Errors
/// When a read fails. The other blocks are completed if it fails for damage.
pub(crate) async fn complete_partial_blocks(
    engine: &dyn Engine,
    overlay: &Overlay,
    frozen: &Frozen,
    all_begun: impl FnOnce() + Send,
) -> Result<(), VolumeError> {
    let partial = frozen.with(|g| g.partial_blocks());
    let complete = |block, in_block, bytes: &[u8]| frozen.complete(block, in_block, bytes);
    match read_gaps(engine, partial, complete, all_begun).await {
        Err(e) if is_damage(&e) => complete_beside_damage(engine, overlay, frozen).await,
        done => done,
    }
}

fn is_damage(e: &VolumeError) -> bool {
    matches!(e.kind(), ErrorKind::Corrupt | ErrorKind::NotFound)
}

/// Completes block by block, those with damage too where newer writes hold what is missing.
async fn complete_beside_damage(
    engine: &dyn Engine,
    overlay: &Overlay,
    frozen: &Frozen,
) -> Result<(), VolumeError> {
    let geometry = engine.geometry();
    let block_size = u64::from(geometry.block_size());
    // Completes one, and tells if it is left unreadable.
    let complete = |(block, gap): PartialBlock| async move {
        let start = block.0 * block_size + u64::from(gap.start);
        let mut bytes = vec![0; gap.len()];
        let mut take = |_, read: &[u8]| bytes.copy_from_slice(read);
        let missing = start..start + gap.len() as u64;
        match engine.read_near(std::slice::from_ref(&missing), &mut take).await {
            Ok(()) => {}
            Err(e) if !is_damage(&e) => return Err(e),
            Err(_) if overlay.read(start, &mut bytes).is_empty() => {
                info!(
                    "block {} of the volume was unreadable, and is whole again: all of it was written anew",
                    block.0
                );
            }
            Err(e) => return Ok(Some((block, e))),
        }
        frozen.complete(block, gap.start, &bytes);
        Ok(None)
    };
    let partial = frozen.with(|g| g.partial_blocks());
    let mut completed = futures::stream::iter(partial)
        .map(complete)
        .buffer_unordered(in_flight(block_size));
    let mut unreadable = None;
    while let Some(left) = completed.try_next().await? {
        unreadable = unreadable.or(left);
    }
    match unreadable {
        None => Ok(()),
        Some((block, source)) => Err(VolumeError::PartOfDamage {
            offset_bytes: block.0 * block_size,
            len_bytes: u64::from(geometry.block_len(block)),
            source: Box::new(source),
        }),
    }
}

/// Reads that may be under way at once.
fn in_flight(block_size_bytes: u64) -> usize {
    (BYTES_IN_FLIGHT / block_size_bytes).clamp(1, READS_IN_FLIGHT) as usize
}

/// Completes blocks of the active generation, so that its own publish finds less to do. Starts reading at `may_read`,
/// when the publish of the frozen generation needs the connection for its upload only. Goes on until it is dropped or a
/// read fails; the publish then completes the rest, and reports what is wrong.
pub(super) async fn complete_ahead(engine: &dyn Engine, overlay: &Overlay, may_read: oneshot::Receiver<()>) {
    let mut settling = Settling::default();
    let watch = async {
        loop {
            settling.look_again(overlay).await;
        }
    };
    select(pin!(watch), may_read).await;
    loop {
        let (generation, settled) = (settling.generation, std::mem::take(&mut settling.settled));
        let complete = |block, in_block, bytes: &[u8]| overlay.complete(generation, block, in_block, bytes);
        if read_gaps(engine, settled, complete, || {}).await.is_err() {
            return;
        }
        settling.look_again(overlay).await;
    }
}

/// The blocks of the active generation that were partly written at each of the last two checks.
#[derive(Default)]
struct Settling {
    generation: u64,
    seen: BTreeSet<BlockIndex>,
    settled: Vec<PartialBlock>,
}

impl Settling {
    async fn look_again(&mut self, overlay: &Overlay) {
        tokio::time::sleep(SETTLED_AFTER).await;
        let (generation, mut partial) = overlay.partial_blocks();
        let seen = partial.iter().map(|(block, _)| *block).collect();
        let before = std::mem::replace(&mut self.seen, seen);
        let is_same = std::mem::replace(&mut self.generation, generation) == generation;
        partial.retain(|(block, _)| is_same && before.contains(block));
        self.settled = partial;
    }
}

/// Reads the gaps from the published state, many at once, and calls `complete` with each. Calls `all_begun` once the
/// last read has begun.
async fn read_gaps(
    engine: &dyn Engine,
    partial: Vec<PartialBlock>,
    complete: impl Fn(BlockIndex, u32, &[u8]) + Sync,
    all_begun: impl FnOnce() + Send,
) -> Result<(), VolumeError> {
    let block_size = u64::from(engine.geometry().block_size());
    let in_volume = |(block, gap): PartialBlock| {
        let start = block.0 * block_size;
        start + u64::from(gap.start)..start + u64::from(gap.end)
    };
    let groups = engine.grouped(partial.into_iter().map(in_volume).collect());
    let complete = &complete;
    let mut all_begun = Some(all_begun);
    let at_the_end = std::iter::from_fn(move || {
        if let Some(all_begun) = all_begun.take() {
            all_begun();
        }
        None
    });
    futures::stream::iter(groups.into_iter().chain(at_the_end))
        .map(|ranges| async move {
            let mut each = |number: usize, bytes: &[u8]| {
                let start = ranges[number].start;
                complete(BlockIndex(start / block_size), (start % block_size) as u32, bytes);
            };
            engine.read_near(&ranges, &mut each).await
        })
        .buffer_unordered(in_flight(block_size))
        .try_collect()
        .await
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use futures::future::BoxFuture;
    use tokio::time::timeout;

    use super::*;
    use crate::base::geometry::Geometry;
    use crate::engine::Beside;
    use crate::testing::memory_engine::MemoryEngine;

    const BLOCK: u64 = 65536;

    /// A volume whose first blocks are full of sevens, and an overlay on top of it.
    async fn sevens() -> (MemoryEngine, Overlay) {
        let geometry = Geometry::new(64 * BLOCK, BLOCK as u32);
        let (engine, overlay) = (MemoryEngine::new(geometry), Overlay::new(geometry));
        overlay.write(0, &vec![7; 8 * BLOCK as usize]);
        let published = engine.publish(overlay.freeze(), Beside::default()).await;
        published.expect("it is whole");
        overlay.drop_frozen();
        (engine, overlay)
    }

    /// Three checks of the blocks are over. No block is read before the sender allows it.
    async fn watching<'a>(
        engine: &'a MemoryEngine,
        overlay: &'a Overlay,
    ) -> (oneshot::Sender<()>, BoxFuture<'a, ()>) {
        let (may, may_read) = oneshot::channel();
        let mut ahead = complete_ahead(engine, overlay, may_read).boxed();
        assert!(timeout(SETTLED_AFTER * 7 / 2, &mut ahead).await.is_err());
        (may, ahead)
    }

    fn partial(overlay: &Overlay) -> Vec<u64> {
        let (_, partial) = overlay.partial_blocks();
        partial.into_iter().map(|(block, _)| block.0).collect()
    }

    #[tokio::test]
    async fn it_is_said_when_the_last_read_has_begun_and_also_when_there_is_none() {
        let (engine, overlay) = sevens().await;
        for written in [None, Some(3)] {
            if let Some(block) = written {
                overlay.write(block * BLOCK + 100, b"new");
            }
            let frozen = overlay.freeze();
            let mut times = 0;
            let done = complete_partial_blocks(&engine, &overlay, &frozen, || times += 1).await;
            done.expect("it reads");
            assert_eq!(times, 1);
            assert!(frozen.with(|g| g.partial_blocks().is_empty()));
            overlay.drop_frozen();
        }
    }

    #[tokio::test]
    async fn a_damaged_block_waits_until_all_of_it_is_written_anew() {
        let (engine, overlay) = sevens().await;
        overlay.write(BLOCK + 100, b"part");
        overlay.write(3 * BLOCK + 100, b"part");
        let frozen = overlay.freeze();
        engine.damage(1);
        let complete = async || complete_partial_blocks(&engine, &overlay, &frozen, || {}).await;
        let e = complete().await.expect_err("it is damaged");
        assert!(e.to_string().contains("the 65536 bytes at 65536"), "{e}");
        let left = || frozen.with(|g| g.partial_blocks());
        assert_eq!(left().len(), 1, "the other block is complete");
        // Half of what is missing heals nothing.
        overlay.write(BLOCK, &[9; 50]);
        complete().await.expect_err("it is damaged still");
        assert_eq!(left().len(), 1);
        overlay.zero(BLOCK, 200);
        overlay.write(BLOCK + 200, &[9; BLOCK as usize - 200]);
        complete().await.expect("all of it was written");
        let published = engine.publish(frozen.clone(), Beside::default()).await;
        published.expect("it is whole");
        overlay.drop_frozen();
        let mut bytes = vec![1; BLOCK as usize];
        engine.read(BLOCK, &mut bytes).await.expect("it is healed");
        assert_eq!(bytes[..104], [&[0; 100][..], b"part"].concat());
        assert_eq!((bytes[150], bytes[250]), (0, 9));
    }

    #[tokio::test(start_paused = true)]
    async fn what_settled_while_nothing_might_be_read_is_read_at_once() {
        let (engine, overlay) = sevens().await;
        overlay.write(BLOCK + 100, b"new");
        let (may, mut ahead) = watching(&engine, &overlay).await;
        // The block was written since the last check, so its stream may still go on.
        overlay.write(5 * BLOCK + 100, b"new");
        assert_eq!(partial(&overlay), [1, 5], "nothing was read yet");
        may.send(()).expect("somebody waits");
        assert!((&mut ahead).now_or_never().is_none());
        assert_eq!(partial(&overlay), [5]);
        let mut bytes = [0; 105];
        assert!(overlay.read(BLOCK, &mut bytes).is_empty());
        assert_eq!(bytes[98..], *b"\x07\x07new\x07\x07");
        assert!(timeout(SETTLED_AFTER * 3 / 2, &mut ahead).await.is_err());
        assert_eq!(partial(&overlay), [5], "looked at once");
        assert!(timeout(SETTLED_AFTER, &mut ahead).await.is_err());
        assert!(partial(&overlay).is_empty(), "looked at twice");
    }

    #[tokio::test(start_paused = true)]
    async fn what_settled_in_a_generation_frozen_since_is_completed_there_or_not_at_all() {
        let (engine, overlay) = sevens().await;
        overlay.write(BLOCK + 100, b"old");
        let (may, mut ahead) = watching(&engine, &overlay).await;
        let frozen = overlay.freeze();
        overlay.write(BLOCK + 200, b"new");
        may.send(()).expect("somebody waits");
        assert!(timeout(4 * SETTLED_AFTER, &mut ahead).await.is_err());
        assert!(frozen.with(|g| g.partial_blocks().is_empty()));
        assert!(
            partial(&overlay).is_empty(),
            "left out: a frozen generation holds the block"
        );
        let mut missing = [0; 203];
        assert_eq!(overlay.read(BLOCK, &mut missing), []);
        assert_eq!(
            (&missing[98..105], &missing[198..203]),
            (&b"\x07\x07old\x07\x07"[..], &b"\x07\x07new"[..])
        );
    }
}
