//! `clone --full`: a checkpoint of a volume as a volume of its own, which shares nothing. Its objects are copied on the store's side.

use std::collections::BTreeSet;

use futures::try_join;

use super::children::{ensure_not_deleted, give_up, take_given_up};
use super::clone::{
    Cloned, Outcome, check_places, ensure_free, give_up_unless_made, place_for, point_of, remove_directory,
    warn_unknown,
};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::control::Control;
use crate::base::error::VolumeError;
use crate::base::url::VolumeUrl;
use crate::engine::bare;
use crate::engine::parents;
use crate::flatten::{Manner, copy_objects};
use crate::format::inode;
use crate::index::cache::IndexCache;
use crate::index::diff::{Place, places};
use crate::lease::Holding;
use crate::meta::label::{self, Label};
use crate::options::StoreOptions;
use crate::past::{At, Point};
use crate::retention::{Policy, Reading, put_policy};
use crate::store::Store;

/// Makes a volume at `to` of a checkpoint, with copies of all objects that it needs.
///
/// # Errors
/// As [`clone`](super::clone()).
pub async fn clone_full(
    url: &VolumeUrl,
    store_options: &StoreOptions,
    at: Option<&At>,
    to: &VolumeUrl,
) -> Result<Cloned, VolumeError> {
    check_places(url, to)?;
    let parent = parents::connect(url, store_options).await?;
    let copy = place_for(&parent, store_options, to).await?;
    let made = async {
        let (point, ()) = try_join!(point_of(&parent, at), ensure_free(&copy, Some(&parent)))?;
        let reading = Reading::begin(&parent, point.id()).await?;
        let made = make(&parent, &copy, &point).await;
        reading.end().await;
        made
    };
    let made = made.await;
    if made.is_err() {
        remove_directory(&copy).await;
    }
    made
}

async fn make(parent: &Store, copy: &Store, point: &Point) -> Result<Cloned, VolumeError> {
    let raw = bare::forked(&point.inode)?;
    let mut objects = BTreeSet::new();
    let cache = IndexCache::default().of_container(parent);
    let seen = places(parent, None, &point.state.root, &cache, |_, place| match place {
        Place::Node(object) | Place::Block(object) => drop(objects.insert(object)),
    });
    seen.await
        .map_err(|e| VolumeError::engine(format!("reading the index of {}", parent.url), e))?;
    let made_as = CheckpointId::of_inode(&raw);
    let label = label::make(copy, made_as.check).await?;
    let made = async {
        let manner = Manner {
            holding: Holding::Label(Some(label.volume_id)),
            beside: None,
            control: &Control::default(),
        };
        copy_objects(parent, &objects, copy, manner).await?;
        put_policy(copy, &Policy::of_new_volumes()).await?;
        let (owned, first) = (copy.clone(), raw);
        super::on_owner_thread(move || async move { bare::store_first(&owned, &first).await })
            .await
            .map_err(|e| VolumeError::engine(format!("making a volume at {}", copy.url), e))?;
        Ok(())
    };
    // What is there is a whole volume or none: the inode comes last.
    if let Err(e) = made.await {
        let there = label::load(copy).await;
        undo(copy, &label, false).await;
        // Whatever failed then has its cause in that.
        return Err(match there {
            Ok(there) if there.as_ref() != Some(&label) => label::interfered(copy),
            _ => e,
        });
    }
    if let Err(e) = bare::put_first(copy, &raw).await {
        match give_up_unless_made(copy, made_as).await {
            Outcome::Made => {}
            Outcome::GivenUp => {
                undo(copy, &label, true).await;
                return Err(e);
            }
            Outcome::Unknown => {
                warn_unknown(copy);
                return Err(e);
            }
        }
    }
    ensure_not_deleted(copy, label.volume_id, made_as).await?;
    Ok(Cloned::of(parent, copy, &label, point))
}

/// Removes what was made. The inode's place stays taken if a request for the inode may still be under way (R20); `hypernbd delete`
/// frees it.
async fn undo(copy: &Store, label: &Label, is_inode_sent: bool) {
    let undone = async {
        let is_own = label::load(copy).await?.as_ref() == Some(label);
        // Something in the inode's place first, so that a request for it cannot arrive later (R20).
        if is_own && give_up(copy).await? {
            let there = super::delete::objects(copy)
                .await?
                .into_iter()
                .map(|object| object.key);
            let last = [copy.meta_key(label::NAME), copy.data_key(inode::NAME)];
            let keys: Vec<String> = there.filter(|key| !last.contains(key)).collect();
            copy.delete_keys(&keys).await?;
            label::withdraw(copy, label).await?;
            if !is_inode_sent {
                take_given_up(copy).await?;
            }
        }
        Ok::<_, VolumeError>(())
    };
    if let Err(e) = undone.await {
        log::warn!(
            "something is left at {} of a volume that could not be made, which hypernbd delete removes: {}",
            copy.url,
            e.chain()
        );
    }
}
