//! Check values of the indexes of objects that carry none themselves: `<root>.meta/index/<object>`.
//!
//! An object that is put in one piece carries check values (`store/interceptors/window_checksums.rs`); one uploaded in parts cannot, because they
//! would have to be known before its first byte is sent. So after a publish its index is read back, and its check values
//! are put beside the container. Nobody waits for them, and an index without them is taken as it is: they are an
//! additional net. They name the very write they are of, by its ETag, and say nothing of any other.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use hyperfile::SegmentId;
use hyperfile::ondisk::SegmentHeader;
use hyperfile::segment::Segment;
use log::debug;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::base::store_error::StoreError;
use crate::format::segment_header::check_claims;
use crate::store::interceptors::window_checksums::{self, WINDOW_BYTES};
use crate::store::{ObjectInfo, Store};

/// Bytes of an index read back at a time, whole windows.
const READ_BACK_BYTES: u64 = 8 * WINDOW_BYTES;
/// Objects whose check values are remembered; past it, all are forgotten.
const REMEMBERED_MAX: usize = 4096;

/// What is known of one object's index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct IndexSeal {
    /// The write of the object that this is of.
    etag: String,
    /// Where the index ends, in bytes from the object's start.
    index_end_bytes: u64,
    /// Check values of the windows up to there.
    crc32c: String,
}

/// The key of the check values of an object.
pub(crate) fn key(store: &Store, object: &str) -> String {
    store.meta_key(&format!("index/{object}"))
}

/// Looks whether this is the body of such an object.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_seal(body: &[u8]) -> Result<(), String> {
    let seal: Result<IndexSeal, _> = serde_json::from_slice(body);
    seal.map(drop).map_err(|e| e.to_string())
}

/// Check values beside the container. Clones share what they remember.
#[derive(Clone)]
pub(crate) struct IndexSeals {
    store: Store,
    known: Arc<Mutex<HashMap<String, Option<Arc<IndexSeal>>>>>,
}

impl IndexSeals {
    /// For the container of `store`.
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            known: Arc::default(),
        }
    }

    fn key(&self, object: &str) -> String {
        key(&self.store, object)
    }

    /// Checks a window of an object, read at `offset_bytes`, as far as its index reaches.
    ///
    /// # Errors
    /// `Corrupt`; also when the check values cannot be read.
    pub(super) async fn verify(
        &self,
        object: &str,
        info: &ObjectInfo,
        offset_bytes: u64,
        window: &Bytes,
    ) -> Result<(), StoreError> {
        if window_checksums::is_sealed(info) {
            return Ok(());
        }
        match self.of(object).await? {
            Some(seal) if seal.etag == info.etag.0 => check(&seal, offset_bytes, window)
                .map_err(|reason| self.store.corrupt(&self.store.data_key(object), reason)),
            _ => Ok(()),
        }
    }

    async fn of(&self, object: &str) -> Result<Option<Arc<IndexSeal>>, StoreError> {
        if let Some(known) = self.known.lock().get(object) {
            return Ok(known.clone());
        }
        let key = self.key(object);
        let found = match self.store.get(&key).await? {
            Some((body, _)) => {
                let seal = serde_json::from_slice(&body);
                Some(Arc::new(
                    seal.map_err(|e| self.store.corrupt(&key, e.to_string()))?,
                ))
            }
            None => None,
        };
        let mut known = self.known.lock();
        if known.len() >= REMEMBERED_MAX {
            known.clear();
        }
        known.insert(object.to_owned(), found.clone());
        Ok(found)
    }

    /// Puts the check values of a published checkpoint beside the container, unless its object carries its own.
    pub(crate) async fn seal(self, cno: u64) {
        let object =
            Segment::segid_to_staging_file_id(SegmentId::new_from_cno(cno).at_part(Segment::SUMMARY_PART));
        match self.made(&object).await {
            Ok(true) => debug!("the index of checkpoint {cno} has check values"),
            Ok(false) => {}
            // Nothing depends on it.
            Err(e) => debug!("the index of checkpoint {cno} has no check values: {e}"),
        }
    }

    async fn made(&self, object: &str) -> Result<bool, StoreError> {
        let key = self.store.data_key(object);
        let first = self.store.get_within_info(&key, 0, WINDOW_BYTES).await?;
        let Some((first, info)) = first.filter(|(_, info)| !window_checksums::is_sealed(info)) else {
            return Ok(false);
        };
        let header = first.get(..SegmentHeader::size()).map(SegmentHeader::from_slice);
        let Some(header) = header.filter(|h| check_claims(h, info.size_bytes).is_ok()) else {
            return Ok(false);
        };
        let index_bytes = u64::from(header.s_nmetablk) << header.s_meta_blk_shift;
        let index_end_bytes = header.aligned_ss_bytes() as u64 + index_bytes;
        let mut start = index_end_bytes.min(WINDOW_BYTES);
        if first.len() < start as usize {
            return Ok(false);
        }
        let mut crc32c = window_checksums::seal(&first[..start as usize]);
        while start < index_end_bytes {
            let len = READ_BACK_BYTES.min(index_end_bytes - start);
            let Some(piece) = self.store.get_range(&key, start, len).await? else {
                return Ok(false);
            };
            crc32c += &window_checksums::seal(&piece);
            start += len;
        }
        let seal = IndexSeal {
            etag: info.etag.0,
            index_end_bytes,
            crc32c,
        };
        let body = serde_json::to_vec(&seal).map_err(|e| self.store.corrupt(&key, e.to_string()))?;
        self.store.put(&self.key(object), body).await?;
        self.known.lock().remove(object);
        Ok(true)
    }
}

fn check(seal: &IndexSeal, offset_bytes: u64, window: &Bytes) -> Result<(), String> {
    let Some(left) = seal
        .index_end_bytes
        .checked_sub(offset_bytes)
        .filter(|left| *left > 0)
    else {
        return Err(format!(
            "its index ends before {offset_bytes}, where a node should be"
        ));
    };
    let covered = left.min(WINDOW_BYTES) as usize;
    if window.len() < covered {
        return Err("it ends before its index does".into());
    }
    window_checksums::verify(
        &seal.crc32c,
        offset_bytes,
        &window.slice(..covered),
        seal.index_end_bytes,
    )
}
