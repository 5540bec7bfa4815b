//! Check values of the indexes of objects that earlier releases uploaded in parts: `<root>.meta/index/<object>`.
//!
//! An object that is put in one piece carries check values (`store/interceptors/window_checksums.rs`), one that is uploaded in parts has
//! them beside the container (`store/sums.rs`). Earlier releases read the index of such a one back after its publish, and put the check
//! values of that alone. They name the very write they are of, by its ETag, and say nothing of any other.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::base::store_error::StoreError;
use crate::store::interceptors::window_checksums::{self, WIDE_WINDOW_BYTES};
use crate::store::{ObjectInfo, Store};

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
    let covered = left.min(WIDE_WINDOW_BYTES) as usize;
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
