//! One history: owners that take a volume from each other, what clients write to them, and what must hold of it.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use super::owner::{Owner, Report};
use super::shells::Defences;
use super::store::{Body, Client, Fate, Inode, Key, Network, Random};
use crate::checkpoint::machine::Event;
use crate::checkpoint::machine_world::Cells;
use crate::checkpoint::state;
use crate::wal::group_commit;
use crate::wal::replay::IN_FLIGHT_MAX;

const OWNERS: u64 = 3;
const STEPS: u32 = 1500;
const CELLS: u64 = 10;
/// Steps of a kind world in which everything must come to an end.
const KIND_STEPS: u32 = 5000;

/// What happened in histories: those in which nothing happens prove nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen {
    pub acknowledged: u64,
    pub served: u64,
    pub fenced: u64,
    pub closed: u64,
}

pub struct History {
    network: Rc<RefCell<Network>>,
    random: Random,
    defences: Defences,
    depth: usize,
    /// Of 100 requests so many fail.
    failing: u64,
    owners: Vec<Owner>,
    started: u64,
    written: u64,
    /// What flushes have covered, by whomever they were answered.
    promised: Cells,
    /// What the newest owner showed when it began to serve, what was written to it since, and what its clients see.
    shown: Cells,
    own: BTreeSet<u64>,
    visible: Cells,
    seen: Seen,
}

impl History {
    pub fn new(seed: u64, defences: Defences) -> Self {
        let random = Random::new(seed);
        let network = Network::default();
        let depths = [1, 3, IN_FLIGHT_MAX as usize];
        let mut history = Self {
            depth: depths[random.pick(3) as usize],
            failing: [0, 5, 15, 30][random.pick(4) as usize],
            network: Rc::new(RefCell::new(network)),
            random,
            defences,
            owners: Vec::new(),
            started: 0,
            written: 0,
            promised: Cells::new(),
            shown: Cells::new(),
            own: BTreeSet::new(),
            visible: Cells::new(),
            seen: Seen::default(),
        };
        let created = (Body::Inode(Inode::default()), 0);
        history
            .network
            .borrow_mut()
            .store
            .objects
            .insert(Key::Inode, created);
        for at in 0..OWNERS {
            let owner = history.start(false);
            history.owners.push(owner);
            history.go_on(at as usize);
        }
        history
    }

    /// The rule that was broken, if one was, and what happened.
    pub fn run(mut self) -> (Option<String>, Seen) {
        for _ in 0..STEPS {
            self.step();
            if self.is_broken() {
                break;
            }
        }
        self.settle();
        let violation = self.network.borrow_mut().store.violation.take();
        (violation, self.seen)
    }

    fn is_broken(&self) -> bool {
        self.network.borrow().store.violation.is_some()
    }

    fn violate(&self, what: String) {
        self.network.borrow_mut().store.violate(what);
    }

    fn start(&mut self, takeover: bool) -> Owner {
        self.started += 1;
        let client = Client {
            network: self.network.clone(),
            random: self.random.clone(),
            owner: self.started,
        };
        Owner::start(client, takeover, self.defences, self.depth)
    }

    fn step(&mut self) {
        let nth = self.random.pick(1 << 20);
        let at = self.random.pick(OWNERS) as usize;
        match self.random.pick(40) {
            0..=9 => {
                let fate = self.fate();
                self.network.borrow_mut().arrive(nth, fate);
            }
            10..=20 => self.hear(nth),
            21..=24 => self.write(at, nth),
            25..=27 => self.flush(at),
            28..=30 => self.timer(at, nth),
            31 => self.network.borrow_mut().land(nth),
            32 => self.network.borrow_mut().now_ms += nth % 400,
            33 => {
                self.owners[at].renew();
                self.go_on(at);
            }
            34 if nth.is_multiple_of(8) => self.owners[at].kill(),
            35 if nth.is_multiple_of(2) => {
                self.seen.closed += u64::from(self.owners[at].working().is_some());
                self.owners[at].close();
                self.go_on(at);
            }
            36 => self.owners[at].stands_still = nth.is_multiple_of(4),
            37 | 38 if self.owners[at].is_ended => {
                self.owners[at] = self.start(nth.is_multiple_of(2));
                self.go_on(at);
            }
            _ => {}
        }
    }

    fn fate(&self) -> Fate {
        if self.random.pick(100) >= self.failing {
            return Fate::CarriedOut;
        }
        [Fate::NeverArrives, Fate::AnswerLost, Fate::Late][self.random.pick(3) as usize]
    }

    fn hear(&mut self, nth: u64) {
        let stands_still = |number| self.owners.iter().any(|o| o.number == number && o.stands_still);
        let heard = self.network.borrow_mut().hear(nth, stands_still);
        if let Some(number) = heard
            && let Some(at) = self.owners.iter().position(|o| o.number == number)
        {
            self.go_on(at);
        }
    }

    fn is_newest(&self, at: usize) -> bool {
        self.owners[at].epoch() == Some(self.network.borrow().store.serving_epoch)
    }

    fn write(&mut self, at: usize, nth: u64) {
        let is_newest = self.is_newest(at);
        let value = self.written + 1;
        let cell = (nth % CELLS) as u8;
        let Some(serving) = self.owners[at].working() else {
            return;
        };
        self.written = value;
        let acknowledged = serving.write(cell, value);
        if is_newest {
            self.own.insert(value);
            self.visible.insert(cell, value);
        }
        self.acknowledge(at, acknowledged);
        self.go_on(at);
    }

    fn flush(&mut self, at: usize) {
        if let Some(serving) = self.owners[at].working() {
            let acknowledged = serving.volume.flush();
            self.acknowledge(at, acknowledged);
            self.go_on(at);
        }
    }

    /// A timer of an owner is over; those of a standing owner are, too, but nothing comes of it before it goes on.
    fn timer(&mut self, at: usize, nth: u64) {
        if self.owners[at].stands_still {
            return;
        }
        let Some(serving) = self.owners[at].working() else {
            return;
        };
        let volume = &mut serving.volume;
        if nth % 7 == 6 {
            let acknowledged = volume.next_may_begin();
            self.acknowledge(at, acknowledged);
            self.go_on(at);
            return;
        }
        let event = match nth % 7 {
            0 => volume
                .ages
                .pop()
                .map(|id| Event::Volume(state::Event::AgeDue(id))),
            1 | 2 => {
                std::mem::take(&mut volume.is_retry_armed).then_some(Event::Volume(state::Event::RetryDue))
            }
            3 => volume
                .promises
                .keys()
                .next()
                .filter(|_| nth.is_multiple_of(5))
                .map(|id| Event::Volume(state::Event::FlushExpired(*id))),
            4 => volume
                .append_retries
                .pop()
                .map(|sequence| Event::Wal(group_commit::Event::RetryDue { sequence })),
            _ => volume
                .appends
                .first()
                .map(|&sequence| Event::Wal(group_commit::Event::AppendSlow { sequence })),
        };
        if let Some(event) = event {
            let acknowledged = volume.feed(event);
            self.acknowledge(at, acknowledged);
            self.go_on(at);
        }
    }

    fn go_on(&mut self, at: usize) {
        let was_fenced = self.owners[at]
            .serving
            .as_ref()
            .is_some_and(|s| s.volume.machine.is_fenced());
        let Report {
            acknowledged,
            has_begun_to_serve,
            is_fenced,
        } = self.owners[at].go_on();
        self.seen.fenced += u64::from(is_fenced && !was_fenced);
        if has_begun_to_serve {
            self.begin_to_serve(at);
        }
        self.acknowledge(at, acknowledged);
    }

    /// L2: the owner must show what flushes have covered, and nothing of an older one that the last one did not show.
    fn begin_to_serve(&mut self, at: usize) {
        self.seen.served += 1;
        let epoch = self.owners[at].epoch().expect("it serves");
        if epoch < self.network.borrow().store.serving_epoch {
            // It was overtaken without knowing it yet.
            return;
        }
        self.network.borrow_mut().store.serving_epoch = epoch;
        let Some(serving) = &self.owners[at].serving else {
            return;
        };
        self.visible = serving.expected.clone();
        for (cell, value) in &self.promised {
            let there = self.visible.get(cell);
            if there < Some(value) {
                self.violate(format!(
                    "L2: epoch {epoch} has {there:?} in cell {cell}, a flush has covered {value}"
                ));
            }
        }
        for (cell, value) in &self.visible {
            if !self.own.contains(value) && self.shown.get(cell) != Some(value) {
                let shown = self.shown.get(cell);
                self.violate(format!(
                    "L2: epoch {epoch} shows {value} of an older owner in cell {cell}, the last one showed {shown:?}"
                ));
            }
        }
        self.shown = self.visible.clone();
        self.own.clear();
    }

    /// L1, W4: a flush was answered, by whichever owner; what it covers is in what the newest one shows.
    fn acknowledge(&mut self, at: usize, promises: Vec<Cells>) {
        for promise in promises {
            self.seen.acknowledged += 1;
            for (cell, value) in promise {
                if self.visible.get(&cell) < Some(&value) {
                    let epoch = self.owners[at].epoch();
                    self.violate(format!(
                        "L1: epoch {epoch:?} acknowledged {value} in cell {cell}, which is not in the volume"
                    ));
                }
                let promised = self.promised.entry(cell).or_default();
                *promised = (*promised).max(value);
            }
        }
    }

    /// A kind world from here on: an owner opens the volume, publishes everything, is killed, and another one opens it.
    fn settle(&mut self) {
        for round in 0..2 {
            for owner in &mut self.owners {
                owner.kill();
            }
            self.owners[0] = self.start(true);
            self.go_on(0);
            self.flush_and_wait(round);
        }
    }

    fn flush_and_wait(&mut self, round: u64) {
        let mut is_flushed = false;
        for _ in 0..KIND_STEPS {
            if self.is_broken() {
                return;
            }
            let nth = self.random.pick(1 << 20);
            if nth.is_multiple_of(16) {
                self.network.borrow_mut().land(nth);
            }
            self.network.borrow_mut().arrive(nth, Fate::CarriedOut);
            self.hear(nth);
            self.timer(0, nth - nth % 3);
            if self.owners[0].is_ended {
                // A request of an older owner came in between.
                self.owners[0] = self.start(true);
                self.go_on(0);
            }
            if self.owners[0].serving.is_none() {
                continue;
            }
            if !std::mem::replace(&mut is_flushed, true) {
                self.write(0, nth);
                self.flush(0);
            }
            let volume = &self.owners[0].serving.as_ref().expect("it serves").volume;
            if volume.promises.is_empty() && volume.unpublished().is_empty() {
                return;
            }
        }
        self.violate(format!(
            "W4: in round {round} of a kind world not everything is published"
        ));
    }
}
