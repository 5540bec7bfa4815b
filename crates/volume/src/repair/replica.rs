//! Damaged and missing objects are put back from a replica or a copy of the volume.
//!
//! A container's object never changes once it is written, so what a replica has of the same write is what was lost. Nothing is put back
//! that is not known to be that: the two volumes must be of one history, the object must be of the same write as the damaged one, and its
//! bytes must agree with their check values. It needs no lease: the volume is afterwards what its index says, as before.

use async_trait::async_trait;
use futures::stream::{self, StreamExt, TryStreamExt};
use futures::try_join;

use super::{LeftOf, Look, Mend, Outcome, READ_BYTES, READS_AT_ONCE, Repaired, left_of, own_object};
use crate::base::control::{Control, Phase};
use crate::base::error::VolumeError;
use crate::base::store_error::{StoreError, StoreErrorKind};
use crate::base::url::VolumeUrl;
use crate::check::{Kind, Problem};
use crate::engine::parents;
use crate::format::object_names::{cno_of, name_of};
use crate::lease::Holding;
use crate::meta::label::{self, Label};
use crate::options::StoreOptions;
use crate::replicate::{Copies, agree, newest_shared};
use crate::store::interceptors::window_checksums::has_checksums;
use crate::store::{ObjectInfo, Store, sums};

/// What is repaired, and from where.
#[derive(Debug)]
pub struct Request<'a> {
    /// The volume.
    pub url: &'a VolumeUrl,
    /// How its store is reached.
    pub store_options: &'a StoreOptions,
    /// Its replica, its original, or a copy of it.
    pub from: &'a VolumeUrl,
    /// How that one's store is reached.
    pub from_options: &'a StoreOptions,
    /// Damage is looked for in the data, too, all of which is read.
    pub is_data: bool,
    /// Objects are put back. Otherwise it is only said which could be.
    pub is_written: bool,
}

/// Checks a volume, and puts back what can be.
///
/// # Errors
/// [`VolumeError::InvalidInput`] when `from` is no replica, original or copy of the volume; what [`check()`] returns; a store that fails.
pub async fn repair(request: &Request<'_>, control: &Control) -> Result<Repaired, VolumeError> {
    let store = parents::connect(request.url, request.store_options).await?;
    let from = parents::connect(request.from, request.from_options).await?;
    // Before anything that is said of the volume: another one that is made there meanwhile is not repaired by it.
    let holding = Holding::by_label(&store).await?;
    let shared = newest_shared(&store, &from).await?;
    ensure_one_history(&store, &from, shared).await?;
    let look = Look {
        url: request.url,
        store_options: request.store_options,
        is_data: request.is_data,
        control,
    };
    let problems = look.problems().await?;
    control.begin(Phase::Copying, 0);
    let repair = Repair {
        store: &store,
        from: &from,
        control,
        holding,
        shared_up_to: shared.unwrap_or(0),
        is_written: request.is_written,
    };
    look.mend_all(problems, &repair, from.url.to_string()).await
}

/// Sees that the same numbers mean the same objects in both, whose newest common checkpoint is `shared`.
async fn ensure_one_history(store: &Store, from: &Store, shared: Option<u64>) -> Result<(), VolumeError> {
    let labels = try_join!(label::load(store), label::load(from))?;
    let is_related = labels.0.zip(labels.1).is_some_and(|(a, b)| are_related(&a, &b));
    // A volume whose label was lost or damaged has a new one: its checkpoints tell whose it is.
    if (is_related || shared.is_some()) && agree(store, from).await? {
        return Ok(());
    }
    Err(VolumeError::InvalidInput(format!(
        "{} is no replica or copy of {}: objects of the same names are not the same objects",
        from.url, store.url
    )))
}

/// Whether one was made from the other.
fn are_related(one: &Label, other: &Label) -> bool {
    let is_from = |a: &Label, b: &Label| {
        let original = a.replica_of.as_ref().map(|original| original.volume_id);
        original == Some(b.volume_id) || a.parent == Some(b.volume_id)
    };
    one.volume_id == other.volume_id || is_from(one, other) || is_from(other, one)
}

struct Repair<'a> {
    store: &'a Store,
    from: &'a Store,
    control: &'a Control,
    holding: Holding<'a>,
    /// Objects up to this number are of one history in both.
    shared_up_to: u64,
    is_written: bool,
}

#[async_trait]
impl Mend for Repair<'_> {
    async fn mend(&self, problem: &Problem) -> Result<Outcome, VolumeError> {
        let left = |reason: String| Ok(Outcome::Left(reason));
        let object = match own_object(self.store, problem) {
            Ok(object) => object,
            Err(reason) => return left(reason),
        };
        let (holder, name) = (self.from.holder_of(cno_of(object)), name_of(object));
        let (source, target) = (holder.data_key(&name), self.store.data_key(&name));
        let (original, there) = try_join!(left_of(&holder, &source), left_of(self.store, &target))?;
        let original = match original {
            LeftOf::Object(original) => original,
            LeftOf::Nothing => return left(format!("{} does not have it", self.from.url)),
            LeftOf::Unreadable => return left(format!("it is damaged at {}, too", self.from.url)),
        };
        let is_other = |there: &ObjectInfo| !sums::may_be_one_write(there, &original);
        if matches!(&there, LeftOf::Object(there) if is_other(there)) {
            return left(format!(
                "{} has another object of this name; if what is here is none of the volume's, delete it and repair once more",
                self.from.url
            ));
        }
        // Nothing is left that says which write it was.
        if !matches!(there, LeftOf::Object(_)) && cno_of(object) > self.shared_up_to {
            return left(format!(
                "nothing says that what {} has of this name is of the same history: the two have no checkpoint in common from {} on",
                self.from.url,
                cno_of(object)
            ));
        }
        let has_values = has_checksums(&original) || holder.sums_of(&source, &original).await?.is_some();
        // What is left of it may be the better one of the two.
        let is_replaced = !matches!(there, LeftOf::Nothing);
        if (is_replaced || problem.kind == Kind::Damaged) && !has_values {
            return left(format!(
                "what {} has of it has no check values, so that it may be damaged or cut short as well",
                self.from.url
            ));
        }
        if let Err(e) = self.verify(&holder, &source, original.size_bytes).await {
            return match e.kind {
                StoreErrorKind::Corrupt | StoreErrorKind::NotFound => {
                    left(format!("it is damaged at {}, too: {}", self.from.url, e.detail))
                }
                _ => Err(e.into()),
            };
        }
        if !self.is_written {
            return Ok(Outcome::Possible);
        }
        let over = there.over();
        let copies = Copies {
            from: self.from,
            to: self.store,
            control: self.control,
            holding: self.holding,
        };
        copies.put_back(object, original, over).await?;
        Ok(Outcome::Mended)
    }
}

impl Repair<'_> {
    /// Reads an object whole, and compares it with its check values.
    async fn verify(&self, holder: &Store, key: &str, len_bytes: u64) -> Result<(), StoreError> {
        let reads = (0..len_bytes)
            .step_by(READ_BYTES as usize)
            .map(|start| async move {
                let len = READ_BYTES.min(len_bytes - start);
                let read = holder.get_range(key, start, len).await?;
                self.control.add_data(len);
                match read {
                    Some(bytes) if bytes.len() as u64 == len => Ok(()),
                    _ => Err(holder.corrupt(key, "it is shorter than it was".to_owned())),
                }
            });
        let reads: Vec<_> = reads.collect();
        stream::iter(reads)
            .buffer_unordered(READS_AT_ONCE)
            .try_collect()
            .await
    }
}
