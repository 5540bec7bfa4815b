//! The checkpoints that a volume keeps: each one's own object is there, and is its own.

use std::collections::BTreeMap;

use futures::stream::{self, StreamExt, TryStreamExt};

use super::beside::Beside;
use super::report::{Findings, Kind, OBJECT_ADVICE};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::{ErrorKind, VolumeError};
use crate::engine::{checkpoint_stored, state_stored};
use crate::format::inode;
use crate::format::object_names::{name_of, summaries_of};
use crate::format::stored_state::StoredState;
use crate::meta::checkpoint_list;
use crate::meta::snapshots::{self, SnapshotName};
use crate::past::{At, Point};
use crate::retention::plan::{self, Phase, Plan};
use crate::store::Store;

/// Objects read at once.
const READS_AT_ONCE: usize = 32;

/// The checkpoints that are looked at.
#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    /// Ascending.
    pub all: Vec<StoredState>,
    /// The newest of the volume, whether it is among them or not; none before the first, or when the inode cannot be read.
    pub newest: Option<CheckpointId>,
    /// Size of a block of data, in bytes.
    pub block_size_bytes: u64,
    names: Vec<(SnapshotName, CheckpointId)>,
}

impl Checkpoints {
    /// One checkpoint alone, whether it is listed or not.
    pub fn one(state: StoredState, block_size_bytes: u64) -> Self {
        Self {
            all: vec![state],
            newest: None,
            block_size_bytes,
            names: Vec::new(),
        }
    }

    /// Only this one is looked at.
    pub fn only(&mut self, point: &Point) {
        self.block_size_bytes = u64::from(point.block_size_bytes);
        self.all = vec![point.state];
    }

    /// Whether a name was given to this one.
    pub fn is_named(&self, id: CheckpointId) -> bool {
        self.names.iter().any(|(_, named)| *named == id)
    }

    /// Names of checkpoints.
    pub fn names_of(&self, is_wanted: impl Fn(&CheckpointId) -> bool) -> Vec<SnapshotName> {
        let named = self.names.iter().filter(|(_, id)| is_wanted(id));
        named.map(|(name, _)| name.clone()).collect()
    }
}

/// A checkpoint that is kept.
#[derive(Debug, Clone, Copy)]
struct Kept {
    cno: u64,
    /// What it must be; nothing where an entry does not say.
    id: Option<CheckpointId>,
}

/// The checkpoints that are kept, but for those that cannot be read. With `is_brief` the newest alone is looked at.
///
/// # Errors
/// When the store fails; [`VolumeError::NotFound`] when there is no volume.
pub(super) async fn kept(
    store: &Store,
    beside: &Beside,
    is_brief: bool,
    findings: &mut Findings,
) -> Result<Checkpoints, VolumeError> {
    let mut checkpoints = Checkpoints {
        names: beside
            .snapshots
            .iter()
            .map(|s| (s.name.clone(), s.checkpoint))
            .collect(),
        ..Checkpoints::default()
    };
    // After the list was read: it has nothing that this one does not.
    let newest = newest(store, beside, findings).await?;
    if let Some((state, block_size_bytes)) = newest {
        checkpoints.block_size_bytes = block_size_bytes;
        checkpoints.newest = (state.state_id.cno > 0).then(|| state.id());
    }
    if is_brief {
        return Ok(checkpoints);
    }
    let up_to = newest.map_or(u64::MAX, |(state, _)| state.state_id.cno);
    note_later(store, beside, up_to, findings);
    note_lost_names(store, beside, up_to, findings).await?;
    note_lost_entries(store, beside, up_to, findings).await?;
    let kept = numbers(beside, up_to);
    let states = stream::iter(kept.into_values()).map(|kept| async move {
        let stored = state_stored(store, kept.cno).await;
        Ok::<_, VolumeError>((kept, stored))
    });
    let mut states = states.buffered(READS_AT_ONCE);
    while let Some((kept, stored)) = states.try_next().await? {
        let found = match stored {
            Ok(Some(raw)) => {
                if checkpoints.block_size_bytes == 0 {
                    checkpoints.block_size_bytes = inode::block_size_bytes(&raw).map_or(0, u64::from);
                }
                Ok(StoredState::of_inode(&raw))
            }
            Ok(None) => Err((Kind::Missing, "it is not there".to_owned())),
            Err(e) if e.kind() == ErrorKind::Corrupt => Err((Kind::Damaged, e.chain())),
            Err(e) => return Err(e),
        };
        let found = found.and_then(|state| match kept.id.is_none_or(|id| id == state.id()) {
            true => Ok(state),
            false => Err((
                Kind::Contradiction,
                format!(
                    "it is of checkpoint {}, and the list of checkpoints says {}",
                    state.id(),
                    kept.id.map_or_else(String::new, |id| id.to_string())
                ),
            )),
        });
        match found {
            Ok(state) => checkpoints.all.push(state),
            Err((kind, reason)) => {
                let key = own_object(store, kept.cno);
                match kept.id {
                    Some(id) => findings.add_of(id, kind, key, reason, OBJECT_ADVICE),
                    None => findings.tell(kind, key, reason, OBJECT_ADVICE),
                }
            }
        }
    }
    if let Some((state, _)) = newest
        && !checkpoints.all.iter().any(|there| there.id() == state.id())
        && state.state_id.cno > 0
    {
        checkpoints.all.push(state);
    }
    Ok(checkpoints)
}

/// The key of a checkpoint's own object.
fn own_object(store: &Store, cno: u64) -> String {
    store.data_key(&name_of(summaries_of(cno)[1]))
}

/// Tells of a checkpoint that is asked for and known, and cannot be read for this reason. False for one that is not known.
pub(super) fn note_unreadable(
    store: &Store,
    beside: &Beside,
    at: &At,
    e: &VolumeError,
    findings: &mut Findings,
) -> bool {
    let id = match at {
        At::Number(cno) => beside.entries.get(cno).and_then(|entry| {
            let check = entry.check?;
            Some(CheckpointId { cno: *cno, check })
        }),
        At::Name(name) => {
            let named = beside.snapshots.iter().find(|snapshot| snapshot.name == *name);
            named.map(|snapshot| snapshot.checkpoint)
        }
        At::Time(_) | At::Ago(_) => None,
    };
    let kind = match e {
        VolumeError::NoCheckpoint { .. } => Kind::Missing,
        e if e.kind() == ErrorKind::Corrupt => Kind::Damaged,
        _ => return false,
    };
    let Some(id) = id else { return false };
    let key = own_object(store, id.cno);
    findings.add_of(id, kind, key, e.chain(), OBJECT_ADVICE);
    true
}

/// The newest state, and the size of its blocks; neither when the inode cannot be read.
async fn newest(
    store: &Store,
    beside: &Beside,
    findings: &mut Findings,
) -> Result<Option<(StoredState, u64)>, VolumeError> {
    let key = store.data_key(inode::NAME);
    let advice = "without it the volume is not opened: put it back from the bucket's versions or from a copy of the volume";
    match inode::load(store).await {
        Ok((raw, _)) => {
            let block_size_bytes = inode::block_size_bytes(&raw).map_or(0, u64::from);
            Ok(Some((StoredState::of_inode(&raw), block_size_bytes)))
        }
        Err(VolumeError::NotFound { .. }) if !beside.entries.is_empty() => {
            findings.tell(Kind::Missing, key, "it is not there", advice);
            Ok(None)
        }
        Err(e) if e.kind() == ErrorKind::Corrupt => {
            findings.tell(Kind::Damaged, key, e.chain(), advice);
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Entries of checkpoints that come after the newest: the container went back.
fn note_later(store: &Store, beside: &Beside, up_to: u64, findings: &mut Findings) {
    let mut later = beside.entries.range(up_to.saturating_add(1)..);
    if let Some((first, _)) = later.next() {
        let last = later.next_back().map_or(*first, |(last, _)| *last);
        findings.tell(
            Kind::Contradiction,
            store.data_key(inode::NAME),
            format!("the list of checkpoints goes up to {last}, and the volume's newest is {up_to}"),
            "it was restored from a backup, rolled back by another tool, or an older one was put in its place: put the right one back; \
             the next server that opens the volume for writing sets the later entries aside",
        );
    }
}

/// Names of checkpoints that the volume does not have: of a history that it left, or that its retention removed.
async fn note_lost_names(
    store: &Store,
    beside: &Beside,
    up_to: u64,
    findings: &mut Findings,
) -> Result<(), VolumeError> {
    let is_of_volume = |plan: &&Plan| plan.is_of(up_to);
    let plan = beside.plan.as_ref().filter(is_of_volume);
    let mut unkept = Vec::new();
    for snapshot in &beside.snapshots {
        let id = snapshot.checkpoint;
        let listed = beside.entries.get(&id.cno).and_then(|entry| entry.check);
        if id.cno > up_to || listed.is_some_and(|check| check != id.check) {
            findings.tell(
                Kind::Contradiction,
                snapshots::key(store, &snapshot.name),
                format!(
                    "the snapshot {} is of checkpoint {id}, and the volume has none such: it went back, and came to other ones",
                    snapshot.name
                ),
                "put the volume back that has it, or delete the name (hypernbd snapshot delete)",
            );
        } else if plan.is_some_and(|plan| !plan.keeps(id.cno)) {
            unkept.push(snapshot);
        }
    }
    if unkept.is_empty() {
        return Ok(());
    }
    // Whoever gives a name reads the plan afterwards, and takes the name back if its checkpoint goes. A plan that is not decided yet is
    // void when there is a name in its way.
    let now = readable(plan::load(store).await)?.map(|(plan, _)| plan);
    let Some(now) = now.as_ref().filter(is_of_volume) else {
        return Ok(());
    };
    let is_undecided = |cno: u64| now.phase == Phase::Planned && now.retired.contains(&cno);
    for snapshot in unkept {
        let id = snapshot.checkpoint;
        if now.keeps(id.cno) || is_undecided(id.cno) {
            continue;
        }
        let there = readable(snapshots::load(store, &snapshot.name).await)?;
        if there.as_ref() == Some(snapshot) {
            findings.tell(
                Kind::Contradiction,
                snapshots::key(store, &snapshot.name),
                format!(
                    "the snapshot {} is of checkpoint {id}, which the volume's retention has removed",
                    snapshot.name
                ),
                "the name came back after that, as from a backup: put the volume back that has the checkpoint, or delete the name \
                 (hypernbd snapshot delete)",
            );
        }
    }
    Ok(())
}

/// What was read again; nothing if it was damaged meanwhile.
fn readable<T>(read: Result<Option<T>, VolumeError>) -> Result<Option<T>, VolumeError> {
    match read {
        Err(e) if e.kind() == ErrorKind::Corrupt => Ok(None),
        read => read,
    }
}

/// Checkpoints that the accounting of space knows as kept, and the list does not have.
async fn note_lost_entries(
    store: &Store,
    beside: &Beside,
    up_to: u64,
    findings: &mut Findings,
) -> Result<(), VolumeError> {
    let Some(usage) = beside.usage.as_ref().filter(|usage| usage.at_number() <= up_to) else {
        return Ok(());
    };
    // A table of a history that was left says nothing of this one.
    let Some(at) = usage.at() else { return Ok(()) };
    if checkpoint_stored(store, at.cno).await.ok().flatten() != Some(at) {
        return Ok(());
    }
    let known = usage.kept().keys().copied();
    let is_listed = |cno: &u64| beside.entries.contains_key(cno) || beside.damaged_entries.contains(cno);
    let is_named = |cno: &u64| {
        beside
            .snapshots
            .iter()
            .any(|snapshot| snapshot.checkpoint.cno == *cno)
    };
    let lost: Vec<u64> = known.filter(|cno| !is_listed(cno) && !is_named(cno)).collect();
    if lost.is_empty() {
        return Ok(());
    }
    // What goes stands in the plan before its entry is removed, and a table of before that may be read here.
    let plan = plan::load(store).await.ok().flatten().map(|(plan, _)| plan);
    let plan = plan.filter(|plan| plan.is_of(up_to));
    for cno in lost
        .into_iter()
        .filter(|cno| plan.as_ref().is_none_or(|plan| plan.keeps(*cno)))
    {
        if checkpoint_list::load_entry(store, cno)
            .await
            .ok()
            .flatten()
            .is_none()
        {
            findings.tell(
                Kind::Missing,
                store.meta_key(&checkpoint_list::entry_name(cno)),
                format!("the entry of checkpoint {cno}, which is kept, is not there"),
                "the checkpoint itself may be whole: put the entry back from a backup; without it the checkpoint is not found, and its \
                 space is given back by the next round of the retention",
            );
        }
    }
    Ok(())
}

/// Everything that is kept, up to this number, by number.
fn numbers(beside: &Beside, up_to: u64) -> BTreeMap<u64, Kept> {
    let plan = beside.plan.as_ref().filter(|plan| plan.is_of(up_to));
    let is_kept = |cno: u64| cno > 0 && cno <= up_to && plan.is_none_or(|plan| plan.keeps(cno));
    let entries = beside.entries.values().map(|entry| Kept {
        cno: entry.cno,
        id: entry.check.map(|check| CheckpointId {
            cno: entry.cno,
            check,
        }),
    });
    let damaged = beside.damaged_entries.iter().map(|&cno| Kept { cno, id: None });
    let named = beside.snapshots.iter().map(|snapshot| Kept {
        cno: snapshot.checkpoint.cno,
        id: Some(snapshot.checkpoint),
    });
    let mut kept = BTreeMap::new();
    for one in named.chain(damaged).chain(entries).filter(|one| is_kept(one.cno)) {
        kept.insert(one.cno, one);
    }
    kept
}
