//! A checkpoint on its way to the store, beside the thread that owns the container.
//!
//! What the engine's own flush does in one go is done in two parts here. [`lay_out`] needs the container: it gives every
//! block and every dirty node of the index its place, and then takes the container on as if that were published, so that
//! the next publish can be applied and laid out upon it. [`Landing`] is the rest, in a task of its own: the objects, and
//! then the inode. An inode is put only when the one before it is known to be stored, so whatever becomes of a landing,
//! those begun after it either follow it or fail.
//!
//! The steps are those of `HyperTrait::flush_process` of hyperfile 0.14.0, in its order. What a failed landing leaves is
//! what a failed flush leaves, but for the container, which is ahead of the store: it must go back to what is stored.

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
use crate::format::stored_state::{Mark, Root};
use crate::index::loader::NodeLoader;

/// A checkpoint that has its places and is not stored.
pub(super) struct Laid {
    /// Objects of data alone: stored first.
    parts: Vec<Writer<S3Staging>>,
    /// The object that makes the checkpoint one.
    main: Writer<S3Staging>,
    inode: InodeRaw,
    staging: S3Staging,
    took: Duration,
}

impl Laid {
    /// What it will be told by, once stored.
    pub(super) fn mark(&self) -> Mark {
        Mark::of_inode(&self.inode)
    }

    /// Root of the index that belongs to it. The container's own may be ahead of it soon.
    pub(super) fn root(&self) -> Root {
        Root(self.inode.i_bmap)
    }
}

/// Gives everything unpublished its place, and takes the container on as if it were published. The container must have
/// no compaction attached.
///
/// # Errors
/// After any error the container must go back to what is stored.
pub(super) async fn lay_out(container: &mut Container) -> io::Result<Laid> {
    HyperTrait::check_writable(container)?;
    let lock = container.flush_lock().await;
    let laid = lay_out_locked(container).await;
    container.flush_unlock(lock);
    laid
}

async fn lay_out_locked(container: &mut Container) -> io::Result<Laid> {
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
    // From here on as after a publish. What only the store can tell comes with the end of the landing: `stored`.
    let state = container.inode_mut();
    state.set_last_cno(segment.as_cno());
    state.clear_attr_dirty();
    // The next checkpoint names this one as what it is built on.
    state.set_base(&inode);
    container.checkpoint_published(&inode);
    for node in nodes {
        node.clear_dirty();
    }
    container.clear_data_blocks_dirty();
    container.refs_clear();
    // Nodes that are clean now may be dropped and read again, and these are not there to be read.
    container.bmap_set_cache_limit(DEFAULT_CACHE_UNLIMITED);
    container.bmap_clear_dirty();
    container.pending_parts_clear();
    container.set_last_flush();
    Ok(Laid {
        parts,
        main,
        inode,
        staging: container.staging().clone(),
        took: started.elapsed(),
    })
}

/// The container's part in the end of a landing that succeeded; the oldest one first.
pub(super) fn stored(container: &Container, landed: Landed) {
    let state = container.inode_mut();
    state.set_ondisk_state(landed.state);
    state.set_last_ondisk_cno(landed.cno);
}

/// No landing is under way: the container need keep no more nodes than it always does.
pub(super) fn all_stored(container: &Container) {
    container.bmap_set_cache_limit(container.config().runtime.node_cache_blocks);
}

/// What an inode is put over.
pub(super) enum Predecessor {
    /// The inode that the container was opened with or stored last.
    Stored(Option<OnDiskState>),
    /// One that is not stored yet. Nothing comes when it will not be.
    UnderWay(oneshot::Receiver<Option<OnDiskState>>),
}

/// What is stored when a landing ends.
pub(super) struct Landed {
    cno: u64,
    state: Option<OnDiskState>,
}

/// A checkpoint on its way.
pub(crate) struct Landing {
    task: JoinHandle<io::Result<Landed>>,
    stored: Option<oneshot::Receiver<Option<OnDiskState>>>,
}

impl Landing {
    /// Begins to store a checkpoint, on the current runtime. Its inode is not put before `before` says so.
    pub(super) fn begin(
        laid: Laid,
        predecessor: Predecessor,
        before: Option<oneshot::Receiver<bool>>,
    ) -> Self {
        let (tell, stored) = oneshot::channel();
        let task = tokio::spawn(async move {
            let landed = store(laid, predecessor, before).await?;
            // Nobody may be behind it.
            let _ = tell.send(landed.state.clone());
            Ok(landed)
        });
        Self {
            task,
            stored: Some(stored),
        }
    }

    /// This one as what the next one's inode is put over. There is one next.
    pub(super) fn as_predecessor(&mut self) -> Predecessor {
        let stored = self.stored.take();
        // A receiver of nothing fails whoever waits for it.
        Predecessor::UnderWay(stored.unwrap_or_else(|| oneshot::channel().1))
    }

    /// Waits for the end. May be given up and asked again; not after it answered.
    ///
    /// # Errors
    /// The outer one after a panic, or at the runtime's end.
    pub(super) async fn ended(&mut self) -> Result<io::Result<Landed>, JoinError> {
        (&mut self.task).await
    }
}

async fn store(
    laid: Laid,
    predecessor: Predecessor,
    before: Option<oneshot::Receiver<bool>>,
) -> io::Result<Landed> {
    let Laid {
        parts,
        main,
        inode,
        staging,
        took,
    } = laid;
    let started = Instant::now();
    // The data alone first: whoever finds the main object takes the checkpoint for whole.
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
    Ok(Landed {
        cno: inode.i_last_cno,
        state,
    })
}
