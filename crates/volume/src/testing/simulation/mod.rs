//! A volume, its log and its lease over a faulty store: one seed is one history, and all of its rules hold together.
//!
//! The machines are the real ones: `Take` and `Keep` of the lease, `Machine` and `GroupCommit` of the volume and its
//! log, `Replay`. The shells around them are rewritten as tasks ([`shells`], [`wal`]) whose every request is a step of its own.
//! Owners open, serve, stand still, are killed, close and start again in any order; requests never arrive, arrive late,
//! or are carried out without an answer; clocks say anything. What must hold:
//!
//! * *O1*: once an owner serves, none of an earlier epoch publishes.
//! * *L1*, *W4*: whatever a flush covers that anybody answered is in what the newest owner shows.
//! * *L2*: an opening brings back all of that, replaces none by an older write, and shows nothing of an older owner that
//!   the last one did not show. A sound log is never refused.
//! * *W1*: what is published and what is not are, at any moment, what the owner's clients wrote.
//!
//! A failure names its seed; `HYPERNBD_SIMULATION_SEED=<seed>` runs that history alone.

mod history;
mod owner;
mod shells;
mod store;
mod wal;

use history::{History, Seen};
use shells::Defences;

/// Together they are 10,000; four tests, since the tests of a binary run beside each other.
const HISTORIES_A_TEST: u64 = 2500;

const ALL: Defences = Defences {
    rewrite: true,
    check: true,
    seals: true,
    raise: true,
    end: true,
};

/// Says which history it was when one of the machines' own assertions fails.
struct Naming(u64);

impl Drop for Naming {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the simulation failed: HYPERNBD_SIMULATION_SEED={}", self.0);
        }
    }
}

fn run(first: u64) {
    let replayed = std::env::var("HYPERNBD_SIMULATION_SEED").ok();
    let seeds = match &replayed {
        Some(seed) => {
            let seed = seed.parse().expect("HYPERNBD_SIMULATION_SEED is a number");
            seed..seed + 1
        }
        None => first..first + HISTORIES_A_TEST,
    };
    let mut seen = Seen::default();
    for seed in seeds {
        let naming = Naming(seed);
        let (violation, of_this) = History::new(seed, ALL).run();
        assert_eq!(violation, None);
        drop(naming);
        seen.acknowledged += of_this.acknowledged;
        seen.served += of_this.served;
        seen.fenced += of_this.fenced;
        seen.closed += of_this.closed;
    }
    println!("{seen:?}");
    let is_lively = seen.acknowledged > 8000 && seen.served > 5000 && seen.fenced > 500 && seen.closed > 500;
    assert!(replayed.is_some() || is_lively, "{seen:?}");
}

#[test]
fn all_rules_hold_in_histories_from_0() {
    run(0);
}

#[test]
fn all_rules_hold_in_histories_from_2500() {
    run(HISTORIES_A_TEST);
}

#[test]
fn all_rules_hold_in_histories_from_5000() {
    run(2 * HISTORIES_A_TEST);
}

#[test]
fn all_rules_hold_in_histories_from_7500() {
    run(3 * HISTORIES_A_TEST);
}

/// The rule that is broken first without one of the defences.
fn broken_without(defences: Defences) -> Option<String> {
    (0..4 * HISTORIES_A_TEST).find_map(|seed| {
        let _naming = Naming(seed);
        History::new(seed, defences)
            .run()
            .0
            .map(|what| format!("seed {seed}: {what}"))
    })
}

#[test]
fn without_the_rewrite_of_the_inode_a_rule_breaks() {
    let rewrite = false;
    let broken = broken_without(Defences { rewrite, ..ALL });
    println!("{broken:?}");
    assert!(broken.is_some());
}

#[test]
fn without_the_check_of_the_lease_a_rule_breaks() {
    let check = false;
    let broken = broken_without(Defences { check, ..ALL });
    println!("{broken:?}");
    assert!(broken.is_some());
}

#[test]
fn without_seals_a_rule_breaks() {
    let seals = false;
    let broken = broken_without(Defences { seals, ..ALL });
    println!("{broken:?}");
    assert!(broken.is_some());
}

#[test]
fn without_raising_the_watermark_a_rule_breaks() {
    let raise = false;
    let broken = broken_without(Defences { raise, ..ALL });
    println!("{broken:?}");
    assert!(broken.is_some());
}

#[test]
fn without_a_clean_end_that_leaves_the_marker_a_rule_breaks() {
    let end = false;
    let broken = broken_without(Defences { end, ..ALL });
    println!("{broken:?}");
    assert!(broken.is_some());
}
