//! The objects that probes write: which they are, and how those of probes that were killed go.

use std::time::{Duration, SystemTime};

use super::{ObjectEntry, Store};
use crate::base::store_error::StoreError;

/// What the objects of one probe have before its id, below the volume's `.meta/`.
const PREFIX: &str = "probe-";
/// What each check calls its objects, before the number of its attempt.
const NAMES: [&str; 11] = [
    "absent",
    "read_back",
    "metadata",
    "ranges",
    "etags",
    "create_only",
    "replace_matching",
    "create_only_multipart",
    "racing_creations",
    "racing_replacements",
    CLOCK,
];
/// The object by which the store's clock is read.
const CLOCK: &str = "clock";
/// Tries of a check that meets a store that is not reached.
pub(super) const ATTEMPTS_MAX: usize = 4;
/// The longest body, in bytes.
const BODY_BYTES_MAX: u64 = 256;
/// A probe may still run whose objects are younger: it would read what is gone as a promise broken.
const AGE_MIN: Duration = Duration::from_secs(15 * 60);

/// The prefix of a new probe's objects.
pub(super) fn new_prefix(store: &Store) -> String {
    let id = uuid::Uuid::new_v4().simple();
    store.meta_key(&format!("{PREFIX}{id}/"))
}

/// Whether an object is one of a probe: by its whole name and its size. It tells of no volume.
pub(crate) fn is_of_probe(store: &Store, object: &ObjectEntry) -> bool {
    let of_name = || {
        let rest = object.key.strip_prefix(&store.meta_key(PREFIX))?;
        let (id, name) = rest.split_once('/')?;
        let (check, attempt) = name.rsplit_once('-')?;
        let is_id = uuid::Uuid::try_parse(id).is_ok_and(|parsed| parsed.simple().to_string() == id);
        let is_attempt = (1..=ATTEMPTS_MAX).any(|n| n.to_string() == attempt);
        Some(is_id && is_attempt && NAMES.contains(&check))
    };
    object.size_bytes <= BODY_BYTES_MAX && of_name() == Some(true)
}

/// Removes what probes left that were killed. What another one may be using stays.
///
/// # Errors
/// [`StoreError`].
pub(crate) async fn sweep(store: &Store) -> Result<(), StoreError> {
    let mut left = store.list(&store.meta_key(PREFIX)).await?;
    left.retain(|object| is_of_probe(store, object));
    if left.is_empty() {
        return Ok(());
    }
    // The store says how old they are: the clocks of its users differ.
    let now = time_of(store).await?;
    let is_old = |object: &ObjectEntry| {
        now.duration_since(object.last_modified)
            .is_ok_and(|age| age >= AGE_MIN)
    };
    let old: Vec<String> = left.into_iter().filter(is_old).map(|object| object.key).collect();
    store.delete_keys(&old).await
}

/// The time by the store's clock.
async fn time_of(store: &Store) -> Result<SystemTime, StoreError> {
    let key = format!("{}{CLOCK}-1", new_prefix(store));
    store.put(&key, "now").await?;
    let info = store.head(&key).await?;
    store.delete(&key).await?;
    Ok(info.map_or(SystemTime::UNIX_EPOCH, |info| info.last_modified))
}
