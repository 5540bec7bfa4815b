//! Until when checkpoints are kept, told ahead. Pure: times and rules in, times out.
//!
//! Ages and periods count from the newest checkpoint, so the rules of a [`Policy`] let go of nothing while nothing is published.
//! What can be told ahead is the time up to which they keep a checkpoint *whatever is published until then*. A checkpoint is told to
//! be kept until T when both hold:
//!
//! * As long as the newest checkpoint was published before T, the rules keep it.
//! * Once a checkpoint was published after T, the rules may let go of it: they do if there was one in every hour until then, and
//!   as many as are kept of the newest.
//!
//! That takes for granted that the clock by which it is told, and those of the servers from now on, are right, and that no publish is on
//! its way that began in a period that is over.

use std::collections::BTreeMap;

use jiff::Timestamp;

use super::choice::NEWEST_KEPT;
use super::periods::Period;
use super::policy::{Policy, Reason, in_order, orders};

/// Until when a checkpoint is kept, if the rules, the names and who reads it stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// For ever: it has a name, or nothing removes checkpoints of this volume.
    Ever,
    /// At least until this time, in milliseconds since 1970-01-01 UTC: the first checkpoint published after it may be the one for
    /// which it goes. If the time has passed, that may be the next checkpoint.
    Time(u64),
    /// As long as a client reads it, or a WAL or the accounting of space depends on it.
    InUse,
    /// As long as it is among this many of the newest.
    Newest(u64),
}

/// Until when each of the checkpoints is kept that `kept` has, which says why. All `checkpoints` are given as to [`Policy::keep`].
/// None is published before `now_ms` from here on.
pub(crate) fn until(
    checkpoints: &[(u64, u64)],
    policy: Option<&Policy>,
    kept: &BTreeMap<u64, Vec<Reason>>,
    now_ms: u64,
) -> BTreeMap<u64, Until> {
    let times = policy.map_or_else(BTreeMap::new, |policy| times(policy, checkpoints, now_ms));
    let keep_last = policy.map_or(0, |policy| u64::from(policy.keep_last));
    let newest = keep_last.max(NEWEST_KEPT as u64);
    let of = |cno: u64, reasons: &[Reason]| {
        let is = |reason| reasons.contains(&reason);
        match times.get(&cno).copied() {
            _ if is(Reason::Everything) || is(Reason::Name) => Until::Ever,
            Some(ms) if !is_a_date(ms) => Until::Ever,
            Some(ms) if ms > now_ms => Until::Time(ms),
            _ if is(Reason::InUse) => Until::InUse,
            _ if is(Reason::Newest) || is(Reason::Last) => Until::Newest(newest),
            // Where clocks were wrong, the rules may keep one for which no time can be told.
            passed => Until::Time(passed.unwrap_or(now_ms)),
        }
    };
    kept.iter()
        .map(|(cno, reasons)| (*cno, of(*cno, reasons)))
        .collect()
}

/// Whether a time can be written as a date. The years beyond 9999 cannot.
fn is_a_date(ms: u64) -> bool {
    i64::try_from(ms).is_ok_and(|ms| Timestamp::from_millisecond(ms).is_ok())
}

/// The times up to which the rules that count time keep checkpoints, whatever the rounds remove until then. Where the times of the
/// publishes do not ascend, that is told by the order in which none was published after one with a higher number: there the one from
/// which others have their time is the last of its period, and stays as long as they do. In the other order it is the first, and goes
/// before them.
fn times(policy: &Policy, checkpoints: &[(u64, u64)], now_ms: u64) -> BTreeMap<u64, u64> {
    let [_, descending] = orders(checkpoints, now_ms);
    let mut times = times_of(policy, &descending, now_ms);
    // Those that are in order are kept by their own times as well, unless one that is out of order may come to count among them.
    let in_order = in_order(checkpoints, now_ms);
    let own = times_of(policy, &in_order, now_ms);
    let mut latest_left_out: Option<u64> = None;
    for &(cno, ms) in checkpoints.iter().rev() {
        if in_order.binary_search_by_key(&cno, |&(cno, _)| cno).is_err() {
            latest_left_out = latest_left_out.max(Some(ms));
        } else if latest_left_out < Some(ms)
            && let Some(&of_own) = own.get(&cno)
        {
            let time = times.entry(cno).or_insert(of_own);
            *time = of_own.max(*time);
        }
    }
    times
}

/// The same for checkpoints with ascending times.
fn times_of(policy: &Policy, checkpoints: &[(u64, u64)], now_ms: u64) -> BTreeMap<u64, u64> {
    let mut rules = policy
        .calendar()
        .map(|(period, wanted)| Ahead::new(period, wanted, now_ms));
    let mut times = BTreeMap::new();
    for (from_newest, &(cno, ms)) in checkpoints.iter().rev().enumerate() {
        let is_oldest = from_newest + 1 == checkpoints.len();
        let of_rules = rules.iter_mut().filter_map(|rule| rule.until(ms, is_oldest));
        let within = (policy.keep_within_ms > 0).then(|| ms.saturating_add(policy.keep_within_ms));
        if let Some(latest) = of_rules.chain(within).max() {
            times.insert(cno, latest);
        }
    }
    times
}

/// A rule that keeps the last checkpoint of each of the newest periods that have any, asked for one checkpoint after another, from the
/// newest to the oldest.
struct Ahead {
    period: Period,
    /// The number of periods.
    wanted: u64,
    /// The number of the present period.
    present: u64,
    /// The period of the checkpoint before, which is newer.
    last: Option<u64>,
    /// How many periods have newer checkpoints.
    newer: u64,
    /// How many of these are over.
    newer_over: u64,
}

impl Ahead {
    fn new(period: Period, wanted: u32, now_ms: u64) -> Self {
        Self {
            period,
            wanted: u64::from(wanted),
            present: period.at(now_ms),
            last: None,
            newer: 0,
            newer_over: 0,
        }
    }

    /// Up to when the rule keeps the next older checkpoint, published at `ms`; `None` when it does not keep it, or the next checkpoint
    /// may take its place in the present period.
    fn until(&mut self, ms: u64, is_oldest: bool) -> Option<u64> {
        let number = self.period.at(ms);
        let is_last = self.last != Some(number);
        let is_over = number < self.present;
        // The oldest of all is kept as long as there are fewer periods than wanted, whichever it is of its own.
        let is_sure = is_oldest || (is_last && is_over);
        // From the present period on each one may get a checkpoint. It is let go of with the last one that is wanted.
        let until = (is_sure && self.newer < self.wanted).then(|| {
            let left = self.wanted - self.newer_over;
            self.period.start(self.present.saturating_add(left - 1))
        });
        if is_last {
            self.last = Some(number);
            self.newer += 1;
            self.newer_over += u64::from(is_over);
        }
        until
    }
}

#[cfg(test)]
#[path = "until_tests.rs"]
mod tests;
