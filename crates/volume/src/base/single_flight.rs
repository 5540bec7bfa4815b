//! Single-flight: one piece of work for all callers that need its result at the same time.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use parking_lot::{Mutex, MutexGuard};

use crate::base::error::VolumeError;

/// What became of the work; an error is told to all who waited.
pub type Outcome<T> = Result<T, Arc<VolumeError>>;
/// The result of the work. An error goes to every caller that waited.
pub type Flight<T> = Shared<BoxFuture<'static, Outcome<T>>>;

/// The work in progress, each under one or more keys. All clones share it.
pub struct SingleFlight<K, T> {
    flights: Arc<Mutex<HashMap<K, Flight<T>>>>,
}

impl<K, T> Clone for SingleFlight<K, T> {
    fn clone(&self) -> Self {
        Self {
            flights: self.flights.clone(),
        }
    }
}

impl<K, T> Default for SingleFlight<K, T> {
    fn default() -> Self {
        Self {
            flights: Arc::default(),
        }
    }
}

impl<K, T> SingleFlight<K, T>
where
    K: Eq + Hash + Clone + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// The result of the work in progress for `key`. If there is none, `work` is started.
    pub async fn run(&self, key: K, work: impl Future<Output = Outcome<T>> + Send + 'static) -> Outcome<T> {
        let flight = {
            let mut board = self.board();
            match board.get(&key) {
                Some(flight) => flight,
                None => board.start(vec![key], work),
            }
        };
        flight.await
    }

    /// Locks the work in progress, so that nobody else adds to it meanwhile.
    pub fn board(&self) -> Board<'_, K, T> {
        Board {
            all: self,
            flights: self.flights.lock(),
        }
    }
}

/// See [`SingleFlight::board`].
pub struct Board<'a, K, T> {
    all: &'a SingleFlight<K, T>,
    flights: MutexGuard<'a, HashMap<K, Flight<T>>>,
}

impl<K, T> Board<'_, K, T>
where
    K: Eq + Hash + Clone + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// The work in progress for `key`, if there is any.
    pub fn get(&self, key: &K) -> Option<Flight<T>> {
        self.flights.get(key).cloned()
    }

    /// Starts `work` on the current runtime, under all of `keys`. None of the keys may be in use.
    pub fn start(
        &mut self,
        keys: Vec<K>,
        work: impl Future<Output = Outcome<T>> + Send + 'static,
    ) -> Flight<T> {
        let (all, of) = (self.all.clone(), keys.clone());
        let task = tokio::spawn(async move {
            // Made in here: a runtime that is ending drops the future at once, while the list is locked.
            let _at_end = RemoveAtEnd { all, keys: of };
            work.await
        });
        let flight = task
            .map(|joined| joined.unwrap_or_else(|e| Err(Arc::new(VolumeError::Internal(e.to_string())))))
            .boxed()
            .shared();
        for key in keys {
            self.flights.insert(key, flight.clone());
        }
        flight
    }
}

/// Removes work from the list when it ends, whatever its result.
struct RemoveAtEnd<K: Eq + Hash, T> {
    all: SingleFlight<K, T>,
    keys: Vec<K>,
}

impl<K: Eq + Hash, T> Drop for RemoveAtEnd<K, T> {
    fn drop(&mut self) {
        let mut flights = self.all.flights.lock();
        for key in &self.keys {
            flights.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use futures::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn many_callers_share_one_piece_of_work() {
        let flights: SingleFlight<u32, u32> = SingleFlight::default();
        let (count, go) = (Arc::new(AtomicU32::new(0)), Arc::new(Semaphore::new(0)));
        let callers = (0..50).map(|_| {
            let (count, go) = (count.clone(), go.clone());
            flights.run(7, async move {
                let _ = go.acquire().await;
                Ok(count.fetch_add(1, Ordering::SeqCst) + 1)
            })
        });
        let all = join_all(callers);
        go.add_permits(1);
        let all: Vec<_> = all.await.into_iter().map(Result::unwrap).collect();
        assert_eq!(all, [1; 50]);
        let again = flights.run(7, async { Ok(9) }).await;
        assert_eq!(again.unwrap(), 9, "begun anew once it ended");
    }

    #[tokio::test]
    async fn a_panic_is_an_error_for_all_and_leaves_nothing_behind() {
        let flights: SingleFlight<u32, u32> = SingleFlight::default();
        let failed = flights.run(7, async { panic!("a defect") }).await;
        assert!(failed.is_err());
        assert_eq!(flights.run(7, async { Ok(1) }).await.unwrap(), 1);
    }
}
