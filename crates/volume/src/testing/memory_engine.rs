//! A model of a container, kept in memory: the reference the tests compare with.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;

use crate::base::checkpoint_id::{Checkpoint, CheckpointId, InodeCheck};
use crate::base::error::VolumeError;
use crate::base::geometry::{BlockIndex, Geometry};
use crate::engine::{Beside, Engine};
use crate::write_buffer::overlay::Frozen;

#[derive(Debug, Default)]
struct Published {
    cno: u64,
    blocks: BTreeMap<u64, Vec<u8>>,
    damaged: BTreeSet<u64>,
}

/// Blocks in a map. Clones share it, as handles share a stored container.
#[derive(Debug, Clone)]
pub struct MemoryEngine {
    geometry: Geometry,
    published: Arc<Mutex<Published>>,
}

impl MemoryEngine {
    /// An empty container.
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            published: Arc::default(),
        }
    }

    /// The number of the newest checkpoint.
    pub fn cno(&self) -> u64 {
        self.published.lock().cno
    }

    /// From now on this block cannot be read, until it is published anew.
    pub fn damage(&self, block: u64) {
        self.published.lock().damaged.insert(block);
    }
}

#[async_trait]
impl Engine for MemoryEngine {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        let published = self.published.lock();
        for p in self.geometry.pieces(offset_bytes, out.len() as u64) {
            if published.damaged.contains(&p.block.0) {
                return Err(VolumeError::Corrupt {
                    what: format!("block {}", p.block.0),
                    reason: "injected".into(),
                });
            }
            let at = (p.offset_bytes - offset_bytes) as usize;
            let dst = &mut out[at..at + p.len as usize];
            match published.blocks.get(&p.block.0) {
                Some(b) => dst.copy_from_slice(&b[p.in_block as usize..][..p.len as usize]),
                None => dst.fill(0),
            }
        }
        Ok(())
    }

    async fn block_runs(&self, blocks: Range<u64>) -> Result<Vec<(Range<u64>, bool)>, VolumeError> {
        let published = self.published.lock();
        let mut runs = Vec::new();
        let mut at = blocks.start;
        for &index in published.blocks.range(blocks.clone()).map(|(i, _)| i) {
            if at < index {
                runs.push((at..index, false));
            }
            runs.push((index..index + 1, true));
            at = index + 1;
        }
        if at < blocks.end {
            runs.push((at..blocks.end, false));
        }
        Ok(runs)
    }

    async fn publish(&self, frozen: Arc<Frozen>, beside: Beside) -> Result<Option<Checkpoint>, VolumeError> {
        Beside::wait(beside.before).await?;
        let mut published = self.published.lock();
        let mut is_changed = false;
        frozen.with(|generation| {
            for run in generation.zero_runs() {
                is_changed |= published.blocks.extract_if(run, |_, _| true).count() > 0;
            }
            for index in generation.data_runs().into_iter().flatten() {
                let len = self.geometry.block_len(BlockIndex(index)) as usize;
                let mut bytes = vec![0; self.geometry.block_size() as usize];
                let start = index * u64::from(self.geometry.block_size());
                if !generation.copy_complete(start, &mut bytes[..len]) {
                    return Err(VolumeError::Internal(format!(
                        "block {index} was published incomplete"
                    )));
                }
                published.blocks.insert(index, bytes);
                published.damaged.remove(&index);
                is_changed = true;
            }
            Ok(())
        })?;
        if !is_changed {
            return Ok(None);
        }
        published.cno += 1;
        Ok(Some(Checkpoint {
            id: CheckpointId {
                cno: published.cno,
                check: InodeCheck::from_bits(published.cno),
            },
            size_bytes: self.geometry.size_bytes(),
            published_ms: 1,
        }))
    }

    async fn recover(&self) -> Result<(), VolumeError> {
        Ok(())
    }

    async fn close(&self) -> bool {
        true
    }
}
