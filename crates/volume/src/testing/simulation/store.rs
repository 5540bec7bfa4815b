//! The store of the simulation, and the network before it: versioned objects, conditional writes, and requests that are
//! refused, carried out without an answer, or carried out long after they were given up.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::task::Poll;

use crate::checkpoint::machine_world::{Cells, Record};
use crate::lease::LeaseRecord;
use crate::wal::RecordId;

/// The name of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    Lease,
    Marker,
    Inode,
    /// Of the catalogue, by checkpoint.
    Entry(u64),
    Record(RecordId),
}

/// The container: its inode stands for all that it names, which never changes once stored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inode {
    pub cno: u64,
    /// By the writers' clocks, on which nothing may depend.
    pub mtime: u64,
    pub cells: Cells,
}

/// What an object says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // There is one lease, and one request for it an owner.
pub enum Body {
    Lease(LeaseRecord),
    Marker {
        epoch: u64,
        watermark: u64,
        is_clean: bool,
    },
    Inode(Inode),
    Entry {
        epoch: u64,
        generation: u64,
        is_repaired: bool,
    },
    Record(Record),
}

/// What is asked of the store.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // There are a few of them at a time.
pub enum Request {
    Get(Key),
    /// All names of groups, or all of the catalogue.
    List {
        is_groups: bool,
    },
    /// Over the version `expected`, or where there is nothing. A publish has the epoch of its owner.
    Put {
        key: Key,
        body: Body,
        expected: Option<u64>,
        publisher: Option<u64>,
    },
    /// Without any condition: some stores ignore those of a DELETE.
    Delete(Key),
}

/// What the store says.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // One of them is alive at a time.
pub enum Answer {
    Found(Option<(Body, u64)>),
    Listed(Vec<Key>),
    Stored(u64),
    /// The condition is not met.
    Refused,
    Deleted,
    /// Lost, or the store is away.
    Nothing,
}

/// How a request fares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    CarriedOut,
    NeverArrives,
    AnswerLost,
    /// Given up, and on its way all the same.
    Late,
}

#[derive(Default)]
pub struct Store {
    pub objects: BTreeMap<Key, (Body, u64)>,
    versions: u64,
    /// The highest epoch whose owner has begun to serve.
    pub serving_epoch: u64,
    /// The first rule that was broken.
    pub violation: Option<String>,
}

impl Store {
    pub fn violate(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    pub fn carry_out(&mut self, request: Request) -> Answer {
        match request {
            Request::Get(key) => Answer::Found(self.objects.get(&key).cloned()),
            Request::List { is_groups } => {
                let is_listed =
                    |k: &&Key| matches!((k, is_groups), (Key::Record(_), true) | (Key::Entry(_), false));
                Answer::Listed(self.objects.keys().filter(is_listed).copied().collect())
            }
            Request::Delete(key) => {
                self.objects.remove(&key);
                Answer::Deleted
            }
            Request::Put {
                key,
                body,
                expected,
                publisher,
            } => {
                if self.objects.get(&key).map(|o| o.1) != expected {
                    return Answer::Refused;
                }
                if let Some(epoch) = publisher.filter(|epoch| *epoch < self.serving_epoch) {
                    let serving = self.serving_epoch;
                    self.violate(format!(
                        "O1: epoch {epoch} publishes while epoch {serving} serves"
                    ));
                }
                self.versions += 1;
                self.objects.insert(key, (body, self.versions));
                Answer::Stored(self.versions)
            }
        }
    }
}

struct Flight {
    id: u64,
    owner: u64,
    request: Request,
}

/// The store, all that is on its way to it and back, and what all owners share: time, chance, and who runs.
#[derive(Default)]
pub struct Network {
    pub store: Store,
    on_their_way: Vec<Flight>,
    /// Answers on their way back: request, owner.
    answers: Vec<(u64, u64, Answer)>,
    heard: BTreeMap<u64, Answer>,
    /// Requests that nobody waits for any more.
    strays: Vec<Request>,
    requests: u64,
    pub now_ms: u64,
    /// The owners that have not ended.
    pub running: BTreeSet<u64>,
}

impl Network {
    fn send(&mut self, owner: u64, request: Request) -> u64 {
        self.requests += 1;
        let id = self.requests;
        self.on_their_way.push(Flight { id, owner, request });
        id
    }

    /// The request with this place on the way, if there is one, meets its fate.
    pub fn arrive(&mut self, nth: u64, fate: Fate) {
        let Some(at) = place(nth, self.on_their_way.len()) else {
            return;
        };
        let Flight { id, owner, request } = self.on_their_way.swap_remove(at);
        let answer = match fate {
            Fate::CarriedOut => self.store.carry_out(request),
            Fate::NeverArrives => Answer::Nothing,
            Fate::AnswerLost => {
                self.store.carry_out(request);
                Answer::Nothing
            }
            Fate::Late => {
                self.strays.push(request);
                Answer::Nothing
            }
        };
        self.answers.push((id, owner, answer));
    }

    /// A request that was given up arrives.
    pub fn land(&mut self, nth: u64) {
        if let Some(at) = place(nth, self.strays.len()) {
            let stray = self.strays.swap_remove(at);
            self.store.carry_out(stray);
        }
    }

    /// An owner hears an answer, unless it stands still; which one it was.
    pub fn hear(&mut self, nth: u64, stands_still: impl Fn(u64) -> bool) -> Option<u64> {
        let at = place(nth, self.answers.len())?;
        if stands_still(self.answers[at].1) {
            return None;
        }
        let (id, owner, answer) = self.answers.swap_remove(at);
        self.heard.insert(id, answer);
        Some(owner)
    }

    /// An owner has ended; what it sent may still arrive.
    pub fn forget(&mut self, owner: u64) {
        self.running.remove(&owner);
        self.answers.retain(|a| a.1 != owner);
        let (gone, rest) = std::mem::take(&mut self.on_their_way)
            .into_iter()
            .partition(|f| f.owner == owner);
        self.on_their_way = rest;
        let gone: Vec<Flight> = gone;
        self.strays.extend(gone.into_iter().map(|f| f.request));
    }
}

fn place(nth: u64, len: usize) -> Option<usize> {
    (len > 0).then(|| (nth % len as u64) as usize)
}

/// Chance, from a seed (xorshift).
#[derive(Debug, Clone)]
pub struct Random(Rc<Cell<u64>>);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(Rc::new(Cell::new(
            (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
        )))
    }

    pub fn pick(&self, below: u64) -> u64 {
        let mut x = self.0.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.set(x);
        (x >> 11) % below
    }
}

/// One owner's way to the store.
#[derive(Clone)]
pub struct Client {
    pub network: Rc<RefCell<Network>>,
    pub random: Random,
    pub owner: u64,
}

impl Client {
    pub async fn ask(&self, request: Request) -> Answer {
        let id = self.network.borrow_mut().send(self.owner, request);
        std::future::poll_fn(|_| match self.network.borrow_mut().heard.remove(&id) {
            Some(answer) => Poll::Ready(answer),
            None => Poll::Pending,
        })
        .await
    }

    /// Again and again, for as long as it takes.
    pub async fn get(&self, key: Key) -> Option<(Body, u64)> {
        loop {
            if let Answer::Found(found) = self.ask(Request::Get(key)).await {
                return found;
            }
        }
    }

    pub async fn list(&self, is_groups: bool) -> Vec<Key> {
        loop {
            if let Answer::Listed(keys) = self.ask(Request::List { is_groups }).await {
                return keys;
            }
        }
    }

    pub async fn put(&self, key: Key, body: Body, expected: Option<u64>) -> Answer {
        let publisher = None;
        self.ask(Request::Put {
            key,
            body,
            expected,
            publisher,
        })
        .await
    }
}
