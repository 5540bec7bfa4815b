//! What a scrub does next, and when. Pure: the time and what was seen, in; what to do, out.
//!
//! Passes go over restarts and machines, so they are timed by the wall clock. A clock that is wrong makes a pass begin too early or too
//! late, and costs nothing else: a moment that is yet to come, because the clock was set back, counts as one that is long past.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::format::object_names::cno_of;
use crate::meta::scrub_record::{EndedPass, ScrubPass};

/// From the start of a server to its first look, at most: its clients come first.
const START_WAIT: Duration = Duration::from_secs(10);
/// What is needed is looked up anew after this long: what went meanwhile is no longer read, what is missing is noticed, and what was damaged
/// is read again.
const LOOK_EVERY: Duration = Duration::from_secs(24 * 3600);
/// How often progress is stored, at most.
const SAVE_EVERY: Duration = Duration::from_secs(60);
/// How often it is looked what needs the things that seem wrong, at most: that reads the index.
const CONFIRM_EVERY: Duration = Duration::from_secs(60);
/// The first wait after a failure; doubled by each further one.
const RETRY_WAIT: Duration = Duration::from_secs(10);
const RETRY_WAIT_MAX: Duration = Duration::from_secs(3600);
/// The longest wait at a time: the clock may be set.
const WAIT_MAX: Duration = Duration::from_secs(3600);
/// Bytes a second that are read at least and at most.
const RATE_LEAST: u64 = 4 << 20;
const RATE_MOST: u64 = 64 << 20;
/// Bytes that a request counts for at least.
const REQUEST_BYTES: u64 = 256 << 10;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing for this long.
    Wait(Duration),
    /// Look up what is needed, and whether it is there.
    Look,
    /// Read this object of this length.
    Read {
        /// Its number.
        object: u64,
        /// Its length in bytes.
        len_bytes: u64,
    },
    /// Look whether anything needs what seems wrong.
    Confirm,
    /// Store how far it is, and what was found.
    Save,
}

/// What a look saw.
#[derive(Debug, Clone, Copy)]
pub(super) struct Looked<'a> {
    /// The newest checkpoint.
    pub newest: u64,
    /// The objects that are needed and there, with their lengths in bytes.
    pub there: &'a BTreeMap<u64, u64>,
    /// Objects to be read before all others: those that are known to be damaged, or that something else seems wrong with.
    pub again: &'a BTreeSet<u64>,
    /// Something seems wrong, and is to be confirmed.
    pub is_suspecting: bool,
}

/// What came of reading an object.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ReadObject {
    /// Bytes that are what was written.
    pub verified_bytes: u64,
    /// Bytes that have no check values.
    pub unverified_bytes: u64,
    /// Something seems wrong with it, and is to be confirmed.
    pub is_suspect: bool,
}

/// What is not stored yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Unsaved {
    Nothing,
    Progress,
    /// What is worth a request at once.
    News,
}

/// An object to be read.
#[derive(Debug, Clone, Copy)]
struct Item {
    object: u64,
    len_bytes: u64,
    /// It is read because of what is known or suspected of it, and not for the pass.
    is_again: bool,
}

/// The schedule of one server. Times are in milliseconds since 1970-01-01 UTC.
#[derive(Debug)]
pub(super) struct Schedule {
    interval: Duration,
    started_ms: u64,
    pass: Option<ScrubPass>,
    last: Option<EndedPass>,
    /// Damage is known.
    is_damaged: bool,
    is_suspecting: bool,
    todo: VecDeque<Item>,
    rate: u64,
    looked_ms: Option<u64>,
    confirmed_ms: Option<u64>,
    unsaved: Unsaved,
    saved_ms: u64,
    failures: u32,
    failed_ms: u64,
}

/// What is left of a wait that began at `since_ms`.
fn left(now_ms: u64, since_ms: u64, wait: Duration) -> Duration {
    match now_ms.checked_sub(since_ms) {
        Some(passed_ms) => wait.saturating_sub(Duration::from_millis(passed_ms)),
        None => Duration::ZERO,
    }
}

/// Bytes that a request counts for, of which this many are asked for.
pub(super) fn cost_bytes(len_bytes: u64) -> u64 {
    len_bytes.max(REQUEST_BYTES)
}

/// How many bytes a second are read of so many, that a pass takes half of the interval.
fn rate(total_bytes: u64, interval: Duration) -> u64 {
    let half_s = (interval.as_secs() / 2).max(1);
    (total_bytes / half_s).clamp(RATE_LEAST, RATE_MOST)
}

impl Schedule {
    /// Of a server that starts now, and goes on with this pass.
    pub fn new(interval: Duration, now_ms: u64, pass: Option<ScrubPass>, last: Option<EndedPass>) -> Self {
        Self {
            interval,
            started_ms: now_ms,
            pass,
            last,
            is_damaged: false,
            is_suspecting: false,
            todo: VecDeque::new(),
            rate: RATE_LEAST,
            looked_ms: None,
            confirmed_ms: None,
            unsaved: Unsaved::Nothing,
            saved_ms: now_ms,
            failures: 0,
            failed_ms: 0,
        }
    }

    /// The pass that is under way.
    pub fn pass(&self) -> Option<ScrubPass> {
        self.pass
    }

    /// The last pass that ended.
    pub fn last(&self) -> Option<EndedPass> {
        self.last
    }

    /// Bytes a second to read.
    pub fn rate(&self) -> u64 {
        self.rate
    }

    /// What to do at `now_ms`.
    pub fn next(&self, now_ms: u64) -> Next {
        let until_save = match self.unsaved {
            // What seems wrong is known to this server alone: the next one would go on behind it.
            _ if self.is_suspecting => WAIT_MAX,
            Unsaved::Nothing => WAIT_MAX,
            Unsaved::Progress => left(now_ms, self.saved_ms, SAVE_EVERY),
            Unsaved::News => Duration::ZERO,
        };
        if until_save.is_zero() {
            return Next::Save;
        }
        let until_retry = left(now_ms, self.failed_ms, self.retry_wait());
        if !until_retry.is_zero() {
            return Next::Wait(until_retry.min(until_save));
        }
        let was_confirmed = self
            .confirmed_ms
            .is_some_and(|at| !left(now_ms, at, CONFIRM_EVERY).is_zero());
        let next = self.todo.front();
        // What is read of a suspect object says more of it.
        let is_read_first = next.is_some_and(|item| item.is_again);
        if self.is_suspecting && !is_read_first && (next.is_none() || !was_confirmed) {
            return Next::Confirm;
        }
        let until_look = self.until_look(now_ms);
        if until_look.is_zero() {
            return Next::Look;
        }
        match next {
            Some(&Item {
                object, len_bytes, ..
            }) => Next::Read { object, len_bytes },
            None => Next::Wait(until_look.min(until_save)),
        }
    }

    fn retry_wait(&self) -> Duration {
        match self.failures {
            0 => Duration::ZERO,
            failures => RETRY_WAIT
                .saturating_mul(1 << (failures - 1).min(10))
                .min(RETRY_WAIT_MAX),
        }
    }

    fn until_look(&self, now_ms: u64) -> Duration {
        let until_again = self
            .looked_ms
            .map_or(Duration::ZERO, |at| left(now_ms, at, LOOK_EVERY));
        let until = match (&self.pass, self.is_damaged) {
            (Some(_), _) => until_again,
            (None, true) => until_again.min(self.until_pass(now_ms)),
            (None, false) => self.until_pass(now_ms),
        };
        until.max(left(now_ms, self.started_ms, START_WAIT.min(self.interval)))
    }

    /// Until the next pass is due, when none is under way.
    fn until_pass(&self, now_ms: u64) -> Duration {
        let of_last = |last: EndedPass| left(now_ms, last.began_ms, self.interval);
        self.last.map_or(Duration::ZERO, of_last)
    }

    /// What is needed was looked up. Returns whether a pass begins.
    pub fn looked(&mut self, now_ms: u64, looked: &Looked<'_>) -> bool {
        self.failures = 0;
        self.looked_ms = Some(now_ms);
        self.is_suspecting |= looked.is_suspecting;
        // Beyond what the volume has: it was put back to an earlier state, and what is there now was not read.
        let is_left = |pass: &ScrubPass| pass.up_to > looked.newest;
        let is_due = match &self.pass {
            Some(pass) => is_left(pass),
            None => self.until_pass(now_ms).is_zero(),
        };
        if is_due {
            self.pass = Some(ScrubPass::new(now_ms, looked.newest));
            self.changed();
        }
        let again = looked.again.iter().filter_map(|&object| {
            let &len_bytes = looked.there.get(&object)?;
            Some(Item {
                object,
                len_bytes,
                is_again: true,
            })
        });
        let pass = self.pass;
        let of_pass = looked.there.iter().filter(|(object, _)| {
            pass.is_some_and(|pass| **object > pass.after && cno_of(**object) <= pass.up_to)
        });
        let of_pass = of_pass.map(|(&object, &len_bytes)| Item {
            object,
            len_bytes,
            is_again: false,
        });
        self.todo = again.chain(of_pass).collect();
        let total_bytes = looked
            .there
            .values()
            .map(|len_bytes| cost_bytes(*len_bytes))
            .sum();
        self.rate = rate(total_bytes, self.interval);
        self.end_if_done(now_ms);
        is_due
    }

    /// The object was read that [`Self::next`] said.
    pub fn read(&mut self, now_ms: u64, read: ReadObject) {
        self.failures = 0;
        let Some(item) = self.todo.pop_front() else { return };
        self.is_suspecting |= read.is_suspect;
        if let Some(pass) = self.pass.as_mut().filter(|_| !item.is_again) {
            pass.after = item.object;
            pass.objects += 1;
            pass.verified_bytes += read.verified_bytes;
            pass.unverified_bytes += read.unverified_bytes;
            self.changed();
        }
        self.end_if_done(now_ms);
    }

    /// It was looked what needs the things that seemed wrong.
    pub fn confirmed(&mut self, now_ms: u64) {
        self.failures = 0;
        self.is_suspecting = false;
        self.confirmed_ms = Some(now_ms);
        self.end_if_done(now_ms);
    }

    /// What is known of damage is another than before.
    pub fn damage_changed(&mut self, is_damaged: bool) {
        self.is_damaged = is_damaged;
        self.unsaved = Unsaved::News;
    }

    /// Damage is known from before.
    pub fn remember_damage(&mut self, is_damaged: bool) {
        self.is_damaged = is_damaged;
    }

    /// What was to be done failed: it is tried again later. Returns how often that was so in a row.
    pub fn failed(&mut self, now_ms: u64) -> u32 {
        self.failures = self.failures.saturating_add(1);
        self.failed_ms = now_ms;
        self.failures
    }

    /// Everything is stored.
    pub fn saved(&mut self, now_ms: u64) {
        self.saved_ms = now_ms;
        self.unsaved = Unsaved::Nothing;
    }

    /// It could not be stored: it is tried again later.
    pub fn save_failed(&mut self, now_ms: u64) {
        self.saved_ms = now_ms;
        self.unsaved = Unsaved::Progress;
    }

    fn changed(&mut self) {
        self.unsaved = self.unsaved.max(Unsaved::Progress);
    }

    fn end_if_done(&mut self, now_ms: u64) {
        if !self.todo.is_empty() || self.is_suspecting {
            return;
        }
        let Some(pass) = self.pass.take() else { return };
        self.last = Some(EndedPass {
            began_ms: pass.began_ms,
            ended_ms: now_ms,
            objects: pass.objects,
            verified_bytes: pass.verified_bytes,
            unverified_bytes: pass.unverified_bytes,
        });
        self.unsaved = match self.interval < SAVE_EVERY {
            true => self.unsaved.max(Unsaved::Progress),
            false => Unsaved::News,
        };
    }
}

#[cfg(test)]
#[path = "schedule_tests.rs"]
mod tests;
