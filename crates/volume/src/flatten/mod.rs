//! The end of a clone's sharing: it gets copies of all that it has inherited, and its parent need keep nothing for it any more.
//!
//! Copies have the names of their originals, which the clone has never used itself. So every checkpoint of it reads as before, and
//! what ends the sharing is one write: that of its label. The parent is told after that (R22 of the protocol).
//!
//! The same steps end the sharing of a clone that is served. What is published meanwhile refers to no inherited object that the checkpoint
//! before it does not refer to, so the copies are of all that will ever be needed. Once the label is put, the server reads its own copies
//! alone, and the parent is told when the last read of its objects has ended ([`Lineage::end_sharing`]).
//!
//! Who else reads the clone goes on with what it began with. Each has a pin on a checkpoint of the clone, and looks at the label once that
//! is put (`retention/reading.rs`); here the pins are looked at once the label is put. So of the two one sees the other, and the parent is
//! not told before they have gone.
//!
//! [`Lineage::end_sharing`]: crate::store::lineage::Lineage::end_sharing

mod copy_objects;
mod keeper;

use std::collections::BTreeSet;

use log::info;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

pub(crate) use copy_objects::{Manner, copy_objects};
pub(crate) use keeper::{Keeper, Work};

use crate::base::control::Control;
use crate::base::error::VolumeError;
use crate::engine::Ownership;
use crate::format::inode;
use crate::lease::{Holding, Lease};
use crate::meta::origin::{self, Origin};
use crate::meta::{children, label};
use crate::read::read_path::Reads;
use crate::retention::Rounds;
use crate::store::Store;

/// A clone that shares nothing any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flattened {
    /// Where it is.
    pub url: String,
    /// The volume that it was a clone of.
    pub parent: String,
    /// Objects that were copied.
    pub objects: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Where the clone comes from that is to be flattened.
///
/// # Errors
/// [`VolumeError::InvalidInput`] when the volume is no clone; as [`is_sharing`].
pub(crate) async fn origin_of(store: &Store) -> Result<Origin, VolumeError> {
    let Some(origin) = origin::load(store).await? else {
        // Of a volume that is not there that is said.
        inode::load(store).await?;
        return Err(VolumeError::InvalidInput(format!(
            "{} is no clone: it shares nothing",
            store.url
        )));
    };
    is_sharing(store, &origin).await?;
    Ok(origin)
}

/// Ends the sharing of a clone.
pub(crate) struct Ending<'a> {
    /// The clone, with what it has inherited.
    pub store: &'a Store,
    /// Where that comes from.
    pub origin: &'a Origin,
    /// The clone's lease, which is held.
    pub lease: &'a Lease,
    /// The rounds of the clone: what they are removing is not copied.
    pub rounds: &'a Mutex<Rounds>,
    /// Reads of the clone's clients, which go before the copies.
    pub beside: Option<&'a Reads>,
    /// Says how far it is, and ends it before the label is put.
    pub control: &'a Control,
}

impl Ending<'_> {
    /// Copies, puts the label, tells the parent. Killed at any moment, it leaves a clone or a volume of its own, and may be done again.
    ///
    /// # Errors
    /// [`VolumeError::InvalidInput`] when the volume has clones of its own, and when others still read it: the parent is not told then;
    /// [`VolumeError::Fenced`]; [`VolumeError::Closed`] when it was told to stop; when a store fails.
    pub async fn run(&self) -> Result<Flattened, VolumeError> {
        let (store, origin) = (self.store, self.origin);
        let mut flattened = Flattened {
            url: store.url.to_string(),
            parent: origin.parent().url.0.to_string(),
            objects: 0,
            bytes: 0,
        };
        ensure_childless(store).await?;
        // A plain label: an earlier attempt came so far.
        if is_sharing(store, origin).await? {
            self.copy_all(&mut flattened).await?;
        }
        // This process reads nothing from the parent from here on.
        store.lineage().end_sharing().await;
        // Whoever took the lease before the label was put goes on as a clone, and the parent keeps what that reads. Whoever takes
        // it later finds the label.
        self.lease.check().await?;
        // A clone of this one that was begun meanwhile has put its entry before it looked at the label.
        ensure_childless(store).await?;
        self.ensure_unread().await?;
        let parent = store.at(&origin.parent().url.0).await?;
        children::remove(&parent, &origin.child()).await?;
        // Not that of a clone that was made here meanwhile.
        self.lease.check().await?;
        store.delete(&store.meta_key(origin::NAME)).await?;
        info!(
            "{} shares nothing with {} any more",
            flattened.url, flattened.parent
        );
        Ok(flattened)
    }

    /// Copies until nothing is missing, and puts the label.
    async fn copy_all(&self, flattened: &mut Flattened) -> Result<(), VolumeError> {
        let store = self.store;
        if store.lineage().fork() == 0 {
            return Err(VolumeError::Internal(format!(
                "{} is a clone, and was opened as none",
                store.url
            )));
        }
        // Check values that are read for the copies make nobody else's go.
        let from = store.apart();
        let mut copied = BTreeSet::new();
        loop {
            let mut rounds = self.rounds.lock().await;
            let needed = rounds.inherited_objects().await?;
            let missing: BTreeSet<u64> = needed.difference(&copied).copied().collect();
            if missing.is_empty() {
                self.ensure_not_stopped()?;
                self.lease.check().await?;
                return label::end_sharing(store, self.origin.volume_id).await;
            }
            drop(rounds);
            let manner = Manner {
                holding: Holding::Lease(self.lease),
                beside: self.beside,
                control: self.control,
            };
            // Copied to the clone's own place, whatever it has inherited.
            let amount = copy_objects(&from, &missing, store, manner).await?;
            flattened.objects += amount.objects;
            flattened.bytes += amount.bytes;
            copied.extend(missing);
        }
    }

    fn ensure_not_stopped(&self) -> Result<(), VolumeError> {
        match self.control.is_stopped() {
            true => Err(VolumeError::Closed),
            false => Ok(()),
        }
    }

    /// Refuses while others read the clone, who may have begun when it shared.
    async fn ensure_unread(&self) -> Result<(), VolumeError> {
        match self.rounds.lock().await.has_readers().await? {
            false => Ok(()),
            true => Err(VolumeError::InvalidInput(format!(
                "{} has all that it needs itself from now on, but others read it who began before that (a server that only reads, an \
                 earlier checkpoint that a client reads, an export), and {} keeps what they read: give the command again once they have \
                 ended; one that was killed counts for a quarter of an hour",
                self.store.url,
                self.origin.parent().url.0
            ))),
        }
    }
}

/// Whether the label says that the volume shares what this origin tells of; `false` once an earlier attempt has put a plain one. Another
/// label does not say which objects are shared, so none would be copied before the parent lets go of them.
///
/// # Errors
/// [`VolumeError::Parent`] for another label, or none; when the store fails.
async fn is_sharing(store: &Store, origin: &Origin) -> Result<bool, VolumeError> {
    let found = label::find(store).await?;
    let own = found.filter(|found| {
        !found.is_elsewhere() && found.label.volume_id == origin.volume_id && origin.url.0 == store.url
    });
    own.map(|found| found.label.is_clone)
        .ok_or_else(|| VolumeError::Parent {
            url: store.url.to_string(),
            reason: format!(
                "its label {} is missing or is not the one that it was made with, which says what it shares: put that back from a \
                 backup, or delete the clone",
                store.meta_key(label::NAME)
            ),
        })
}

/// Clones of a clone read what it has inherited from where that lies, and its parent keeps that for this clone alone.
///
/// # Errors
/// [`VolumeError::InvalidInput`] when there are some; when the store fails.
pub(crate) async fn ensure_childless(store: &Store) -> Result<(), VolumeError> {
    match children::list(store).await?.is_empty() {
        true => Ok(()),
        false => Err(VolumeError::InvalidInput(format!(
            "{} has clones of its own, which read what it has inherited: flatten or delete those first (hypernbd info {0} names \
             them; one that was begun and never made is none a day after that, where this is given while nobody serves the volume)",
            store.url
        ))),
    }
}
