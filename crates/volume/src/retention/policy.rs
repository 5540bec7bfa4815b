//! Which checkpoints are kept. Pure: times and counts in, a set out.
//!
//! Words and meaning are those of restic's `forget`
//! (<https://restic.readthedocs.io/en/stable/060_forget.html>): ages count from the newest checkpoint, not from now, and an hour,
//! day, week or month counts only when a checkpoint was published in it. So a volume that rests loses nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::periods::{DAY_MS, Period};
use crate::base::units::format_duration;

/// Which checkpoints are kept, besides the newest ones and those that have a name. A checkpoint is kept when any rule
/// keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// This many of the newest checkpoints.
    pub keep_last: u32,
    /// All checkpoints that are older than the newest by at most this time, in milliseconds.
    pub keep_within_ms: u64,
    /// The last checkpoint of each of the newest hours that have any, for this many hours. Hours, days, weeks and
    /// months are those of UTC.
    pub keep_hourly: u32,
    /// The same for days.
    pub keep_daily: u32,
    /// The same for weeks, which begin on Monday.
    pub keep_weekly: u32,
    /// The same for months.
    pub keep_monthly: u32,
}

impl Default for Policy {
    /// A policy without any rule.
    fn default() -> Self {
        Self {
            keep_last: 0,
            keep_within_ms: 0,
            keep_hourly: 0,
            keep_daily: 0,
            keep_weekly: 0,
            keep_monthly: 0,
        }
    }
}

/// Why a checkpoint is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Nothing removes checkpoints of this volume.
    Everything,
    /// It has a name.
    Name,
    /// It is one of the newest, which the server that follows a killed one may have to continue.
    Newest,
    /// A client reads it, or a WAL or the accounting of space depends on it.
    InUse,
    /// `keep-last`.
    Last,
    /// `keep-within`.
    Within,
    /// `keep-hourly`.
    Hourly,
    /// `keep-daily`.
    Daily,
    /// `keep-weekly`.
    Weekly,
    /// `keep-monthly`.
    Monthly,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Everything => "everything",
            Self::Name => "name",
            Self::Newest => "newest",
            Self::InUse => "in-use",
            Self::Last => "last",
            Self::Within => "within",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
        })
    }
}

impl Policy {
    /// The policy of new volumes: every checkpoint of a day, hourly ones for a week, daily ones for a month.
    pub fn of_new_volumes() -> Self {
        Self {
            keep_within_ms: DAY_MS,
            keep_hourly: 7 * 24,
            keep_daily: 30,
            ..Self::default()
        }
    }

    /// Decodes a stored policy.
    ///
    /// # Errors
    /// A text that says what is wrong with `body`. A rule that this release does not know is an error, because what it
    /// keeps must not be removed.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        // In an array the rules would have no names.
        match body.first() {
            Some(b'{') => serde_json::from_slice(body).map_err(|e| e.to_string()),
            _ => Err("it is no JSON object".to_owned()),
        }
    }

    /// Whether it has no rule.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Which of these checkpoints it keeps, and why. They are given by number, ascending, each with the time of its
    /// publish, in milliseconds since 1970-01-01 UTC by its server's clock. None was published after `now_ms`, by the
    /// store's clock.
    ///
    /// Checkpoints were published in the order of their numbers. Where the times contradict that, some clock was wrong,
    /// and it is unknown whether it was early or late. So everything is kept that either assumption would keep: that no
    /// checkpoint was published before one with a lower number, and that none was published after one with a higher
    /// number. Under the first of them one whose clock was behind stands in the period of the one before it, and in its place. So
    /// everything is kept, too, that is kept without those that are out of order: else each round would remove one more of those before.
    ///
    /// A server whose clock is ahead all the time publishes nothing else than what comes after `now_ms`. Under both assumptions all of
    /// that stands in the present period, of which the last one alone would stay, round after round. So everything is kept, too, that
    /// their own times would keep, and that would be kept without them.
    pub fn keep(&self, checkpoints: &[(u64, u64)], now_ms: u64) -> BTreeMap<u64, Vec<Reason>> {
        let [ascending, descending] = orders(checkpoints, now_ms);
        let mut kept = self.keep_ordered(&ascending);
        let mut others = Vec::new();
        if descending != ascending {
            others.push(descending);
            others.push(in_order(checkpoints, now_ms));
        }
        let by_now = checkpoints.iter().copied().filter(|&(_, ms)| ms <= now_ms);
        let by_now: Vec<(u64, u64)> = by_now.collect();
        if by_now.len() < checkpoints.len() {
            let [by_own_times, _] = orders(checkpoints, u64::MAX);
            others.push(by_own_times);
            others.push(in_order(&by_now, now_ms));
        }
        for (cno, reasons) in others.iter().flat_map(|ordered| self.keep_ordered(ordered)) {
            let all = kept.entry(cno).or_default();
            all.extend(reasons);
            all.sort_unstable();
            all.dedup();
        }
        kept
    }

    /// The rules that keep the last checkpoint of each period, with the number of periods.
    pub(super) fn calendar(&self) -> [(Period, u32); 4] {
        [
            (Period::Hour, self.keep_hourly),
            (Period::Day, self.keep_daily),
            (Period::Week, self.keep_weekly),
            (Period::Month, self.keep_monthly),
        ]
    }

    /// As [`Self::keep`], for checkpoints with ascending times.
    fn keep_ordered(&self, checkpoints: &[(u64, u64)]) -> BTreeMap<u64, Vec<Reason>> {
        let latest = checkpoints.last().map_or(0, |&(_, ms)| ms);
        let mut kept: BTreeMap<u64, Vec<Reason>> = BTreeMap::new();
        let oldest_within = latest.saturating_sub(self.keep_within_ms);
        let mut buckets = [
            Bucket::new(Reason::Last, self.keep_last, |cno, _| cno),
            Bucket::new(Reason::Hourly, self.keep_hourly, |_, ms| Period::Hour.at(ms)),
            Bucket::new(Reason::Daily, self.keep_daily, |_, ms| Period::Day.at(ms)),
            Bucket::new(Reason::Weekly, self.keep_weekly, |_, ms| Period::Week.at(ms)),
            Bucket::new(Reason::Monthly, self.keep_monthly, |_, ms| Period::Month.at(ms)),
        ];
        for (from_newest, &(cno, ms)) in checkpoints.iter().rev().enumerate() {
            let is_oldest = from_newest + 1 == checkpoints.len();
            let mut reasons: Vec<Reason> = buckets
                .iter_mut()
                .filter_map(|bucket| bucket.takes(cno, ms, is_oldest).then_some(bucket.reason))
                .collect();
            if self.keep_within_ms > 0 && ms >= oldest_within {
                reasons.push(Reason::Within);
            }
            if !reasons.is_empty() {
                reasons.sort_unstable();
                kept.insert(cno, reasons);
            }
        }
        kept
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("everything is kept");
        }
        let counts = [
            ("--keep-last", self.keep_last),
            ("--keep-hourly", self.keep_hourly),
            ("--keep-daily", self.keep_daily),
            ("--keep-weekly", self.keep_weekly),
            ("--keep-monthly", self.keep_monthly),
        ];
        let within = (self.keep_within_ms > 0).then(|| {
            let within = format_duration(Duration::from_millis(self.keep_within_ms));
            // A bare m is months in restic, so that the option does not take it.
            match within.strip_suffix('m') {
                Some(minutes) => format!("--keep-within {minutes}min"),
                None => format!("--keep-within {within}"),
            }
        });
        let counts = counts.iter().filter(|(_, count)| *count > 0);
        let rules: Vec<String> = within
            .into_iter()
            .chain(counts.map(|(flag, count)| format!("{flag} {count}")))
            .collect();
        f.write_str(&rules.join(" "))
    }
}

/// One kind of period. The newest checkpoint of each period is kept, until the wanted number is reached.
struct Bucket {
    reason: Reason,
    left: u32,
    period: fn(u64, u64) -> u64,
    newest: Option<u64>,
}

impl Bucket {
    fn new(reason: Reason, left: u32, period: fn(u64, u64) -> u64) -> Self {
        Self {
            reason,
            left,
            period,
            newest: None,
        }
    }

    /// Whether it keeps the next older checkpoint. The oldest checkpoint of all is kept when there are fewer periods
    /// than wanted, as restic does, so that history reaches back as far as it can.
    fn takes(&mut self, cno: u64, ms: u64, is_oldest: bool) -> bool {
        let period = (self.period)(cno, ms);
        if self.left == 0 || (self.newest == Some(period) && !is_oldest) {
            return false;
        }
        self.newest = Some(period);
        self.left -= 1;
        true
    }
}

/// The checkpoints with the times that either assumption of [`Policy::keep`] gives them: first that none was published before one
/// with a lower number, then that none was published after one with a higher number.
pub(super) fn orders(checkpoints: &[(u64, u64)], now_ms: u64) -> [Vec<(u64, u64)>; 2] {
    let (mut latest, mut earliest) = (0, now_ms);
    let ascending = checkpoints.iter().map(|&(cno, ms)| {
        latest = ms.min(now_ms).max(latest);
        (cno, latest)
    });
    let ascending: Vec<(u64, u64)> = ascending.collect();
    let descending = checkpoints.iter().rev().map(|&(cno, ms)| {
        earliest = ms.min(earliest);
        (cno, earliest)
    });
    let mut descending: Vec<(u64, u64)> = descending.collect();
    descending.reverse();
    [ascending, descending]
}

/// The checkpoints, with their own times, that were published by `now_ms` and at no time before that of one with a lower number.
pub(super) fn in_order(checkpoints: &[(u64, u64)], now_ms: u64) -> Vec<(u64, u64)> {
    let mut latest = 0;
    let in_order = checkpoints.iter().copied().filter(|&(_, ms)| {
        let is_in_order = latest <= ms && ms <= now_ms;
        latest = ms.max(latest);
        is_in_order
    });
    in_order.collect()
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    const HOUR_MS: u64 = DAY_MS / 24;

    fn at(text: &str) -> u64 {
        text.parse::<Timestamp>().unwrap().as_millisecond() as u64
    }

    fn kept(policy: &Policy, checkpoints: &[(u64, u64)]) -> Vec<u64> {
        policy.keep(checkpoints, u64::MAX).into_keys().collect()
    }

    #[test]
    fn ages_count_from_the_newest_checkpoint() {
        let policy = Policy {
            keep_within_ms: 2 * HOUR_MS,
            ..Policy::default()
        };
        let hour = |n: u64| at("2020-02-01T00:00:00Z") + n * HOUR_MS;
        let checkpoints: Vec<_> = (0..5).map(|n| (n + 1, hour(n))).collect();
        // The result does not depend on the time that the clock shows.
        assert_eq!(kept(&policy, &checkpoints), [3, 4, 5]);
    }

    #[test]
    fn the_last_of_each_period_is_kept_and_periods_without_any_do_not_count() {
        let checkpoints = [
            (1, at("2026-01-30T23:10:00Z")),
            (2, at("2026-01-30T23:50:00Z")),
            (3, at("2026-02-01T08:00:00Z")), // a Sunday
            (4, at("2026-02-02T09:00:00Z")), // a Monday
            (5, at("2026-02-02T09:30:00Z")),
            (6, at("2026-02-02T11:00:00Z")),
        ];
        let policy = |set: fn(&mut Policy)| {
            let mut policy = Policy::default();
            set(&mut policy);
            policy
        };
        assert_eq!(kept(&policy(|p| p.keep_last = 2), &checkpoints), [5, 6]);
        assert_eq!(kept(&policy(|p| p.keep_hourly = 3), &checkpoints), [3, 5, 6]);
        assert_eq!(kept(&policy(|p| p.keep_daily = 2), &checkpoints), [3, 6]);
        assert_eq!(kept(&policy(|p| p.keep_weekly = 2), &checkpoints), [3, 6]);
        assert_eq!(kept(&policy(|p| p.keep_monthly = 1), &checkpoints), [6]);
        // More periods are wanted than there are, so the oldest is kept, too.
        assert_eq!(kept(&policy(|p| p.keep_monthly = 9), &checkpoints), [1, 2, 6]);
        assert_eq!(kept(&policy(|p| p.keep_daily = 9), &checkpoints), [1, 2, 3, 6]);
        let both = policy(|p| {
            p.keep_last = 1;
            p.keep_hourly = 2;
        });
        let reasons = both.keep(&checkpoints, u64::MAX);
        assert_eq!(reasons[&6], [Reason::Last, Reason::Hourly]);
        assert_eq!(reasons[&5], [Reason::Hourly]);
        assert!(kept(&Policy::default(), &checkpoints).is_empty());
    }

    #[test]
    fn a_clock_that_goes_back_makes_nothing_go() {
        let policy = Policy {
            keep_within_ms: DAY_MS,
            ..Policy::default()
        };
        let now = at("2026-11-29T12:00:00Z");
        let mut checkpoints: Vec<_> = (0..10).map(|n| (n + 1, now + n * 1000)).collect();
        assert_eq!(kept(&policy, &checkpoints).len(), 10);
        // The clock goes back to 1970 and continues from there.
        checkpoints.extend((10..20).map(|n| (n + 1, n * 1000)));
        assert_eq!(kept(&policy, &checkpoints).len(), 20);
        // Two hours later the clock is right again.
        checkpoints.push((21, now + 2 * HOUR_MS));
        assert_eq!(kept(&policy, &checkpoints).len(), 21);
        // The checkpoints of that time count as being as old as the last one before them.
        checkpoints.push((22, now + 2 * DAY_MS));
        assert_eq!(kept(&policy, &checkpoints), [22]);
    }

    #[test]
    fn a_clock_that_was_behind_once_makes_nothing_go_round_after_round() {
        let policy = Policy {
            keep_daily: 30,
            ..Policy::default()
        };
        let day = |n: u64| (n + 1, at("2026-11-01T12:00:00Z") + n * DAY_MS);
        let mut listed: Vec<(u64, u64)> = (0..10).map(day).collect();
        listed.push((11, 0));
        listed.extend((11..20).map(day));
        for _ in 0..12 {
            let stays = kept(&policy, &listed);
            listed.retain(|(cno, _)| stays.contains(cno));
        }
        assert_eq!(listed.len(), 20, "{listed:?}");
    }

    #[test]
    fn a_clock_that_was_ahead_for_a_while_makes_nothing_go() {
        let policy = Policy::of_new_volumes();
        let now = at("2026-11-29T12:00:00Z");
        let of_a_day = |ahead: &[u64]| -> Vec<_> {
            let time = |n| {
                if ahead.contains(&n) {
                    now + 365 * DAY_MS
                } else {
                    now - (287 - n) * 300_000
                }
            };
            (0..288).map(|n| (n + 1, time(n))).collect()
        };
        let keep = |checkpoints: &[(u64, u64)]| policy.keep(checkpoints, now).len();
        assert_eq!(keep(&of_a_day(&[])), 288);
        assert_eq!(keep(&of_a_day(&[100])), 288);
        assert_eq!(keep(&of_a_day(&[100, 101, 102, 200])), 288);
        // The newest is by a server whose clock is ahead now; the store's clock is right.
        assert_eq!(keep(&of_a_day(&[287])), 288);
        // A week later that is still so.
        let hourly = Policy {
            keep_hourly: 168,
            ..Policy::default()
        };
        let mut week: Vec<_> = (0..2016).map(|n| (n + 1, now - (2015 - n) * 300_000)).collect();
        week[0].1 = now + 365 * DAY_MS;
        assert!(hourly.keep(&week, now).len() >= 168);
    }

    /// Of a server whose clock is ahead of the store's all the time, as with a store that does not compare them.
    #[test]
    fn a_clock_that_stays_ahead_lets_a_history_grow() {
        let policy = Policy {
            keep_daily: 90,
            ..Policy::default()
        };
        let noon = |day: u64| at("2026-11-01T12:00:00Z") + day * DAY_MS;
        let mut listed: Vec<(u64, u64)> = Vec::new();
        for day in 0..40 {
            // For thirty days it is ahead by as much.
            let ahead_ms = if (5..35).contains(&day) { 30 * DAY_MS } else { 0 };
            listed.push((day + 1, noon(day) + ahead_ms));
            let stays = policy.keep(&listed, noon(day) + 1000);
            listed.retain(|(cno, _)| stays.contains_key(cno));
            let count = listed.len() as u64;
            assert!(count + 5 > day, "{count} of {}", day + 1);
        }
    }

    #[test]
    fn one_clock_ahead_and_one_behind_leave_what_lies_between() {
        let policy = Policy {
            keep_daily: 60,
            ..Policy::default()
        };
        let noon = |day: u64| at("2026-11-01T12:00:00Z") + day * DAY_MS;
        let mut listed: Vec<(u64, u64)> = (0..31).map(|day| (day + 1, noon(day))).collect();
        listed[10].1 = noon(10) + 365 * DAY_MS;
        listed.push((32, 0));
        for day in 32..36 {
            listed.push((day + 1, noon(day)));
            let stays = policy.keep(&listed, noon(day) + 1000);
            listed.retain(|(cno, _)| stays.contains_key(cno));
        }
        assert!(listed.len() >= 34, "{listed:?}");
    }

    #[test]
    fn new_volumes_keep_a_day_whole_then_hours_then_days() {
        let policy = Policy::of_new_volumes();
        let end = at("2026-11-29T12:00:00Z");
        // One checkpoint every ten minutes, for sixty days.
        let checkpoints: Vec<_> = (0..60 * 144)
            .map(|n| (n + 1, end - (60 * 144 - 1 - n) * 600_000))
            .collect();
        let kept = policy.keep(&checkpoints, end);
        let of = |reason| kept.values().filter(|r| r.contains(&reason)).count();
        assert_eq!(of(Reason::Within), 145);
        assert_eq!(of(Reason::Hourly), 168);
        assert_eq!(of(Reason::Daily), 30);
        assert!(kept.len() < 145 + 168 + 30, "{}", kept.len());
        assert_eq!(
            policy.to_string(),
            "--keep-within 24h --keep-hourly 168 --keep-daily 30"
        );
    }

    #[test]
    fn minutes_are_not_written_as_restic_writes_months() {
        for (ms, shown) in [(90 * 60_000, "90min"), (1500, "1500ms"), (2 * DAY_MS, "2d")] {
            let policy = Policy {
                keep_within_ms: ms,
                ..Policy::default()
            };
            assert_eq!(policy.to_string(), format!("--keep-within {shown}"));
        }
    }

    #[test]
    fn a_rule_of_a_later_release_is_not_overlooked() {
        let policy = Policy::of_new_volumes();
        let body = serde_json::to_vec(&policy).unwrap();
        assert_eq!(Policy::decode(&body), Ok(policy));
        assert!(Policy::decode(br#"{"keep_last":3,"keep_yearly":2}"#).is_err());
    }
}
