//! Where the objects of a container lie: a clone reads those of its parents by the numbers of their checkpoints, and has its
//! own above them.
//!
//! Pointers of the index name no root, but numbers tell: a clone begins to count above the fork, so what is at or below that is
//! its parent's, and what is above is its own.

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
}

impl Lineage {
    /// Of the volume `own`, which has inherited these, ascending by their numbers.
    pub fn new(own: Option<VolumeId>, inherited: Vec<Inherited>) -> Self {
        Self {
            own: own.map(RootId::from).unwrap_or_default(),
            inherited,
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

    /// Who has the objects of this checkpoint; `None` when they are the container's own.
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
            lineage: std::sync::Arc::new(lineage),
            ..self.clone()
        }
    }

    /// The same store, and those of what is inherited, which remember check values of their own. Who reads everything is not to make
    /// others forget the values that they need.
    #[must_use]
    pub(crate) fn apart(&self) -> Self {
        let alone = |store: &Self| Self {
            remembered: std::sync::Arc::default(),
            ..store.clone()
        };
        let inherited = self.lineage.inherited.iter().map(|part| Inherited {
            store: alone(&part.store),
            ..part.clone()
        });
        let lineage = Lineage {
            own: self.lineage.own,
            inherited: inherited.collect(),
        };
        alone(self).with_lineage(lineage)
    }

    /// Whose objects the container reads.
    pub(crate) fn lineage(&self) -> &std::sync::Arc<Lineage> {
        &self.lineage
    }

    /// Where the objects of this checkpoint are.
    pub(crate) fn holder_of(&self, cno: u64) -> &Self {
        self.lineage.holder(cno).map_or(self, |part| &part.store)
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
            assert!(!std::sync::Arc::ptr_eq(&holder.remembered, &shared.remembered));
        }
    }
}
