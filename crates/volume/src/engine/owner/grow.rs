//! How the owner makes a checkpoint of another size, in which nothing else is changed.

use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use hyperfile::file::HyperTrait;

use super::Owner;
use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::VolumeError;
use crate::engine::bare;
use crate::format::stored_state::{Root, StateId};

impl Owner {
    /// Publishes the size, with nothing else under way.
    ///
    /// # Errors
    /// After any error the container has gone back to what is stored, or the next call finds that it must. What is stored has the
    /// size from before, or the new one.
    pub(super) async fn grow(&mut self, size_bytes: u64) -> Result<Checkpoint, VolumeError> {
        self.land_all().await;
        if self.must_recover {
            // An idle volume publishes nothing that would recover it; and a growth that failed may have been stored.
            let recovered = AssertUnwindSafe(self.recover()).catch_unwind().await;
            self.after(recovered)?;
            if self.geometry.now().size_bytes() >= size_bytes {
                return self.grown();
            }
        }
        self.check_numbers()?;
        let begun = AssertUnwindSafe(self.publish_size(size_bytes))
            .catch_unwind()
            .await;
        let published = self.after(begun);
        self.must_recover = true;
        if published.is_ok() {
            // It knows nothing of what is stored now.
            self.container = None;
        }
        let returned = AssertUnwindSafe(self.return_to_stored()).catch_unwind().await;
        self.after(returned)?;
        if self.geometry.now().size_bytes() < size_bytes {
            let unknown = || VolumeError::Internal("the new size was stored, and is gone".into());
            return Err(published.err().unwrap_or_else(unknown));
        }
        self.grown()
    }

    fn grown(&mut self) -> Result<Checkpoint, VolumeError> {
        let root = Root(self.container()?.bmap_get_raw());
        Ok(self.reported(root))
    }

    async fn publish_size(&mut self, size_bytes: u64) -> Result<(), VolumeError> {
        let failed = |e| VolumeError::engine(format!("growing to {size_bytes} bytes"), e);
        let container = self.container()?;
        let prepared = bare::prepare(container, |raw| raw.i_size = size_bytes).map_err(failed)?;
        self.note_number();
        // Noted before the publish, as any other.
        self.attempted.push(StateId::of_inode(&prepared));
        bare::store(self.container()?, &prepared).await.map_err(failed)?;
        self.published = StateId::of_inode(&prepared);
        self.attempted.clear();
        Ok(())
    }
}
