//! Lists the objects of a container, and of those that it has inherited from.

use std::collections::BTreeMap;

use super::object_names;
use crate::base::store_error::StoreError;
use crate::store::Store;

/// Length of each object of the container, in bytes, by number.
pub(crate) type StoredObjects = BTreeMap<u64, u64>;

/// What is stored below the container's root now, and below those of the volumes that it has inherited from; and the keys of what is
/// none of a container's below its own.
///
/// # Errors
/// When a store fails.
pub(crate) async fn list(store: &Store) -> Result<(StoredObjects, Vec<String>), StoreError> {
    let shared = store.lineage().pass();
    let root = store.data_key("");
    let mut stored = StoredObjects::new();
    let mut others = Vec::new();
    for entry in store.list(&root).await? {
        let name = entry.key.strip_prefix(&root).unwrap_or_default();
        match object_names::of_name(name) {
            // Of a clone an attempt at ending its sharing that was interrupted: it is not read.
            Some(object) if shared.is_some() && store.lineage().inherits(object_names::cno_of(object)) => {}
            Some(object) => drop(stored.insert(object, entry.size_bytes)),
            None if object_names::is_container_object(name) => {}
            None => others.push(entry.key),
        }
    }
    for part in shared.iter().flat_map(|_| store.lineage().inherited()) {
        let root = part.store.data_key("");
        for entry in part.store.list(&root).await? {
            let object = entry.key.strip_prefix(&root).and_then(object_names::of_name);
            // Of numbers that the clone has from another one it is no matter what this one has.
            let is_of_it = |object: &u64| {
                let holder = store.lineage().holder(object_names::cno_of(*object));
                holder.is_some_and(|holder| holder.up_to == part.up_to)
            };
            if let Some(object) = object.filter(is_of_it) {
                stored.insert(object, entry.size_bytes);
            }
        }
    }
    Ok((stored, others))
}
