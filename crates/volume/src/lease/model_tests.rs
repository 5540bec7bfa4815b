//! Invariant O1 in a simulated world: owners take a volume from each other, on a store whose answers are lost and whose
//! requests arrive late. Any owner may pause at any step for any time, and clocks show arbitrary times.
//!
//! Somebody asks the holders for growth in their leases, and takes that back, with writes that arrive late as well.
//!
//! The state machines of the lease are the real ones. The owner around them does in steps of one request what
//! `engine/owner/mod.rs` and `engine/fence.rs` do. One seed is one history; a failure names its seed.

use super::state::*;
use super::tests::record;
use super::{GrowthRequest, GrowthStage, LeaseRecord, LeaseState};
use crate::store::ETag;

const OWNERS: usize = 3;
const STEPS: usize = 3000;
const HISTORIES: u64 = 3000;

/// The two rules that keep an old owner out. A test for each disables it.
#[derive(Debug, Clone, Copy)]
struct Defences {
    /// A takeover rewrites the inode.
    rewrite: bool,
    /// After adopting the stored inode the lease is checked.
    check: bool,
}

const ALL: Defences = Defences {
    rewrite: true,
    check: true,
};

#[derive(Debug, Clone, PartialEq, Eq)]
struct Inode {
    version: u64,
    cno: u64,
    /// Time by the writers' clocks. Nothing may depend on it.
    mtime: u64,
    /// The writes that are published, in order.
    writes: Vec<u64>,
}

#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // A few are alive at a time.
enum Request {
    GetLease,
    PutLease(LeaseRecord, Option<ETag>),
    GetInode,
    /// Version 0 in the inode stands for the version that the store assigns. A publish carries its owner's epoch.
    PutInode {
        inode: Inode,
        expected: u64,
        publisher: Option<u64>,
    },
}

#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // One of them is alive at a time.
enum Answer {
    Lease(Option<Stored>),
    LeasePut(ETag),
    Inode(Inode),
    InodePut(u64),
    Refused,
    /// The answer was lost, or the store is unreachable.
    Nothing,
}

#[derive(Default)]
struct Store {
    lease: Option<Stored>,
    inode: Option<Inode>,
    versions: u64,
    /// The highest epoch whose owner has begun to serve.
    serving_epoch: u64,
    /// The first rule that was broken.
    violation: Option<String>,
}

impl Store {
    fn inode(&self) -> Inode {
        self.inode.clone().unwrap_or(Inode {
            version: 0,
            cno: 0,
            mtime: 0,
            writes: vec![],
        })
    }

    fn carry_out(&mut self, request: Request) -> Answer {
        match request {
            Request::GetLease => Answer::Lease(self.lease.clone()),
            Request::GetInode => Answer::Inode(self.inode()),
            Request::PutLease(record, expected) => {
                if self.lease.as_ref().map(|l| &l.version) != expected.as_ref() {
                    return Answer::Refused;
                }
                self.versions += 1;
                let version = ETag(self.versions.to_string());
                self.lease = Some(Stored {
                    record,
                    version: version.clone(),
                });
                Answer::LeasePut(version)
            }
            Request::PutInode {
                inode,
                expected,
                publisher,
            } => {
                if self.inode().version != expected {
                    return Answer::Refused;
                }
                if let Some(epoch) = publisher
                    && epoch < self.serving_epoch
                {
                    let serving = self.serving_epoch;
                    self.violation
                        .get_or_insert(format!("epoch {epoch} publishes while epoch {serving} serves"));
                }
                self.versions += 1;
                self.inode = Some(Inode {
                    version: self.versions,
                    ..inode
                });
                Answer::InodePut(self.versions)
            }
        }
    }
}

/// A request in flight: on its way to the store, then back.
#[derive(Default)]
struct Line {
    request: Option<Request>,
    answer: Option<Answer>,
}

impl Line {
    fn is_busy(&self) -> bool {
        self.request.is_some() || self.answer.is_some()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Taking,
    /// Reading the inode, to rewrite it.
    ReadingToRewrite,
    Rewriting,
    Opening,
    CheckingOpened,
    Serving,
    Publishing,
    /// A publish failed.
    Broken,
    Recovering,
    CheckingRecovered,
    Fenced,
    Ended,
}

struct Owner {
    phase: Phase,
    take: Take,
    keep: Option<Keep>,
    /// Lease requests and data requests run at the same time.
    lease_line: Line,
    data_line: Line,
    token: String,
    epoch: u64,
    adopted: Option<Inode>,
    attempted: Vec<(u64, u64)>,
    unpublished: Vec<u64>,
    /// A publish of this owner may be in flight although nobody waits for it.
    has_strays: bool,
}

struct World {
    defences: Defences,
    random: u64,
    now_ms: u64,
    store: Store,
    owners: Vec<Owner>,
    strays: Vec<Request>,
    acknowledged: Vec<u64>,
    written: u64,
    started: u64,
    takeovers: u64,
    fenced: u64,
    asked: u64,
    /// Requests to grow that owners began to carry out, and those that are known to have been withdrawn.
    grown: Vec<String>,
    withdrawn: Vec<String>,
}

impl World {
    fn new(seed: u64, defences: Defences) -> Self {
        let mut world = Self {
            defences,
            random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            now_ms: 0,
            store: Store::default(),
            owners: Vec::new(),
            strays: Vec::new(),
            acknowledged: Vec::new(),
            written: 0,
            started: 0,
            takeovers: 0,
            fenced: 0,
            asked: 0,
            grown: Vec::new(),
            withdrawn: Vec::new(),
        };
        for _ in 0..OWNERS {
            let owner = world.start();
            world.owners.push(owner);
        }
        world
    }

    fn pick(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % below
    }

    fn start(&mut self) -> Owner {
        self.started += 1;
        let token = format!("owner {}", self.started);
        let options = TakeOptions {
            claim: record(&token, 0),
            takeover: self.pick(4) == 0,
            known_expired: None,
        };
        let mut owner = Owner {
            phase: Phase::Taking,
            take: Take::new(options),
            keep: None,
            lease_line: Line::default(),
            data_line: Line::default(),
            token,
            epoch: 0,
            adopted: None,
            attempted: vec![],
            unpublished: vec![],
            has_strays: false,
        };
        owner.lease_line.request = Some(Request::GetLease);
        owner
    }

    fn step(&mut self) {
        let at = self.pick(OWNERS as u64) as usize;
        let is_lease = self.pick(3) == 0;
        match self.pick(20) {
            0 => self.now_ms += self.pick(400),
            1 if self.pick(10) == 0 => self.ask(),
            1 => {
                if !self.strays.is_empty() {
                    let n = self.pick(self.strays.len() as u64) as usize;
                    let stray = self.strays.swap_remove(n);
                    self.store.carry_out(stray);
                }
            }
            2 => self.give_up(at, is_lease),
            3 if self.pick(10) == 0 => self.kill(at),
            4 if self.pick(4) == 0 => self.close(at),
            5 if self.owners[at].phase == Phase::Ended => self.owners[at] = self.start(),
            6 => self.renew(at),
            7 | 8 if self.owners[at].phase == Phase::Serving => {
                self.written += 1;
                let write = self.written;
                self.owners[at].unpublished.push(write);
            }
            9..=12 => self.deliver(at, is_lease),
            13..=16 => self.hear(at, is_lease),
            _ => self.go_on(at),
        }
    }

    /// Somebody who has read the lease asks its holder to grow the volume, or takes that back.
    fn ask(&mut self) {
        let Some(Stored { record, version }) =
            self.store.lease.clone().filter(|lease| lease.record.is_held())
        else {
            return;
        };
        let growth = match &record.growth {
            Some(asked) if asked.stage == GrowthStage::Asked => asked.at(GrowthStage::Withdrawn),
            Some(taken) if taken.is_pending() => return,
            _ => {
                self.asked += 1;
                GrowthRequest {
                    id: self.asked.to_string(),
                    volume_id: record.volume_id,
                    size_bytes: 1,
                    asked_ms: 0,
                    valid_ms: 0,
                    asked_by: "somebody".into(),
                    stage: GrowthStage::Asked,
                }
            }
        };
        let request = Request::PutLease(
            LeaseRecord {
                growth: Some(growth.clone()),
                ..record
            },
            Some(version),
        );
        if self.pick(3) == 0 {
            self.strays.push(request);
            return;
        }
        let is_stored = matches!(self.store.carry_out(request), Answer::LeasePut(_));
        if is_stored && growth.stage == GrowthStage::Withdrawn {
            self.withdrawn.push(growth.id);
        }
    }

    /// What was asked for is begun once at most, and never once it was taken back.
    fn assert_grown_as_asked(&self, seed: u64) {
        let mut begun = std::collections::HashSet::new();
        for id in &self.grown {
            assert!(begun.insert(id), "request {id} was begun twice, seed {seed}");
            assert!(
                !self.withdrawn.contains(id),
                "request {id} was withdrawn, seed {seed}"
            );
        }
    }

    fn line(&mut self, at: usize, is_lease: bool) -> &mut Line {
        let owner = &mut self.owners[at];
        if is_lease {
            &mut owner.lease_line
        } else {
            &mut owner.data_line
        }
    }

    fn deliver(&mut self, at: usize, is_lease: bool) {
        if let Some(request) = self.line(at, is_lease).request.take() {
            let answer = self.store.carry_out(request);
            self.line(at, is_lease).answer = Some(answer);
        }
    }

    /// The owner stops waiting for the request, which may still arrive.
    fn give_up(&mut self, at: usize, is_lease: bool) {
        if !self.line(at, is_lease).is_busy() {
            return;
        }
        if let Some(request) = self.line(at, is_lease).request.take() {
            self.strays.push(request);
        }
        self.owners[at].has_strays |= !is_lease;
        self.line(at, is_lease).answer = Some(Answer::Nothing);
        self.hear(at, is_lease);
    }

    fn kill(&mut self, at: usize) {
        let owner = &mut self.owners[at];
        owner.phase = Phase::Ended;
        owner.keep = None;
        for line in [&mut owner.lease_line, &mut owner.data_line] {
            self.strays.extend(line.request.take());
            line.answer = None;
        }
    }

    fn close(&mut self, at: usize) {
        let owner = &mut self.owners[at];
        let is_quiet = !owner.lease_line.is_busy() && !owner.data_line.is_busy();
        if !is_quiet || !matches!(owner.phase, Phase::Serving | Phase::Broken) {
            return;
        }
        // As in `Volume::close`: the last flush succeeded, so no earlier publish can succeed any more.
        let is_clean = owner.phase == Phase::Serving && owner.unpublished.is_empty();
        self.keep_on(
            at,
            KeepEvent::ReleaseWanted {
                is_clean,
                is_buffer_left: true,
            },
        );
        // The owner writes nothing from here on.
        self.owners[at].phase = Phase::Fenced;
    }

    fn renew(&mut self, at: usize) {
        if self.owners[at].phase != Phase::Fenced && !self.owners[at].lease_line.is_busy() {
            self.keep_on(at, KeepEvent::RenewDue);
        }
    }

    fn keep_on(&mut self, at: usize, event: KeepEvent) {
        let owner = &mut self.owners[at];
        let Some(keep) = owner.keep.as_mut() else { return };
        match keep.on(event) {
            KeepAction::Wait => {}
            KeepAction::Grow(request) => {
                self.grown.push(request.id);
                self.keep_on(at, KeepEvent::GrowthEnded(GrowthStage::Grown { size_bytes: 1 }));
            }
            KeepAction::Put { record, expected } => {
                owner.lease_line.request = Some(Request::PutLease(record, Some(expected)))
            }
            KeepAction::Read => owner.lease_line.request = Some(Request::GetLease),
            KeepAction::Pause => self.keep_on(at, KeepEvent::Paused),
            KeepAction::Lost { .. } => self.fence(at),
            KeepAction::Ended => self.kill(at),
        }
    }

    fn fence(&mut self, at: usize) {
        self.fenced += 1;
        self.kill(at);
    }

    fn hear(&mut self, at: usize, is_lease: bool) {
        let Some(answer) = self.line(at, is_lease).answer.take() else {
            return;
        };
        if !is_lease {
            return self.data_answer(at, answer);
        }
        if self.owners[at].phase == Phase::Taking {
            return self.take_answer(at, answer);
        }
        let event = match answer {
            Answer::LeasePut(version) => KeepEvent::PutAccepted(version),
            Answer::Refused => KeepEvent::PutRefused,
            Answer::Lease(found) => KeepEvent::Found(found),
            _ => KeepEvent::PutUnknown,
        };
        self.keep_on(at, event);
    }

    fn take_answer(&mut self, at: usize, answer: Answer) {
        let event = match answer {
            Answer::LeasePut(version) => TakeEvent::PutAccepted(version),
            Answer::Refused => TakeEvent::PutRefused,
            Answer::Lease(None) => TakeEvent::Absent { epoch_seen: 0 },
            Answer::Lease(Some(stored)) => {
                let runs = self
                    .owners
                    .iter()
                    .any(|o| o.token == stored.record.token && o.phase != Phase::Ended);
                TakeEvent::Found {
                    stored,
                    // A holder that runs is on another machine, and may be paused.
                    holder: if runs { Liveness::Unknown } else { Liveness::Ended },
                    now_ms: self.now_ms,
                }
            }
            _ => TakeEvent::PutUnknown,
        };
        let action = self.owners[at].take.on(event);
        let rewrite = self.defences.rewrite;
        let owner = &mut self.owners[at];
        match action {
            TakeAction::Read { .. } => owner.lease_line.request = Some(Request::GetLease),
            TakeAction::Put { record, expected } => {
                owner.lease_line.request = Some(Request::PutLease(record, expected))
            }
            TakeAction::Taken(taken) => {
                owner.epoch = taken.stored.record.epoch;
                owner.keep = Some(Keep::new(taken.stored));
                owner.phase = if taken.is_after_release || !rewrite {
                    Phase::Opening
                } else {
                    Phase::ReadingToRewrite
                };
                self.takeovers += u64::from(!taken.is_after_release);
            }
            TakeAction::Refused { .. } | TakeAction::GiveUp => self.kill(at),
        }
    }

    /// The next data request, if the owner has one to make.
    fn go_on(&mut self, at: usize) {
        if self.owners[at].data_line.is_busy() {
            return;
        }
        let mtime = self.pick(4);
        let owner = &mut self.owners[at];
        let request = match owner.phase {
            Phase::ReadingToRewrite | Phase::Opening => Request::GetInode,
            Phase::CheckingOpened | Phase::CheckingRecovered => Request::GetLease,
            Phase::Broken => {
                owner.phase = Phase::Recovering;
                Request::GetInode
            }
            Phase::Serving if !owner.unpublished.is_empty() => {
                owner.phase = Phase::Publishing;
                let mut inode = owner.adopted.clone().expect("open");
                let expected = inode.version;
                let known: Vec<u64> = owner.unpublished.clone();
                inode.writes.extend(known);
                inode.cno += 1;
                inode.mtime = mtime;
                owner.attempted.push((inode.cno, mtime));
                Request::PutInode {
                    inode,
                    expected,
                    publisher: Some(owner.epoch),
                }
            }
            _ => return,
        };
        owner.data_line.request = Some(request);
    }

    fn data_answer(&mut self, at: usize, answer: Answer) {
        let check = self.defences.check;
        let owner = &mut self.owners[at];
        match (owner.phase, answer) {
            (Phase::ReadingToRewrite, Answer::Inode(inode)) => {
                owner.phase = Phase::Rewriting;
                owner.data_line.request = Some(Request::PutInode {
                    expected: inode.version,
                    inode: Inode {
                        mtime: inode.mtime + 1,
                        ..inode
                    },
                    publisher: None,
                });
            }
            (Phase::Rewriting, Answer::InodePut(_)) => owner.phase = Phase::Opening,
            (Phase::Rewriting, _) => owner.phase = Phase::ReadingToRewrite,
            (Phase::Opening, Answer::Inode(inode)) => {
                owner.adopted = Some(inode);
                owner.phase = Phase::CheckingOpened;
                if !check {
                    self.serve(at);
                }
            }
            (Phase::CheckingOpened | Phase::CheckingRecovered, Answer::Lease(found)) => {
                if found.is_none_or(|l| l.record.token != owner.token) {
                    return self.fence(at);
                }
                if owner.phase == Phase::CheckingOpened {
                    self.serve(at);
                } else {
                    owner.phase = Phase::Serving;
                }
            }
            (Phase::Publishing, Answer::InodePut(version)) => {
                let (cno, mtime) = *owner.attempted.last().expect("attempted");
                owner.attempted.clear();
                owner.phase = Phase::Serving;
                let adopted = owner.adopted.as_mut().expect("open");
                adopted.writes.append(&mut owner.unpublished.clone());
                (adopted.version, adopted.cno, adopted.mtime) = (version, cno, mtime);
                let acknowledged = std::mem::take(&mut owner.unpublished);
                self.acknowledge(acknowledged);
            }
            (Phase::Publishing, _) => owner.phase = Phase::Broken,
            (Phase::Recovering, Answer::Inode(inode)) => {
                let published = owner.adopted.as_ref().expect("open");
                let is_published = (inode.cno, inode.mtime) == (published.cno, published.mtime);
                let is_attempted = inode.cno > published.cno
                    && owner.attempted.iter().any(|(_, mtime)| *mtime == inode.mtime);
                if !is_published && !is_attempted {
                    return self.fence(at);
                }
                if is_attempted {
                    owner.attempted.clear();
                }
                owner.adopted = Some(inode);
                owner.phase = if check {
                    Phase::CheckingRecovered
                } else {
                    Phase::Serving
                };
            }
            (Phase::Recovering, _) => owner.phase = Phase::Broken,
            // The owner reads again.
            _ => {}
        }
    }

    fn serve(&mut self, at: usize) {
        let owner = &mut self.owners[at];
        owner.phase = Phase::Serving;
        self.store.serving_epoch = self.store.serving_epoch.max(owner.epoch);
    }

    fn acknowledge(&mut self, writes: Vec<u64>) {
        self.acknowledged.extend(writes);
        self.check_acknowledged();
    }

    fn check_acknowledged(&mut self) {
        let stored = self.store.inode().writes;
        if let Some(write) = self.acknowledged.iter().find(|write| !stored.contains(write)) {
            let lost = format!("write {write} was acknowledged and is lost");
            self.store.violation.get_or_insert(lost);
        }
    }

    fn run(mut self) -> Self {
        let mut epoch = 0;
        for _ in 0..STEPS {
            self.step();
            let stored = self.store.lease.as_ref().map_or(0, |l| l.record.epoch);
            assert!(stored >= epoch, "epochs go back");
            epoch = stored;
        }
        self.check_acknowledged();
        self
    }
}

#[test]
fn of_two_owners_one_at_most_publishes_after_the_others_takeover() {
    let (mut acknowledged, mut takeovers, mut fenced, mut released) = (0, 0, 0, 0);
    let (mut grown, mut withdrawn) = (0, 0);
    for seed in 0..HISTORIES {
        let world = World::new(seed, ALL).run();
        assert_eq!(world.store.violation, None, "O1, seed {seed}");
        acknowledged += world.acknowledged.len();
        takeovers += world.takeovers;
        fenced += world.fenced;
        world.assert_grown_as_asked(seed);
        grown += world.grown.len();
        withdrawn += world.withdrawn.len();
        let lease = world.store.lease.map(|l| l.record.state);
        released += u32::from(lease == Some(LeaseState::Released));
    }
    // Histories in which nothing happens prove nothing.
    let seen = format!(
        "{acknowledged} writes, {takeovers} takeovers, {fenced} fenced, {released} released, {grown} grown, {withdrawn} withdrawn"
    );
    println!("{seen}");
    assert!(
        acknowledged > 10_000
            && takeovers > 20_000
            && fenced > 2000
            && released > 10
            && grown > 100
            && withdrawn > 100,
        "{seen}"
    );
}

fn is_broken_without(defences: Defences) -> bool {
    (0..HISTORIES).any(|seed| World::new(seed, defences).run().store.violation.is_some())
}

#[test]
fn without_the_rewrite_of_the_inode_an_old_owner_goes_on_publishing() {
    assert!(is_broken_without(Defences {
        rewrite: false,
        ..ALL
    }));
}

#[test]
fn without_the_check_of_the_lease_an_old_owner_adopts_the_new_ones_state() {
    assert!(is_broken_without(Defences { check: false, ..ALL }));
}
