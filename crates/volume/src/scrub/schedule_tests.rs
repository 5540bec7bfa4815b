//! Passes over starts, failures, clocks that are set, and volumes that change.

use super::*;

const DAY_MS: u64 = 24 * 3600 * 1000;
const MONTH: Duration = Duration::from_secs(30 * 24 * 3600);
/// Some moment.
const T0: u64 = 1_800_000_000_000;

fn object(cno: u64) -> u64 {
    cno << 32 | 1
}

/// Objects of a mebibyte of these checkpoints.
fn there(numbers: impl IntoIterator<Item = u64>) -> BTreeMap<u64, u64> {
    numbers.into_iter().map(|cno| (object(cno), 1 << 20)).collect()
}

fn fresh(interval: Duration) -> Schedule {
    Schedule::new(interval, T0, None, None)
}

fn look(schedule: &mut Schedule, now_ms: u64, newest: u64, there: &BTreeMap<u64, u64>) -> bool {
    let looked = Looked {
        newest,
        there,
        again: &BTreeSet::new(),
        is_suspecting: false,
    };
    schedule.looked(now_ms, &looked)
}

fn whole() -> ReadObject {
    ReadObject {
        verified_bytes: 1 << 20,
        ..ReadObject::default()
    }
}

/// Does what is due until there is a wait, at one moment. Returns the checkpoints of the objects that were read.
fn read_all(schedule: &mut Schedule, now_ms: u64) -> Vec<u64> {
    let mut read = Vec::new();
    loop {
        match schedule.next(now_ms) {
            Next::Read { object, .. } => {
                read.push(cno_of(object));
                schedule.read(now_ms, whole());
            }
            Next::Save => schedule.saved(now_ms),
            Next::Confirm => schedule.confirmed(now_ms),
            Next::Wait(_) | Next::Look => return read,
        }
    }
}

#[test]
fn a_volume_that_was_never_read_is_read_soon_after_the_start() {
    let mut schedule = fresh(MONTH);
    assert_eq!(schedule.next(T0), Next::Wait(START_WAIT));
    let now = T0 + 10_000;
    assert_eq!(schedule.next(now), Next::Look);
    assert!(look(&mut schedule, now, 3, &there(1..=3)));
    assert_eq!(
        schedule.next(now),
        Next::Read {
            object: object(1),
            len_bytes: 1 << 20
        }
    );
    assert_eq!(read_all(&mut schedule, now), [1, 2, 3]);
    let last = schedule.last().unwrap();
    assert_eq!(
        (last.began_ms, last.ended_ms, last.objects, last.verified_bytes),
        (now, now, 3, 3 << 20)
    );
    assert_eq!(schedule.pass(), None);
    // The next one is due a month after this one began, and not before.
    let before = now + 30 * DAY_MS - 1;
    assert!(matches!(schedule.next(before), Next::Wait(wait) if wait == Duration::from_millis(1)));
    assert_eq!(schedule.next(before + 1), Next::Look);
}

#[test]
fn a_pass_goes_on_where_it_was_after_a_start() {
    let mut schedule = fresh(MONTH);
    look(&mut schedule, T0, 9, &there(1..=9));
    for _ in 0..4 {
        schedule.read(T0, whole());
    }
    let (pass, last) = (schedule.pass(), schedule.last());
    // Two days later, on another machine: what was read is not read again, and what came since is for the next pass.
    let now = T0 + 2 * DAY_MS;
    let mut schedule = Schedule::new(MONTH, now, pass, last);
    let now = now + 10_000;
    assert_eq!(schedule.next(now), Next::Look);
    assert!(!look(&mut schedule, now, 12, &there(1..=12)));
    assert_eq!(read_all(&mut schedule, now), [5, 6, 7, 8, 9]);
    let last = schedule.last().unwrap();
    assert_eq!((last.began_ms, last.objects), (T0, 9));
    // A start after the end of a pass begins none.
    let later = now + DAY_MS;
    let ended = Schedule::new(MONTH, later, None, schedule.last());
    assert!(matches!(ended.next(later + 60_000), Next::Wait(_)));
}

#[test]
fn what_is_needed_is_looked_up_again_every_day_of_a_long_pass() {
    let mut schedule = fresh(MONTH);
    look(&mut schedule, T0, 9, &there(1..=9));
    schedule.read(T0, whole());
    let later = T0 + DAY_MS;
    schedule.saved(later);
    assert_eq!(schedule.next(later), Next::Look);
    // Retention has removed some meanwhile.
    look(&mut schedule, later, 20, &there([1, 2, 8, 9, 10]));
    assert_eq!(read_all(&mut schedule, later), [2, 8, 9]);
    assert_eq!(schedule.last().unwrap().objects, 4);
}

#[test]
fn a_volume_that_went_back_is_read_anew() {
    let pass = ScrubPass {
        after: object(40),
        ..ScrubPass::new(T0, 50)
    };
    let mut schedule = Schedule::new(MONTH, T0, Some(pass), None);
    assert!(look(&mut schedule, T0 + 1, 45, &there([1, 44, 45])));
    assert_eq!(read_all(&mut schedule, T0 + 1), [1, 44, 45]);
}

#[test]
fn progress_is_stored_once_a_minute_and_news_at_once() {
    let mut schedule = fresh(MONTH);
    look(&mut schedule, T0, 9, &there(1..=9));
    schedule.read(T0, whole());
    assert!(matches!(schedule.next(T0 + 59_999), Next::Read { .. }));
    assert_eq!(schedule.next(T0 + 60_000), Next::Save);
    schedule.saved(T0 + 60_000);
    assert!(matches!(schedule.next(T0 + 120_000), Next::Read { .. }));
    schedule.damage_changed(true);
    assert_eq!(schedule.next(T0 + 60_001), Next::Save);
    // A store that takes nothing is not asked again and again, and reading goes on.
    schedule.save_failed(T0 + 60_001);
    assert!(matches!(schedule.next(T0 + 60_002), Next::Read { .. }));
    assert_eq!(schedule.next(T0 + 120_001), Next::Save);
    // The end of a pass is news, but for passes that follow each other at once.
    schedule.saved(T0 + 120_001);
    for interval in [MONTH, Duration::from_secs(1)] {
        let mut schedule = fresh(interval);
        look(&mut schedule, T0, 0, &there([]));
        assert_eq!(schedule.next(T0) == Next::Save, interval == MONTH);
    }
}

#[test]
fn what_seems_wrong_is_confirmed_before_a_pass_ends_and_not_too_often() {
    let suspect = ReadObject {
        is_suspect: true,
        ..ReadObject::default()
    };
    let mut schedule = fresh(MONTH);
    look(&mut schedule, T0, 3, &there(1..=3));
    schedule.read(T0, suspect);
    assert_eq!(schedule.next(T0), Next::Confirm);
    schedule.confirmed(T0);
    schedule.read(T0 + 1, suspect);
    // Confirmed a moment ago: the next object first.
    assert!(matches!(schedule.next(T0 + 1), Next::Read { .. }));
    schedule.read(T0 + 2, whole());
    assert!(schedule.pass().is_some(), "it ends once everything is known");
    assert_eq!(schedule.next(T0 + 2), Next::Confirm);
    schedule.confirmed(T0 + 2);
    assert_eq!(schedule.pass(), None);
}

/// A server that is killed in between has not stored that it was past the object.
#[test]
fn what_seems_wrong_is_confirmed_before_it_is_stored_that_it_was_read() {
    let suspect = ReadObject {
        is_suspect: true,
        ..ReadObject::default()
    };
    let mut schedule = fresh(MONTH);
    look(&mut schedule, T0, 3, &there(1..=3));
    schedule.confirmed(T0);
    schedule.read(T0 + 1, suspect);
    assert!(matches!(schedule.next(T0 + 59_999), Next::Read { .. }));
    assert_eq!(schedule.next(T0 + 60_000), Next::Confirm);
    // Other news wait, too.
    schedule.damage_changed(true);
    assert_eq!(schedule.next(T0 + 60_000), Next::Confirm);
    schedule.confirmed(T0 + 60_000);
    assert_eq!(schedule.next(T0 + 60_000), Next::Save);
}

#[test]
fn a_suspect_object_is_read_before_it_is_confirmed() {
    let mut schedule = fresh(MONTH);
    let looked = Looked {
        newest: 3,
        there: &there(1..=3),
        again: &BTreeSet::from([object(2)]),
        is_suspecting: true,
    };
    schedule.looked(T0, &looked);
    assert!(matches!(schedule.next(T0), Next::Read { object: read, .. } if read == object(2)));
    schedule.read(T0, ReadObject::default());
    assert_eq!(schedule.next(T0), Next::Confirm);
    schedule.confirmed(T0);
    assert_eq!(read_all(&mut schedule, T0), [1, 2, 3]);
}

#[test]
fn damage_is_looked_at_again_after_each_start_and_every_day() {
    let last = EndedPass {
        began_ms: T0,
        ended_ms: T0,
        objects: 3,
        verified_bytes: 0,
        unverified_bytes: 0,
    };
    let mut schedule = Schedule::new(MONTH, T0, None, Some(last));
    schedule.remember_damage(true);
    let now = T0 + 10_000;
    assert_eq!(schedule.next(now), Next::Look);
    let damaged = BTreeSet::from([object(2), object(7)]);
    let looked = Looked {
        newest: 3,
        there: &there(1..=3),
        again: &damaged,
        is_suspecting: false,
    };
    assert!(!schedule.looked(now, &looked), "no pass begins for that");
    // The other one is not there, which the look has noticed.
    assert_eq!(read_all(&mut schedule, now), [2]);
    assert_eq!(schedule.last(), Some(last));
    assert!(matches!(schedule.next(now + DAY_MS - 1), Next::Wait(_)));
    assert_eq!(schedule.next(now + DAY_MS), Next::Look);
    schedule.damage_changed(false);
    schedule.saved(now + DAY_MS);
    assert!(matches!(schedule.next(now + DAY_MS), Next::Wait(_)));
}

#[test]
fn what_is_read_again_does_not_move_the_pass() {
    let pass = ScrubPass {
        after: object(3),
        ..ScrubPass::new(T0, 5)
    };
    let mut schedule = Schedule::new(MONTH, T0, Some(pass), None);
    let looked = Looked {
        newest: 5,
        there: &there(1..=5),
        again: &BTreeSet::from([object(2)]),
        is_suspecting: false,
    };
    schedule.looked(T0, &looked);
    schedule.read(T0, whole());
    assert_eq!(schedule.pass().unwrap().after, object(3));
    assert_eq!(read_all(&mut schedule, T0 + 10_000), [4, 5]);
}

#[test]
fn failures_are_waited_out_longer_and_longer() {
    let mut schedule = fresh(MONTH);
    let mut now = T0 + 10_000;
    for (failures, wait_s) in [(1, 10), (2, 20), (3, 40), (4, 80)] {
        assert_eq!(schedule.next(now), Next::Look);
        assert_eq!(schedule.failed(now), failures);
        let wait = Duration::from_secs(wait_s);
        assert_eq!(schedule.next(now), Next::Wait(wait));
        now += wait_s * 1000;
    }
    for _ in 0..100 {
        schedule.failed(now);
    }
    assert_eq!(schedule.next(now), Next::Wait(RETRY_WAIT_MAX));
    now += 3600 * 1000;
    look(&mut schedule, now, 1, &there([1]));
    assert_eq!(read_all(&mut schedule, now), [1]);
}

#[test]
fn a_clock_that_is_set_costs_a_pass_and_no_more() {
    // A pass that ended in a time to come.
    let last = EndedPass {
        began_ms: T0 + 1000 * DAY_MS,
        ended_ms: T0 + 1000 * DAY_MS,
        objects: 0,
        verified_bytes: 0,
        unverified_bytes: 0,
    };
    let mut schedule = Schedule::new(MONTH, T0, None, Some(last));
    let now = T0 + 10_000;
    assert_eq!(schedule.next(now), Next::Look);
    assert!(look(&mut schedule, now, 1, &there([1])));
    assert_eq!(read_all(&mut schedule, now), [1]);
    assert!(matches!(schedule.next(now + DAY_MS), Next::Wait(_)));
    // Set back while nothing is due: one pass more.
    let back = T0 - 5 * DAY_MS;
    assert_eq!(schedule.next(back), Next::Look);
    assert!(look(&mut schedule, back, 1, &there([1])));
    read_all(&mut schedule, back);
    assert!(matches!(schedule.next(back + DAY_MS), Next::Wait(_)));
}

#[test]
fn the_rate_is_what_half_an_interval_asks_for_within_bounds() {
    assert_eq!(rate(1 << 30, MONTH), RATE_LEAST);
    assert_eq!(rate(u64::MAX, MONTH), RATE_MOST);
    let half_s = 15 * 24 * 3600;
    assert_eq!(rate(half_s * (10 << 20), MONTH), 10 << 20);
    assert_eq!(rate(1, Duration::from_millis(1)), RATE_LEAST);
    assert_eq!((cost_bytes(1), cost_bytes(4 << 20)), (REQUEST_BYTES, 4 << 20));
}

/// Whatever comes in between: each object that was there all along is read once a pass, in order.
#[test]
fn every_object_is_read_once_a_pass_whatever_comes_in_between() {
    for seed in 0..200 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (mut newest, mut now) = (20, T0);
        let stays: BTreeSet<u64> = (1..=20).filter(|_| rng.bool()).collect();
        let mut schedule = fresh(MONTH);
        let mut read: Vec<u64> = Vec::new();
        for step in 0.. {
            assert!(step < 10_000, "seed {seed} does not end");
            now += rng.u64(1..30_000);
            if rng.u8(0..20) == 0 {
                // The server ended. What was not stored yet is what it was at the last save, at worst: stored here at once.
                schedule = Schedule::new(MONTH, now, schedule.pass(), schedule.last());
            }
            if schedule.last().is_some() {
                break;
            }
            match schedule.next(now) {
                Next::Wait(wait) => now += wait.as_millis() as u64,
                _ if rng.u8(0..10) == 0 => {
                    schedule.failed(now);
                }
                Next::Look => {
                    newest += rng.u64(0..3);
                    let others = (1..=newest).filter(|cno| *cno > 20 || rng.bool());
                    let there = there(stays.iter().copied().chain(others));
                    look(&mut schedule, now, newest, &there);
                }
                Next::Read { object, .. } => {
                    read.push(cno_of(object));
                    let is_suspect = rng.u8(0..5) == 0;
                    schedule.read(
                        now,
                        ReadObject {
                            is_suspect,
                            ..whole()
                        },
                    );
                }
                Next::Confirm => schedule.confirmed(now),
                Next::Save => schedule.saved(now),
            }
        }
        assert!(read.is_sorted(), "seed {seed}: {read:?}");
        let once: BTreeSet<u64> = read.iter().copied().collect();
        assert_eq!(once.len(), read.len(), "seed {seed}");
        assert!(stays.is_subset(&once), "seed {seed}");
        assert!(!once.iter().any(|cno| *cno > newest));
    }
}
