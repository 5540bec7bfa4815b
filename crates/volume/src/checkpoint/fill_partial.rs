//! Completes partly written blocks with published bytes, because only whole blocks are published.

use std::collections::BTreeSet;
use std::pin::pin;
use std::time::Duration;

use futures::future::select;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::oneshot;

use crate::base::error::VolumeError;
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
/// # Errors
/// When a read fails.
pub(crate) async fn complete_partial_blocks(
    engine: &dyn Engine,
    frozen: &Frozen,
    all_begun: impl FnOnce() + Send,
) -> Result<(), VolumeError> {
    let partial = frozen.with(|g| g.partial_blocks());
    let complete = |block, in_block, bytes: &[u8]| frozen.complete(block, in_block, bytes);
    read_gaps(engine, partial, complete, all_begun).await
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
    let in_flight = (BYTES_IN_FLIGHT / block_size).clamp(1, READS_IN_FLIGHT);
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
        .buffer_unordered(in_flight as usize)
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
            let done = complete_partial_blocks(&engine, &frozen, || times += 1).await;
            done.expect("it reads");
            assert_eq!(times, 1);
            assert!(frozen.with(|g| g.partial_blocks().is_empty()));
            overlay.drop_frozen();
        }
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
