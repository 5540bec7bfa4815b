//! The opening of the volume: begun once, waited for by any number of connections, given up at the server's end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use hypernbd_volume::{Volume, VolumeError};
use tokio::runtime::Runtime;
use tokio::sync::Notify;

use crate::errno;

/// What came of an opening; every connection that waited for it gets it.
pub type Opened = Result<Arc<Volume>, Arc<VolumeError>>;

/// An opening under way, or ended.
pub struct Opening {
    state: Arc<State>,
    given_up: Arc<Notify>,
}

#[derive(Default)]
struct State {
    opened: Mutex<Option<Opened>>,
    has_ended: Condvar,
}

impl Opening {
    /// Begins to open, on a thread of its own: `open` is made there, and need not be sent to another. `ended` is called at its end.
    pub fn begin<Fut>(
        runtime: &Runtime,
        open: impl FnOnce() -> Fut + Send + 'static,
        ended: impl FnOnce() + Send + 'static,
    ) -> Self
    where
        Fut: Future<Output = Result<Arc<Volume>, VolumeError>>,
    {
        let (state, given_up) = (Arc::<State>::default(), Arc::<Notify>::default());
        let (shared, stop) = (state.clone(), given_up.clone());
        let handle = runtime.handle().clone();
        runtime.spawn_blocking(move || {
            let opening = AssertUnwindSafe(|| {
                handle.block_on(async {
                    tokio::select! {
                        opened = open() => opened,
                        () = stop.notified() => Err(VolumeError::Closed),
                    }
                })
            });
            // A panic becomes a failed opening: somebody waits.
            let opened = catch_unwind(opening).unwrap_or_else(|panic| {
                let text = format!("opening the volume: {}", errno::panic_text(&*panic));
                Err(VolumeError::Internal(text))
            });
            let mut slot = shared.opened.lock().unwrap_or_else(PoisonError::into_inner);
            *slot = Some(opened.map_err(Arc::new));
            drop(slot);
            shared.has_ended.notify_all();
            ended();
        });
        Self { state, given_up }
    }

    /// Something to wait for it by, without whatever lock guards this.
    pub fn waiter(&self) -> Waiter {
        Waiter(self.state.clone())
    }

    /// What came of it, once it has ended.
    pub fn ended(&self) -> Option<Opened> {
        self.waiter().wait(Duration::ZERO)
    }

    /// Gives it up. A lease that it took stays until it runs out.
    pub fn give_up(&self) {
        self.given_up.notify_one();
    }
}

/// Waits for an opening.
pub struct Waiter(Arc<State>);

impl Waiter {
    /// What came of it; `None` if it has not ended within this time.
    pub fn wait(&self, longest: Duration) -> Option<Opened> {
        let opened = self.0.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .0
            .has_ended
            .wait_timeout_while(opened, longest, |opened| opened.is_none());
        let (opened, _) = waited.unwrap_or_else(PoisonError::into_inner);
        opened.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runtime() -> Runtime {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn all_who_wait_get_what_came_of_it() {
        let runtime = runtime();
        let (end, wait) = tokio::sync::oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let open = || async move {
            let reason: String = wait.await.map_err(|_| VolumeError::Closed)?;
            Err(VolumeError::InvalidInput(reason))
        };
        let opening = Opening::begin(&runtime, open, move || tell.send(()).unwrap());
        assert!(opening.ended().is_none());
        let waiters = [opening.waiter(), opening.waiter()];
        assert!(waiters[0].wait(Duration::from_millis(1)).is_none());
        end.send("wrong".to_owned()).unwrap();
        for waiter in waiters {
            let opened = waiter.wait(Duration::from_secs(60)).expect("it has ended");
            assert_eq!(opened.err().unwrap().to_string(), "wrong");
        }
        told.recv_timeout(Duration::from_secs(60))
            .expect("its end is told");
    }

    #[test]
    fn a_panic_is_a_failure_and_one_that_hangs_is_given_up() {
        let runtime = runtime();
        let panicked = Opening::begin(&runtime, || async { panic!("of the test") }, || ());
        let opened = panicked
            .waiter()
            .wait(Duration::from_secs(60))
            .expect("it has ended");
        assert!(opened.is_err());
        let hanging = Opening::begin(&runtime, std::future::pending, || ());
        hanging.give_up();
        let opened = hanging
            .waiter()
            .wait(Duration::from_secs(60))
            .expect("it has ended");
        assert!(matches!(*opened.err().unwrap(), VolumeError::Closed));
    }
}
