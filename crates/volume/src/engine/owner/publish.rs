//! How the owner thread publishes: a large stream of data may overlap the previous publish, everything else is
//! published alone.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use futures::FutureExt;
use hyperfile::file::HyperTrait;
use hyperfile::meta_format::BlockPtrFormat;
use log::debug;

use super::in_flight::{self, Predecessor, PublishInFlight};
use super::upload_source::FrozenSource;
use super::{Changed, Owner, Reply, UnderWay};
use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::VolumeError;
use crate::base::geometry::BlockIndex;
use crate::engine::container::INDEX_NODES;
use crate::engine::{Beside, placement};
use crate::format::stored_state::{Root, StateId};
use crate::index::location_map::Place;
use crate::index::walk::Walk;
use crate::write_buffer::overlay::Frozen;

/// Blocks that one call of the engine zeroes.
const ZERO_CALL_BLOCKS: u64 = 64 * 1024;
/// Index nodes that publishes in flight may keep in memory: 32 MiB, for at least 2 GiB of data in blocks of 4 KiB.
/// Beyond that, the next publish waits until none is in flight, and the engine then drops the nodes that it need not
/// keep.
const OVERLAP_NODES_MAX: u64 = 4 * INDEX_NODES as u64;
/// Entries of a half-full index node.
const NODE_ENTRIES_MIN: u64 = 127;
/// A smaller publish ends before the next one could gain anything by overlapping it.
const OVERLAP_BYTES_MIN: u64 = 4 << 20;
/// The most runs of blocks in a publish that overlaps another. Each run may change nodes of the index, and those stay
/// in memory until no publish is in flight.
const OVERLAP_RUNS_MAX: usize = 1024;

impl Owner {
    /// Publishes a generation, and replies once that has ended, after all earlier publishes. Returns before the end
    /// when the next publish may begin meanwhile.
    pub(super) async fn publish(
        &mut self,
        frozen: &Arc<Frozen>,
        beside: Beside,
        reply: Reply<Option<Checkpoint>>,
    ) {
        // Checked before anything is applied, because the engine would mask a number that is too large.
        if let Err(e) = self.check_numbers() {
            self.land_all().await;
            let _ = reply.send(Err(e));
            return;
        }
        if let Some(data_runs) = self.stream_runs(frozen) {
            let nodes: u64 = data_runs
                .iter()
                .map(|run| 2 + (run.end - run.start) / NODE_ENTRIES_MIN)
                .sum();
            if self.nodes_kept + nodes > OVERLAP_NODES_MAX {
                self.land_all().await;
                if let Err(e) = self.check_recovered() {
                    let _ = reply.send(Err(e));
                    return;
                }
            }
            self.nodes_kept += nodes;
            let begun = self.begin(frozen, beside, data_runs);
            let begun = AssertUnwindSafe(begun).catch_unwind().await;
            match self.after(begun) {
                Ok((publish, state_id, changed, root)) => self.under_way.push_back(UnderWay {
                    publish,
                    state_id,
                    changed,
                    root,
                    reply,
                }),
                Err(e) => {
                    self.must_recover = true;
                    // Replies are sent in the order of the publishes.
                    self.land_all().await;
                    let _ = reply.send(Err(e));
                }
            }
            return;
        }
        // The next publish waits for the end of this one.
        drop(beside.next);
        self.land_all().await;
        let published = async {
            Beside::wait(beside.before).await?;
            self.check_recovered()?;
            self.publish_alone(frozen).await
        };
        let published = AssertUnwindSafe(published).catch_unwind().await;
        let published = self.after(published);
        self.must_recover |= published.is_err();
        let _ = reply.send(published);
    }

    /// Whether there are checkpoint numbers left for a publish, those under way counted.
    pub(super) fn check_numbers(&self) -> Result<(), VolumeError> {
        if let Some(container) = &self.container {
            self.config
                .numbers
                .note(container.inode().get_last_seq().as_cno());
        }
        self.config.numbers.check_publish()
    }

    /// A failed publish leaves changes in the container that nobody may publish by accident.
    pub(super) fn check_recovered(&self) -> Result<(), VolumeError> {
        if !self.must_recover {
            return Ok(());
        }
        let reason =
            "the publish before it failed, and the container did not go back to what is stored since";
        Err(VolumeError::engine(
            "publishing a checkpoint",
            std::io::Error::other(reason),
        ))
    }

    /// The blocks of a generation that may overlap another publish and gains by it: it holds much data, in whole blocks
    /// and few runs, and nothing else. `None` for any other generation.
    fn stream_runs(&self, frozen: &Frozen) -> Option<Vec<Range<u64>>> {
        let container = self.container.as_ref().filter(|_| !self.must_recover)?;
        if container.config().meta.block_ptr_format != BlockPtrFormat::PartedSegment
            || container.base_compaction_kept().is_some()
        {
            return None;
        }
        let bs = u64::from(self.geometry.now().block_size());
        let data_runs = frozen.with(|g| {
            let is_stream = g.is_streaming() && g.zero_runs().is_empty();
            is_stream.then(|| g.data_runs())
        })?;
        let blocks: u64 = data_runs.iter().map(|run| run.end - run.start).sum();
        // The engine stores an incomplete last block by value.
        let is_whole = data_runs
            .last()
            .is_some_and(|run| run.end <= self.geometry.now().size_bytes() / bs);
        (is_whole && blocks * bs >= OVERLAP_BYTES_MIN && data_runs.len() <= OVERLAP_RUNS_MAX)
            .then_some(data_runs)
    }

    /// Applies a generation of whole blocks, gives the blocks their places, and begins to store them. The places and
    /// the root are captured here, because the container may be ahead by the time they are entered.
    async fn begin(
        &mut self,
        frozen: &Arc<Frozen>,
        beside: Beside,
        data_runs: Vec<Range<u64>>,
    ) -> Result<(PublishInFlight, StateId, Changed, Root), VolumeError> {
        let started = Instant::now();
        let len_bytes = self.len_bytes(&data_runs);
        let source = FrozenSource::new(frozen.clone(), 0, len_bytes, beside.next);
        self.write_refs(frozen, source, &data_runs).await?;
        let applied = started.elapsed();
        let laid = in_flight::lay_out(self.container()?).await;
        let laid = laid.map_err(|e| VolumeError::engine("laying out a checkpoint", e))?;
        self.release_source()?;
        let changed = self.places(data_runs).await?;
        let (state_id, root) = (laid.state_id(), laid.root());
        let predecessor = match self.under_way.back_mut() {
            Some(before) => before.publish.as_predecessor(),
            None => Predecessor::Stored(self.container()?.inode().get_ondisk_state().clone()),
        };
        debug!(
            "publish of {len_bytes} bytes: applied in {applied:?}, laid out and located in {:?}",
            started.elapsed() - applied
        );
        self.attempted.push(state_id);
        // Nothing can fail from here on, so every publish in flight is known to the owner.
        Ok((
            PublishInFlight::begin(laid, predecessor, beside.before),
            state_id,
            changed,
            root,
        ))
    }

    /// Releases the generation. If it were kept until the next publish, an idle volume would hold half its write
    /// buffer.
    fn release_source(&mut self) -> Result<(), VolumeError> {
        self.container()?
            .set_block_source(None)
            .map_err(|e| VolumeError::engine("releasing the source", e))
    }

    /// Publishes a generation of any kind while no other publish is in flight.
    async fn publish_alone(&mut self, frozen: &Arc<Frozen>) -> Result<Option<Checkpoint>, VolumeError> {
        let started = Instant::now();
        let (zero_runs, data_runs) = frozen.with(|g| (g.zero_runs(), g.data_runs()));
        let mut newest = None;
        let (mut zeroed, mut steps) = (0, 0);
        let mut walk = self.walk()?;
        for run in &zero_runs {
            let mut at = run.start;
            while at < run.end {
                let failed = |e| VolumeError::engine(format!("looking up blocks {at}..{}", run.end), e);
                let part = walk.next(at..run.end).await.map_err(failed)?;
                at = part.end;
                // An attempt that follows a partly published one finds the same entries.
                steps += part.entries.len() as u64;
                frozen.progress().reached(steps);
                for blocks in part.mapped() {
                    self.zero(&blocks).await?;
                    zeroed += blocks.end - blocks.start;
                }
                if zeroed >= self.config.zeroed_blocks_max {
                    self.check_numbers()?;
                    newest = Some(self.flush().await?);
                    zeroed = 0;
                    walk = self.walk()?;
                }
            }
        }
        if !data_runs.is_empty() {
            let source = FrozenSource::new(frozen.clone(), steps, self.len_bytes(&data_runs), None);
            self.write_refs(frozen, source, &data_runs).await?;
        }
        let applied = started.elapsed();
        if zeroed > 0 || !data_runs.is_empty() {
            newest = Some(self.flush().await?);
        }
        self.release_source()?;
        let flushed = started.elapsed();
        let mut changed: Changed = zero_runs
            .into_iter()
            .map(|blocks| (blocks, Some(Place::Nothing)))
            .collect();
        changed.extend(self.places(data_runs).await?);
        let root = Root(self.container()?.bmap_get_raw());
        self.enter(changed, root);
        debug!(
            "publish of {} bytes: applied in {applied:?}, stored in {:?}, located in {:?}",
            frozen.with(|g| g.buffered_bytes()),
            flushed - applied,
            started.elapsed() - flushed
        );
        Ok(newest)
    }

    fn len_bytes(&self, runs: &[Range<u64>]) -> u64 {
        let len = |run: &Range<u64>| placement::bytes_of(self.geometry.now(), run).1 as u64;
        runs.iter().map(len).sum()
    }

    /// Begins a walk over the published index.
    fn walk(&mut self) -> Result<Walk, VolumeError> {
        Walk::of_container(self.container()?).map_err(|e| VolumeError::engine("reading the index", e))
    }

    /// Zeroes blocks that the container maps.
    async fn zero(&mut self, blocks: &Range<u64>) -> Result<(), VolumeError> {
        let mut from = blocks.start;
        while from < blocks.end {
            let until = blocks.end.min(from + ZERO_CALL_BLOCKS);
            // Whole blocks, the last one too: of a part the engine would read the rest, and store the zeros.
            let bs = u64::from(self.geometry.now().block_size());
            let (start, len) = ((from * bs) as usize, ((until - from) * bs) as usize);
            let zero = self.container()?.write_zero(start, len).await;
            zero.map_err(|e| VolumeError::engine(format!("zeroing {len} bytes at {start}"), e))?;
            from = until;
        }
        self.keep_size()
    }

    /// Puts the end of the volume back to where it is, after a whole block was written across it.
    fn keep_size(&mut self) -> Result<(), VolumeError> {
        let size = self.geometry.now().size_bytes() as usize;
        let inode = self.container()?.inode_mut();
        if inode.size() != size {
            inode.set_size(size);
        }
        Ok(())
    }

    async fn write_refs(
        &mut self,
        frozen: &Arc<Frozen>,
        source: FrozenSource,
        data_runs: &[Range<u64>],
    ) -> Result<(), VolumeError> {
        let bs = u64::from(self.geometry.now().block_size());
        let whole_end = self.geometry.now().size_bytes() / bs;
        let container = self.container()?;
        container
            .set_block_source(Some(Arc::new(source)))
            .map_err(|e| VolumeError::engine("setting the source", e))?;
        for run in data_runs {
            let whole = run.start..run.end.min(whole_end);
            if !whole.is_empty() {
                let (start, len) = (
                    (whole.start * bs) as usize,
                    ((whole.end - whole.start) * bs) as usize,
                );
                let written = self.container()?.write_ref(start, len).await;
                written.map_err(|e| VolumeError::engine(format!("writing {len} bytes at {start}"), e))?;
            }
            if run.end > whole_end {
                // As a whole block, zeros past the end: of a part the engine would read the rest, and not from where a clone
                // has it.
                let len = self.geometry.now().block_len(BlockIndex(whole_end)) as usize;
                let start = whole_end * bs;
                let mut bytes = vec![0; bs as usize];
                if !frozen.with(|g| g.copy_complete(start, &mut bytes[..len])) {
                    return Err(VolumeError::Internal("the last block is incomplete".into()));
                }
                let written = self.container()?.write(start as usize, &bytes).await;
                written.map_err(|e| VolumeError::engine(format!("writing {len} bytes at {start}"), e))?;
                self.keep_size()?;
            }
        }
        Ok(())
    }

    /// Publishes the applied changes in one attempt, in place of the inode that this owner opened or stored last.
    ///
    /// Not with `HyperTrait::flush`: after a 429 or a 5xx that reads the inode anew, takes another writer's for its base,
    /// and publishes over it without asking for the lease (`refresh_bmap` in hyperfile 0.14.0). Here any failure is the
    /// caller's, who recovers: the lease first, then the stored state, then the generation again.
    pub(super) async fn flush(&mut self) -> Result<Checkpoint, VolumeError> {
        let attempted = StateId::of_container(self.container()?);
        // Noted before the publish, so that it is known even if the engine panics.
        self.attempted.push(attempted);
        let container = self.container()?;
        container.flush_timing_reset();
        HyperTrait::check_writable(container)
            .map_err(|e| VolumeError::engine("publishing a checkpoint", e))?;
        let lock = container.flush_lock().await;
        let flushed = container.flush_process().await;
        container.flush_unlock(lock);
        let took = container.flush_timing().snapshot();
        let segment = flushed.map_err(|e| VolumeError::engine("publishing a checkpoint", e))?;
        self.attempted.clear();
        self.published = attempted.at(segment.as_cno());
        debug!(
            "published checkpoint {}: laid out in {} ms, uploaded in {} ms, inode in {} ms",
            self.published.cno,
            took.build_segment_ns / 1_000_000,
            took.segment_done_ns / 1_000_000,
            took.flush_inode_ns / 1_000_000
        );
        let root = Root(self.container()?.bmap_get_raw());
        Ok(self.reported(root))
    }

    /// The places of the blocks that were placed last.
    async fn places(&mut self, data_runs: Vec<Range<u64>>) -> Result<Changed, VolumeError> {
        let bs = u64::from(self.geometry.now().block_size());
        let container = self.container()?;
        let mut places: Changed = Vec::new();
        for run in data_runs {
            match placement::places_of(container, bs, run.clone()).await {
                Ok(runs) => places.extend(runs.into_iter().map(|r| (r.blocks, Some(r.place)))),
                // The blocks are published all the same. Their places are looked up when they are needed.
                Err(e) => {
                    debug!(
                        "the places of {} blocks are not known yet: {e}",
                        run.end - run.start
                    );
                    places.push((run, None));
                }
            }
        }
        Ok(places)
    }
}

#[cfg(test)]
#[path = "publish_tests.rs"]
mod tests;
