//! Whether a volume is whole: everything that its checkpoints need is there, and is what was written.
//!
//! It writes nothing, not even a pin (but for check values of objects that have none, when asked for them), and runs beside a server. So what it needs may go while it looks: whatever seems wrong is looked
//! at again, and what its retention removed meanwhile is not missed. The order of the looks does the rest: what is listed comes before
//! what it must be found in, and the checkpoints before the objects.
//!
//! * [`beside`]: what lies beside the container, each object read.
//! * [`checkpoints`]: the checkpoints that are kept, each one's own object read.
//! * [`needed`]: their indexes, and what these need of the objects that are there.
//! * [`data`]: the blocks of data, read and compared with their check values.
//! * [`impact`]: what of the volume, and which checkpoints, damage is in the way of.
//! * [`table`]: the usage table against a count of its own. [`log`]: the records of the log.
//! * [`report`] (pure): what is said of it all.

use crate::base::control::Control;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::engine::parents;
use crate::format::object_names;
use crate::format::stored_objects::{self, StoredObjects as Stored};
use crate::format::stored_state::StoredState;
use crate::index::cache::IndexCache;
use crate::index::inspect::Scope;
use crate::index::origins;
use crate::options::StoreOptions;
use crate::past::{self, At};
use crate::retention::ensure_shares;
use crate::store::Store;
use crate::store::lineage::Holder;

mod beside;
mod checkpoints;
mod data;
mod impact;
mod needed;
mod report;
mod table;
mod wal;

pub use report::{Affected, Kind, Problem, Report};

use checkpoints::Checkpoints;
use report::Findings;

/// What is checked.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// One checkpoint alone; all that are kept otherwise.
    pub snapshot: Option<At>,
    /// Only what was stored after this one.
    pub since: Option<At>,
    /// Every needed block is read and compared with its check values, too.
    pub is_data: bool,
    /// Objects that have no check values get some: all that is written. Only with the data.
    pub adds_check_values: bool,
}

impl Request {
    /// All of the volume, its data too.
    pub fn with_data() -> Self {
        Self {
            is_data: true,
            ..Self::default()
        }
    }

    /// Whether it is all of the volume.
    fn is_whole(&self) -> bool {
        self.snapshot.is_none() && self.since.is_none()
    }
}

/// Checks a volume. Changes nothing, but for check values that are asked for.
///
/// # Errors
/// When it could not be checked: [`VolumeError::NotFound`], [`VolumeError::NoCheckpoint`], a store that fails,
/// [`VolumeError::Closed`] when `control` says to stop. What is wrong with the volume is no error: the report tells of it.
pub async fn check(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    request: &Request,
    control: &Control,
) -> Result<Report, VolumeError> {
    let store = parents::connect(url, store_options).await?;
    let mut findings = Findings::default();
    let beside = beside::look(&store, &mut findings).await?;
    let checkpoints = chosen(&store, request, &beside, &mut findings).await?;
    let scope = match &request.since {
        Some(since) => Scope {
            after: past::find(&store, Some(since)).await?.number(),
            copies: origins::listed(&store).await?,
        },
        None => Scope::default(),
    };
    let cache = IndexCache::default();
    let looker = Looker {
        store: &store,
        checkpoints: &checkpoints,
        scope,
        cache: &cache,
        control,
    };
    let mut report = Report::new(url, &checkpoints);
    let needed = needed::look(&looker, &mut findings).await?;
    // After the checkpoints, so that all of theirs is in it.
    let mut stored = stored(&store, &mut findings).await?;
    needed.compare(&looker, &mut stored, &mut findings).await?;
    if request.is_whole() {
        needed.note_orphans(&looker, &stored, &mut findings);
        table::look(&looker, &beside, &mut findings).await?;
        wal::look(&store, store_options, &beside, &checkpoints, &mut findings).await?;
    }
    if request.is_data {
        let read = data::read(&looker, &needed, &stored, &mut findings).await?;
        report.verified_bytes = Some(read.verified_bytes);
        report.unverified_bytes = Some(read.unverified_bytes);
        if request.adds_check_values {
            let added = data::add_check_values(&looker, &read, &stored, &mut findings).await?;
            findings.note(format!("{added} objects got check values"));
        } else if !read.unchecked.is_empty() {
            findings.note(format!(
                "{} objects have no check values, so that damage in them is not found: hypernbd check --data --write gives them some",
                read.unchecked.len()
            ));
        }
    }
    stopped(control)?;
    impact::tell(&looker, &mut findings).await?;
    impact::forget_what_went(&looker, &mut findings).await?;
    if !findings.found.is_empty() {
        // Of a clone its parents keep nothing for, since it was flattened: it has all of that itself.
        ensure_shares(&store).await?;
    }
    report.index_nodes = needed.nodes;
    report.objects = needed.objects() as u64;
    report.data_bytes = needed.data_bytes();
    report.tell(findings, &checkpoints);
    Ok(report)
}

/// What is wrong with what one checkpoint needs, whether it is listed or not: one text for each object. With `is_data` every block is read.
/// For who sees that nothing is removed meanwhile.
///
/// # Errors
/// When the store fails, or `control` says to stop.
pub(crate) async fn lacks(
    store: &Store,
    state: StoredState,
    block_size_bytes: u64,
    is_data: bool,
    control: &Control,
) -> Result<Vec<String>, VolumeError> {
    let mut findings = Findings::default();
    let checkpoints = Checkpoints::one(state, block_size_bytes);
    let cache = IndexCache::default();
    let looker = Looker {
        store,
        checkpoints: &checkpoints,
        scope: Scope::default(),
        cache: &cache,
        control,
    };
    let needed = needed::look(&looker, &mut findings).await?;
    let (mut stored, _) = stored_objects::list(store).await?;
    needed.compare(&looker, &mut stored, &mut findings).await?;
    if is_data {
        data::read(&looker, &needed, &stored, &mut findings).await?;
    }
    stopped(control)?;
    let found = findings.found.into_iter();
    Ok(found
        .map(|finding| format!("{}: {}", finding.object, finding.reason))
        .collect())
}

/// What the looks at a volume have in common.
struct Looker<'a> {
    store: &'a Store,
    checkpoints: &'a Checkpoints,
    scope: Scope,
    cache: &'a IndexCache,
    control: &'a Control,
}

impl Looker<'_> {
    /// The store that has an object, and its key there.
    fn place(&self, object: u64) -> (Holder<'_>, String) {
        let holder = self.store.holder_of(object_names::cno_of(object));
        let key = holder.data_key(&object_names::name_of(object));
        (holder, key)
    }
}

/// The checkpoints that the request is for.
async fn chosen(
    store: &Store,
    request: &Request,
    beside: &beside::Beside,
    findings: &mut Findings,
) -> Result<Checkpoints, VolumeError> {
    let mut checkpoints = checkpoints::kept(store, beside, request.snapshot.is_some(), findings).await?;
    if let Some(at) = &request.snapshot {
        match past::find(store, Some(at)).await {
            Ok(point) => checkpoints.only(&point),
            // What is asked for is damaged itself, and not unknown.
            Err(e) if !checkpoints::note_unreadable(store, beside, at, &e, findings) => return Err(e),
            Err(_) => {}
        }
    }
    Ok(checkpoints)
}

/// What is stored below the container's root now, and below those of the volumes that it has inherited from.
async fn stored(store: &Store, findings: &mut Findings) -> Result<Stored, VolumeError> {
    let (stored, others) = stored_objects::list(store).await?;
    findings.note_others(&others);
    Ok(stored)
}

/// Ends a check that is to stop.
fn stopped(control: &Control) -> Result<(), VolumeError> {
    match control.is_stopped() {
        true => Err(VolumeError::Closed),
        false => Ok(()),
    }
}
