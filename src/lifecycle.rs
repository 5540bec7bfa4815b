//! From the start of the server to its end: what lives in the process and not in a connection.
//!
//! nbdkit's callbacks carry no state of the plugin's own, hence the one global here. Order of events: parameters,
//! [`check_volume`] (still on the terminal), fork, [`start`], any number of [`connect`] and [`disconnect`], [`stop`].
//! Between two clients the volume may be closed ([`giving_back`]).
//! A server may also end without any of these but the last, or be killed without that one.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use hypernbd_volume::Volume;
use hypernbd_volume::admin::{self, Sighting};
use hypernbd_volume::linger::Room;
use hypernbd_volume::monitor::{Now, State};
use hypernbd_volume::options::durability::Durability;
use hypernbd_volume::options::{ServeConfig, VolumeOptions};
use hypernbd_volume::past::export_name::Export;
use hypernbd_volume::past::{self, Past};
use hypernbd_volume::volume_name::VolumeName;
use nbdkit::{Error, Result};
use once_cell::sync::OnceCell;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use crate::closing::{close, close_all, report_loss};
use crate::endpoints::{self, Endpoints};
use crate::errno::{self, in_errno};
use crate::registry::Registry;
use crate::served::{Left, Look, Name, ServedVolume, Wait};
use crate::{giving_back, limits, nbdkit_ext, params, past_exports};

/// How long the runtime's threads may take to end once nothing is left to do.
const RUNTIME_END_MAX: Duration = Duration::from_secs(10);
/// Stack of a runtime's thread: an opening runs on one, and its futures need more than the 2 MiB that are usual, above all in a build
/// that is not optimised. What is not touched takes no memory.
pub const STACK_BYTES: usize = 8 << 20;
/// Threads for what blocks, such as files of a store in a directory; an opening, and a close, take one each besides.
const BLOCKING_THREADS: usize = 512;

/// How often a connection that waits for an opening or a close looks whether the server ends.
const WAIT_POLL: Duration = Duration::from_millis(50);

/// How long a connection waits for a volume that nobody uses to make room for another.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(60);

/// What all connections share.
pub struct Shared {
    pub runtime: Runtime,
    /// What is served.
    pub volumes: Registry,
    /// Goes off whenever something of [`giving_back`] may be due sooner.
    pub alarm: Arc<Notify>,
    /// What tells of the server.
    endpoints: Endpoints,
    /// The server ends once the last connection has.
    ends_when_idle: bool,
}

impl Shared {
    /// Ends the server, if it was told to end once nobody uses it, and nobody does.
    fn end_if_idle(&self) {
        if self.ends_when_idle && self.volumes.is_idle() {
            nbdkit::shutdown();
        }
    }
}

static SHARED: Mutex<Option<Shared>> = Mutex::new(None);

/// What all connections share; `None` before the start and from the end on.
pub fn shared() -> MutexGuard<'static, Option<Shared>> {
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
    if config.volumes_open.is_some() {
        let below = runtime
            .block_on(admin::volumes_below(&config.url, &config.store))
            .map_err(in_errno)?;
        if below.is_empty() {
            log::warn!("there is no volume below {} yet", config.url);
        }
        return endpoints::listen(config);
    }
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
        .max_blocking_threads(BLOCKING_THREADS + 2 * config.volumes_open.unwrap_or(1))
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
    let alarm = Arc::<Notify>::default();
    let handle = runtime.handle().clone();
    *shared() = Some(Shared {
        runtime,
        volumes: Registry::new(Arc::new(config.clone()), SIGHTING.get().cloned()),
        alarm: alarm.clone(),
        endpoints,
        ends_when_idle: false,
    });
    // Not before: it ends when there is nothing that is served.
    handle.spawn(giving_back::drive(alarm));
    Ok(())
}

/// The volume for a new connection; the first one opens it. That is here and not in [`start`] because only a
/// connection knows of `nbdkit -r`, and because a store that is away for a moment then costs one connection, not the
/// server.
pub fn connect(name: &Name, readonly: bool) -> Result<Arc<Volume>> {
    volume_of(shared().as_mut(), name)?.begin_waiting(readonly);
    let connected = wait_for(name, None, |shared| {
        // Somebody on this machine who finds it in the lease says what to do, and not to which of many.
        let control = shared.endpoints.control.as_deref().filter(|_| name.is_none());
        let volume = shared.volumes.volume(name).map_err(no_volume)?;
        Ok(volume.look(readonly, &shared.runtime, control, &shared.alarm))
    });
    let late = shared().as_mut().and_then(|shared| {
        shared.alarm.notify_one();
        let volume = shared.volumes.get_mut(name)?;
        volume.waited(readonly, connected.is_ok())
    });
    if let Some(late) = late {
        close(&late);
    }
    connected
}

/// A checkpoint of a volume for a new connection.
pub fn connect_past(name: &Name, at: &Past) -> Result<Arc<Volume>> {
    volume_of(shared().as_mut(), name)?.past.wait(at);
    let connected = wait_for(name, Some(at), |shared| {
        let volume = shared.volumes.volume(name).map_err(no_volume)?;
        let config = volume.config().clone();
        Ok(volume.past.connect(&shared.runtime, &config, at))
    });
    let unused = shared().as_mut().and_then(|shared| {
        shared.alarm.notify_one();
        shared.volumes.get_mut(name)?.past.waited(at)
    });
    if let Some(volume) = unused {
        close(&volume);
    }
    if let Some(shared) = shared().as_ref() {
        shared.end_if_idle();
    }
    connected
}

/// The volume of this name.
fn volume_of<'s>(shared: Option<&'s mut Shared>, name: &Name) -> Result<&'s mut ServedVolume> {
    let shared = shared.ok_or_else(shutting_down)?;
    shared.volumes.volume(name).map_err(no_volume)
}

fn no_volume(why: String) -> Error {
    errno::error(libc::EINVAL, why)
}

/// Looks until the volume, or that checkpoint of it, is open. Never panics: who began to wait is to be taken off the count.
fn wait_for(
    name: &Name,
    at: Option<&Past>,
    look: impl Fn(&mut Shared) -> Result<Look>,
) -> Result<Arc<Volume>> {
    errno::guard("open", || look_until_open(name, at, look))
}

fn look_until_open(
    name: &Name,
    at: Option<&Past>,
    look: impl Fn(&mut Shared) -> Result<Look>,
) -> Result<Arc<Volume>> {
    let began = Instant::now();
    loop {
        let found = {
            let mut shared = shared();
            let shared = shared.as_mut().ok_or_else(shutting_down)?;
            match room_for(shared, name, at) {
                Room::Free => look(shared)?,
                Room::Soon if began.elapsed() < ROOM_WAIT_MAX => Look::Wait(Wait::Room),
                Room::Soon | Room::None => return Err(no_room(shared)),
            }
        };
        let wait = match found {
            Look::Open(volume) => return Ok(volume),
            Look::Wait(wait) => wait,
        };
        loop {
            match wait.wait(WAIT_POLL) {
                Some(Err(e)) => return Err(errno::of(&e)),
                // Whoever looks next begins another one.
                Some(Ok(())) if !matches!(wait, Wait::Room) => break,
                _ if nbdkit_ext::is_ending() => {
                    let text =
                        "the server is shutting down, or the client has gone, while the volume is opened";
                    return Err(errno::error(libc::ESHUTDOWN, text));
                }
                Some(Ok(())) => break,
                None => {}
            }
        }
    }
}

/// Whether the volume, or that checkpoint of it, may be opened now. One that is open has its room.
fn room_for(shared: &mut Shared, name: &Name, at: Option<&Past>) -> Room {
    if (shared.volumes.get(name)).is_some_and(|volume| volume.has_room(at)) {
        return Room::Free;
    }
    let room = shared.volumes.make_room(Instant::now());
    shared.alarm.notify_one();
    room
}

fn no_room(shared: &Shared) -> Error {
    let text = format!(
        "a client is refused: as many volumes are open as may be (volumes_open), and clients use all of them, or the store does not take \
         what is not published ({} connections); disconnect some, or raise volumes_open and the memory that they share",
        shared.volumes.now().connections
    );
    errno::error(libc::ENOMEM, text)
}

fn shutting_down() -> Error {
    errno::error(libc::ESHUTDOWN, "the server is shutting down")
}

/// The snapshots of the one volume, or all of many volumes, as names of exports, with a description each. What cannot be told is left
/// out, with a line in the log.
pub fn exports() -> Vec<(String, String)> {
    let runtime = shared().as_ref().map(|shared| shared.runtime.handle().clone());
    let (Some(runtime), Some(config)) = (runtime, params::config()) else {
        return Vec::new();
    };
    let listed = match config.volumes_open {
        Some(_) => runtime
            .block_on(admin::volumes_below(&config.url, &config.store))
            .map(|names| {
                let named = |name: &VolumeName| (name.to_string(), "Hypernbd volume".to_owned());
                names.iter().map(named).collect()
            }),
        None => runtime
            .block_on(past::snapshots(&config.url, &config.store))
            .map(|snapshots| snapshots.iter().map(past_exports::described).collect()),
    };
    listed.unwrap_or_else(|e| {
        log::warn!("the exports cannot be listed: {}", e.chain());
        Vec::new()
    })
}

/// A connection to a checkpoint has ended.
pub fn disconnect_past(name: &Name, at: &Past) {
    let ended = catch_unwind(|| {
        let unused = shared().as_mut().and_then(|shared| {
            let volume = shared.volumes.get_mut(name);
            let unused = volume.and_then(|volume| volume.past.disconnect(at));
            shared.alarm.notify_one();
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
pub fn disconnect(name: &Name) {
    let ended = catch_unwind(|| {
        let unused = shared().as_mut().and_then(|shared| {
            let unused = shared.volumes.get_mut(name).and_then(ServedVolume::disconnect);
            shared.alarm.notify_one();
            shared.end_if_idle();
            unused
        });
        if let Some(volume) = unused {
            close(&volume);
        }
    });
    log_panic("disconnect", ended);
}

/// Until this is dropped, the volume is not given back, if it is there.
pub fn keep_open(name: &Name) -> Box<dyn Any + Send> {
    let mut shared = shared();
    match shared.as_mut().and_then(|shared| shared.volumes.get_mut(name)) {
        Some(volume) => {
            volume.begin_use();
            Box::new(Kept(name.clone()))
        }
        None => Box::new(()),
    }
}

/// See [`keep_open`].
struct Kept(Name);

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(shared) = shared().as_mut() {
            // A volume that is used is not forgotten: it is the same one.
            if let Some(volume) = shared.volumes.get_mut(&self.0) {
                volume.end_use();
            }
            shared.alarm.notify_one();
        }
    }
}

/// The preferred size of requests of what a client asked for, in bytes: the volume's block. `None` before it is open.
pub fn block_size_bytes(export: &Export) -> Option<u32> {
    let shared = shared();
    let volume = shared.as_ref()?.volumes.get(&export.volume)?;
    volume
        .opened(export.at.as_ref())
        .map(|volume| volume.block_size_bytes())
}

/// Which volume a client has that asked for this. `None` where that is not known.
pub fn identity(export: &Export) -> Option<String> {
    let shared = shared();
    let volume = shared.as_ref()?.volumes.get(&export.volume)?;
    volume.opened(export.at.as_ref())?.identity().map(str::to_owned)
}

/// What is served now, for who asks.
pub fn now() -> Now {
    match shared().as_ref() {
        Some(shared) => shared.volumes.now(),
        None => Now {
            state: State::Ending,
            volume: None,
            connections: 0,
        },
    }
}

/// What is served now of each of many volumes that is open, or was a moment ago, by name.
pub fn named() -> Vec<(String, Now)> {
    shared()
        .as_ref()
        .map(|shared| shared.volumes.named())
        .unwrap_or_default()
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
    let mut left = Left::default();
    for volume in all.volumes.end() {
        volume.end(&mut left);
    }
    // All are told before any is waited for: however many there are, it takes as long as one.
    for opening in &left.opening {
        opening.give_up();
    }
    let until = Instant::now() + RUNTIME_END_MAX;
    close_all(left.open);
    let late = left.opening.iter().filter_map(|opening| {
        let rest = until.saturating_duration_since(Instant::now());
        opening.waiter().wait(rest)?.ok()
    });
    close_all(late.collect());
    for closing in left.closing {
        closing.wait_for_end();
    }
    all.endpoints.end();
    all.runtime.shutdown_timeout(RUNTIME_END_MAX);
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
