//! Single decisions of the group commit. `checkpoint/machine_tests.rs` tests it as a part of a simulated world.

use super::*;

fn commit(depth: usize) -> GroupCommit {
    GroupCommit::new(1, GenerationId(4), depth, 1000)
}

fn group(newest: u64) -> Event {
    group_behind(newest, None)
}

fn group_behind(newest: u64, behind: Option<u64>) -> Event {
    Event::Snapshot(Snapshot::Record {
        newest: GenerationId(newest),
        len_bytes: 100,
        behind: behind.map(GenerationId),
    })
}

fn ended(sequence: u64, end: AppendEnd) -> Event {
    Event::AppendEnded { sequence, end }
}

fn durable(id: u64) -> Action {
    Action::Answer(FlushId(id), FlushAnswer::Durable)
}

/// One flush and one record.
fn flush(commit: &mut GroupCommit, id: u64, newest: u64) {
    assert!(matches!(
        commit.on(Event::Flush(FlushId(id)))[..],
        [Action::Snapshot { .. }]
    ));
    assert!(matches!(commit.on(group(newest))[0], Action::Append { .. }));
}

#[test]
fn groups_are_acknowledged_in_order() {
    let mut c = commit(8);
    for id in 1..=3 {
        flush(&mut c, id, 5);
    }
    assert_eq!(c.on(ended(2, AppendEnd::Durable)), []);
    assert_eq!(c.on(ended(3, AppendEnd::Durable)), []);
    assert_eq!(
        c.on(ended(1, AppendEnd::Durable)),
        [
            Action::Forget { sequence: 1 },
            Action::Forget { sequence: 2 },
            Action::Forget { sequence: 3 },
            durable(1),
            durable(2),
            durable(3)
        ]
    );
}

#[test]
fn flushes_that_find_no_place_share_the_next_group() {
    let mut c = commit(1);
    flush(&mut c, 1, 5);
    for id in 2..=5 {
        assert_eq!(c.on(Event::Flush(FlushId(id))), []);
    }
    let next = c.on(ended(1, AppendEnd::Durable));
    assert_eq!(
        next,
        [
            Action::Forget { sequence: 1 },
            durable(1),
            Action::Snapshot { sequence: 2 }
        ]
    );
    c.on(group(5));
    assert_eq!(
        c.on(ended(2, AppendEnd::Durable)).len(),
        5,
        "four answers and a group"
    );
}

#[test]
fn a_flush_that_finds_nothing_waits_for_the_groups_before_it() {
    let mut c = commit(8);
    assert_eq!(c.on(Event::Flush(FlushId(1))), [Action::Snapshot { sequence: 1 }]);
    assert_eq!(
        c.on(Event::Snapshot(Snapshot::Nothing { behind: None })),
        [durable(1)]
    );
    flush(&mut c, 2, 5);
    c.on(Event::Flush(FlushId(3)));
    assert_eq!(c.on(Event::Snapshot(Snapshot::Nothing { behind: None })), []);
    assert_eq!(c.on(ended(1, AppendEnd::Durable)).len(), 3);
}

#[test]
fn a_failed_group_is_appended_again_and_flushes_go_by_checkpoints_meanwhile() {
    let mut c = commit(8);
    flush(&mut c, 1, 5);
    assert_eq!(
        c.on(ended(1, AppendEnd::Failed)),
        [
            Action::ArmRetry {
                sequence: 1,
                attempt: 1
            },
            Action::NeedsCheckpoint(FlushId(1))
        ]
    );
    assert_eq!(
        c.on(Event::Flush(FlushId(2))),
        [Action::NeedsCheckpoint(FlushId(2))]
    );
    assert_eq!(
        c.on(Event::RetryDue { sequence: 1 }),
        [Action::Append { sequence: 1 }]
    );
    assert_eq!(
        c.on(ended(1, AppendEnd::Durable)),
        [Action::Forget { sequence: 1 }, durable(1)]
    );
    flush(&mut c, 3, 5);
}

#[test]
fn a_checkpoint_stands_in_for_a_missing_group() {
    let mut c = commit(8);
    flush(&mut c, 1, 5);
    flush(&mut c, 2, 6);
    c.on(ended(2, AppendEnd::Durable));
    // The second record is stored, but behind a gap, which the next owner would seal.
    assert_eq!(c.on(Event::Published(GenerationId(5))), [durable(1)]);
    assert_eq!(c.live_bytes(), 100);
    assert_eq!(c.on(Event::Published(GenerationId(6))), [durable(2)]);
}

#[test]
fn a_generation_too_large_for_the_log_is_waited_for() {
    let mut c = commit(8);
    c.on(Event::Flush(FlushId(1)));
    assert_eq!(
        c.on(group_behind(6, Some(5))),
        [Action::Append { sequence: 1 }, Action::RetryPublish]
    );
    assert_eq!(
        c.on(ended(1, AppendEnd::Durable)),
        [Action::Forget { sequence: 1 }]
    );
    assert_eq!(c.on(Event::Published(GenerationId(5))), [durable(1)]);
    c.on(Event::Flush(FlushId(2)));
    assert_eq!(
        c.on(Event::Snapshot(Snapshot::TooLarge)),
        [Action::NeedsCheckpoint(FlushId(2))]
    );
}

#[test]
fn a_full_log_asks_for_a_checkpoint() {
    let mut c = commit(8);
    let mut wanted = 0;
    for id in 1..=10 {
        c.on(Event::Flush(FlushId(id)));
        wanted += c
            .on(group(5))
            .iter()
            .filter(|a| **a == Action::WantCheckpoint)
            .count();
        c.on(ended(id, AppendEnd::Durable));
    }
    assert_eq!(wanted, 1, "once, at half");
    assert_eq!(
        c.on(Event::Flush(FlushId(11))),
        [Action::NeedsCheckpoint(FlushId(11))]
    );
    c.on(Event::Published(GenerationId(5)));
    flush(&mut c, 12, 6);
}

#[test]
fn a_sealed_log_answers_everybody_with_the_truth() {
    let mut c = commit(1);
    flush(&mut c, 1, 5);
    c.on(Event::Flush(FlushId(2)));
    let fenced = |id| Action::Answer(FlushId(id), FlushAnswer::Fenced);
    assert_eq!(
        c.on(ended(1, AppendEnd::Fenced)),
        [fenced(1), fenced(2), Action::Fence]
    );
    assert_eq!(c.on(Event::Flush(FlushId(3))), [fenced(3)]);
    assert_eq!(c.on(ended(1, AppendEnd::Durable)), []);
}
