//! What the kept checkpoints need, and whether it is there. As `check/` looks at it, but that it keeps no more of each object than where
//! its needed part ends: a server has less memory to spare.

use std::collections::BTreeMap;
use std::ops::Range;

use futures::future::BoxFuture;
use futures::stream::{self, StreamExt, TryStreamExt};
use futures::{FutureExt, try_join};
use log::debug;

use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::store_error::StoreErrorKind;
use crate::engine::state_stored;
use crate::format::block_lengths::BlockLengths;
use crate::format::inode;
use crate::format::node::NODE_BYTES;
use crate::format::object_names::{cno_of, name_of, summaries_of};
use crate::format::stored_objects::{self, StoredObjects};
use crate::format::stored_state::{Root, StoredState};
use crate::index::cache::IndexCache;
use crate::index::inspect::{Scope, Seen, inspect};
use crate::meta::{checkpoint_list, snapshots};
use crate::retention::plan;
use crate::store::Store;
use crate::store::verify::{BadPart, Wrong};

/// Checkpoints' own objects that are read at once.
const READS_AT_ONCE: usize = 2;
/// Pieces of the index that are fetched at once: nobody waits for them.
const FETCHES_AT_ONCE: usize = 1;
/// Memory for nodes of the index during a look, in bytes: for those that lie beside each other.
const INDEX_MEMORY_BYTES: u64 = 16 << 20;

/// What seems wrong with objects, by number.
pub(super) type Suspects = BTreeMap<u64, Vec<BadPart>>;

/// What is needed.
#[derive(Debug)]
pub(super) struct Needed {
    /// The newest checkpoint.
    pub newest: u64,
    /// Objects that are needed, and where what is needed of them ends, in bytes.
    pub objects: BTreeMap<u64, u64>,
    /// Those of them that are there and long enough, with their lengths in bytes.
    pub there: BTreeMap<u64, u64>,
    /// What seems wrong with the others, and with nodes of the index.
    pub suspects: Suspects,
}

/// The checkpoints that are kept.
pub(super) struct Kept {
    /// The newest.
    pub newest: u64,
    /// Their states, the newest first.
    pub states: Vec<StoredState>,
    /// Those whose own object cannot be read, by number, and why.
    pub unreadable: Vec<(u64, Wrong, String)>,
    /// Size of a block of data, in bytes.
    pub block_size_bytes: u64,
}

impl Kept {
    /// Loads what is listed or has a name now, as far as the plan keeps it, and the newest.
    ///
    /// # Errors
    /// When the store fails, or the inode cannot be read.
    pub fn load(store: &Store) -> BoxFuture<'_, Result<Self, VolumeError>> {
        Self::load_unboxed(store).boxed()
    }

    async fn load_unboxed(store: &Store) -> Result<Self, VolumeError> {
        let (numbers, named) = try_join!(checkpoint_list::numbers(store), named(store))?;
        // After the list was read: it has nothing that these do not.
        let ((raw, _), plan) = try_join!(inode::load(store), plan_of(store))?;
        let newest = StoredState::of_inode(&raw);
        let cno = newest.state_id.cno;
        let block_size_bytes = inode::block_size_bytes(&raw).map_err(|reason| VolumeError::Corrupt {
            what: format!("the inode of the volume at {}", store.url),
            reason,
        })?;
        let plan = plan.filter(|plan| plan.is_of(cno));
        let is_kept =
            |number: u64| (1..=cno).contains(&number) && plan.as_ref().is_none_or(|plan| plan.keeps(number));
        // By number, and what each must be where a name alone tells of it.
        let mut all: BTreeMap<u64, Option<CheckpointId>> =
            named.into_iter().map(|id| (id.cno, Some(id))).collect();
        all.extend(numbers.into_iter().map(|number| (number, None)));
        all.retain(|number, _| is_kept(*number));
        let mut states = Vec::new();
        if cno > 0 {
            states.push(newest);
        }
        let mut unreadable = Vec::new();
        let loads = all.into_iter().map(|(number, id)| state_of(store, number, id));
        let mut loads = stream::iter(loads).buffered(READS_AT_ONCE);
        while let Some(loaded) = loads.try_next().await? {
            match loaded {
                Loaded::State(state) if state.id() == newest.id() => {}
                Loaded::State(state) => states.push(state),
                Loaded::Unreadable(number, wrong, reason) => unreadable.push((number, wrong, reason)),
                Loaded::Another => {}
            }
        }
        Ok(Self {
            newest: cno,
            states,
            unreadable,
            block_size_bytes: u64::from(block_size_bytes),
        })
    }

    /// How long blocks are stored in them.
    pub fn lengths(&self) -> BlockLengths {
        BlockLengths::new(&self.states, self.block_size_bytes)
    }

    /// Tells of everything that their indexes refer to, the newest one's first.
    ///
    /// # Errors
    /// When the store fails.
    pub fn inspect<'a>(
        &'a self,
        store: &'a Store,
        each: impl FnMut(Seen) + Send + 'a,
    ) -> BoxFuture<'a, Result<(), VolumeError>> {
        let walk = async move {
            let roots: Vec<Root> = self.states.iter().map(|state| state.root).collect();
            // Nothing of it enters the server's own cache.
            let cache = IndexCache::default().with_memory(INDEX_MEMORY_BYTES);
            let scope = Scope::default();
            inspect(store, &roots, &scope, &cache, FETCHES_AT_ONCE, each).await?;
            Ok::<_, VolumeError>(())
        };
        walk.boxed()
    }
}

/// A listed number.
enum Loaded {
    State(StoredState),
    Unreadable(u64, Wrong, String),
    /// What a name is of is not stored: `check` tells of names without a checkpoint.
    Another,
}

/// The state that a listed checkpoint stored. `id` is which one it must be where only a name tells of it.
async fn state_of(store: &Store, cno: u64, id: Option<CheckpointId>) -> Result<Loaded, VolumeError> {
    let (wrong, reason) = match state_stored(store, cno).await {
        Ok(Some(raw)) => {
            let state = StoredState::of_inode(&raw);
            return Ok(match id.is_none_or(|id| id == state.id()) {
                true => Loaded::State(state),
                false => Loaded::Another,
            });
        }
        Ok(None) => (Wrong::Missing, "it is not there".to_owned()),
        Err(e) if e.kind() == ErrorKind::Corrupt => (Wrong::Damaged, e.chain()),
        Err(e) => return Err(e),
    };
    Ok(match id {
        Some(_) => Loaded::Another,
        None => Loaded::Unreadable(cno, wrong, reason),
    })
}

/// The checkpoints that have names. Names that cannot be read keep nobody from reading the rest: `check` tells of them.
async fn named(store: &Store) -> Result<Vec<CheckpointId>, VolumeError> {
    match snapshots::load_all(store).await {
        Ok(names) => Ok(names.into_iter().map(|name| name.checkpoint).collect()),
        Err(e) if e.kind() == ErrorKind::Corrupt => {
            debug!("the scrub goes by the list of checkpoints alone: {}", e.chain());
            Ok(Vec::new())
        }
        Err(e) => Err(e),
    }
}

/// The plan. With one that cannot be read nothing is removed, so that everything listed is there.
async fn plan_of(store: &Store) -> Result<Option<plan::Plan>, VolumeError> {
    match plan::load(store).await {
        Ok(found) => Ok(found.map(|(plan, _)| plan)),
        Err(e) if e.kind() == ErrorKind::Corrupt => Ok(None),
        Err(e) => Err(e),
    }
}

/// Looks up what is needed, and whether it is there.
///
/// # Errors
/// When the store fails, or the inode cannot be read. What else is wrong is suspected.
pub(super) fn look(store: &Store) -> BoxFuture<'_, Result<Needed, VolumeError>> {
    look_unboxed(store).boxed()
}

async fn look_unboxed(store: &Store) -> Result<Needed, VolumeError> {
    let kept = Kept::load(store).await?;
    let lengths = kept.lengths();
    let mut objects: BTreeMap<u64, u64> = BTreeMap::new();
    let mut suspects = Suspects::new();
    let each = |seen: Seen| match seen {
        Seen::Node {
            object, offset_bytes, ..
        } => extend(&mut objects, object, offset_bytes + NODE_BYTES as u64),
        Seen::Block {
            block,
            object,
            offset_bytes,
            ..
        } => extend(&mut objects, object, lengths.stored_at(block, offset_bytes).end),
        Seen::Damaged {
            object,
            offset_bytes,
            reason,
            ..
        } => suspects.entry(object).or_default().push(BadPart {
            bytes: offset_bytes..offset_bytes + NODE_BYTES as u64,
            wrong: Wrong::Damaged,
            reason: format!("the node of the index there cannot be used: {reason}"),
        }),
    };
    kept.inspect(store, each).await?;
    // After the checkpoints, so that all of theirs is in it.
    let (stored, _) = stored_objects::list(store).await?;
    add_own(&kept, &stored, &mut objects, &mut suspects);
    let there = compare(store, &objects, &stored, &mut suspects).await?;
    Ok(Needed {
        newest: kept.newest,
        objects,
        there,
        suspects,
    })
}

fn extend(objects: &mut BTreeMap<u64, u64>, object: u64, end_bytes: u64) {
    let end = objects.entry(object).or_default();
    *end = (*end).max(end_bytes);
}

/// The object of a checkpoint that has its inode, as it is stored; as it is named now if it is not.
pub(super) fn own_object(cno: u64, stored: impl Fn(u64) -> bool) -> u64 {
    let [without_parts, part_0] = summaries_of(cno);
    match !stored(part_0) && stored(without_parts) {
        true => without_parts,
        false => part_0,
    }
}

/// Adds the checkpoints' own objects, by which each is found.
fn add_own(kept: &Kept, stored: &StoredObjects, objects: &mut BTreeMap<u64, u64>, suspects: &mut Suspects) {
    let own_object = |cno: u64| own_object(cno, |object| stored.contains_key(&object));
    for state in &kept.states {
        let own = own_object(state.state_id.cno);
        // What went meanwhile is not missed, and what never was is not either.
        if stored.contains_key(&own) {
            extend(objects, own, 0);
        }
    }
    for (cno, wrong, reason) in &kept.unreadable {
        let own = own_object(*cno);
        extend(objects, own, 0);
        suspects.entry(own).or_default().push(BadPart {
            // The object as such: no block lies in that.
            bytes: 0..0,
            wrong: *wrong,
            reason: reason.clone(),
        });
    }
}

/// Looks whether what is needed is there and long enough. Returns the lengths of what is.
async fn compare(
    store: &Store,
    objects: &BTreeMap<u64, u64>,
    stored: &StoredObjects,
    suspects: &mut Suspects,
) -> Result<BTreeMap<u64, u64>, VolumeError> {
    let mut there = BTreeMap::new();
    for (&object, &end) in objects {
        if let Some(&len_bytes) = stored.get(&object).filter(|len_bytes| **len_bytes >= end) {
            there.insert(object, len_bytes);
            continue;
        }
        // It may be a list that was not up to date.
        let holder = store.holder_of(cno_of(object));
        let (wrong, bytes, reason): (Wrong, Range<u64>, String) =
            match holder.head(&holder.data_key(&name_of(object))).await {
                Ok(Some(info)) if info.size_bytes >= end => {
                    there.insert(object, info.size_bytes);
                    continue;
                }
                Ok(Some(info)) => (
                    Wrong::Short,
                    info.size_bytes..end,
                    format!("it has {} bytes, and {end} are needed", info.size_bytes),
                ),
                Ok(None) => (Wrong::Missing, 0..end.max(1), "it is not there".to_owned()),
                Err(e) if e.kind == StoreErrorKind::Corrupt => (Wrong::Damaged, 0..end.max(1), e.detail),
                Err(e) => return Err(e.into()),
            };
        // All else that was seen of an object that is not there follows from that.
        let of_object = suspects.entry(object).or_default();
        if wrong == Wrong::Missing {
            of_object.clear();
        }
        of_object.push(BadPart { bytes, wrong, reason });
    }
    Ok(there)
}
