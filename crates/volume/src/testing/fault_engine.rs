//! An engine that fails on demand, around any other.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;

use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::VolumeError;
use crate::base::geometry::Geometry;
use crate::engine::{Beside, Engine};
use crate::write_buffer::overlay::Frozen;

/// What happens to one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It works.
    None,
    /// It fails and changes nothing.
    Refused,
    /// It is carried out and then reported as failed: the answer was lost.
    AnswerLost,
    /// Another writer is found to have published.
    Fenced,
}

/// Wraps an engine; each publish and recovery takes the next fault of its queue, reads fail while told to.
pub struct FaultEngine<E> {
    inner: E,
    publishes: Mutex<VecDeque<Fault>>,
    recoveries: Mutex<VecDeque<Fault>>,
    failing_reads: Mutex<u32>,
    damaged_reads: Mutex<u32>,
    /// Whether a failed publish has not been recovered from: the next publish would be a defect of the caller.
    is_broken: Mutex<bool>,
    /// Whether this process is still there, as far as the container is concerned.
    is_alive: tokio::sync::Mutex<bool>,
}

impl<E: Engine> FaultEngine<E> {
    /// Wraps `inner`; no faults yet.
    pub fn new(inner: E) -> Self {
        Self {
            inner,
            publishes: Mutex::default(),
            recoveries: Mutex::default(),
            failing_reads: Mutex::default(),
            damaged_reads: Mutex::default(),
            is_broken: Mutex::default(),
            is_alive: tokio::sync::Mutex::new(true),
        }
    }

    /// The next publishes meet these faults, in order; after them all is well.
    pub fn fail_publishes(&self, faults: impl IntoIterator<Item = Fault>) {
        self.publishes.lock().extend(faults);
    }

    /// The next recoveries meet these faults, in order.
    pub fn fail_recoveries(&self, faults: impl IntoIterator<Item = Fault>) {
        self.recoveries.lock().extend(faults);
    }

    /// The next `count` reads fail.
    pub fn fail_reads(&self, count: u32) {
        *self.failing_reads.lock() = count;
    }

    /// The next `count` reads find damage.
    pub fn damage_reads(&self, count: u32) {
        *self.damaged_reads.lock() = count;
    }

    /// Once this returns nothing reaches the inner engine any more: the process was killed, at this moment.
    pub async fn kill(&self) {
        *self.is_alive.lock().await = false;
    }

    fn refused(operation: &str) -> VolumeError {
        VolumeError::engine(operation, std::io::Error::other("injected fault"))
    }
}

fn take_one(left: &Mutex<u32>) -> bool {
    let mut left = left.lock();
    let is_left = *left > 0;
    *left = left.saturating_sub(1);
    is_left
}

#[async_trait]
impl<E: Engine> Engine for FaultEngine<E> {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        if take_one(&self.failing_reads) {
            return Err(Self::refused("read"));
        }
        if take_one(&self.damaged_reads) {
            return Err(VolumeError::Corrupt {
                what: "an object".into(),
                reason: "injected damage".into(),
            });
        }
        self.inner.read(offset_bytes, out).await
    }

    fn note_read(&self, offset_bytes: u64, len_bytes: u64) {
        self.inner.note_read(offset_bytes, len_bytes);
    }

    async fn prefetch(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), VolumeError> {
        self.inner.prefetch(offset_bytes, len_bytes).await
    }

    async fn block_runs(&self, blocks: Range<u64>) -> Result<Vec<(Range<u64>, bool)>, VolumeError> {
        self.inner.block_runs(blocks).await
    }

    async fn publish(
        &self,
        frozen: Arc<Frozen>,
        mut beside: Beside,
    ) -> Result<Option<Checkpoint>, VolumeError> {
        // Whatever comes, the next one may have begun.
        if let Some(next) = beside.next.take() {
            let _ = next.send(());
        }
        Beside::wait(beside.before.take()).await?;
        let is_alive = self.is_alive.lock().await;
        if !*is_alive {
            *self.is_broken.lock() = true;
            return Err(Self::refused("publish (dead)"));
        }
        assert!(
            !*self.is_broken.lock(),
            "published after a failure without recovering first"
        );
        let fault = self.publishes.lock().pop_front().unwrap_or(Fault::None);
        if fault != Fault::None {
            *self.is_broken.lock() = true;
        }
        match fault {
            Fault::None => self.inner.publish(frozen, beside).await,
            Fault::Refused => Err(Self::refused("publish")),
            Fault::AnswerLost => {
                self.inner.publish(frozen, beside).await?;
                Err(Self::refused("publish (applied)"))
            }
            Fault::Fenced => Err(VolumeError::Fenced {
                reason: "injected".into(),
            }),
        }
    }

    async fn recover(&self) -> Result<(), VolumeError> {
        let fault = self.recoveries.lock().pop_front().unwrap_or(Fault::None);
        match fault {
            Fault::None => {
                self.inner.recover().await?;
                *self.is_broken.lock() = false;
                Ok(())
            }
            Fault::Fenced => Err(VolumeError::Fenced {
                reason: "injected".into(),
            }),
            Fault::Refused | Fault::AnswerLost => Err(Self::refused("recover")),
        }
    }

    async fn close(&self) -> bool {
        self.inner.close().await
    }
}
