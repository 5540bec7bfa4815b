//! What is recorded of publishes and relocations, when a record fails.

use std::collections::VecDeque;
use std::ops::Range;

use async_trait::async_trait;

use super::*;
use crate::base::checkpoint_id::{CheckpointId, InodeCheck};
use crate::base::geometry::Geometry;
use crate::index::relocation::Applied;
use crate::testing::memory_engine::MemoryEngine;

const BLOCK: usize = 4096;

/// A container in which something can be relocated. A relocation has the next number.
struct Relocating(MemoryEngine, AtomicU64);

#[async_trait]
impl Engine for Relocating {
    fn geometry(&self) -> Geometry {
        self.0.geometry()
    }

    async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        self.0.read(offset_bytes, out).await
    }

    async fn block_runs(&self, blocks: Range<u64>) -> Result<Vec<(Range<u64>, bool)>, VolumeError> {
        self.0.block_runs(blocks).await
    }

    async fn publish(&self, frozen: Arc<Frozen>, beside: Beside) -> Result<Option<Checkpoint>, VolumeError> {
        let published = self.0.publish(frozen, beside).await?;
        Ok(published.map(|_| self.next()))
    }

    async fn relocate(&self, _: Arc<Relocation>) -> Result<Option<Relocated>, VolumeError> {
        Ok(Some(Relocated {
            checkpoint: self.next(),
            applied: Applied::default(),
        }))
    }

    async fn recover(&self) -> Result<(), VolumeError> {
        self.0.recover().await
    }

    async fn close(&self) -> bool {
        self.0.close().await
    }
}

impl Relocating {
    fn next(&self) -> Checkpoint {
        let cno = self.1.fetch_add(1, Ordering::SeqCst) + 1;
        Checkpoint {
            id: CheckpointId {
                cno,
                check: InodeCheck::from_bits(cno),
            },
            size_bytes: self.geometry().size_bytes(),
            published_ms: 1,
        }
    }
}

/// Records the generation of each checkpoint, or fails as often as it is told to.
#[derive(Default)]
struct Records {
    failures: Mutex<VecDeque<VolumeError>>,
    /// Number and generation.
    of: Mutex<Vec<(u64, u64)>>,
}

#[async_trait]
impl Recorder for Records {
    async fn published(&self, generation: u64, checkpoint: Option<Checkpoint>) -> Result<(), VolumeError> {
        if let Some(e) = self.failures.lock().pop_front() {
            return Err(e);
        }
        let number = checkpoint.map_or(0, |checkpoint| checkpoint.id.cno);
        self.of.lock().push((number, generation));
        Ok(())
    }
}

/// The record of a relocation has the generation of the one before. Were it made while that one has none, what is published would be
/// above the watermark that an opening finds, and the log replayed over later writes.
#[tokio::test]
async fn a_relocation_is_never_recorded_in_front_of_a_publish_that_it_holds() {
    let geometry = Geometry::new(64 * BLOCK as u64, BLOCK as u32);
    let engine = Arc::new(Relocating(MemoryEngine::new(geometry), AtomicU64::default()));
    let (records, overlay) = (Arc::<Records>::default(), Arc::new(Overlay::new(geometry)));
    let publisher = Publisher::new(engine, records.clone(), overlay.clone(), Metrics::default(), 5);
    let relocate = || publisher.relocate(Arc::default());
    let publish = |frozen: &Arc<Frozen>, generation, attempt| {
        publisher.publish(
            frozen.clone(),
            GenerationId(generation),
            attempt,
            Beside::default(),
        )
    };
    assert!(relocate().await.unwrap().is_some());
    overlay.write(0, &[1; BLOCK]);
    let frozen = overlay.freeze();
    records.failures.lock().push_back(VolumeError::Closed);
    publish(&frozen, 6, 0).await.unwrap_err();
    relocate().await.unwrap_err();
    assert_eq!(*records.of.lock(), [(1, 5)]);
    publish(&frozen, 6, 1).await.unwrap();
    assert!(relocate().await.unwrap().is_some());
    assert_eq!(*records.of.lock(), [(1, 5), (2, 6), (3, 6)]);
    assert!(records.of.lock().is_sorted(), "the watermark never falls back");
}
