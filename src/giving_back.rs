//! Gives volumes back a while after their last clients: the clock, the threads and the volumes of what [`Linger`] decides.
//!
//! [`Linger`]: hypernbd_volume::linger::Linger

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use hypernbd_volume::{ErrorKind, Volume};
use tokio::sync::Notify;
use tokio::time::sleep_until;

use crate::closing::{self, Closing};
use crate::served::Name;
use crate::{errno, lifecycle};

/// Gives back what is due, until the server ends. `alarm` wakes it whenever something may be due sooner.
pub async fn drive(alarm: Arc<Notify>) {
    while let Some(next) = begin_due() {
        match next {
            Some(at) => tokio::select! {
                () = sleep_until(at.into()) => {}
                () = alarm.notified() => {}
            },
            None => alarm.notified().await,
        }
    }
}

/// Begins what is due. Returns the moment of what comes next, if that is known; `None` once the server ends.
fn begin_due() -> Option<Option<Instant>> {
    let mut shared = lifecycle::shared();
    let shared = shared.as_mut()?;
    let (due, next) = shared.volumes.give_back_due(Instant::now());
    for (name, volume) in due {
        shared.runtime.spawn_blocking(move || give_back(name, volume));
    }
    Some(next)
}

/// Publishes everything, and then closes the volume unless somebody has come meanwhile. What cannot be published keeps the volume open.
fn give_back(name: Name, volume: Arc<Volume>) {
    let is_all = publish(&name, &volume);
    let closing = {
        let mut shared = lifecycle::shared();
        // The end of the server closes what is open.
        let Some(shared) = shared.as_mut() else { return };
        let served = shared.volumes.get_mut(&name);
        let closing = served.and_then(|served| served.published(is_all, Instant::now()));
        shared.alarm.notify_one();
        closing
    };
    let Some(closing) = closing else { return };
    match &name {
        Some(name) => log::info!("nobody uses the volume {name} any more: it is given back"),
        None => log::info!("nobody uses the volume any more: it is given back"),
    }
    let _finish = Finish { name, closing };
    closing::close_caught(&volume);
    closing::let_go(volume);
}

/// Whether nothing is left that could still be published.
fn publish(name: &Name, volume: &Volume) -> bool {
    let of = name.as_ref().map_or(String::new(), |name| format!(" {name}"));
    match catch_unwind(AssertUnwindSafe(|| volume.publish())) {
        Ok(Ok(())) => true,
        // Another server has the volume. What was answered here and is not published never will be: while there is any, who comes back
        // hears of it by each flush, and is not shown a volume without it.
        Ok(Err(error)) if error.kind() == ErrorKind::Fenced => volume.backlog().unpublished_bytes == 0,
        Ok(Err(error)) => {
            log::warn!(
                "the volume{of} is not given back, as not everything is published: {}; it stays open, and that is tried again",
                error.chain()
            );
            false
        }
        Err(panic) => {
            log::error!("internal error in publishing{of}: {}", errno::panic_text(&*panic));
            false
        }
    }
}

/// However the close ends, somebody may wait for that.
struct Finish {
    name: Name,
    closing: Arc<Closing>,
}

impl Drop for Finish {
    fn drop(&mut self) {
        if let Some(shared) = lifecycle::shared().as_mut() {
            if let Some(volume) = shared.volumes.get_mut(&self.name) {
                volume.closed();
            }
            shared.alarm.notify_one();
        }
        self.closing.end();
    }
}
