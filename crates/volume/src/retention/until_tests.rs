use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;

use super::super::choice::{Protected, kept};
use super::super::periods::DAY_MS;
use super::*;

const HOUR_MS: u64 = DAY_MS / 24;

fn at(text: &str) -> u64 {
    text.parse::<Timestamp>().unwrap().as_millisecond() as u64
}

fn numbered(times: impl IntoIterator<Item = u64>) -> Vec<(u64, u64)> {
    (1..).zip(times).collect()
}

fn told_of(
    checkpoints: &[(u64, u64)],
    policy: Option<&Policy>,
    protected: &Protected,
    now_ms: u64,
) -> BTreeMap<u64, Until> {
    until(
        checkpoints,
        policy,
        &kept(checkpoints, policy, protected, now_ms),
        now_ms,
    )
}

fn told(checkpoints: &[(u64, u64)], policy: &Policy, now_ms: u64) -> BTreeMap<u64, Until> {
    told_of(checkpoints, Some(policy), &Protected::default(), now_ms)
}

/// Whether a checkpoint is kept once others were published at these times.
fn is_kept_after(checkpoints: &[(u64, u64)], later: &[u64], policy: &Policy, cno: u64) -> bool {
    let mut all = checkpoints.to_vec();
    let next = checkpoints.len() as u64 + 1;
    all.extend((next..).zip(later.iter().copied()));
    let now_ms = later.last().copied().unwrap_or(u64::MAX);
    kept(&all, Some(policy), &Protected::default(), now_ms).contains_key(&cno)
}

/// The same with a round of removing after each of them.
fn is_kept_by_rounds(checkpoints: &[(u64, u64)], later: &[u64], policy: &Policy, cno: u64) -> bool {
    let mut listed = checkpoints.to_vec();
    let next = checkpoints.len() as u64 + 1;
    for (number, ms) in (next..).zip(later.iter().copied()) {
        listed.push((number, ms));
        let kept = kept(&listed, Some(policy), &Protected::default(), ms);
        listed.retain(|(cno, _)| kept.contains_key(cno));
    }
    listed.iter().any(|(listed, _)| *listed == cno)
}

/// Times from one to another, with both, so that each period in between has one of which these tests have rules.
fn in_each_period(from_ms: u64, to_ms: u64) -> Vec<u64> {
    let after = |period: Period, most: u64| {
        let present = period.at(from_ms);
        (1..=most).map(move |number| period.start(present + number))
    };
    let starts = after(Period::Hour, 10).chain(after(Period::Day, 150));
    let mut times: BTreeSet<u64> = starts.filter(|ms| (from_ms..to_ms).contains(ms)).collect();
    times.extend([from_ms, to_ms]);
    times.into_iter().collect()
}

fn policies() -> impl Strategy<Value = Policy> {
    let keep_last = prop_oneof![3 => Just(0_u32), 1 => 1..30_u32];
    let within = prop_oneof![Just(0_u64), 1..3 * DAY_MS];
    let periods = (0..6_u32, 0..5_u32, 0..3_u32, 0..3_u32);
    let policies = (keep_last, within, periods).prop_map(|(keep_last, keep_within_ms, periods)| {
        let (keep_hourly, keep_daily, keep_weekly, keep_monthly) = periods;
        Policy {
            keep_last,
            keep_within_ms,
            keep_hourly,
            keep_daily,
            keep_weekly,
            keep_monthly,
        }
    });
    policies.prop_filter("a policy has a rule", |policy| !policy.is_empty())
}

/// Checkpoints in the order of their times, and the present.
fn histories() -> impl Strategy<Value = (Vec<(u64, u64)>, u64)> {
    let most = prop_oneof![Just(HOUR_MS), Just(6 * HOUR_MS), Just(DAY_MS), Just(20 * DAY_MS)];
    let gaps = most.prop_flat_map(|most| (vec(0..most, 1..40), 0..most));
    gaps.prop_map(|(gaps, rest)| {
        let mut ms = at("2026-01-20T00:00:00Z");
        let times = gaps.into_iter().map(|gap| {
            ms += gap;
            ms
        });
        let times: Vec<u64> = times.collect();
        let now_ms = times[times.len() - 1] + rest;
        (numbered(times), now_ms)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn what_is_told_to_be_kept_is_kept_whatever_comes(
        (checkpoints, now_ms) in histories(),
        policy in policies(),
        places in vec(0_u64..1000, 1..12)
    ) {
        for (cno, until) in told(&checkpoints, &policy, now_ms) {
            match until {
                Until::Time(end) if end > now_ms => {
                    let last = end - 1;
                    let many = in_each_period(now_ms, last);
                    prop_assert!(is_kept_after(&checkpoints, &many, &policy, cno), "{} before {}", cno, end);
                    let some = places.iter().map(|place| now_ms + (last - now_ms) * place / 1000);
                    let mut some: Vec<u64> = some.collect();
                    some.sort_unstable();
                    prop_assert!(is_kept_by_rounds(&checkpoints, &some, &policy, cno), "{} before {}", cno, end);
                }
                Until::Newest(count) => {
                    let newer = checkpoints.len() as u64 - cno;
                    let later = vec![now_ms; (count - newer - 1) as usize];
                    prop_assert!(is_kept_by_rounds(&checkpoints, &later, &policy, cno), "{} of {}", cno, count);
                }
                _ => {}
            }
        }
    }

    #[test]
    fn what_is_told_to_be_kept_may_go_right_after(
        (checkpoints, now_ms) in histories(),
        policy in policies()
    ) {
        for (cno, until) in told(&checkpoints, &policy, now_ms) {
            let end = match until {
                Until::Time(end) => end.max(now_ms),
                Until::Newest(_) => now_ms,
                Until::Ever | Until::InUse => return Err(TestCaseError::fail(format!("{cno}: {until:?}"))),
            };
            let mut later = in_each_period(now_ms, end + 1);
            later.extend(vec![end + 1; NEWEST_KEPT.max(policy.keep_last as usize)]);
            prop_assert!(!is_kept_after(&checkpoints, &later, &policy, cno), "{}: {:?}", cno, until);
        }
    }

    #[test]
    fn wrong_clocks_make_no_time_too_late(
        times in vec(0..60 * DAY_MS, 1..40),
        now_ms in 0..60 * DAY_MS,
        policy in policies(),
        places in vec(0_u64..1000, 1..40)
    ) {
        let begin = at("2026-01-20T00:00:00Z");
        let now_ms = begin + now_ms;
        let checkpoints = numbered(times.into_iter().map(|ms| begin + ms));
        for (cno, until) in told(&checkpoints, &policy, now_ms) {
            if let Until::Time(end) = until
                && end > now_ms
            {
                let last = end - 1;
                let later = in_each_period(now_ms, last);
                prop_assert!(is_kept_after(&checkpoints, &later, &policy, cno), "{} before {}", cno, end);
                let some = places.iter().map(|place| now_ms + (last - now_ms) * place / 1000);
                let mut some: Vec<u64> = some.collect();
                some.sort_unstable();
                prop_assert!(is_kept_by_rounds(&checkpoints, &some, &policy, cno), "{} before {}", cno, end);
            }
        }
    }
}

#[test]
fn the_rules_of_new_volumes_are_told_ahead() {
    let times = [
        "2026-11-27T23:50:00Z",
        "2026-11-28T10:00:00Z",
        "2026-11-29T12:10:00Z",
    ];
    let checkpoints = numbered(times.map(at));
    let policy = Policy::of_new_volumes();
    let ends = |now: &str| {
        let told = told(&checkpoints, &policy, at(now));
        told.into_values().collect::<Vec<_>>()
    };
    let time = |text| Until::Time(at(text));
    assert_eq!(
        ends("2026-11-29T12:30:00Z"),
        [
            // The last ones of their days, of thirty days: one day after the first has a checkpoint, none after the second.
            time("2026-12-27T00:00:00Z"),
            time("2026-12-28T00:00:00Z"),
            // Today may have another last one. Of 24 hours all are kept.
            time("2026-11-30T12:10:00Z"),
        ]
    );
    // The volume rests, and nothing goes meanwhile.
    assert_eq!(
        ends("2027-03-01T09:00:00Z"),
        [
            time("2027-03-28T00:00:00Z"),
            time("2027-03-29T00:00:00Z"),
            time("2027-03-30T00:00:00Z")
        ]
    );
}

#[test]
fn of_wrong_clocks_either_order_tells() {
    let noon = at("2026-11-20T12:00:00Z");
    let policy = Policy {
        keep_daily: 10,
        ..Policy::default()
    };
    let of_five_days = |wrong: u64, ms: u64| {
        let times = (0..5).map(|day| if day + 1 == wrong { ms } else { noon + day * DAY_MS });
        told(&numbered(times), &policy, noon + 5 * DAY_MS)
    };
    // The second was published by a clock that was ahead, the fourth by one that was behind.
    let ahead = of_five_days(2, noon + 365 * DAY_MS);
    assert_eq!(ahead[&4], Until::Time(at("2026-12-03T00:00:00Z")));
    let behind = of_five_days(4, 0);
    assert_eq!(behind[&2], Until::Time(at("2026-12-02T00:00:00Z")));
}

#[test]
fn nothing_is_told_by_the_time_of_one_that_goes_before() {
    let noon = at("2026-11-20T12:00:00Z");
    let policy = Policy {
        keep_daily: 10,
        ..Policy::default()
    };
    // The third was published by a clock that was ahead. Once it is gone, the second is not the last of its day.
    let times = [noon, noon + HOUR_MS, noon + 365 * DAY_MS, noon + 2 * HOUR_MS];
    let told = told(&numbered(times), &policy, noon + 5 * DAY_MS);
    assert_eq!(told[&2], Until::Newest(NEWEST_KEPT as u64));
    assert_eq!(told[&4], Until::Time(at("2026-12-04T00:00:00Z")));
}

#[test]
fn where_no_time_is_told_the_reason_is() {
    let begin = at("2026-11-29T00:00:00Z");
    let checkpoints = numbered((0..40).map(|n| begin + n * 60_000));
    let within = Policy {
        keep_within_ms: HOUR_MS,
        ..Policy::default()
    };
    let protected = Protected {
        named: [2].into(),
        in_use: [3].into(),
    };
    let rests = told_of(&checkpoints, Some(&within), &protected, begin + DAY_MS);
    assert_eq!(
        rests[&1],
        Until::Time(begin + HOUR_MS),
        "the next one may be its end"
    );
    assert_eq!((rests[&2], rests[&3]), (Until::Ever, Until::InUse));
    assert_eq!((rests[&25], rests[&40]), (Until::Newest(16), Until::Newest(16)));
    let busy = told_of(&checkpoints, Some(&within), &protected, begin + HOUR_MS * 3 / 4);
    assert_eq!(
        (busy[&2], busy[&3]),
        (Until::Ever, Until::Time(begin + 2 * 60_000 + HOUR_MS))
    );
    let last = Policy {
        keep_last: 30,
        ..Policy::default()
    };
    let of_last = told(&checkpoints, &last, begin + DAY_MS);
    assert_eq!(of_last.len(), 30);
    assert!(of_last.values().all(|until| *until == Until::Newest(30)));
    let everything = told_of(&checkpoints, None, &Protected::default(), begin + DAY_MS);
    assert!(everything.len() == 40 && everything.values().all(|until| *until == Until::Ever));
    // Longer than there are dates.
    let hourly = Policy {
        keep_hourly: u32::MAX,
        ..Policy::default()
    };
    assert_eq!(told(&checkpoints, &hourly, begin + DAY_MS)[&1], Until::Ever);
}
