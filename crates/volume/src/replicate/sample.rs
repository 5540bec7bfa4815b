//! Whether two containers are of one history, by what both have: the newest checkpoints and objects with the same numbers.

use std::collections::BTreeSet;

use futures::stream::{self, StreamExt, TryStreamExt};
use futures::try_join;

use crate::base::error::VolumeError;
use crate::format::object_names::{name_of, of_name};
use crate::meta::checkpoint_list;
use crate::store::{Store, sums};

/// Checkpoints, and objects, that are compared.
const SAMPLE: usize = 16;
/// Requests under way at once.
const LOOKS_AT_ONCE: usize = 8;

/// Whether nothing tells that these are of two histories.
///
/// # Errors
/// When a store fails.
pub(super) async fn agree(one: &Store, other: &Store) -> Result<bool, VolumeError> {
    let (of_one, of_other) = try_join!(checkpoint_list::numbers(one), checkpoint_list::numbers(other))?;
    let looks = newest_of_both(of_one, of_other)
        .into_iter()
        .map(|cno| async move {
            let entries = try_join!(
                checkpoint_list::load_entry(one, cno),
                checkpoint_list::load_entry(other, cno)
            )?;
            let check = |entry: Option<checkpoint_list::CatalogueEntry>| entry.and_then(|entry| entry.check);
            let both = check(entries.0).zip(check(entries.1));
            Ok::<_, VolumeError>(both.is_none_or(|(a, b)| a == b))
        });
    let looks: Vec<_> = looks.collect();
    let same: Vec<bool> = stream::iter(looks).buffered(LOOKS_AT_ONCE).try_collect().await?;
    if same.contains(&false) {
        return Ok(false);
    }
    let (of_one, of_other) = try_join!(objects(one), objects(other))?;
    let looks = newest_of_both(of_one, of_other)
        .into_iter()
        .map(|object| async move {
            let name = name_of(object);
            let (key, other_key) = (one.data_key(&name), other.data_key(&name));
            let heads = try_join!(one.head(&key), other.head(&other_key))?;
            let both = heads.0.zip(heads.1);
            Ok::<_, VolumeError>(both.is_none_or(|(a, b)| sums::may_be_copies(&a, &b)))
        });
    let looks: Vec<_> = looks.collect();
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
