//! Check values of the indexes of objects that earlier releases uploaded in parts: `<root>.meta/index/<object>`.
//!
//! An object that is put in one piece carries check values (`store/interceptors/window_checksums.rs`), one that is uploaded in parts has
//! them beside the container (`store/sums.rs`). Earlier releases read the index of such a one back after its publish, and put the check
//! values of that alone. They name the very write they are of, by its ETag, and say nothing of any other.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use hyperfile::SegmentId;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::base::store_error::StoreError;
use crate::format::object_names::{name_of, object_of};
use crate::store::interceptors::window_checksums::{self, WIDE_WINDOW_BYTES};
use crate::store::lineage::Holder;
use crate::store::{ETag, ObjectInfo, Store};

/// Objects whose check values are remembered; past it, all are forgotten.
const REMEMBERED_MAX: usize = 4096;

/// The checksums of one object's index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct IndexChecksum {
    /// The ETag of the write of the object that they describe.
    etag: String,
    /// The end of the index, in bytes from the object's start.
    index_end_bytes: u64,
    /// The checksums of the windows up to that end.
    crc32c: String,
}

/// The key of an object's checksums.
pub(crate) fn key(store: &Store, object: &str) -> String {
    store.meta_key(&format!("index/{object}"))
}

/// Checks that this is a valid object of checksums.
///
/// # Errors
/// A text that says what is wrong.
pub(crate) fn check_seal(body: &[u8]) -> Result<(), String> {
    let checksum: Result<IndexChecksum, _> = serde_json::from_slice(body);
    checksum.map(drop).map_err(|e| e.to_string())
}

/// The check values of an object that was copied, as they are put beside its copy, where it has some that are of the write that was
/// copied.
///
/// # Errors
/// When the store fails.
pub(crate) async fn carried(
    from: &Store,
    object: &str,
    of: &ETag,
    copy: &ETag,
) -> Result<Option<Vec<u8>>, StoreError> {
    let key = key(from, object);
    let Some((body, _)) = from.get(&key).await? else {
        return Ok(None);
    };
    match serde_json::from_slice::<IndexChecksum>(&body) {
        Ok(checksum) if checksum.etag == of.0 => {
            let checksum = IndexChecksum {
                etag: copy.0.clone(),
                ..checksum
            };
            let body = serde_json::to_vec(&checksum).map_err(|e| from.corrupt(&key, e.to_string()))?;
            Ok(Some(body))
        }
        _ => Ok(None),
    }
}

/// By the object's number, and whether it is a parent's: what is copied from there has values of its own.
type Known = HashMap<(u64, bool), Option<Arc<IndexChecksum>>>;

/// Check values beside the container. Clones share what they remember.
#[derive(Clone, Default)]
pub(crate) struct IndexChecksums {
    known: Arc<Mutex<Known>>,
}

impl IndexChecksums {
    /// Checks a window of an object, read at `offset_bytes` from `holder`, as far as its index reaches. Who holds it may be another one
    /// by now, whose copy is another write.
    ///
    /// # Errors
    /// `Corrupt`; also when the checksums cannot be read.
    pub(super) async fn verify(
        &self,
        holder: &Holder<'_>,
        object: SegmentId,
        info: &ObjectInfo,
        offset_bytes: u64,
        window: &Bytes,
    ) -> Result<(), StoreError> {
        let key = holder.data_key(&name_of(object_of(object)));
        // One that has check values of all of it was compared with them as it was read.
        if window_checksums::has_checksums(info) || holder.sums_of(&key, info).await?.is_some() {
            return Ok(());
        }
        match self.of(holder, object).await? {
            Some(checksum) if checksum.etag == info.etag.0 => {
                check(&checksum, offset_bytes, window).map_err(|reason| holder.corrupt(&key, reason))
            }
            _ => Ok(()),
        }
    }

    async fn of(
        &self,
        holder: &Holder<'_>,
        object: SegmentId,
    ) -> Result<Option<Arc<IndexChecksum>>, StoreError> {
        let number = object_of(object);
        let of = (number, holder.is_parent());
        if let Some(known) = self.known.lock().get(&of) {
            return Ok(known.clone());
        }
        let found = load(holder, number).await?.map(Arc::new);
        let mut known = self.known.lock();
        if known.len() >= REMEMBERED_MAX {
            known.clear();
        }
        known.insert(of, found.clone());
        Ok(found)
    }
}

/// What is remembered of an object that `holder` has, whichever write it is of.
async fn load(holder: &Store, object: u64) -> Result<Option<IndexChecksum>, StoreError> {
    let key = key(holder, &name_of(object));
    let Some((body, _)) = holder.get(&key).await? else {
        return Ok(None);
    };
    let checksum = serde_json::from_slice(&body);
    Ok(Some(checksum.map_err(|e| holder.corrupt(&key, e.to_string()))?))
}

/// What is remembered of the index of an object.
pub(crate) struct OfIndex(Option<IndexChecksum>);

impl OfIndex {
    /// Of the volume's own object, whichever write it is of.
    ///
    /// # Errors
    /// When the store fails, or the check values cannot be read.
    pub(crate) async fn load(store: &Store, object: u64) -> Result<Self, StoreError> {
        load(store, object).await.map(Self)
    }

    /// Compares a part of this write of the object, which starts at a whole window, as far as the index reaches.
    ///
    /// # Errors
    /// A text that says what is wrong.
    pub(crate) fn check(&self, write: &ETag, offset_bytes: u64, part: &Bytes) -> Result<(), String> {
        let Some(checksum) = self.0.as_ref().filter(|of| of.etag == write.0) else {
            return Ok(());
        };
        let left = checksum.index_end_bytes.saturating_sub(offset_bytes);
        let covered = left.min(part.len() as u64);
        for at in (0..covered).step_by(WIDE_WINDOW_BYTES as usize) {
            check(checksum, offset_bytes + at, &part.slice(at as usize..))?;
        }
        Ok(())
    }
}

fn check(checksum: &IndexChecksum, offset_bytes: u64, window: &Bytes) -> Result<(), String> {
    let Some(left) = checksum
        .index_end_bytes
        .checked_sub(offset_bytes)
        .filter(|left| *left > 0)
    else {
        return Err(format!(
            "its index ends before {offset_bytes}, where a node should be"
        ));
    };
    let covered = left.min(WIDE_WINDOW_BYTES) as usize;
    if window.len() < covered {
        return Err("it ends before its index does".into());
    }
    window_checksums::verify(
        &checksum.crc32c,
        offset_bytes,
        &window.slice(..covered),
        checksum.index_end_bytes,
    )
}
