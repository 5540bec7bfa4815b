//! `space`: how much space a volume takes, and why.

use std::collections::BTreeMap;

use futures::try_join;
use serde::Serialize;

use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::url::VolumeUrl;
use crate::engine::parents;
use crate::format::inode;
use crate::format::node::NODE_BYTES;
use crate::format::stored_state::StoredState;
use crate::index::usage;
use crate::meta::snapshots::{self, Snapshot, SnapshotName};
use crate::options::StoreOptions;
use crate::retention;
use crate::store::ObjectEntry;

/// The space that a volume takes in its store, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Space {
    /// What the newest state refers to: data blocks and the leaves of the index. Of a clone what of that is its own.
    pub live_bytes: u64,
    /// What the newest state of a clone refers to in the objects of other volumes, where it is stored.
    pub shared_bytes: u64,
    /// The rest of what the container holds: what earlier checkpoints alone refer to, what lies in objects beside what is live, and
    /// bookkeeping.
    pub history_bytes: u64,
    /// Bytes that no kept checkpoint needs. They are freed automatically.
    pub reclaimable_bytes: u64,
    /// Bytes that are planned to be removed or are being removed.
    pub grace_bytes: u64,
    /// How far the objects of the newest state are beyond 1.3 times what is live and 256 MiB, what kept checkpoints need of them besides
    /// not counted: compaction makes this 0.
    pub debt_bytes: u64,
    /// All of it, with what lies beside the container (list of checkpoints, lease, check values, log if it is there).
    pub stored_bytes: u64,
    /// The number of objects.
    pub objects: u64,
    /// What each checkpoint that has names holds alone, in the order of their numbers. `None` where that was not counted: without a
    /// policy everything is kept, and nothing goes with a name.
    pub snapshots: Option<Vec<SnapshotSpace>>,
}

/// What a checkpoint that has names holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SnapshotSpace {
    /// Its number.
    pub cno: u64,
    /// Its names.
    pub names: Vec<SnapshotName>,
    /// Bytes that nothing needs any more once it is not kept, while all other checkpoints are.
    pub alone_bytes: u64,
}

/// What is held by the checkpoints that are there and have names.
fn held_by_names(alone: &BTreeMap<CheckpointId, u64>, named: Vec<Snapshot>) -> Vec<SnapshotSpace> {
    let mut names: BTreeMap<CheckpointId, Vec<SnapshotName>> = BTreeMap::new();
    for snapshot in named {
        names.entry(snapshot.checkpoint).or_default().push(snapshot.name);
    }
    let held = names.into_iter().filter_map(|(id, names)| {
        Some(SnapshotSpace {
            cno: id.cno,
            names,
            alone_bytes: *alone.get(&id)?,
        })
    });
    held.collect()
}

/// Measures the space that a volume takes. Reads the whole index and changes nothing.
///
/// # Errors
/// [`VolumeError::NotFound`] when there is none; when the index cannot be read.
pub async fn space(url: &VolumeUrl, store_options: &StoreOptions) -> Result<Space, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let (raw, _) = inode::load(&store).await?;
    let block_size_bytes = inode::block_size_bytes(&raw).map_err(|reason| VolumeError::Corrupt {
        what: format!("the inode of the volume at {url}"),
        reason,
    })?;
    let state = StoredState::of_inode(&raw);
    let used = async {
        if retention::load_policy(&store).await?.is_some() {
            let counted = async {
                try_join!(
                    retention::survey(&store, u64::from(block_size_bytes)),
                    snapshots::load_all(&store)
                )
            };
            match counted.await {
                Ok((survey, named)) => {
                    let bytes = |blocks: u64, nodes: u64| {
                        blocks * u64::from(block_size_bytes) + nodes * NODE_BYTES as u64
                    };
                    let used = bytes(survey.live_blocks, survey.live_nodes);
                    let shared = bytes(survey.inherited_blocks, survey.inherited_nodes);
                    return Ok::<_, VolumeError>((used, shared, Some((survey, named))));
                }
                // The damage may be in an earlier checkpoint. Then nothing is removed.
                Err(e) if e.kind() == ErrorKind::Corrupt => {
                    log::warn!("the reclaimable space of {url} is unknown: {}", e.chain());
                }
                Err(e) => return Err(e),
            }
        }
        // When nothing is removed, only the newest state is measured.
        let used = usage::usage(&store, &state, block_size_bytes).await;
        let used = used.map_err(|e| VolumeError::engine(format!("reading the index of {url}"), e))?;
        Ok((used.bytes, used.inherited_bytes, None))
    };
    let listed = async {
        let (data, beside) = (store.data_key(""), store.meta_key(""));
        Ok(try_join!(store.list(&data), store.list(&beside))?)
    };
    let ((used_bytes, shared_bytes, counted), (data, beside)) = try_join!(used, listed)?;
    let (survey, named) = counted.unzip();
    let survey = survey.unwrap_or_default();
    let sum = |objects: &[ObjectEntry]| -> u64 { objects.iter().map(|object| object.size_bytes).sum() };
    let held = sum(&data);
    let live_bytes = used_bytes.saturating_sub(shared_bytes).min(held);
    let going_bytes = survey.reclaimable_bytes + survey.grace_bytes;
    Ok(Space {
        live_bytes,
        shared_bytes,
        history_bytes: held.saturating_sub(live_bytes + going_bytes),
        reclaimable_bytes: survey.reclaimable_bytes,
        grace_bytes: survey.grace_bytes,
        debt_bytes: survey.debt.over_bytes(),
        stored_bytes: held + sum(&beside),
        objects: (data.len() + beside.len()) as u64,
        snapshots: named.map(|named| held_by_names(&survey.alone, named)),
    })
}
