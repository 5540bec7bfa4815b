//! Published data: the container behind a volume.
//!
//! [`Engine`] is all the rest of the crate knows of it. [`hyper_engine`] is the real one; tests have a model kept in memory, and
//! one that wraps any and makes it fail.

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
pub(crate) mod resize;
pub(crate) mod staging;

pub(crate) use staging::{checkpoint_stored, state_stored};

/// Whose container it is. *Adopt, then check*: whoever reads the stored state to publish upon it asks afterwards, and goes
/// on only when the answer is yes; `lease` says why that is enough.
#[async_trait]
pub trait Ownership: Send + Sync {
    /// Whether this process is the volume's owner still.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when another one is; a store's failure says nothing.
    async fn check(&self) -> Result<(), VolumeError>;
}

/// Of a container that nobody else writes to, or that is opened read-only.
#[derive(Debug, Clone, Copy)]
pub struct SoleOwner;

#[async_trait]
impl Ownership for SoleOwner {
    async fn check(&self) -> Result<(), VolumeError> {
        Ok(())
    }
}

/// What a publish takes of memory besides its generation, while another is under way; one alone takes as much.
pub(crate) const BESIDE_BYTES: u64 = container::IN_FLIGHT_BYTES;

/// Sent to once the next publish may begin beside this one; dropped when it has to wait for this one's end.
pub type NextMayBegin = oneshot::Sender<()>;

/// How a publish and its neighbours go on beside each other. The default is one that is alone.
#[derive(Debug, Default)]
pub struct Beside {
    /// The publish before, while it is under way. No checkpoint is made before this resolves; without `true` none is made
    /// at all, and this publish fails.
    pub before: Option<oneshot::Receiver<bool>>,
    /// The publish after.
    pub next: Option<NextMayBegin>,
}

impl Beside {
    /// Resolves once a checkpoint may be made.
    ///
    /// # Errors
    /// When the publish before failed.
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
/// A publish begins after the end of the one before it, or once that one has sent to its [`NextMayBegin`]; at most two
/// run at a time, and one fails when the one before it does. Reads run at any time and see the state before or after a
/// publish, never a mixture inside one block.
#[async_trait]
pub trait Engine: Send + Sync + 'static {
    /// Size and block size.
    fn geometry(&self) -> Geometry;

    /// Fills `out` with the published bytes at `offset_bytes`; what was never written is zero.
    async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError>;

    /// These ranges, none longer than a block, in groups that [`Engine::read_near`] is best asked for: what is stored
    /// near each other. A hint, out of date at the next publish.
    fn grouped(&self, ranges: Vec<Range<u64>>) -> Vec<Vec<Range<u64>>> {
        ranges.into_iter().map(|range| vec![range]).collect()
    }

    /// Hands over the published bytes of each of these ranges, with its number among them; nobody waits for them. After
    /// an error some may be handed over.
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

    /// Fills `out` if that takes neither I/O nor waiting; otherwise returns `false` and may have filled a part.
    fn read_at_once(&self, _offset_bytes: u64, _out: &mut [u8]) -> bool {
        false
    }

    /// A client reads these bytes: for reading ahead.
    fn note_read(&self, _offset_bytes: u64, _len_bytes: u64) {}

    /// Brings these bytes near, or as many of them as there is room for.
    async fn prefetch(&self, _offset_bytes: u64, _len_bytes: u64) -> Result<(), VolumeError> {
        Ok(())
    }

    /// Which of `blocks` hold data (`true`) and which read as zeros (`false`): contiguous runs from `blocks.start`,
    /// at least one block, perhaps not the whole range when finding out more would take long.
    async fn block_runs(&self, blocks: Range<u64>) -> Result<Vec<(Range<u64>, bool)>, VolumeError>;

    /// As [`Engine::block_runs`], of the whole range, if that takes neither I/O nor waiting.
    fn block_runs_at_once(&self, _blocks: Range<u64>) -> Option<Vec<(Range<u64>, bool)>> {
        None
    }

    /// Publishes a generation whose blocks are all complete. `None` when it changes nothing and nothing was sent.
    ///
    /// # Errors
    /// After any error it is unknown what was stored; [`Engine::recover`] must succeed before the next publish, and is
    /// called only after the end of every publish. [`VolumeError::Fenced`] means that another writer published.
    async fn publish(&self, frozen: Arc<Frozen>, beside: Beside) -> Result<Option<Checkpoint>, VolumeError>;

    /// Whether writes may still be taken in: they could not be published for ever.
    ///
    /// # Errors
    /// [`VolumeError::CountersExhausted`] when a counter of the container is near its end.
    fn check_write(&self) -> Result<(), VolumeError> {
        Ok(())
    }

    /// As [`Engine::check_write`], for publishing what was taken in.
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

    /// Goes back to what is stored, after proving that it is this writer's own.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when it is not.
    async fn recover(&self) -> Result<(), VolumeError>;

    /// Stops the engine and joins its threads. Nothing is published.
    async fn close(&self);

    /// Ends what [`Engine::close`] could not wait for, so that nothing of the engine waits on the runtime when that ends. What
    /// was being published may or may not reach the store.
    async fn abandon(&self) {}
}
