//! Work that people ask a background task for. The task does one thing at a time; whoever asked waits for what came of it.

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use super::error::VolumeError;

/// Who may wait besides the one who is served. Each has a connection of the control socket and a thread, and others need these, too.
const WAITING_MAX: usize = 4;

/// Asks a task. The task's [`Asking`] ends once this is dropped.
#[derive(Debug)]
pub(crate) struct Asks<Q, A> {
    asked: mpsc::Sender<Asked<Q, A>>,
    /// What is asked for, in words.
    what: &'static str,
}

/// What a task is asked, in order.
pub(crate) type Asking<Q, A> = mpsc::Receiver<Asked<Q, A>>;

/// Somebody asked, and waits.
#[derive(Debug)]
pub(crate) struct Asked<Q, A> {
    /// What exactly.
    pub question: Q,
    answer: oneshot::Sender<Result<A, VolumeError>>,
}

/// Both ends, for a task that is asked for `what`.
pub(crate) fn asks<Q, A>(what: &'static str) -> (Asks<Q, A>, Asking<Q, A>) {
    let (asked, asking) = mpsc::channel(WAITING_MAX);
    (Asks { asked, what }, asking)
}

impl<Q, A> Asks<Q, A> {
    /// Waits for the task to do this, and for whoever asked before.
    ///
    /// # Errors
    /// What the task answers. [`VolumeError::InvalidInput`] when too many wait already. [`VolumeError::Closed`] when the task has ended, or
    /// ends meanwhile.
    pub async fn ask(&self, question: Q) -> Result<A, VolumeError> {
        let (answer, answered) = oneshot::channel();
        let asked = Asked { question, answer };
        self.asked.try_send(asked).map_err(|refused| match refused {
            TrySendError::Full(_) => VolumeError::InvalidInput(format!(
                "others wait for {} already: ask again once it is done",
                self.what
            )),
            TrySendError::Closed(_) => VolumeError::Closed,
        })?;
        answered.await.unwrap_or(Err(VolumeError::Closed))
    }
}

impl<Q, A> Asked<Q, A> {
    /// Tells what came of it, unless whoever asked has gone.
    pub fn tell(self, done: Result<A, VolumeError>) {
        let _ = self.answer.send(done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_asks_is_answered_in_order_refused_where_too_many_wait_and_told_of_the_end() {
        let (asks, mut asking) = asks::<u32, u32>("the work");
        let all = futures::future::join_all((0..6).map(|question| asks.ask(question)));
        let task = async move {
            for _ in 0..2 {
                let asked = asking.recv().await.unwrap();
                let doubled = asked.question * 2;
                asked.tell(Ok(doubled));
            }
        };
        let (answers, ()) = futures::join!(all, task);
        assert!(matches!(answers[..2], [Ok(0), Ok(2)]), "{answers:?}");
        assert!(
            answers[2..4]
                .iter()
                .all(|answer| matches!(answer, Err(VolumeError::Closed)))
        );
        for refused in &answers[4..] {
            let text = refused.as_ref().unwrap_err().to_string();
            assert!(text.contains("others wait for the work"), "{text}");
        }
        assert!(matches!(asks.ask(7).await, Err(VolumeError::Closed)));
    }
}
