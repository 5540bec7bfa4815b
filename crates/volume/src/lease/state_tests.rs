//! The state machines of the lease, event by event. `model_tests` has their interplay.

use super::super::tests::record;
use super::*;
use crate::lease::LeaseState;

fn version(text: &str) -> ETag {
    ETag(text.into())
}

fn stored(record: LeaseRecord, at: &str) -> Stored {
    Stored {
        record,
        version: version(at),
    }
}

fn taker(takeover: bool, known_expired: Option<&str>) -> Take {
    Take::new(TakeOptions {
        claim: record("mine", 0),
        takeover,
        known_expired: known_expired.map(version),
    })
}

fn found(record: LeaseRecord, at: &str, holder: Liveness, now_ms: u64) -> TakeEvent {
    TakeEvent::Found {
        stored: stored(record, at),
        holder,
        now_ms,
    }
}

fn in_state(state: LeaseState) -> LeaseRecord {
    LeaseRecord {
        state,
        ..record("other", 4)
    }
}

fn put(epoch: u64, expected: Option<&str>) -> TakeAction {
    TakeAction::Put {
        record: record("mine", epoch),
        expected: expected.map(version),
    }
}

/// As [`put`], for replacing an owner that may still run.
fn put_over_one_that_may_run(epoch: u64, expected: Option<&str>) -> TakeAction {
    TakeAction::Put {
        record: LeaseRecord {
            older_may_run: true,
            ..record("mine", epoch)
        },
        expected: expected.map(version),
    }
}

/// The seals that keep an older owner out of a WAL must stay while that owner is not known to have ended, whoever comes
/// later.
#[test]
fn that_an_older_owner_may_run_is_handed_on() {
    for state in [LeaseState::Released, LeaseState::Abandoned, LeaseState::Held] {
        let after = LeaseRecord {
            older_may_run: true,
            ..in_state(state)
        };
        let asked = taker(false, None).on(found(after, "v4", Liveness::Ended, 0));
        assert_eq!(asked, put_over_one_that_may_run(5, Some("v4")), "{state:?}");
    }
}

#[test]
fn a_first_lease_is_created_above_every_epoch_seen() {
    assert_eq!(
        taker(false, None).on(TakeEvent::Absent { epoch_seen: 0 }),
        put(1, None)
    );
    assert_eq!(
        taker(false, None).on(TakeEvent::Absent { epoch_seen: 7 }),
        put_over_one_that_may_run(8, None)
    );
}

#[test]
fn a_takeover_is_not_put_off_by_a_renewal_but_by_another_takeover() {
    let mut take = taker(true, None);
    let held = |token: &str| LeaseRecord {
        state: LeaseState::Held,
        ..record(token, 4)
    };
    assert_eq!(
        take.on(found(held("other"), "v4", Liveness::Runs, 0)),
        put_over_one_that_may_run(5, Some("v4"))
    );
    assert_eq!(take.on(TakeEvent::PutRefused), TakeAction::Read { wait_ms: 0 });
    assert_eq!(
        take.on(found(held("other"), "v5", Liveness::Runs, 1)),
        put_over_one_that_may_run(5, Some("v5"))
    );
    assert_eq!(take.on(TakeEvent::PutRefused), TakeAction::Read { wait_ms: 0 });
    let third = take.on(found(held("third"), "v6", Liveness::Runs, 2));
    assert!(
        matches!(
            third,
            TakeAction::Refused {
                why: Refusal::TookIt,
                ..
            }
        ),
        "{third:?}"
    );
}

#[test]
fn a_lease_that_is_free_is_replaced_at_once_and_only_a_release_is_trusted() {
    for (lease, holder, takeover, known, is_after_release) in [
        (LeaseState::Released, Liveness::Unknown, false, None, true),
        (LeaseState::Abandoned, Liveness::Unknown, false, None, false),
        (LeaseState::Held, Liveness::Ended, false, None, false),
        (LeaseState::Held, Liveness::Unknown, true, None, false),
        (LeaseState::Held, Liveness::Runs, true, None, false),
        (LeaseState::Held, Liveness::Unknown, false, Some("v4"), false),
    ] {
        let mut take = taker(takeover, known);
        let may_run = lease == LeaseState::Held && holder != Liveness::Ended;
        let expected = if may_run {
            put_over_one_that_may_run(5, Some("v4"))
        } else {
            put(5, Some("v4"))
        };
        assert_eq!(
            take.on(found(in_state(lease), "v4", holder, 0)),
            expected,
            "{lease:?}"
        );
        let taken = take.on(TakeEvent::PutAccepted(version("v5")));
        assert_eq!(
            taken,
            TakeAction::Taken(Taken {
                stored: stored(
                    LeaseRecord {
                        older_may_run: may_run,
                        ..record("mine", 5)
                    },
                    "v5"
                ),
                is_after_release,
                predecessor: Some(in_state(lease).token),
            })
        );
    }
}

#[test]
fn a_holder_that_runs_here_is_respected_at_once() {
    let action = taker(false, None).on(found(in_state(LeaseState::Held), "v4", Liveness::Runs, 0));
    assert!(
        matches!(
            action,
            TakeAction::Refused {
                why: Refusal::RunsHere,
                ..
            }
        ),
        "{action:?}"
    );
}

#[test]
fn a_holder_elsewhere_is_watched_for_the_duration_of_its_lease() {
    let held = in_state(LeaseState::Held);
    let mut take = taker(false, Some("another version"));
    let mut now_ms = 1000;
    let mut looks = 0;
    loop {
        match take.on(found(held.clone(), "v4", Liveness::Unknown, now_ms)) {
            TakeAction::Read { wait_ms } => now_ms += wait_ms,
            action => {
                assert_eq!(action, put_over_one_that_may_run(5, Some("v4")));
                break;
            }
        }
        looks += 1;
    }
    assert_eq!(
        now_ms,
        1000 + held.duration_ms,
        "not before it has run out, and not later"
    );
    assert!(looks >= 10, "looked at often enough to see a renewal soon");
}

#[test]
fn a_holder_seen_to_renew_is_respected() {
    let held = in_state(LeaseState::Held);
    let mut take = taker(false, None);
    take.on(found(held.clone(), "v4", Liveness::Unknown, 0));
    let action = take.on(found(held.clone(), "v5", Liveness::Unknown, 120));
    assert_eq!(
        action,
        TakeAction::Refused {
            by: held,
            why: Refusal::Renewed { watched_ms: 120 }
        }
    );
}

fn asked(stage: GrowthStage) -> GrowthRequest {
    GrowthRequest {
        id: "a request".into(),
        volume_id: record("mine", 5).volume_id,
        size_bytes: 1 << 30,
        asked_ms: 0,
        valid_ms: 1000,
        asked_by: "somebody".into(),
        stage,
    }
}

fn asking(record: LeaseRecord, stage: GrowthStage) -> LeaseRecord {
    LeaseRecord {
        growth: Some(asked(stage)),
        ..record
    }
}

/// Whoever asks a holder that has ended does not make it look alive, nor hide a renewal.
#[test]
fn a_holder_that_is_only_asked_for_something_is_not_seen_to_renew() {
    let held = in_state(LeaseState::Held);
    let mut take = taker(false, None);
    take.on(found(held.clone(), "v4", Liveness::Unknown, 0));
    for (stage, at, now_ms) in [
        (GrowthStage::Asked, "v5", 100),
        (GrowthStage::Withdrawn, "v6", 200),
    ] {
        let action = take.on(found(asking(held.clone(), stage), at, Liveness::Unknown, now_ms));
        assert!(matches!(action, TakeAction::Read { .. }), "{action:?}");
    }
    let last = asking(held.clone(), GrowthStage::Withdrawn);
    let action = take.on(found(last, "v6", Liveness::Unknown, held.duration_ms));
    assert_eq!(action, put_over_one_that_may_run(5, Some("v6")));

    let renewed = asking(
        LeaseRecord {
            renewals: 1,
            ..held.clone()
        },
        GrowthStage::Taken,
    );
    let mut take = taker(false, None);
    take.on(found(held, "v4", Liveness::Unknown, 0));
    let action = take.on(found(renewed, "v5", Liveness::Unknown, 100));
    assert!(matches!(action, TakeAction::Refused { .. }), "{action:?}");
}

#[test]
fn of_two_takers_one_is_refused_whatever_it_was_told() {
    for event in [TakeEvent::PutRefused, TakeEvent::PutUnknown] {
        let mut take = taker(true, None);
        take.on(found(in_state(LeaseState::Held), "v4", Liveness::Unknown, 0));
        assert_eq!(take.on(event), TakeAction::Read { wait_ms: 0 });
        let action = take.on(found(record("third", 5), "v5", Liveness::Unknown, 1));
        assert!(
            matches!(
                action,
                TakeAction::Refused {
                    why: Refusal::TookIt,
                    ..
                }
            ),
            "{action:?}"
        );
    }
}

#[test]
fn the_token_tells_whether_a_write_without_an_answer_was_carried_out() {
    let mut take = taker(false, None);
    take.on(found(in_state(LeaseState::Abandoned), "v4", Liveness::Unknown, 0));
    take.on(TakeEvent::PutUnknown);
    let taken = take.on(found(record("mine", 5), "v5", Liveness::Unknown, 1));
    assert_eq!(
        taken,
        TakeAction::Taken(Taken {
            stored: stored(record("mine", 5), "v5"),
            is_after_release: false,
            predecessor: Some(in_state(LeaseState::Abandoned).token),
        })
    );

    let mut take = taker(false, None);
    let held = in_state(LeaseState::Held);
    for _ in 0..PUTS_MAX {
        assert_eq!(
            take.on(found(held.clone(), "v4", Liveness::Ended, 0)),
            put(5, Some("v4"))
        );
        take.on(TakeEvent::PutUnknown);
    }
    assert_eq!(take.on(found(held, "v4", Liveness::Ended, 0)), TakeAction::GiveUp);
}

fn keeper() -> Keep {
    Keep::new(stored(record("mine", 5), "v1"))
}

fn renewal(renewals: u64) -> LeaseRecord {
    LeaseRecord {
        renewals,
        ..record("mine", 5)
    }
}

#[test]
fn a_lease_is_renewed_again_and_again() {
    let mut keep = keeper();
    for n in 1..4 {
        let expected = version(&format!("v{n}"));
        let record = renewal(n);
        assert_eq!(keep.on(KeepEvent::RenewDue), KeepAction::Put { record, expected });
        let next = version(&format!("v{}", n + 1));
        assert_eq!(keep.on(KeepEvent::PutAccepted(next)), KeepAction::Wait);
    }
}

#[test]
fn a_store_that_is_away_takes_no_lease() {
    let mut keep = keeper();
    for _ in 0..3 {
        keep.on(KeepEvent::RenewDue);
        assert_eq!(keep.on(KeepEvent::PutUnknown), KeepAction::Wait);
    }
    keep.on(KeepEvent::RenewDue);
    assert_eq!(keep.on(KeepEvent::PutRefused), KeepAction::Read);
    assert_eq!(keep.on(KeepEvent::ReadFailed), KeepAction::Wait);
    // One of the unanswered renewals was carried out.
    keep.on(KeepEvent::RenewDue);
    keep.on(KeepEvent::PutRefused);
    let own = KeepEvent::Found(Some(stored(renewal(1), "v2")));
    assert_eq!(keep.on(own), KeepAction::Wait);
    assert_eq!(
        keep.on(KeepEvent::RenewDue),
        KeepAction::Put {
            record: renewal(2),
            expected: version("v2")
        }
    );
}

/// A lease in which somebody has asked for something, as a renewal that was refused finds it.
fn keeper_that_is_asked() -> (Keep, KeepAction) {
    let mut keep = keeper();
    keep.on(KeepEvent::RenewDue);
    assert_eq!(keep.on(KeepEvent::PutRefused), KeepAction::Read);
    let found = stored(asking(record("mine", 5), GrowthStage::Asked), "asked");
    let action = keep.on(KeepEvent::Found(Some(found)));
    (keep, action)
}

fn put_over(record: LeaseRecord, at: &str) -> KeepAction {
    KeepAction::Put {
        record,
        expected: version(at),
    }
}

#[test]
fn a_request_is_carried_out_once_it_is_stored_as_taken_and_its_end_is_told() {
    let (mut keep, action) = keeper_that_is_asked();
    assert_eq!(action, put_over(asking(renewal(1), GrowthStage::Taken), "asked"));
    let begun = keep.on(KeepEvent::PutAccepted(version("v2")));
    assert_eq!(begun, KeepAction::Grow(asked(GrowthStage::Asked)));
    // Renewals go on meanwhile.
    let renewed = keep.on(KeepEvent::RenewDue);
    assert_eq!(renewed, put_over(asking(renewal(2), GrowthStage::Taken), "v2"));
    assert_eq!(keep.on(KeepEvent::PutAccepted(version("v3"))), KeepAction::Wait);
    let grown = GrowthStage::Grown { size_bytes: 1 << 30 };
    let told = keep.on(KeepEvent::GrowthEnded(grown.clone()));
    assert_eq!(told, put_over(asking(renewal(3), grown.clone()), "v3"));
    // It is told until there is another one.
    assert_eq!(keep.on(KeepEvent::PutUnknown), KeepAction::Wait);
    assert_eq!(
        keep.on(KeepEvent::RenewDue),
        put_over(asking(renewal(3), grown), "v3")
    );
}

#[test]
fn a_request_whose_taking_had_no_answer_is_carried_out_when_it_is_found_stored() {
    let (mut keep, _) = keeper_that_is_asked();
    assert_eq!(keep.on(KeepEvent::PutUnknown), KeepAction::Wait);
    keep.on(KeepEvent::RenewDue);
    assert_eq!(keep.on(KeepEvent::PutRefused), KeepAction::Read);
    let taken = || KeepEvent::Found(Some(stored(asking(renewal(1), GrowthStage::Taken), "v2")));
    assert_eq!(keep.on(taken()), KeepAction::Grow(asked(GrowthStage::Asked)));
    assert_eq!(keep.on(taken()), KeepAction::Wait, "once");
}

#[test]
fn a_request_that_was_withdrawn_before_it_was_taken_is_never_carried_out() {
    let (mut keep, _) = keeper_that_is_asked();
    assert_eq!(keep.on(KeepEvent::PutRefused), KeepAction::Read);
    let withdrawn = stored(asking(record("mine", 5), GrowthStage::Withdrawn), "withdrawn");
    let renewed = keep.on(KeepEvent::Found(Some(withdrawn)));
    assert_eq!(renewed, put_over(renewal(1), "withdrawn"));
    assert_eq!(keep.on(KeepEvent::PutAccepted(version("v2"))), KeepAction::Wait);
}

/// Whoever watches the lease for its duration would take it from a holder that waited for its next turn each time.
#[test]
fn a_renewal_that_meets_what_others_wrote_is_made_at_once_however_often() {
    let mut keep = keeper();
    keep.on(KeepEvent::RenewDue);
    for at in ["w1", "w2", "w3", "w4"] {
        assert_eq!(keep.on(KeepEvent::PutRefused), KeepAction::Read);
        let withdrawn = stored(asking(record("mine", 5), GrowthStage::Withdrawn), at);
        let again = keep.on(KeepEvent::Found(Some(withdrawn.clone())));
        assert_eq!(again, put_over(renewal(1), at));
        // A look that shows nothing new ends it.
        let mut same = keeper();
        same.on(KeepEvent::Found(Some(withdrawn.clone())));
        same.on(KeepEvent::PutRefused);
        assert_eq!(same.on(KeepEvent::Found(Some(withdrawn))), KeepAction::Wait);
    }
    assert_eq!(keep.on(KeepEvent::PutAccepted(version("v2"))), KeepAction::Wait);
}

/// Who takes a lease whose holder is known to have gone is not kept from it by somebody who asks that holder.
#[test]
fn a_write_that_met_a_request_is_made_over_the_request() {
    let held = in_state(LeaseState::Held);
    let begun = || {
        let mut take = taker(false, None);
        let first = take.on(found(held.clone(), "v4", Liveness::Ended, 0));
        assert_eq!(first, put(5, Some("v4")));
        assert_eq!(take.on(TakeEvent::PutRefused), TakeAction::Read { wait_ms: 0 });
        take
    };
    let is_asked = asking(held.clone(), GrowthStage::Asked);
    let again = begun().on(found(is_asked, "v5", Liveness::Ended, 0));
    assert_eq!(again, put(5, Some("v5")));
    let renewed = LeaseRecord {
        renewals: 1,
        ..held.clone()
    };
    let refused = begun().on(found(renewed, "v5", Liveness::Unknown, 0));
    assert!(matches!(refused, TakeAction::Refused { .. }), "{refused:?}");
}

#[test]
fn a_request_for_another_volume_is_refused_and_one_in_a_lease_that_is_given_back_is_dropped() {
    let mut keep = keeper();
    keep.on(KeepEvent::RenewDue);
    keep.on(KeepEvent::PutRefused);
    let other = GrowthRequest {
        volume_id: crate::base::volume_id::VolumeId::from_uuid(uuid::Uuid::from_u128(2)),
        ..asked(GrowthStage::Asked)
    };
    let found = LeaseRecord {
        growth: Some(other),
        ..record("mine", 5)
    };
    let KeepAction::Put { record: answer, .. } = keep.on(KeepEvent::Found(Some(stored(found, "asked"))))
    else {
        panic!("no answer");
    };
    let stage = answer.growth.map(|growth| growth.stage);
    assert!(matches!(stage, Some(GrowthStage::Failed { .. })), "{stage:?}");
    assert_eq!(keep.on(KeepEvent::PutAccepted(version("v2"))), KeepAction::Wait);

    let (mut keep, _) = keeper_that_is_asked();
    assert_eq!(keep.on(KeepEvent::PutUnknown), KeepAction::Wait);
    let released = LeaseRecord {
        state: LeaseState::Released,
        ..renewal(1)
    };
    let wanted = KeepEvent::ReleaseWanted {
        is_clean: true,
        is_buffer_left: true,
    };
    assert_eq!(keep.on(wanted), put_over(released, "asked"));
    assert_eq!(keep.on(KeepEvent::PutAccepted(version("v2"))), KeepAction::Ended);
}

#[test]
fn anothers_lease_is_a_loss_for_good() {
    for found in [Some(stored(record("other", 6), "v9")), None] {
        let mut keep = keeper();
        keep.on(KeepEvent::RenewDue);
        keep.on(KeepEvent::PutRefused);
        let to = found.clone().map(|s| s.record);
        assert_eq!(keep.on(KeepEvent::Found(found)), KeepAction::Lost { to });
        for event in [
            KeepEvent::RenewDue,
            KeepEvent::ReleaseWanted {
                is_clean: true,
                is_buffer_left: true,
            },
            KeepEvent::Found(Some(stored(record("mine", 5), "v1"))),
        ] {
            assert_eq!(keep.on(event), KeepAction::Ended);
        }
    }
}

#[test]
fn a_release_keeps_the_epoch_and_says_whether_it_is_clean() {
    for (is_clean, state) in [(true, LeaseState::Released), (false, LeaseState::Abandoned)] {
        let mut keep = keeper();
        let record = LeaseRecord { state, ..renewal(1) };
        let put = KeepAction::Put {
            record,
            expected: version("v1"),
        };
        assert_eq!(
            keep.on(KeepEvent::ReleaseWanted {
                is_clean,
                is_buffer_left: true
            }),
            put
        );
        assert_eq!(keep.on(KeepEvent::PutAccepted(version("v2"))), KeepAction::Ended);
    }
}

#[test]
fn a_release_goes_over_a_renewal_whose_answer_was_lost_and_over_nothing_else() {
    let mut keep = keeper();
    keep.on(KeepEvent::RenewDue);
    keep.on(KeepEvent::PutUnknown);
    keep.on(KeepEvent::ReleaseWanted {
        is_clean: true,
        is_buffer_left: true,
    });
    assert_eq!(keep.on(KeepEvent::PutRefused), KeepAction::Read);
    let record = LeaseRecord {
        state: LeaseState::Released,
        ..renewal(2)
    };
    let expected = version("v2");
    assert_eq!(
        keep.on(KeepEvent::Found(Some(stored(renewal(1), "v2")))),
        KeepAction::Put { record, expected }
    );
}

/// A lease whose release was asked for, and whose write has had no answer.
fn with_unknown_release(is_clean: bool) -> Keep {
    let mut keep = keeper();
    keep.on(KeepEvent::ReleaseWanted {
        is_clean,
        is_buffer_left: true,
    });
    assert_eq!(keep.on(KeepEvent::PutUnknown), KeepAction::Read);
    keep
}

#[test]
fn a_release_that_failed_is_written_once_more_and_over_its_own_lease_alone() {
    let released = LeaseRecord {
        state: LeaseState::Released,
        ..renewal(1)
    };
    let put = KeepAction::Put {
        record: released.clone(),
        expected: version("v1"),
    };
    let held = || KeepEvent::Found(Some(stored(record("mine", 5), "v1")));
    for looked in [held(), KeepEvent::ReadFailed] {
        let again = || {
            let mut keep = with_unknown_release(true);
            assert_eq!(keep.on(looked.clone()), KeepAction::Pause);
            assert_eq!(keep.on(KeepEvent::Paused), put);
            keep
        };
        assert_eq!(
            again().on(KeepEvent::PutAccepted(version("v2"))),
            KeepAction::Ended
        );
        // What is there by then: the first one, carried out; and another owner's.
        let other = stored(record("other", 6), "v9");
        for (there, end) in [
            (Some(stored(released.clone(), "v2")), KeepAction::Ended),
            (
                Some(other.clone()),
                KeepAction::Lost {
                    to: Some(other.record),
                },
            ),
            (None, KeepAction::Lost { to: None }),
        ] {
            let mut keep = again();
            assert_eq!(keep.on(KeepEvent::PutRefused), KeepAction::Read);
            assert_eq!(keep.on(KeepEvent::Found(there)), end);
        }
        for last in [held(), KeepEvent::ReadFailed] {
            let mut keep = again();
            assert_eq!(keep.on(KeepEvent::PutUnknown), KeepAction::Read);
            assert_eq!(keep.on(last), KeepAction::Ended, "a close waits for no outage");
        }
        let unclean = with_unknown_release(false).on(looked.clone());
        assert_eq!(unclean, KeepAction::Ended);
    }
    // Somebody else took it before that.
    let other = stored(record("other", 6), "v9");
    let to = Some(other.record.clone());
    assert_eq!(
        with_unknown_release(true).on(KeepEvent::Found(Some(other))),
        KeepAction::Lost { to }
    );
}

/// A lease that was restored with an older state of the volume knows fewer owners than the WAL does.
#[test]
fn the_epoch_is_above_what_the_claim_says() {
    let mut take = Take::new(TakeOptions {
        claim: record("mine", 7),
        takeover: false,
        known_expired: None,
    });
    let action = take.on(TakeEvent::Absent { epoch_seen: 3 });
    assert_eq!(action, put_over_one_that_may_run(8, None));
}
