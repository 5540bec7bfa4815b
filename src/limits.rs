//! What the system lets the server have: what is too little is said at the start, and a connection that would take what the
//! volume itself needs is refused.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hypernbd_volume::options::ServeConfig;
use hypernbd_volume::units::{MIB, format_size};
use hypernbd_volume::{cgroup, descriptors};
use nbdkit::Result;

use crate::{errno, nbdkit_ext, params};

/// Connections that there should be room for: as many as the tests open at once.
const CONNECTIONS_USUAL: u64 = 512;
/// Threads that connections leave free, for the store, the disk and the volume's own work; where few are allowed, a quarter.
const THREADS_KEPT_FREE: u64 = 64;
/// For how long a connection waits for the threads of one that has left, which go a moment after it ...
const ROOM_WAIT_MAX: Duration = Duration::from_secs(2);
/// ... looking for room this often ...
const ROOM_WAIT_STEP: Duration = Duration::from_millis(20);
/// ... beside so many others, at most: each of them is a thread of those that are kept free.
const ROOM_WAITERS_MAX: u64 = 8;
/// Memory for everything that no parameter bounds, but connections.
const MEMORY_BESIDE_BYTES: u64 = 128 * MIB;
/// Memory of a thread that serves requests, the kernel's part included: measured with nbdkit 1.42.
const MEMORY_A_THREAD_BYTES: u64 = 40 << 10;

const RAISE_DESCRIPTORS: &str = "raise the hard limit with `ulimit -Hn` or systemd's LimitNOFILE=";
const RAISE_THREADS: &str = "raise it with systemd's TasksMax= or the container's --pids-limit, or give each connection fewer \
                             with nbdkit's --threads";
const RAISE_MEMORY: &str = "raise it with systemd's MemoryMax= or the container's --memory, or lower these parameters or \
                            nbdkit's --threads";

/// Says what is too little. Each sentence names the limit, and what raises it.
pub fn tell(config: &ServeConfig) {
    if let Some((limit, connections)) = descriptors::connections()
        && connections < CONNECTIONS_USUAL
    {
        log::warn!(
            "{limit} open descriptors are allowed, which is room for about {connections} connections; {RAISE_DESCRIPTORS}"
        );
    }
    if let Some(limit) = cgroup::threads() {
        let connections = (limit.most)
            .saturating_sub(limit.in_use().unwrap_or(0) + threads_kept_free(limit.most))
            / threads_a_connection();
        if connections < CONNECTIONS_USUAL {
            log::warn!(
                "{} allows {} threads, which is room for about {connections} connections; {RAISE_THREADS}",
                limit.file.display(),
                limit.most
            );
        }
    }
    if let Some(limit) = cgroup::memory() {
        let volume = &config.volume;
        let wanted = [
            volume.write_buffer_bytes,
            volume.read_cache.memory_bytes,
            volume.index_memory_bytes,
            MEMORY_BESIDE_BYTES,
        ];
        let wanted = wanted.iter().fold(0u64, |sum, bytes| sum.saturating_add(*bytes));
        let connections =
            limit.most.saturating_sub(wanted) / (threads_a_connection() * MEMORY_A_THREAD_BYTES);
        if connections < CONNECTIONS_USUAL {
            log::warn!(
                "{} allows {} of memory: write_buffer, cache_memory, index_memory and what else is needed take up to {}, which \
                 leaves room for about {connections} connections; {RAISE_MEMORY}",
                limit.file.display(),
                format_size(limit.most),
                format_size(wanted)
            );
        }
    }
}

/// Checks that a new connection leaves enough for the volume.
///
/// # Errors
/// With the limit, and what raises it.
pub fn check_connection() -> Result<()> {
    if let Some(limit) = descriptors::exhausted() {
        let text = format!(
            "a client is refused: {limit} open descriptors are allowed, and all but those that the volume needs are in use; \
             {RAISE_DESCRIPTORS}"
        );
        return Err(errno::error(libc::EMFILE, text));
    }
    if let Some(limit) = cgroup::threads()
        && !has_room_soon(&limit)
    {
        let text = format!(
            "a client is refused: {} allows {} threads, and all but those that the volume needs are in use; {RAISE_THREADS}",
            limit.file.display(),
            limit.most
        );
        return Err(errno::error(libc::EAGAIN, text));
    }
    Ok(())
}

/// Whether the threads of the connection that calls this leave enough, now or in a moment.
fn has_room_soon(limit: &cgroup::Limit) -> bool {
    static WAITERS: AtomicU64 = AtomicU64::new(0);
    // Its own thread is the one that calls, and is in use already.
    let more = threads_a_connection() - 1;
    // Those that wait look at the same room, and begin their threads only later: each leaves it to those that came before it.
    let is_room = |before: u64| {
        let wanted = (before + 1) * more + threads_kept_free(limit.most);
        limit.in_use().is_none_or(|in_use| in_use + wanted <= limit.most)
    };
    if is_room(WAITERS.load(Ordering::Relaxed)) {
        return true;
    }
    let waiters_max = ROOM_WAITERS_MAX.min(threads_kept_free(limit.most) / 2);
    let before = WAITERS.fetch_add(1, Ordering::Relaxed);
    let mut has_room = false;
    if before < waiters_max {
        let until = Instant::now() + ROOM_WAIT_MAX;
        has_room = is_room(before);
        while !has_room && Instant::now() < until {
            std::thread::sleep(ROOM_WAIT_STEP);
            has_room = is_room(before);
        }
    }
    WAITERS.fetch_sub(1, Ordering::Relaxed);
    has_room
}

fn threads_kept_free(allowed: u64) -> u64 {
    THREADS_KEPT_FREE.min(allowed / 4)
}

/// Threads that one connection takes: its own, and those that serve its requests.
fn threads_a_connection() -> u64 {
    match nbdkit_ext::threads() {
        workers @ 2.. if params::is_parallel() => workers + 1,
        _ => 1,
    }
}
