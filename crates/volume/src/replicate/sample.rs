//! Whether two containers are of one history, by what both have: the newest checkpoints and objects with the same numbers.

use std::collections::BTreeSet;

use futures::stream::{self, StreamExt, TryStreamExt};
use futures::try_join;

use crate::base::error::{ErrorKind, VolumeError};
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::format::object_names::{name_of, of_name};
use crate::meta::checkpoint_list::{self, CatalogueEntry};
use crate::store::{ObjectInfo, Store, sums};

/// Checkpoints, and objects, that are compared.
const SAMPLE: usize = 16;
/// Requests under way at once.
const LOOKS_AT_ONCE: usize = 8;

/// Whether nothing tells that these are of two histories.
///
/// # Errors
/// When a store fails.
pub(crate) async fn agree(one: &Store, other: &Store) -> Result<bool, VolumeError> {
    let (of_one, of_other) = try_join!(checkpoint_list::numbers(one), checkpoint_list::numbers(other))?;
    let looks = newest_of_both(of_one, of_other)
        .into_iter()
        .map(|cno| async move { Ok(is_same_checkpoint(one, other, cno).await? != Some(false)) });
    if !all(looks.collect()).await? {
        return Ok(false);
    }
    let (of_one, of_other) = try_join!(objects(one), objects(other))?;
    let looks = newest_of_both(of_one, of_other)
        .into_iter()
        .map(|object| async move {
            let name = name_of(object);
            let (key, other_key) = (one.data_key(&name), other.data_key(&name));
            let heads = try_join!(readable_head(one, &key), readable_head(other, &other_key))?;
            let both = heads.0.zip(heads.1);
            Ok::<_, VolumeError>(both.is_none_or(|(a, b)| sums::may_be_one_write(&a, &b)))
        });
    all(looks.collect()).await
}

/// The number of the newest checkpoint that both have as one and the same: objects up to that number are the same in both.
///
/// # Errors
/// When a store fails.
pub(crate) async fn newest_shared(one: &Store, other: &Store) -> Result<Option<u64>, VolumeError> {
    let (of_one, of_other) = try_join!(checkpoint_list::numbers(one), checkpoint_list::numbers(other))?;
    for number in newest_of_both(of_one, of_other) {
        if is_same_checkpoint(one, other, number).await? == Some(true) {
            return Ok(Some(number));
        }
    }
    Ok(None)
}

/// Whether both have the same checkpoint of this number; nothing where an entry is missing, damaged, or does not tell.
async fn is_same_checkpoint(one: &Store, other: &Store, cno: u64) -> Result<Option<bool>, VolumeError> {
    let (a, b) = try_join!(readable_entry(one, cno), readable_entry(other, cno))?;
    let check = |entry: CatalogueEntry| entry.check;
    Ok(a.and_then(check).zip(b.and_then(check)).map(|(a, b)| a == b))
}

/// An entry of the list; nothing if it is damaged.
async fn readable_entry(store: &Store, cno: u64) -> Result<Option<CatalogueEntry>, VolumeError> {
    match checkpoint_list::load_entry(store, cno).await {
        Err(e) if e.kind() == ErrorKind::Corrupt => Ok(None),
        found => found,
    }
}

/// What an object says of itself; nothing if it is damaged.
async fn readable_head(store: &Store, key: &str) -> Result<Option<ObjectInfo>, StoreError> {
    match store.head(key).await {
        Err(e) if e.kind == StoreErrorKind::Corrupt => Ok(None),
        found => found,
    }
}

/// Whether each of these finds the same at both.
async fn all<F: Future<Output = Result<bool, VolumeError>>>(looks: Vec<F>) -> Result<bool, VolumeError> {
    let same: Vec<bool> = stream::iter(looks).buffered(LOOKS_AT_ONCE).try_collect().await?;
    Ok(!same.contains(&false))
}

/// The last numbers that are in both.
fn newest_of_both(one: Vec<u64>, other: Vec<u64>) -> Vec<u64> {
    let one: BTreeSet<u64> = one.into_iter().collect();
    let mut both: Vec<u64> = other.into_iter().filter(|number| one.contains(number)).collect();
    both.sort_unstable_by(|a, b| b.cmp(a));
    both.truncate(SAMPLE);
    both
}

/// The numbers of a container's objects.
async fn objects(store: &Store) -> Result<Vec<u64>, VolumeError> {
    let root = store.data_key("");
    let listed = store.list(&root).await?;
    let numbers = listed
        .iter()
        .filter_map(|object| of_name(object.key.strip_prefix(&root)?));
    Ok(numbers.collect())
}
