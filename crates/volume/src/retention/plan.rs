//! What is about to be removed: one object, `<root>.meta/retention/plan`, which is only replaced conditionally.
//!
//! The fence around the container does not cover deletions: an owner that was paused could remove what a later one
//! keeps. So everything that is removed is named in the plan first, in two phases (protocol of issue 16,
//! model-checked):
//!
//! 1. `Planned`, with the checkpoints that stay from then on. Afterwards pins and names are read. If one of them needs
//!    what the plan names, the plan becomes void.
//! 2. `Deleting`: nothing is removed before this is stored, and nothing that it names is used again. Whoever finds it
//!    finishes it.
//!
//! An owner replaces the plan that an earlier owner left before it removes anything itself. The earlier owner's next
//! replacement then fails. A reader of an earlier checkpoint puts its pin first and reads the plan afterwards, so that
//! one of the two sees the other.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::format::object_names::cno_of;
use crate::store::{ETag, Store};

/// The name of the plan's object, below the volume's `.meta/`.
const NAME: &str = "retention/plan";
const VERSION: u32 = 1;

/// The phase of a plan.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    /// Nothing is to be removed.
    #[default]
    Empty,
    /// What the plan names will be removed, unless somebody needs it.
    Planned,
    /// What the plan names is being removed.
    Deleting,
}

/// The plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(super) version: u32,
    /// Distinguishes this write of the plan from any other.
    pub(super) write: String,
    /// The owner's epoch.
    #[serde(deserialize_with = "crate::base::counters::epoch")]
    pub epoch: u64,
    /// The newest accounted checkpoint. The plan is for a container that has it. `None` before the first.
    pub at: Option<CheckpointId>,
    /// Its phase.
    pub phase: Phase,
    /// Up to this number a checkpoint is kept only if it is in `kept`: its entry may have been written late, after its
    /// objects were removed.
    pub up_to: u64,
    /// First and last number of each run of checkpoints that stay, among those that have entries.
    pub kept: Vec<(u64, u64)>,
    /// Checkpoints that are removed.
    pub retired: Vec<u64>,
    /// Objects that are removed, by the number that `format/object_names.rs` gives them.
    pub objects: Vec<u64>,
}

impl Plan {
    /// A plan that removes nothing.
    pub fn empty(epoch: u64) -> Self {
        Self {
            version: VERSION,
            write: String::new(),
            epoch,
            at: None,
            phase: Phase::Empty,
            up_to: 0,
            kept: Vec::new(),
            retired: Vec::new(),
            objects: Vec::new(),
        }
    }

    /// The same plan without anything to remove. For `Planned` that means that it is void, for `Deleting` that it is
    /// done.
    pub fn emptied(&self, epoch: u64) -> Self {
        Self {
            epoch,
            phase: Phase::Empty,
            retired: Vec::new(),
            objects: Vec::new(),
            kept: match self.phase {
                // Only the checkpoints that were planned to be removed are missing in `kept`.
                Phase::Planned => {
                    let retired = self.retired.iter().map(|&cno| (cno, cno));
                    merged(self.kept.iter().copied().chain(retired).collect())
                }
                _ => self.kept.clone(),
            },
            ..self.clone()
        }
    }

    /// Whether the plan can belong to a volume whose newest checkpoint has this number. A volume that was restored from
    /// an earlier state continues from there, and the plan says nothing of it.
    pub fn is_of(&self, newest: u64) -> bool {
        self.at.is_none_or(|at| at.cno <= newest)
    }

    /// Whether a checkpoint that has an entry can be read according to this plan.
    pub fn keeps(&self, cno: u64) -> bool {
        if cno > self.up_to {
            return true;
        }
        let next = self.kept.partition_point(|&(_, last)| last < cno);
        self.kept.get(next).is_some_and(|&(first, _)| first <= cno)
    }

    /// Decodes a plan.
    ///
    /// # Errors
    /// A text that says what is wrong with `body`.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        let plan: Self = serde_json::from_slice(body).map_err(|e| e.to_string())?;
        if plan.version != VERSION {
            return Err(format!("it has version {}, and {VERSION} is known", plan.version));
        }
        let at = plan.at.map_or(0, |at| at.cno);
        if plan.objects.iter().any(|object| cno_of(*object) >= at) {
            return Err("it names objects of checkpoints that it does not know".to_owned());
        }
        let ascends = plan.kept.windows(2).all(|pair| pair[0].1 < pair[1].0);
        match ascends
            && plan
                .kept
                .iter()
                .all(|(first, last)| first <= last && *last <= plan.up_to)
        {
            true => Ok(plan),
            false => Err("its list of kept checkpoints does not ascend".to_owned()),
        }
    }
}

/// Numbers as runs.
pub(crate) fn runs(numbers: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    merged(numbers.map(|number| (number, number)).collect())
}

fn merged(mut parts: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    parts.sort_unstable();
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for (first, last) in parts {
        match runs.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => runs.push((first, last)),
        }
    }
    runs
}

/// Loads the stored plan and its ETag, if there is one.
///
/// # Errors
/// When the store fails or the plan cannot be read.
pub(crate) async fn load(store: &Store) -> Result<Option<(Plan, ETag)>, VolumeError> {
    let key = store.meta_key(NAME);
    let Some((body, etag)) = store.get(&key).await? else {
        return Ok(None);
    };
    let plan = Plan::decode(&body).map_err(|reason| VolumeError::Corrupt {
        what: format!("the plan of what is removed, {key}"),
        reason: format!(
            "{reason}; delete it while no server runs: what it names and is not removed yet stays"
        ),
    })?;
    Ok(Some((plan, etag)))
}

/// When the plan was last written, by the store's clock.
///
/// # Errors
/// When the store fails.
pub(crate) async fn written(store: &Store) -> Result<SystemTime, VolumeError> {
    let info = store.head(&store.meta_key(NAME)).await?;
    // Without a plan nothing is removed.
    Ok(info.map_or(SystemTime::UNIX_EPOCH, |info| info.last_modified))
}

/// Replaces the plan that was read with the ETag `before`, or creates the plan if there was none.
///
/// # Errors
/// [`VolumeError::Fenced`] when somebody else has replaced it. After any other error the plan may be stored, now or
/// later: it is in force until the next replacement.
pub(crate) async fn replace(store: &Store, plan: &Plan, before: Option<&ETag>) -> Result<ETag, VolumeError> {
    let plan = Plan {
        write: uuid::Uuid::new_v4().to_string(),
        ..plan.clone()
    };
    let key = store.meta_key(NAME);
    let body = serde_json::to_vec(&plan).map_err(|e| VolumeError::Internal(e.to_string()))?;
    let written = match before {
        Some(before) => store.put_if_match(&key, body, before).await,
        None => store.put_create_only(&key, body).await,
    };
    match written {
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => match load(store).await? {
            // The answer to an earlier attempt was lost.
            Some((there, etag)) if there.write == plan.write => Ok(etag),
            // An attempt of this owner, given up long ago, arrived after all. The next round begins with that plan.
            Some((there, _)) if there.epoch == plan.epoch => Err(VolumeError::engine(
                "replacing the plan of what is removed",
                std::io::Error::other("an earlier attempt has arrived late"),
            )),
            _ => Err(VolumeError::Fenced {
                reason: "another server or command removes checkpoints of the volume".into(),
            }),
        },
        written => Ok(written?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_told_by_the_list_up_to_where_it_goes() {
        let mut plan = Plan {
            up_to: 20,
            kept: runs([3, 4, 5, 9, 20, 19].into_iter()),
            retired: vec![7],
            phase: Phase::Planned,
            ..Plan::empty(1)
        };
        assert_eq!(plan.kept, [(3, 5), (9, 9), (19, 20)]);
        let kept = |plan: &Plan| (0..24).filter(|cno| plan.keeps(*cno)).collect::<Vec<_>>();
        assert_eq!(kept(&plan), [3, 4, 5, 9, 19, 20, 21, 22, 23]);
        // The void plan keeps what was to be removed. An entry that was never accounted does not come back.
        assert_eq!(kept(&plan.emptied(2)), [3, 4, 5, 7, 9, 19, 20, 21, 22, 23]);
        plan.phase = Phase::Deleting;
        assert_eq!(kept(&plan.emptied(2)), kept(&plan));
        let body = serde_json::to_vec(&plan).unwrap();
        assert_eq!(Plan::decode(&body), Ok(plan));
    }
}
