//! Limits of the system on this process.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open descriptors to the hard limit. Each connection, request, journal segment and cache
/// file takes some, and the usual soft limit (1024) exists for programs that use select(2). If raising it fails, the
/// limit stays as it was.
pub fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        log::warn!("cannot raise the limit of open descriptors: {error}; raise it with `ulimit -n`");
    }
}

/// Descriptors that one connection to nbdkit takes: its socket, and a pipe.
const DESCRIPTORS_A_CONNECTION: u64 = 3;
/// Descriptors for everything else: requests to the store, journal, caches.
const DESCRIPTORS_BESIDE: u64 = 256;

/// The limit of open descriptors, and about how many connections fit below it; `None` when there is no limit.
pub fn connections() -> Option<(u64, u64)> {
    let limit = getrlimit(Resource::Nofile).current?;
    Some((
        limit,
        limit.saturating_sub(DESCRIPTORS_BESIDE) / DESCRIPTORS_A_CONNECTION,
    ))
}
