//! The WAL in a bucket: each record is one object, `<prefix>/<epoch>/<number>`, with ten digits each.
//!
//! Numbers have no gaps, and objects are only created, never replaced. That lets a new owner shut an older one out: it
//! creates the next number, and the gaps before it, as *seals*. The store refuses the older owner's PUT of any of these
//! numbers, and the older owner may acknowledge no record behind them (Invariant L1). Each owner begins its own part
//! with a seal, which stays until the WAL is cleared. So a WAL that was opened is never empty.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;

use async_trait::async_trait;
use futures::future::join_all;
use futures::stream::{self, StreamExt};
use log::{debug, warn};
use parking_lot::Mutex;
use uuid::Uuid;

use super::record::Record;
use super::replay::{IN_FLIGHT_MAX, numbers_to_seal};
use super::{AppendError, EncodedGroup, READS_AT_ONCE, RecordId, WalStore};
use crate::base::counters::LOG_RECORDS;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::store::Store;

/// The size of unpublished records in bytes above which flushes wait for checkpoints.
const CAPACITY_BYTES: u64 = 512 << 20;
/// The largest epoch and number for which a name has digits. Names sort as numbers do only while all have equally many
/// digits.
const NUMBER_MAX: u64 = LOG_RECORDS.max;
/// The highest number of sealing rounds. A round is repeated only because an older owner wrote one more record
/// meanwhile.
const SEAL_ROUNDS_MAX: usize = 1000;

/// A WAL on S3.
#[derive(Debug)]
pub struct S3Wal {
    store: Store,
    volume_id: Uuid,
    epoch: u64,
    is_given_up: bool,
    found: Vec<RecordId>,
    first_sequence: u64,
    /// The stored records with the highest generation of each: those that this owner appended, and those that were
    /// found at the opening and read.
    stored: Mutex<BTreeMap<RecordId, u64>>,
    /// The seals that were seen in older owners' parts.
    seals: Mutex<BTreeSet<RecordId>>,
}

impl S3Wal {
    /// Seals the parts of older owners and begins this owner's part. With `is_given_up` no record of an older owner is
    /// needed, so damage is no reason to fail.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] for the WAL of another volume, [`VolumeError::WalAhead`] when a later owner wrote
    /// to it.
    pub async fn open(
        store: Store,
        volume_id: Uuid,
        epoch: u64,
        is_given_up: bool,
    ) -> Result<Self, VolumeError> {
        let mut wal = Self {
            store,
            volume_id,
            epoch,
            is_given_up,
            found: Vec::new(),
            first_sequence: 0,
            stored: Mutex::default(),
            seals: Mutex::default(),
        };
        for _ in 0..SEAL_ROUNDS_MAX {
            let mut found = wal.list().await?;
            if let Some(own_last) = wal.seal(&mut found).await? {
                let own_seal = wal.begin(own_last).await?;
                // Any record that has arrived since stands behind a seal. Nobody can acknowledge it, and the gap before
                // it is no damage. It is read only because it may show that another volume has begun its WAL here.
                for id in wal.list().await? {
                    if id != own_seal && found.binary_search(&id).is_err() {
                        wal.read(id).await?;
                    }
                }
                wal.found = found;
                return Ok(wal);
            }
        }
        Err(VolumeError::Fenced {
            reason: format!("another server goes on writing to the log at {}", wal.store.url),
        })
    }

    /// Lists the WAL for reading only: no owner is shut out, and nothing is written.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] for the WAL of another volume.
    pub async fn peek(store: Store, volume_id: Uuid) -> Result<Self, VolumeError> {
        let found = list(&store).await?;
        if let Some(&last) = found.last() {
            read(&store, last, volume_id).await?;
        }
        Ok(Self {
            store,
            volume_id,
            epoch: 0,
            is_given_up: false,
            found,
            first_sequence: 1,
            stored: Mutex::default(),
            seals: Mutex::default(),
        })
    }

    /// The stored records and seals, ascending.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(&self) -> Result<Vec<RecordId>, VolumeError> {
        list(&self.store).await
    }

    /// Seals every part and adds the seals to `found`. Returns `None` when an older owner wrote one of the numbers
    /// first, else the last number of this epoch's part.
    async fn seal(&self, found: &mut Vec<RecordId>) -> Result<Option<u64>, VolumeError> {
        let parts = parts(found);
        if let Some((&later, numbers)) = parts.range(self.epoch + 1..).next() {
            // It may be the WAL of another volume.
            let id = RecordId {
                epoch: later,
                sequence: numbers[0],
            };
            self.read(id).await?;
            let newest = parts.keys().next_back().copied().unwrap_or(later);
            return Err(VolumeError::WalAhead {
                url: self.store.url.to_string(),
                newest,
                own: self.epoch,
            });
        }
        let mut own_last = 0;
        // Each start that ended otherwise than cleanly has left a part.
        let lasts = parts.into_iter().filter_map(|(epoch, numbers)| {
            let sequence = *numbers.last()?;
            Some((RecordId { epoch, sequence }, numbers))
        });
        let tails = lasts.map(|(id, numbers)| async move { (id, numbers, self.read(id).await) });
        let mut tails = pin!(stream::iter(tails).buffered(READS_AT_ONCE));
        while let Some((id, numbers, tail)) = tails.next().await {
            let (epoch, last) = (id.epoch, id.sequence);
            // Checked before anything is written: it may be the WAL of another volume, which has a server of its own.
            match tail {
                Ok(tail) if tail.is_seal && tail.epoch > epoch => continue,
                // Its owner has published it and removes what it no longer needs. The list is read again.
                Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
                Err(VolumeError::Corrupt { .. }) if self.is_given_up => {}
                tail => drop(tail?),
            }
            for sequence in numbers_to_seal(&numbers) {
                let id = RecordId { epoch, sequence };
                if !self.create_seal(id).await? {
                    return Ok(None);
                }
                found.push(id);
            }
            if epoch == self.epoch {
                own_last = last + 1;
            }
        }
        found.sort_unstable();
        Ok(Some(own_last))
    }

    /// Notes the seals among the last numbers of an older owner's part. Those who replay a WAL read all of it; those who give it
    /// up must know which of its objects keep that owner out.
    async fn note_seals(&self, epoch: u64, numbers: &[u64]) -> Result<(), VolumeError> {
        let last = numbers.last().copied().unwrap_or_default();
        let newest = numbers.iter().filter(|n| **n + IN_FLIGHT_MAX >= last);
        let mut unknown: Vec<RecordId> = newest.map(|&sequence| RecordId { epoch, sequence }).collect();
        unknown.retain(|id| !self.seals.lock().contains(id) && !self.stored.lock().contains_key(id));
        for read in join_all(unknown.into_iter().map(|id| self.read(id))).await {
            match read {
                Ok(_) | Err(VolumeError::Corrupt { .. }) => {}
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Begins this owner's part, beyond every number that an owner of the same epoch may still have in flight. Returns
    /// its seal.
    async fn begin(&mut self, own_last: u64) -> Result<RecordId, VolumeError> {
        let sequence = if own_last == 0 {
            1
        } else {
            own_last + IN_FLIGHT_MAX
        };
        let epoch = self.epoch;
        let id = RecordId { epoch, sequence };
        check_name(id)?;
        if !self.create_seal(id).await? {
            return Err(VolumeError::Fenced {
                reason: format!("another server has just opened the log at {}", self.store.url),
            });
        }
        self.first_sequence = sequence + 1;
        Ok(id)
    }

    /// Returns `false` when the number is taken.
    async fn create_seal(&self, id: RecordId) -> Result<bool, VolumeError> {
        let seal = Record::seal(self.volume_id, self.epoch, id.sequence).encode();
        match self.store.put_create_only(&key(&self.store, id), seal).await {
            Ok(_) => {
                self.note_seal(id);
                Ok(true)
            }
            Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn note_seal(&self, id: RecordId) {
        if id.epoch < self.epoch {
            self.seals.lock().insert(id);
        }
    }

    async fn remove(&self, ids: &[RecordId]) -> Result<(), VolumeError> {
        let keys: Vec<String> = ids.iter().map(|id| key(&self.store, *id)).collect();
        Ok(self.store.delete_keys(&keys).await?)
    }

    fn corrupt(&self, id: RecordId, reason: impl ToString) -> VolumeError {
        VolumeError::Corrupt {
            what: format!(
                "the log record s3://{}/{}",
                self.store.bucket,
                key(&self.store, id)
            ),
            reason: reason.to_string(),
        }
    }
}

/// The numbers in each owner's part, ascending, by the owner's epoch.
fn parts(ids: &[RecordId]) -> BTreeMap<u64, Vec<u64>> {
    let mut parts: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for id in ids {
        parts.entry(id.epoch).or_default().push(id.sequence);
    }
    parts
}

fn key(store: &Store, id: RecordId) -> String {
    store.data_key(&format!("{:010}/{:010}", id.epoch, id.sequence))
}

fn check_name(id: RecordId) -> Result<(), VolumeError> {
    if id.epoch.max(id.sequence) <= NUMBER_MAX {
        return Ok(());
    }
    Err(LOG_RECORDS.exhausted())
}

fn parse_name(name: &str) -> Option<RecordId> {
    let number = |s: &str| (s.len() == 10).then(|| s.parse().ok()).flatten();
    let (epoch, sequence) = name.split_once('/')?;
    Some(RecordId {
        epoch: number(epoch)?,
        sequence: number(sequence)?,
    })
}

/// The records and seals below a prefix, ascending. Other objects are ignored.
///
/// # Errors
/// When the store fails.
pub async fn list(store: &Store) -> Result<Vec<RecordId>, VolumeError> {
    let root = store.data_key("");
    let listed = store.list(&root).await?;
    let mut found: Vec<_> = listed
        .iter()
        .filter_map(|o| parse_name(o.key.strip_prefix(&root)?))
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// Whether there is no record and no seal below a prefix.
///
/// # Errors
/// When the store fails.
pub async fn is_empty(store: &Store) -> Result<bool, VolumeError> {
    let root = store.data_key("");
    let is_record = |key: &str| key.strip_prefix(&root).and_then(parse_name).is_some();
    Ok(!store.has_any(&root, is_record).await?)
}

/// Removes every record and seal below a prefix if they belong to this volume. Returns how many there were.
///
/// # Errors
/// When the store fails, and for the WAL of another volume.
pub async fn remove_all(store: &Store, volume_id: Uuid) -> Result<usize, VolumeError> {
    let found = list(store).await?;
    if let Some(last) = found.last() {
        read(store, *last, volume_id).await?;
    }
    let keys: Vec<String> = found.iter().map(|id| key(store, *id)).collect();
    store.delete_keys(&keys).await?;
    Ok(keys.len())
}

async fn read(store: &Store, id: RecordId, volume_id: Uuid) -> Result<Record, VolumeError> {
    let what = || format!("the log record s3://{}/{}", store.bucket, key(store, id));
    let corrupt = |reason: String| VolumeError::Corrupt { what: what(), reason };
    let Some((bytes, _)) = store.get(&key(store, id)).await? else {
        let removed = "it was removed while it was read";
        return Err(StoreError::new("read", what(), StoreErrorKind::NotFound, removed).into());
    };
    let group = Record::decode(&bytes).map_err(|e| corrupt(e.to_string()))?;
    if group.volume_id != volume_id {
        return Err(super::foreign_wal(&store.url, group.volume_id, volume_id));
    }
    Ok(group)
}

#[async_trait]
impl WalStore for S3Wal {
    fn found(&self) -> &[RecordId] {
        &self.found
    }

    fn first_sequence(&self) -> u64 {
        self.first_sequence
    }

    fn depth(&self) -> usize {
        IN_FLIGHT_MAX as usize
    }

    fn capacity_bytes(&self) -> u64 {
        CAPACITY_BYTES
    }

    async fn read(&self, id: RecordId) -> Result<Record, VolumeError> {
        let group = read(&self.store, id, self.volume_id).await?;
        // A seal carries the epoch of the owner that made it, even in another owner's part.
        if group.sequence != id.sequence || (group.epoch != id.epoch && !group.is_seal) {
            let reason = format!("it calls itself {} of epoch {}", group.sequence, group.epoch);
            return Err(self.corrupt(id, reason));
        }
        match group.is_seal {
            true => self.note_seal(id),
            false => drop(self.stored.lock().insert(id, group.newest_generation())),
        }
        Ok(group)
    }

    async fn append(&self, group: &EncodedGroup) -> Result<(), AppendError> {
        let id = RecordId {
            epoch: self.epoch,
            sequence: group.sequence,
        };
        // Without a name for the record, flushes wait for checkpoints from here on. The next owner has an epoch, and so
        // numbers, of its own.
        check_name(id).map_err(AppendError::Failed)?;
        LOG_RECORDS.note(id.sequence.saturating_sub(1), id.sequence);
        let key = key(&self.store, id);
        match self.store.put_create_only(&key, group.bytes.clone()).await {
            Ok(_) => {}
            Err(e) if e.kind == StoreErrorKind::PreconditionFailed => {
                // The object is a seal, or the result of an earlier attempt whose answer was lost.
                let there = self
                    .store
                    .get(&key)
                    .await
                    .map_err(|e| AppendError::Failed(e.into()))?;
                match there {
                    Some((bytes, _)) if bytes == group.bytes => {}
                    Some(_) => {
                        let reason = format!("another server sealed the log at {}", self.store.url);
                        return Err(AppendError::Fenced(reason));
                    }
                    None => {
                        let reason = format!("the log record {key} appeared and vanished");
                        return Err(AppendError::Fenced(reason));
                    }
                }
            }
            Err(e) => return Err(AppendError::Failed(e.into())),
        }
        self.stored.lock().insert(id, group.newest_generation);
        Ok(())
    }

    async fn trim(&self, generation: u64, acknowledged: u64) -> Result<(), VolumeError> {
        let old: BTreeSet<RecordId> = {
            let stored = self.stored.lock();
            let is_old = |id: &RecordId, newest: u64| {
                newest <= generation && (id.epoch < self.epoch || id.sequence < acknowledged)
            };
            stored
                .iter()
                .filter(|(id, newest)| is_old(id, **newest))
                .map(|(id, _)| *id)
                .collect()
        };
        let removed = self.remove(&Vec::from_iter(old.iter().copied())).await;
        // What may not be removed is not asked for again: it would be ever more.
        let is_settled = match &removed {
            Ok(()) => true,
            Err(e) => e.kind() == ErrorKind::AccessDenied,
        };
        if is_settled {
            self.stored.lock().retain(|id, _| !old.contains(id));
        }
        removed?;
        debug!("{} groups removed from the log", old.len());
        Ok(())
    }

    async fn remove_found(&self) -> Result<(), VolumeError> {
        for (epoch, numbers) in parts(&self.found).range(..self.epoch) {
            self.note_seals(*epoch, numbers).await?;
        }
        let mut found = self.found.clone();
        found.retain(|id| !self.seals.lock().contains(id));
        self.stored.lock().clear();
        self.remove(&found).await
    }

    async fn clear(&self, is_older_alive: bool) -> Result<(), VolumeError> {
        let mut all = self.list().await?;
        if all.is_empty() {
            warn!("the log at {} was removed while it was in use", self.store.url);
        }
        // A later owner may have begun its part meanwhile.
        all.retain(|id| id.epoch <= self.epoch);
        if is_older_alive {
            // Those in the gaps of an older part are known only to who has read it, and who gives a log up has not.
            for (epoch, numbers) in parts(&all).range(..self.epoch) {
                self.note_seals(*epoch, numbers).await?;
            }
            all.retain(|id| !self.seals.lock().contains(id));
        }
        self.remove(&all).await
    }
}

#[cfg(test)]
#[path = "s3_tests.rs"]
mod tests;
