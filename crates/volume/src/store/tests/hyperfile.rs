//! Hyperfile itself over a store: what it asks of S3 is what the store does.

use std::io;

use ::hyperfile::block_source::BlockSource;
use ::hyperfile::config::*;
use ::hyperfile::file::file::HyperFile;
use ::hyperfile::file::flags::{FileFlags, HyperFileFlags};
use ::hyperfile::file::mode::{FileMode, HyperFileMode};
use ::hyperfile::file::{HyperTrait, ReadPolicy};
use ::hyperfile::meta_format::BlockPtrFormat;
use ::hyperfile::meta_loader::s3::S3BlockLoader;
use ::hyperfile::staging::Staging;
use ::hyperfile::staging::config::StagingConfig;
use ::hyperfile::staging::s3::S3Staging;
use btree_ondisk::NullNodeCache;

use super::*;

type Container = HyperFile<'static, S3Staging, S3BlockLoader, NullNodeCache>;

const BLOCK: usize = 64 << 10;
const SIZE: usize = 256 << 20;
/// More than one part of a multipart upload.
const LONG: usize = 40 << 20;

/// Blocks whose contents follow from their offset and the seed.
struct Blocks(u64);

impl BlockSource for Blocks {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let (mut offset, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let within = (offset % BLOCK as u64) as usize;
            let len = rest.len().min(BLOCK - within);
            let (piece, after) = rest.split_at_mut(len);
            piece.copy_from_slice(&self.block(offset - within as u64)[within..within + len]);
            (offset, rest) = (offset + len as u64, after);
        }
        Ok(())
    }
}

impl Blocks {
    fn block(&self, offset: u64) -> Vec<u8> {
        pattern(BLOCK, offset ^ (self.0 << 48) ^ 1)
    }

    fn bytes(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read_at(offset, &mut bytes).unwrap();
        bytes
    }
}

fn config(store: &Store) -> HyperFileConfig {
    let mut runtime = HyperFileRuntimeConfig::default_large();
    runtime.flush_conflict_policy = FlushConflictPolicy::FailFast;
    runtime.data_cache_dirty_max_bytes_threshold = 1 << 40;
    runtime.data_cache_dirty_max_blocks_threshold = 1 << 40;
    runtime.segment_buffer_size = 1 << 40;
    runtime.data_cache_dirty_max_flush_interval = u64::MAX / 4;
    let meta = HyperFileMetaConfig {
        data_block_size: BLOCK,
        block_ptr_format: BlockPtrFormat::PartedSegment,
        ..Default::default()
    };
    let uri = format!("s3://{}/{}", store.bucket, store.root);
    HyperFileConfigBuilder::new()
        .with_meta_config(&meta)
        .with_staging_config(&StagingConfig::new_s3_uri(&uri, None))
        .with_runtime_config(&runtime)
        .build()
}

fn flags() -> HyperFileFlags {
    HyperFileFlags::from_flags(FileFlags::rdwr().noatime())
}

async fn create(store: &Store) -> Container {
    let config = config(store);
    let staging = S3Staging::create(&store.client, config.staging.clone(), config.runtime.clone())
        .await
        .unwrap();
    let (loader, mode) = (
        staging.to_block_loader(),
        HyperFileMode::from_mode(FileMode::default_file()),
    );
    let mut container = HyperFile::new(staging, loader, NullNodeCache, config, flags(), mode)
        .await
        .unwrap();
    container.truncate(SIZE).await.unwrap();
    container
}

async fn open(store: &Store) -> Container {
    let config = config(store);
    let staging = S3Staging::from(&store.client, config.staging.clone(), config.runtime.clone())
        .await
        .unwrap();
    let loader = staging.to_block_loader();
    Container::open(staging, loader, NullNodeCache, config, flags())
        .await
        .unwrap()
}

async fn read(container: &mut Container, offset: u64, len: usize) -> Vec<u8> {
    let plan = container
        .plan_reads(&[(offset, len as u64)], &ReadPolicy::default())
        .await
        .unwrap();
    let mut bytes = vec![0; len];
    plan.execute(&mut bytes, &tokio::sync::Semaphore::new(16))
        .await
        .unwrap();
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_is_written_reopened_and_guarded() {
    for Tested { store, dir: _dir } in stores().await {
        let mut writer = create(&store).await;
        writer.set_block_source(Some(Arc::new(Blocks(1)))).unwrap();
        writer.write_ref(0, BLOCK).await.unwrap();
        HyperTrait::flush(&mut writer).await.unwrap();
        // A segment of several parts.
        writer.write_ref(BLOCK * 16, LONG).await.unwrap();
        HyperTrait::flush(&mut writer).await.unwrap();
        let published = writer.last_cno();
        drop(writer);

        let mut reader = open(&store).await;
        assert_eq!(
            (reader.last_cno(), reader.stat().st_size),
            (published, SIZE as i64)
        );
        assert!(read(&mut reader, 0, BLOCK).await == Blocks(1).bytes(0, BLOCK));
        assert!(read(&mut reader, BLOCK as u64, BLOCK).await == vec![0; BLOCK]);
        let at = (BLOCK * 16) as u64;
        assert!(read(&mut reader, at, LONG).await == Blocks(1).bytes(at, LONG));

        // Two handles on the same state: the first to publish wins, the other is refused.
        let (mut first, mut second) = (open(&store).await, open(&store).await);
        for (handle, seed) in [(&mut first, 2), (&mut second, 3)] {
            handle.set_block_source(Some(Arc::new(Blocks(seed)))).unwrap();
            handle.write_ref(0, BLOCK).await.unwrap();
        }
        HyperTrait::flush(&mut first).await.unwrap();
        let refused = HyperTrait::flush(&mut second)
            .await
            .expect_err("the second writer was not refused");
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists, "{refused}");
        let mut reader = open(&store).await;
        assert!(read(&mut reader, 0, BLOCK).await == Blocks(2).bytes(0, BLOCK));
        drop((first, second, reader));

        let removed = store.delete_prefix(&store.data_key("")).await.unwrap();
        assert!(removed >= 3, "{removed} objects");
    }
}
