//! The replica: made, owned as a server owns a volume, and published to.

use std::collections::BTreeSet;
use std::sync::Arc;

use log::warn;

use super::Request;
use super::original::{Needed, NewPoint, News, Original, entry_lost};
use super::standing::check_label;
use crate::admin::{
    check_path, ensure_free, ensure_not_deleted, remove_directory, retention, take_lease_only,
};
use crate::base::checkpoint_id::CheckpointId;
use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::base::url::VolumeUrl;
use crate::base::volume_id::VolumeId;
use crate::engine::replica::{self, Adopted};
use crate::engine::{Ownership, bare, checkpoint_stored};
use crate::format::inode;
use crate::format::object_names::{cno_of, name_of};
use crate::format::stored_state::StoredState;
use crate::lease::{Holding, Lease};
use crate::meta::checkpoint_list::{self, CatalogueEntry};
use crate::meta::label::{self, Label};
use crate::meta::snapshots::{self, Snapshot, SnapshotName};
use crate::options::{LeaseOptions, StoreOptions};
use crate::past;
use crate::retention::{ensure_readable, load_policy, put_policy};
use crate::store::{self, Store, probe};

/// A replica, or the place of one that is being made.
pub(super) struct Replica {
    store: Store,
    store_options: StoreOptions,
    volume_id: VolumeId,
    /// The volume that it follows.
    original: (VolumeUrl, VolumeId),
    /// Its newest checkpoint; none of a place where the first one is still to be published.
    newest: Option<CheckpointId>,
    /// Held once there is an inode: before that no server can open what is there.
    lease: Option<Arc<Lease>>,
    /// Numbers that are used, or may be.
    used: u64,
    /// Objects that an owner who may still run, and was shut out, may be removing at this moment.
    going: BTreeSet<u64>,
    /// What the last attempt was to publish: the answer to it may have been lost.
    attempted: Option<CheckpointId>,
    /// Whether the newest one's entry is known to be there.
    is_entered: bool,
    /// Names of the original that the replica has for something else, and that was said.
    in_the_way: BTreeSet<SnapshotName>,
}

impl Replica {
    /// Connects to the replica and takes its lease, or claims a free place for it.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`], [`VolumeError::Leftovers`] for a place that is another's; [`VolumeError::Held`] when another server
    /// has the replica.
    pub async fn connect(request: &Request<'_>, original: &Original) -> Result<Self, VolumeError> {
        let store = place_for(request, original).await?;
        let connected = Self::in_place(store.clone(), request, original).await;
        if connected.is_err() {
            remove_directory(&store).await;
        }
        connected
    }

    async fn in_place(store: Store, request: &Request<'_>, original: &Original) -> Result<Self, VolumeError> {
        store.check().await?;
        let label = match label::find(&store).await? {
            Some(found) => {
                check_label(&found.label, found.is_elsewhere(), &store.url, original.id())?;
                found.label
            }
            None => claim(&store, request.to_options, original).await?,
        };
        let (url, volume_id) = original.id();
        let mut replica = Self {
            store,
            store_options: request.to_options.clone(),
            volume_id: label.volume_id,
            original: (url.clone(), volume_id),
            newest: None,
            lease: None,
            used: 0,
            going: BTreeSet::new(),
            attempted: None,
            is_entered: false,
            in_the_way: BTreeSet::new(),
        };
        let ready = async {
            replica.complete(original).await?;
            replica.begin_rules(original).await
        };
        if let Err(e) = ready.await {
            replica.release(false).await;
            return Err(e);
        }
        Ok(replica)
    }

    /// A replica begins with the rules of its original, and has its own from there on: until it is made, nobody else gives it any.
    async fn begin_rules(&self, original: &Original) -> Result<(), VolumeError> {
        if self.is_made() || load_policy(&self.store).await?.is_some() {
            return Ok(());
        }
        match original.policy().await? {
            Some(policy) => put_policy(&self.store, &policy).await,
            None => Ok(()),
        }
    }

    /// Takes the lease of a replica that has an inode.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] when it is a replica no more; [`VolumeError::Held`] when another server has it.
    async fn own(&mut self) -> Result<(), VolumeError> {
        // Taking the lease of what was deleted would give it a label.
        self.ensure_ours().await?;
        let lease = match self.lease.take() {
            Some(lease) => lease,
            None => take_lease_only(&self.store, &self.store_options, &LeaseOptions::default()).await?,
        };
        self.lease = Some(lease.clone());
        // Somebody may have opened it for writing before that.
        self.ensure_ours().await?;
        // From here on older owners decide to remove nothing, and what they had decided to remove is gone: the original may have gone
        // back to a checkpoint that needs it, so that it is copied again.
        let finished = retention::rounds(&self.store, &lease).settle(true).await?;
        if lease.older_may_run()
            && let Some(finished) = finished
        {
            self.going.extend(finished.objects);
        }
        let (raw, _) = inode::load(&self.store).await?;
        let state = StoredState::of_inode(&raw);
        self.newest = Some(state.id());
        self.used = replica::used(&raw);
        Ok(())
    }

    /// Gives the lease back.
    pub async fn release(&self, is_clean: bool) {
        if let Some(lease) = &self.lease {
            lease.release(is_clean).await;
        }
    }

    /// Where it is.
    pub fn url(&self) -> String {
        self.store.url.to_string()
    }

    /// Its id.
    pub fn volume_id(&self) -> VolumeId {
        self.volume_id
    }

    /// Its store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What shows that the place is still this replica's.
    pub fn holding(&self) -> Holding<'_> {
        match &self.lease {
            Some(lease) => Holding::Lease(lease),
            None => Holding::Label(Some(self.volume_id)),
        }
    }

    /// Its newest checkpoint.
    pub fn newest(&self) -> Option<CheckpointId> {
        self.newest
    }

    /// Whether there is a volume.
    pub fn is_made(&self) -> bool {
        self.newest.is_some()
    }

    /// Prepares for the objects of these checkpoints: their numbers are used from here on.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when somebody else has the replica; [`VolumeError::InvalidInput`] when an owner before this one may still
    /// be removing what these need.
    pub async fn expect(&mut self, news: &News, needed: &Needed) -> Result<(), VolumeError> {
        if let Some(object) = needed.objects.intersection(&self.going).next() {
            return Err(VolumeError::InvalidInput(format!(
                "the object {} of {} was being removed by a command that may still run, and is needed again: see that no other command \
                 or server is at work there, then replicate again",
                name_of(*object),
                self.store.url
            )));
        }
        let of_points = news.points.iter().map(|new| replica::used(&new.point.inode));
        let of_objects = needed.objects.iter().map(|object| cno_of(*object));
        self.used = of_points.chain(of_objects).fold(self.used, u64::max);
        if !self.is_made() {
            return Ok(());
        }
        let there = self.read().await?;
        replica::reserve(&self.store, &there, self.used).await
    }

    /// Enters the newest checkpoint in the list, if an attempt was interrupted before that.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when somebody else has the replica; when a store fails.
    pub async fn complete(&mut self, original: &Original) -> Result<(), VolumeError> {
        if !self.is_made() {
            // The answer to the making of it may have been lost.
            match inode::load(&self.store).await {
                Ok(_) => self.own().await?,
                Err(VolumeError::NotFound { .. }) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        let (raw, _) = self.read().await?;
        let Some(newest) = self.newest.filter(|id| id.cno > 0 && !self.is_entered) else {
            return Ok(());
        };
        if checkpoint_list::load_entry(&self.store, newest.cno)
            .await?
            .is_none()
        {
            let entry = original.entry_of(newest).await?;
            let entry = match entry {
                Some(entry) => entry,
                None => entry_lost(&past::state_of(&raw)?),
            };
            self.enter(&entry).await?;
        }
        self.is_entered = true;
        Ok(())
    }

    /// Publishes a checkpoint whose objects are all there.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when somebody else has the replica; [`VolumeError::Corrupt`] when the checkpoint's own object is another.
    pub async fn publish(&mut self, new: &NewPoint) -> Result<(), VolumeError> {
        let id = new.point.id();
        if id.cno > 0 && checkpoint_stored(&self.store, id.cno).await? != Some(id) {
            return Err(VolumeError::Corrupt {
                what: format!(
                    "the object that checkpoint {} stored first, at {}",
                    id.cno, self.store.url
                ),
                reason: "it is missing, or of another checkpoint".into(),
            });
        }
        let raw = replica::with_used(&new.point.inode, self.used);
        if self.is_made() {
            let (_, etag) = self.read().await?;
            (self.attempted, self.is_entered) = (Some(id), false);
            replica::replace(&self.store, &raw, &etag).await?;
            self.newest = Some(id);
        } else {
            self.ensure_ours().await?;
            bare::put_first(&self.store, &raw).await?;
            ensure_not_deleted(&self.store, self.volume_id, CheckpointId::of_inode(&raw)).await?;
            self.own().await?;
        }
        if let Some(entry) = &new.entry {
            self.enter(entry).await?;
        }
        self.is_entered = true;
        Ok(())
    }

    /// Reads the inode in order to publish over it: adopt, then check (Invariant O1).
    async fn read(&mut self) -> Result<Adopted, VolumeError> {
        let (raw, info) = inode::load(&self.store).await?;
        if let Some(lease) = &self.lease {
            lease.check().await?;
        }
        let there = Some(CheckpointId::of_inode(&raw));
        if there != self.newest && there != self.attempted {
            return Err(VolumeError::Fenced {
                reason: format!("somebody else has published to the replica at {}", self.store.url),
            });
        }
        self.newest = there;
        Ok((raw, info.etag))
    }

    /// Enters a published checkpoint in the list.
    async fn enter(&self, entry: &CatalogueEntry) -> Result<(), VolumeError> {
        let entry = CatalogueEntry {
            epoch: self.lease.as_ref().map_or(0, |lease| lease.epoch()),
            ..entry.clone()
        };
        checkpoint_list::write_entry(&self.store, &entry).await?;
        Ok(())
    }

    /// Sees that what is here is still this replica: nobody has written to it, nor begun to delete it.
    async fn ensure_ours(&self) -> Result<(), VolumeError> {
        let (url, volume_id) = &self.original;
        match label::find(&self.store).await? {
            Some(found) if found.label.volume_id == self.volume_id => check_label(
                &found.label,
                found.is_elsewhere(),
                &self.store.url,
                (url, *volume_id),
            ),
            _ => Err(VolumeError::InvalidInput(format!(
                "what is at {} was deleted, or made anew, meanwhile: nothing more was done",
                self.store.url
            ))),
        }
    }

    /// Gives the names of the original's checkpoints to those that are here. A name that was given to another checkpoint of the replica
    /// keeps that one, which its retention might remove otherwise.
    ///
    /// # Errors
    /// [`VolumeError::Fenced`] when somebody else has the replica; when the store fails.
    pub async fn name_as(&mut self, names: &[Snapshot]) -> Result<(), VolumeError> {
        let here = snapshots::load_all(&self.store).await?;
        for name in names {
            let there = here.iter().find(|there| there.name == name.name);
            if there.is_some_and(|there| there.checkpoint == name.checkpoint) {
                continue;
            }
            if let Some(own) = there.filter(|there| !there.is_copied) {
                if self.in_the_way.insert(name.name.clone()) {
                    warn!(
                        "the snapshot {} of {} is checkpoint {} of it, and not checkpoint {} as in the original: it stays, because it was \
                         given here; delete it with hypernbd snapshot delete {} {}, and the original's comes in its place",
                        own.name,
                        self.store.url,
                        own.checkpoint.cno,
                        name.checkpoint.cno,
                        self.store.url,
                        own.name
                    );
                }
                continue;
            }
            let is_here = Some(name.checkpoint) == self.newest
                || checkpoint_list::load_entry(&self.store, name.checkpoint.cno)
                    .await?
                    .is_some_and(|entry| entry.is_of(name.checkpoint) == Some(true));
            if !is_here {
                continue;
            }
            if let Some(lease) = &self.lease {
                lease.check().await?;
            }
            let key = snapshots::key(&self.store, &name.name);
            let copy = Snapshot {
                is_copied: true,
                ..name.clone()
            };
            let body = serde_json::to_vec(&copy).map_err(|e| VolumeError::Internal(e.to_string()))?;
            match there {
                Some(_) => drop(self.store.put(&key, body).await?),
                None => match self.store.put_create_only(&key, body).await {
                    Ok(_) => {}
                    // Somebody gave it to the replica meanwhile: the next round looks at that one.
                    Err(e) if e.kind == StoreErrorKind::PreconditionFailed => continue,
                    Err(e) => return Err(e.into()),
                },
            }
            // The replica's own retention may have planned to remove it.
            match ensure_readable(&self.store, name.checkpoint).await {
                Ok(()) => {}
                Err(VolumeError::NoCheckpoint { .. }) => drop(self.store.delete(&key).await?),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The store of the replica's place.
async fn place_for(request: &Request<'_>, original: &Original) -> Result<Store, VolumeError> {
    match request.to {
        VolumeUrl::S3 { .. } => match original.store().url {
            // Reached in the same way: what is copied there the store can copy itself.
            VolumeUrl::S3 { .. } if request.store_options == request.to_options => {
                Ok(original.store().at(request.to).await?)
            }
            _ => Ok(store::unproved(request.to, request.to_options).await?),
        },
        VolumeUrl::File { path } => {
            check_path(request.to, path)?;
            Ok(store::connect_for_create(request.to, request.to_options).await?)
        }
    }
}

/// Claims a place where nothing is for a replica.
async fn claim(store: &Store, options: &StoreOptions, original: &Original) -> Result<Label, VolumeError> {
    ensure_free(store, None).await?;
    probe::ensure(store, options.allow_unsafe).await?;
    let (url, volume_id) = original.id();
    let of = label::Original {
        url: url.to_string(),
        volume_id,
    };
    label::make_this(store, Label::of_replica(store, of)?).await
}
