//! The close of volumes: what is said when it fails, and who waits for it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hypernbd_volume::Volume;
use hypernbd_volume::options::VolumeOptions;
use hypernbd_volume::options::durability::LOSS_FILE;

use crate::lifecycle::STACK_BYTES;
use crate::{errno, params};

/// How long whoever looks at a closed volume may hold on to it, and with it to the locks of its directories ...
const LET_GO_MAX: Duration = Duration::from_secs(5);
/// ... looked at this often.
const LET_GO_STEP: Duration = Duration::from_millis(2);

/// How many volumes are closed at once at the end of the server. With a store that is away each takes as long as a close may.
const CLOSES_AT_ONCE: usize = 64;

/// A close that others wait for.
#[derive(Default)]
pub struct Closing {
    is_over: Mutex<bool>,
    ended: Condvar,
}

impl Closing {
    /// It is over.
    pub fn end(&self) {
        *self.is_over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.ended.notify_all();
    }

    /// Whether it was over within this time.
    pub fn wait(&self, longest: Duration) -> bool {
        let is_over = self.is_over.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .ended
            .wait_timeout_while(is_over, longest, |is_over| !*is_over);
        let (is_over, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *is_over
    }

    /// Waits until it is over. A close bounds its time itself.
    pub fn wait_for_end(&self) {
        let is_over = self.is_over.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.ended.wait_while(is_over, |is_over| !*is_over));
    }
}

/// Closes a volume. What is lost with it is said, and told to the program that started the server.
pub fn close(volume: &Volume) {
    let timeout = params::config().map_or(VolumeOptions::default().io_timeout, |c| c.volume.io_timeout);
    if let Err(error) = volume.close(timeout) {
        let of = volume.url().map_or(String::new(), |url| format!(" {url}"));
        match volume.kept_in() {
            Some(file) => log::error!(
                "closing the volume{of}: {}; what was answered and not published is in {}, and the next server of the volume on this \
                 machine applies it, unless another one has the volume before",
                error.chain(),
                file.display()
            ),
            None => {
                let lost = "writes after the last flush or checkpoint are lost";
                log::error!("closing the volume{of}: {}; {lost}", error.chain());
                report_loss();
            }
        }
    }
}

/// As [`close`], which a panic ends for this volume alone.
pub fn close_caught(volume: &Volume) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| close(volume))) {
        report_loss();
        log::error!("internal error in closing: {}", errno::panic_text(&*panic));
    }
}

/// Closes volumes, each as [`close_caught`] does, and many at once: one that waits for its store holds up no other.
pub fn close_all(volumes: Vec<Arc<Volume>>) {
    all_at_once(volumes, |volume| close_caught(volume));
}

/// Does this with all of them, on threads of their own where there are several.
fn all_at_once<T: Send>(all: Vec<T>, work: impl Fn(&T) + Sync) {
    let threads = all.len().min(CLOSES_AT_ONCE);
    let rest = Mutex::new(all);
    let next = || rest.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let each = || {
        while let Some(one) = next() {
            work(&one);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            let thread = thread::Builder::new().stack_size(STACK_BYTES);
            if thread.spawn_scoped(scope, each).is_err() {
                // Those that there are do it all.
                break;
            }
        }
        each();
    });
}

/// Drops a volume that is closed, once nobody else has it: the next opening in this process wants its directories.
pub fn let_go(volume: Arc<Volume>) {
    let until = Instant::now() + LET_GO_MAX;
    while Arc::strong_count(&volume) > 1 && Instant::now() < until {
        thread::sleep(LET_GO_STEP);
    }
}

/// Tells the program that started the server: nbdkit exits 0 whatever its plugin's end came to.
pub fn report_loss() {
    let Some(path) = std::env::var_os(LOSS_FILE) else {
        return;
    };
    if let Err(error) = std::fs::write(path, "the volume could not be closed\n") {
        log::error!("{LOSS_FILE} cannot be written: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn several_are_done_at_once_and_each_of_them_once() {
        let (together, done) = (Barrier::new(3), Mutex::new(Vec::new()));
        all_at_once(vec![1, 2, 3], |one| {
            together.wait();
            done.lock().unwrap().push(*one);
        });
        let mut done = done.into_inner().unwrap();
        done.sort_unstable();
        assert_eq!(done, [1, 2, 3]);
        all_at_once(Vec::<u8>::new(), |_| unreachable!("there is none"));
    }
}
