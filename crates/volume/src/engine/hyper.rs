//! The real engine: a Hyperfile container, owned by one thread.
//!
//! The container's futures are not `Send`, and anything that needs its index borrows it exclusively, so it lives on a
//! thread of its own (`owner`) and is asked by messages. What does not need the index does not ask: reads of blocks
//! whose place is in the location map go to the store from the caller's task.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::try_join_all;
use hyperfile::staging::Staging;
use hyperfile::staging::s3::S3Staging;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::index_cache::IndexCache;
use super::object::segment_of;
use super::owner::{self, Opened, Request};
use super::{Checkpoint, Engine, Ownership, SoleOwner};
use crate::error::VolumeError;
use crate::geometry::Geometry;
use crate::read::location::{LocationMap, Place, Run};
use crate::store::Store;
use crate::writeback::overlay::Frozen;

/// Range reads in flight at once, per volume.
const READS_IN_FLIGHT: usize = 64;
/// The largest range read; longer runs are fetched in parallel pieces.
const READ_BYTES_MAX: usize = 1 << 20;
/// Runs kept in the location map: about 16 MiB.
const LOCATION_RUNS_MAX: usize = 256 * 1024;
/// Blocks located at least at a time, so that a stream of reads asks the owner seldom.
const LOCATE_BLOCKS_MIN: u64 = 1024;

/// Questions to the owner that one request for extents may cost.
const EXTENT_QUESTIONS: u32 = 8;

/// A volume's container.
pub struct HyperEngine {
    geometry: Geometry,
    staging: S3Staging,
    locations: Arc<Mutex<LocationMap>>,
    requests: mpsc::UnboundedSender<Request>,
    reads: Semaphore,
    index_cache: IndexCache,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

/// What an open found.
#[derive(Debug, Clone, Copy)]
pub struct OpenState {
    /// The newest published checkpoint.
    pub newest: Checkpoint,
    /// When the container last changed, in milliseconds since 1970-01-01 UTC.
    pub modified_ms: u64,
}

impl HyperEngine {
    /// Opens the container below `store`'s root and starts its owner thread, on the current runtime.
    ///
    /// # Errors
    /// [`VolumeError::NotFound`] when there is none.
    pub async fn open(
        store: &Store,
        index_cache: IndexCache,
        is_read_only: bool,
    ) -> Result<(Self, OpenState), VolumeError> {
        Self::open_owned(store, index_cache, is_read_only, Arc::new(SoleOwner)).await
    }

    /// As [`Self::open`], of a container that others may take over.
    ///
    /// # Errors
    /// As [`Self::open`]; [`VolumeError::Fenced`] when it was taken over meanwhile.
    pub async fn open_owned(
        store: &Store,
        index_cache: IndexCache,
        is_read_only: bool,
        ownership: Arc<dyn Ownership>,
    ) -> Result<(Self, OpenState), VolumeError> {
        let (requests, inbox) = mpsc::unbounded_channel();
        let (opened, wait) = oneshot::channel();
        let runtime = tokio::runtime::Handle::current();
        let locations = Arc::new(Mutex::new(LocationMap::new(4096, LOCATION_RUNS_MAX)));
        let owner = owner::Config {
            store: store.clone(),
            index_cache: index_cache.clone(),
            is_read_only,
            ownership,
            locations: locations.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("hypernbd-owner".into())
            .spawn(move || runtime.block_on(owner::run(owner, inbox, opened)))
            .map_err(|e| VolumeError::engine("starting the owner thread", e))?;
        let opened = wait.await.map_err(|_| thread_ended())??;
        let Opened {
            geometry,
            staging,
            newest,
            modified_ms,
        } = opened;
        *locations.lock() = LocationMap::new(geometry.block_size(), LOCATION_RUNS_MAX);
        let engine = Self {
            geometry,
            staging,
            locations,
            requests,
            reads: Semaphore::new(READS_IN_FLIGHT),
            index_cache,
            thread: Mutex::new(Some(thread)),
        };
        Ok((engine, OpenState { newest, modified_ms }))
    }

    async fn ask<R>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<R, VolumeError>>) -> Request,
    ) -> Result<R, VolumeError> {
        let (reply, wait) = oneshot::channel();
        self.requests.send(request(reply)).map_err(|_| thread_ended())?;
        wait.await.map_err(|_| thread_ended())?
    }

    /// The places of blocks from `blocks.start` on: all of them, or as far as `questions` to the owner reach.
    async fn locate(&self, blocks: Range<u64>, mut questions: u32) -> Result<Vec<Run>, VolumeError> {
        let mut runs = self.locations.lock().known_prefix(blocks.clone());
        loop {
            let at = runs.last().map_or(blocks.start, |r| r.blocks.end);
            if at >= blocks.end || questions == 0 {
                return Ok(runs);
            }
            questions -= 1;
            // A wide window costs the owner little more and spares the next reads the question.
            let until = blocks.end.max(at + LOCATE_BLOCKS_MIN).min(self.geometry.blocks());
            let found = self
                .ask(|reply| Request::Locate {
                    blocks: at..until,
                    reply,
                })
                .await?;
            for mut run in found {
                if run.blocks.start < blocks.end {
                    run.blocks.end = run.blocks.end.min(blocks.end);
                    runs.push(run);
                }
            }
        }
    }

    async fn fetch(&self, object: u64, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        let segment = segment_of(object);
        let _permit = self.reads.acquire().await.map_err(|_| VolumeError::Closed)?;
        self.staging
            .load_range(segment, offset_bytes as usize, out)
            .await
            .map_err(|e| {
                VolumeError::engine(
                    format!(
                        "reading {} bytes at {offset_bytes} of object {segment}",
                        out.len()
                    ),
                    e,
                )
            })
    }
}

#[async_trait]
impl Engine for HyperEngine {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    async fn read(&self, offset_bytes: u64, out: &mut [u8]) -> Result<(), VolumeError> {
        let block_size = u64::from(self.geometry.block_size());
        let end = offset_bytes + out.len() as u64;
        let runs = self
            .locate(
                self.geometry.touched_blocks(offset_bytes, out.len() as u64),
                u32::MAX,
            )
            .await?;
        let mut fetches = Vec::new();
        let mut rest = out;
        let mut at = offset_bytes;
        for run in runs {
            let run_start = run.blocks.start * block_size;
            let until = (run.blocks.end * block_size).min(end);
            let (mut part, after) = rest.split_at_mut((until - at) as usize);
            rest = after;
            match run.place {
                Place::Nothing => part.fill(0),
                Place::Stored {
                    object,
                    offset_bytes: base,
                } => {
                    let mut from = base + (at - run_start);
                    while !part.is_empty() {
                        let (piece, more) = part.split_at_mut(part.len().min(READ_BYTES_MAX));
                        let len = piece.len() as u64;
                        fetches.push(self.fetch(object, from, piece));
                        from += len;
                        part = more;
                    }
                }
            }
            at = until;
        }
        try_join_all(fetches).await.map(|_| ())
    }

    async fn block_runs(&self, blocks: Range<u64>) -> Result<Vec<(Range<u64>, bool)>, VolumeError> {
        let runs = self.locate(blocks, EXTENT_QUESTIONS).await?;
        Ok(runs
            .into_iter()
            .map(|r| (r.blocks, r.place != Place::Nothing))
            .collect())
    }

    async fn publish(&self, frozen: Arc<Frozen>) -> Result<Option<Checkpoint>, VolumeError> {
        self.ask(|reply| Request::Publish { frozen, reply }).await
    }

    async fn recover(&self) -> Result<(), VolumeError> {
        self.ask(|reply| Request::Recover { reply }).await
    }

    async fn close(&self) {
        let (reply, wait) = oneshot::channel();
        if self.requests.send(Request::Close { reply }).is_ok() {
            let _ = wait.await;
        }
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
        self.index_cache.close().await;
    }
}

fn thread_ended() -> VolumeError {
    VolumeError::Internal("the container's owner thread has ended".into())
}
