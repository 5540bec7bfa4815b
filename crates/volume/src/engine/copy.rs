//! Copies of stored blocks under a number that the owner has set aside, beside the owner.
//!
//! Nobody refers to a copy before a checkpoint names it, so whatever fails here leaves objects and nothing else. Every object is put
//! create-only: where a later owner uses the number, one of both puts fails, and neither takes the other's bytes for its own.

use std::ops::Range;

use bytes::Bytes;
use hyperfile::SegmentId;
use hyperfile::config::HyperFileMetaConfig;
use hyperfile::ondisk::InodeRaw;
use hyperfile::segment::{Segment, Writer};
use hyperfile::staging::Staging;
use hyperfile::staging::s3::S3Staging;

use super::container;
use crate::base::error::VolumeError;
use crate::format::inode;
use crate::format::object_names::part_of;
use crate::format::summary::{self, Summary};
use crate::index::loader::NodeLoader;
use crate::index::origins::{self, Origins};
use crate::index::relocation::{Node, pointer_of};
use crate::read::read_path::Reads;
use crate::store::interceptors::sums::SumsWriter;
use crate::store::{Frames, Store};

/// Pieces of an object of copies that are uploaded at once: clients have the rest of the line.
const UPLOADS_IN_FLIGHT: usize = 2;
/// Bytes of blocks in one object of copies.
pub(crate) const OBJECT_BYTES: u64 = 64 << 20;

/// A checkpoint number that the owner has set aside for copies. No checkpoint of its own is made under it.
#[derive(Debug, Clone)]
pub struct Reserved {
    number: u64,
    inode: InodeRaw,
    base: u64,
    meta: HyperFileMetaConfig,
}

impl Reserved {
    /// Of the open container that gave the number, whose state is `inode`.
    pub(super) fn new(number: SegmentId, inode: InodeRaw, base: u64, meta: HyperFileMetaConfig) -> Self {
        let number = number.as_cno();
        let inode = InodeRaw {
            i_last_cno: number,
            ..inode
        };
        Self {
            number,
            inode,
            base,
            meta,
        }
    }

    /// The number.
    pub fn number(&self) -> u64 {
        self.number
    }
}

/// Reads stored blocks at the lowest class and puts copies of them.
#[derive(Clone)]
pub(crate) struct Copier {
    store: Store,
    reads: Reads,
    staging: S3Staging,
}

impl Copier {
    pub(super) fn new(store: Store, reads: Reads) -> Self {
        let mut config = container::config(&store, &HyperFileMetaConfig::default());
        config.runtime.segment_mpu_max_concurrency = UPLOADS_IN_FLIGHT;
        let staging = S3Staging {
            client: SumsWriter::new(store.clone()).client(&store.client),
            bucket: store.bucket.clone(),
            root_path: store.root.clone(),
            root_path_slash: store.data_key(""),
            inode_file: store.data_key(inode::NAME),
            config: config.staging,
            runtime_config: config.runtime,
            interceptor: None,
            read_timing: std::sync::Arc::default(),
        };
        Self {
            store,
            reads,
            staging,
        }
    }

    /// Bytes of an object, checked as far as it has check values.
    ///
    /// # Errors
    /// When the store fails, or the object is missing or damaged.
    pub async fn read(&self, object: u64, bytes: Range<u64>) -> Result<Frames, VolumeError> {
        self.reads.read_for_copy(object, bytes).await
    }

    /// What an object of `object_bytes` says of its content, and the nodes of the index in it.
    ///
    /// # Errors
    /// As [`Self::read`]; when it is not laid out as objects of the parted format are.
    pub async fn summary(
        &self,
        object: u64,
        object_bytes: u64,
        block_bytes: u64,
    ) -> Result<(Summary, Vec<Node>), VolumeError> {
        let corrupt = |reason: String| VolumeError::Corrupt {
            what: format!(
                "the object {} of {}",
                crate::format::object_names::name_of(object),
                self.store.url
            ),
            reason,
        };
        let likely = summary::likely_bytes(object_bytes, block_bytes);
        let mut bytes = self.read(object, 0..likely).await?.together();
        let needed = summary::needed_bytes(&bytes, object_bytes).map_err(corrupt)?;
        if needed > bytes.len() as u64 {
            bytes = self.read(object, 0..needed).await?.together();
        }
        let summary = summary::decode(&bytes, object_bytes).map_err(corrupt)?;
        let region = summary.nodes.start as usize..summary.nodes.end as usize;
        let nodes = summary::nodes(&bytes[region]).map(|(at, level, key)| Node {
            level,
            key,
            pointer: pointer_of(object, summary.nodes.start + at),
        });
        let nodes = nodes.collect();
        Ok((summary, nodes))
    }

    /// Puts an object of copies as this part of the number, from 1 on; part 1 must be stored before any other, because an open looks
    /// for that one when it asks whether a number is used. `copies` are blocks, ascending, with their bytes and the pointers that they
    /// were born with. Returns their pointers, in their order; what tells where they come from is stored then, too.
    ///
    /// # Errors
    /// When the store fails, or has an object of that name.
    pub async fn put(
        &self,
        reserved: &Reserved,
        part: u16,
        copies: Vec<Copy>,
    ) -> Result<Vec<u64>, VolumeError> {
        let block_bytes = reserved.meta.data_block_size as u64;
        let object = part_of(reserved.number, part);
        let first_bytes = Writer::<S3Staging>::calc_ss_aligned_bytes(copies.len()) as u64;
        let pointers: Vec<u64> = (0..copies.len() as u64)
            .map(|at| pointer_of(object, first_bytes + at * block_bytes))
            .collect();
        let origins = Origins {
            object,
            first_bytes,
            block_bytes,
            births: copies.iter().map(|copy| copy.birth).collect(),
        };
        let segment = SegmentId::new_from_cno(reserved.number).at_part(part);
        let mut writer = Staging::<NodeLoader>::new_segwr_at(&self.staging, segment, &reserved.meta);
        // Never a checkpoint, whoever finds it.
        writer.mark_partial();
        writer.mark_cleaner();
        writer.set_base(reserved.base);
        for (copy, pointer) in copies.iter().zip(&pointers) {
            writer.inc_datablk(&copy.block, pointer);
        }
        writer.realize_ss(0, &reserved.inode);
        let failed = |e| {
            let name = Segment::segid_to_staging_file_id(segment);
            VolumeError::engine(format!("storing the copies {name}"), e)
        };
        for copy in copies {
            if copy.bytes.len() as u64 != block_bytes {
                return Err(VolumeError::Internal(format!(
                    "block {} was copied in part",
                    copy.block
                )));
            }
            writer.append(&copy.bytes).map_err(failed)?;
        }
        writer.done().await.map_err(failed)?;
        // Not before: until it is there, the object of this name may come to be another owner's.
        origins::put(&self.store, &origins).await?;
        Ok(pointers)
    }
}

/// A block that is copied.
#[derive(Debug, Clone)]
pub(crate) struct Copy {
    /// The block.
    pub block: u64,
    /// The pointer that its bytes were written with at first.
    pub birth: u64,
    /// Its bytes, a whole block.
    pub bytes: Bytes,
}
