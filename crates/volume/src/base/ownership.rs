//! Whether this process may publish to a container. The lease answers it; who publishes, or enters what was published, asks.

use async_trait::async_trait;

use crate::base::error::VolumeError;

/// Says whether this process owns the container. *Adopt, then check*: whoever reads the stored state in order to
/// publish on top of it asks afterwards, and goes on only when the answer is yes. `lease` says why that is enough.
#[async_trait]
pub trait Ownership: Send + Sync {
    /// Checks that this process is still the volume's owner.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when another process is. A failure of the store says nothing about the owner.
    async fn check(&self) -> Result<(), VolumeError>;
}

/// The ownership of a container that nobody else writes to, or that is opened read-only.
#[derive(Debug, Clone, Copy)]
pub struct SoleOwner;

#[async_trait]
impl Ownership for SoleOwner {
    async fn check(&self) -> Result<(), VolumeError> {
        Ok(())
    }
}
