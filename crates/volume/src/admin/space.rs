//! `space`: how much space a volume takes, and why.

use futures::try_join;
use serde::Serialize;

use crate::base::error::{ErrorKind, VolumeError};
use crate::base::url::VolumeUrl;
use crate::engine::parents;
use crate::format::inode;
use crate::format::node::NODE_BYTES;
use crate::format::stored_state::StoredState;
use crate::index::usage;
use crate::options::StoreOptions;
use crate::retention::{self, Survey};
use crate::store::ObjectEntry;

/// The space that a volume takes in its store, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
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
            match retention::survey(&store, u64::from(block_size_bytes)).await {
                Ok(survey) => {
                    let bytes = |blocks: u64, nodes: u64| {
                        blocks * u64::from(block_size_bytes) + nodes * NODE_BYTES as u64
                    };
                    let used = bytes(survey.live_blocks, survey.live_nodes);
                    let shared = bytes(survey.inherited_blocks, survey.inherited_nodes);
                    return Ok::<_, VolumeError>((used, shared, survey));
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
        Ok((used.bytes, used.inherited_bytes, Survey::default()))
    };
    let listed = async {
        let (data, beside) = (store.data_key(""), store.meta_key(""));
        Ok(try_join!(store.list(&data), store.list(&beside))?)
    };
    let ((used_bytes, shared_bytes, survey), (data, beside)) = try_join!(used, listed)?;
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
    })
}
