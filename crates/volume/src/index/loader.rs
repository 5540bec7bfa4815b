//! Fetches index nodes, for look-ups and for the engine. All nodes are read through this loader.
//!
//! The engine's own loader trusts what an object's header says of its length and what nodes say of each other.

use std::io;
use std::sync::Arc;

use btree_ondisk::BlockLoader;
use bytes::Bytes;
use hyperfile::meta_format::BlockPtrFormat;
use hyperfile::segment::Segment;
use hyperfile::{BMapUserData, BlockPtr, SegmentId};

use super::cache::IndexCache;
use super::checksums::IndexChecksums;
use crate::base::error::VolumeError;
use crate::base::single_flight::SingleFlight;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::format::node::{self, NODE_BYTES};
use crate::format::object_names::object_of;
use crate::store::Store;
use crate::store::interceptors::window_checksums::{self, WINDOW_BYTES};

/// Bytes fetched for a node that is missing: its neighbours in the object are wanted next more often than not. What has
/// check values has one for each such piece.
const FETCH_BYTES: u64 = window_checksums::WIDE_WINDOW_BYTES;
/// Nodes of one level fetched at once by one look-up.
const FETCHES_IN_FLIGHT: usize = 16;

/// Fetches index nodes from the store, together with their neighbours, and each only once for any number of look-ups
/// that need it. A node is returned only if it has the layout of a node and, when its object has checksums, matches
/// them.
#[derive(Clone)]
pub(crate) struct NodeLoader {
    store: Store,
    checksums: IndexChecksums,
    cache: Option<IndexCache>,
    flights: SingleFlight<(u64, u64), Fetched>,
}

/// A piece of an object, or a text that says what is wrong with it.
pub(super) type Fetched = Result<Bytes, Arc<str>>;

impl NodeLoader {
    /// A loader that adds the neighbours of the nodes it fetches to `cache`.
    pub(crate) fn new(store: Store, checksums: IndexChecksums, cache: Option<IndexCache>) -> Self {
        Self {
            checksums,
            store,
            cache,
            flights: SingleFlight::default(),
        }
    }

    /// The piece of an object that has this offset, as far as the object reaches, fetched once however many want it: its bytes, checked,
    /// or what is wrong with it.
    pub(super) async fn piece(&self, segment: SegmentId, offset: u64) -> io::Result<Fetched> {
        let start = piece_start(offset);
        let name = Segment::segid_to_staging_file_id(segment);
        let (store, checksums) = (self.store.clone(), self.checksums.clone());
        self.flights
            .run((object_of(segment), start), async move {
                let store = store.holder_of(segment.as_cno());
                let key = store.data_key(&name);
                let fetched = async {
                    let got = store.get_within_info(&key, start, FETCH_BYTES).await?;
                    if let Some((bytes, info)) = &got {
                        checksums.verify(&store, segment, info, start, bytes).await?;
                    }
                    Ok(got.map(|(bytes, _)| bytes))
                };
                match fetched.await {
                    Ok(Some(bytes)) => Ok(Ok(bytes)),
                    Ok(None) => Err(Arc::new(VolumeError::Corrupt {
                        what: format!("the index in the object {key}"),
                        reason: "the object is missing".into(),
                    })),
                    Err::<_, StoreError>(e) if e.kind == StoreErrorKind::Corrupt => {
                        Ok(Err(e.to_string().into()))
                    }
                    Err(e) => Err(Arc::new(e.into())),
                }
            })
            .await
            .map_err(|e| io::Error::other(VolumeError::Shared(e)))
    }

    /// As [`Self::piece`], of the least that has check values of its own around this offset, and where that begins: damage in a piece is
    /// no reason to refuse what lies beside it.
    pub(super) async fn window(&self, segment: SegmentId, offset: u64) -> io::Result<(u64, Fetched)> {
        let start = offset - offset % WINDOW_BYTES;
        let name = Segment::segid_to_staging_file_id(segment);
        let store = self.store.holder_of(segment.as_cno());
        let key = store.data_key(&name);
        let got = match store.get_within_info(&key, start, WINDOW_BYTES).await {
            Ok(Some((bytes, info))) => {
                // What is known of the index of an object of an earlier release is of more than this.
                let is_alone = window_checksums::is_narrow(&info)
                    || store.sums_of(&key, &info).await.is_ok_and(|s| s.is_some());
                match is_alone {
                    true => Ok(bytes),
                    false => Err("it lies in what is not what was written".into()),
                }
            }
            Ok(None) => Err("the object is missing".into()),
            Err(e) if e.kind == StoreErrorKind::Corrupt => Err(e.to_string().into()),
            Err(e) => return Err(io::Error::other(VolumeError::from(e))),
        };
        Ok((start, got))
    }

    /// Gives the nodes of a piece to the cache.
    pub(super) fn keep(&self, segment: SegmentId, start: u64, piece: &Bytes, format: BlockPtrFormat) {
        let Some(cache) = &self.cache else { return };
        // A piece that is not a node is data.
        let whole = piece.chunks_exact(NODE_BYTES).enumerate();
        for (index, bytes) in whole.filter(|(_, bytes)| node::check(bytes).is_ok()) {
            let place = (start as usize) + index * NODE_BYTES;
            cache.keep(BlockPtrFormat::encode(segment, place, 0, &format), bytes);
        }
    }

    async fn load(&self, pointer: BlockPtr, node: &mut [u8], format: BlockPtrFormat) -> io::Result<()> {
        let (segment, offset) = BlockPtrFormat::decode(&pointer, &format);
        let offset = offset as u64;
        let (mut start, mut fetched) = (piece_start(offset), self.piece(segment, offset).await?);
        if fetched.is_err() {
            (start, fetched) = self.window(segment, offset).await?;
        }
        let name = Segment::segid_to_staging_file_id(segment);
        let damaged = |reason: &str| {
            let reason = format!("the index node at {offset} of the object {name} is damaged: {reason}");
            io::Error::new(io::ErrorKind::InvalidData, reason)
        };
        let fetched = fetched.map_err(|reason| damaged(&reason))?;
        let at = (offset - start) as usize;
        let bytes = fetched.get(at..at + node.len());
        let bytes = bytes.ok_or_else(|| damaged("the object ends before it"))?;
        node::check(bytes).map_err(|reason| damaged(&reason))?;
        node.copy_from_slice(bytes);
        self.keep(segment, start, &fetched, format);
        Ok(())
    }
}

impl BlockLoader<BlockPtr> for NodeLoader {
    async fn read(
        &self,
        pointer: BlockPtr,
        node: &mut [u8],
        user_data: u32,
    ) -> io::Result<Vec<(BlockPtr, Vec<u8>)>> {
        self.load(pointer, node, format_of(user_data)?).await?;
        Ok(Vec::new())
    }

    async fn read_batch(
        &self,
        pointers: &[BlockPtr],
        nodes: &mut [Vec<u8>],
        user_data: u32,
    ) -> io::Result<Vec<(BlockPtr, Vec<u8>)>> {
        use futures::stream::{self, StreamExt, TryStreamExt};
        let format = format_of(user_data)?;
        // The futures are made before the stream: if the stream made them, the compiler would not see that the result
        // is `Send`.
        let loads: Vec<_> = pointers
            .iter()
            .zip(nodes.iter_mut())
            .map(|(&pointer, node)| self.load(pointer, node, format))
            .collect();
        stream::iter(loads)
            .buffer_unordered(FETCHES_IN_FLIGHT)
            .try_collect::<()>()
            .await?;
        Ok(Vec::new())
    }

    fn dup_from_new_path(self, _: &str) -> Self {
        self
    }
}

/// Where the piece begins that has this offset of an object.
pub(super) fn piece_start(offset: u64) -> u64 {
    offset - offset % FETCH_BYTES
}

/// The format of block pointers, as an index's root has it.
pub(crate) fn format_of(user_data: u32) -> io::Result<BlockPtrFormat> {
    // Checked first, because the conversion below does not check that the value is one of the enumeration.
    BlockPtrFormat::try_from_u8(user_data as u8)?;
    Ok(BMapUserData::from_u32(user_data).blk_ptr_format)
}
