//! What tells of the server while it runs: the address that `metrics` names.

use std::sync::{Arc, Mutex, PoisonError};

use hypernbd_volume::metrics::address::ListenAddress;
use hypernbd_volume::monitor::http::{self, Serving};
use hypernbd_volume::monitor::listen::Listener;
use hypernbd_volume::monitor::{Monitor, Now, Served};
use hypernbd_volume::options::ServeConfig;
use hypernbd_volume::options::durability::Durability;
use nbdkit::Result;
use tokio::runtime::Runtime;

use crate::{errno, lifecycle};

/// The socket, made before the fork so that what is wrong with it is said on the terminal.
static LISTENER: Mutex<Option<Listener>> = Mutex::new(None);

/// Before the fork: listens, if the parameters say so.
pub fn listen(config: &ServeConfig) -> Result<()> {
    let Some(address) = &config.metrics else {
        return Ok(());
    };
    let listener = Listener::bind(address).map_err(|error| cannot_listen(address, &error))?;
    if address.is_reachable_from_outside() {
        log::warn!(
            "metrics: whoever reaches {} can read what the server tells of itself: there is no password and no encryption",
            listener.address()
        );
    }
    *LISTENER.lock().unwrap_or_else(PoisonError::into_inner) = Some(listener);
    Ok(())
}

fn cannot_listen(address: &ListenAddress, error: &std::io::Error) -> nbdkit::Error {
    errno::error(
        libc::EADDRINUSE,
        format!("metrics: cannot listen at {address}: {error}; give another address or end what uses it"),
    )
}

/// After the fork: begins to answer, until what is returned is dropped; `None` where nothing listens.
pub fn begin(runtime: &Runtime, config: &ServeConfig) -> Result<Option<Serving>> {
    let Some(listener) = LISTENER.lock().unwrap_or_else(PoisonError::into_inner).take() else {
        return Ok(None);
    };
    log::info!("metrics are at {}", listener.address());
    let monitor = Monitor::new(
        Lifecycle,
        config.store.metrics.clone(),
        config.url.to_string(),
        Durability::of(&config.url, config.volume.wal_url.as_ref()).sentence(),
    );
    let _entered = runtime.enter();
    http::serve(listener, Arc::new(monitor))
        .map(Some)
        .map_err(|error| errno::error(libc::EIO, format!("metrics: {error}")))
}

/// The server of this process.
struct Lifecycle;

impl Served for Lifecycle {
    fn now(&self) -> Now {
        lifecycle::now()
    }
}
