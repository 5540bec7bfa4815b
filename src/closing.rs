//! The close of a volume: what is said when it fails, and who waits for it.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hypernbd_volume::Volume;
use hypernbd_volume::options::VolumeOptions;
use hypernbd_volume::options::durability::LOSS_FILE;

use crate::params;

/// How long whoever looks at a closed volume may hold on to it, and with it to the locks of its directories ...
const LET_GO_MAX: Duration = Duration::from_secs(5);
/// ... looked at this often.
const LET_GO_STEP: Duration = Duration::from_millis(2);

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
        match volume.kept_in() {
            Some(file) => log::error!(
                "closing the volume: {}; what was answered and not published is in {}, and the next server of the volume on this \
                 machine applies it, unless another one has the volume before",
                error.chain(),
                file.display()
            ),
            None => {
                let lost = "writes after the last flush or checkpoint are lost";
                log::error!("closing the volume: {}; {lost}", error.chain());
                report_loss();
            }
        }
    }
}

/// Drops a volume that is closed, once nobody else has it: the next opening in this process wants its directories.
pub fn let_go(volume: Arc<Volume>) {
    let until = Instant::now() + LET_GO_MAX;
    while Arc::strong_count(&volume) > 1 && Instant::now() < until {
        std::thread::sleep(LET_GO_STEP);
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
