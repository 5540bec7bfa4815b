//! An owner of the simulation: the real lease machines, and behind them the real `Machine` with its log. Everything it
//! does with the store is a task that waits for one answer after another.

use std::collections::BTreeSet;
use std::task::{Context, Poll};

use futures::FutureExt;
use futures::future::LocalBoxFuture;

use super::shells::{Defences, End, Engine, Identity};
use super::store::{Answer, Body, Client, Key};
use super::wal::{Marker, Opened, Wal, open};
use crate::base::ids::GenerationId;
use crate::checkpoint::machine::Event;
use crate::checkpoint::machine_world::{self as world, Cells, Record};
use crate::checkpoint::state::{self, PublishEnd};
use crate::lease::state::*;
use crate::lease::tests::record;
use crate::store::ETag;
use crate::wal::RecordId;
use crate::wal::group_commit::{self, AppendEnd};

/// How a task ended.
#[allow(clippy::large_enum_variant)] // One of them is alive at a time.
enum Done {
    /// The opening failed, or the owner has closed.
    Ended,
    Opened(Box<(Identity, Stored, Opened)>),
    Published(Box<Engine>, PublishEnd),
    Appended(u64, Record, AppendEnd),
    Trimmed(Vec<Key>),
    Renewed(Keep, bool),
}

/// What of an owner's doing the outside sees.
#[derive(Default)]
pub struct Report {
    /// What its answered flushes cover.
    pub acknowledged: Vec<Cells>,
    pub has_begun_to_serve: bool,
    pub is_fenced: bool,
}

/// The owner once it serves.
pub struct Serving {
    me: Identity,
    pub volume: world::Owner,
    /// What its clients must see.
    pub expected: Cells,
    /// Absent while a publish has it.
    engine: Option<Box<Engine>>,
    wal: Wal,
    marker: Option<Marker>,
    keep: Option<Keep>,
    older_may_run: bool,
    sent: BTreeSet<u64>,
    trimmed: GenerationId,
    is_trimming: bool,
    pub is_closing: bool,
}

pub struct Owner {
    pub number: u64,
    client: Client,
    tasks: Vec<LocalBoxFuture<'static, Done>>,
    pub serving: Option<Box<Serving>>,
    pub is_ended: bool,
    pub stands_still: bool,
    depth: usize,
}

impl Owner {
    /// One that begins to open the volume.
    pub fn start(client: Client, takeover: bool, defences: Defences, depth: usize) -> Self {
        let number = client.owner;
        client.network.borrow_mut().running.insert(number);
        let opening = opening(client.clone(), takeover, defences);
        Self {
            number,
            client,
            tasks: vec![opening.boxed_local()],
            serving: None,
            is_ended: false,
            stands_still: false,
            depth,
        }
    }

    pub fn epoch(&self) -> Option<u64> {
        self.serving.as_ref().map(|s| s.me.epoch)
    }

    /// One that takes writes.
    pub fn working(&mut self) -> Option<&mut Serving> {
        let serving = self.serving.as_deref_mut();
        serving.filter(|s| !s.is_closing && !s.volume.machine.is_fenced())
    }

    pub fn kill(&mut self) {
        self.tasks.clear();
        self.serving = None;
        self.is_ended = true;
        self.client.network.borrow_mut().forget(self.number);
    }

    /// Goes on as far as it can without another answer.
    pub fn go_on(&mut self) -> Report {
        let mut report = Report::default();
        loop {
            if let Some(serving) = self.serving.as_deref_mut() {
                serving.start_tasks(&mut self.tasks);
            }
            let mut context = Context::from_waker(std::task::Waker::noop());
            let mut ended = Vec::new();
            self.tasks.retain_mut(|task| match task.poll_unpin(&mut context) {
                Poll::Ready(done) => {
                    ended.push(done);
                    false
                }
                Poll::Pending => true,
            });
            if ended.is_empty() {
                break;
            }
            for done in ended {
                match done {
                    Done::Ended => {
                        self.kill();
                        return report;
                    }
                    Done::Opened(opened) => {
                        let (me, lease, opened) = *opened;
                        self.serving = Some(Box::new(Serving::new(me, lease, opened, self.depth)));
                        report.has_begun_to_serve = true;
                    }
                    done => {
                        let serving = self.serving.as_deref_mut().expect("it has tasks of its own");
                        report.acknowledged.extend(serving.ended(done));
                    }
                }
            }
        }
        if let Some(serving) = &self.serving {
            report.is_fenced = serving.volume.machine.is_fenced();
            serving.assert_complete();
        }
        report
    }

    pub fn renew(&mut self) {
        if let Some(serving) = self.serving.as_deref_mut()
            && let Some(keep) = serving.keep.take()
        {
            let renewing = drive(serving.me.clone(), keep, KeepEvent::RenewDue);
            let task = renewing.map(|(keep, is_lost)| Done::Renewed(keep, is_lost));
            self.tasks.push(task.boxed_local());
        }
    }

    /// The clean end, if everything is published and nothing on its way.
    pub fn close(&mut self) {
        let is_quiet = self.tasks.is_empty();
        let Some(serving) = self
            .working()
            .filter(|s| is_quiet && s.volume.unpublished().is_empty())
        else {
            return;
        };
        serving.is_closing = true;
        let me = serving.me.clone();
        let wal = std::mem::take(&mut serving.wal);
        let mut marker = serving.marker.take().expect("open");
        let keep = serving.keep.take().expect("no task has it");
        let (generation, is_older_alive) = (serving.volume.machine.active().0, serving.older_may_run);
        let closing = async move {
            // What is left of the log is in nobody's way.
            let _ = wal.finish(&me, &mut marker, generation, is_older_alive).await;
            drive(
                me,
                keep,
                KeepEvent::ReleaseWanted {
                    is_clean: true,
                    is_buffer_left: true,
                },
            )
            .await;
            Done::Ended
        };
        self.tasks.push(closing.boxed_local());
    }
}

impl Serving {
    fn new(me: Identity, lease: Stored, opened: Opened, depth: usize) -> Self {
        let first = GenerationId(opened.generation + 1);
        let next_sequence = opened.wal.first_sequence;
        let volume = world::Owner::new(me.epoch as u32, first, next_sequence, depth);
        Self {
            volume,
            expected: opened.engine.published.cells.clone(),
            engine: Some(Box::new(opened.engine)),
            wal: opened.wal,
            marker: Some(opened.marker),
            older_may_run: lease.record.older_may_run,
            keep: Some(Keep::new(lease)),
            sent: BTreeSet::new(),
            trimmed: GenerationId(opened.generation),
            is_trimming: false,
            is_closing: false,
            me,
        }
    }

    pub fn write(&mut self, cell: u8, value: u64) -> Vec<Cells> {
        self.expected.insert(cell, value);
        self.volume.write(cell, value)
    }

    /// W1: what is published and what is not are together what its clients wrote.
    fn assert_complete(&self) {
        if let Some(engine) = &self.engine {
            let mut seen = engine.published.cells.clone();
            seen.extend(self.volume.unpublished());
            if seen != self.expected {
                let what = format!("W1: clients see {seen:?} for {:?}", self.expected);
                self.me.client.network.borrow_mut().store.violate(what);
            }
        }
    }

    fn start_tasks(&mut self, tasks: &mut Vec<LocalBoxFuture<'static, Done>>) {
        for &sequence in &self.volume.appends {
            if self.sent.insert(sequence) {
                let (me, group) = (self.me.clone(), self.volume.groups[&sequence].clone());
                let appending = async move {
                    let end = me.append(sequence, group.clone()).await;
                    Done::Appended(sequence, group, end)
                };
                tasks.push(appending.boxed_local());
            }
        }
        // One beside it makes its checkpoint after this one is recorded, so it is started then.
        if let Some(oldest) = self.volume.frozen.front().filter(|f| f.is_publishing)
            && let Some(mut engine) = self.engine.take()
        {
            let (me, attempt) = (self.me.clone(), oldest.attempt);
            let (generation, cells) = (oldest.id, oldest.cells.clone());
            let publishing = async move {
                let end = match engine.publish(&me, &cells, generation.0, attempt).await {
                    Ok(()) => PublishEnd::Published,
                    Err(end) => end,
                };
                Done::Published(engine, end)
            };
            tasks.push(publishing.boxed_local());
        }
        if self.trimmed < self.volume.trimmed && !self.is_trimming {
            self.is_trimming = true;
            self.trimmed = self.volume.trimmed;
            let old = self
                .wal
                .old(self.me.epoch, self.trimmed.0, self.volume.acknowledged);
            let me = self.me.clone();
            let trimming = async move {
                match me.delete(old.clone()).await {
                    Ok(()) => Done::Trimmed(old),
                    Err(End) => Done::Trimmed(Vec::new()),
                }
            };
            tasks.push(trimming.boxed_local());
        }
    }

    fn ended(&mut self, done: Done) -> Vec<Cells> {
        match done {
            Done::Published(engine, end) => {
                self.engine = Some(engine);
                self.volume.publish_ended(end)
            }
            Done::Appended(sequence, group, end) => {
                self.sent.remove(&sequence);
                self.volume.appends.retain(|s| *s != sequence);
                if end == AppendEnd::Durable {
                    let epoch = self.me.epoch;
                    let id = RecordId { epoch, sequence };
                    self.wal.stored.insert(id, group.newest().0);
                }
                let ended = group_commit::Event::AppendEnded { sequence, end };
                self.volume.feed(Event::Wal(ended))
            }
            Done::Trimmed(keys) => {
                self.is_trimming = false;
                self.wal.stored.retain(|id, _| !keys.contains(&Key::Record(*id)));
                Vec::new()
            }
            Done::Renewed(keep, is_lost) => {
                self.keep = Some(keep);
                match is_lost {
                    true => self.volume.feed(Event::Volume(state::Event::Fenced)),
                    false => Vec::new(),
                }
            }
            Done::Opened(_) | Done::Ended => unreachable!("of the owner as a whole"),
        }
    }
}

fn etag(version: u64) -> ETag {
    ETag(version.to_string())
}

fn version(etag: &ETag) -> u64 {
    etag.0.parse().expect("a version")
}

/// `lease/keeper.rs`: takes the lease, rewrites the inode, opens the volume.
async fn opening(client: Client, takeover: bool, defences: Defences) -> Done {
    let mut me = Identity {
        token: client.owner.to_string(),
        epoch: 0,
        client,
        defences,
    };
    let opened = async {
        let taken = take(&me, takeover).await?;
        me.epoch = taken.stored.record.epoch;
        if defences.rewrite && !taken.is_after_release {
            me.rewrite_inode().await?;
        }
        let opened = open(&me).await?;
        Ok::<_, End>((taken.stored, opened))
    }
    .await;
    match opened {
        Ok((lease, opened)) => Done::Opened(Box::new((me, lease, opened))),
        Err(End) => Done::Ended,
    }
}

async fn take(me: &Identity, takeover: bool) -> Result<Taken, End> {
    let mut take = Take::new(TakeOptions {
        claim: record(&me.token, 0),
        takeover,
        known_expired: None,
    });
    let mut action = TakeAction::Read { wait_ms: 0 };
    loop {
        let event = match action {
            TakeAction::Read { wait_ms } => {
                me.client.network.borrow_mut().now_ms += me.client.random.pick(wait_ms + 1);
                match me.lease().await {
                    None => TakeEvent::Absent { epoch_seen: 0 },
                    Some((record, version)) => {
                        let network = me.client.network.borrow();
                        let holder: u64 = record.token.parse().expect("an owner's number");
                        // One that runs is elsewhere, and may be standing still.
                        let is_known_ended =
                            !network.running.contains(&holder) && me.client.random.pick(2) == 0;
                        TakeEvent::Found {
                            stored: Stored {
                                record,
                                version: etag(version),
                            },
                            holder: match is_known_ended {
                                true => Liveness::Ended,
                                false => Liveness::Unknown,
                            },
                            now_ms: network.now_ms,
                        }
                    }
                }
            }
            TakeAction::Put { record, expected } => {
                let expected = expected.as_ref().map(version);
                match me.client.put(Key::Lease, Body::Lease(record), expected).await {
                    Answer::Stored(version) => TakeEvent::PutAccepted(etag(version)),
                    Answer::Refused => TakeEvent::PutRefused,
                    _ => TakeEvent::PutUnknown,
                }
            }
            TakeAction::Taken(taken) => return Ok(taken),
            TakeAction::Refused { .. } | TakeAction::GiveUp => return Err(End),
        };
        action = take.on(event);
    }
}

/// Renews or releases. Whether the lease is lost.
async fn drive(me: Identity, mut keep: Keep, event: KeepEvent) -> (Keep, bool) {
    let mut action = keep.on(event);
    loop {
        let event = match action {
            KeepAction::Wait | KeepAction::Grow(_) | KeepAction::Ended => return (keep, false),
            KeepAction::Lost { .. } => return (keep, true),
            KeepAction::Put { record, expected } => {
                let expected = Some(version(&expected));
                match me.client.put(Key::Lease, Body::Lease(record), expected).await {
                    Answer::Stored(version) => KeepEvent::PutAccepted(etag(version)),
                    Answer::Refused => KeepEvent::PutRefused,
                    _ => KeepEvent::PutUnknown,
                }
            }
            KeepAction::Pause => KeepEvent::Paused,
            KeepAction::Read => KeepEvent::Found(me.lease().await.map(|(record, version)| Stored {
                record,
                version: etag(version),
            })),
        };
        action = keep.on(event);
    }
}
