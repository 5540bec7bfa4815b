//! The thread on which a container lives, and its end.
//!
//! The thread waits on a runtime that it does not own. A wait that outlasts the runtime panics in the runtime's timers.
//! So whoever ends the runtime ends the thread first, in the middle of a publish if the store delays that publish.

use std::convert::Infallible;
use std::future::Future;
use std::thread::{Builder, JoinHandle};

use tokio::runtime::Handle;
use tokio::sync::oneshot;

/// Stack of the thread in bytes. A build without optimisation needs more than the usual 2 MiB for the engine's futures.
/// Pages that are never touched take no memory.
const STACK_BYTES: usize = 8 << 20;

/// A thread that runs one future. Dropping this ends the future at its next wait.
pub(crate) struct OwnerThread {
    thread: JoinHandle<()>,
    /// Nothing is ever sent: the thread notices when this side is dropped.
    wanted: oneshot::Sender<Infallible>,
}

impl OwnerThread {
    /// Starts the thread and runs the future that `work` makes on it. The future need not be `Send`.
    ///
    /// # Errors
    /// When the system cannot start a thread.
    pub(crate) fn start<F: Future<Output = ()>>(
        runtime: Handle,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> std::io::Result<Self> {
        let (wanted, unwanted) = oneshot::channel();
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    biased;
                    _ = unwanted => {}
                    () = work() => {}
                }
            });
        };
        let thread = Builder::new()
            .name("hypernbd-owner".into())
            .stack_size(STACK_BYTES)
            .spawn(run)?;
        Ok(Self { thread, wanted })
    }

    /// Waits for the end of the future.
    pub(crate) async fn ended(self) {
        let Self { thread, wanted } = self;
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        drop(wanted);
    }

    /// Ends the future at its next wait, and waits until the thread has ended.
    pub(crate) async fn abandon(self) {
        let Self { thread, wanted } = self;
        drop(wanted);
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    fn hanging(runtime: Handle, held: Arc<()>) -> OwnerThread {
        let work = move || async move {
            let _held = held;
            std::future::pending::<()>().await;
        };
        OwnerThread::start(runtime, work).expect("a thread")
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_future_that_hangs_ends_when_it_is_abandoned() {
        let held = Arc::new(());
        let thread = hanging(Handle::current(), held.clone());
        timeout(LIMIT, thread.abandon()).await.expect("the thread ends");
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_future_that_hangs_ends_when_nobody_holds_its_thread() {
        let held = Arc::new(());
        drop(hanging(Handle::current(), held.clone()));
        let ended = async {
            while Arc::strong_count(&held) > 1 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(LIMIT, ended).await.expect("the future is dropped");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_future_that_ends_is_not_cut_short() {
        let (end, ending) = oneshot::channel();
        let (told, tell) = oneshot::channel();
        let work = move || async move {
            let _ = ending.await;
            let _ = told.send(());
        };
        let thread = OwnerThread::start(Handle::current(), work).expect("a thread");
        let ended = tokio::spawn(thread.ended());
        end.send(()).expect("the thread waits");
        timeout(LIMIT, ended).await.expect("in time").expect("no panic");
        tell.await.expect("the future ran to its end");
    }
}
