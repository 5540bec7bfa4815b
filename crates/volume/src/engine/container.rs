//! How this project opens Hyperfile containers, with one configuration for the engine and the admin verbs.

use std::io;
use std::sync::Arc;

use aws_sdk_s3::Client;
use btree_ondisk::bmap::BMap;
use hyperfile::config::{
    FlushConflictPolicy, HyperFileConfig, HyperFileConfigBuilder, HyperFileMetaConfig, HyperFileRuntimeConfig,
};
use hyperfile::file::HyperTrait;
use hyperfile::file::file::HyperFile;
use hyperfile::file::flags::{FileFlags, HyperFileFlags};
use hyperfile::file::mode::{FileMode, HyperFileMode};
use hyperfile::inode::{FlushInodeFlag, Inode};
use hyperfile::meta_format::BlockPtrFormat;
use hyperfile::ondisk::InodeRaw;
use hyperfile::staging::Staging;
use hyperfile::staging::config::StagingConfig;
use hyperfile::staging::s3::S3Staging;
use hyperfile::{BMapUserData, BlockPtr};

use super::guard::InodeGuard;
use crate::base::checkpoint_id::CheckpointId;
use crate::format::inode;
use crate::format::stored_state::{Root, StateId};
use crate::index::cache::IndexCache;
use crate::index::checksums::IndexChecksums;
use crate::index::loader::NodeLoader;
use crate::index::walk::Walk;
use crate::store::Store;
use crate::store::interceptors::sums::SumsWriter;
use crate::store::interceptors::upload_limiter::UPLOAD_TURNS;

/// Gives the nodes of the index that the engine has in memory to the cache: those of the newest checkpoints were never fetched. The
/// container must be one that holds nothing unpublished, and that is about to be dropped.
pub(super) fn give_up_nodes(container: &Container) {
    container.bmap_set_cache_limit(0);
}

/// The container type used throughout. It is not `Send`: it stays on the thread that opened it.
pub type Container = HyperFile<'static, S3Staging, NodeLoader, IndexCache>;

/// A publish uploads pieces of this size ...
pub(super) const UPLOAD_PIECE_BYTES: usize = 5 << 20;
/// ... and this many at once. Each piece is copied out of the generation while it is sent, so this bounds the extra
/// memory. While two publishes overlap, it is twice as much, and they take turns.
pub(super) const UPLOADS_IN_FLIGHT: usize = 8;
/// Bytes of all pieces of one publish that are in flight at once.
pub(super) const IN_FLIGHT_BYTES: u64 = (UPLOAD_PIECE_BYTES * UPLOADS_IN_FLIGHT) as u64;
const _: () = assert!(UPLOADS_IN_FLIGHT < UPLOAD_TURNS && UPLOAD_TURNS < 2 * UPLOADS_IN_FLIGHT);
/// Index nodes of 4 KiB that are kept in memory for publishing. They take 8 MiB, which is the index of 2 GiB of data in
/// blocks of 4 KiB. Reads have a cache of their own.
pub(super) const INDEX_NODES: usize = 2048;
/// A value for limits of the engine that must never be reached, because this project decides when to publish. (Hazards
/// 1, 5, 6 and 7 of the engine: when a limit is crossed, it flushes inline, and rolls back what it cannot flush.)
const OUT_OF_REACH: usize = 1 << 50;

/// The newest checkpoint of an open container.
pub(crate) fn checkpoint_of(container: &Container) -> CheckpointId {
    let size_bytes = container.inode().size() as u64;
    StateId::of_container(container).id(size_bytes, &container.bmap_get_raw())
}

/// Configuration of the container below `store`'s root.
pub fn config(store: &Store, meta: &HyperFileMetaConfig) -> HyperFileConfig {
    let mut runtime = HyperFileRuntimeConfig::default_large();
    runtime.flush_conflict_policy = FlushConflictPolicy::FailFast;
    runtime.data_cache_dirty_max_bytes_threshold = OUT_OF_REACH;
    runtime.data_cache_dirty_max_blocks_threshold = OUT_OF_REACH;
    runtime.segment_buffer_size = OUT_OF_REACH;
    runtime.data_cache_dirty_max_flush_interval = OUT_OF_REACH as u64;
    runtime.data_cache_blocks = 0;
    runtime.segment_mpu_chunk_size = UPLOAD_PIECE_BYTES;
    runtime.segment_mpu_max_concurrency = UPLOADS_IN_FLIGHT;
    runtime.stream_segment_bytes = 0;
    runtime.node_cache_blocks = INDEX_NODES;
    let root = format!("s3://{}/{}", store.bucket, store.root);
    HyperFileConfigBuilder::new()
        .with_meta_config(meta)
        .with_staging_config(&StagingConfig::new_s3_uri(&root, None))
        .with_runtime_config(&runtime)
        .build()
}

fn new_meta(block_size_bytes: u32) -> HyperFileMetaConfig {
    HyperFileMetaConfig {
        data_block_size: block_size_bytes as usize,
        block_ptr_format: BlockPtrFormat::PartedSegment,
        ..Default::default()
    }
}

/// The inode of an empty container with this block size and length. Nothing of the container is stored yet.
///
/// # Errors
/// When the engine cannot make one.
pub fn new_inode(store: &Store, block_size_bytes: u32, size_bytes: u64) -> io::Result<InodeRaw> {
    let meta = new_meta(block_size_bytes);
    let loader = NodeLoader::new(store.clone(), IndexChecksums::default(), None);
    let index = BMap::<u64, BlockPtr, BlockPtr, _, _>::new(
        meta.root_size,
        meta.meta_block_size,
        loader,
        IndexCache::default(),
    )?;
    index.set_userdata(BMapUserData::new(meta.block_ptr_format).as_u32());
    let mut inode = Inode::default_file()
        .with_mode(&HyperFileMode::from_mode(FileMode::default_file()))
        .with_meta_config(&meta);
    inode.set_size(size_bytes as usize);
    let mut root = InodeRaw::default().i_bmap;
    root.copy_from_slice(index.as_slice());
    Ok(inode.to_raw(root))
}

/// Creates a container with this inode in one request, so that it is there completely or not at all.
///
/// # Errors
/// `AlreadyExists` when there is one.
pub async fn create(store: &Store, inode: &InodeRaw) -> io::Result<()> {
    let config = config(store, &HyperFileMetaConfig::default());
    let staging = S3Staging::create(&store.client, config.staging.clone(), config.runtime.clone()).await?;
    Staging::<NodeLoader>::flush_inode(&staging, inode.as_u8_slice(), &None, FlushInodeFlag::Create, None)
        .await?;
    Ok(())
}

/// Opens the container; writable unless `is_read_only`. From then on, every request of the engine that names the inode
/// passes `guard`, which the caller must close once this has returned.
///
/// # Errors
/// `NotFound` when there is none, `InvalidData` when its format is unknown.
pub(crate) async fn open(
    store: &Store,
    guard: &InodeGuard,
    checksums: IndexChecksums,
    index_cache: IndexCache,
    is_read_only: bool,
) -> io::Result<Container> {
    // The open replaces this geometry by the stored one.
    let config = config(store, &HyperFileMetaConfig::default());
    let client = SumsWriter::new(store.clone()).client(&store.client);
    let staging = staging(store, guard.guarded(&client), &config);
    let loader = NodeLoader::new(store.clone(), checksums, Some(index_cache.clone()));
    let flags = if is_read_only { read_only() } else { read_write() };
    Container::open(staging, loader, index_cache, config, flags).await
}

/// What `S3Staging::from` makes, without its asking whether the inode exists: the open reads it next. Landings take clones
/// of it, so they are behind the same guard.
pub(super) fn staging(store: &Store, client: Client, config: &HyperFileConfig) -> S3Staging {
    S3Staging {
        client,
        bucket: store.bucket.clone(),
        root_path: store.root.clone(),
        root_path_slash: store.data_key(""),
        inode_file: store.data_key(inode::NAME),
        config: config.staging.clone(),
        runtime_config: config.runtime.clone(),
        interceptor: None,
        read_timing: Arc::default(),
    }
}

/// Access times are off. With them every read would change the inode, and every flush would send it.
fn read_write() -> HyperFileFlags {
    HyperFileFlags::from_flags(FileFlags::rdwr().noatime())
}

fn read_only() -> HyperFileFlags {
    HyperFileFlags::from_flags(FileFlags::rdonly().noatime())
}

impl StateId {
    /// The state id of an open container, including the changes that were applied to it.
    pub(super) fn of_container(c: &Container) -> Self {
        let stat = c.stat();
        Self {
            cno: c.last_cno(),
            mtime: (stat.st_mtime, stat.st_mtime_nsec),
            ctime: (stat.st_ctime, stat.st_ctime_nsec),
        }
    }
}

impl Walk {
    /// Begins a walk over the stored index of a container to which no changes were applied.
    ///
    /// # Errors
    /// `InvalidInput` when there are changes, because the index then holds nodes that are not stored.
    pub(super) fn of_container(container: &Container) -> io::Result<Self> {
        if container.is_bmap_dirty() {
            let reason = "the container holds changes that are not published";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        let (loader, cache) = (container.bmap_get_block_loader(), container.bmap_get_node_cache());
        Self::new(Root(container.bmap_get_raw()), loader, cache)
    }
}
