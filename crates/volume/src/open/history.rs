//! Which history a volume belongs to: whether the data beside a container continues what the container has.
//!
//! Checkpoint list, WAL and caches name the checkpoint on which they build ([`CheckpointId`]). A container that was
//! restored from a backup, rolled back by another tool, or created again does not have the checkpoints of its earlier
//! history. Data that names one of those is not trusted: old entries are set aside, a WAL is refused until somebody
//! decides, and caches are emptied.
//!
//! * [`look`] reads and changes nothing; [`Seen::settle`] makes the checkpoint list agree with the container.
//! * [`Seen::has`] answers for one checkpoint, with one request; with another one where its entry is of an earlier release.

use futures::stream::{self, StreamExt, TryStreamExt};
use futures::try_join;
use log::warn;
use parking_lot::Mutex;
use serde::Serialize;

use crate::base::checkpoint_id::{Checkpoint, CheckpointId, InodeCheck};
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::ids::GENERATIONS_AHEAD_MAX;
use crate::engine::checkpoint_stored;
use crate::format::object_names::cno_of;
use crate::index::origins;
use crate::meta::checkpoint_list::{self, CatalogueEntry};
use crate::store::{ETag, Store};

/// The most generations that an abandoned history may have used above the newest one that is known of it.
pub const GENERATIONS_LEFT: u64 = 1 << 32;
const _: () = assert!(GENERATIONS_LEFT > GENERATIONS_AHEAD_MAX);
/// Number of entries that are read at once.
const READS_AT_ONCE: usize = 16;
/// Where entries of an abandoned history are kept, below the volume's `.meta/`.
pub(crate) const ASIDE: &str = "aside/";

/// Whether this is the name, below the volume's `.meta/`, of an entry that was set aside.
pub(crate) fn is_aside(name: &str) -> bool {
    name.starts_with(ASIDE)
}

/// What the checkpoint list says of the container's newest checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Relation {
    /// It has the checkpoint's own entry.
    Recorded(CatalogueEntry),
    /// It has an entry of an earlier release, which does not say to which checkpoint with that number it belongs.
    Unmarked(CatalogueEntry, ETag),
    /// It has no entry, and the entry before it belongs to a checkpoint that the container has: a server was killed
    /// between a publish and its entry. `generation` is that of the entry before.
    Unrecorded { generation: u64 },
    /// It belongs to another history.
    Foreign,
}

/// What was seen of a container and its checkpoint list.
#[derive(Debug)]
pub struct Seen {
    store: Store,
    newest: Checkpoint,
    /// The check value of the inode of the container when it was created, if the label has it.
    origin: Option<InodeCheck>,
    relation: Relation,
    /// Numbers of entries above the newest checkpoint, ascending.
    later: Vec<u64>,
    /// The checkpoint that was asked for last and is there. The next question is usually for the same one.
    known: Mutex<Option<CheckpointId>>,
}

/// What is known of a volume before its container is opened.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// The check value of the inode of the container when it was created.
    pub origin: Option<InodeCheck>,
    /// An entry, perhaps that of the newest checkpoint.
    pub entry: Option<CatalogueEntry>,
    /// A number, and the numbers of the entries above it. They were listed after this owner took the volume, so nobody
    /// adds more.
    pub later: Option<(u64, Vec<u64>)>,
}

/// Finds out how the checkpoint list relates to a container with this newest checkpoint. Changes nothing.
///
/// # Errors
/// When the store fails, or an entry is damaged.
pub async fn look(store: &Store, newest: Checkpoint, known: Known) -> Result<Seen, VolumeError> {
    let Known { origin, entry, later } = known;
    let relation = async {
        if let Some(entry) = entry.filter(|e| e.is_of(newest.id) == Some(true)) {
            return Ok(Relation::Recorded(entry));
        }
        relation(store, newest.id, origin).await
    };
    let later = async {
        match later.filter(|(above, _)| *above <= newest.id.cno) {
            Some((_, mut numbers)) => {
                numbers.retain(|&n| n > newest.id.cno);
                Ok(numbers)
            }
            None => checkpoint_list::numbers_after(store, newest.id.cno).await,
        }
    };
    let (relation, later) = try_join!(relation, later)?;
    Ok(Seen {
        store: store.clone(),
        newest,
        origin,
        relation,
        later,
        known: Mutex::default(),
    })
}

async fn relation(
    store: &Store,
    newest: CheckpointId,
    origin: Option<InodeCheck>,
) -> Result<Relation, VolumeError> {
    if newest.cno == 0 {
        return Ok(match origin {
            Some(origin) if origin != newest.check => Relation::Foreign,
            _ => Relation::Unrecorded { generation: 0 },
        });
    }
    if let Some((entry, etag)) = checkpoint_list::load_entry_with(store, newest.cno).await? {
        return Ok(match entry.is_of(newest) {
            Some(true) => Relation::Recorded(entry),
            Some(false) => Relation::Foreign,
            None => Relation::Unmarked(entry, etag),
        });
    }
    let numbers = checkpoint_list::numbers(store).await?;
    let Some(before) = numbers.into_iter().rfind(|&n| n < newest.cno) else {
        return Ok(Relation::Unrecorded { generation: 0 });
    };
    let Some(before) = checkpoint_list::load_entry(store, before).await? else {
        return Ok(Relation::Foreign);
    };
    let is_own = match before.check {
        None => true,
        Some(check) => {
            let id = CheckpointId {
                cno: before.cno,
                check,
            };
            checkpoint_stored(store, id.cno).await? == Some(id)
        }
    };
    Ok(match is_own {
        true => Relation::Unrecorded {
            generation: before.generation,
        },
        false => Relation::Foreign,
    })
}

impl Seen {
    /// Whether the checkpoint list belongs to another history than the container, in whole or in part.
    pub fn is_broken(&self) -> bool {
        self.relation == Relation::Foreign || !self.later.is_empty()
    }

    /// The newest checkpoint of the container.
    pub fn newest(&self) -> CheckpointId {
        self.newest.id
    }

    /// Whether the container has exactly this checkpoint, as its newest or as an earlier one.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn has(&self, id: CheckpointId) -> Result<bool, VolumeError> {
        let newest = self.newest.id;
        if id.cno >= newest.cno || self.relation == Relation::Foreign {
            return Ok(id == newest);
        }
        if *self.known.lock() == Some(id) {
            return Ok(true);
        }
        if id.cno == 0 {
            return Ok(self.origin.is_none_or(|origin| origin == id.check));
        }
        let entry = checkpoint_list::load_entry(&self.store, id.cno).await?;
        let is_there = match entry.map(|entry| entry.is_of(id)) {
            Some(Some(is_of)) => is_of,
            // Of an earlier release, so it names no checkpoint. What is stored under that number tells.
            Some(None) => checkpoint_stored(&self.store, id.cno).await? == Some(id),
            None => false,
        };
        if is_there {
            *self.known.lock() = Some(id);
        }
        Ok(is_there)
    }

    /// The message when the checkpoint list belongs to another history and nothing names a checkpoint.
    pub fn left_history(&self) -> String {
        let newest = self.newest.id;
        match self.later.last() {
            Some(last) => format!(
                "the volume's catalogue goes up to checkpoint {last}, and the volume's newest is {newest}: it was restored \
                 from a backup, rolled back by another tool, or made anew"
            ),
            None => format!(
                "the volume's catalogue is not that of its newest checkpoint, {newest}: it was restored from a backup, \
                 rolled back by another tool, or made anew"
            ),
        }
    }

    /// The message for something that names a checkpoint that the container does not have.
    pub fn other_history(&self, id: CheckpointId) -> String {
        let newest = self.newest.id;
        format!(
            "it continues checkpoint {id}, and this volume does not have that one: its newest is {newest}; the volume was \
             restored from a backup, rolled back by another tool, or made anew"
        )
    }

    /// Makes the checkpoint list agree with the container, for the owner of this epoch: the newest checkpoint gets an
    /// entry, and entries of another history are set aside. Returns a generation up to which everything is published,
    /// and above which none was ever used. `modified_ms` is when the container last changed, in milliseconds since
    /// 1970-01-01 UTC.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn settle(&self, modified_ms: u64, epoch: u64) -> Result<u64, VolumeError> {
        let mut generation = match &self.relation {
            Relation::Recorded(entry) | Relation::Unmarked(entry, _) => entry.generation,
            Relation::Unrecorded { generation } => *generation,
            Relation::Foreign => 0,
        };
        if self.is_broken() {
            // First: once the entries are set aside, nobody sees any more that there was another history.
            self.forget_origins().await?;
            let numbers = match self.relation {
                Relation::Foreign => checkpoint_list::numbers(&self.store).await?,
                _ => self.later.clone(),
            };
            let newest_left = self.set_aside(&numbers, epoch).await?;
            generation = generation.max(newest_left).saturating_add(GENERATIONS_LEFT);
        }
        match &self.relation {
            Relation::Recorded(_) => {}
            Relation::Unmarked(entry, etag) => {
                let marked = CatalogueEntry {
                    check: Some(self.newest.id.check),
                    ..entry.clone()
                };
                checkpoint_list::replace_entry(&self.store, &marked, etag).await?;
            }
            Relation::Unrecorded { .. } | Relation::Foreign if self.newest.id.cno == 0 => {}
            Relation::Unrecorded { .. } | Relation::Foreign => {
                let entry = CatalogueEntry {
                    cno: self.newest.id.cno,
                    check: Some(self.newest.id.check),
                    published_ms: modified_ms,
                    size_bytes: self.newest.size_bytes,
                    epoch,
                    generation,
                    is_repaired: true,
                    kind: checkpoint_list::Kind::default(),
                };
                if !checkpoint_list::write_entry(&self.store, &entry).await? {
                    // The previous owner's request for the entry of its last publish was still in flight.
                    match checkpoint_list::load_entry(&self.store, entry.cno).await? {
                        Some(there) if there.is_of(self.newest.id) == Some(true) => {
                            generation = generation.max(there.generation);
                        }
                        _ => {
                            return Err(VolumeError::Fenced {
                                reason: format!("checkpoint {} was recorded by another server", entry.cno),
                            });
                        }
                    }
                }
            }
        }
        Ok(generation)
    }

    /// Removes what tells where relocated blocks were written first, as far as it is of another history. That one's numbers are used again,
    /// for other bytes, and a comparison would take these for the ones that were moved there. Without it a comparison tells too much at
    /// worst.
    async fn forget_origins(&self) -> Result<(), VolumeError> {
        let own_up_to = match self.relation {
            Relation::Foreign => 0,
            _ => self.newest.id.cno,
        };
        let listed = origins::listed(&self.store).await?;
        let of_other = listed.into_iter().filter(|object| cno_of(*object) > own_up_to);
        let keys: Vec<String> = of_other.map(|object| origins::key(&self.store, object)).collect();
        self.store.delete_keys(&keys).await?;
        Ok(())
    }

    /// Stores these entries together in one object, which no server reads, and removes them. Returns their newest
    /// generation.
    async fn set_aside(&self, numbers: &[u64], epoch: u64) -> Result<u64, VolumeError> {
        if numbers.is_empty() {
            return Ok(0);
        }
        let entries: Vec<Option<CatalogueEntry>> = stream::iter(numbers.iter().copied())
            .map(|cno| checkpoint_list::load_entry(&self.store, cno))
            .buffered(READS_AT_ONCE)
            .try_collect()
            .await?;
        let entries: Vec<_> = entries.into_iter().flatten().collect();
        let newest_left = entries.iter().map(|e| e.generation).max().unwrap_or(0);
        let key = self
            .store
            .meta_key(&format!("{ASIDE}{epoch:010}-{}", uuid::Uuid::new_v4().simple()));
        let body = serde_json::to_vec(&Aside {
            noticed_ms: now_ms(),
            newest: self.newest.id,
            entries: &entries,
        })
        .map_err(|e| VolumeError::Internal(e.to_string()))?;
        self.store.put_create_only(&key, body).await?;
        let names = numbers
            .iter()
            .map(|&cno| self.store.meta_key(&checkpoint_list::entry_name(cno)));
        self.store.delete_keys(&names.collect::<Vec<_>>()).await?;
        let (first, last) = (numbers[0], numbers[numbers.len() - 1]);
        warn!(
            "the checkpoint list of {} has checkpoints {first} to {last} of another history than the volume, whose newest \
             checkpoint is {}: it was restored from a backup, rolled back by another tool, or made anew; their entries are \
             set aside in {key}",
            self.store.url, self.newest.id
        );
        Ok(newest_left)
    }
}

/// Entries of an abandoned history.
#[derive(Debug, Serialize)]
struct Aside<'a> {
    noticed_ms: u64,
    /// The container's newest checkpoint at that time.
    newest: CheckpointId,
    entries: &'a [CatalogueEntry],
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
