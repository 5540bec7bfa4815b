//! A volume whose newest state is damaged goes back to the newest checkpoint that is whole: an ordinary rollback, of which the state
//! before keeps a name.

use std::ops::RangeInclusive;

use serde::Serialize;

use super::{How, Look};
use crate::admin::rollback;
use crate::base::control::Control;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::url::VolumeUrl;
use crate::check::{self, Problem};
use crate::engine::parents;
use crate::format::object_names::cno_of;
use crate::format::stored_objects;
use crate::meta::checkpoint_list;
use crate::options::{LeaseOptions, StoreOptions};
use crate::past::{self, At, Point, SnapshotName};
use crate::retention::plan;
use crate::store::Store;

/// Which state of a volume is the newest whole one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Newest {
    /// Its newest, of this number: there is nothing to go back from.
    Whole(u64),
    /// An earlier one.
    Damaged(WayBack),
}

/// The way back to an earlier checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WayBack {
    /// The checkpoint.
    pub to: u64,
    /// When it was published, in milliseconds since 1970-01-01 UTC, by its server's clock.
    pub published_ms: u64,
    /// Size of the volume at that checkpoint, in bytes.
    pub size_bytes: u64,
    /// The newest checkpoint, which is damaged.
    pub newest: u64,
    /// When that was published, in the same way.
    pub newest_published_ms: u64,
    /// Bytes of the objects that were stored since the checkpoint: about what was written since.
    pub undone_bytes: u64,
    /// What was done about it. Nothing where it is only said what could be.
    pub done: Option<Done>,
}

/// A volume that went back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Done {
    /// Number of the checkpoint that has the earlier state.
    pub number: u64,
    /// The name of the state before.
    pub before: SnapshotName,
}

/// Finds the newest checkpoint of which everything is whole, and rolls the volume back to it when that is asked for. A server running on
/// it must be stopped before.
///
/// # Errors
/// [`VolumeError::InvalidInput`] when no checkpoint is whole; what [`check()`](crate::check::check) and a rollback return.
pub async fn to_newest_whole(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    lease_options: &LeaseOptions,
    how: How,
    control: &Control,
) -> Result<Newest, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let look = Look {
        url,
        store_options,
        is_data: how.is_data,
        control,
    };
    let newest = past::find(&store, None).await?;
    let damaged = damaged(&look.problems().await?);
    let to = newest_whole(&store, &newest, &damaged, how.is_data, control).await?;
    let Some(to) = to else {
        return Err(VolumeError::InvalidInput(format!(
            "no checkpoint of {url} is whole: hypernbd check {url} tells what is wrong; put objects back from a replica (--from) or from \
             the bucket's versions (--from-versions) first"
        )));
    };
    if to.id() == newest.id() {
        return Ok(Newest::Whole(to.number()));
    }
    let mut way = WayBack {
        to: to.number(),
        published_ms: to.published_ms,
        size_bytes: to.size_bytes(),
        newest: newest.number(),
        newest_published_ms: newest.published_ms,
        undone_bytes: stored_after(&store, to.number(), newest.number()).await?,
        done: None,
    };
    if how.is_written {
        let done = rollback::rollback_damaged(&store, store_options, to, lease_options, newest.id()).await?;
        way.done = Some(Done {
            number: done.number,
            before: done.before,
        });
    }
    Ok(Newest::Damaged(way))
}

/// The numbers of checkpoints that something is known to be wrong with.
fn damaged(problems: &[Problem]) -> Vec<RangeInclusive<u64>> {
    let runs = problems.iter().flat_map(|problem| &problem.checkpoints);
    runs.map(|(first, last)| *first..=*last).collect()
}

/// The newest checkpoint that is kept and whole: it is looked at by itself once more, whatever is known of others.
async fn newest_whole(
    store: &Store,
    newest: &Point,
    damaged: &[RangeInclusive<u64>],
    is_data: bool,
    control: &Control,
) -> Result<Option<Point>, VolumeError> {
    let plan = plan::load(store).await?.map(|(plan, _)| plan);
    let plan = plan.filter(|plan| plan.is_of(newest.number()));
    let is_kept = |cno: u64| plan.as_ref().is_none_or(|plan| plan.keeps(cno));
    let mut numbers = checkpoint_list::numbers(store).await?;
    numbers.retain(|cno| *cno < newest.number() && is_kept(*cno));
    numbers.push(newest.number());
    for cno in numbers.into_iter().rev() {
        if damaged.iter().any(|run| run.contains(&cno)) {
            continue;
        }
        let point = match cno == newest.number() {
            true => *newest,
            false => match past::find(store, Some(&At::Number(cno))).await {
                Ok(point) => point,
                // Its entry cannot be read, or is of another history, or its own object is not there.
                Err(VolumeError::NoCheckpoint { .. }) => continue,
                Err(e) if e.kind() == ErrorKind::Corrupt => continue,
                Err(e) => return Err(e),
            },
        };
        let block_size_bytes = u64::from(point.block_size_bytes);
        if check::lacks(store, point.state, block_size_bytes, is_data, control)
            .await?
            .is_empty()
        {
            return Ok(Some(point));
        }
    }
    Ok(None)
}

/// Bytes of the objects of the checkpoints after one, up to another.
async fn stored_after(store: &Store, after: u64, up_to: u64) -> Result<u64, VolumeError> {
    let (stored, _) = stored_objects::list(store).await?;
    let is_after = |object: &u64| (after + 1..=up_to).contains(&cno_of(*object));
    let of = stored.iter().filter(|(object, _)| is_after(object));
    Ok(of.map(|(_, len_bytes)| len_bytes).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Kind;

    #[test]
    fn what_any_problem_is_in_the_way_of_is_not_whole() {
        let problem = |checkpoints: &[(u64, u64)]| Problem {
            object: "x".to_owned(),
            kind: Kind::Damaged,
            reason: String::new(),
            checkpoints: checkpoints.to_vec(),
            is_newest_affected: false,
            names: Vec::new(),
            ranges: Vec::new(),
            advice: String::new(),
        };
        let runs = damaged(&[problem(&[(3, 5), (9, 9)]), problem(&[]), problem(&[(7, 7)])]);
        let is_damaged = |cno: u64| runs.iter().any(|run| run.contains(&cno));
        let whole: Vec<u64> = (1..=10).filter(|cno| !is_damaged(*cno)).collect();
        assert_eq!(whole, [1, 2, 6, 8, 10]);
    }
}
