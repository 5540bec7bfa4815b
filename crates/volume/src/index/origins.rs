//! Where relocated blocks were written first: `<root>.meta/origins/<object>`, beside each object of copies.
//!
//! A block that was moved has another pointer and the same bytes. Two checkpoints are compared by the pointers that their blocks were
//! born with, so that what was only moved is not told as changed. A copy of a copy has the pointer of the first: there are no chains.
//! What has no such object is taken for what its pointer says, so a difference is told too often at worst, and never too seldom.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;
use hyperfile::BlockPtr;

use super::relocation::offset_of;
use crate::base::checksum::crc32c;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::format::object_names::{self, name_of, of_pointer};
use crate::store::Store;

/// Where they are, below the volume's `.meta/`.
const ORIGINS: &str = "origins/";
const MAGIC: &[u8; 8] = b"HNBDORG1";
/// Magic, object, offset of its first block, bytes of a block, number of blocks.
const HEADER_BYTES: usize = 8 + 4 * 8;
const CHECK_BYTES: usize = 4;

/// The pointers that the blocks of one object were born with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origins {
    /// The object.
    pub object: u64,
    /// Where its first block is, in bytes from its start.
    pub first_bytes: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// In the order of the blocks.
    pub births: Vec<BlockPtr>,
}

impl Origins {
    /// As it is stored.
    pub fn encode(&self) -> Bytes {
        let mut body = Vec::with_capacity(HEADER_BYTES + self.births.len() * 8 + CHECK_BYTES);
        body.extend_from_slice(MAGIC);
        for number in [
            self.object,
            self.first_bytes,
            self.block_bytes,
            self.births.len() as u64,
        ] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        for birth in &self.births {
            body.extend_from_slice(&birth.to_le_bytes());
        }
        let check = crc32c(&body);
        body.extend_from_slice(&check.to_le_bytes());
        body.into()
    }

    /// Reads what is stored.
    ///
    /// # Errors
    /// What is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        let number = |bytes: &[u8]| {
            bytes
                .iter()
                .rev()
                .fold(0, |high, byte| high << 8 | u64::from(*byte))
        };
        let rest = body
            .strip_prefix(MAGIC.as_slice())
            .ok_or("it does not begin as one does")?;
        let (rest, check) = rest
            .split_at_checked(rest.len().saturating_sub(CHECK_BYTES))
            .ok_or("it is cut")?;
        let checked = &body[..body.len() - check.len()];
        if check.len() != CHECK_BYTES || number(check) != u64::from(crc32c(checked)) {
            return Err("its checksum is another".into());
        }
        let (header, births) = rest
            .split_at_checked(HEADER_BYTES - MAGIC.len())
            .ok_or("it is cut")?;
        let mut header = header.chunks_exact(8).map(number);
        let mut next = || header.next().unwrap_or(0);
        let (object, first_bytes, block_bytes, count) = (next(), next(), next(), next());
        if births.len() as u64 != count.saturating_mul(8) || block_bytes == 0 {
            return Err(format!("it claims {count} blocks of {block_bytes} bytes"));
        }
        Ok(Self {
            object,
            first_bytes,
            block_bytes,
            births: births.chunks_exact(8).map(number).collect(),
        })
    }

    /// The pointer that the block at this one was born with, if it is one of them.
    pub fn birth_of(&self, pointer: BlockPtr) -> Option<BlockPtr> {
        let from_first = offset_of(pointer).checked_sub(self.first_bytes)?;
        let at = usize::try_from(from_first / self.block_bytes).ok()?;
        let is_block = of_pointer(pointer) == self.object && from_first.is_multiple_of(self.block_bytes);
        is_block.then(|| self.births.get(at).copied()).flatten()
    }
}

/// The key of the origins of an object.
pub(crate) fn key(store: &Store, object: u64) -> String {
    store.meta_key(&format!("{ORIGINS}{}", name_of(object)))
}

/// Whether an object can have origins: no checkpoint's first part has.
pub(crate) fn may_have(object: u64) -> bool {
    !object_names::is_summary(object)
}

/// The objects that have origins, by number.
///
/// # Errors
/// When the store fails.
pub(crate) async fn listed(store: &Store) -> Result<HashSet<u64>, StoreError> {
    let prefix = store.meta_key(ORIGINS);
    let listed = store.list(&prefix).await?;
    let objects = listed
        .iter()
        .filter_map(|entry| object_names::of_name(entry.key.strip_prefix(&prefix)?));
    Ok(objects.collect())
}

/// Stores the origins of an object of copies.
///
/// # Errors
/// When the store fails.
pub(crate) async fn put(store: &Store, origins: &Origins) -> Result<(), StoreError> {
    store
        .put(&key(store, origins.object), origins.encode())
        .await
        .map(drop)
}

/// Origins of objects kept in memory at once while two checkpoints are compared, at 8 bytes a block.
const KEPT_MAX: usize = 64;

/// Looks origins up.
pub(crate) struct Births {
    store: Store,
    /// The objects that have origins.
    objects: HashSet<u64>,
    kept: HashMap<u64, Option<Origins>>,
}

impl Births {
    /// Of one volume, as it is now.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn of_volume(store: &Store) -> Result<Self, StoreError> {
        Ok(Self {
            store: store.clone(),
            objects: listed(store).await?,
            kept: HashMap::new(),
        })
    }

    /// The pointer that the block at this one was born with, as far as it is known.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn of(&mut self, pointer: BlockPtr) -> Result<BlockPtr, StoreError> {
        let object = of_pointer(pointer);
        if !self.objects.contains(&object) {
            return Ok(pointer);
        }
        if !self.kept.contains_key(&object) {
            if self.kept.len() >= KEPT_MAX {
                self.kept.clear();
            }
            let found = self.load(object).await?;
            self.kept.insert(object, found);
        }
        let origins = self.kept.get(&object).and_then(Option::as_ref);
        Ok(origins
            .and_then(|origins| origins.birth_of(pointer))
            .unwrap_or(pointer))
    }

    async fn load(&self, object: u64) -> Result<Option<Origins>, StoreError> {
        let key = key(&self.store, object);
        let decoded = match self.store.get(&key).await {
            Ok(None) => return Ok(None),
            Ok(Some((body, _))) => Origins::decode(&body),
            Err(e) if e.kind == StoreErrorKind::Corrupt => Err(e.detail),
            Err(e) => return Err(e),
        };
        match decoded {
            Ok(origins) if origins.object == object => Ok(Some(origins)),
            // What is not known to be only moved is told as changed.
            Ok(_) => Ok(None),
            Err(reason) => {
                log::warn!("{key} cannot be read; the blocks that it describes count as changed: {reason}");
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::relocation::pointer_of;
    use super::*;

    fn origins() -> Origins {
        Origins {
            object: 9 << 32 | 2,
            first_bytes: 8192,
            block_bytes: 4096,
            births: (0..5)
                .map(|at| pointer_of(3 << 32 | 1, 4096 * (at + 7)))
                .collect(),
        }
    }

    #[test]
    fn the_birth_of_a_copy_is_found_and_no_other() {
        let stored = Origins::decode(&origins().encode()).unwrap();
        assert_eq!(stored, origins());
        for at in 0..5 {
            let copy = pointer_of(9 << 32 | 2, 8192 + at * 4096);
            assert_eq!(
                stored.birth_of(copy),
                Some(pointer_of(3 << 32 | 1, 4096 * (at + 7)))
            );
        }
        for (object, at) in [
            (9 << 32 | 2, 8192 + 5 * 4096),
            (9 << 32 | 2, 4096),
            (9 << 32 | 3, 8192),
        ] {
            assert_eq!(stored.birth_of(pointer_of(object, at)), None);
        }
    }

    #[test]
    fn damaged_origins_are_refused() {
        let body = origins().encode();
        for at in [0, 8, 30, 45, body.len() - 1] {
            let mut damaged = body.to_vec();
            damaged[at] ^= 1;
            assert!(Origins::decode(&damaged).is_err(), "{at}");
        }
        for len in [0, 7, 8, 12, body.len() - 1] {
            assert!(Origins::decode(&body[..len]).is_err(), "{len}");
        }
    }
}
