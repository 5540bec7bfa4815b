//! What the system lets this process have.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open descriptors to the hard one: each connection, request, journal segment and cache file takes
/// some, and the usual soft limit (1024) is there for programs that use select(2). Where that fails all goes on as it was.
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
