//! `clone`: a volume that begins as a checkpoint of another one, and shares the objects of that.
//!
//! The order is the one that was model-checked (R19 to R23 of the protocol): first the parent is told to keep the checkpoint,
//! then it is seen that it does, then the clone is made, with the inode last and create-only. A clone that is given up is shut
//! out first, and the parent is told last. So there is never a clone that its parent does not know of.

use futures::{TryFutureExt, join, try_join};
use hyperfile::ondisk::InodeRaw;
use serde::Serialize;

use super::children::{ensure_not_deleted, give_up, has_no_inode};
use super::create::{check_path, check_prefix};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::store_error::StoreErrorKind;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::engine::bare;
use crate::engine::parents;
use crate::format::inode;
use crate::meta::children::{self, Child};
use crate::meta::import_record::{self, ImportRecord};
use crate::meta::label::{self, Found, Label};
use crate::meta::origin::{self, Origin, Parent};
use crate::meta::wal_marker;
use crate::options::StoreOptions;
use crate::past::{self, At, Point};
use crate::retention::{Policy, ensure_readable, put_policy, remove_policy};
use crate::store::{self, Directory, ObjectEntry, Store, probe};

/// A clone that was made.
#[derive(Debug, Clone, Serialize)]
pub struct Cloned {
    /// Where it is.
    pub url: String,
    /// Its id.
    pub volume_id: VolumeId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The volume that it was made of.
    pub parent: String,
    /// The checkpoint of that which it began as.
    pub checkpoint: u64,
    /// When that was published, in milliseconds since 1970-01-01 UTC, by its server's clock.
    pub published_ms: u64,
}

impl Cloned {
    pub(super) fn of(parent: &Store, made: &Store, label: &Label, point: &Point) -> Self {
        Self {
            url: made.url.to_string(),
            volume_id: label.volume_id,
            size_bytes: point.size_bytes(),
            parent: parent.url.to_string(),
            checkpoint: point.number(),
            published_ms: point.published_ms,
        }
    }
}

/// Makes a clone at `to` of a checkpoint: of the newest published when `at` is `None`. It costs no more for a large volume than
/// for a small one.
///
/// # Errors
/// As [`past::find`]; [`VolumeError::AlreadyExists`], [`VolumeError::Leftovers`] for what is at `to`;
/// [`VolumeError::InvalidInput`] when the two places cannot be those of a volume and its clone.
pub async fn clone(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    at: Option<&At>,
    to: &VolumeUrl,
) -> Result<Cloned, VolumeError> {
    check_places(url, to)?;
    let parent = store::unproved(url, store_options).await?;
    let child = place_for(&parent, store_options, to).await?;
    let ready = try_join!(point_of(&parent, at), ensure_free(&child, Some(&parent)));
    let made = match ready {
        Ok((point, ())) => make(&parent, &child, &point).await,
        Err(e) => Err(e),
    };
    if made.is_err() {
        remove_directory(&child).await;
    }
    made
}

/// The state that is cloned. Half of an import is none, unless it is asked for by its number: nothing would tell what the clone is.
pub(super) async fn point_of(parent: &Store, at: Option<&At>) -> Result<Point, VolumeError> {
    let (point, import) = try_join!(past::find(parent, at), async {
        match at {
            Some(_) => Ok(None),
            None => newest_of(parent).await,
        }
    })?;
    match import {
        None => Ok(point),
        Some(import) => Err(VolumeError::InvalidInput(format!(
            "an import of {} into {} is not finished, so that its newest checkpoint is half of that: finish the import, or name the \
             checkpoint to clone",
            import.source_name(),
            parent.url
        ))),
    }
}

/// Warns of what is in a log alone, and gives the note of an import that may not be finished. Most volumes have neither, which one request
/// tells.
async fn newest_of(parent: &Store) -> Result<Option<ImportRecord>, VolumeError> {
    let listed = match &parent.url {
        VolumeUrl::S3 { .. } => match parent.list_right_below(&parent.meta_key("")).await {
            // Keys may be limited to what is asked for by name.
            Err(e) if e.kind == StoreErrorKind::AccessDenied => None,
            listed => Some(listed?),
        },
        VolumeUrl::File { .. } => None,
    };
    let may_be = |name: &str| {
        let key = parent.meta_key(name);
        let is_it = |listed: &Vec<ObjectEntry>| listed.iter().any(|object| object.key == key);
        listed.as_ref().is_none_or(is_it)
    };
    let import = async {
        match may_be(import_record::NAME) {
            true => ImportRecord::load(parent).await,
            false => Ok(None),
        }
    };
    let warned = async {
        if may_be(wal_marker::NAME) {
            wal_marker::warn_if_unpublished(parent, "in the clone").await;
        }
    };
    let (import, ()) = join!(import, warned);
    import
}

/// Whether these can be the places of a volume and its clone. Pure.
pub(super) fn check_places(url: &VolumeUrl, to: &VolumeUrl) -> Result<(), VolumeError> {
    let invalid = |reason: String| Err(VolumeError::InvalidInput(reason));
    if url == to {
        return invalid(format!("{url} cannot be cloned onto itself: choose another URL"));
    }
    match (url, to) {
        (VolumeUrl::S3 { .. }, VolumeUrl::S3 { .. }) => Ok(()),
        (VolumeUrl::File { path }, VolumeUrl::File { path: to })
            if to.starts_with(path) || path.starts_with(to) =>
        {
            invalid(format!(
                "one of {url} and {} is inside the other: choose a place beside it",
                to.display()
            ))
        }
        (VolumeUrl::File { .. }, VolumeUrl::File { .. }) => Ok(()),
        _ => invalid(format!(
            "{to} is in another kind of store than {url}, and cannot share its objects: copy it, with hypernbd export and import"
        )),
    }
}

/// The store at the place of a volume that is to be made.
pub(super) async fn place_for(
    beside: &Store,
    store_options: &StoreOptions,
    to: &VolumeUrl,
) -> Result<Store, VolumeError> {
    match to {
        VolumeUrl::S3 { .. } => Ok(beside.at(to).await?),
        VolumeUrl::File { path } => {
            check_path(to, path)?;
            Ok(store::connect_for_create(to, store_options).await?)
        }
    }
}

/// Looks whether anything of a volume is there, with one request, and whether it would be inside another volume. What is above a volume
/// `beside` it, too, was looked at when that was made.
pub(crate) async fn ensure_free(store: &Store, beside: Option<&Store>) -> Result<(), VolumeError> {
    let is_known = |outer: &str| {
        let of_bucket = beside.filter(|beside| beside.bucket == store.bucket);
        let below = of_bucket.and_then(|beside| beside.root.strip_prefix(outer));
        below.is_some_and(|below| below.starts_with('/'))
    };
    let outside = async {
        match &store.url {
            VolumeUrl::S3 { bucket, prefix } => check_prefix(store, bucket, prefix, is_known).await,
            VolumeUrl::File { .. } => Ok(()),
        }
    };
    // `.` comes before `/`: what lies beside a container is listed right before it.
    let (beside, data) = (store.meta_key(""), store.data_key(""));
    let end = store.data_key("~");
    let listed = store
        .list_between(&store.root, &beside, &end)
        .map_err(VolumeError::from);
    let listed = listed.or_else(|e| async {
        match e.kind() {
            // Keys may be limited to what begins with these two.
            ErrorKind::AccessDenied => {
                let mut listed = store.list(&beside).await?;
                listed.extend(store.list(&data).await?);
                Ok(listed)
            }
            _ => Err(e),
        }
    });
    let ((), listed) = try_join!(outside, listed)?;
    let has_inode = listed
        .iter()
        .any(|object| object.key == store.data_key(inode::NAME));
    if has_inode && !has_no_inode(store).await? {
        return Err(VolumeError::AlreadyExists {
            url: store.url.to_string(),
        });
    }
    let is_ours = |object: &&ObjectEntry| object.key.starts_with(&beside) || object.key.starts_with(&data);
    match listed
        .iter()
        .filter(is_ours)
        .find(|object| !probe::is_own(store, object))
    {
        Some(object) => Err(VolumeError::Leftovers {
            url: store.url.to_string(),
            found: object.key.clone(),
        }),
        None => Ok(()),
    }
}

async fn make(parent: &Store, child: &Store, point: &Point) -> Result<Cloned, VolumeError> {
    let raw = bare::forked(&point.inode)?;
    let made = CheckpointId::of_inode(&raw);
    let label = Label {
        is_clone: true,
        ..Label::new(child, Some(made.check))?
    };
    let entry = Child {
        checkpoint: point.id(),
        volume_id: label.volume_id,
    };
    // Told before it is looked at: of this and of whoever removes the checkpoint one sees the other (R19).
    let told = children::put(parent, &entry, &child.url.to_string()).await;
    let seen = async {
        told?;
        let origin = origin_of(parent, child, &label, point, raw.i_last_cno - 1).await?;
        ensure_readable(parent, point.id()).await?;
        Ok(origin)
    };
    let origin = match seen.await {
        Ok(origin) => origin,
        Err(e) => {
            forget(parent, &entry).await;
            return Err(e);
        }
    };
    if let Err(e) = publish(child, &label, &origin, &raw).await {
        let outcome = match e.1 {
            Sent::Nothing => Outcome::GivenUp,
            Sent::Inode => give_up_unless_made(child, made).await,
        };
        match outcome {
            Outcome::Made => {}
            Outcome::GivenUp => {
                undo(child, &label, &raw).await;
                forget(parent, &entry).await;
                return Err(e.0);
            }
            Outcome::Unknown => {
                warn_unknown(child);
                return Err(e.0);
            }
        }
    }
    // A deletion has told the parent that there is no such clone.
    if let Err(e) = ensure_not_deleted(child, label.volume_id, made).await {
        if matches!(e, VolumeError::Interfered { .. }) {
            forget(parent, &entry).await;
        }
        return Err(e);
    }
    Ok(Cloned::of(parent, child, &label, point))
}

/// What the clone is to say of where it comes from. The parent's label is read after the parent was told of the clone: whoever
/// deletes the parent marks it before looking for clones (R23).
async fn origin_of(
    parent: &Store,
    child: &Store,
    label: &Label,
    point: &Point,
    up_to: u64,
) -> Result<Origin, VolumeError> {
    let found = label::find(parent).await?;
    ensure_stays(parent, found.as_ref(), "clone it")?;
    let (_, of_parent) = parents::attach(parent, found.as_ref()).await?;
    let volume_id = own_id(parent, found, "clone it").await?;
    let mut parents = of_parent.map(|origin| origin.parents).unwrap_or_default();
    parents.push(Parent {
        up_to,
        url: origin::Address(parent.url.clone()),
        volume_id,
        checkpoint: point.id(),
    });
    Origin::new(&child.url, label.volume_id, parents)
}

/// Refuses a volume that is being deleted. `then` is what can be done once it is not.
pub(crate) fn ensure_stays(store: &Store, found: Option<&Found>, then: &str) -> Result<(), VolumeError> {
    match found.and_then(|found| found.label.deletion) {
        None => Ok(()),
        Some(_) => Err(VolumeError::InvalidInput(format!(
            "{} is being deleted, or a deletion of it was interrupted: end that with hypernbd delete {0}, or open the volume for \
             writing once, then {then}",
            store.url
        ))),
    }
}

/// The id of the volume whose label this is. A volume of other tools gets one. Refuses one that was moved, or is a copy: which of the
/// two only its owner can say. `then` is what can be done once that is said.
pub(crate) async fn own_id(store: &Store, found: Option<Found>, then: &str) -> Result<VolumeId, VolumeError> {
    match found {
        Some(found) if found.is_elsewhere() => Err(VolumeError::InvalidInput(format!(
            "what is at {} was made elsewhere, and is a copy, or was moved here: open it for writing once, with adopt=yes if it was moved, \
             then {then}",
            store.url
        ))),
        Some(found) => Ok(found.label.volume_id),
        None => Ok(label::settle(store, None, None, false).await?.volume_id),
    }
}

/// A failure of making a clone, and whether its inode was sent.
struct NotPublished(VolumeError, Sent);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Nothing,
    Inode,
}

/// Makes the clone: its label claims the place, and the inode, which makes it a volume, comes last.
async fn publish(child: &Store, label: &Label, origin: &Origin, raw: &InodeRaw) -> Result<(), NotPublished> {
    let before = async {
        label::make_this(child, label.clone()).await?;
        let (owned, first) = (child.clone(), *raw);
        let summary = super::on_owner_thread(move || async move { bare::store_first(&owned, &first).await });
        let failed = |e| VolumeError::engine(format!("making a clone at {}", child.url), e);
        let (policy, key) = (Policy::of_new_volumes(), child.meta_key(origin::NAME));
        let (put, policy, summary) = join!(
            child.put(&key, origin.encode()?),
            put_policy(child, &policy),
            summary
        );
        put?;
        policy?;
        summary.map_err(failed)
    };
    before.await.map_err(|e| NotPublished(e, Sent::Nothing))?;
    // A refusal, too, may be the answer to a second sending: the first one made the clone, and somebody has published to it since.
    let put = bare::put_first(child, raw).await;
    put.map_err(|e| NotPublished(e, Sent::Inode))
}

/// What became of a clone whose making failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The answer alone was lost.
    Made,
    /// It cannot come to be any more.
    GivenUp,
    Unknown,
}

/// Finds out what became of a clone whose inode, `made`, was sent and not known to be stored. One that is not there cannot come to be
/// afterwards.
pub(super) async fn give_up_unless_made(child: &Store, made: CheckpointId) -> Outcome {
    // Something in its place first, so that the request cannot arrive later (R20).
    match give_up(child).await {
        Ok(true) => Outcome::GivenUp,
        Ok(false) => match inode::load(child).await {
            Ok((there, _)) if CheckpointId::of_inode(&there) == made => Outcome::Made,
            // Another volume's, or this one after a publish: nothing is taken away.
            Ok(_) | Err(_) => Outcome::Unknown,
        },
        Err(_) => Outcome::Unknown,
    }
}

/// Says that the user must look.
pub(super) fn warn_unknown(child: &Store) {
    log::warn!(
        "it is not known whether the clone at {} was made: hypernbd info {0} tells once the store answers, and hypernbd delete {0} \
         removes what is there",
        child.url
    );
}

/// Takes away what is there of a clone that was given up: what belongs to this label.
async fn undo(child: &Store, label: &Label, raw: &InodeRaw) {
    let undone = async {
        if label::load(child).await?.as_ref() != Some(label) {
            // Another volume's, made there meanwhile.
            return Ok(());
        }
        let summaries = crate::format::object_names::summaries_of(raw.i_last_cno);
        let keys = summaries.map(|object| child.data_key(&crate::format::object_names::name_of(object)));
        child.delete_keys(&keys).await?;
        remove_policy(child).await?;
        child.delete(&child.meta_key(origin::NAME)).await?;
        label::withdraw(child, label).await
    };
    let undone: Result<(), VolumeError> = undone.await;
    if let Err(e) = undone {
        log::warn!(
            "something is left at {} of a clone that could not be made: {e}",
            child.url
        );
    }
}

/// The parent keeps nothing for a clone that cannot come to be.
async fn forget(parent: &Store, entry: &Child) {
    if let Err(e) = children::remove(parent, entry).await {
        log::warn!(
            "{} keeps checkpoint {} for a clone that was not made, until it is deleted: {}",
            parent.url,
            entry.checkpoint,
            e.chain()
        );
    }
}

pub(crate) async fn remove_directory(store: &Store) {
    if let Err(e) = store.remove_if_empty(Directory::AsFound).await {
        log::warn!("the directory of a volume that could not be made is left: {e}");
    }
}
