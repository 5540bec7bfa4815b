//! A checkpoint that moves no data: it only changes the inode, in its size or in the root of its index.
//!
//! It is stored as every checkpoint is: first the object that holds the inode, then the inode itself. So whoever finds
//! the object alone can tell on which checkpoint it was built. It has a number of its own. The earlier checkpoints keep
//! their own size and root, and do not change.

use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use hyperfile::SegmentId;
use hyperfile::config::HyperFileMetaConfig;
use hyperfile::file::HyperTrait;
use hyperfile::inode::FlushInodeFlag;
use hyperfile::ondisk::InodeRaw;
use hyperfile::segment::{Segment, SegmentReadWrite};
use hyperfile::staging::Staging;
use hyperfile::staging::s3::S3Staging;
use hyperfile::stream_segment::TailBuilder;

use super::container::{self, Container};
use super::limits::{CHECKPOINT_NUMBER_MAX, CheckpointNumbers};
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::format::inode;
use crate::index::loader::NodeLoader;
use crate::store::Store;

const NS_A_SECOND: u32 = 1_000_000_000;

/// Publishes the state of a container that holds nothing unpublished, with a changed inode. There is one attempt, in
/// place of the inode that the container was opened with or published last. The container is outdated afterwards and
/// must be opened again.
///
/// The caller adopts, then checks: it checks the lease after it opened the container and before it calls this.
///
/// # Errors
/// After any error it is unknown what was stored.
pub(crate) async fn publish(
    container: &mut Container,
    change: impl FnOnce(&mut InodeRaw),
) -> io::Result<InodeRaw> {
    let raw = prepare(container, change)?;
    store(container, &raw).await?;
    Ok(raw)
}

/// The inode that [`store`] makes the newest one.
///
/// # Errors
/// When the container holds what is not published, or may not be written to.
pub(crate) fn prepare(container: &mut Container, change: impl FnOnce(&mut InodeRaw)) -> io::Result<InodeRaw> {
    HyperTrait::check_writable(container)?;
    if holds_unpublished(container) {
        return Err(io::Error::other("the container holds what is not published"));
    }
    check_number_left(container)?;
    let number = container.inode_mut().get_next_seq();
    let mut raw = container.inode().to_raw(container.bmap_get_raw());
    raw.i_last_seq = number.as_cno();
    raw.i_last_cno = number.as_cno();
    change(&mut raw);
    // The new inode differs in content from the previous one, and no compaction is attached to it.
    raw.set_compacted(false);
    raw.set_compaction_pending(false);
    (raw.i_mtime, raw.i_mtime_nsec) = later_than((raw.i_mtime, raw.i_mtime_nsec));
    (raw.i_ctime, raw.i_ctime_nsec) = (raw.i_mtime, raw.i_mtime_nsec);
    Ok(raw)
}

/// Stores what [`prepare`] gave, as [`publish`] does.
///
/// # Errors
/// After any error it is unknown what was stored.
pub(crate) async fn store(container: &mut Container, raw: &InodeRaw) -> io::Result<()> {
    let lock = container.flush_lock().await;
    let stored = store_locked(container, raw).await;
    container.flush_unlock(lock);
    stored
}

async fn store_locked(container: &mut Container, raw: &InodeRaw) -> io::Result<()> {
    let staging = container.staging();
    store_summary(staging, &container.config().meta, container.inode().base(), raw).await?;
    let over = container.inode().get_ondisk_state();
    let bytes = raw.as_u8_slice();
    Staging::<NodeLoader>::flush_inode(staging, bytes, over, FlushInodeFlag::Update, None)
        .await
        .map(drop)
}

/// Stores the object that makes this inode a checkpoint, of its last number. `base` names the inode that it is built on; 0 is none.
async fn store_summary(
    staging: &S3Staging,
    meta: &HyperFileMetaConfig,
    base: u64,
    raw: &InodeRaw,
) -> io::Result<()> {
    let number = SegmentId::new_from_cno(raw.i_last_cno);
    if meta.block_ptr_format.is_stream() {
        let object = Segment::object_of(number, meta);
        let (node_bytes, block_bytes) = (meta.meta_block_size, meta.data_block_size);
        let tail = TailBuilder::new(object, node_bytes, block_bytes, false, base).finish(raw);
        return staging.done(object, &tail, tail.len()).await;
    }
    let mut writer = Staging::<NodeLoader>::new_segwr(staging, number, meta);
    writer.set_base(base);
    writer.realize_ss(0, raw);
    writer.done().await
}

/// The first checkpoint of a clone: it reads as the one with this inode, and its number is above all that that one refers to.
///
/// # Errors
/// [`VolumeError::CountersExhausted`] when there is no such number left to go on from.
pub(crate) fn forked(of: &InodeRaw) -> Result<InodeRaw, VolumeError> {
    let mut raw = *of;
    raw.i_last_cno = of.i_last_seq.max(of.i_last_cno) + 1;
    raw.i_last_seq = raw.i_last_cno;
    let numbers = CheckpointNumbers::default();
    numbers.note(raw.i_last_seq);
    numbers.check_write()?;
    raw.set_compacted(false);
    raw.set_compaction_pending(false);
    (raw.i_mtime, raw.i_mtime_nsec) = later_than((raw.i_mtime, raw.i_mtime_nsec));
    (raw.i_ctime, raw.i_ctime_nsec) = (raw.i_mtime, raw.i_mtime_nsec);
    Ok(raw)
}

/// Stores the objects of a checkpoint that no container has yet, but for the inode, which makes it one.
///
/// # Errors
/// When the store fails, or the format is not known.
pub(crate) async fn store_first(store: &Store, raw: &InodeRaw) -> io::Result<()> {
    let meta = HyperFileMetaConfig::try_from_u32(raw.i_meta_config)?;
    let staging = container::staging(store, store.client.clone(), &container::config(store, &meta));
    store_summary(&staging, &meta, 0, raw).await
}

/// Puts the first inode, which makes a volume of what is stored: it comes last.
///
/// # Errors
/// [`VolumeError::AlreadyExists`] when there is one; when the store fails.
pub(crate) async fn put_first(store: &Store, raw: &InodeRaw) -> Result<(), VolumeError> {
    let body = raw.as_u8_slice().to_vec();
    match store.put_create_only(&store.data_key(inode::NAME), body).await {
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Err(VolumeError::AlreadyExists {
            url: store.url.to_string(),
        }),
        put => Ok(put.map(drop)?),
    }
}

/// Whether there is a number for one more checkpoint. The last one is left: a container that has used it cannot be opened,
/// and what is beyond it the engine masks in silence.
///
/// # Errors
/// When there is no number left.
pub(super) fn check_number_left(container: &Container) -> io::Result<()> {
    if container.inode().get_last_seq().as_cno() < CHECKPOINT_NUMBER_MAX - 1 {
        return Ok(());
    }
    let reason = format!(
        "the checkpoint numbers of the volume, up to {CHECKPOINT_NUMBER_MAX}, are used up; copy it into a new one"
    );
    Err(io::Error::other(reason))
}

/// Whether the container has data or index nodes that are not stored.
pub(super) fn holds_unpublished(container: &Container) -> bool {
    container.get_data_blocks_dirty().len() > 0
        || !container.refs_snapshot().is_empty()
        || !container.bmap_lookup_dirty().is_empty()
        || container.pending_parts_get().is_some()
}

/// The current time, or one nanosecond after `before` when the clock is behind that. In seconds and nanoseconds since
/// 1970-01-01 UTC.
fn later_than(before: (u64, u32)) -> (u64, u32) {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or((0, 0), |d| (d.as_secs(), d.subsec_nanos()));
    let next = match before.1 + 1 {
        NS_A_SECOND.. => (before.0.saturating_add(1), 0),
        ns => (before.0, ns),
    };
    now.max(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoints_time_is_never_that_of_the_one_before() {
        let now = later_than((0, 0));
        assert!(now.0 > 1_700_000_000, "the clock, where that is later");
        let ahead = now.0 + 3600;
        assert_eq!(later_than((ahead, 5)), (ahead, 6));
        assert_eq!(later_than((ahead, NS_A_SECOND - 1)), (ahead + 1, 0));
    }
}
