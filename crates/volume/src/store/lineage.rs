//! Where the objects of a container lie: a clone reads those of its parents by the numbers of their checkpoints, and has its
//! own above them.
//!
//! Pointers of the index name no root, but numbers tell: a clone begins to count above the fork, so what is at or below that is
//! its parent's, and what is above is its own.
//!
//! The sharing may end while the container is read: its own root then has copies of all that it has inherited, under the same names.
//! From there on [`Store::holder_of`] gives the own root for every number, and [`Lineage::end_sharing`] returns once nobody reads the
//! parents any more. Numbers stay what they were, for keys of caches and for whoever removes objects.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::Notify;

use super::Store;
use crate::base::volume_id::VolumeId;

/// Which container an object lies in, in the keys of caches: the id of its volume, or nothing where that is not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RootId(pub(crate) u128);

impl From<VolumeId> for RootId {
    fn from(id: VolumeId) -> Self {
        Self(id.as_uuid().as_u128())
    }
}

/// Numbers of checkpoints whose objects another container has.
#[derive(Debug, Clone)]
pub(crate) struct Inherited {
    /// The last of the numbers; the first follows the last one of the part before.
    pub up_to: u64,
    /// The volume that has them.
    pub volume_id: VolumeId,
    /// Where that is.
    pub store: Store,
}

/// Whose objects a container reads.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lineage {
    own: RootId,
    /// Ascending.
    inherited: Vec<Inherited>,
    /// One for all stores of an opening.
    sharing: Arc<Sharing>,
}

/// Whether what is inherited is read where it was inherited from.
#[derive(Debug, Default)]
struct Sharing {
    has_ended: AtomicBool,
    /// Passes that are held.
    reads: AtomicUsize,
    idle: Notify,
}

/// Held by who reads from a parent. What it needs there stays until it is dropped.
#[derive(Debug)]
pub(crate) struct Pass(Arc<Sharing>);

impl Drop for Pass {
    fn drop(&mut self) {
        if self.0.reads.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_one();
        }
    }
}

/// Who has an object, for a read of it: not to be held for longer than that takes.
#[derive(Debug)]
pub(crate) struct Holder<'a> {
    store: &'a Store,
    pass: Option<Pass>,
}

impl Holder<'_> {
    /// Whether it is another container than the one that reads.
    pub fn is_parent(&self) -> bool {
        self.pass.is_some()
    }
}

impl Deref for Holder<'_> {
    type Target = Store;

    fn deref(&self) -> &Store {
        self.store
    }
}

impl Lineage {
    /// Of the volume `own`, which has inherited these, ascending by their numbers.
    pub fn new(own: Option<VolumeId>, inherited: Vec<Inherited>) -> Self {
        Self {
            own: own.map(RootId::from).unwrap_or_default(),
            inherited,
            sharing: Arc::default(),
        }
    }

    /// What it has inherited.
    pub fn inherited(&self) -> &[Inherited] {
        &self.inherited
    }

    /// The last number that is inherited; 0 when nothing is.
    pub fn fork(&self) -> u64 {
        self.inherited.last().map_or(0, |part| part.up_to)
    }

    /// Whether the objects of this checkpoint are another container's.
    pub fn inherits(&self, cno: u64) -> bool {
        cno <= self.fork()
    }

    /// Lets the caller read from the parents; `None` where there are none, or the sharing has ended.
    pub fn pass(&self) -> Option<Pass> {
        if self.inherited.is_empty() {
            return None;
        }
        // Counted before it is looked: of this and of whoever ends the sharing one sees the other.
        self.sharing.reads.fetch_add(1, Ordering::SeqCst);
        let pass = Pass(self.sharing.clone());
        (!self.sharing.has_ended.load(Ordering::SeqCst)).then_some(pass)
    }

    /// From here on everything is read from the container's own root, which has copies of all that is needed. Returns once nobody reads
    /// from a parent any more. It may be called again.
    pub async fn end_sharing(&self) {
        self.sharing.has_ended.store(true, Ordering::SeqCst);
        // The last one to go leaves a word for whoever waits, also where nobody does yet.
        while self.sharing.reads.load(Ordering::SeqCst) > 0 {
            self.sharing.idle.notified().await;
        }
    }

    /// Who had the objects of this checkpoint when the container was opened; `None` when they are its own.
    pub fn holder(&self, cno: u64) -> Option<&Inherited> {
        let part = self.inherited.partition_point(|part| part.up_to < cno);
        self.inherited.get(part)
    }

    /// In which container the objects of this checkpoint are.
    pub fn root_of(&self, cno: u64) -> RootId {
        self.holder(cno).map_or(self.own, |part| part.volume_id.into())
    }
}

impl Store {
    /// The same store, of a container with this lineage.
    #[must_use]
    pub(crate) fn with_lineage(&self, lineage: Lineage) -> Self {
        Self {
            lineage: Arc::new(lineage),
            ..self.clone()
        }
    }

    /// The same store, and those of what is inherited, which remember check values of their own. Who reads everything is not to make
    /// others forget the values that they need.
    #[must_use]
    pub(crate) fn apart(&self) -> Self {
        let alone = |store: &Self| Self {
            remembered: Arc::default(),
            ..store.clone()
        };
        let inherited = self.lineage.inherited.iter().map(|part| Inherited {
            store: alone(&part.store),
            ..part.clone()
        });
        let lineage = Lineage {
            own: self.lineage.own,
            inherited: inherited.collect(),
            sharing: self.lineage.sharing.clone(),
        };
        alone(self).with_lineage(lineage)
    }

    /// Whose objects the container reads.
    pub(crate) fn lineage(&self) -> &Arc<Lineage> {
        &self.lineage
    }

    /// Where the objects of this checkpoint are, for a read of them.
    pub(crate) fn holder_of(&self, cno: u64) -> Holder<'_> {
        let part = self.lineage.holder(cno);
        match part.and_then(|part| Some((part, self.lineage.pass()?))) {
            Some((part, pass)) => Holder {
                store: &part.store,
                pass: Some(pass),
            },
            None => Holder {
                store: self,
                pass: None,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::url::VolumeUrl;
    use crate::store::connect_for_create;
    use crate::store::options::StoreOptions;

    #[tokio::test]
    async fn numbers_up_to_a_fork_are_the_parents_and_those_above_are_own() {
        let dir = tempfile::tempdir().unwrap();
        let mut stores = Vec::new();
        for name in ["grandparent", "parent", "child"] {
            let url = VolumeUrl::parse(&format!("file://{}/{name}/", dir.path().display())).unwrap();
            stores.push(connect_for_create(&url, &StoreOptions::default()).await.unwrap());
        }
        let ids = [VolumeId::random(), VolumeId::random(), VolumeId::random()];
        let part = |up_to: u64, of: usize| Inherited {
            up_to,
            volume_id: ids[of],
            store: stores[of].clone(),
        };
        let child = stores[2].with_lineage(Lineage::new(Some(ids[2]), vec![part(7, 0), part(20, 1)]));
        for (cno, of) in [
            (0, 0),
            (1, 0),
            (6, 0),
            (7, 0),
            (8, 1),
            (19, 1),
            (20, 1),
            (21, 2),
            (1 << 29, 2),
        ] {
            assert_eq!(child.holder_of(cno).url, stores[of].url, "{cno}");
            assert_eq!(child.lineage().root_of(cno), ids[of].into(), "{cno}");
        }
        assert_eq!(child.lineage().fork(), 20);
        let plain = &stores[0];
        assert_eq!(
            (plain.lineage().fork(), plain.lineage().root_of(7)),
            (0, RootId::default())
        );
        assert_eq!(plain.holder_of(7).url, plain.url);
        let apart = child.apart();
        for cno in [7, 20, 21] {
            let (holder, shared) = (apart.holder_of(cno), child.holder_of(cno));
            assert_eq!(holder.url, shared.url);
            assert!(!Arc::ptr_eq(&holder.remembered, &shared.remembered));
        }
    }

    /// Of a plain volume and of own numbers nothing is counted, so that nobody is waited for.
    #[tokio::test]
    async fn once_the_sharing_has_ended_all_is_own_and_nobody_reads_the_parent() {
        let dir = tempfile::tempdir().unwrap();
        let mut stores = Vec::new();
        for name in ["parent", "child"] {
            let url = VolumeUrl::parse(&format!("file://{}/{name}/", dir.path().display())).unwrap();
            stores.push(connect_for_create(&url, &StoreOptions::default()).await.unwrap());
        }
        let id = VolumeId::random();
        let inherited = Inherited {
            up_to: 7,
            volume_id: id,
            store: stores[0].clone(),
        };
        let child = stores[1].with_lineage(Lineage::new(Some(VolumeId::random()), vec![inherited]));
        let apart = child.apart();
        let (reading, beside) = (child.holder_of(7), apart.holder_of(1));
        let own = child.holder_of(8);
        assert!(reading.is_parent() && beside.is_parent() && !own.is_parent());
        let mut ending = Box::pin(child.lineage().end_sharing());
        assert!(futures::poll!(&mut ending).is_pending(), "two read there");
        for store in [&child, &apart, &child.clone()] {
            assert_eq!(
                store.holder_of(7).url,
                stores[1].url,
                "no read begins there any more"
            );
        }
        drop(beside);
        assert!(futures::poll!(&mut ending).is_pending(), "one reads there");
        drop(reading);
        ending.await;
        apart.lineage().end_sharing().await;
        drop(own);
        assert_eq!(
            (child.lineage().fork(), child.lineage().root_of(7)),
            (7, id.into()),
            "numbers stay"
        );
    }
}
