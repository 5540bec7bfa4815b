//! The addresses that `metrics` and `control` name: listened at before the fork, answered after it.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use hypernbd_volume::monitor::http::{self, Access, Serving};
use hypernbd_volume::monitor::listen::Listener;
use hypernbd_volume::monitor::{Monitor, Now, Served, runtime_dir};
use hypernbd_volume::options::{ControlSocket, ListenAddress, ServeConfig};
use hypernbd_volume::volume_name::VolumeName;
use nbdkit::Result;
use tokio::runtime::Runtime;

use crate::{errno, lifecycle, logging};

/// Sockets made before the fork, so that what is wrong with them is said on the terminal.
static LISTENING: Mutex<Vec<(Listener, Access)>> = Mutex::new(Vec::new());

/// Before the fork: listens where the parameters say so.
pub fn listen(config: &ServeConfig) -> Result<()> {
    if let Some(address) = &config.metrics {
        let listener = bind("metrics", address)?;
        if address.is_reachable_from_outside() {
            log::warn!(
                "metrics: whoever reaches {} can read what the server tells of itself: there is no password and no encryption",
                listener.address()
            );
        }
        keep(listener, Access::Look);
    }
    if let ControlSocket::At(path) = &config.control {
        keep(
            bind("control", &ListenAddress::Unix(path.clone()))?,
            Access::Control,
        );
    }
    Ok(())
}

fn bind(key: &str, address: &ListenAddress) -> Result<Listener> {
    Listener::bind(address).map_err(|error| {
        let text =
            format!("{key}: cannot listen at {address}: {error}; give another address or end what uses it");
        errno::error(libc::EADDRINUSE, text)
    })
}

fn keep(listener: Listener, access: Access) {
    let mut listening = LISTENING.lock().unwrap_or_else(PoisonError::into_inner);
    listening.push((listener, access));
}

/// What answers until it is dropped.
#[derive(Default)]
pub struct Endpoints {
    serving: Vec<Serving>,
    /// Path of the socket on which the server is told what to do.
    pub control: Option<String>,
}

impl Endpoints {
    /// Answers no more.
    pub fn end(&mut self) {
        self.serving.clear();
    }
}

/// After the fork: begins to answer.
pub fn begin(runtime: &Runtime, config: &ServeConfig) -> Result<Endpoints> {
    if config.control == ControlSocket::Auto {
        // By the number of the process, which the fork changes. The server does without, if need be.
        let bound = runtime_dir::socket().and_then(|path| Listener::bind(&ListenAddress::Unix(path)));
        match bound {
            Ok(listener) => keep(listener, Access::Control),
            Err(error) => log::info!("there is no control socket: {error}"),
        }
    }
    let listening = std::mem::take(&mut *LISTENING.lock().unwrap_or_else(PoisonError::into_inner));
    let monitor = Arc::new(Monitor::new(Lifecycle, config));
    let mut endpoints = Endpoints::default();
    let _entered = runtime.enter();
    for (listener, access) in listening {
        let address = listener.address().clone();
        match access {
            Access::Look => log::info!("metrics are at {address}"),
            Access::Control => log::info!("the control socket is {address}"),
        }
        if let (Access::Control, ListenAddress::Unix(path)) = (access, &address) {
            endpoints.control = path.to_str().map(str::to_owned);
        }
        let serving = http::serve(listener, monitor.clone(), access)
            .map_err(|error| errno::error(libc::EIO, format!("{address}: {error}")))?;
        endpoints.serving.push(serving);
    }
    Ok(endpoints)
}

/// The server of this process.
struct Lifecycle;

impl Served for Lifecycle {
    fn now(&self) -> Now {
        lifecycle::now()
    }

    fn named(&self) -> Vec<(String, Now)> {
        lifecycle::named()
    }

    fn keep_open(&self, volume: Option<&VolumeName>) -> Box<dyn Any + Send> {
        lifecycle::keep_open(&volume.cloned())
    }

    fn shut_down(&self, when_idle: bool) {
        lifecycle::shut_down(when_idle);
    }

    fn set_log(&self, filter: &str) -> std::result::Result<(), String> {
        logging::set(filter)
    }

    fn last_lines(&self) -> Vec<String> {
        logging::last_lines()
    }
}
