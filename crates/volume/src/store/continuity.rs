//! Whether a place still has the volume whose objects are read from it.
//!
//! Whoever reads without the lease can be overtaken: the volume is deleted, and another one is made at the same address. That one's
//! numbers begin anew, so its objects have the names of the old ones, and their check values are right. An object that was written before
//! the volume was last seen at its place belongs to it. For a later one the volume's identity is read again, after the object. No clock
//! but the store's decides.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::Store;
use super::interceptors::window_checksums::last_part;
use crate::base::store_error::{StoreError, StoreErrorKind};

/// The volume that is expected at a place.
#[derive(Debug, Clone)]
pub(crate) struct Expected {
    /// Its identity.
    pub identity: String,
    /// The object that says which volume is there.
    pub key: String,
    /// Whether the content of that object is of this identity; nothing when it cannot be read, which does not say that the volume is gone.
    pub is_of: fn(&[u8], &str) -> Option<bool>,
    /// When the volume was last seen there, by the store's clock, in whole seconds.
    pub seen: SystemTime,
}

/// What is known of the volume at a place. Nothing is expected until somebody says so.
#[derive(Debug, Default)]
pub(super) struct Continuity {
    expected: Mutex<Option<Expected>>,
    /// The volume is gone. It does not come back.
    is_over: AtomicBool,
}

impl Store {
    /// Expects this volume at the place from now on, in all clones of this value: data of another one is an error. Where another
    /// identity is expected already, that stays, and the next look decides: the volume may have got a new one, and continue.
    pub(crate) fn expect_here(&self, new: Expected) {
        let mut expected = self.continuity.expected.lock();
        if expected.as_ref().is_none_or(|old| old.identity == new.identity) {
            *expected = Some(new);
        }
    }

    /// Whether the volume that was expected was found to be gone.
    pub(crate) fn is_over(&self) -> bool {
        self.continuity.is_over.load(Ordering::Relaxed)
    }

    /// Looks whether the volume that is expected is still there.
    ///
    /// # Errors
    /// When it is gone, or the store fails.
    pub(crate) fn ensure_continues(&self) -> BoxFuture<'_, Result<(), StoreError>> {
        async move {
            let expected = self.continuity.expected.lock().clone();
            let Some(expected) = expected else {
                return Ok(());
            };
            if !self.is_over() {
                let found = self.get(&expected.key).await?;
                let is_here = match &found {
                    Some((body, _)) => (expected.is_of)(body, &expected.identity),
                    None => Some(false),
                };
                match is_here {
                    Some(true) => return Ok(()),
                    Some(false) => self.continuity.is_over.store(true, Ordering::Relaxed),
                    // It may be damaged, and be mended, or of a later release.
                    None => {
                        return Err(StoreError::new(
                            "go on reading",
                            &self.url,
                            StoreErrorKind::Other,
                            format!(
                                "{} does not say in a known way which volume is there",
                                expected.key
                            ),
                        ));
                    }
                }
            }
            Err(self.gone(&expected))
        }
        .boxed()
    }

    fn gone(&self, expected: &Expected) -> StoreError {
        StoreError::new(
            "go on reading",
            &self.url,
            StoreErrorKind::Other,
            format!(
                "volume {}, which was being read, was deleted, and what is there now is not part of it; end this reader, and open what \
                 is there now, if anything, anew",
                expected.identity
            ),
        )
    }

    /// Looks whether what was read at this key is the expected volume's. `written` is when it was written, if it is there.
    ///
    /// # Errors
    /// As [`Self::ensure_continues`].
    pub(super) async fn ensure_own(&self, key: &str, written: Option<SystemTime>) -> Result<(), StoreError> {
        match self.is_in_doubt(key, written) {
            true => self.ensure_continues().await,
            false => Ok(()),
        }
    }

    /// Whether an object may be another volume's. Only those of data are looked at: the others are replaced all the time, and say
    /// themselves whose they are.
    fn is_in_doubt(&self, key: &str, written: Option<SystemTime>) -> bool {
        let below = key.strip_prefix(&self.root).and_then(|key| key.strip_prefix('/'));
        let is_data = below
            .and_then(last_part)
            .is_some_and(|name| name.as_bytes()[0].is_ascii_digit());
        let expected = self.continuity.expected.lock();
        // Within one second it is not known which was first, nor without a date.
        let is_before = |expected: &Expected| {
            !self.is_over()
                && written.is_some_and(|written| written > SystemTime::UNIX_EPOCH && written < expected.seen)
        };
        is_data && expected.as_ref().is_some_and(|expected| !is_before(expected))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::tests::file_store;

    const KEY_OF_DATA: &str = "7.1";

    fn expected(store: &Store, seen: SystemTime) -> Expected {
        Expected {
            identity: "one".to_owned(),
            key: store.meta_key("who"),
            is_of: |body, identity| {
                let mut ids = std::str::from_utf8(body).ok()?.split(' ');
                Some(ids.any(|id| id == identity))
            },
            seen,
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_written_since_is_read_only_while_the_volume_is_there() {
        let tested = file_store().await;
        let store = &tested.store;
        let (data, who) = (store.data_key(KEY_OF_DATA), store.meta_key("who"));
        store.put(&data, "data").await.unwrap();
        store.put(&who, "one").await.unwrap();
        // Everything was written later.
        store.expect_here(expected(store, SystemTime::UNIX_EPOCH));
        assert!(store.get(&data).await.unwrap().is_some());
        store.put(&who, "two").await.unwrap();
        let error = store.clone().get_range(&data, 0, 4).await.unwrap_err();
        assert!(
            error
                .to_string()
                .contains("volume one, which was being read, was deleted"),
            "{error}"
        );
        assert!(store.is_over());
        // It is not the same again because it has the same name.
        store.put(&who, "one").await.unwrap();
        assert!(store.get(&data).await.is_err());
        assert!(store.get(&who).await.is_ok(), "what is beside the data is read");
    }

    /// A copy gets an identity of its own when it is first written to, and is read on. What cannot be read now may be mended.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_volume_that_may_continue_is_not_over() {
        let tested = file_store().await;
        let store = &tested.store;
        let (data, who) = (store.data_key(KEY_OF_DATA), store.meta_key("who"));
        store.put(&data, "data").await.unwrap();
        store.put(&who, "one").await.unwrap();
        store.expect_here(expected(store, SystemTime::UNIX_EPOCH));
        store.put(&who, "two one").await.unwrap();
        store.expect_here(Expected {
            identity: "two".to_owned(),
            ..expected(store, SystemTime::UNIX_EPOCH)
        });
        assert!(store.get(&data).await.unwrap().is_some(), "it has a new identity");
        store.put(&who, vec![0xff]).await.unwrap();
        let unknown = store.get(&data).await.unwrap_err();
        assert!(unknown.to_string().contains("in a known way"), "{unknown}");
        assert!(!store.is_over());
        store.put(&who, "two one").await.unwrap();
        assert!(store.get(&data).await.unwrap().is_some(), "it is mended");
        store.put(&who, "two").await.unwrap();
        assert!(store.get(&data).await.is_err(), "it is another volume");
        assert!(store.is_over());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_written_before_is_read_and_what_is_missing_is_asked_for() {
        let tested = file_store().await;
        let store = &tested.store;
        let data = store.data_key(KEY_OF_DATA);
        store.put(&data, "data").await.unwrap();
        let later = SystemTime::now() + Duration::from_secs(3600);
        store.expect_here(expected(store, later));
        assert!(store.get(&data).await.unwrap().is_some(), "nobody is asked");
        let missing = store.get(&store.data_key("8")).await.unwrap_err();
        assert!(missing.to_string().contains("was deleted"), "{missing}");
    }
}
