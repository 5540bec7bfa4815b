//! The engine's access to its objects. What it reads of a container is checked first.
//!
//! The engine reads everything but data through its staging. Most reads are passed on unchanged. The inode, the headers
//! of segments and the loader of index nodes are checked, because the engine would trust them.

use std::io;

use hyperfile::compaction::{METADATA_KEY, PendingCompaction, StoredCompaction};
use hyperfile::config::HyperFileMetaConfig;
use hyperfile::file::ReadTiming;
use hyperfile::inode::{FlushInodeFlag, OnDiskState};
use hyperfile::meta_loader::s3::S3BlockLoader;
use hyperfile::ondisk::{InodeRaw, SegmentHeader};
use hyperfile::segment::{Segment, Writer};
use hyperfile::staging::config::StagingConfig;
use hyperfile::staging::s3::S3Staging;
use hyperfile::staging::{Staging, StagingIntercept};
use hyperfile::stream_segment::{self, StreamLayout};
use hyperfile::{BlockPtr, Cno, SegmentId};

use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::format::inode;
use crate::format::segment_header::decode_header;
use crate::index::checksums::IndexChecksums;
use crate::index::loader::NodeLoader;
use crate::store::Store;
use crate::store::interceptors::window_checksums;

/// The engine's own staging.
type Plain = S3BlockLoader;

fn store_of(staging: &S3Staging) -> Store {
    Store::of_client(&staging.client, &staging.bucket, &staging.root_path)
}

fn io_error(e: &StoreError) -> io::Error {
    let kind = match e.kind {
        StoreErrorKind::NotFound => io::ErrorKind::NotFound,
        StoreErrorKind::Corrupt => io::ErrorKind::InvalidData,
        StoreErrorKind::AccessDenied => io::ErrorKind::PermissionDenied,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, e.to_string())
}

/// The header at an object's start. It is refused if it claims more than the object holds.
async fn header_of(staging: &S3Staging, object: SegmentId) -> io::Result<SegmentHeader> {
    let store = store_of(staging);
    let key = store.data_key(&Segment::segid_to_staging_file_id(object));
    // Reads a whole window, so that its checksum can be verified.
    let got = store
        .get_within_info(&key, 0, window_checksums::WIDE_WINDOW_BYTES)
        .await;
    let Some((bytes, info)) = got.map_err(|e| io_error(&e))? else {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            format!("there is no object {key}"),
        ));
    };
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, format!("{key}: {reason}"));
    decode_header(&bytes, info.size_bytes).map_err(invalid)
}

/// The checkpoint that is stored under this number, if there is one. Only an inode can tell whether it was published.
///
/// # Errors
/// When the store fails, or the object is damaged.
pub(crate) async fn checkpoint_stored(store: &Store, cno: u64) -> Result<Option<CheckpointId>, VolumeError> {
    let stored = header_stored(store, cno).await?;
    Ok(stored.map(|header| CheckpointId::of_inode(&header.s_inode)))
}

/// As [`checkpoint_stored`], but returns the inode that was published with the checkpoint, if it was published.
///
/// # Errors
/// As [`checkpoint_stored`].
pub(crate) async fn state_stored(store: &Store, cno: u64) -> Result<Option<InodeRaw>, VolumeError> {
    let Some(header) = header_stored(store, cno).await? else {
        return Ok(None);
    };
    let raw = inode::decode(header.s_inode.as_u8_slice()).map_err(|reason| VolumeError::Corrupt {
        what: format!("the inode in the objects of checkpoint {cno} of {}", store.url),
        reason,
    })?;
    Ok((raw.i_last_cno == cno).then_some(raw))
}

async fn header_stored(store: &Store, cno: u64) -> Result<Option<SegmentHeader>, VolumeError> {
    for object in [
        SegmentId::new_from_cno(cno).at_part(Segment::SUMMARY_PART),
        SegmentId::new_from_cno(cno),
    ] {
        let key = store.data_key(&Segment::segid_to_staging_file_id(object));
        let Some((bytes, info)) = store
            .get_within_info(&key, 0, window_checksums::WIDE_WINDOW_BYTES)
            .await?
        else {
            continue;
        };
        let header = bytes.get(..SegmentHeader::size()).map(SegmentHeader::from_slice);
        let header = match header {
            // An object that is nothing but a header at its end begins as one with a header at its start does.
            Some(header)
                if header.has_magic()
                    && header.s_cno == cno
                    && HyperFileMetaConfig::try_from_u32(header.s_inode.i_meta_config).is_ok() =>
            {
                Some(header)
            }
            _ => header_at_end(store, &key, object, info.size_bytes).await?,
        };
        let header = header.ok_or_else(|| VolumeError::Corrupt {
            what: format!("the object {key}"),
            reason: "it neither begins nor ends as a segment does".into(),
        })?;
        return Ok(Some(header));
    }
    Ok(None)
}

/// Reads the header of an object that has it at its end, as objects of the stream format do.
async fn header_at_end(
    store: &Store,
    key: &str,
    object: SegmentId,
    size_bytes: u64,
) -> Result<Option<SegmentHeader>, VolumeError> {
    let header_bytes = stream_segment::HEADER_SIZE as u64;
    let Some(at) = size_bytes.checked_sub(header_bytes) else {
        return Ok(None);
    };
    let Some(bytes) = store.get_range(key, at, header_bytes).await? else {
        return Ok(None);
    };
    let layout = StreamLayout::from_header(size_bytes as usize, &bytes, object);
    Ok(layout.ok().map(|layout| layout.hdr.as_segment_header()))
}

impl Staging<NodeLoader> for S3Staging {
    async fn load_inode(&self, buf: &mut [u8]) -> io::Result<Option<OnDiskState>> {
        let (raw, info) = inode::load(&store_of(self)).await.map_err(|e| match &e {
            VolumeError::Store(e) => io_error(e),
            VolumeError::NotFound { .. } => io::Error::new(io::ErrorKind::NotFound, e.to_string()),
            _ => io::Error::new(io::ErrorKind::InvalidData, e.to_string()),
        })?;
        let written = info.last_modified.duration_since(std::time::UNIX_EPOCH);
        buf.copy_from_slice(&raw.as_u8_slice()[..buf.len()]);
        Ok(Some(OnDiskState {
            checksum: info.etag.0.replace('"', ""),
            timestamp: written.map_or(0, |t| t.as_secs() as i64),
            compaction: StoredCompaction::from_metadata(info.metadata.get(METADATA_KEY).map(String::as_str)),
        }))
    }

    async fn load_segment_header(&self, object: SegmentId, stream: bool) -> io::Result<SegmentHeader> {
        if stream {
            // The engine checks it against the object's length and name.
            return Staging::<Plain>::load_segment_header(self, object, stream).await;
        }
        header_of(self, object).await
    }

    async fn fetch_index_nodes(
        &self,
        object: SegmentId,
        user_data: u32,
    ) -> io::Result<Vec<(BlockPtr, Vec<u8>)>> {
        if !crate::index::loader::format_of(user_data)?.is_stream() {
            header_of(self, object).await?;
        }
        Staging::<Plain>::fetch_index_nodes(self, object, user_data).await
    }

    fn to_block_loader(&self) -> NodeLoader {
        let store = store_of(self);
        NodeLoader::new(store, IndexChecksums::default(), None)
    }

    // Everything below is passed on to the engine unchanged.

    fn read_timing(&self) -> &ReadTiming {
        Staging::<Plain>::read_timing(self)
    }

    async fn load_inode_from_segment(
        &self,
        buf: &mut [u8],
        segment: SegmentId,
    ) -> io::Result<Option<OnDiskState>> {
        Staging::<Plain>::load_inode_from_segment(self, buf, segment).await
    }

    async fn load_segment_timestamp(&self, segment: SegmentId) -> io::Result<(i64, i64)> {
        Staging::<Plain>::load_segment_timestamp(self, segment).await
    }

    async fn object_time(&self, object: SegmentId) -> io::Result<(i64, i64)> {
        Staging::<Plain>::object_time(self, object).await
    }

    async fn segment_exists(&self, segment: SegmentId) -> io::Result<bool> {
        Staging::<Plain>::segment_exists(self, segment).await
    }

    async fn parts_of(&self, cno: Cno) -> io::Result<Vec<u16>> {
        Staging::<Plain>::parts_of(self, cno).await
    }

    async fn flush_inode(
        &self,
        buf: &[u8],
        state: &Option<OnDiskState>,
        flag: FlushInodeFlag,
        compaction: Option<&PendingCompaction>,
    ) -> io::Result<Option<OnDiskState>> {
        Staging::<Plain>::flush_inode(self, buf, state, flag, compaction).await
    }

    async fn remove_inode(&self, state: &Option<OnDiskState>) -> io::Result<()> {
        Staging::<Plain>::remove_inode(self, state).await
    }

    async fn load_data_block(
        &self,
        segment: SegmentId,
        segment_offset: usize,
        offset: usize,
        block_size: usize,
        buf: &mut [u8],
    ) -> io::Result<()> {
        Staging::<Plain>::load_data_block(self, segment, segment_offset, offset, block_size, buf).await
    }

    async fn load_range(&self, segment: SegmentId, offset: usize, buf: &mut [u8]) -> io::Result<()> {
        Staging::<Plain>::load_range(self, segment, offset, buf).await
    }

    fn new_segwr(&self, segment: SegmentId, config: &HyperFileMetaConfig) -> Writer<Self> {
        Staging::<Plain>::new_segwr(self, segment, config)
    }

    fn new_segwr_at(&self, segment: SegmentId, config: &HyperFileMetaConfig) -> Writer<Self> {
        Staging::<Plain>::new_segwr_at(self, segment, config)
    }

    fn dir_filename(&self) -> (&str, &str) {
        Staging::<Plain>::dir_filename(self)
    }

    fn root_path(&self) -> &str {
        Staging::<Plain>::root_path(self)
    }

    fn config(&self) -> &StagingConfig {
        Staging::<Plain>::config(self)
    }

    async fn unlink(&self) -> io::Result<()> {
        Staging::<Plain>::unlink(self).await
    }

    fn interceptor(&mut self, interceptor: impl StagingIntercept<Self> + 'static) {
        Staging::<Plain>::interceptor(self, interceptor);
    }
}
