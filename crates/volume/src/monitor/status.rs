//! What is known of a served volume now.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{About, Monitor, State};
use crate::metrics::Counted;
use crate::metrics::count::Durations;
use crate::metrics::requests::Kind;
use crate::metrics::store::{Failure, Operation};
use crate::metrics::work::{Lookups, Phase};
use crate::volume::status::VolumeStatus;

/// The share of the write buffer from which on its being full is a problem, in percent.
const BUFFER_FULL_PERCENT: u64 = 90;

/// What is known of a server. Times are in seconds, moments in milliseconds since 1970-01-01 UTC.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// What does not change.
    #[serde(flatten)]
    pub about: About,
    /// The server's own clock.
    pub now_ms: u64,
    /// See [`State`].
    pub state: &'static str,
    /// What is wrong, one sentence each; empty when nothing is.
    pub problems: Vec<String>,
    /// Connections of clients.
    pub connections: u64,
    /// The volume, while it is open; none where there are many.
    pub volume: Option<VolumeStatus>,
    /// Those of many volumes that are open, or were a moment ago.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<NamedStatus>,
    /// Requests of clients by kind.
    pub requests: BTreeMap<&'static str, RequestStatus>,
    /// Publishes of generations.
    pub publishes: PublishStatus,
    /// Appends to the log.
    pub log: WalStatus,
    /// Look-ups in the caches, of data and of the index.
    pub caches: BTreeMap<&'static str, LookupStatus>,
    /// Bytes read ahead.
    pub read_ahead: ReadAheadStatus,
    /// Requests to the store.
    pub store: StoreStatus,
    /// The lease.
    pub lease: LeaseStatus,
    /// What the volume takes, if that was counted.
    pub space: Option<SpaceStatus>,
    /// Stored bytes that are not those that were written: how often they were found.
    pub damage: DamageStatus,
}

/// One of many volumes.
#[derive(Debug, Clone, Serialize)]
pub struct NamedStatus {
    /// Its name.
    pub name: String,
    /// See [`State`].
    pub state: &'static str,
    /// Connections of clients to it.
    pub connections: u64,
    /// What is known of it, while it is open.
    pub volume: Option<VolumeStatus>,
}

/// How long something took.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    /// How often.
    pub count: u64,
    /// All together, in seconds.
    pub sum_s: f64,
    /// Half took no longer, in seconds.
    pub p50_s: Option<f64>,
    /// 99 of 100 took no longer, in seconds.
    pub p99_s: Option<f64>,
}

impl Latency {
    fn of(durations: &Durations) -> Self {
        let all = durations.distribution();
        Self {
            count: all.count(),
            sum_s: all.sum_s,
            p50_s: all.quantile_s(0.5),
            p99_s: all.quantile_s(0.99),
        }
    }
}

/// Requests of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct RequestStatus {
    /// How many, and how long they took.
    #[serde(flatten)]
    pub latency: Latency,
    /// Bytes that they were about.
    pub bytes: u64,
    /// How many failed.
    pub failures: u64,
}

/// Publishes.
#[derive(Debug, Clone, Serialize)]
pub struct PublishStatus {
    /// Those that succeeded.
    #[serde(flatten)]
    pub latency: Latency,
    /// Their steps.
    pub phases: BTreeMap<&'static str, Latency>,
    /// Bytes published.
    pub bytes: u64,
    /// Attempts that failed.
    pub failures: u64,
    /// Attempts that follow one that failed.
    pub retries: u64,
    /// When the last one succeeded.
    pub last_ms: Option<u64>,
}

/// Appends to the log.
#[derive(Debug, Clone, Serialize)]
pub struct WalStatus {
    /// Those that succeeded.
    #[serde(flatten)]
    pub latency: Latency,
    /// Bytes appended.
    pub bytes: u64,
    /// Appends that failed.
    pub failures: u64,
}

/// Look-ups in one cache.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct LookupStatus {
    /// Found in memory.
    pub memory: u64,
    /// Found on the disk.
    pub disk: u64,
    /// Read from the store.
    pub misses: u64,
}

impl LookupStatus {
    fn of(lookups: &Lookups) -> Self {
        Self {
            memory: lookups.memory.get(),
            disk: lookups.disk.get(),
            misses: lookups.misses.get(),
        }
    }
}

/// What was read ahead, in bytes.
#[derive(Debug, Clone, Serialize)]
pub struct ReadAheadStatus {
    /// All of it.
    pub bytes: u64,
    /// What a client came to.
    pub useful_bytes: u64,
    /// What no client came to.
    pub wasted_bytes: u64,
}

/// Requests to the store.
#[derive(Debug, Clone, Serialize)]
pub struct StoreStatus {
    /// By operation.
    pub requests: BTreeMap<&'static str, OperationStatus>,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// About what they cost at AWS, in US dollars.
    pub cost_dollars: f64,
}

/// Requests of one operation.
#[derive(Debug, Clone, Serialize)]
pub struct OperationStatus {
    /// How many, and how long they took.
    #[serde(flatten)]
    pub latency: Latency,
    /// How many failed, by what came of them; none that is 0.
    pub failures: BTreeMap<&'static str, u64>,
}

/// The lease.
#[derive(Debug, Clone, Serialize)]
pub struct LeaseStatus {
    /// Whether it is held.
    pub is_held: bool,
    /// The owner's epoch.
    pub epoch: Option<u64>,
    /// Renewals that succeeded.
    pub renewals: u64,
    /// Renewals that failed.
    pub failures: u64,
}

/// What the volume takes in its store.
#[derive(Debug, Clone, Serialize)]
pub struct SpaceStatus {
    /// When that was counted.
    pub counted_ms: u64,
    /// What the newest state refers to.
    pub live_bytes: u64,
    /// What earlier checkpoints alone refer to, and what lies in objects beside what is live.
    pub history_bytes: u64,
    /// What goes.
    pub garbage_bytes: u64,
    /// How far what is stored for the newest state is beyond what compaction keeps it at.
    pub debt_bytes: u64,
    /// What went.
    pub removed_bytes: u64,
    /// Checkpoints that went.
    pub removed_checkpoints: u64,
}

/// Damage that was found.
#[derive(Debug, Clone, Serialize)]
pub struct DamageStatus {
    /// By reads.
    pub reads: u64,
    /// By publishes.
    pub publishes: u64,
    /// By the scrub, each place once.
    pub scrub: u64,
}

impl Status {
    /// Why clients are not served; `None` when they are, or would be.
    pub fn not_ready(&self) -> Option<String> {
        let is_fenced = self.volume.as_ref().is_some_and(|volume| volume.is_fenced);
        let first = || self.problems.first().cloned();
        match self.state {
            "failed" => first(),
            "ending" => Some("the server ends".into()),
            // What is wrong with one of many keeps no client from the others.
            _ if is_fenced && self.volumes.is_empty() => first(),
            _ => None,
        }
    }

    /// With all of many volumes taken for one: sums, the oldest ages, and whether anything is true of any.
    pub(super) fn of_all(mut self) -> Self {
        if self.volume.is_none() {
            let all = self.volumes.iter().filter_map(|named| named.volume.clone());
            self.volume = all.reduce(VolumeStatus::with);
        }
        self
    }
}

/// What is wrong, the worst first. Pure.
fn problems(volumes: &[(String, &State, Option<&VolumeStatus>)], counted: &Counted) -> Vec<String> {
    let mut problems = Vec::new();
    for (of, state, volume) in volumes {
        if let State::Failed(why) = state {
            problems.push(format!("the volume{of} could not be opened: {why}"));
        }
        if let Some(why) = volume.and_then(|volume| volume.fenced.as_deref()) {
            problems.push(format!("this server can write no more{of}: {why}"));
        }
    }
    let damage = counted.damage.reads.get() + counted.damage.publishes.get();
    if damage > 0 {
        problems.push(format!(
            "damaged or missing data was found {damage} times: see the log, and docs/operations.md"
        ));
    }
    for (of, _, volume) in volumes {
        let scrub = volume.and_then(|volume| volume.scrub.as_ref());
        if let Some((scrub, first)) = scrub.and_then(|scrub| Some((scrub, scrub.damage.first()?))) {
            let more = match scrub.damage.len() as u64 - 1 + scrub.more {
                0 => String::new(),
                more => format!("; and so in {more} places more"),
            };
            problems.push(format!(
                "the scrub{of} knows of damage in {first}{more}: see docs/checking.md"
            ));
        }
    }
    // Where no volume is open, nothing waits to be published.
    for (of, _, volume) in volumes {
        let Some(volume) = volume.filter(|volume| volume.is_publishing_failing) else {
            continue;
        };
        let age = volume.unpublished_age_s.map_or(String::new(), |age_s| {
            format!("; the oldest write waits for {age_s:.0} s")
        });
        problems.push(format!(
            "checkpoints{of} cannot be published: see the log{age}. Do not kill this server"
        ));
    }
    for (of, _, volume) in volumes {
        let Some(volume) = volume else { continue };
        let percent = volume.buffer.bytes * 100 / volume.buffer.limit_bytes.max(1);
        if percent >= BUFFER_FULL_PERCENT {
            problems.push(format!(
                "the write buffer{of} is {percent} % full: writers are slowed down or wait"
            ));
        }
    }
    problems
}

impl Monitor {
    /// What is known now.
    pub fn status(&self) -> Status {
        let now = self.served.now();
        let volume = now.volume.as_ref().map(|volume| volume.status());
        let named: Vec<_> = (self.served.named().into_iter())
            .map(|(name, now)| {
                let volume = now.volume.map(|volume| volume.status());
                (name, now.state, now.connections, volume)
            })
            .collect();
        let about: Vec<_> = match self.is_of_many {
            true => named
                .iter()
                .map(|(name, state, _, volume)| (format!(" of {name}"), state, volume.as_ref()))
                .collect(),
            false => vec![(String::new(), &now.state, volume.as_ref())],
        };
        let mut open = about.iter().filter_map(|(_, _, volume)| *volume);
        let counted: &Counted = &self.metrics;
        let publishes = &counted.publishes;
        let problems = problems(&about, counted);
        let is_any_held = open.any(|volume| !volume.is_read_only && !volume.is_fenced);
        let is_held = match self.is_of_many {
            // What is counted is of the one that was opened or closed last.
            true => is_any_held,
            false => counted.lease.is_held.get() == 1,
        };
        let volumes = named
            .into_iter()
            .map(|(name, state, connections, volume)| NamedStatus {
                name,
                state: state.name(),
                connections,
                volume,
            })
            .collect();
        Status {
            about: self.about.clone(),
            now_ms: crate::base::clock::now_ms(),
            state: now.state.name(),
            problems,
            connections: now.connections,
            requests: Kind::ALL.map(|kind| (kind.name(), request(counted, kind))).into(),
            publishes: PublishStatus {
                latency: Latency::of(&publishes.durations),
                phases: Phase::ALL
                    .map(|phase| (phase.name(), Latency::of(publishes.phase(phase))))
                    .into(),
                bytes: publishes.bytes.get(),
                failures: publishes.failures.get(),
                retries: publishes.retries.get(),
                last_ms: some_unless_0(publishes.last_ms.get()),
            },
            log: WalStatus {
                latency: Latency::of(&counted.wal.durations),
                bytes: counted.wal.bytes.get(),
                failures: counted.wal.failures.get(),
            },
            caches: [
                ("data", LookupStatus::of(&counted.caches.data)),
                ("index", LookupStatus::of(&counted.caches.index)),
            ]
            .into(),
            read_ahead: ReadAheadStatus {
                bytes: counted.read_ahead.bytes.get(),
                useful_bytes: counted.read_ahead.useful_bytes.get(),
                wasted_bytes: counted.read_ahead.wasted_bytes.get(),
            },
            store: StoreStatus {
                requests: Operation::ALL
                    .map(|of| (of.name(), operation(counted, of)))
                    .into(),
                sent_bytes: counted.store.sent_bytes.get(),
                received_bytes: counted.store.received_bytes.get(),
                cost_dollars: counted.store.cost_dollars(),
            },
            lease: LeaseStatus {
                is_held,
                epoch: some_unless_0(counted.lease.epoch.get()).filter(|_| is_held && !self.is_of_many),
                renewals: counted.lease.renewals.get(),
                failures: counted.lease.failures.get(),
            },
            space: space(counted, volume.as_ref()),
            volumes,
            damage: DamageStatus {
                reads: counted.damage.reads.get(),
                publishes: counted.damage.publishes.get(),
                scrub: counted.damage.scrub.get(),
            },
            volume,
        }
    }
}

fn some_unless_0(value: u64) -> Option<u64> {
    Some(value).filter(|value| *value != 0)
}

fn request(counted: &Counted, kind: Kind) -> RequestStatus {
    let of_kind = counted.requests.of(kind);
    RequestStatus {
        latency: Latency::of(&of_kind.durations),
        bytes: of_kind.bytes.get(),
        failures: of_kind.failures.get(),
    }
}

fn operation(counted: &Counted, operation: Operation) -> OperationStatus {
    let of = counted.store.of(operation);
    let failures = Failure::ALL.map(|failure| (failure.name(), of.failures(failure)));
    OperationStatus {
        latency: Latency::of(&of.durations),
        failures: failures.into_iter().filter(|(_, count)| *count > 0).collect(),
    }
}

fn space(counted: &Counted, volume: Option<&VolumeStatus>) -> Option<SpaceStatus> {
    let space = &counted.space;
    let counted_ms = some_unless_0(space.counted_ms.get())?;
    let stored_bytes = space.stored_bytes.get();
    let live_bytes = volume?.bytes_of(space.live_blocks.get(), space.live_nodes.get());
    let live_bytes = live_bytes.min(stored_bytes);
    let garbage_bytes = space.garbage_bytes.get();
    Some(SpaceStatus {
        counted_ms,
        live_bytes,
        history_bytes: stored_bytes.saturating_sub(live_bytes + garbage_bytes),
        garbage_bytes,
        debt_bytes: space.debt_bytes.get(),
        removed_bytes: space.removed_bytes.get(),
        removed_checkpoints: space.removed_checkpoints.get(),
    })
}
