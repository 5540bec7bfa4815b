//! Two publishes that overlap, against the real engine: what each object of either may meet, and what is seen meanwhile.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::{Either, select};
use hyperfile::file::hyper::Hyper;
use hypernbd_volume::engine::{Beside, Engine};
use hypernbd_volume::lease::LeaseState;
use hypernbd_volume::write_buffer::generation::{Generation, PreparedWrite};
use hypernbd_volume::write_buffer::overlay::Frozen;
use hypernbd_volume::{ErrorKind, store};
use tokio::sync::oneshot;

use crate::faults::{LIMIT, Step, Then, Until, Verdict};
use crate::fixture::pattern;
use crate::pair::{MIB, Pair, SIZE, begin, beside, cno, inode, open, publish_both};

#[test]
fn both_land_in_order_and_what_is_read_between_is_the_first() {
    for block_size in [4096, 65536] {
        let t = Pair::new(block_size);
        let ([first, second], [with_first, with_both]) = t.generations();
        // The first is not stored before the second's data is; the second is not stored before it was looked at.
        let second_is_whole = Until::Seen(t.write_of(2, Step::Complete));
        t.script
            .add(inode(), 0, second_is_whole, Then::Goes(Verdict::Pass));
        t.script.add(inode(), 1, Until::Opened, Then::Goes(Verdict::Pass));
        t.fixture.run(async {
            let first = begin(&t.engine, first).await;
            let second = tokio::spawn({
                let engine = t.engine.clone();
                async move { engine.publish(second, Beside::default()).await }
            });
            assert_eq!(cno(&first.await), t.cno + 1);
            assert!(t.contents().await == with_first, "{block_size}: between the two");
            t.script.open();
            assert_eq!(cno(&second.await.unwrap()), t.cno + 2, "numbers are dense");
            assert!(t.contents().await == with_both, "{block_size}: after both");
            t.engine.close().await;
        });
        assert!(t.script.is_all_met());
        assert!(t.contents_elsewhere() == with_both, "{block_size}: elsewhere");
        let found = t
            .fixture
            .with_hyper_opened(|mut file: Hyper<'static>| async move {
                let mut out = vec![0; SIZE];
                file.fs_read(0, &mut out).await.unwrap();
                out
            });
        assert!(found == with_both, "{block_size}: plain Hyperfile");
    }
}

#[test]
fn what_the_first_keeps_in_the_cache_is_its_own() {
    let t = Pair::with_cache(65536, 1 << 30);
    let (generations, [_, with_both]) = t.generations();
    t.fixture.run(async {
        let [first, second] = generations;
        let first = begin(&t.engine, first).await;
        assert_eq!(cno(&t.engine.publish(second, Beside::default()).await), t.cno + 2);
        // Its caller hears of the first only now.
        assert_eq!(cno(&first.await), t.cno + 1);
        assert!(t.contents().await == with_both);
        t.engine.close().await;
    });
}

/// Two checkpoints that are published and not recorded would be one too many for whoever opens the volume next.
#[test]
fn no_checkpoint_is_made_unless_the_one_before_is_said_to_be_recorded() {
    for is_recorded in [Some(true), Some(false), None] {
        let t = Pair::new(65536);
        let ([first, second], [with_first, with_both]) = t.generations();
        let mut with_other = with_first.clone();
        let other = t.generation(9, 30 * MIB..31 * MIB, &mut with_other);
        for (next, with_next) in [(second, with_both), (other, with_other)] {
            let t = Pair::new(65536);
            t.fixture.run(async {
                let first = begin(&t.engine, first.clone()).await;
                let (recorded, before) = oneshot::channel();
                let beside = Beside {
                    before: Some(before),
                    next: None,
                };
                let next = t.engine.publish(next, beside);
                let says = async {
                    assert_eq!(cno(&first.await), t.cno + 1);
                    if let Some(is_recorded) = is_recorded {
                        recorded.send(is_recorded).unwrap();
                    }
                };
                let ((), published) = futures::join!(says, next);
                let is_recorded = is_recorded == Some(true);
                assert_eq!(published.is_ok(), is_recorded, "{published:?}");
                assert_eq!(t.script.inodes_put(), 1 + usize::from(is_recorded));
                let expected = if is_recorded { &with_next } else { &with_first };
                assert!(t.contents().await == *expected);
                t.engine.close().await;
            });
        }
    }
}

/// One fault at one object of one of the two; both are tried again until they are published.
fn survives(which: u64, step: Step, then: Then) {
    let mut t = Pair::new(65536);
    let (generations, [with_first, with_both]) = t.generations();
    let at = match step {
        Step::Whole => inode(),
        step => t.write_of(which, step),
    };
    let skip = if step == Step::Whole {
        which as usize - 1
    } else {
        0
    };
    // Not before both are under way.
    let until = Until::Seen(t.write_of(2, Step::Create));
    t.script.add(at.clone(), skip, until, then);
    let what = format!("{then:?} at {step:?} of {which}");
    t.fixture.run(async {
        let (first, second) = publish_both(&t.engine, generations.clone()).await;
        assert!(t.script.is_all_met(), "{what}");
        assert_eq!(first.is_ok(), which == 2, "{what}: {first:?}");
        assert!(second.is_err(), "{what}: {second:?}");
        let put = if step == Step::Whole { which } else { which - 1 };
        assert_eq!(
            t.script.inodes_put() as u64,
            put,
            "{what}: no inode is put over an unknown one"
        );
        let left = &generations[first.is_ok() as usize..];
        if first.is_ok() {
            assert!(
                t.contents().await == with_first,
                "{what}: the first alone is published"
            );
        }
        let early = t.engine.publish(left[0].clone(), Beside::default()).await;
        assert!(early.is_err(), "{what}: published without going back");
        t.engine.recover().await.unwrap();
        for generation in left {
            let mut published = t.engine.publish(generation.clone(), Beside::default()).await;
            if matches!(then, Then::Panics) && published.is_err() {
                // The container was opened anew, and meets a number of those before.
                t.engine.recover().await.unwrap();
                published = t.engine.publish(generation.clone(), Beside::default()).await;
            }
            published.unwrap().unwrap();
        }
        assert!(t.contents().await == with_both, "{what}");
    });
    assert!(t.contents_elsewhere() == with_both, "{what}: elsewhere");
    // And it goes on overlapping.
    t.model = with_both;
    let (generations, [_, with_both]) = t.generations();
    let published = t.fixture.run(publish_both(&t.engine, generations));
    assert_eq!(cno(&published.0) + 1, cno(&published.1), "{what}");
    t.fixture.run(t.engine.close());
    assert!(
        t.contents_elsewhere() == with_both,
        "{what}: elsewhere, at the end"
    );
}

#[test]
fn a_segment_is_refused() {
    for which in [1, 2] {
        survives(which, Step::Complete, Then::Goes(Verdict::Refused));
    }
}

#[test]
fn a_segments_answer_is_lost() {
    for which in [1, 2] {
        survives(which, Step::Complete, Then::Goes(Verdict::Lost));
    }
}

#[test]
fn an_inode_is_refused() {
    for which in [1, 2] {
        survives(which, Step::Whole, Then::Goes(Verdict::Refused));
    }
}

#[test]
fn an_inodes_answer_is_lost() {
    for which in [1, 2] {
        survives(which, Step::Whole, Then::Goes(Verdict::Lost));
    }
}

#[test]
fn the_engine_panics_on_the_way() {
    for which in [1, 2] {
        survives(which, Step::Whole, Then::Panics);
        survives(which, Step::Complete, Then::Panics);
    }
}

#[test]
fn another_writer_comes_between() {
    let t = Pair::new(65536);
    let (generations, _) = t.generations();
    let mut theirs = t.model.clone();
    let their_generation = t.generation(7, MIB..2 * MIB, &mut theirs);
    t.script.add(
        t.write_of(1, Step::Complete),
        0,
        Until::Opened,
        Then::Goes(Verdict::Pass),
    );
    t.fixture.run(async {
        let ours = publish_both(&t.engine, generations);
        let other = async {
            let other = open(&t.fixture).await;
            other
                .publish(their_generation, Beside::default())
                .await
                .unwrap()
                .unwrap();
            other.close().await;
            t.script.open();
        };
        let ((first, second), ()) = futures::join!(ours, other);
        assert!(first.is_err() && second.is_err(), "{first:?} {second:?}");
        let fenced = t.engine.recover().await.unwrap_err();
        assert_eq!(fenced.kind(), ErrorKind::Fenced, "{fenced}");
        t.engine.close().await;
    });
    assert_eq!(t.script.inodes_put(), 0);
    assert!(t.contents_elsewhere() == theirs);
}

/// Ends a server with both segments stored, or the second's alone, and no inode.
fn killed(first_is_stored: bool) -> Pair {
    let t = Pair::new(65536);
    let (generations, _) = t.generations();
    let lost = if first_is_stored {
        inode()
    } else {
        t.write_of(1, Step::Complete)
    };
    t.script.add(lost, 0, Until::Opened, Then::Goes(Verdict::Refused));
    t.fixture.run(async {
        let mut both = Box::pin(publish_both(&t.engine, generations));
        let second = format!("{:010}.0", t.cno + 2);
        let stored = async {
            let store = store::connect(&t.fixture.url, &t.fixture.store_options)
                .await
                .unwrap();
            let key = store.data_key(&second);
            let first_is_there = || !first_is_stored || t.script.inodes_put() > 0;
            while store.list(&key).await.unwrap().is_empty() || !first_is_there() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        match select(&mut both, Box::pin(stored)).await {
            Either::Right(_) => {}
            Either::Left((ended, _)) => panic!("nobody let them end: {ended:?}"),
        }
        // What was held is not sent any more, and nobody goes back to what is stored.
        t.script.open();
        let (first, second) = both.await;
        assert!(first.is_err() && second.is_err());
        t.engine.close().await;
    });
    assert_eq!(t.script.inodes_put(), usize::from(first_is_stored));
    t
}

#[test]
fn whoever_takes_over_after_a_kill_has_the_state_before_and_goes_on() {
    for first_is_stored in [true, false] {
        let mut t = killed(first_is_stored);
        let mut lease = t.fixture.lease().expect("a lease");
        lease.state = LeaseState::Held;
        lease.token = "theirs".into();
        t.fixture.put_lease(&lease);
        let volume = t.fixture.take_over();
        assert!(
            t.fixture.read(&volume, 0, SIZE) == t.model,
            "nothing that was not flushed"
        );
        // Their numbers are met.
        for round in 0..4 {
            let at = round * 5 * MIB + 1;
            let data = pattern(200 + round as u64, MIB);
            volume.write(at as u64, &data, false).unwrap();
            t.model[at..at + MIB].copy_from_slice(&data);
            volume.flush().unwrap();
        }
        assert!(t.fixture.read(&volume, 0, SIZE) == t.model);
        volume.close(LIMIT).unwrap();
        assert!(t.contents_elsewhere() == t.model);
    }
}

#[test]
fn what_a_kill_left_is_taken_up_in_order_or_not_at_all() {
    // Each checkpoint names the one that it was built on.
    let t = killed(true);
    assert!(t.contents_elsewhere() == t.generations().1[1], "both");

    let t = killed(false);
    assert!(t.contents_elsewhere() == t.model, "not the second on its own");
    let (generations, [_, with_both]) = t.generations();
    t.fixture.run(async {
        let engine = open(&t.fixture).await;
        let (first, second) = publish_both(&engine, generations.clone()).await;
        assert_eq!(cno(&first), t.cno + 1, "a number that nobody used");
        assert!(second.is_err(), "a number that is used: {second:?}");
        engine.recover().await.unwrap();
        let [_, second] = generations;
        assert!(cno(&engine.publish(second, Beside::default()).await) > t.cno + 2);
        engine.close().await;
    });
    assert!(t.contents_elsewhere() == with_both);
}

#[test]
fn a_publish_of_another_kind_waits_for_the_one_under_way() {
    let t = Pair::new(65536);
    let ([first, _], [mut model, _]) = t.generations();
    // Zeros, and less than a block: known only once the first is published.
    let mut other = Generation::new(t.engine.geometry());
    other.zero(4 * MIB as u64, 2 * MIB as u64);
    other.write(PreparedWrite::new(
        t.engine.geometry(),
        12 * MIB as u64,
        &pattern(9, 65536),
    ));
    model[4 * MIB..6 * MIB].fill(0);
    model[12 * MIB..][..65536].copy_from_slice(&pattern(9, 65536));
    t.script.add(inode(), 0, Until::Opened, Then::Goes(Verdict::Pass));
    t.fixture.run(async {
        let first = begin(&t.engine, first).await;
        let (next, may_begin) = oneshot::channel();
        let mut other = t.engine.publish(Arc::new(Frozen::new(other)), beside(next));
        match select(&mut other, may_begin).await {
            Either::Right((Err(_), _)) => {}
            Either::Right((Ok(()), _)) => panic!("a third may begin beside it"),
            Either::Left((ended, _)) => panic!("it did not wait for the first: {ended:?}"),
        }
        t.script.open();
        assert_eq!(cno(&first.await), t.cno + 1);
        assert_eq!(cno(&other.await), t.cno + 2);
        assert!(t.contents().await == model);
        t.engine.close().await;
    });
    assert!(t.contents_elsewhere() == model);
}

#[test]
fn a_publish_of_another_kind_fails_with_the_one_under_way() {
    let t = Pair::new(65536);
    let ([first, _], _) = t.generations();
    let mut small = t.model.clone();
    let other = t.generation(9, 30 * MIB..31 * MIB, &mut small);
    t.script
        .add(inode(), 0, Until::Opened, Then::Goes(Verdict::Refused));
    t.fixture.run(async {
        let first = begin(&t.engine, first).await;
        let mut other_publish = t.engine.publish(other.clone(), Beside::default());
        assert!((&mut other_publish).now_or_never().is_none());
        t.script.open();
        assert!(first.await.is_err());
        assert!(other_publish.await.is_err());
        t.engine.recover().await.unwrap();
        assert!(t.contents().await == t.model);
        t.engine.publish(other, Beside::default()).await.unwrap().unwrap();
        t.engine.close().await;
    });
    assert!(t.contents_elsewhere() == small);
}

#[test]
fn going_back_waits_for_what_is_under_way() {
    let t = Pair::new(65536);
    let (generations, [_, with_both]) = t.generations();
    t.script.add(inode(), 0, Until::Opened, Then::Goes(Verdict::Pass));
    t.fixture.run(async {
        let [first, second] = generations;
        let first = begin(&t.engine, first).await;
        let mut second = t.engine.publish(second, Beside::default());
        assert!((&mut second).now_or_never().is_none());
        // Nobody asks for it now; if somebody did, and it did not wait, it would take the ground from under both.
        let mut recovery = t.engine.recover();
        let early = tokio::time::timeout(Duration::from_millis(300), &mut recovery).await;
        assert!(early.is_err(), "it did not wait: {early:?}");
        t.script.open();
        assert_eq!(cno(&first.await), t.cno + 1);
        assert_eq!(cno(&second.await), t.cno + 2);
        recovery.await.unwrap();
        assert!(t.contents().await == with_both);
        t.engine.close().await;
    });
    assert!(t.contents_elsewhere() == with_both);
}

/// Nodes of the index that nothing may drop are no more than fit in memory, however long a stream goes on.
#[test]
fn a_stream_waits_when_it_would_keep_too_much_of_the_index() {
    let t = Pair::new(4096);
    t.script.add(inode(), 0, Until::Opened, Then::Goes(Verdict::Pass));
    let mut model = t.model.clone();
    // Many short runs: each may be under a node of its own.
    let scattered = |nth: usize, model: &mut [u8]| {
        let mut generation = Generation::new(t.engine.geometry());
        for run in 0..1024 {
            let at = (run * 4 + nth % 3) * 8192;
            if at + 4096 > SIZE {
                break;
            }
            let data = pattern((nth * 10_000 + run) as u64, 4096);
            generation.write(PreparedWrite::new(t.engine.geometry(), at as u64, &data));
            model[at..at + 4096].copy_from_slice(&data);
        }
        Arc::new(Frozen::new(generation))
    };
    t.fixture.run(async {
        let mut before = Vec::new();
        for nth in 0..4 {
            let publish = begin(&t.engine, scattered(nth, &mut model)).await;
            before.push(publish);
        }
        let mut last = begin(&t.engine, scattered(4, &mut model)).boxed();
        let early = tokio::time::timeout(Duration::from_millis(300), &mut last).await;
        assert!(early.is_err(), "it was laid out beside all the others");
        t.script.open();
        for (nth, publish) in before.into_iter().enumerate() {
            assert_eq!(cno(&publish.await), t.cno + 1 + nth as u64);
        }
        assert_eq!(cno(&last.await.await), t.cno + 5);
        t.engine.close().await;
    });
    assert!(t.contents_elsewhere() == model);
}
