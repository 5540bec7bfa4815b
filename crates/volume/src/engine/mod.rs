//! The published data of a volume: its container.
//!
//! The rest of the crate uses the container only through [`Engine`]. [`hyper_engine`] is the real implementation. Tests
//! have a model in memory, and a wrapper around any engine that makes it fail.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::oneshot;

use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::VolumeError;
use crate::base::geometry::Geometry;
use crate::index::relocation::{Applied, Relocation};
use crate::write_buffer::overlay::Frozen;

pub(crate) mod bare;
pub(crate) mod container;
pub(crate) mod copy;
pub(crate) mod fence;
pub(crate) mod guard;
pub mod hyper_engine;
pub mod limits;
mod owner;
pub(crate) mod parents;
pub(crate) mod past;
mod placement;
pub(crate) mod replica;
pub(crate) mod resize;
pub(crate) mod staging;

pub(crate) use staging::{checkpoint_stored, state_stored};

pub use crate::base::ownership::{Ownership, SoleOwner};

/// Memory that a publish takes besides its generation while it overlaps another. A publish alone takes as much.
pub(crate) const BESIDE_BYTES: u64 = container::IN_FLIGHT_BYTES;

/// Receives a message once the next publish may begin while this one is in flight. It is dropped when the next publish
/// must wait for the end of this one.
pub type NextMayBegin = oneshot::Sender<()>;

/// How a publish overlaps the previous and the next publish. The default is a publish that overlaps none.
#[derive(Debug, Default)]
pub struct Beside {
    /// The previous publish, while it is in flight. No checkpoint is made before this resolves. If it resolves to
    /// anything other than `true`, no checkpoint is made at all, and this publish fails.
    pub before: Option<oneshot::Receiver<bool>>,
    /// Tells when the next publish may begin.
    pub next: Option<NextMayBegin>,
}

impl Beside {
    /// Resolves once a checkpoint may be made.
    ///
    /// # Errors
    /// When the previous publish failed.
    pub async fn wait(before: Option<oneshot::Receiver<bool>>) -> Result<(), VolumeError> {
        let is_published = match before {
            Some(before) => before.await.unwrap_or(false),
            None => true,
        };
        let reason = "the checkpoint before this one was not published";
        is_published
            .then_some(())
            .ok_or_else(|| VolumeError::Internal(reason.into()))
    }
}

/// A checkpoint in which blocks have other places.
#[derive(Debug, Clone)]
pub struct Relocated {
    /// It.
    pub checkpoint: Checkpoint,
    /// What is at another place in it.
    pub applied: Applied,
}

/// The published state of one volume.
///
/// A publish begins after the end of the previous one, or once the previous one has sent to its [`NextMayBegin`]. At
/// most two publishes run at a time, and a publish fails when the previous one does. Reads run at any time. They see
/// the state before or after a publish, never a mixture inside one block.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// Size and block size of the volume.
    fn geometry(&self) -> Geometry;

    /// Fills `out` with the published bytes at `offset_bytes`. Bytes that were never written are zero.
    async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError>;

    /// Sorts these ranges, none longer than a block, into groups of ranges that are stored close together. One call of
    /// [`Engine::read_near`] is best given one group. The grouping is a hint, and outdated after the next publish.
    fn grouped(&self, ranges: Vec<Range<u64>>) -> Vec<Vec<Range<u64>>> {
        ranges.into_iter().map(|range| vec![range]).collect()
    }

    /// Reads the published bytes of each range, to complete blocks with them, and calls `each` with the range's index and its bytes.
    /// The reads have background priority. After an error `each` may have been called for some ranges.
    async fn read_near(
        &self,
        ranges: &[Range<u64>],
        each: &mut (dyn for<'b> FnMut(usize, &'b [u8]) + Send),
    ) -> Result<(), VolumeError> {
        for (number, range) in ranges.iter().enumerate() {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            self.read(range.start, &mut bytes).await?;
            each(number, &bytes);
        }
        Ok(())
    }

    /// Fills `out` if that needs neither I/O nor waiting. Otherwise returns `false`, and may have filled a part of
    /// `out`.
    fn read_at_once(&self, _offset_bytes: u64, _out: &mut [u8]) -> bool {
        false
    }

    /// Notes that a client reads these bytes, for the read-ahead.
    fn note_read(&self, _offset_bytes: u64, _len_bytes: u64) {}

    /// Brings these bytes into the cache, or as many of them as there is room for.
    async fn prefetch(&self, _offset_bytes: u64, _len_bytes: u64) -> Result<(), VolumeError> {
        Ok(())
    }

    /// Which of `blocks` hold data (`true`) and which read as zeros (`false`). The runs are contiguous from
    /// `blocks.start` and cover at least one block. They may end before `blocks.end` when finding out more would take
    /// long.
    async fn block_runs(&self, blocks: Range<u64>) -> Result<Vec<(Range<u64>, bool)>, VolumeError>;

    /// As [`Engine::block_runs`], for the whole range, if that needs neither I/O nor waiting.
    fn block_runs_at_once(&self, _blocks: Range<u64>) -> Option<Vec<(Range<u64>, bool)>> {
        None
    }

    /// Publishes a generation whose blocks are all complete. Returns `None` when it changes nothing and nothing was
    /// sent.
    ///
    /// # Errors
    /// After any error it is unknown what was stored. [`Engine::recover`] must then succeed before the next publish,
    /// and is called only after every publish has ended. [`VolumeError::Fenced`] means that another writer published.
    async fn publish(&self, frozen: Arc<Frozen>, beside: Beside) -> Result<Option<Checkpoint>, VolumeError>;

    /// Checks whether more writes may be accepted, which must then all be publishable.
    ///
    /// # Errors
    /// [`VolumeError::CountersExhausted`] when a counter of the container is near its end.
    fn check_write(&self) -> Result<(), VolumeError> {
        Ok(())
    }

    /// As [`Engine::check_write`], for publishing writes that were accepted already.
    ///
    /// # Errors
    /// As [`Engine::check_write`].
    fn check_publish(&self) -> Result<(), VolumeError> {
        Ok(())
    }

    /// Publishes a checkpoint in which each of these blocks that still has the place it was copied from has the place of the copy, and
    /// nothing else differs. Called as a publish is that is alone. `None` when nothing is to be changed any more.
    ///
    /// # Errors
    /// After any error the engine has gone back to what is stored, or the next publish fails and [`Engine::recover`] does that.
    async fn relocate(&self, _relocation: Arc<Relocation>) -> Result<Option<Relocated>, VolumeError> {
        Err(VolumeError::Internal("this engine relocates nothing".into()))
    }

    /// Publishes a checkpoint of this size, above the one that the volume has, in which nothing else differs. Called as a publish is that
    /// is alone. The volume ends at a block's border.
    ///
    /// # Errors
    /// As [`Engine::relocate`].
    async fn grow(&self, _size_bytes: u64) -> Result<Checkpoint, VolumeError> {
        Err(VolumeError::Internal("this engine does not grow".into()))
    }

    /// Goes back to what is stored, after proving that it is this writer's own.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when it did not.
    async fn recover(&self) -> Result<(), VolumeError>;

    /// Stops the engine and joins its threads. Nothing is published. Returns whether the outcome of all that it published is known:
    /// otherwise a request may still reach the store.
    async fn close(&self) -> bool;

    /// Ends everything that [`Engine::close`] could not wait for, so that the engine does not wait on the runtime when
    /// the runtime ends. A publish in flight may or may not reach the store.
    async fn abandon(&self) {}
}
