//! The mark of a deletion in progress: the volume's label with a random number of that deletion.
//!
//! Of two deletions, the later one's mark replaces the earlier one's, and the earlier one then stops. The label is
//! removed between the end of a deletion and the creation of a new volume at the same URL. So a deletion that began
//! earlier and was delayed finds that its mark is gone; it checks its mark before every step. A request that was
//! already sent can still arrive late. Only names that are never used twice would exclude that.

use crate::base::error::VolumeError;
use crate::base::store_error::StoreErrorKind;
use crate::meta::label::{self, Label};
use crate::store::{ETag, Store};

/// The stored mark of a deletion.
#[derive(Debug)]
pub(super) struct Tombstone {
    version: ETag,
    /// There was no label that could be read: one was made for the mark, with an id that means nothing.
    is_made: bool,
}

impl Tombstone {
    /// Marks the volume in its label. If the volume has no label, or none that can be read, one is made for the mark.
    ///
    /// # Errors
    /// [`VolumeError::Interfered`] when somebody else changes the label; when the store fails.
    pub async fn put(store: &Store) -> Result<Self, VolumeError> {
        let key = store.meta_key(label::NAME);
        let (there, is_unreadable) = match store.get(&key).await {
            Ok(there) => (there, false),
            Err(e) if e.kind == StoreErrorKind::Corrupt => (None, true),
            Err(e) => return Err(e.into()),
        };
        let label = there.as_ref().and_then(|(body, _)| Label::decode(body).ok());
        let is_made = label.is_none();
        let label = match label {
            Some(label) => label,
            None => Label::new(store, None)?,
        };
        let body = Label {
            deletion: Some(fastrand::u64(..)),
            ..label
        }
        .encode()?;
        let put = match &there {
            Some((_, version)) => store.put_if_match(&key, body, version).await,
            // The ETag of a label that cannot be read is not known either.
            None if is_unreadable => store.put(&key, body).await,
            None => store.put_create_only(&key, body).await,
        };
        match put {
            Ok(version) => Ok(Self { version, is_made }),
            Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Err(label::interfered(store)),
            Err(e) => Err(e.into()),
        }
    }

    /// Checks that the volume still carries this deletion's mark.
    ///
    /// # Errors
    /// [`VolumeError::Interfered`] when it is not; when the store fails.
    pub async fn check(&self, store: &Store) -> Result<(), VolumeError> {
        let there = store.get(&store.meta_key(label::NAME)).await?;
        match there {
            Some((_, version)) if version == self.version => Ok(()),
            _ => Err(label::interfered(store)),
        }
    }

    /// Takes the mark away, and leaves the label as it was: nothing was deleted. One that was made for the mark goes, because clones
    /// refuse the volume under its id.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub async fn withdraw(self, store: &Store) -> Result<(), VolumeError> {
        if self.is_made {
            return self.remove(store).await;
        }
        let key = store.meta_key(label::NAME);
        let there = store
            .get(&key)
            .await?
            .filter(|(_, version)| *version == self.version);
        let label = there.and_then(|(body, _)| Label::decode(&body).ok());
        let label = label.ok_or_else(|| label::interfered(store))?;
        let body = Label {
            deletion: None,
            ..label
        }
        .encode()?;
        match store.put_if_match(&key, body, &self.version).await {
            Ok(_) => Ok(()),
            Err(e) if e.kind == StoreErrorKind::PreconditionFailed => Err(label::interfered(store)),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes the mark away, and the label with it: the deletion is complete.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub async fn remove(self, store: &Store) -> Result<(), VolumeError> {
        self.check(store).await?;
        store.delete(&store.meta_key(label::NAME)).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::checkpoint_id::InodeCheck;
    use crate::base::url::VolumeUrl;
    use crate::options::StoreOptions;
    use crate::store;

    async fn labelled(path: &std::path::Path) -> (Store, Label) {
        let url = VolumeUrl::parse(&format!("file://{}/", path.display())).unwrap();
        let store = store::connect_for_create(&url, &StoreOptions::default())
            .await
            .unwrap();
        let label = label::make(&store, InodeCheck::from_bits(1)).await.unwrap();
        (store, label)
    }

    /// A deletion that nobody disturbs.
    async fn delete(store: &Store) {
        let deletion = Tombstone::put(store).await.unwrap();
        deletion.remove(store).await.unwrap();
    }

    fn is_interfered<R>(result: Result<R, VolumeError>) -> bool {
        matches!(result, Err(VolumeError::Interfered { .. }))
    }

    #[tokio::test]
    async fn of_two_deletions_the_later_one_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let (store, label) = labelled(dir.path()).await;
        let first = Tombstone::put(&store).await.unwrap();
        first.check(&store).await.unwrap();
        let second = Tombstone::put(&store).await.unwrap();
        assert!(is_interfered(first.check(&store).await));
        assert!(
            is_interfered(first.remove(&store).await),
            "the other's mark stays"
        );
        second.check(&store).await.unwrap();
        let marked = label::load(&store).await.unwrap().unwrap();
        assert_eq!(
            marked.volume_id, label.volume_id,
            "it still tells whose log is removed"
        );
        second.remove(&store).await.unwrap();
        assert_eq!(label::load(&store).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_deletion_held_up_leaves_what_was_made_after_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = labelled(dir.path()).await;
        let held_up = Tombstone::put(&store).await.unwrap();
        delete(&store).await;
        assert!(is_interfered(held_up.check(&store).await), "there is no label");
        let new = label::make(&store, InodeCheck::from_bits(2)).await.unwrap();
        assert!(is_interfered(held_up.remove(&store).await));
        assert_eq!(label::load(&store).await.unwrap(), Some(new));
    }

    #[tokio::test]
    async fn a_label_that_is_none_or_damaged_can_be_marked() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = labelled(dir.path()).await;
        let key = store.meta_key(label::NAME);
        store.put(&key, &b"{"[..]).await.unwrap();
        delete(&store).await;
        delete(&store).await;
        assert_eq!(store.get(&key).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_mark_that_is_withdrawn_leaves_the_label_that_was_there_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let (store, label) = labelled(dir.path()).await;
        Tombstone::put(&store)
            .await
            .unwrap()
            .withdraw(&store)
            .await
            .unwrap();
        assert_eq!(label::load(&store).await.unwrap(), Some(label));
        store.delete(&store.meta_key(label::NAME)).await.unwrap();
        Tombstone::put(&store)
            .await
            .unwrap()
            .withdraw(&store)
            .await
            .unwrap();
        assert_eq!(label::load(&store).await.unwrap(), None);
    }

    #[tokio::test]
    async fn who_writes_to_a_marked_volume_takes_the_mark_away() {
        let dir = tempfile::tempdir().unwrap();
        let (store, label) = labelled(dir.path()).await;
        let deletion = Tombstone::put(&store).await.unwrap();
        let found = label::find(&store).await.unwrap();
        let settled = label::settle(&store, found, None, false).await.unwrap();
        assert_eq!(settled, label);
        assert!(is_interfered(deletion.check(&store).await));
    }
}
