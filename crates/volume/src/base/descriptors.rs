//! Limits of the system on this process, and how many connections fit below them.

use std::os::fd::AsFd;

use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises the soft limits of open descriptors and of threads to the hard ones. Each connection, request and journal segment
/// takes some, and the usual soft limit of descriptors (1024) exists for programs that use select(2). If raising one fails,
/// it stays as it was.
pub fn raise_limits() {
    for (resource, what, option) in [
        (Resource::Nofile, "open descriptors", "ulimit -n"),
        (Resource::Nproc, "threads", "ulimit -u"),
    ] {
        let mut limit = getrlimit(resource);
        if limit.current == limit.maximum {
            continue;
        }
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(resource, limit) {
            log::warn!("cannot raise the limit of {what}: {error}; raise it with `{option}`");
        }
    }
}

/// Descriptors that one connection to nbdkit takes: its socket, and a pipe.
const A_CONNECTION: u64 = 3;
/// Descriptors that connections leave free, for everything else: requests to the store, objects of a directory, the journal.
const KEPT_FREE: u64 = 192;
/// Descriptors that are in use before the first connection, at most.
const IN_USE: u64 = 64;

fn kept_free(limit: u64) -> u64 {
    KEPT_FREE.min(limit / 4)
}

/// The limit of open descriptors, and about how many connections fit below it; `None` when there is no limit.
pub fn connections() -> Option<(u64, u64)> {
    let limit = getrlimit(Resource::Nofile).current?;
    Some((limit, connections_below(limit)))
}

fn connections_below(limit: u64) -> u64 {
    (limit - kept_free(limit) - IN_USE.min(limit / 4)) / A_CONNECTION
}

/// The limit of open descriptors, if another connection would leave too few of them for everything else: the volume would
/// fail for all clients.
pub fn exhausted() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile).current?;
    // The kernel gives the lowest number that is free, so all below it are in use.
    let lowest_free = std::io::stdin().as_fd().try_clone_to_owned();
    match lowest_free {
        Ok(descriptor) => {
            let number = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&descriptor)).unwrap_or(0);
            (number > limit - kept_free(limit)).then_some(limit)
        }
        Err(error) => (error.raw_os_error() == Some(libc::EMFILE)).then_some(limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_everything_else() {
        for limit in [0, 1, 16, 64, 256, 1024, 20_000] {
            let taken = connections_below(limit) * A_CONNECTION;
            assert!(taken + kept_free(limit) <= limit, "{limit}");
        }
        assert_eq!(connections_below(1024), 256);
        assert!(connections_below(64) >= 8, "few are better than none");
    }
}
