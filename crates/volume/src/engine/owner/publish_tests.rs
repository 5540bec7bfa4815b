//! Publishes that are broken off: a generation that zeroes more than one checkpoint may, and an attempt of unknown outcome.

use std::sync::atomic::{AtomicUsize, Ordering};

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_s3::error::BoxError;
use tokio::sync::{mpsc, oneshot};

use super::super::thread::OwnerThread;
use super::super::{Config, Request, run};
use super::*;
use crate::admin::{self, CreateOptions};
use crate::base::geometry::Geometry;
use crate::base::url::VolumeUrl;
use crate::engine::SoleOwner;
use crate::engine::limits::CheckpointNumbers;
use crate::index::cache::IndexCache;
use crate::index::checksums::IndexChecksums;
use crate::options::{StoreOptions, VolumeOptions};
use crate::store;
use crate::store::hook::Hook;
use crate::write_buffer::generation::{Generation, PreparedWrite};
use crate::{Volume, VolumeError};

const BLOCK: usize = 4096;
const BLOCKS: usize = 4096;
const ZEROED_MAX: u64 = 1000;
const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

/// Lets so many writes of the inode through, and no more.
#[derive(Debug, Clone)]
struct Inodes {
    left: Arc<AtomicUsize>,
}

impl Intercept for Inodes {
    fn name(&self) -> &'static str {
        "inodes"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        let path = request.uri().split('?').next().unwrap_or_default();
        if request.method() != "PUT" || !path.ends_with("/inode") {
            return Ok(());
        }
        let left = |left: usize| left.checked_sub(1);
        match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, left) {
            Ok(_) => Ok(()),
            Err(_) => Err("the process has ended".into()),
        }
    }
}

async fn create(url: &VolumeUrl) {
    let create = CreateOptions {
        size_bytes: (BLOCKS * BLOCK) as u64,
        block_size_bytes: BLOCK as u32,
    };
    admin::create(url, &StoreOptions::default(), &create)
        .await
        .unwrap();
}

/// An owner of the volume, while so many writes of the inode are left to it.
async fn owner(url: &VolumeUrl, left: Arc<AtomicUsize>) -> (mpsc::UnboundedSender<Request>, OwnerThread) {
    let hooked = StoreOptions {
        hook: Hook::new(Inodes { left }),
        ..StoreOptions::default()
    };
    let store = store::connect(url, &hooked).await.unwrap();
    let config = Config {
        store: store.clone(),
        checksums: IndexChecksums::default(),
        index_cache: IndexCache::default().of_container(&store),
        is_read_only: false,
        ownership: Arc::new(SoleOwner),
        numbers: Arc::<CheckpointNumbers>::default(),
        zeroed_blocks_max: ZEROED_MAX,
    };
    let (requests, inbox) = mpsc::unbounded_channel();
    let (opened, is_open) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let thread = OwnerThread::start(runtime, move || run(config, inbox, opened)).unwrap();
    is_open.await.unwrap().unwrap();
    (requests, thread)
}

async fn publish(requests: &mpsc::UnboundedSender<Request>, frozen: &Arc<Frozen>) -> Result<(), VolumeError> {
    let (reply, published) = oneshot::channel();
    let publish = Request::Publish {
        frozen: frozen.clone(),
        beside: Beside::default(),
        reply,
    };
    assert!(requests.send(publish).is_ok());
    published.await.unwrap().map(drop)
}

/// Zeroes the whole volume but one block, which is written, where one checkpoint zeroes `ZEROED_MAX` blocks; so many inodes are
/// stored. Returns whether it was published, and what the volume reads as then.
async fn zeroed(inodes: usize) -> (Result<(), VolumeError>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
    let (options, volume_options) = (StoreOptions::default(), VolumeOptions::default());
    create(&url).await;
    let volume = Volume::open(&url, &options, &volume_options).await.unwrap();
    let fill = volume.clone();
    let filled = tokio::task::spawn_blocking(move || {
        fill.write(0, &vec![7; BLOCKS * BLOCK], true)?;
        fill.close(LIMIT)
    });
    filled.await.unwrap().unwrap();
    drop(volume);
    let left = Arc::new(AtomicUsize::new(inodes));
    let (requests, thread) = owner(&url, left).await;
    let geometry = Geometry::new((BLOCKS * BLOCK) as u64, BLOCK as u32);
    let mut generation = Generation::new(geometry);
    generation.zero(0, (BLOCKS * BLOCK) as u64);
    generation.write(PreparedWrite::new(geometry, (5 * BLOCK) as u64, &[9; BLOCK]));
    let published = publish(&requests, &Arc::new(Frozen::new(generation))).await;
    drop(requests);
    thread.ended().await;
    let volume = Volume::open(&url, &options, &volume_options).await.unwrap();
    let read = tokio::task::spawn_blocking(move || {
        let mut out = vec![0xEE; BLOCKS * BLOCK];
        volume.read(0, &mut out)?;
        volume.close(LIMIT)?;
        Ok::<_, VolumeError>(out)
    });
    (published, read.await.unwrap().unwrap())
}

/// As docs/durability.md has it: no flush is answered before the last checkpoint, and after a crash in between zeroes may be there, while a
/// write that was sent before them is missing.
#[tokio::test(flavor = "multi_thread")]
async fn zeroes_of_many_blocks_take_several_checkpoints_and_are_answered_after_the_last() {
    let mut zeroes = Vec::new();
    for inodes in 0..10 {
        let (published, found) = zeroed(inodes).await;
        let is_written = found[5 * BLOCK..6 * BLOCK] == [9; BLOCK];
        let others = || found.chunks(BLOCK).enumerate().filter(|(at, _)| *at != 5);
        let zeroed = others().filter(|(_, block)| *block == [0; BLOCK]).count();
        if is_written {
            // Also where the open took up the last checkpoint, whose inode alone was not stored.
            assert_eq!(zeroed, BLOCKS - 1, "the write is in the last one");
        }
        if published.is_ok() {
            assert!(is_written && inodes > 3, "at once");
            break;
        }
        assert!(others().all(|(_, block)| block == [7; BLOCK] || block == [0; BLOCK]));
        zeroes.push(zeroed);
    }
    assert!(
        zeroes.len() > 3 && zeroes.is_sorted() && zeroes[0] < zeroes[3],
        "{zeroes:?}"
    );
}

/// An attempt failed, and the container went back to what is stored: what became of the attempt is known once another one is stored.
#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_of_unknown_outcome_is_no_clean_end() {
    for publishes_again in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
        create(&url).await;
        let left = Arc::<AtomicUsize>::default();
        let (requests, thread) = owner(&url, left.clone()).await;
        let geometry = Geometry::new((BLOCKS * BLOCK) as u64, BLOCK as u32);
        let mut generation = Generation::new(geometry);
        generation.write(PreparedWrite::new(geometry, 0, &[9; BLOCK]));
        let frozen = Arc::new(Frozen::new(generation));
        assert!(publish(&requests, &frozen).await.is_err());
        left.store(1000, Ordering::SeqCst);
        let (reply, recovered) = oneshot::channel();
        assert!(requests.send(Request::Recover { reply }).is_ok());
        recovered.await.unwrap().unwrap();
        if publishes_again {
            publish(&requests, &frozen).await.unwrap();
        }
        let (reply, closed) = oneshot::channel();
        assert!(requests.send(Request::Close { reply }).is_ok());
        assert_eq!(closed.await.unwrap(), publishes_again);
        thread.ended().await;
    }
}
