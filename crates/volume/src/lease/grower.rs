//! Carries out the requests to grow that the lease brings, by what has the volume open.

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use futures::future::BoxFuture;
use log::{info, warn};
use parking_lot::Mutex;

use super::growth::{GrowthRequest, GrowthStage};
use super::keeper::NAME;
use crate::store::Store;

/// Grows the volume to a size in bytes. Gives the size that it has then, or says why not.
pub(crate) type Grow = Arc<dyn Fn(u64) -> BoxFuture<'static, Result<u64, String>> + Send + Sync>;

/// What has the volume open under a lease, once something has.
#[derive(Clone, Default)]
pub(super) struct Grower(Arc<Mutex<Option<Grow>>>);

impl fmt::Debug for Grower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Grower").finish_non_exhaustive()
    }
}

impl Grower {
    /// From now on requests are carried out by this.
    pub fn set(&self, grow: Grow) {
        *self.0.lock() = Some(grow);
    }

    /// Carries out a request that was just taken, and was stored at `asked`, and gives its end.
    pub async fn carry_out(
        self,
        store: Store,
        request: GrowthRequest,
        asked: Option<SystemTime>,
    ) -> GrowthStage {
        let grown = self.grown(&store, &request, asked).await;
        let (url, size_bytes, by) = (&store.url, request.size_bytes, &request.asked_by);
        match grown {
            Ok(size_bytes) => {
                info!("{url} has {size_bytes} bytes, as {by} asked through the lease");
                GrowthStage::Grown { size_bytes }
            }
            Err(why) => {
                warn!("{url} was not grown to {size_bytes} bytes, as {by} asked through the lease: {why}");
                GrowthStage::Failed { why }
            }
        }
    }

    async fn grown(
        &self,
        store: &Store,
        request: &GrowthRequest,
        asked: Option<SystemTime>,
    ) -> Result<u64, String> {
        // A server that was stopped for long must not do then what somebody wanted once. No clock but the store's knows when that was.
        let taken = store.head(&store.meta_key(NAME)).await;
        let taken = taken.map_err(|e| format!("the age of the request cannot be told: {e}"))?;
        match (asked, taken) {
            (Some(asked), Some(taken)) if request.holds(asked, taken.last_modified) => {}
            (Some(_), Some(_)) => return Err("the request was too old when it was seen".to_owned()),
            _ => return Err("the age of the request cannot be told".to_owned()),
        }
        let grow = self.0.lock().clone();
        match grow {
            Some(grow) => grow(request.size_bytes).await,
            None => Err(
                "the volume is being opened, or held by a command that does not grow it: give the command again later".to_owned(),
            ),
        }
    }
}
