//! What a round sees: the objects that are stored, the checkpoints that must stay, and what goes then.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Instant, SystemTime};

use futures::try_join;

use super::account::Account;
use super::choice::{self, Choice, Chooser, Protected};
use super::pins::Unusable;
use super::policy::Policy;
use super::usage::Usage;
use crate::base::error::VolumeError;
use crate::format::object_names;
use crate::meta::snapshots;
use crate::store::Store;

/// The stored objects of the container by number: length in bytes, and when each was written.
pub(super) type Stored = BTreeMap<u64, (u64, SystemTime)>;

/// Chooses what is removed under this policy.
pub(super) fn choose(
    chooser: &mut Chooser,
    usage: &Usage,
    policy: Option<&Policy>,
    protected: &Protected,
    stored: &Stored,
    under_way: &BTreeSet<u64>,
    now: Instant,
) -> Choice {
    let checkpoints = usage.kept().iter().map(|(cno, of)| (*cno, of.published_ms));
    let checkpoints: Vec<(u64, u64)> = checkpoints.collect();
    let written: BTreeMap<u64, SystemTime> = stored.iter().map(|(o, (_, at))| (*o, *at)).collect();
    let now_ms = choice::newest_written_ms(written.values().copied());
    let kept = choice::kept(&checkpoints, policy, protected, now_ms);
    chooser.choose(usage, &kept, &written, under_way, now)
}

/// The number of bytes in these objects.
pub(super) fn bytes_of(objects: &[u64], stored: &Stored) -> u64 {
    let found = objects.iter().filter_map(|object| stored.get(object));
    found.map(|(len_bytes, _)| len_bytes).sum()
}

/// The checkpoints that must stay besides those that the policy keeps.
pub(super) async fn protected(
    store: &Store,
    account: &Account,
    unusable: Unusable,
) -> Result<Protected, VolumeError> {
    let (named, mut in_use) = try_join!(snapshots::named(store), super::in_use(store, unusable))?;
    in_use.extend(account.depends_on());
    Ok(Protected { named, in_use })
}

/// Every object of the container.
pub(super) async fn stored(store: &Store) -> Result<Stored, VolumeError> {
    let root = store.data_key("");
    let listed = store.list(&root).await?;
    let numbered = listed.into_iter().filter_map(|entry| {
        let object = object_names::of_name(entry.key.strip_prefix(&root)?)?;
        // What is inherited is not here; what stands here under such a number is nothing that this volume has made.
        if store.lineage().inherits(object_names::cno_of(object)) {
            return None;
        }
        Some((object, (entry.size_bytes, entry.last_modified)))
    });
    Ok(numbered.collect())
}
