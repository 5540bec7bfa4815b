//! The state machine in a simulated world: random events, publishes that fail, publishes that are applied although they
//! are reported as failed, and crashes. After every step the invariants are checked against a flat model.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

type Cells = BTreeMap<u8, u64>;

#[derive(Debug, Clone, Copy)]
enum Step {
    Write(u8),
    Flush,
    Age,
    Want,
    PublishOk,
    PublishFail,
    /// Applied by the store and reported as failed.
    PublishLost,
    Fence,
    NextMayBegin,
    Retry,
    Expire,
}

/// A volume of 256 one-cell blocks; each write stores a number larger than any before it.
#[derive(Default)]
struct World {
    machine: WriteBack,
    active: Cells,
    active_id: Option<GenerationId>,
    /// Oldest first, each with the number of the publish attempt in flight.
    frozen: VecDeque<(GenerationId, Cells, Option<u32>)>,
    published: Cells,
    written: u64,
    flushes: u64,
    /// What each waiting flush covers.
    promises: BTreeMap<FlushId, Cells>,
    answered: BTreeSet<FlushId>,
    ages: Vec<GenerationId>,
    is_retry_armed: bool,
    may_follow: Option<(GenerationId, u32)>,
}

impl World {
    fn visible(&self) -> Cells {
        let mut all = self.published.clone();
        for (_, cells, _) in &self.frozen {
            all.extend(cells);
        }
        all.extend(&self.active);
        all
    }

    fn feed(&mut self, event: Event) {
        let before = self.visible();
        for action in self.machine.on(event) {
            match action {
                Action::Freeze(id) => {
                    assert!(self.frozen.len() < FROZEN_MAX);
                    assert!(self.active_id.is_none_or(|last| id > last), "numbers grow");
                    self.active_id = Some(id);
                    self.frozen
                        .push_back((id, std::mem::take(&mut self.active), None));
                }
                Action::Publish { generation, attempt } => {
                    let at = self.frozen.iter().position(|f| f.0 == generation);
                    let at = at.expect("frozen before it is published");
                    if at > 0 {
                        let before = self.frozen[at - 1]
                            .2
                            .expect("W1: beside the one before it, or after it");
                        assert_eq!(self.may_follow, Some((self.frozen[at - 1].0, before)));
                        assert_eq!(attempt, 0, "what failed begins alone");
                    }
                    assert_eq!(self.frozen[at].2.replace(attempt), None, "once at a time");
                    self.is_retry_armed = false;
                }
                Action::DropFrozen(id) => {
                    let (frozen_id, cells, _) = self.frozen.pop_front().expect("dropped once");
                    assert_eq!(frozen_id, id);
                    for (k, v) in cells {
                        assert!(
                            self.published.get(&k) >= Some(&v),
                            "W1: dropped before it was published"
                        );
                    }
                }
                Action::Answer(id, answer) => {
                    let promise = self.promises.remove(&id).expect("answered once");
                    assert!(self.answered.insert(id));
                    if answer == FlushAnswer::Durable {
                        for (k, v) in promise {
                            assert!(
                                self.published.get(&k) >= Some(&v),
                                "W4: flush answered, write {v} not durable"
                            );
                        }
                    }
                }
                Action::ArmAge(id) => self.ages.push(id),
                Action::ArmRetry { attempt } => {
                    assert!(attempt > 0);
                    self.is_retry_armed = true;
                }
                Action::Fence => assert!(self.machine.is_fenced()),
            }
        }
        assert_eq!(
            self.visible(),
            before,
            "W1: nothing written is ever lost from view"
        );
    }

    fn apply_publish(&mut self) {
        let (_, cells, _) = self.frozen.front().expect("publishing");
        self.published.extend(cells);
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write(cell) => {
                self.written += 1;
                let is_first = self.active.is_empty();
                self.active.insert(cell, self.written);
                if is_first {
                    self.feed(Event::Dirtied);
                }
                if self.active.len() > 6 {
                    self.feed(Event::Grown);
                }
            }
            Step::Flush => {
                self.flushes += 1;
                let id = FlushId(self.flushes);
                self.promises.insert(id, self.visible());
                self.feed(Event::Flush {
                    id,
                    is_active_dirty: !self.active.is_empty(),
                    needs_checkpoint: true,
                });
            }
            Step::Age => {
                if let Some(id) = self.ages.pop() {
                    self.feed(Event::AgeDue(id));
                }
            }
            Step::Want => self.feed(Event::CheckpointWanted {
                is_active_dirty: !self.active.is_empty(),
            }),
            Step::PublishOk | Step::PublishLost | Step::PublishFail | Step::Fence => {
                let Some((generation, _, Some(_))) = self.frozen.front().cloned() else {
                    return;
                };
                self.frozen[0].2 = None;
                let end = match step {
                    Step::PublishOk => {
                        self.apply_publish();
                        PublishEnd::Published
                    }
                    Step::PublishLost => {
                        self.apply_publish();
                        PublishEnd::Failed
                    }
                    Step::Fence => PublishEnd::Fenced,
                    _ => PublishEnd::Failed,
                };
                self.feed(Event::PublishEnded { generation, end });
                // A publish that overlaps it fails with it, and ends a little later.
                if end != PublishEnd::Published
                    && let Some(beside) = self.frozen.get_mut(1).filter(|f| f.2.is_some())
                {
                    beside.2 = None;
                    let generation = beside.0;
                    assert!(!self.is_retry_armed, "a retry waits for the end of both");
                    let end = PublishEnd::Failed;
                    self.feed(Event::PublishEnded { generation, end });
                    assert!(self.is_retry_armed || self.machine.is_fenced());
                }
            }
            Step::NextMayBegin => {
                if let Some((generation, _, Some(attempt))) = self.frozen.back().cloned() {
                    self.may_follow = Some((generation, attempt));
                    self.feed(Event::NextMayBegin { generation, attempt });
                }
            }
            Step::Retry => {
                if std::mem::take(&mut self.is_retry_armed) {
                    self.feed(Event::RetryDue);
                }
            }
            Step::Expire => {
                if let Some((&id, _)) = self.promises.iter().next() {
                    self.feed(Event::FlushExpired(id));
                    assert!(self.answered.contains(&id));
                }
            }
        }
    }

    /// From here on nothing fails: everything is published and every flush answered.
    fn settle(&mut self) {
        self.step(Step::Flush);
        for _ in 0..8 {
            self.step(Step::Retry);
            self.step(Step::PublishOk);
        }
        if !self.machine.is_fenced() {
            assert_eq!(self.published, self.visible(), "all is published in the end");
            assert!(self.active.is_empty() && self.frozen.is_empty());
        }
        assert!(self.promises.is_empty(), "every flush is answered in the end");
    }
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..10u8).prop_map(Step::Write),
        3 => Just(Step::Flush),
        1 => Just(Step::Age),
        1 => Just(Step::Want),
        4 => Just(Step::PublishOk),
        1 => Just(Step::PublishFail),
        1 => Just(Step::PublishLost),
        3 => Just(Step::NextMayBegin),
        2 => Just(Step::Retry),
        1 => Just(Step::Expire),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn every_promise_is_kept(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World::default();
        for s in steps {
            world.step(s);
        }
        world.settle();
    }

    #[test]
    fn a_fenced_volume_promises_nothing_more(
        before in prop::collection::vec(step(), 0..60),
        after in prop::collection::vec(step(), 0..60),
    ) {
        let mut world = World::default();
        for s in before {
            world.step(s);
        }
        world.step(Step::Write(1));
        world.step(Step::Flush);
        world.step(Step::PublishOk);
        world.step(Step::Write(2));
        world.step(Step::Flush);
        world.step(Step::Retry);
        world.step(Step::Fence);
        prop_assert!(world.machine.is_fenced());
        let published = world.published.clone();
        for s in after {
            world.step(s);
        }
        world.settle();
        prop_assert!(world.machine.is_fenced());
        prop_assert_eq!(published, world.published, "a fenced volume publishes nothing");
    }
}

#[test]
fn flushes_that_wait_together_share_one_publish() {
    let mut m = WriteBack::default();
    m.on(Event::Dirtied);
    let first = m.on(Event::Flush {
        id: FlushId(1),
        is_active_dirty: true,
        needs_checkpoint: true,
    });
    assert_eq!(
        first,
        [
            Action::Freeze(GenerationId(1)),
            Action::Publish {
                generation: GenerationId(1),
                attempt: 0
            }
        ]
    );
    m.on(Event::Dirtied);
    for id in 2..=4 {
        assert_eq!(
            m.on(Event::Flush {
                id: FlushId(id),
                is_active_dirty: true,
                needs_checkpoint: true,
            }),
            []
        );
    }
    let ended = |generation| Event::PublishEnded {
        generation: GenerationId(generation),
        end: PublishEnd::Published,
    };
    let answers = m.on(ended(1));
    assert_eq!(
        answers,
        [
            Action::DropFrozen(GenerationId(1)),
            Action::Answer(FlushId(1), FlushAnswer::Durable),
            Action::Freeze(GenerationId(2)),
            Action::Publish {
                generation: GenerationId(2),
                attempt: 0
            }
        ]
    );
    let answers = m.on(ended(2));
    assert_eq!(answers.len(), 4, "one publish answers the three: {answers:?}");
}

#[test]
fn a_flush_of_nothing_is_answered_at_once() {
    let mut m = WriteBack::default();
    let id = FlushId(1);
    assert_eq!(
        m.on(Event::Flush {
            id,
            is_active_dirty: false,
            needs_checkpoint: true,
        }),
        [Action::Answer(id, FlushAnswer::Durable)]
    );
}

#[test]
fn a_flush_after_a_failed_publish_tries_again_at_once() {
    let mut m = WriteBack::default();
    m.on(Event::Dirtied);
    m.on(Event::Flush {
        id: FlushId(1),
        is_active_dirty: true,
        needs_checkpoint: true,
    });
    assert_eq!(
        m.on(Event::PublishEnded {
            generation: GenerationId(1),
            end: PublishEnd::Failed
        }),
        [Action::ArmRetry { attempt: 1 }]
    );
    assert_eq!(
        m.on(Event::FlushExpired(FlushId(1))),
        [Action::Answer(FlushId(1), FlushAnswer::TimedOut)]
    );
    assert_eq!(
        m.on(Event::Flush {
            id: FlushId(2),
            is_active_dirty: false,
            needs_checkpoint: true,
        }),
        [Action::Publish {
            generation: GenerationId(1),
            attempt: 1
        }]
    );
}

#[test]
fn a_lost_lease_fences_in_every_phase_and_no_publish_under_way_answers_a_flush() {
    let dirty_flush = |m: &mut WriteBack, id: u64| {
        m.on(Event::Dirtied);
        m.on(Event::Flush {
            id: FlushId(id),
            is_active_dirty: true,
            needs_checkpoint: true,
        })
    };
    let fence_with = |m: &mut WriteBack, waiting: &[u64]| {
        let answers = waiting
            .iter()
            .map(|id| Action::Answer(FlushId(*id), FlushAnswer::Fenced));
        let expected: Vec<Action> = std::iter::once(Action::Fence).chain(answers).collect();
        assert_eq!(m.on(Event::Fenced), expected);
        assert_eq!(m.on(Event::Fenced), [], "once is enough");
        assert!(m.is_fenced());
        for late in [PublishEnd::Published, PublishEnd::Failed, PublishEnd::Fenced] {
            let generation = GenerationId(1);
            assert_eq!(
                m.on(Event::PublishEnded {
                    generation,
                    end: late
                }),
                []
            );
        }
        assert_eq!(m.on(Event::RetryDue), []);
        for is_active_dirty in [false, true] {
            let id = FlushId(9);
            assert_eq!(
                m.on(Event::Flush {
                    id,
                    is_active_dirty,
                    needs_checkpoint: false
                }),
                [Action::Answer(id, FlushAnswer::Fenced)]
            );
        }
    };
    let mut idle = WriteBack::default();
    fence_with(&mut idle, &[]);

    let mut publishing = WriteBack::default();
    dirty_flush(&mut publishing, 1);
    dirty_flush(&mut publishing, 2);
    fence_with(&mut publishing, &[1, 2]);

    let mut waiting = WriteBack::default();
    dirty_flush(&mut waiting, 1);
    waiting.on(Event::PublishEnded {
        generation: GenerationId(1),
        end: PublishEnd::Failed,
    });
    fence_with(&mut waiting, &[1]);
}

#[test]
fn the_next_begins_beside_the_one_under_way_when_it_may_and_neither_is_answered_early() {
    let (first, second, third) = (GenerationId(1), GenerationId(2), GenerationId(3));
    let publish = |generation, attempt| Action::Publish { generation, attempt };
    let ended = |generation, end| Event::PublishEnded { generation, end };
    let next = |generation, attempt| Event::NextMayBegin { generation, attempt };
    let flush = |id: u64| Event::Flush {
        id: FlushId(id),
        is_active_dirty: true,
        needs_checkpoint: true,
    };
    let mut m = WriteBack::default();
    m.on(flush(1));
    m.on(flush(2));
    assert_eq!(m.on(next(first, 0)), [Action::Freeze(second), publish(second, 0)]);
    m.on(flush(3));
    assert_eq!(m.on(next(second, 0)), [], "two at most");
    // The first publish fails: neither flush is answered, and both generations are published again, one after the
    // other.
    assert_eq!(m.on(ended(first, PublishEnd::Failed)), []);
    assert_eq!(m.on(Event::RetryDue), [], "not while the second goes on");
    assert_eq!(
        m.on(ended(second, PublishEnd::Failed)),
        [Action::ArmRetry { attempt: 1 }]
    );
    assert_eq!(m.on(Event::RetryDue), [publish(first, 1)]);
    assert_eq!(
        m.on(ended(first, PublishEnd::Published)),
        [
            Action::DropFrozen(first),
            Action::Answer(FlushId(1), FlushAnswer::Durable),
            publish(second, 1)
        ]
    );
    assert_eq!(m.on(next(second, 0)), [], "said of the attempt that failed");
    assert_eq!(m.on(next(second, 1)), [Action::Freeze(third), publish(third, 0)]);
    // A success of the third that is reported before the second is not believed.
    assert_eq!(m.on(ended(third, PublishEnd::Published)), []);
    assert_eq!(
        m.on(ended(second, PublishEnd::Published)),
        [
            Action::DropFrozen(second),
            Action::Answer(FlushId(2), FlushAnswer::Durable),
            publish(third, 1)
        ]
    );
}
