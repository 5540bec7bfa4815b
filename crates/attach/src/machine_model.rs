//! The machine between a model of the kernel and a model of a server that dies as badly as a server may.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::tests::{BLOCK, BLOCKS, HOLD, export};
use super::*;
use crate::held::KEPT_BYTES;
use crate::nbd::wire::{FUA, TRIM, WRITE, WRITE_ZEROES};
use proptest::prelude::*;

/// What a block holds: the number of the change that made it, 0 for none.
type Disk = [u64; BLOCKS];

fn blocks(request: &Request) -> std::ops::Range<usize> {
    let end = request.offset + u64::from(request.length);
    (request.offset / BLOCK) as usize..(end / BLOCK) as usize
}

/// A server. What it answered without a flush may be lost with it, each change by itself.
#[derive(Default)]
struct Server {
    inbox: Vec<(Request, usize)>,
    durable: Disk,
    /// Carried out, in this order, and not durable: what it was, what it wrote, when it was answered.
    volatile: Vec<(std::ops::Range<usize>, u64, usize)>,
    answers: usize,
}

impl Server {
    fn disk(&self) -> Disk {
        let mut disk = self.durable;
        for (blocks, value, _) in &self.volatile {
            disk[blocks.clone()].fill(*value);
        }
        disk
    }

    /// A flush covers what was answered before it came in, and the server makes no more of it. Of what lies over each other,
    /// the earlier cannot be durable later.
    fn flush(&mut self, before: usize) {
        let (safe, rest) = self.volatile.drain(..).partition(|(.., answer)| *answer < before);
        self.volatile = safe;
        self.durable = self.disk();
        self.volatile = rest;
    }

    /// Carries out and answers one request of those that it has, whichever.
    fn answer(&mut self, which: usize, refuses: bool) -> Option<Reply> {
        if self.inbox.is_empty() {
            return None;
        }
        let (request, before) = self.inbox.remove(which % self.inbox.len());
        let mut reply = Reply {
            cookie: request.cookie,
            error: 0,
            payload: Payload::default(),
        };
        if refuses {
            reply.error = ESHUTDOWN;
            return Some(reply);
        }
        match request.command {
            READ => {
                let of = |value: &u64| [&value.to_be_bytes()[..], &[0; BLOCK as usize - 8]].concat();
                reply.payload = Arc::new(self.disk()[blocks(&request)].iter().flat_map(of).collect());
            }
            FLUSH => self.flush(before),
            _ => {
                let (over, value) = (blocks(&request), value(&request));
                if request.flags & FUA == 0 {
                    self.volatile.push((over, value, self.answers));
                } else {
                    // This change alone is durable, and what lies below it does not come up again.
                    self.durable[over.clone()].fill(value);
                    let below = std::mem::take(&mut self.volatile).into_iter();
                    let single = below
                        .flat_map(|(range, value, answer)| range.map(move |at| (at..at + 1, value, answer)));
                    self.volatile = single.filter(|(at, ..)| !over.contains(&at.start)).collect();
                }
                self.answers += 1;
            }
        }
        Some(reply)
    }

    /// Dies. Of what is not durable this much is left: `survives` has a bit for each change, and for each request that it had
    /// not answered.
    fn die(&mut self, survives: u64) {
        let mut disk = self.durable;
        let unanswered = self.inbox.drain(..).filter(|(request, _)| request.is_change());
        let unanswered = unanswered.map(|(request, _)| (blocks(&request), value(&request), 0));
        for (at, (blocks, value, _)) in self.volatile.drain(..).chain(unanswered).enumerate() {
            if survives >> (at % 64) & 1 == 1 {
                disk[blocks].fill(value);
            }
        }
        self.durable = disk;
    }
}

fn value(request: &Request) -> u64 {
    if request.command != WRITE {
        return 0;
    }
    u64::from_be_bytes(request.payload[..8].try_into().unwrap())
}

/// The kernel's side, and what it may rely on.
#[derive(Default)]
struct Kernel {
    next: u64,
    /// What has no answer: the request, what it must read, the disk that a flush must make durable at least.
    asked: BTreeMap<u64, (Request, Disk)>,
    /// The disk once all that was asked is done.
    disk: Disk,
    /// Values that a block may have after a crash: those since the last that a flush covers.
    answered: BTreeSet<u64>,
    /// For each block the change that is durable at least: by a flush that was answered, or by itself.
    promised: Disk,
    log: Vec<(u64, Request)>,
}

impl Kernel {
    fn ask(&mut self, kind: u8, at: u64, length: u64) -> Request {
        self.next += 1;
        let at = at % BLOCKS as u64;
        let length = 1 + length % (BLOCKS as u64 - at);
        let (command, flags) = match kind % 8 {
            0 | 1 => (READ, 0),
            2 => (FLUSH, 0),
            3 => (TRIM, 0),
            4 => (WRITE_ZEROES, 0),
            5 => (WRITE, FUA),
            _ => (WRITE, 0),
        };
        let mut request = Request::flush(self.next);
        (request.command, request.flags) = (command, flags);
        if command != FLUSH {
            (request.offset, request.length) = (at * BLOCK, (length * BLOCK) as u32);
        }
        let before = self.disk;
        if command == WRITE {
            let block = [&self.next.to_be_bytes()[..], &[0; BLOCK as usize - 8]].concat();
            request.payload = Arc::new(block.repeat(length as usize));
        }
        if request.is_change() {
            self.disk[blocks(&request)].fill(value(&request));
            self.log.push((self.next, request.clone()));
        }
        // A flush must cover what was answered before it: for each block the last such change, or a later one.
        let covers = match command {
            FLUSH => {
                let mut last = [0; BLOCKS];
                for (number, change) in &self.log {
                    if self.answered.contains(number) {
                        last[blocks(change)].fill(*number);
                    }
                }
                last
            }
            _ => before,
        };
        self.asked.insert(self.next, (request.clone(), covers));
        request
    }

    fn answered(&mut self, reply: &Reply, durable: &Disk) -> Result<(), String> {
        let (request, expected) = self.asked.remove(&reply.cookie).ok_or("answered twice")?;
        if reply.error != 0 {
            return Err(format!("{request:?} failed with {}", reply.error));
        }
        match request.command {
            READ => {
                for (block, bytes) in blocks(&request).zip(reply.payload.chunks(BLOCK as usize)) {
                    let got = u64::from_be_bytes(bytes[..8].try_into().unwrap());
                    if got != expected[block] {
                        return Err(format!("block {block} reads as {got}, not {}", expected[block]));
                    }
                }
            }
            FLUSH => {
                self.must_have(durable, &expected)?;
                self.promise(&expected);
            }
            _ => {
                self.answered.insert(reply.cookie);
                if request.flags & FUA != 0 {
                    let mut expected = [0; BLOCKS];
                    expected[blocks(&request)].fill(reply.cookie);
                    self.must_have(durable, &expected)?;
                    self.promise(&expected);
                }
            }
        }
        Ok(())
    }

    fn promise(&mut self, expected: &Disk) {
        for (promised, expected) in self.promised.iter_mut().zip(expected) {
            *promised = (*promised).max(*expected);
        }
    }

    /// Each block holds what a change left there, and none before the one that is expected.
    fn must_have(&self, disk: &Disk, expected: &Disk) -> Result<(), String> {
        for block in 0..BLOCKS {
            let here = self
                .log
                .iter()
                .filter(|(_, change)| blocks(change).contains(&block));
            let mut since = here
                .filter(|(number, _)| *number >= expected[block])
                .map(|(_, change)| value(change));
            if !(expected[block] == 0 || since.any(|value| value == disk[block])) {
                return Err(format!(
                    "block {block} holds {}, before {}",
                    disk[block], expected[block]
                ));
            }
        }
        Ok(())
    }
}

/// All three together.
struct World {
    machine: Machine,
    kernel: Kernel,
    server: Server,
    link: u64,
    is_up: bool,
    /// What is left of a server that ends by itself.
    survives: u64,
}

impl World {
    fn new() -> Self {
        let machine = Machine::new(export(), HOLD);
        Self {
            machine,
            kernel: Kernel::default(),
            server: Server::default(),
            link: 0,
            is_up: false,
            survives: 0,
        }
    }

    fn handle(&mut self, event: Event) -> Result<(), String> {
        for action in self.machine.handle(event) {
            match action {
                Action::ToServer(request) => {
                    if !self.is_up {
                        return Err("sent without a link".to_owned());
                    }
                    self.server.inbox.push((request, self.server.answers));
                }
                Action::ToKernel(reply) => self.kernel.answered(&reply, &self.server.durable)?,
                Action::Reconnect { .. } => {
                    self.is_up = false;
                    if !self.server.inbox.is_empty() {
                        return Err(
                            "a server that lives still has requests, and may carry them out late".to_owned(),
                        );
                    }
                    self.die(self.survives)?;
                }
                Action::Grow(size) => return Err(format!("grown to {size}")),
                Action::End => return Err("ended".to_owned()),
            }
        }
        if self.machine.held.bytes() > HOLD + BLOCKS * BLOCK as usize + KEPT_BYTES {
            return Err(format!("{} bytes are held", self.machine.held.bytes()));
        }
        Ok(())
    }

    fn connect(&mut self) -> Result<(), String> {
        if self.is_up {
            return Ok(());
        }
        (self.link, self.is_up) = (self.link + 1, true);
        self.handle(Event::LinkUp {
            link: self.link,
            export: export(),
        })
    }

    fn answer(&mut self, which: usize, refuses: bool) -> Result<(), String> {
        match self.server.answer(which, refuses) {
            Some(reply) => self.handle(Event::Reply {
                link: self.link,
                reply,
            }),
            None => Ok(()),
        }
    }

    /// The server is gone. If the kernel's machine went now, too, what it was promised would be there.
    fn die(&mut self, survives: u64) -> Result<(), String> {
        self.server.die(survives);
        self.kernel.must_have(&self.server.durable, &self.kernel.promised)
    }

    fn kill(&mut self, survives: u64) -> Result<(), String> {
        self.die(survives)?;
        self.is_up = false;
        self.handle(Event::LinkLost {
            link: self.link,
            why: "killed".to_owned(),
        })
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        match *step {
            Step::Ask(kind, at, length) => {
                let request = self.kernel.ask(kind, at, length);
                self.handle(Event::Request(request))
            }
            Step::Answer(which) if self.is_up => self.answer(which, false),
            Step::Refuse(which, survives) if self.is_up => {
                self.survives = survives;
                self.answer(which, true)
            }
            Step::Kill(survives) if self.is_up => self.kill(survives),
            Step::Connect => self.connect(),
            Step::Larger => {
                self.survives = 0;
                self.handle(Event::Larger)
            }
            _ => Ok(()),
        }
    }

    /// Everything is answered, a flush too, and the server dies with all that it may lose: nothing is missing.
    fn end(&mut self) -> Result<(), String> {
        for _ in 0..10_000 {
            self.connect()?;
            if self.server.inbox.is_empty() {
                break;
            }
            self.answer(0, false)?;
        }
        if !self.kernel.asked.is_empty() {
            return Err(format!("never answered: {:?}", self.kernel.asked.keys()));
        }
        self.step(&Step::Ask(2, 0, 0))?;
        while !self.server.inbox.is_empty() {
            self.answer(0, false)?;
        }
        self.kill(0)?;
        match self.server.durable == self.kernel.disk {
            true => Ok(()),
            false => Err(format!(
                "it holds {:?}, not {:?}",
                self.server.durable, self.kernel.disk
            )),
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Ask(u8, u64, u64),
    Answer(usize),
    Refuse(usize, u64),
    Kill(u64),
    Connect,
    Larger,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (any::<u8>(), any::<u64>(), 0..3_u64).prop_map(|(kind, at, length)| Step::Ask(kind, at, length)),
        8 => any::<usize>().prop_map(Step::Answer),
        1 => (any::<usize>(), any::<u64>()).prop_map(|(which, survives)| Step::Refuse(which, survives)),
        2 => any::<u64>().prop_map(Step::Kill),
        3 => Just(Step::Connect),
        1 => Just(Step::Larger),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn nothing_that_was_answered_is_missing_over_any_number_of_servers(
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut world = World::new();
        world.connect().unwrap();
        for step in &steps {
            world.step(step).map_err(TestCaseError::fail)?;
        }
        world.end().map_err(TestCaseError::fail)?;
    }
}
