//! What is known now, for Prometheus: every metric with its name and its help. `docs/monitoring.md` has the same list, and a test
//! compares the two.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::status::Status;
use crate::metrics::Metrics;
use crate::metrics::count::Distribution;
use crate::metrics::requests::Kind;
use crate::metrics::store::{Failure, Operation};
use crate::metrics::work::Phase;

/// The text format of Prometheus: <https://prometheus.io/docs/instrumenting/exposition_formats/>
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

const PREFIX: &str = "hypernbd";

/// What `status` and `metrics` say, as text.
pub(super) fn of(status: &Status, metrics: &Metrics) -> String {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Page {
        status: status.clone(),
        metrics: metrics.clone(),
    }));
    let mut text = String::new();
    // Writing into memory cannot fail.
    let _ = prometheus_text::encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Page {
    status: Status,
    metrics: Metrics,
}

/// Labels of one series.
type Labels<'a> = &'a [(&'a str, &'a str)];

/// Writes metrics one after the other.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn counters<'l, V: EncodeCounterValue>(
        &mut self,
        (name, help): (&str, &str),
        unit: Option<Unit>,
        series: impl IntoIterator<Item = (Vec<(&'l str, &'l str)>, V)>,
    ) -> fmt::Result {
        let mut metric = self
            .0
            .encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        for (labels, value) in series {
            let labels: Labels<'_> = &labels;
            metric
                .encode_family(&labels)?
                .encode_counter::<Vec<(String, String)>, V, f64>(&value, None)?;
        }
        Ok(())
    }

    fn counter<V: EncodeCounterValue>(
        &mut self,
        described: (&str, &str),
        unit: Option<Unit>,
        value: V,
    ) -> fmt::Result {
        self.counters(described, unit, [(Vec::new(), value)])
    }

    fn gauges<'l, V: EncodeGaugeValue>(
        &mut self,
        (name, help): (&str, &str),
        unit: Option<Unit>,
        series: impl IntoIterator<Item = (Vec<(&'l str, &'l str)>, V)>,
    ) -> fmt::Result {
        let mut metric = self
            .0
            .encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        for (labels, value) in series {
            let labels: Labels<'_> = &labels;
            metric.encode_family(&labels)?.encode_gauge(&value)?;
        }
        Ok(())
    }

    fn gauge<V: EncodeGaugeValue>(
        &mut self,
        described: (&str, &str),
        unit: Option<Unit>,
        value: V,
    ) -> fmt::Result {
        self.gauges(described, unit, [(Vec::new(), value)])
    }

    fn durations<'l>(
        &mut self,
        (name, help): (&str, &str),
        series: impl IntoIterator<Item = (Vec<(&'l str, &'l str)>, Distribution)>,
    ) -> fmt::Result {
        let unit = Some(Unit::Seconds);
        let mut metric = self
            .0
            .encode_descriptor(name, help, unit.as_ref(), MetricType::Histogram)?;
        for (labels, all) in series {
            let labels: Labels<'_> = &labels;
            // What the encoder takes for a class without an end.
            let classes: Vec<(f64, u64)> = all
                .classes
                .iter()
                .map(|&(end_s, n)| (end_s.min(f64::MAX), n))
                .collect();
            metric
                .encode_family(&labels)?
                .encode_histogram::<Vec<(String, String)>>(all.sum_s, all.count(), &classes, None)?;
        }
        Ok(())
    }
}

impl Collector for Page {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut to = Writer(encoder);
        self.server(&mut to)?;
        self.requests(&mut to)?;
        self.durability(&mut to)?;
        self.publishes(&mut to)?;
        self.log(&mut to)?;
        self.reads(&mut to)?;
        self.store(&mut to)?;
        self.ownership(&mut to)?;
        self.scrub(&mut to)?;
        self.space(&mut to)
    }
}

/// The number of a truth.
fn number(is_true: bool) -> u64 {
    u64::from(is_true)
}

/// Seconds since 1970 of milliseconds.
fn timestamp(ms: u64) -> f64 {
    ms as f64 / 1e3
}

impl Page {
    fn server(&self, to: &mut Writer<'_>) -> fmt::Result {
        let status = &self.status;
        let labels = vec![
            ("version", status.about.version),
            ("url", status.about.url.as_str()),
        ];
        to.gauges(
            ("server_info", "The server and its volume, always 1"),
            None,
            [(labels, 1_u64)],
        )?;
        let started = timestamp(status.about.started_ms);
        to.gauge(
            ("start_timestamp", "When the server started"),
            Some(Unit::Seconds),
            started,
        )?;
        to.gauge(
            ("connections", "Connections of clients to the volume"),
            None,
            status.connections,
        )?;
        to.gauge(
            ("volume_open", "Whether the volume is open"),
            None,
            number(status.volume.is_some()),
        )?;
        to.gauge(
            ("ready", "Whether clients are served, as /readyz says"),
            None,
            number(status.not_ready().is_none()),
        )?;
        let size = status.volume.as_ref().map_or(0, |volume| volume.size_bytes);
        to.gauge(
            ("volume_size", "Size of the volume; 0 while it is not open"),
            Some(Unit::Bytes),
            size,
        )
    }

    fn requests(&self, to: &mut Writer<'_>) -> fmt::Result {
        let of = |kind: Kind| self.metrics.requests.of(kind);
        let label = |kind: Kind| vec![("kind", kind.name())];
        to.durations(
            (
                "request_duration",
                "How long requests of clients took, failed ones too",
            ),
            Kind::ALL.map(|kind| (label(kind), of(kind).durations.distribution())),
        )?;
        to.counters(
            (
                "request",
                "Bytes that requests of clients were about, which succeeded",
            ),
            Some(Unit::Bytes),
            Kind::ALL.map(|kind| (label(kind), of(kind).bytes.get())),
        )?;
        to.counters(
            ("request_failures", "Requests of clients that failed"),
            None,
            Kind::ALL.map(|kind| (label(kind), of(kind).failures.get())),
        )
    }

    fn durability(&self, to: &mut Writer<'_>) -> fmt::Result {
        let volume = self.status.volume.as_ref();
        let (limit, all, frozen) = volume.map_or((0, 0, 0), |volume| {
            let buffer = &volume.buffer;
            (buffer.limit_bytes, buffer.bytes, buffer.frozen_bytes)
        });
        let state = |name| vec![("state", name)];
        to.gauges(
            (
                "write_buffer",
                "Memory of unpublished writes: active ones, and frozen ones that wait for their publish",
            ),
            Some(Unit::Bytes),
            [
                (state("active"), all.saturating_sub(frozen)),
                (state("frozen"), frozen),
            ],
        )?;
        to.gauge(
            ("write_buffer_limit", "What unpublished writes may take"),
            Some(Unit::Bytes),
            limit,
        )?;
        to.gauge(
            (
                "undurable_age",
                "Age of the oldest write that neither log nor checkpoint has; 0 when all are durable",
            ),
            Some(Unit::Seconds),
            volume.and_then(|volume| volume.undurable_age_s).unwrap_or(0.0),
        )?;
        to.gauge(
            (
                "unpublished_age",
                "Age of the oldest write that no checkpoint has; 0 when all are published",
            ),
            Some(Unit::Seconds),
            volume.and_then(|volume| volume.unpublished_age_s).unwrap_or(0.0),
        )
    }

    fn publishes(&self, to: &mut Writer<'_>) -> fmt::Result {
        let counted = &self.metrics.publishes;
        to.durations(
            ("publish_duration", "How long publishes took that succeeded"),
            [(Vec::new(), counted.durations.distribution())],
        )?;
        to.durations(
            ("publish_phase_duration", "How long the steps of publishes took"),
            Phase::ALL.map(|phase| (vec![("phase", phase.name())], counted.phase(phase).distribution())),
        )?;
        to.counter(
            ("publish", "Bytes of generations published"),
            Some(Unit::Bytes),
            counted.bytes.get(),
        )?;
        to.counter(
            ("publish_failures", "Attempts to publish that failed"),
            None,
            counted.failures.get(),
        )?;
        to.counter(
            ("publish_retries", "Attempts that follow one that failed"),
            None,
            counted.retries.get(),
        )?;
        to.gauge(
            (
                "last_publish_timestamp",
                "When a publish succeeded last; 0 for never",
            ),
            Some(Unit::Seconds),
            timestamp(counted.last_ms.get()),
        )?;
        let checkpoint = self.status.volume.as_ref().and_then(|volume| volume.checkpoint);
        to.gauge(
            (
                "checkpoint",
                "Number of the newest checkpoint; 0 while the volume is not open",
            ),
            None,
            checkpoint.unwrap_or(0),
        )
    }

    fn log(&self, to: &mut Writer<'_>) -> fmt::Result {
        let counted = &self.metrics.wal;
        let backlog = self.status.volume.as_ref().and_then(|volume| volume.wal.as_ref());
        to.durations(
            (
                "wal_append_duration",
                "How long appends to the log took that succeeded",
            ),
            [(Vec::new(), counted.durations.distribution())],
        )?;
        to.counter(
            ("wal_append", "Bytes of records appended to the log"),
            Some(Unit::Bytes),
            counted.bytes.get(),
        )?;
        to.counter(
            ("wal_append_failures", "Appends to the log that failed"),
            None,
            counted.failures.get(),
        )?;
        to.gauge(
            ("wal_records", "Records that a replay would read"),
            None,
            backlog.map_or(0, |log| log.records),
        )?;
        to.gauge(
            ("wal_size", "Bytes of these records"),
            Some(Unit::Bytes),
            backlog.map_or(0, |log| log.bytes),
        )?;
        to.gauge(
            (
                "wal_age",
                "Age of the oldest of these records; 0 when there is none",
            ),
            Some(Unit::Seconds),
            backlog.and_then(|log| log.age_s).unwrap_or(0.0),
        )
    }

    fn reads(&self, to: &mut Writer<'_>) -> fmt::Result {
        let caches = &self.metrics.caches;
        let caches = [("data", &caches.data), ("index", &caches.index)];
        to.counters(
            (
                "cache_hits",
                "Look-ups answered by a cache: pages of data that clients read, nodes of the index",
            ),
            None,
            caches.into_iter().flat_map(|(cache, of)| {
                let labels = |tier| vec![("cache", cache), ("tier", tier)];
                [
                    (labels("memory"), of.memory.get()),
                    (labels("disk"), of.disk.get()),
                ]
            }),
        )?;
        to.counters(
            ("cache_misses", "Look-ups that no cache answered"),
            None,
            caches.map(|(cache, of)| (vec![("cache", cache)], of.misses.get())),
        )?;
        let ahead = &self.metrics.read_ahead;
        to.counter(
            ("read_ahead", "Bytes read ahead of clients"),
            Some(Unit::Bytes),
            ahead.bytes.get(),
        )?;
        to.counter(
            ("read_ahead_useful", "Bytes of them that a client came to"),
            Some(Unit::Bytes),
            ahead.useful_bytes.get(),
        )?;
        to.counter(
            ("read_ahead_wasted", "Bytes of them that no client came to"),
            Some(Unit::Bytes),
            ahead.wasted_bytes.get(),
        )
    }

    fn store(&self, to: &mut Writer<'_>) -> fmt::Result {
        let counted = &self.metrics.store;
        to.durations(
            (
                "store_request_duration",
                "From the sending of a request to the head of its answer, repeats on their own",
            ),
            Operation::ALL.map(|of| {
                (
                    vec![("operation", of.name())],
                    counted.of(of).durations.distribution(),
                )
            }),
        )?;
        to.counters(
            (
                "store_request_failures",
                "Requests to the store that failed; absent and condition are mostly answers hoped for",
            ),
            None,
            Operation::ALL.into_iter().flat_map(|of| {
                Failure::ALL.map(|failure| {
                    let labels = vec![("operation", of.name()), ("failure", failure.name())];
                    (labels, counted.of(of).failures(failure))
                })
            }),
        )?;
        to.counter(
            ("store_sent", "Bytes of bodies sent to the store"),
            Some(Unit::Bytes),
            counted.sent_bytes.get(),
        )?;
        to.counter(
            (
                "store_received",
                "Bytes of bodies that answers of the store announced",
            ),
            Some(Unit::Bytes),
            counted.received_bytes.get(),
        )?;
        to.counter(
            (
                "store_cost_dollars",
                "About what these requests cost at AWS, without storage and traffic",
            ),
            None,
            counted.cost_dollars(),
        )
    }

    fn ownership(&self, to: &mut Writer<'_>) -> fmt::Result {
        let lease = &self.metrics.lease;
        let is_fenced = self.status.volume.as_ref().is_some_and(|volume| volume.is_fenced);
        to.gauge(
            ("lease_held", "Whether this server holds the volume's lease"),
            None,
            number(self.status.lease.is_held),
        )?;
        to.gauge(
            ("lease_epoch", "The number of its ownership; 0 for none"),
            None,
            self.status.lease.epoch.unwrap_or(0),
        )?;
        to.counter(
            ("lease_renewals", "Renewals of the lease"),
            None,
            lease.renewals.get(),
        )?;
        to.counter(
            ("lease_renewal_failures", "Renewals that failed"),
            None,
            lease.failures.get(),
        )?;
        to.gauge(
            (
                "fenced",
                "Whether another server took the volume, so that this one can write no more",
            ),
            None,
            number(is_fenced),
        )?;
        let damage = &self.metrics.damage;
        to.counters(
            (
                "damage_found",
                "Times that stored data was found damaged or missing",
            ),
            None,
            [
                (vec![("by", "read")], damage.reads.get()),
                (vec![("by", "publish")], damage.publishes.get()),
                (vec![("by", "scrub")], damage.scrub.get()),
            ],
        )
    }

    fn scrub(&self, to: &mut Writer<'_>) -> fmt::Result {
        let counted = &self.metrics.scrub;
        to.counters(
            ("scrub", "Bytes that the scrub read and found nothing wrong with"),
            Some(Unit::Bytes),
            [
                (vec![("checked", "yes")], counted.verified_bytes.get()),
                (vec![("checked", "no")], counted.unverified_bytes.get()),
            ],
        )?;
        let volume = self.status.volume.as_ref();
        let scrub = volume.and_then(|volume| volume.scrub.as_ref());
        to.gauge(
            (
                "scrub_damaged_places",
                "Damaged places in stored objects that the scrub knows of now",
            ),
            None,
            scrub.map_or(0, |scrub| scrub.damage.len() as u64 + scrub.more),
        )?;
        let ended_ms = scrub.and_then(|scrub| scrub.last).map_or(0, |last| last.ended_ms);
        to.gauge(
            (
                "scrub_timestamp",
                "When the scrub last came to its end; 0 for never, or without one",
            ),
            Some(Unit::Seconds),
            timestamp(ended_ms),
        )
    }

    /// Series of what was never counted are left out: 0 would be wrong.
    fn space(&self, to: &mut Writer<'_>) -> fmt::Result {
        let space = self.status.space.as_ref();
        let kinds = space.into_iter().flat_map(|space| {
            let kind = |name| vec![("kind", name)];
            [
                (kind("live"), space.live_bytes),
                (kind("history"), space.history_bytes),
                (kind("garbage"), space.garbage_bytes),
            ]
        });
        to.gauges(
            (
                "space",
                "What the volume takes in its store, as of the last round of its retention",
            ),
            Some(Unit::Bytes),
            kinds,
        )?;
        let counted = space.map(|space| (Vec::new(), timestamp(space.counted_ms)));
        to.gauges(
            ("space_timestamp", "When that was counted"),
            Some(Unit::Seconds),
            counted,
        )?;
        let debt = space.map(|space| (Vec::new(), space.debt_bytes));
        to.gauges(
            (
                "compaction_debt",
                "How far what is stored for the newest state is beyond what compaction keeps it at",
            ),
            Some(Unit::Bytes),
            debt,
        )?;
        let removed = &self.metrics.space;
        to.counter(
            ("retention_removed", "Bytes removed by the retention"),
            Some(Unit::Bytes),
            removed.removed_bytes.get(),
        )?;
        to.counter(
            (
                "retention_removed_checkpoints",
                "Checkpoints removed by the retention",
            ),
            None,
            removed.removed_checkpoints.get(),
        )
    }
}
