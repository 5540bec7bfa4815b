//! Requests in a lease: what is read of them, how long they hold, and what became of them. `state_tests` has the holder's side.

use super::super::LeaseState;
use super::super::tests::record;
use super::*;

fn request(stage: GrowthStage) -> GrowthRequest {
    GrowthRequest {
        id: "mine".into(),
        volume_id: record("token", 1).volume_id,
        size_bytes: 1 << 30,
        asked_ms: 1000,
        valid_ms: 5000,
        asked_by: "somebody".into(),
        stage,
    }
}

fn asked_in(record: LeaseRecord, stage: GrowthStage) -> LeaseRecord {
    LeaseRecord {
        growth: Some(request(stage)),
        ..record
    }
}

/// Another release may write more, or something else there: the lease stays readable, or its holder would renew it no more.
#[test]
fn a_request_that_cannot_be_read_is_none_and_the_lease_is_one() {
    for stage in [
        GrowthStage::Asked,
        GrowthStage::Withdrawn,
        GrowthStage::Taken,
        GrowthStage::Grown { size_bytes: 7 },
        GrowthStage::Failed {
            why: "for a reason".into(),
        },
    ] {
        let lease = asked_in(record("token", 1), stage);
        let body = serde_json::to_vec(&lease).unwrap();
        assert_eq!(LeaseRecord::decode(&body), Ok(lease));
    }
    let lease = serde_json::to_value(record("token", 1)).unwrap();
    assert!(lease.get(FIELD).is_none(), "nothing is said of none");
    let whole = serde_json::to_value(request(GrowthStage::Asked)).unwrap();
    for (key, value) in [
        ("stage", "soon"),
        ("size_bytes", "big"),
        ("volume_id", "../x"),
        ("id", ""),
    ] {
        let mut growth = whole.clone();
        growth[key] = value.into();
        if key == "id" {
            growth.as_object_mut().unwrap().remove("id");
        }
        let mut with = lease.clone();
        with[FIELD] = growth;
        let body = serde_json::to_vec(&with).unwrap();
        assert_eq!(LeaseRecord::decode(&body), Ok(record("token", 1)), "{key}");
    }
}

#[test]
fn a_request_holds_for_a_while_by_the_stores_clock() {
    let asked = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    let request = request(GrowthStage::Asked);
    for (age_ms, holds) in [
        (0, true),
        (5000, true),
        (5001, false),
        (366 * 24 * 3_600_000, false),
    ] {
        assert_eq!(
            request.holds(asked, asked + Duration::from_millis(age_ms)),
            holds,
            "{age_ms}"
        );
    }
    assert!(
        request.holds(asked, asked - Duration::from_secs(1)),
        "two machines of the store"
    );
    for (now_ms, is_stale) in [(1000, false), (6000, false), (6001, true)] {
        assert_eq!(request.is_stale(now_ms), is_stale, "{now_ms}");
    }
    let ahead = GrowthRequest {
        asked_ms: 1_000_000,
        ..request.clone()
    };
    assert!(ahead.is_stale(1000), "nobody would be free of it");
    let for_ever = GrowthRequest {
        valid_ms: u64::MAX,
        ..request
    };
    assert!(!for_ever.holds(asked, asked + DURATION_MAX + Duration::from_secs(1)));
    assert!(!for_ever.is_stale(u64::MAX - 1));
}

#[test]
fn who_asked_is_told_what_became_of_it() {
    let own = request(GrowthStage::Asked);
    let held = record("token", 1);
    let released = LeaseRecord {
        state: LeaseState::Released,
        ..held.clone()
    };
    let grown = GrowthStage::Grown { size_bytes: 1 << 30 };
    let failed = GrowthStage::Failed { why: "full".into() };
    let of_another = LeaseRecord {
        growth: Some(GrowthRequest {
            id: "another".into(),
            ..request(grown.clone())
        }),
        ..held.clone()
    };
    for (found, expected) in [
        (Some(asked_in(held.clone(), GrowthStage::Asked)), Outlook::Asked),
        (Some(asked_in(held.clone(), GrowthStage::Taken)), Outlook::Taken),
        (
            Some(asked_in(held.clone(), GrowthStage::Withdrawn)),
            Outlook::Withdrawn,
        ),
        (
            Some(asked_in(held.clone(), grown.clone())),
            Outlook::Grown(1 << 30),
        ),
        (
            Some(asked_in(held.clone(), failed.clone())),
            Outlook::Failed("full".into()),
        ),
        // An older release renews without it.
        (Some(held.clone()), Outlook::Ignored),
        (Some(of_another), Outlook::Ignored),
        (Some(released.clone()), Outlook::Gone),
        (
            Some(asked_in(released.clone(), GrowthStage::Taken)),
            Outlook::Gone,
        ),
        (Some(asked_in(released, grown.clone())), Outlook::Grown(1 << 30)),
        // What another owner has left there is not its own.
        (Some(asked_in(record("other", 2), grown)), Outlook::Gone),
        (None, Outlook::Gone),
    ] {
        assert_eq!(outlook(&own, "token", found.as_ref()), expected, "{found:?}");
    }
}
