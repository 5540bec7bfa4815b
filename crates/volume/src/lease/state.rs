//! How a lease is taken, kept and lost (pure: events in, actions out; no clock, no I/O).
//!
//! Time comes in with the events, in milliseconds of the taker's own monotonic clock. No clocks of two machines are
//! ever compared: a lease has run out when it was *watched* not to change for its duration.
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
//! | ours | an earlier write's answer was lost; it is taken |
//!
//! Keeping, [`Keep`]: renewed again and again; a renewal that fails proves nothing and is tried again; only another's
//! token (or an absent lease) is a loss, and a loss is for good.

use super::record::{LeaseRecord, LeaseState};
use crate::store::ETag;

/// Times a taking is written anew when the answers are lost.
const PUTS_MAX: u32 = 5;
/// A watched lease is looked at so many times in its duration ...
const LOOKS: u64 = 15;
/// ... but not less often than this, nor more often than [`LOOK_MS_MIN`].
const LOOK_MS_MAX: u64 = 2000;
const LOOK_MS_MIN: u64 = 20;

/// A lease as it is stored, and the write that made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// What it says.
    pub record: LeaseRecord,
    /// Which write it is.
    pub version: ETag,
}

/// What is known of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// It runs.
    Runs,
    /// It has ended, or does not use the volume any more.
    Ended,
    /// It cannot be seen from here.
    Unknown,
}

/// What happened while taking a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // There are a handful of them in the life of a volume.
pub enum TakeEvent {
    /// No lease is stored.
    Absent {
        /// The highest epoch known from elsewhere (the catalogue); 0 for none.
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
    /// The write asked for was carried out.
    PutAccepted(ETag),
    /// The write was refused: what is stored is not what was read.
    PutRefused,
    /// Whether the write was carried out is not known.
    PutUnknown,
}

/// What is to be done next to take a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TakeAction {
    /// Read the lease, after a wait.
    Read {
        /// How long to wait first, in milliseconds.
        wait_ms: u64,
    },
    /// Write this lease: over the write `expected`, or where there is none.
    Put {
        /// What to write.
        record: LeaseRecord,
        /// What must be stored.
        expected: Option<ETag>,
    },
    /// The lease is taken.
    Taken(Taken),
    /// Another holds the volume.
    Refused {
        /// Its lease.
        by: LeaseRecord,
        /// How it is known to be alive.
        why: Refusal,
    },
    /// The store loses all answers.
    GiveUp,
}

/// A lease that was taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// What is stored now.
    pub stored: Stored,
    /// Whether the one before was released. If not, its owner may come back, and must be shut out of the container by
    /// a change of its inode.
    pub is_after_release: bool,
    /// The token of the lease that was replaced, if there was one.
    pub predecessor: Option<String>,
}

/// How a holder is known to be alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its process runs on this machine.
    RunsHere,
    /// It renewed its lease while it was watched.
    Renewed {
        /// For how long it was watched, in milliseconds.
        watched_ms: u64,
    },
    /// It took the lease at the same moment.
    TookIt,
}

/// How to take a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TakeOptions {
    /// The lease to take. Its epoch becomes the next above this one and above all that were seen.
    pub claim: LeaseRecord,
    /// Take it whoever holds it.
    pub takeover: bool,
    /// A write of the lease that was watched for its whole duration before.
    pub known_expired: Option<ETag>,
}

#[derive(Debug, Clone)]
struct Watch {
    version: ETag,
    since_ms: u64,
}

#[derive(Debug, Clone)]
struct Asked {
    record: LeaseRecord,
    expected: Option<ETag>,
    /// The token of the lease in force that it was to replace.
    over: Option<String>,
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
    /// Begins with a read.
    pub fn new(options: TakeOptions) -> Self {
        Self {
            options,
            watch: None,
            asked: None,
            puts: 0,
        }
    }

    /// The token of the lease that the write asked for last is to replace, if there is one.
    pub fn predecessor(&self) -> Option<&str> {
        self.asked.as_ref()?.predecessor.as_deref()
    }

    /// Takes an event in and says what is to be done.
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
            // Which of the two it was makes no difference: what is stored tells.
            TakeEvent::PutRefused | TakeEvent::PutUnknown => TakeAction::Read { wait_ms: 0 },
        }
    }

    fn found(&mut self, stored: Stored, holder: Liveness, now_ms: u64) -> TakeAction {
        let Stored { record, version } = &stored;
        if record.token == self.options.claim.token {
            // An earlier write of ours, of which no answer came. Its own time to land is over now, or it lands on what
            // it was not meant for and is refused.
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
            let was_renewed = self
                .asked
                .as_ref()
                .is_some_and(|a| a.over.as_ref() == Some(&record.token));
            if self.options.takeover && was_renewed {
                return self.put_over(&stored, holder);
            }
            // Who changed it is alive. Two that force their way in must not take turns for ever.
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
                    version: version.clone(),
                    since_ms: now_ms,
                });
                0
            }
            Some(watch) if watch.version == *version => now_ms.saturating_sub(watch.since_ms),
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

    /// In the place of a lease that is held.
    fn put_over(&mut self, stored: &Stored, holder: Liveness) -> TakeAction {
        let Stored { record, version } = stored;
        let older_may_run = record.older_may_run || holder != Liveness::Ended;
        let over = Some(record.token.clone());
        let action = self.put(
            record.epoch,
            Some(version.clone()),
            false,
            older_may_run,
            over.clone(),
        );
        if let Some(asked) = &mut self.asked {
            asked.over = over;
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
        // An own write that was given up may still land, over what it was meant for: the same token makes it ours.
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

/// What happened to a lease that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant)] // There is one now and then.
pub enum KeepEvent {
    /// It is time to renew.
    RenewDue,
    /// The volume is closed.
    ReleaseWanted {
        /// Whether all that was sent to the container is known to have arrived or not.
        is_clean: bool,
    },
    /// The write asked for was carried out.
    PutAccepted(ETag),
    /// The write was refused: what is stored is not what was stored last.
    PutRefused,
    /// Whether the write was carried out is not known.
    PutUnknown,
    /// This is stored.
    Found(Option<Stored>),
    /// What is stored could not be read.
    ReadFailed,
}

/// What is to be done to keep a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeepAction {
    /// Nothing, until the next renewal is due.
    Wait,
    /// Write this lease over the write `expected`.
    Put {
        /// What to write.
        record: LeaseRecord,
        /// What must be stored.
        expected: ETag,
    },
    /// Read the lease.
    Read,
    /// It is another's now, or gone: never write to the volume again.
    Lost {
        /// The lease of the new owner, if there is one.
        to: Option<LeaseRecord>,
    },
    /// It is released, or could not be; nothing more is done with it.
    Ended,
}

/// A lease that is held.
#[derive(Debug)]
pub struct Keep {
    stored: Stored,
    /// What the lease becomes, once it is being given back.
    release_as: Option<LeaseState>,
    is_over: bool,
}

impl Keep {
    /// Of the lease just taken.
    pub fn new(stored: Stored) -> Self {
        Self {
            stored,
            release_as: None,
            is_over: false,
        }
    }

    /// How long others watch it, at most, before they take it for left behind.
    pub(super) fn duration(&self) -> std::time::Duration {
        std::time::Duration::from_millis(self.stored.record.duration_ms)
    }

    /// Takes an event in and says what is to be done.
    pub fn on(&mut self, event: KeepEvent) -> KeepAction {
        if self.is_over {
            return KeepAction::Ended;
        }
        match event {
            KeepEvent::RenewDue => self.put(),
            KeepEvent::ReleaseWanted { is_clean } => {
                self.release_as = Some(if is_clean {
                    LeaseState::Released
                } else {
                    LeaseState::Abandoned
                });
                self.put()
            }
            KeepEvent::PutAccepted(version) => {
                self.stored = Stored {
                    record: self.next(),
                    version,
                };
                self.done()
            }
            KeepEvent::PutRefused => KeepAction::Read,
            // An outage is no loss. The write may have landed; the next renewal is then refused, and reads.
            KeepEvent::PutUnknown if self.release_as.is_some() => KeepAction::Read,
            KeepEvent::PutUnknown => KeepAction::Wait,
            KeepEvent::ReadFailed if self.release_as.is_some() => self.end(KeepAction::Ended),
            KeepEvent::ReadFailed => KeepAction::Wait,
            KeepEvent::Found(found) => self.found(found),
        }
    }

    fn found(&mut self, found: Option<Stored>) -> KeepAction {
        match found {
            Some(stored) if stored.record.token == self.stored.record.token => {
                let is_changed = stored.version != self.stored.version;
                self.stored = stored;
                match (self.release_as.is_some(), self.stored.record.is_held()) {
                    (false, _) => KeepAction::Wait,
                    (true, false) => self.end(KeepAction::Ended),
                    // An earlier renewal had landed: the release goes over that. Otherwise it is the store that fails.
                    (true, true) if is_changed => self.put(),
                    (true, true) => self.end(KeepAction::Ended),
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
            ..self.stored.record.clone()
        }
    }

    fn put(&self) -> KeepAction {
        KeepAction::Put {
            record: self.next(),
            expected: self.stored.version.clone(),
        }
    }

    fn done(&mut self) -> KeepAction {
        if self.release_as.is_some() {
            self.end(KeepAction::Ended)
        } else {
            KeepAction::Wait
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
