//! How a lease is taken, kept and lost (pure: events in, actions out; no clock, no I/O).
//!
//! Events carry the time, in milliseconds of the taker's own monotonic clock. The clocks of two machines are never
//! compared: a lease has run out when it was *watched* for its duration and did not change.
//!
//! Taking, [`Take`]:
//!
//! | what is stored | what is done |
//! |---|---|
//! | nothing | create it |
//! | released or abandoned | replace it: its holder has ended and will not come back |
//! | held, and the user said `takeover` | replace it at once |
//! | held, its process is known to have ended | replace it at once |
//! | held, its process is known to run | refused at once |
//! | held, not seen to change for its duration | replace it |
//! | held, seen to change | refused: its holder is alive |
//! | ours | taken: an earlier write of ours took effect, and its answer was lost |
//!
//! A lease in which somebody has asked its holder for something (`growth.rs`) has not been seen to change, also where a write over it was
//! refused because of that.
//!
//! Keeping, [`Keep`]: the lease is renewed regularly. A failed renewal proves nothing and is tried again. Only another
//! owner's token, or an absent lease, is a loss, and a loss is final. A renewal that was refused may have met a request, or one that was
//! withdrawn. It is made again at once: requests, however many, keep no holder from being seen to renew its lease.
//!
//! Giving it back: one failed request would make the next server wait until the lease has run out. So after a clean end the stored lease
//! is looked at, and the release is written once more, over nothing but the lease that was this owner's then. Nothing waits longer for a
//! store that is away.

use super::growth::{Growing, GrowthRequest, GrowthStage, Step};
use super::record::{LeaseRecord, LeaseState};
use crate::store::ETag;

/// How often the lease is written at most when the answers are lost.
const PUTS_MAX: u32 = 5;
/// How often the release of a clean end is written again when it failed.
const RELEASES_AGAIN_MAX: u32 = 1;
/// A watched lease is read this many times in its duration ...
const LOOKS: u64 = 15;
/// ... but not less often than this, nor more often than [`LOOK_MS_MIN`].
const LOOK_MS_MAX: u64 = 2000;
const LOOK_MS_MIN: u64 = 20;

/// A stored lease, and the write that stored it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The contents of the lease.
    pub record: LeaseRecord,
    /// The ETag of the write.
    pub version: ETag,
}

/// What is known of a holder's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// The process runs.
    Runs,
    /// The process has ended, or does not use the volume any more.
    Ended,
    /// The process cannot be seen from here.
    Unknown,
}

/// What happened while taking a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // There are a handful of them in the life of a volume.
pub enum TakeEvent {
    /// No lease is stored.
    Absent {
        /// The highest epoch known from elsewhere (the checkpoint list); 0 for none.
        epoch_seen: u64,
    },
    /// This lease is stored.
    Found {
        /// The lease.
        stored: Stored,
        /// Whether its holder is known to run.
        holder: Liveness,
        /// The taker's clock.
        now_ms: u64,
    },
    /// The requested write was carried out.
    PutAccepted(ETag),
    /// The write was refused, because the stored lease is not the one that was read.
    PutRefused,
    /// It is not known whether the write was carried out.
    PutUnknown,
}

/// The next action for taking a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TakeAction {
    /// Read the lease, after a wait.
    Read {
        /// How long to wait first, in milliseconds.
        wait_ms: u64,
    },
    /// Write this lease: in place of the write `expected`, or as a new object when that is `None`.
    Put {
        /// What to write.
        record: LeaseRecord,
        /// The write that must be the stored one.
        expected: Option<ETag>,
    },
    /// The lease is taken.
    Taken(Taken),
    /// Another owner holds the volume.
    Refused {
        /// The lease of that owner.
        by: LeaseRecord,
        /// How that owner is known to be alive.
        why: Refusal,
    },
    /// Every answer of the store was lost.
    GiveUp,
}

/// A lease that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// The lease as it is stored now.
    pub stored: Stored,
    /// Whether the replaced lease was released. If it was not, its owner may come back, and must be fenced by a rewrite
    /// of the container's inode.
    pub is_after_release: bool,
    /// The token of the lease that was replaced, if there was one.
    pub predecessor: Option<String>,
}

/// How a holder is known to be alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its process runs on this machine.
    RunsHere,
    /// The holder renewed its lease while the lease was watched.
    Renewed {
        /// How long the lease was watched, in milliseconds.
        watched_ms: u64,
    },
    /// The holder took the lease at the same moment.
    TookIt,
}

/// How to take a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakeOptions {
    /// The lease to take. It gets the next epoch above its own and above all epochs that were seen.
    pub claim: LeaseRecord,
    /// Takes the lease whoever holds it.
    pub takeover: bool,
    /// The ETag of a lease that was already watched for its whole duration.
    pub known_expired: Option<ETag>,
}

#[derive(Debug, Clone)]
struct Watch {
    stored: Stored,
    since_ms: u64,
}

impl Watch {
    /// Whether the holder has written nothing since: the lease is the same, or somebody else asked something in it.
    fn is_unchanged(&self, now: &Stored) -> bool {
        let (then, record) = (&self.stored.record, &now.record);
        let is_asked_alone = then.growth != record.growth
            && (&then.token, then.renewals) == (&record.token, record.renewals)
            && record.is_held();
        self.stored.version == now.version || is_asked_alone
    }
}

#[derive(Debug, Clone)]
struct Asked {
    record: LeaseRecord,
    expected: Option<ETag>,
    /// The token and the renewals of the held lease that the write was to replace.
    over: Option<(String, u64)>,
    is_after_release: bool,
    predecessor: Option<String>,
}

/// The taking of a lease.
#[derive(Debug)]
pub struct Take {
    options: TakeOptions,
    watch: Option<Watch>,
    asked: Option<Asked>,
    puts: u32,
}

impl Take {
    /// Begins. The first action is a read.
    pub fn new(options: TakeOptions) -> Self {
        Self {
            options,
            watch: None,
            asked: None,
            puts: 0,
        }
    }

    /// The token of the lease that the last requested write is to replace, if there is one.
    pub fn predecessor(&self) -> Option<&str> {
        self.asked.as_ref()?.predecessor.as_deref()
    }

    /// Takes an event and returns what is to be done.
    pub fn on(&mut self, event: TakeEvent) -> TakeAction {
        match event {
            TakeEvent::Absent { epoch_seen } => self.put(epoch_seen, None, false, epoch_seen > 0, None),
            TakeEvent::Found {
                stored,
                holder,
                now_ms,
            } => self.found(stored, holder, now_ms),
            TakeEvent::PutAccepted(version) => match &self.asked {
                Some(asked) => TakeAction::Taken(Taken {
                    stored: Stored {
                        record: asked.record.clone(),
                        version,
                    },
                    is_after_release: asked.is_after_release,
                    predecessor: asked.predecessor.clone(),
                }),
                None => TakeAction::Read { wait_ms: 0 },
            },
            // Both cases are handled alike, because the stored lease shows what happened.
            TakeEvent::PutRefused | TakeEvent::PutUnknown => TakeAction::Read { wait_ms: 0 },
        }
    }

    fn found(&mut self, stored: Stored, holder: Liveness, now_ms: u64) -> TakeAction {
        let Stored { record, version } = &stored;
        if record.token == self.options.claim.token {
            // An earlier write of ours took effect, and its answer was lost. Another write of ours that is still in
            // flight will be refused, because the stored lease no longer meets its condition.
            let is_after_release = self.asked.as_ref().is_some_and(|a| a.is_after_release);
            let predecessor = self.asked.as_ref().and_then(|a| a.predecessor.clone());
            return TakeAction::Taken(Taken {
                stored,
                is_after_release,
                predecessor,
            });
        }
        if !record.is_held() {
            let is_after_release = record.state == LeaseState::Released;
            return self.put(
                record.epoch,
                Some(version.clone()),
                is_after_release,
                record.older_may_run,
                Some(record.token.clone()),
            );
        }
        let is_as_asked_for = self
            .asked
            .as_ref()
            .is_none_or(|asked| asked.expected.as_ref() == Some(version));
        if !is_as_asked_for {
            let over = self.asked.as_ref().and_then(|asked| asked.over.as_ref());
            let is_of_same = over.is_some_and(|(token, _)| *token == record.token);
            let was_renewed = over.is_some_and(|(_, renewals)| *renewals != record.renewals);
            // Without a renewal somebody has asked its holder for something.
            if is_of_same && (self.options.takeover || !was_renewed) {
                return self.put_over(&stored, holder);
            }
            // Whoever changed the lease is alive. Two takers that both force the takeover must not replace each other
            // for ever.
            return refused(record, Refusal::TookIt);
        }
        let is_free = self.options.takeover
            || holder == Liveness::Ended
            || self.asked.is_some()
            || self.options.known_expired.as_ref() == Some(version);
        if is_free {
            return self.put_over(&stored, holder);
        }
        if holder == Liveness::Runs {
            return refused(record, Refusal::RunsHere);
        }
        let watched_ms = match &self.watch {
            None => {
                self.watch = Some(Watch {
                    stored: stored.clone(),
                    since_ms: now_ms,
                });
                0
            }
            Some(watch) if watch.is_unchanged(&stored) => now_ms.saturating_sub(watch.since_ms),
            Some(watch) => {
                let watched_ms = now_ms.saturating_sub(watch.since_ms);
                return refused(record, Refusal::Renewed { watched_ms });
            }
        };
        if watched_ms >= record.duration_ms {
            return self.put_over(&stored, holder);
        }
        let look_ms = (record.duration_ms / LOOKS).clamp(LOOK_MS_MIN, LOOK_MS_MAX);
        TakeAction::Read {
            wait_ms: look_ms.min(record.duration_ms - watched_ms),
        }
    }

    /// Replaces a lease that is held.
    fn put_over(&mut self, stored: &Stored, holder: Liveness) -> TakeAction {
        let Stored { record, version } = stored;
        let older_may_run = record.older_may_run || holder != Liveness::Ended;
        let action = self.put(
            record.epoch,
            Some(version.clone()),
            false,
            older_may_run,
            Some(record.token.clone()),
        );
        if let Some(asked) = &mut self.asked {
            asked.over = Some((record.token.clone(), record.renewals));
        }
        action
    }

    fn put(
        &mut self,
        epoch_seen: u64,
        expected: Option<ETag>,
        is_after_release: bool,
        older_may_run: bool,
        predecessor: Option<String>,
    ) -> TakeAction {
        self.puts += 1;
        if self.puts > PUTS_MAX {
            return TakeAction::GiveUp;
        }
        // A write that was given up may still arrive, if its condition still holds. It has the same token, so it counts
        // as ours.
        let record = LeaseRecord {
            epoch: epoch_seen.max(self.options.claim.epoch) + 1,
            older_may_run,
            ..self.options.claim.clone()
        };
        self.asked = Some(Asked {
            record: record.clone(),
            expected: expected.clone(),
            over: None,
            is_after_release,
            predecessor,
        });
        TakeAction::Put { record, expected }
    }
}

fn refused(by: &LeaseRecord, why: Refusal) -> TakeAction {
    TakeAction::Refused { by: by.clone(), why }
}

/// What happened to a held lease.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // There is one now and then.
pub enum KeepEvent {
    /// It is time to renew.
    RenewDue,
    /// The volume is closed.
    ReleaseWanted {
        /// Whether every request to the container is known to have arrived or to have failed.
        is_clean: bool,
        /// Whether the buffer file may hold what is not published.
        is_buffer_left: bool,
    },
    /// The requested write was carried out.
    PutAccepted(ETag),
    /// The write was refused, because the stored lease is not the one that was stored last.
    PutRefused,
    /// It is not known whether the write was carried out.
    PutUnknown,
    /// The lease that is stored.
    Found(Option<Stored>),
    /// The stored lease could not be read.
    ReadFailed,
    /// The requested pause is over.
    Paused,
    /// What [`KeepAction::Grow`] asked for has this end.
    GrowthEnded(GrowthStage),
}

/// The next action for keeping a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeepAction {
    /// Nothing, until the next renewal is due.
    Wait,
    /// Write this lease in place of the write `expected`.
    Put {
        /// What to write.
        record: LeaseRecord,
        /// The write that must be the stored one.
        expected: ETag,
    },
    /// Read the lease.
    Read,
    /// Begin to carry this request out. Then as [`KeepAction::Wait`].
    Grow(GrowthRequest),
    /// A release failed. Wait a moment, then go on with [`KeepEvent::Paused`].
    Pause,
    /// The lease is another owner's now, or gone. Never write to the volume again.
    Lost {
        /// The lease of the new owner, if there is one.
        to: Option<LeaseRecord>,
    },
    /// The lease was released, or could not be. Nothing more is done with it.
    Ended,
}

/// A lease that is held.
#[derive(Debug)]
pub struct Keep {
    stored: Stored,
    /// The final state of the lease, once it is being given back.
    release_as: Option<LeaseState>,
    /// How often the release may still be written again.
    releases_left: u32,
    is_buffer_left: bool,
    is_over: bool,
    growing: Growing,
}

impl Keep {
    /// Begins to keep the lease that was just taken.
    pub fn new(stored: Stored) -> Self {
        Self {
            stored,
            growing: Growing::Idle,
            release_as: None,
            releases_left: 0,
            is_buffer_left: true,
            is_over: false,
        }
    }

    /// The longest time that others watch the lease before they take it.
    pub(super) fn duration(&self) -> std::time::Duration {
        std::time::Duration::from_millis(self.stored.record.duration_ms)
    }

    /// Takes an event and returns what is to be done.
    pub fn on(&mut self, event: KeepEvent) -> KeepAction {
        if self.is_over {
            return KeepAction::Ended;
        }
        match event {
            KeepEvent::RenewDue => self.put(),
            KeepEvent::ReleaseWanted {
                is_clean,
                is_buffer_left,
            } => {
                self.is_buffer_left = is_buffer_left;
                // What ends otherwise does so because its store fails, most often.
                let (state, again) = match is_clean {
                    true => (LeaseState::Released, RELEASES_AGAIN_MAX),
                    false => (LeaseState::Abandoned, 0),
                };
                (self.release_as, self.releases_left) = (Some(state), again);
                self.put()
            }
            KeepEvent::PutAccepted(version) => {
                self.stored = Stored {
                    record: self.next(),
                    version,
                };
                self.done()
            }
            KeepEvent::GrowthEnded(stage) => {
                self.growing.ended(stage);
                self.put()
            }
            KeepEvent::PutRefused => KeepAction::Read,
            // An outage is no loss. If the write was carried out, the next renewal is refused, and the lease is read.
            KeepEvent::PutUnknown if self.release_as.is_some() => KeepAction::Read,
            KeepEvent::PutUnknown => KeepAction::Wait,
            // The condition of the next write is the look.
            KeepEvent::ReadFailed if self.release_as.is_some() => self.pause(),
            KeepEvent::ReadFailed => KeepAction::Wait,
            KeepEvent::Paused => self.put(),
            KeepEvent::Found(found) => self.found(found),
        }
    }

    fn found(&mut self, found: Option<Stored>) -> KeepAction {
        match found {
            Some(stored) if stored.record.token == self.stored.record.token => {
                let is_changed = stored.version != self.stored.version;
                // By somebody else: each write of the holder counts as a renewal.
                let is_asked_alone = is_changed && stored.record.renewals == self.stored.record.renewals;
                self.stored = stored;
                match (self.release_as.is_some(), self.stored.record.is_held()) {
                    (false, _) => match self.growing.found(&self.stored.record) {
                        Step::Put if is_changed => self.put(),
                        // The other write has taken the place of a renewal.
                        Step::Nothing if is_asked_alone => self.put(),
                        Step::Put | Step::Nothing => KeepAction::Wait,
                        Step::Begin(request) => KeepAction::Grow(request),
                    },
                    (true, false) => self.end(KeepAction::Ended),
                    // If an earlier renewal was carried out, the release is written over it. Otherwise the release was not
                    // carried out.
                    (true, true) if is_changed => self.put(),
                    (true, true) => self.pause(),
                }
            }
            other => {
                let to = other.map(|s| s.record);
                self.end(KeepAction::Lost { to })
            }
        }
    }

    fn next(&self) -> LeaseRecord {
        LeaseRecord {
            // The epoch stays in a released lease, so that epochs never go back.
            state: self.release_as.unwrap_or(LeaseState::Held),
            renewals: self.stored.record.renewals + 1,
            growth: self.growing.written(self.release_as.is_some()),
            write_buffer_dir: (self.stored.record.write_buffer_dir.clone()).filter(|_| self.is_buffer_left),
            ..self.stored.record.clone()
        }
    }

    fn put(&self) -> KeepAction {
        KeepAction::Put {
            record: self.next(),
            expected: self.stored.version.clone(),
        }
    }

    /// Before the release is written again, or its end.
    fn pause(&mut self) -> KeepAction {
        match self.releases_left.checked_sub(1) {
            Some(left) => {
                self.releases_left = left;
                KeepAction::Pause
            }
            None => self.end(KeepAction::Ended),
        }
    }

    fn done(&mut self) -> KeepAction {
        if self.release_as.is_some() {
            return self.end(KeepAction::Ended);
        }
        match self.growing.stored() {
            Step::Begin(request) => KeepAction::Grow(request),
            Step::Put | Step::Nothing => KeepAction::Wait,
        }
    }

    fn end(&mut self, action: KeepAction) -> KeepAction {
        self.is_over = true;
        action
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
