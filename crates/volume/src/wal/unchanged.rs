//! A WAL that is read and never changed. It belongs to the source of a copied volume.

use std::sync::Arc;

use async_trait::async_trait;

use super::record::Record;
use super::{AppendError, EncodedGroup, RecordId, WalStore};
use crate::base::error::VolumeError;

/// A WAL as it was found. Nothing is appended to it, and nothing is removed from it.
pub(crate) struct Unchanged(pub Arc<dyn WalStore>);

#[async_trait]
impl WalStore for Unchanged {
    fn found(&self) -> &[RecordId] {
        self.0.found()
    }

    fn is_suspect(&self, id: RecordId) -> bool {
        self.0.is_suspect(id)
    }

    fn first_sequence(&self) -> u64 {
        self.0.first_sequence()
    }

    fn depth(&self) -> usize {
        self.0.depth()
    }

    fn capacity_bytes(&self) -> u64 {
        self.0.capacity_bytes()
    }

    async fn read(&self, id: RecordId) -> Result<Record, VolumeError> {
        self.0.read(id).await
    }

    async fn append(&self, _: &EncodedGroup) -> Result<(), AppendError> {
        let reason = "the log is that of another volume, and only read".into();
        Err(AppendError::Failed(VolumeError::Internal(reason)))
    }

    async fn trim(&self, _: u64, _: u64) -> Result<(), VolumeError> {
        Ok(())
    }

    async fn remove_found(&self) -> Result<(), VolumeError> {
        Ok(())
    }

    async fn clear(&self, _: bool) -> Result<(), VolumeError> {
        Ok(())
    }
}
