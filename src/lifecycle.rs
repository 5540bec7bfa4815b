//! From the start of the server to its end: what lives in the process and not in a connection.
//!
//! nbdkit's callbacks carry no state of the plugin's own, hence the one global here. Order of events: parameters,
//! [`check_volume`] (still on the terminal), fork, [`start`], any number of [`connect`] and [`disconnect`], [`stop`].
//! A server may also end without any of these but the last, or be killed without that one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use hypernbd_volume::Volume;
use hypernbd_volume::admin::{self, Sighting};
use hypernbd_volume::monitor::{Now, State};
use hypernbd_volume::options::durability::{Durability, LOSS_FILE};
use hypernbd_volume::options::{ServeConfig, VolumeOptions};
use hypernbd_volume::past::{self, Past};
use nbdkit::{Error, Result};
use once_cell::sync::OnceCell;
use tokio::runtime::{Builder, Runtime};

use crate::endpoints::{self, Endpoints};
use crate::errno::{self, in_errno};
use crate::opening::{Opening, Waiter};
use crate::past_exports::PastExports;
use crate::{limits, nbdkit_ext, params, past_exports};

/// How long the runtime's threads may take to end once nothing is left to do.
const RUNTIME_END_MAX: Duration = Duration::from_secs(10);
/// Stack of a runtime's thread: an opening runs on one, and its futures need more than the 2 MiB that are usual, above all in a build
/// that is not optimised. What is not touched takes no memory.
const STACK_BYTES: usize = 8 << 20;

/// How often a connection that waits for the opening looks whether the server ends.
const OPENING_POLL: Duration = Duration::from_millis(50);

/// What all connections share.
struct Shared {
    runtime: Runtime,
    /// The volume open for writing. Once there is one, every connection uses it, so that all see the same bytes.
    read_write: Option<Arc<Volume>>,
    /// The volume opened for read-only connections only (`nbdkit -r`): it asks the store for no write.
    read_only: Option<Arc<Volume>>,
    /// Openings that have not ended, or whose end nobody saw yet: for writing, and for reading only. A connection waits for
    /// one without the lock around all this, which the end of the server wants.
    opening: [Option<Opening>; 2],
    /// Connections that wait for the one for reading only.
    readers_waiting: usize,
    /// An opening for writing was begun before.
    was_opened: bool,
    connections: usize,
    /// Checkpoints that clients read.
    past: PastExports,
    /// Why the last opening failed, once a connection was told so.
    failure: Option<String>,
    /// What tells of the server.
    endpoints: Endpoints,
    /// The server ends once the last connection has.
    ends_when_idle: bool,
}

impl Shared {
    /// Ends the server, if it was told to end once nobody uses it, and nobody does.
    fn end_if_idle(&self) {
        if self.ends_when_idle && self.connections == 0 && self.past.is_unused() {
            nbdkit::shutdown();
        }
    }
}

static SHARED: Mutex<Option<Shared>> = Mutex::new(None);

fn shared() -> MutexGuard<'static, Option<Shared>> {
    SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// What was seen of the volume before the fork, so that the open need not look, or watch its lease, again.
static SIGHTING: OnceCell<Sighting> = OnceCell::new();

/// Before the fork: finds the volume and looks whether another server holds it, so that what is wrong is said on the
/// terminal. The runtime for it is gone on return, since threads do not survive a fork.
pub fn check_volume() -> Result<()> {
    let config = config()?;
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(no_runtime)?;
    let options = VolumeOptions {
        read_only: nbdkit_ext::is_read_only_server(),
        ..config.volume.clone()
    };
    let seen = runtime
        .block_on(admin::check_servable(&config.url, &config.store, &options))
        .map_err(in_errno)?;
    if let Some(seen) = seen {
        let _ = SIGHTING.set(seen);
    }
    endpoints::listen(config)
}

/// After the fork: the runtime.
pub fn start() -> Result<()> {
    let config = config()?;
    crate::logging::after_fork();
    crate::memory::bound_allocator();
    let runtime = Builder::new_multi_thread()
        .worker_threads(config.runtime_threads)
        .thread_name("hypernbd")
        .thread_stack_size(STACK_BYTES)
        .enable_all()
        .build()
        .map_err(no_runtime)?;
    limits::tell(config);
    log::info!(
        "serving {}: {}",
        config.url,
        Durability::of(&config.url, config.volume.wal.as_ref()).sentence()
    );
    let endpoints = endpoints::begin(&runtime, config)?;
    *shared() = Some(Shared {
        runtime,
        read_write: None,
        read_only: None,
        opening: [None, None],
        readers_waiting: 0,
        was_opened: false,
        connections: 0,
        past: PastExports::default(),
        failure: None,
        endpoints,
        ends_when_idle: false,
    });
    Ok(())
}

/// The volume for a new connection; the first one opens it. That is here and not in [`start`] because only a
/// connection knows of `nbdkit -r`, and because a store that is away for a moment then costs one connection, not the
/// server.
pub fn connect(readonly: bool) -> Result<Arc<Volume>> {
    let config = config()?;
    if !readonly {
        return wait_for(|| look(config, readonly));
    }
    shared().as_mut().ok_or_else(shutting_down)?.readers_waiting += 1;
    let connected = wait_for(|| look(config, readonly));
    if let Some(late) = reader_waited() {
        close(&late);
    }
    connected
}

/// A connection waits for the volume for reading no more. An opening that nobody waits for is given up: what it shows would be old when
/// the next client comes. Gives what it has opened already, to be closed.
fn reader_waited() -> Option<Arc<Volume>> {
    let mut shared = shared();
    let shared = shared.as_mut()?;
    shared.readers_waiting = shared.readers_waiting.saturating_sub(1);
    if shared.readers_waiting > 0 {
        return None;
    }
    let opening = shared.opening[usize::from(true)].take()?;
    opening.give_up();
    match opening.ended()? {
        Ok(volume) => Some(volume),
        Err(e) => {
            shared.failure = Some(e.chain());
            None
        }
    }
}

/// A checkpoint of the volume for a new connection.
pub fn connect_past(at: &Past) -> Result<Arc<Volume>> {
    let config = config()?;
    shared().as_mut().ok_or_else(shutting_down)?.past.wait(at);
    let connected = wait_for(|| {
        let mut shared = shared();
        let shared = shared.as_mut().ok_or_else(shutting_down)?;
        shared.past.connect(&shared.runtime, config, at)
    });
    let unused = shared().as_mut().and_then(|shared| shared.past.waited(at));
    if let Some(volume) = unused {
        close(&volume);
    }
    if let Some(shared) = shared().as_ref() {
        shared.end_if_idle();
    }
    connected
}

/// Looks until the volume is open.
fn wait_for(look: impl Fn() -> Result<Look>) -> Result<Arc<Volume>> {
    loop {
        let waiter = match look()? {
            Look::Open(volume) => return Ok(volume),
            Look::Opening(waiter) => waiter,
        };
        loop {
            match waiter.wait(OPENING_POLL) {
                Some(Ok(_)) => break,
                // Whoever looks next begins another one.
                Some(Err(e)) => return Err(errno::of(&e)),
                None if nbdkit_ext::is_ending() => {
                    let text =
                        "the server is shutting down, or the client has gone, while the volume is opened";
                    return Err(errno::error(libc::ESHUTDOWN, text));
                }
                None => {}
            }
        }
    }
}

/// What a connection finds.
pub enum Look {
    /// What it asked for.
    Open(Arc<Volume>),
    /// It has to wait, and look again.
    Opening(Waiter),
}

/// The volume, if it is open; else the opening, begun if there is none.
fn look(config: &'static ServeConfig, readonly: bool) -> Result<Look> {
    let mut shared = shared();
    let shared = shared.as_mut().ok_or_else(shutting_down)?;
    for is_readonly in [false, true] {
        let slot = &mut shared.opening[usize::from(is_readonly)];
        let Some(opened) = slot.as_ref().and_then(Opening::ended) else {
            continue;
        };
        *slot = None;
        shared.failure = opened.as_ref().err().map(|e| e.chain());
        match opened {
            Ok(volume) if is_readonly => shared.read_only = Some(volume),
            Ok(volume) => shared.read_write = Some(volume),
            // Who waited for it knows; this one tries again.
            Err(_) => {}
        }
    }
    let open = shared
        .read_write
        .as_ref()
        .or(shared.read_only.as_ref().filter(|_| readonly));
    if let Some(volume) = open {
        let volume = Arc::clone(volume);
        shared.connections += 1;
        return Ok(Look::Open(volume));
    }
    let slot = &mut shared.opening[usize::from(readonly)];
    let opening = match slot {
        Some(opening) => opening,
        None => {
            let mut options = VolumeOptions {
                read_only: readonly,
                ..config.volume.clone()
            };
            options.lease.sighting = SIGHTING.get().cloned();
            options.lease.is_retry = !readonly && std::mem::replace(&mut shared.was_opened, true);
            options.lease.control = shared.endpoints.control.clone();
            let open = move || async move { Volume::open(&config.url, &config.store, &options).await };
            slot.insert(Opening::begin(&shared.runtime, open))
        }
    };
    Ok(Look::Opening(opening.waiter()))
}

fn shutting_down() -> Error {
    errno::error(libc::ESHUTDOWN, "the server is shutting down")
}

/// The snapshots of the volume as names of exports, with a description each. What cannot be told is left out, with a line in the
/// log.
pub fn snapshots() -> Vec<(String, String)> {
    let runtime = shared().as_ref().map(|shared| shared.runtime.handle().clone());
    let (Some(runtime), Some(config)) = (runtime, params::config()) else {
        return Vec::new();
    };
    match runtime.block_on(past::snapshots(&config.url, &config.store)) {
        Ok(snapshots) => snapshots.iter().map(past_exports::described).collect(),
        Err(e) => {
            log::warn!("the snapshots cannot be listed: {}", e.chain());
            Vec::new()
        }
    }
}

/// A connection to a checkpoint has ended.
pub fn disconnect_past(at: &Past) {
    let ended = catch_unwind(|| {
        let unused = shared().as_mut().and_then(|shared| {
            let unused = shared.past.disconnect(at);
            shared.end_if_idle();
            unused
        });
        if let Some(volume) = unused {
            close(&volume);
        }
    });
    log_panic("disconnect", ended);
}

/// A connection has ended. After the last one there may be nobody left who would flush: a checkpoint starts. A volume
/// open read-only is closed then, so that the next connection sees what its writer has published meanwhile.
pub fn disconnect() {
    let ended = catch_unwind(|| {
        let mut shared = shared();
        let Some(open) = shared.as_mut() else { return };
        open.connections = open.connections.saturating_sub(1);
        if open.connections > 0 {
            return;
        }
        if let Some(volume) = &open.read_write {
            volume.checkpoint_soon();
        }
        let unused = open.read_only.take();
        open.end_if_idle();
        drop(shared);
        if let Some(volume) = unused {
            close(&volume);
        }
    });
    log_panic("disconnect", ended);
}

/// The preferred size of requests, in bytes: the volume's block. `None` before it is open.
pub fn block_size_bytes() -> Option<u32> {
    let shared = shared();
    let shared = shared.as_ref()?;
    shared
        .read_write
        .as_ref()
        .or(shared.read_only.as_ref())
        // Of one container, whose blocks have one size.
        .or(shared.past.any())
        .map(|volume| volume.block_size_bytes())
}

/// Which volume a client has that asked for this checkpoint, or for the volume as it is. `None` where that is not known.
pub fn identity(at: Option<&Past>) -> Option<String> {
    let shared = shared();
    let shared = shared.as_ref()?;
    let volume = match at {
        Some(at) => shared.past.get(at),
        None => shared.read_write.as_ref().or(shared.read_only.as_ref()),
    };
    volume?.identity().map(str::to_owned)
}

/// What is served now, for who asks.
pub fn now() -> Now {
    let shared = shared();
    let Some(shared) = shared.as_ref() else {
        return Now {
            state: State::Ending,
            volume: None,
            connections: 0,
        };
    };
    let ended: Vec<_> = shared.opening.iter().flatten().map(Opening::ended).collect();
    let volume = shared.read_write.as_ref().or(shared.read_only.as_ref()).cloned();
    let failed = ended.iter().flatten().find_map(|opened| opened.as_ref().err());
    let failure = failed.map(|e| e.chain()).or_else(|| shared.failure.clone());
    let state = match failure {
        _ if volume.is_some() => State::Open,
        _ if ended.iter().any(Option::is_none) => State::Opening,
        Some(why) => State::Failed(why),
        None => State::Waiting,
    };
    Now {
        state,
        volume,
        connections: shared.connections as u64,
    }
}

/// Ends the server: now, or once the last connection has ended.
pub fn shut_down(when_idle: bool) {
    let mut shared = shared();
    match shared.as_mut() {
        Some(shared) if when_idle => {
            shared.ends_when_idle = true;
            shared.end_if_idle();
        }
        _ => nbdkit::shutdown(),
    }
}

/// The end: publishes what is left, then ends every thread. Harmless when nothing was started, or called again.
pub fn stop() {
    let ended = catch_unwind(AssertUnwindSafe(stop_all));
    if ended.is_err() {
        report_loss();
    }
    log_panic("unload", ended);
}

fn stop_all() {
    let Some(mut all) = shared().take() else { return };
    let (past, past_opening) = all.past.end();
    let late = all
        .opening
        .into_iter()
        .flatten()
        .chain(past_opening)
        .filter_map(|opening| {
            opening.give_up();
            opening.waiter().wait(RUNTIME_END_MAX)?.ok()
        });
    for volume in late {
        close(&volume);
    }
    for volume in [all.read_write, all.read_only].into_iter().flatten().chain(past) {
        close(&volume);
    }
    all.endpoints.end();
    all.runtime.shutdown_timeout(RUNTIME_END_MAX);
}

fn close(volume: &Volume) {
    let timeout = params::config().map_or(VolumeOptions::default().io_timeout, |c| c.volume.io_timeout);
    if let Err(error) = volume.close(timeout) {
        match volume.kept_in() {
            Some(file) => log::error!(
                "closing the volume: {}; what was answered and not published is in {}, and the next server of the volume on this \
                 machine applies it",
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

/// Tells the program that started the server: nbdkit exits 0 whatever its plugin's end came to.
fn report_loss() {
    let Some(path) = std::env::var_os(LOSS_FILE) else {
        return;
    };
    if let Err(error) = std::fs::write(path, []) {
        log::error!("{LOSS_FILE} cannot be written: {error}");
    }
}

fn config() -> Result<&'static ServeConfig> {
    params::config().ok_or_else(|| errno::error(libc::EINVAL, "the parameters are not complete"))
}

fn no_runtime(error: std::io::Error) -> Error {
    errno::error(libc::EIO, format!("cannot start the runtime: {error}"))
}

fn log_panic(callback: &str, result: std::thread::Result<()>) {
    if let Err(panic) = result {
        log::error!("internal error in {callback}: {}", errno::panic_text(&*panic));
    }
}
