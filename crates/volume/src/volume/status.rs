//! What an open volume says of itself. Costs no request.

use serde::Serialize;

use super::Volume;
use crate::base::url::VolumeUrl;
use crate::format::node::NODE_BYTES;
use crate::meta::scrub_record::ScrubRecord;

/// Checkpoints of this server that are told of.
const RECENT_SHOWN: usize = 20;

/// An open volume at one moment.
#[derive(Debug, Clone, Serialize)]
pub struct VolumeStatus {
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Size of a block in bytes.
    pub block_size_bytes: u32,
    /// Whether it is open for reading only.
    pub is_read_only: bool,
    /// Whether it can be written no more.
    pub is_fenced: bool,
    /// Why, if so.
    pub fenced: Option<String>,
    /// Whether the last attempt to publish failed.
    #[serde(skip)]
    pub is_publishing_failing: bool,
    /// Number of the newest checkpoint.
    pub checkpoint: Option<u64>,
    /// The checkpoints that this server published last, the newest first.
    pub recent: Vec<RecentCheckpoint>,
    /// The write buffer.
    pub buffer: BufferStatus,
    /// Age of the oldest write that is not published, in seconds; none when everything is.
    pub unpublished_age_s: Option<f64>,
    /// Age of the oldest write that neither log nor checkpoint has, in seconds; none when all are durable.
    pub undurable_age_s: Option<f64>,
    /// The log, if there is one.
    #[serde(rename = "log")]
    pub wal: Option<WalBacklog>,
    /// How far the scrub is, and the damage that it knows of, where there is one.
    pub scrub: Option<ScrubRecord>,
}

/// A checkpoint that this server published.
#[derive(Debug, Clone, Serialize)]
pub struct RecentCheckpoint {
    /// Its number.
    pub checkpoint: u64,
    /// When, in milliseconds since 1970-01-01 UTC.
    pub published_ms: u64,
}

/// The write buffer, in bytes of memory.
#[derive(Debug, Clone, Serialize)]
pub struct BufferStatus {
    /// What it may take.
    pub limit_bytes: u64,
    /// What it takes.
    pub bytes: u64,
    /// The part that waits for its publish, or is published.
    pub frozen_bytes: u64,
}

/// What a replay of the log would read.
#[derive(Debug, Clone, Serialize)]
pub struct WalBacklog {
    /// Bytes of records.
    pub bytes: u64,
    /// The number of records.
    pub records: u64,
    /// Age of the oldest, in seconds; none when there is none.
    pub age_s: Option<f64>,
}

/// The larger of two ages, of which either may be missing.
fn older(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    a.into_iter().chain(b).reduce(f64::max)
}

impl VolumeStatus {
    /// With another one taken for the same: sums, the older ages, and whether anything is true of either. There is no one checkpoint.
    pub(crate) fn with(self, other: Self) -> Self {
        Self {
            size_bytes: self.size_bytes + other.size_bytes,
            block_size_bytes: self.block_size_bytes,
            is_read_only: self.is_read_only && other.is_read_only,
            is_fenced: self.is_fenced || other.is_fenced,
            fenced: self.fenced.or(other.fenced),
            is_publishing_failing: self.is_publishing_failing || other.is_publishing_failing,
            checkpoint: None,
            recent: Vec::new(),
            buffer: BufferStatus {
                limit_bytes: self.buffer.limit_bytes + other.buffer.limit_bytes,
                bytes: self.buffer.bytes + other.buffer.bytes,
                frozen_bytes: self.buffer.frozen_bytes + other.buffer.frozen_bytes,
            },
            unpublished_age_s: older(self.unpublished_age_s, other.unpublished_age_s),
            undurable_age_s: older(self.undurable_age_s, other.undurable_age_s),
            wal: match (self.wal, other.wal) {
                (Some(a), Some(b)) => Some(WalBacklog {
                    bytes: a.bytes + b.bytes,
                    records: a.records + b.records,
                    age_s: older(a.age_s, b.age_s),
                }),
                (a, b) => a.or(b),
            },
            // Any that knows of damage says that there is some.
            scrub: match other.scrub {
                Some(other) if !other.damage.is_empty() => Some(other),
                other => self.scrub.or(other),
            },
        }
    }

    /// What so many data blocks and index nodes take, in bytes.
    pub(crate) fn bytes_of(&self, blocks: u64, nodes: u64) -> u64 {
        blocks * u64::from(self.block_size_bytes) + nodes * NODE_BYTES as u64
    }
}

impl Volume {
    /// Which volume it is, by its id, and of what cannot be written also which checkpoint. Other servers of the same say the same, and no
    /// others do. None where the volume has no id yet.
    pub fn identity(&self) -> Option<&str> {
        self.identity.as_deref()
    }

    /// Where it is, where the close has something to do there.
    pub fn url(&self) -> Option<&VolumeUrl> {
        self.store.as_ref().map(|store| &store.url)
    }

    /// What is known of it now.
    pub fn status(&self) -> VolumeStatus {
        let backlog = self.backlog();
        let fenced = self.driver.check_fenced().err().map(|e| e.chain());
        VolumeStatus {
            size_bytes: self.geometry().size_bytes(),
            block_size_bytes: self.geometry().block_size(),
            is_read_only: self.is_read_only,
            is_fenced: fenced.is_some(),
            fenced,
            is_publishing_failing: self.driver.is_publishing_failing(),
            checkpoint: self.newest.get().map(|id| id.cno),
            recent: self
                .newest
                .last(RECENT_SHOWN)
                .into_iter()
                .map(|(checkpoint, published_ms)| RecentCheckpoint {
                    checkpoint: checkpoint.id.cno,
                    published_ms,
                })
                .collect(),
            buffer: BufferStatus {
                limit_bytes: self.write_buffer_bytes,
                bytes: backlog.unpublished_bytes,
                frozen_bytes: backlog.frozen_bytes,
            },
            unpublished_age_s: backlog.unpublished_age.map(|age| age.as_secs_f64()),
            undurable_age_s: backlog.undurable_age.map(|age| age.as_secs_f64()),
            wal: self.wal.as_ref().map(|_| WalBacklog {
                bytes: backlog.wal_bytes,
                records: backlog.wal_records,
                age_s: backlog.wal_age.map(|age| age.as_secs_f64()),
            }),
            scrub: self.scrub.as_ref().and_then(|scrub| scrub.status()),
        }
    }
}
