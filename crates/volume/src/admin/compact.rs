//! `compact`: what is live is copied out of objects that are mostly dead, of a volume that is not served.

use std::sync::Arc;

use async_trait::async_trait;

use super::retention::rounds;
use super::{check_closed, check_nothing_left};
use crate::base::control::{Control, Phase};
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::compaction::{Flip, Ground, Pace};
use crate::engine::hyper_engine::HyperEngine;
use crate::engine::{Engine, Relocated, parents};
use crate::index::cache::IndexCache;
use crate::index::relocation::Relocation;
use crate::lease::Lease;
use crate::meta::checkpoint_list::{self, CatalogueEntry, Kind};
use crate::options::{LeaseOptions, StoreOptions};
use crate::read::cache::ReadCache;
use crate::retention::Want;
use crate::store::Store;

pub use crate::compaction::Compacted;

/// What is to be done once the log is closed.
const THEN: &str = "compact it";

/// Copies what is live out of objects that are mostly dead. A server running on the volume must be stopped first; one that runs does
/// this itself, also when it is asked to ([`Volume::compact`](crate::Volume::compact)). It may be stopped, and killed, at any moment: the
/// volume is as it was, or has some of it done.
///
/// # Errors
/// [`VolumeError::Held`] when a server has it open for writing; [`VolumeError::InvalidInput`] when its log was not closed, or its format
/// has no parts.
pub async fn compact(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    lease_options: &LeaseOptions,
    control: &Control,
) -> Result<Compacted, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    check_nothing_left(&store, THEN).await?;
    let lease = super::take_lease(&store, store_options, lease_options).await?;
    let compacted = compact_owned(&store, &lease, control).await;
    lease.release(compacted.is_ok()).await;
    compacted
}

async fn compact_owned(
    store: &Store,
    lease: &Arc<Lease>,
    control: &Control,
) -> Result<Compacted, VolumeError> {
    check_closed(store, THEN).await?;
    let (index_cache, read_cache) = (IndexCache::default(), ReadCache::none());
    let opened = HyperEngine::open_owned(store, index_cache, read_cache, false, lease.clone(), None).await?;
    let engine = Arc::new(opened.0);
    let compacted = compact_open(store, lease, &engine, control).await;
    engine.close().await;
    compacted
}

async fn compact_open(
    store: &Store,
    lease: &Arc<Lease>,
    engine: &Arc<HyperEngine>,
    control: &Control,
) -> Result<Compacted, VolumeError> {
    let alone = Alone {
        store: store.clone(),
        engine: engine.clone(),
        generation: super::settle_history(store, lease).await?,
        epoch: lease.epoch(),
    };
    let mut rounds = rounds(store, lease);
    let ground = Ground::new(engine, store.clone(), rounds.under_way());
    let mut done = Compacted::default();
    let mut least_dead_bytes = u64::MAX;
    while !control.is_stopped() {
        let victims = rounds.victims(ground.block_bytes(), Want::Everything).await?;
        if victims.next.is_empty() {
            return Ok(done);
        }
        let debt = victims.debt;
        let dead_bytes = debt.stored_bytes.saturating_sub(debt.live_bytes);
        if dead_bytes >= least_dead_bytes {
            // What was copied gave nothing back.
            return Ok(done);
        }
        least_dead_bytes = dead_bytes;
        if done.objects == 0 {
            control.begin(Phase::Copying, victims.live_bytes);
        }
        let moved = ground
            .relocate(&victims.next, &alone, Pace::new(None), control)
            .await?;
        if moved.checkpoint == 0 {
            break;
        }
        done.add(&moved);
    }
    done.is_stopped = control.is_stopped();
    Ok(done)
}

/// Publishes with nobody beside it.
struct Alone {
    store: Store,
    engine: Arc<HyperEngine>,
    /// What is published: a relocation adds nothing to that.
    generation: u64,
    epoch: u64,
}

#[async_trait]
impl Flip for Alone {
    async fn flip(&self, relocation: Arc<Relocation>) -> Result<Option<Relocated>, VolumeError> {
        let Some(relocated) = self.engine.relocate(relocation).await? else {
            return Ok(None);
        };
        let entry = CatalogueEntry::of(
            relocated.checkpoint,
            self.generation,
            self.epoch,
            Kind::Relocation,
        );
        checkpoint_list::write_entry(&self.store, &entry).await?;
        Ok(Some(relocated))
    }
}
