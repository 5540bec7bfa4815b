//! The clones of a volume, looked at where they are: whether they are there, and what is known of the volume by them.

use futures::future::join_all;
use serde::Serialize;

use crate::base::checkpoint_id::CheckpointId;
use crate::base::clock::now_ms;
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::format::inode::{self, GIVEN_UP};
use crate::meta::children::{self, Child, ChildRecord};
use crate::meta::label::{self, Label};
use crate::meta::origin::{self, Origin};
use crate::store::Store;

/// How far clocks may be apart.
const DAY_MS: u64 = 24 * 3600 * 1000;

/// A clone of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CloneInfo {
    /// Where it was made; nothing where its entry cannot be read.
    pub url: Option<String>,
    /// Its id.
    pub volume_id: VolumeId,
    /// The checkpoint of this volume that it began as.
    pub checkpoint: u64,
}

/// The volume that a clone was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ParentInfo {
    /// Where it is.
    pub url: String,
    /// Its id.
    pub volume_id: VolumeId,
    /// The checkpoint of it that the clone began as.
    pub checkpoint: u64,
    /// The last number of a checkpoint whose objects are not the clone's own.
    pub inherited_up_to: u64,
}

impl ParentInfo {
    pub(super) fn of(origin: &Origin) -> Self {
        let parent = origin.parent();
        Self {
            url: parent.url.0.to_string(),
            volume_id: parent.volume_id,
            checkpoint: parent.checkpoint.cno,
            inherited_up_to: parent.up_to,
        }
    }
}

/// The clones that the volume knows of.
///
/// # Errors
/// When the store fails.
pub(super) async fn known(store: &Store) -> Result<Vec<CloneInfo>, VolumeError> {
    let known = children::load_all(store).await?.into_iter();
    let known = known.map(|(child, record)| CloneInfo {
        url: record.map(|record| record.url),
        volume_id: child.volume_id,
        checkpoint: child.checkpoint.cno,
    });
    Ok(known.collect())
}

/// What was found in the place of a clone.
#[derive(Debug)]
enum Found {
    /// It is there.
    There,
    /// Another volume is, or the clone shares nothing any more: nobody can end the making of a clone there.
    Another,
    /// There is no volume, and there may be one soon if somebody is making it.
    Nothing(Store),
    /// It was given up.
    GivenUp,
    /// That cannot be told, and why.
    Unknown(String),
}

async fn look(
    parent: &Store,
    own: Option<&label::Found>,
    child: &Child,
    record: Option<&ChildRecord>,
) -> Found {
    let Some(record) = record else {
        return Found::Unknown("its entry cannot be read".to_owned());
    };
    let url = match VolumeUrl::parse(&record.url) {
        Ok(url) => url,
        Err(e) => return Found::Unknown(e.to_string()),
    };
    let is_inherited = own.is_some_and(|own| is_inherited(own, record));
    match look_at(parent, child, &url).await {
        // It is the original's, and gone, or somebody is making it.
        Ok(Found::Nothing(_)) if is_inherited => Found::Another,
        Err(VolumeError::Store(e)) if is_inherited && e.kind == StoreErrorKind::NotFound => Found::Another,
        Ok(Found::There) => match is_of_original(parent, own, child, &url).await {
            Ok(true) => Found::Another,
            Ok(false) | Err(_) => Found::There,
        },
        Ok(found) => found,
        Err(e) => Found::Unknown(e.chain()),
    }
}

/// Whether an entry was copied along with the volume: of a copy that was never opened, or of one that became a volume of its own long
/// after.
fn is_inherited(own: &label::Found, record: &ChildRecord) -> bool {
    let became_ms = own.label.created_ms;
    own.is_elsewhere() || own.label.parent.is_some() && record.made_ms.saturating_add(DAY_MS) < became_ms
}

/// Whether a clone that is there is one of the volume that this one is a copy of: its origin names that volume, which is there.
async fn is_of_original(
    store: &Store,
    own: Option<&label::Found>,
    child: &Child,
    url: &VolumeUrl,
) -> Result<bool, VolumeError> {
    let (Some(own), Some(origin)) = (own, origin::load(&store.at(url).await?).await?) else {
        return Ok(false);
    };
    let parent = origin.parent();
    // The same volume may be reached by two URLs.
    let is_copy = own.is_elsewhere() || own.label.volume_id != parent.volume_id;
    if !is_copy || origin.volume_id != child.volume_id || parent.url.0 == store.url {
        return Ok(false);
    }
    let original = label::load(&store.at(&parent.url.0).await?).await?;
    // What carries the mark of this very deletion is this volume, by another name of its bucket.
    let is_itself = |there: &Label| there.deletion.is_some() && there.deletion == own.label.deletion;
    Ok(original.is_some_and(|there| there.volume_id == parent.volume_id && !is_itself(&there)))
}

async fn look_at(parent: &Store, child: &Child, url: &VolumeUrl) -> Result<Found, VolumeError> {
    let store = parent.at(url).await?;
    let key = store.data_key(inode::NAME);
    let (label, inode) = futures::join!(label::load(&store), store.get(&key));
    match inode {
        Ok(None) => return Ok(Found::Nothing(store)),
        Ok(Some((body, _))) if body == GIVEN_UP => return Ok(Found::GivenUp),
        Ok(Some(_)) => {}
        // A damaged one is one.
        Err(e) if e.kind == StoreErrorKind::Corrupt => {}
        Err(e) => return Err(e.into()),
    }
    Ok(match label {
        // A label that was lost and made anew has another id; what the volume shares is told by its origin alone then.
        Ok(Some(label)) if label.volume_id != child.volume_id => match origin::load(&store).await {
            Ok(Some(origin)) if origin.volume_id == child.volume_id => Found::There,
            Ok(_) => Found::Another,
            Err(e) => return Err(e),
        },
        // Flattened, and this was not told; until it is, the other may have clones that need what this keeps.
        Ok(Some(label)) if !label.is_clone && store.head(&store.meta_key(origin::NAME)).await?.is_none() => {
            Found::Another
        }
        // Without a label that can be read it may be this one.
        _ => Found::There,
    })
}

/// A clone that the volume knows of, looked at.
struct Looked {
    child: Child,
    /// What its entry says, where that can be read.
    record: Option<ChildRecord>,
    found: Found,
}

impl Looked {
    fn url(&self) -> Option<&str> {
        self.record.as_ref().map(|record| record.url.as_str())
    }

    /// Whether it was begun so long ago that nobody is making it any more, whatever the clocks say.
    fn is_old(&self) -> bool {
        let made_ms = self.record.as_ref().map_or(u64::MAX, |record| record.made_ms);
        made_ms.saturating_add(DAY_MS) < now_ms()
    }

    /// The volume keeps nothing for it from here on.
    async fn remove(&self, store: &Store) -> Result<(), VolumeError> {
        children::remove(store, &self.child).await?;
        log::info!(
            "{} no longer keeps objects for the clone {}, which is not at {}",
            store.url,
            self.child.volume_id,
            self.url().unwrap_or("the place it was to be")
        );
        Ok(())
    }
}

/// Whether clones keep the volume from being deleted, and why each does. Changes nothing.
///
/// # Errors
/// [`VolumeError::HasClones`] when one is there, or that cannot be told; when the store fails.
pub(super) async fn ensure_none(store: &Store) -> Result<(), VolumeError> {
    refuse(store, &all(store).await?)
}

/// As [`ensure_none`], and takes away the entries of clones that are not there. First something is put into the place of each
/// that somebody may be making, so that it cannot come to be afterwards.
///
/// # Errors
/// As [`ensure_none`]: nothing is taken away then.
pub(super) async fn settle(store: &Store) -> Result<(), VolumeError> {
    let all = all(store).await?;
    refuse(store, &all)?;
    for looked in all {
        if let Found::Nothing(place) = &looked.found
            && !give_up(place).await?
        {
            // It was made meanwhile.
            let made = Looked {
                found: Found::There,
                ..looked
            };
            return refuse(store, &[made]);
        }
        looked.remove(store).await?;
    }
    Ok(())
}

/// Takes away the entries of clones that were begun, never made, and cannot come to be, and leaves those of all others: of clones that
/// are there or were moved, of those of which that cannot be told, and of those that somebody may be making still. So what was killed while
/// it made a clone keeps nothing for ever.
///
/// # Errors
/// When the volume's store fails. An entry is left where something is in the way of taking it away.
pub(super) async fn clear(store: &Store) -> Result<(), VolumeError> {
    let mut known = children::load_all(store).await?;
    if known.is_empty() {
        return Ok(());
    }
    let Some(own) = label::find(store).await? else {
        return Ok(());
    };
    // Without the mark of a deletion a volume that is reached by another name is not told from a copy: what may have been copied along
    // stays until that is deleted.
    known.retain(|(_, record)| record.as_ref().is_some_and(|record| !is_inherited(&own, record)));
    for looked in all_of(store, None, known).await {
        let is_over = match &looked.found {
            Found::There | Found::Unknown(_) | Found::Another => false,
            Found::GivenUp => true,
            Found::Nothing(place) => looked.is_old() && never_comes(place, &looked.child).await,
        };
        if is_over {
            looked.remove(store).await?;
        }
    }
    Ok(())
}

/// Whether a clone was begun at this place, nobody waits for it any more, and it cannot come to be from now on. Where nothing tells that it
/// was begun here, it may have been moved away once it was made.
async fn never_comes(place: &Store, child: &Child) -> bool {
    let given_up = async {
        let origin = origin::load(place).await?;
        match origin.is_some_and(|origin| origin.volume_id == child.volume_id) {
            true => give_up(place).await,
            false => Ok(false),
        }
    };
    given_up.await.unwrap_or_else(|e| {
        log::warn!(
            "whether a clone may still come to be at {} is not known: {}",
            place.url,
            e.chain()
        );
        false
    })
}

async fn all(store: &Store) -> Result<Vec<Looked>, VolumeError> {
    let known = children::load_all(store).await?;
    if known.is_empty() {
        return Ok(Vec::new());
    }
    // One that cannot be read does not say that the volume is a copy.
    let own = label::find(store).await.ok().flatten();
    Ok(all_of(store, own.as_ref(), known).await)
}

async fn all_of(
    store: &Store,
    own: Option<&label::Found>,
    known: Vec<(Child, Option<ChildRecord>)>,
) -> Vec<Looked> {
    let looked = known.into_iter().map(|(child, record)| async move {
        let found = look(store, own, &child, record.as_ref()).await;
        Looked { child, record, found }
    });
    join_all(looked).await
}

fn refuse(store: &Store, all: &[Looked]) -> Result<(), VolumeError> {
    let in_the_way = all.iter().filter_map(|looked| {
        let unnamed = || format!("volume {}", looked.child.volume_id);
        let name = looked.url().map_or_else(unnamed, str::to_owned);
        match &looked.found {
            Found::There => Some(name),
            Found::Unknown(why) => Some(format!(
                "{name}, of which it cannot be told whether it is there: {why}"
            )),
            Found::Another | Found::Nothing(_) | Found::GivenUp => None,
        }
    });
    let clones: Vec<String> = in_the_way.collect();
    match clones.is_empty() {
        true => Ok(()),
        false => Err(VolumeError::HasClones {
            url: store.url.to_string(),
            clones: clones.join("; "),
        }),
    }
}

/// Puts something into the place of the inode of a clone that is not made yet. `false` when there is an inode.
///
/// # Errors
/// When the store fails.
pub(super) async fn give_up(child: &Store) -> Result<bool, VolumeError> {
    let key = child.data_key(inode::NAME);
    match child.put_create_only(&key, GIVEN_UP).await {
        Ok(_) => Ok(true),
        // Somebody else may have given it up.
        Err(e) if e.kind == StoreErrorKind::PreconditionFailed => {
            let there = child.get(&key).await?;
            Ok(there.is_some_and(|(body, _)| body == GIVEN_UP))
        }
        Err(e) => Err(e.into()),
    }
}

/// Whether there is no inode, or what stands in its place since a clone was given up.
///
/// # Errors
/// When the store fails.
pub(super) async fn has_no_inode(store: &Store) -> Result<bool, VolumeError> {
    let key = store.data_key(inode::NAME);
    match store.head(&key).await? {
        None => Ok(true),
        Some(info) if info.size_bytes != GIVEN_UP.len() as u64 => Ok(false),
        Some(_) => {
            let there = store.get(&key).await?;
            Ok(there.is_none_or(|(body, _)| body == GIVEN_UP))
        }
    }
}

/// Checks, once the inode `made` of a new volume with this id was put, that the place is still that volume's. A deletion that began
/// meanwhile has found no inode there, and takes everything else away: the inode goes, too.
///
/// # Errors
/// [`VolumeError::Interfered`], with nothing left of the inode; when the store fails.
pub(crate) async fn ensure_not_deleted(
    store: &Store,
    volume_id: VolumeId,
    made: CheckpointId,
) -> Result<(), VolumeError> {
    let is_its = |there: Label| there.volume_id == volume_id && there.deletion.is_none();
    if label::load(store).await?.is_some_and(is_its) {
        return Ok(());
    }
    match inode::load(store).await {
        Ok((there, _)) if CheckpointId::of_inode(&there) == made => {
            store.delete(&store.data_key(inode::NAME)).await?;
        }
        Ok(_) | Err(VolumeError::NotFound { .. }) => {}
        Err(e) => return Err(e),
    }
    Err(label::interfered(store))
}

/// Takes away what [`give_up`] has put.
///
/// # Errors
/// When the store fails.
pub(super) async fn take_given_up(child: &Store) -> Result<(), VolumeError> {
    let key = child.data_key(inode::NAME);
    if child.get(&key).await?.is_some_and(|(body, _)| body == GIVEN_UP) {
        child.delete(&key).await?;
    }
    Ok(())
}
