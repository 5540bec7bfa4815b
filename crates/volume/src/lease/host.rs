//! Identifies this process as a holder, and finds out whether another holder on this machine still runs.
//!
//! A process number alone proves nothing: numbers are used again, and each container counts its own. So a holder is
//! judged only when its machine, boot and process namespace are this process's own, and the start time of its process
//! is compared too.

use std::collections::BTreeSet;
use std::fs;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

use super::record::{Holder, LeaseRecord};
use super::state::Liveness;

/// The tokens of the leases that this process holds. A lease of this process that is not among them was left by a
/// volume that was dropped without being closed.
static HELD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// Notes that this process holds a lease, for the lifetime of this value.
#[derive(Debug)]
pub(super) struct HeldHere(String);

impl HeldHere {
    pub(super) fn new(token: &str) -> Self {
        HELD.lock().insert(token.to_owned());
        Self(token.to_owned())
    }
}

impl Drop for HeldHere {
    fn drop(&mut self) {
        HELD.lock().remove(&self.0);
    }
}

/// Describes this process as a holder.
pub(super) fn this_process() -> Holder {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let pid = std::process::id();
    Holder {
        host: read("/proc/sys/kernel/hostname").unwrap_or_else(|_| "an unnamed machine".into()),
        boot_id: read("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
        pid_namespace: fs::read_link("/proc/self/ns/pid")
            .map(|link| link.display().to_string())
            .unwrap_or_default(),
        pid,
        started_ticks: stat_of("self").map_or(0, |stat| stat.started_ticks),
        program: read("/proc/self/comm").unwrap_or_else(|_| "a process".into()),
    }
}

/// This process, as whoever asks a holder for something is named.
pub(crate) fn asker() -> String {
    this_process().to_string()
}

impl Holder {
    /// Whether the holder's process can be seen from here by its number: it is on this machine, in this boot and
    /// process namespace.
    pub fn is_on_this_machine(&self) -> bool {
        is_same_place(self, &this_process())
    }

    /// Whether what the holder left in a directory without syncing it may be found from here: it is on this machine, in this boot,
    /// though perhaps in another container.
    pub fn is_of_this_boot(&self) -> bool {
        !self.boot_id.is_empty() && self.boot_id == this_process().boot_id
    }
}

fn is_same_place(one: &Holder, other: &Holder) -> bool {
    let is_known = !one.boot_id.is_empty() && !one.pid_namespace.is_empty();
    is_known
        && (&one.host, &one.boot_id, &one.pid_namespace)
            == (&other.host, &other.boot_id, &other.pid_namespace)
}

/// Whether a lease's holder still runs, as far as can be seen from here.
pub(super) fn liveness(record: &LeaseRecord, this: &Holder) -> Liveness {
    match is_alive(record, this) {
        Some(true) => Liveness::Runs,
        Some(false) => Liveness::Ended,
        None => Liveness::Unknown,
    }
}

fn is_alive(record: &LeaseRecord, this: &Holder) -> Option<bool> {
    let holder = &record.holder;
    if !is_same_place(holder, this) {
        return None;
    }
    if (holder.pid, holder.started_ticks) == (this.pid, this.started_ticks) {
        return Some(HELD.lock().contains(&record.token));
    }
    let pid = i32::try_from(holder.pid).ok().and_then(Pid::from_raw)?;
    // Asks the kernel instead of /proc, where other users' processes may be hidden.
    if test_kill_process(pid) == Err(Errno::SRCH) {
        return Some(false);
    }
    let stat = stat_of(&holder.pid.to_string())?;
    Some(stat.started_ticks == holder.started_ticks && !stat.has_ended)
}

struct Stat {
    started_ticks: u64,
    /// The process has ended, and its parent has not waited for it yet.
    has_ended: bool,
}

fn stat_of(pid: &str) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Parses `/proc/PID/stat`. The program's name in it may hold spaces and parentheses.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, after_name) = text.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    // proc_pid_stat(5) numbers the fields; the first one here is 3, the state.
    let field = |number: usize| fields.get(number - 3).copied();
    let threads: u64 = field(20)?.parse().ok()?;
    Some(Stat {
        started_ticks: field(22)?.parse().ok()?,
        // The first of several threads can end before the others do.
        has_ended: matches!(field(3)?, "Z" | "X" | "x") && threads <= 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::tests::record;

    #[test]
    fn a_stat_line_is_read_whatever_the_program_is_called() {
        let line = |state: &str, threads: u32| {
            format!("42 (a) b (c) {state} 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 {threads} 0 98765 1 2 3\n")
        };
        let stat = parse_stat(&line("S", 9)).unwrap();
        assert_eq!((stat.started_ticks, stat.has_ended), (98765, false));
        assert!(parse_stat(&line("Z", 1)).unwrap().has_ended);
        assert!(!parse_stat(&line("Z", 3)).unwrap().has_ended);
        assert!(parse_stat("42 (a").is_none());
    }

    #[test]
    fn this_process_is_alive_while_it_holds_the_lease() {
        let this = this_process();
        assert!(this.started_ticks > 0 && !this.boot_id.is_empty() && !this.pid_namespace.is_empty());
        let mut lease = record("here", 1);
        lease.holder = this.clone();
        assert_eq!(is_alive(&lease, &this), Some(false), "left behind");
        let held = HeldHere::new("here");
        assert_eq!(is_alive(&lease, &this), Some(true));
        drop(held);
        assert_eq!(is_alive(&lease, &this), Some(false));
    }

    #[test]
    fn another_process_is_judged_by_its_number_and_its_start() {
        let this = this_process();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let mut lease = record("other", 1);
        lease.holder = Holder {
            pid: child.id(),
            started_ticks: stat_of(&child.id().to_string()).unwrap().started_ticks,
            ..this.clone()
        };
        assert_eq!(is_alive(&lease, &this), Some(true));
        let mut earlier = lease.clone();
        earlier.holder.started_ticks -= 1;
        assert_eq!(
            is_alive(&earlier, &this),
            Some(false),
            "the number is another's now"
        );
        child.kill().unwrap();
        // The child was killed and not waited for. The kernel still counts its number as taken.
        while is_alive(&lease, &this) == Some(true) {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert_eq!(is_alive(&lease, &this), Some(false));
    }

    #[test]
    fn nothing_is_said_of_other_machines_boots_and_containers() {
        let this = this_process();
        for change in [
            |h: &mut Holder| h.host.push('x'),
            |h: &mut Holder| h.boot_id.push('x'),
            |h: &mut Holder| h.pid_namespace.push('x'),
        ] {
            let mut lease = record("other", 1);
            lease.holder = this.clone();
            change(&mut lease.holder);
            assert_eq!(is_alive(&lease, &this), None);
        }
        let nowhere = Holder {
            boot_id: String::new(),
            ..this
        };
        let mut lease = record("other", 1);
        lease.holder = nowhere.clone();
        assert_eq!(
            is_alive(&lease, &nowhere),
            None,
            "unknown is not the same as unknown"
        );
    }
}
