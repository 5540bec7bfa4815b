//! A publish in flight: it stores a checkpoint while the thread that owns the container goes on.
//!
//! The engine's own flush does everything in one go. Here it is two parts. [`lay_out`] needs the container: it gives
//! every block and every dirty node of the index its place, and then advances the container as if that were published,
//! so that the next publish can be applied and placed on top of it. [`PublishInFlight`] is the rest, and runs in a task of its
//! own: it stores the objects and then the inode. An inode is put only when the previous one is known to be stored. So
//! whatever becomes of a publish in flight, the later ones either follow it or fail.
//!
//! The steps are those of `HyperTrait::flush_process` of hyperfile 0.14.0, in its order. A failed publish in flight
//! leaves what a failed flush leaves, except that the container is ahead of the store: it must return to the stored
//! state.

use std::io;
use std::time::{Duration, Instant};

use btree_ondisk::DEFAULT_CACHE_UNLIMITED;
use hyperfile::file::HyperTrait;
use hyperfile::inode::{FlushInodeFlag, OnDiskState};
use hyperfile::ondisk::InodeRaw;
use hyperfile::segment::Writer;
use hyperfile::staging::Staging;
use hyperfile::staging::s3::S3Staging;
use log::debug;
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle};

use crate::engine::Beside;
use crate::engine::container::Container;
use crate::format::stored_state::{Root, StateId};
use crate::index::loader::NodeLoader;

/// A checkpoint whose blocks have their places and that is not stored yet.
pub(super) struct LaidOut {
    /// Objects that hold only data. They are stored first.
    parts: Vec<Writer<S3Staging>>,
    /// The object that makes the checkpoint complete.
    main: Writer<S3Staging>,
    inode: InodeRaw,
    staging: S3Staging,
    took: Duration,
}

impl LaidOut {
    /// The state id that the checkpoint will have once it is stored.
    pub(super) fn state_id(&self) -> StateId {
        StateId::of_inode(&self.inode)
    }

    /// The root of the checkpoint's index. The container's own root may soon be ahead of it.
    pub(super) fn root(&self) -> Root {
        Root(self.inode.i_bmap)
    }
}

/// Gives everything unpublished its place, and advances the container as if it were published. The container must have
/// no compaction attached.
///
/// # Errors
/// After any error the container must return to the stored state.
pub(super) async fn lay_out(container: &mut Container) -> io::Result<LaidOut> {
    HyperTrait::check_writable(container)?;
    let lock = container.flush_lock().await;
    let laid = lay_out_locked(container).await;
    container.flush_unlock(lock);
    laid
}

async fn lay_out_locked(container: &mut Container) -> io::Result<LaidOut> {
    let started = Instant::now();
    container.take_compaction_in().await?;
    let first_data_part = container.reserve_data_parts()?;
    let (published, dirty) = container.flush_process_pre_build_segment().await?;
    if published.is_some() {
        return Err(io::Error::other("there is nothing to lay out"));
    }
    let (parts, main, segment, inode, nodes) = container
        .flush_process_build_segment(dirty, first_data_part)
        .await?;
    // From here on the container looks as after a publish. `stored` adds what only the store can tell, once the publish
    // ends.
    let state = container.inode_mut();
    state.set_last_cno(segment.as_cno());
    state.clear_attr_dirty();
    // The next checkpoint names this one as the checkpoint on which it is built.
    state.set_base(&inode);
    container.checkpoint_published(&inode);
    for node in nodes {
        node.clear_dirty();
    }
    container.clear_data_blocks_dirty();
    container.refs_clear();
    // The cache may drop clean nodes and read them again. These nodes are not stored yet, so it must drop none.
    container.bmap_set_cache_limit(DEFAULT_CACHE_UNLIMITED);
    container.bmap_clear_dirty();
    container.pending_parts_clear();
    container.set_last_flush();
    Ok(LaidOut {
        parts,
        main,
        inode,
        staging: container.staging().clone(),
        took: started.elapsed(),
    })
}

/// Updates the container after a publish in flight succeeded. Called for the oldest publish first.
pub(super) fn stored(container: &Container, stored: StoredPublish) {
    let state = container.inode_mut();
    state.set_ondisk_state(stored.state);
    state.set_last_ondisk_cno(stored.cno);
}

/// Called when no publish is in flight: the container need keep no more nodes in memory than usual.
pub(super) fn all_stored(container: &Container) {
    container.bmap_set_cache_limit(container.config().runtime.node_cache_blocks);
}

/// The inode that a put must replace.
pub(super) enum Predecessor {
    /// The inode that the container was opened with or stored last.
    Stored(Option<OnDiskState>),
    /// An inode that is not stored yet. The sender is dropped if it will not be stored.
    UnderWay(oneshot::Receiver<Option<OnDiskState>>),
}

/// What was stored when a publish in flight ended.
pub(super) struct StoredPublish {
    cno: u64,
    state: Option<OnDiskState>,
}

/// A publish in flight.
pub(crate) struct PublishInFlight {
    task: JoinHandle<io::Result<StoredPublish>>,
    stored: Option<oneshot::Receiver<Option<OnDiskState>>>,
}

impl PublishInFlight {
    /// Begins to store a checkpoint, on the current runtime. Its inode is put only after `before` allows it.
    pub(super) fn begin(
        laid: LaidOut,
        predecessor: Predecessor,
        before: Option<oneshot::Receiver<bool>>,
    ) -> Self {
        let (tell, stored) = oneshot::channel();
        let task = tokio::spawn(async move {
            let stored = store(laid, predecessor, before).await?;
            // There may be no next publish to receive it.
            let _ = tell.send(stored.state.clone());
            Ok(stored)
        });
        Self {
            task,
            stored: Some(stored),
        }
    }

    /// Gives the next publish the receiver for this inode's ETag. Call once.
    pub(super) fn as_predecessor(&mut self) -> Predecessor {
        let stored = self.stored.take();
        // On a second call the receiver has no sender, so the publish that waits for it fails.
        Predecessor::UnderWay(stored.unwrap_or_else(|| oneshot::channel().1))
    }

    /// Waits for the end. The wait may be dropped and repeated, but not after it has returned.
    ///
    /// # Errors
    /// The outer error comes after a panic, or at the runtime's end.
    pub(super) async fn ended(&mut self) -> Result<io::Result<StoredPublish>, JoinError> {
        (&mut self.task).await
    }
}

async fn store(
    laid: LaidOut,
    predecessor: Predecessor,
    before: Option<oneshot::Receiver<bool>>,
) -> io::Result<StoredPublish> {
    let LaidOut {
        parts,
        main,
        inode,
        staging,
        took,
    } = laid;
    let started = Instant::now();
    // The data objects come first, because whoever finds the main object takes the checkpoint for complete.
    for part in parts {
        part.done().await?;
    }
    main.done().await?;
    let uploaded = started.elapsed();
    let over = match predecessor {
        Predecessor::Stored(state) => state,
        Predecessor::UnderWay(stored) => stored
            .await
            .map_err(|_| io::Error::other("the checkpoint before it was not stored"))?,
    };
    Beside::wait(before)
        .await
        .map_err(|e| io::Error::other(e.to_string()))?;
    let waited = started.elapsed() - uploaded;
    let state = Staging::<NodeLoader>::flush_inode(
        &staging,
        inode.as_u8_slice(),
        &over,
        FlushInodeFlag::Update,
        None,
    )
    .await?;
    debug!(
        "published checkpoint {}: laid out in {} ms, uploaded in {} ms, waited {} ms, inode in {} ms",
        inode.i_last_cno,
        took.as_millis(),
        uploaded.as_millis(),
        waited.as_millis(),
        (started.elapsed() - uploaded - waited).as_millis()
    );
    Ok(StoredPublish {
        cno: inode.i_last_cno,
        state,
    })
}
