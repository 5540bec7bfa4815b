//! What a volume does by itself: publishes, the log, caches, read-ahead, the lease, space, the scrub, damage.

use std::time::Duration;

use super::count::{Count, Durations};

/// Steps of a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Going back to what is stored, after an attempt that failed.
    Recover,
    /// Reading what partly written blocks lack.
    Complete,
    /// Laying out, uploading, and the inode.
    Store,
    /// The entry in the checkpoint list. Without a log nobody waits for it.
    Record,
}

impl Phase {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 4] = [Self::Recover, Self::Complete, Self::Store, Self::Record];

    /// Its name where it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recover => "recover",
            Self::Complete => "complete",
            Self::Store => "store",
            Self::Record => "record",
        }
    }
}

/// Publishes of generations.
#[derive(Debug, Default)]
pub struct Publishes {
    /// From the beginning of each attempt that succeeded to its end.
    pub durations: Durations,
    phases: [Durations; Phase::ALL.len()],
    /// Memory of the generations that were published, in bytes.
    pub bytes: Count,
    /// Attempts that failed.
    pub failures: Count,
    /// Attempts that follow one that failed.
    pub retries: Count,
    /// When the last one succeeded, in milliseconds since 1970-01-01 UTC; 0 before the first.
    pub last_ms: Count,
}

impl Publishes {
    /// How long a step took, of each attempt that came so far.
    pub fn phase(&self, phase: Phase) -> &Durations {
        &self.phases[phase as usize]
    }

    /// Times a step that succeeds.
    ///
    /// # Errors
    /// Those of `work`.
    pub async fn time<T, E>(&self, phase: Phase, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let began = std::time::Instant::now();
        let done = work.await;
        if done.is_ok() {
            self.phase(phase).observe(began.elapsed());
        }
        done
    }

    /// A generation is published, after `took`.
    pub fn succeeded(&self, bytes: u64, took: Duration, now_ms: u64) {
        self.durations.observe(took);
        self.bytes.add(bytes);
        self.last_ms.set(now_ms);
    }

    /// An attempt failed.
    pub fn failed(&self) {
        self.failures.one();
    }
}

/// Appends to the log.
#[derive(Debug, Default)]
pub struct Wal {
    /// How long each append took that made a record durable.
    pub durations: Durations,
    /// Bytes of those records.
    pub bytes: Count,
    /// Appends that failed.
    pub failures: Count,
}

/// Lookups in one cache.
#[derive(Debug, Default)]
pub struct Lookups {
    /// Found in memory.
    pub memory: Count,
    /// Found on the local disk.
    pub disk: Count,
    /// Found in neither, and read from the store.
    pub misses: Count,
}

/// Where what was read was found.
#[derive(Debug, Default)]
pub struct Caches {
    /// Pages that reads of clients needed.
    pub data: Lookups,
    /// Nodes of the index.
    pub index: Lookups,
}

/// What was read ahead of clients. What is in neither of the other two is still waited for.
#[derive(Debug, Default)]
pub struct ReadAhead {
    /// Bytes that were asked for.
    pub bytes: Count,
    /// Bytes of them that a client's stream of reads has reached.
    pub useful_bytes: Count,
    /// Bytes of them that no client's stream reached before it was forgotten.
    pub wasted_bytes: Count,
}

/// The lease.
#[derive(Debug, Default)]
pub struct LeaseKept {
    /// 1 while it is held.
    pub is_held: Count,
    /// The owner's epoch; 0 for none.
    pub epoch: Count,
    /// Renewals that succeeded.
    pub renewals: Count,
    /// Renewals that failed.
    pub failures: Count,
}

/// What the volume takes in its store, as of the last round of its retention.
#[derive(Debug, Default)]
pub struct Space {
    /// When that was, in milliseconds since 1970-01-01 UTC; 0 for never.
    pub counted_ms: Count,
    /// Data blocks that the newest state refers to.
    pub live_blocks: Count,
    /// Nodes of its index.
    pub live_nodes: Count,
    /// Bytes of all objects of the container.
    pub stored_bytes: Count,
    /// Bytes of the objects that no checkpoint needs which is kept, and that go.
    pub garbage_bytes: Count,
    /// How far the objects of the newest state are beyond what compaction keeps them at, in bytes. Compaction counts that anew, too.
    pub debt_bytes: Count,
    /// Bytes of the objects that the retention has removed.
    pub removed_bytes: Count,
    /// The number of these objects.
    pub removed_objects: Count,
    /// Checkpoints that it has removed.
    pub removed_checkpoints: Count,
}

/// The scrub.
#[derive(Debug, Default)]
pub struct Scrub {
    /// Bytes that it read and found as they were written.
    pub verified_bytes: Count,
    /// Bytes that it read and that have no check values.
    pub unverified_bytes: Count,
}

/// Stored bytes that are not those that were written.
#[derive(Debug, Default)]
pub struct Damage {
    /// Reads of clients that found some, each time that they did.
    pub reads: Count,
    /// Publishes that found some.
    pub publishes: Count,
    /// Places that the scrub found, each once.
    pub scrub: Count,
}
