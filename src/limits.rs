//! What the system lets the server have: what is too little is said at the start, and a connection that would take what the
//! volume itself needs is refused.

use hypernbd_volume::options::ServeConfig;
use hypernbd_volume::units::{MIB, format_size};
use hypernbd_volume::{cgroup, descriptors};
use nbdkit::Result;

use crate::{errno, nbdkit_ext, params};

/// Connections that there should be room for: as many as the tests open at once.
const CONNECTIONS_USUAL: u64 = 512;
/// Threads that connections leave free, for the store, the disk and the volume's own work; where few are allowed, a quarter.
const THREADS_KEPT_FREE: u64 = 64;
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
        && let Some(in_use) = limit.in_use()
        && in_use + threads_a_connection() + threads_kept_free(limit.most) > limit.most
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
