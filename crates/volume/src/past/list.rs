//! The published checkpoints of a volume, and which of them a person's text names.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use futures::stream::{self, StreamExt, TryStreamExt};
use futures::try_join;
use hyperfile::ondisk::InodeRaw;
use jiff::Timestamp;
use serde::{Serialize, Serializer};

use super::At;
use crate::base::checkpoint_id::CheckpointId;
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::engine::parents;
use crate::engine::state_stored;
use crate::format::inode as stored_inode;
use crate::format::stored_state::StoredState;
use crate::meta::checkpoint_list::{self, CatalogueEntry};
use crate::meta::snapshots::{self, SnapshotName};
use crate::options::StoreOptions;
use crate::retention::{self, Policy, Protected, Reason, Until, Unusable, load_policy, plan};
use crate::store::{ObjectEntry, Store};

/// How far the clocks of servers and store may differ when entries that are certainly too old are skipped.
const CLOCKS_APART_MAX: Duration = Duration::from_secs(24 * 3600);
/// Number of entries that are read at once.
const READS_AT_ONCE: usize = 64;
/// Number of parts into which a search by time divides the rest. Each part costs a request, and all of them one round
/// trip.
const SEARCH_PARTS: usize = 32;

/// A published checkpoint that was found.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// The state that it stored.
    pub(crate) state: StoredState,
    /// Its inode.
    pub(crate) inode: InodeRaw,
    /// Size of a data block in bytes.
    pub block_size_bytes: u32,
    /// When it was published, in milliseconds since 1970-01-01 UTC, by its server's clock.
    pub published_ms: u64,
}

impl Point {
    /// Which checkpoint it is.
    pub fn id(&self) -> CheckpointId {
        self.state.id()
    }

    /// Its number.
    pub fn number(&self) -> u64 {
        self.state.state_id.cno
    }

    /// Size of the volume at the checkpoint, in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.state.size_bytes()
    }
}

/// A checkpoint as it is shown to people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Its number.
    pub cno: u64,
    /// When it was published: RFC 3339, UTC.
    #[serde(serialize_with = "rfc3339")]
    pub time: u64,
    /// Size of the volume at the checkpoint, in bytes.
    pub size_bytes: u64,
    /// Bytes of the objects that it stored, with its index: about what was written since the previous checkpoint.
    pub written_bytes: u64,
    /// The names of the checkpoint.
    pub names: Vec<SnapshotName>,
    /// Why it is kept. If this is empty, one of the next rounds removes it.
    pub kept_by: Vec<Reason>,
    /// Until when that is so. It is shown in RFC 3339, UTC, where it is a time, and as none otherwise.
    #[serde(serialize_with = "rfc3339_of_until")]
    pub kept_until: Option<Until>,
}

fn rfc3339_of_until<S: Serializer>(until: &Option<Until>, serializer: S) -> Result<S::Ok, S::Error> {
    match until {
        Some(Until::Time(ms)) => serializer.serialize_some(&time_text(*ms)),
        Some(Until::Ever | Until::InUse | Until::Newest(_)) | None => serializer.serialize_none(),
    }
}

fn rfc3339<S: Serializer>(ms: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&time_text(*ms))
}

/// A time in milliseconds since 1970-01-01 UTC in the format of RFC 3339. A time beyond the year 9999 is shown as the
/// end of that year.
pub fn time_text(ms: u64) -> String {
    let time = i64::try_from(ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok());
    time.unwrap_or(Timestamp::MAX).to_string()
}

/// The published checkpoints of a volume from `since_ms` to `until_ms`, oldest first. Both are in milliseconds since
/// 1970-01-01 UTC.
///
/// # Errors
/// When the store fails, or there is no volume.
pub async fn list(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    since_ms: u64,
    until_ms: u64,
) -> Result<Vec<Listed>, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let policy = load_policy(&store).await?;
    list_by(&store, since_ms, until_ms, policy.as_ref()).await
}

/// As [`list`], with the reasons for which they would be kept if this were the volume's policy, and until when.
///
/// # Errors
/// As [`list`].
pub(crate) async fn list_by(
    store: &Store,
    since_ms: u64,
    until_ms: u64,
    policy: Option<&Policy>,
) -> Result<Vec<Listed>, VolumeError> {
    let data = async { Ok(store.list(&store.data_key("")).await?) };
    // Which checkpoint of an hour, a day or a month is kept depends on all checkpoints.
    let since_entries_ms = if policy.is_some() { 0 } else { since_ms };
    let (entries, objects, named, in_use) = try_join!(
        entries_since(store, since_entries_ms),
        data,
        snapshots::load_all(store),
        retention::in_use(store, Unusable::Skip)
    )?;
    let written = bytes_by_number(store, &objects);
    let protected = Protected {
        named: named.iter().map(|snapshot| snapshot.checkpoint.cno).collect(),
        in_use,
    };
    let mut names: BTreeMap<CheckpointId, Vec<SnapshotName>> = BTreeMap::new();
    for snapshot in named {
        names.entry(snapshot.checkpoint).or_default().push(snapshot.name);
    }
    let times: Vec<(u64, u64)> = entries
        .iter()
        .map(|entry| (entry.cno, entry.published_ms))
        .collect();
    let written_ms = retention::newest_written_ms(objects.iter().map(|object| object.last_modified));
    let mut kept = retention::kept(&times, policy, &protected, written_ms);
    let until = retention::until(&times, policy, &kept, now_ms());
    let listed = entries
        .into_iter()
        .filter(|entry| (since_ms..=until_ms).contains(&entry.published_ms))
        .map(|entry| {
            let cno = entry.cno;
            let id = entry.check.map(|check| CheckpointId { cno, check });
            Listed {
                cno,
                time: entry.published_ms,
                size_bytes: entry.size_bytes,
                written_bytes: written.get(&cno).copied().unwrap_or(0),
                names: id.and_then(|id| names.remove(&id)).unwrap_or_default(),
                kept_by: kept.remove(&cno).unwrap_or_default(),
                kept_until: until.get(&cno).copied(),
            }
        });
    Ok(listed.collect())
}

/// The entries of the list that may be of this time or later, ascending, including the entry of the newest checkpoint
/// if it is still being written.
async fn entries_since(store: &Store, since_ms: u64) -> Result<Vec<CatalogueEntry>, VolumeError> {
    let (inode, _) = stored_inode::load(store).await?;
    let numbers = checkpoint_list::numbers_up_to(store, inode.i_last_cno).await?;
    let is_newest_listed = numbers.last().map_or(0, |(number, _)| *number) == inode.i_last_cno;
    // An entry is written after its publish, so entries that were written long before are not read.
    let oldest = UNIX_EPOCH + Duration::from_millis(since_ms).saturating_sub(CLOCKS_APART_MAX);
    let (accounted, plan) = try_join!(retention::accounted(store), plan::load(store))?;
    let plan = plan
        .map(|(plan, _)| plan)
        .filter(|plan| plan.is_of(inode.i_last_cno));
    let numbers = numbers
        .into_iter()
        .filter(|(cno, written)| *written >= oldest && plan.as_ref().is_none_or(|plan| plan.keeps(*cno)));
    // The usage table has the same data of the accounted checkpoints, and costs one request.
    let loaded = stream::iter(numbers.map(|(cno, _)| {
        let known = accounted.get(&cno).map(|known| CatalogueEntry {
            cno,
            check: Some(known.check),
            published_ms: known.published_ms,
            size_bytes: known.size_bytes,
            epoch: 0,
            generation: 0,
            is_repaired: false,
            kind: checkpoint_list::Kind::default(),
        });
        async move {
            match known {
                Some(known) => Ok(Some(known)),
                None => checkpoint_list::load_entry(store, cno).await,
            }
        }
    }));
    let loaded: Vec<Option<CatalogueEntry>> = loaded.buffered(READS_AT_ONCE).try_collect().await?;
    let newest = (!is_newest_listed).then(|| CatalogueEntry {
        cno: inode.i_last_cno,
        check: Some(CheckpointId::of_inode(&inode).check),
        published_ms: stored_inode::modified_ms(&inode),
        size_bytes: inode.i_size,
        epoch: 0,
        generation: 0,
        is_repaired: false,
        kind: checkpoint_list::Kind::default(),
    });
    Ok(loaded.into_iter().flatten().chain(newest).collect())
}

/// The number of bytes in each checkpoint's objects.
fn bytes_by_number(store: &Store, objects: &[ObjectEntry]) -> BTreeMap<u64, u64> {
    let prefix = store.data_key("");
    let mut bytes: BTreeMap<u64, u64> = BTreeMap::new();
    for object in objects {
        let number = object.key.strip_prefix(&prefix).and_then(|name| name.get(..10));
        if let Some(Ok(cno)) = number.map(str::parse::<u64>) {
            *bytes.entry(cno).or_default() += object.size_bytes;
        }
    }
    bytes
}

/// The checkpoint that `at` names, or the newest published one when it is `None`.
///
/// # Errors
/// [`VolumeError::NoCheckpoint`] when there is none; [`VolumeError::NotFound`] when there is no volume.
pub async fn find(store: &Store, at: Option<&At>) -> Result<Point, VolumeError> {
    let found = match at {
        None => newest(store).await?,
        Some(At::Number(cno)) => by_number(store, *cno).await?,
        Some(At::Name(name)) => by_name(store, name).await?,
        Some(At::Time(ms)) => by_time(store, *ms).await?,
        Some(At::Ago(ago)) => {
            let ago_ms = u64::try_from(ago.as_millis()).unwrap_or(u64::MAX);
            by_time(store, now_ms().saturating_sub(ago_ms)).await?
        }
    };
    if let Some(found) = found {
        return Ok(found);
    }
    // There may be no volume at all, which is another error.
    stored_inode::load(store).await?;
    Err(VolumeError::NoCheckpoint {
        url: store.url.to_string(),
        at: at.map_or("that was published".to_owned(), ToString::to_string),
    })
}

async fn newest(store: &Store) -> Result<Option<Point>, VolumeError> {
    let (inode, _) = stored_inode::load(store).await?;
    match inode.i_last_cno {
        0 => Ok(None),
        _ => point(&inode, stored_inode::modified_ms(&inode)).map(Some),
    }
}

async fn by_name(store: &Store, name: &SnapshotName) -> Result<Option<Point>, VolumeError> {
    let Some(snapshot) = snapshots::load(store, name).await? else {
        return Ok(None);
    };
    let found = state_stored(store, snapshot.checkpoint.cno).await?;
    let found = found.filter(|raw| CheckpointId::of_inode(raw) == snapshot.checkpoint);
    found.map(|raw| point(&raw, snapshot.published_ms)).transpose()
}

/// The state that an inode tells of, published when the inode says that it was changed.
///
/// # Errors
/// [`VolumeError::Corrupt`] when it names no known format.
pub(crate) fn state_of(raw: &InodeRaw) -> Result<Point, VolumeError> {
    point(raw, stored_inode::modified_ms(raw))
}

fn point(raw: &InodeRaw, published_ms: u64) -> Result<Point, VolumeError> {
    let block_size_bytes = stored_inode::block_size_bytes(raw).map_err(|reason| VolumeError::Corrupt {
        what: format!("the inode of checkpoint {}", raw.i_last_cno),
        reason,
    })?;
    Ok(Point {
        state: StoredState::of_inode(raw),
        inode: *raw,
        block_size_bytes,
        published_ms,
    })
}

/// The checkpoint with this number. It counts as published when the list has its entry, or when it is the newest, whose
/// entry may still be in flight.
async fn by_number(store: &Store, cno: u64) -> Result<Option<Point>, VolumeError> {
    // Object names have ten digits.
    if cno == 0 || cno > crate::engine::limits::CHECKPOINT_NUMBER_MAX {
        return Ok(None);
    }
    let (entry, stored) = try_join!(checkpoint_list::load_entry(store, cno), state_stored(store, cno))?;
    let Some(raw) = stored else { return Ok(None) };
    let id = CheckpointId::of_inode(&raw);
    if let Some(entry) = entry {
        return match entry.is_of(id) {
            Some(false) => Ok(None),
            _ => point(&raw, entry.published_ms).map(Some),
        };
    }
    let (newest, _) = stored_inode::load(store).await?;
    match StoredState::of_inode(&newest).id() == id {
        true => point(&raw, stored_inode::modified_ms(&newest)).map(Some),
        false => Ok(None),
    }
}

/// The newest checkpoint that was published at this time or before. Times come from the servers' clocks. If a clock was
/// set back, the search may find another checkpoint that was published before this time.
async fn by_time(store: &Store, ms: u64) -> Result<Option<Point>, VolumeError> {
    let (inode, _) = stored_inode::load(store).await?;
    let numbers = checkpoint_list::numbers_up_to(store, inode.i_last_cno).await?;
    let numbers: Vec<u64> = numbers.into_iter().map(|(number, _)| number).collect();
    let is_newest_listed = numbers.last().copied().unwrap_or(0) == inode.i_last_cno;
    if !is_newest_listed && stored_inode::modified_ms(&inode) <= ms {
        // The entry of the newest checkpoint is still in flight.
        return point(&inode, stored_inode::modified_ms(&inode)).map(Some);
    }
    let in_time = count_in_time(store, &numbers, ms).await?;
    for cno in numbers[..in_time].iter().rev() {
        if let Some(found) = by_number(store, *cno).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// How many of these checkpoints, counted from the first, were published at this time or before.
async fn count_in_time(store: &Store, numbers: &[u64], ms: u64) -> Result<usize, VolumeError> {
    // All checkpoints before `low` are in time, and none from `high` on is.
    let (mut low, mut high) = (0, numbers.len());
    while low < high {
        let step = (high - low).div_ceil(SEARCH_PARTS);
        let places: Vec<usize> = (low..high).step_by(step).collect();
        let loaded = stream::iter(places.iter().map(|place| numbers[*place]));
        let loaded = loaded.map(|cno| checkpoint_list::load_entry(store, cno));
        let loaded: Vec<Option<CatalogueEntry>> = loaded.buffered(SEARCH_PARTS).try_collect().await?;
        let is_late = |entry: &Option<CatalogueEntry>| entry.as_ref().is_some_and(|e| e.published_ms > ms);
        (low, high) = match loaded.iter().position(is_late) {
            Some(0) => (low, low),
            Some(late) => (places[late - 1] + 1, places[late]),
            None => (places[places.len() - 1] + 1, high),
        };
    }
    Ok(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::connect_for_create;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_time_is_found_among_any_number_of_checkpoints() {
        let dir = tempfile::tempdir().unwrap();
        let url = VolumeUrl::parse(&format!("file://{}/vol/", dir.path().display())).unwrap();
        let store = connect_for_create(&url, &StoreOptions::default()).await.unwrap();
        let mut numbers = Vec::new();
        for number in 1..=150 {
            // They are published at 10, 20, ..., and not every number has one.
            let entry = CatalogueEntry {
                cno: number * 3,
                check: None,
                published_ms: number * 10,
                size_bytes: 1,
                epoch: 1,
                generation: number,
                is_repaired: false,
                kind: checkpoint_list::Kind::default(),
            };
            checkpoint_list::write_entry(&store, &entry).await.unwrap();
            numbers.push(entry.cno);
        }
        for count in [0, 1, 2, 32, 33, 65, 150] {
            for ms in [0, 9, 10, 15, 20, 320, 330, 335, 649, 650, 1499, 1500, 9999] {
                let found = count_in_time(&store, &numbers[..count], ms).await.unwrap();
                assert_eq!(found as u64, (ms / 10).min(count as u64), "{ms} of {count}");
            }
        }
    }

    #[test]
    fn times_are_shown_as_rfc_3339_has_them() {
        assert_eq!(time_text(1_795_341_600_000), "2026-11-22T10:00:00Z");
        assert_eq!(time_text(1_795_341_600_123), "2026-11-22T10:00:00.123Z");
        assert!(time_text(u64::MAX).starts_with("9999"));
    }
}
