//! Steps 5 and 6 of an opening with a WAL ([`recover_wal`](super::recover_wal)): the records above the watermark are
//! applied, published and recorded, and the WAL is emptied.

use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt};
use log::{debug, warn};

use super::history::{GENERATIONS_LEFT, Seen};
use super::recover_wal::{ADVICE_DAMAGE, ADVICE_GIVE_UP, OpenWal, other_history, warn_given_up};
use crate::base::checkpoint_id::Checkpoint;
use crate::base::error::{ErrorKind, VolumeError};
use crate::base::ids::GENERATIONS_AHEAD_MAX;
use crate::checkpoint::fill_partial::complete_partial_blocks;
use crate::engine::{Beside, Engine};
use crate::meta::checkpoint_list::Recorder;
use crate::wal::record::{Content, Entry, Record};
use crate::wal::replay::Replay;
use crate::wal::{READS_AT_ONCE, RecordId};
use crate::write_buffer::overlay::{Frozen, Overlay};

/// The wait before a failed publish of a replay is tried again.
const RETRY_WAIT: Duration = Duration::from_millis(500);
/// Number of records after which progress is logged.
const PROGRESS_GROUPS: usize = 1000;

impl OpenWal {
    /// Step 5: applies, publishes and records the changes above `watermark`. Returns the newest generation used.
    ///
    /// # Errors
    /// When the WAL or the store fails. Nothing is lost then, and the next opening replays again.
    pub async fn replay(
        &self,
        engine: &dyn Engine,
        recorder: &dyn Recorder,
        watermark: u64,
        history: &Seen,
        options: &ReplayOptions,
    ) -> Result<u64, VolumeError> {
        if self.is_discarded {
            self.remove_found().await;
            return Ok(watermark);
        }
        match self.apply(engine, watermark, history, options).await {
            Ok(None) if self.store.found().is_empty() => Ok(watermark),
            // An older owner may still have records in flight, beyond the gap that was sealed. A later opening must not
            // apply them over what this one shows. This generation is above theirs, because an owner is at most so many
            // generations ahead of the watermark.
            Ok(None) => {
                let generation = watermark + GENERATIONS_AHEAD_MAX;
                recorder.published(generation, None).await?;
                Ok(generation)
            }
            Ok(Some((newest, checkpoint))) => {
                // This is above every generation that an older owner may still have in flight.
                let generation = newest + GENERATIONS_AHEAD_MAX;
                recorder.published(generation, checkpoint).await?;
                Ok(generation)
            }
            Err(e @ (VolumeError::Corrupt { .. } | VolumeError::Wal { .. })) if self.is_discard_allowed => {
                warn!("{}", e.chain());
                warn_given_up(Some(&self.url));
                // The watermark comes first, because a partly removed WAL must never be replayed.
                let generation = watermark + GENERATIONS_LEFT;
                recorder.published(generation, None).await?;
                self.remove_found().await;
                Ok(generation)
            }
            Err(e @ VolumeError::Corrupt { .. }) => Err(VolumeError::Wal {
                url: self.url.clone(),
                reason: e.chain(),
                advice: ADVICE_GIVE_UP,
            }),
            Err(e) => Err(e),
        }
    }

    /// Removes what is given up. The watermark is above it, so that it is never replayed if it stays.
    async fn remove_found(&self) {
        if let Err(e) = self.store.remove_found().await {
            warn_left(&self.url, &e);
        }
    }

    /// Reads a record that was found; `None` when it is gone since. An older owner removes records once they are published, and no
    /// fence keeps it from that. A record that was needed is noticed by the records after it.
    async fn read(&self, id: RecordId) -> Result<Option<Record>, VolumeError> {
        match self.store.read(id).await {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                debug!(
                    "the record {id} of the log {} was removed by an older owner",
                    self.url
                );
                Ok(None)
            }
            read => read.map(Some),
        }
    }

    /// Applies and publishes the records. Returns `None` when there was nothing to apply.
    async fn apply(
        &self,
        engine: &dyn Engine,
        watermark: u64,
        history: &Seen,
        options: &ReplayOptions,
    ) -> Result<Option<(u64, Option<Checkpoint>)>, VolumeError> {
        // The newest record is checked first, because no part of a WAL that is refused may be published. The seals behind it tell
        // nothing of its history.
        for &id in self.store.found().iter().rev() {
            if let Some(newest) = self.read(id).await?.filter(|record| !record.is_seal) {
                self.check_base(&newest, watermark, history).await?;
                break;
            }
        }
        let mut replay = Replay::new(watermark);
        let overlay = Overlay::new(engine.geometry());
        let (mut groups, mut changes, mut bytes) = (0, 0, 0);
        let mut publishes = Publishes {
            url: &self.url,
            engine,
            overlay: &overlay,
            options,
            held: None,
            held_bytes: 0,
            checkpoint: None,
        };
        let reads = self
            .store
            .found()
            .iter()
            .copied()
            .map(|id| async move { (id, self.read(id).await) });
        let mut reads = stream::iter(reads).buffered(READS_AT_ONCE).enumerate();
        while let Some((nth, (id, group))) = reads.next().await {
            if nth > 0 && nth % PROGRESS_GROUPS == 0 {
                warn!(
                    "replaying {}: record {nth} of {}",
                    self.url,
                    self.store.found().len()
                );
            }
            let corrupt = |reason: String| VolumeError::Corrupt {
                what: format!("the log {}", self.url),
                reason,
            };
            let Some(group) = group? else { continue };
            if self.store.is_suspect(id) && group.newest_generation() > watermark {
                return Err(corrupt(format!(
                    "what comes before record {} of epoch {} is damaged",
                    id.sequence, id.epoch
                )));
            }
            self.check_base(&group, watermark, history).await?;
            let entries = replay.next(id, group).map_err(|e| corrupt(e.to_string()))?;
            groups += usize::from(!entries.is_empty());
            for entry in entries {
                if !engine
                    .geometry()
                    .contains(entry.offset_bytes, entry.content.len_bytes())
                {
                    return Err(corrupt(format!("record {id} reaches past the volume's end")));
                }
                changes += 1;
                bytes += entry.content.len_bytes();
                apply_entry(&overlay, &entry);
            }
            // It is harmless to publish a part early, because the next opening applies all of it again.
            if publishes.is_due() {
                publishes.publish(More::MayCome).await?;
            }
        }
        if changes == 0 {
            return Ok(None);
        }
        publishes.publish(More::None).await?;
        let checkpoint = publishes.checkpoint;
        // This is a warning because the previous server did not end cleanly.
        warn!(
            "replayed {groups} records of the log {}: {changes} changes, {bytes} bytes",
            self.url
        );
        Ok(Some((replay.newest_generation(), checkpoint)))
    }

    /// Checks that the container has the checkpoint that a record names. A record that is already published is not
    /// checked.
    async fn check_base(&self, group: &Record, watermark: u64, history: &Seen) -> Result<(), VolumeError> {
        if group.newest_generation() <= watermark {
            return Ok(());
        }
        let reason = match group.base {
            Some(base) if history.has(base).await? => return Ok(()),
            Some(base) => history.other_history(base),
            None if !history.is_broken() => return Ok(()),
            None => history.left_history(),
        };
        Err(other_history(
            &self.url,
            format!("record {} of epoch {}: {reason}", group.sequence, group.epoch),
        ))
    }

    /// Ends the WAL cleanly: everything is published, and `generation` was the last one. An older server that may only
    /// be paused stays shut out. The marker stays, marked as clean, for two reasons: an older server may still have
    /// records in flight, which the watermark keeps from being replayed; and this server may have been overtaken, so
    /// that the marker is another owner's by now. Records that cannot be removed are logged and harm nobody.
    ///
    /// # Errors
    /// When the marker cannot be put. The next opening then looks at the WAL once more.
    pub async fn finish(&self, generation: u64, is_older_alive: bool) -> Result<(), VolumeError> {
        self.marker.set_clean(generation).await?;
        if let Err(e) = self.store.clear(is_older_alive).await {
            warn_left(&self.url, &e);
        }
        Ok(())
    }
}

/// Options of a replay.
#[derive(Debug, Clone, Copy)]
pub struct ReplayOptions {
    /// Memory for unpublished changes, in bytes.
    pub write_buffer_bytes: u64,
    /// Memory for unpublished changes, in bytes.
    pub io_timeout: Duration,
}

/// Says that records which nobody needs any more could not be removed.
pub(crate) fn warn_left(url: &str, e: &VolumeError) {
    warn!(
        "records of the log {url} that are not needed any more could not be removed, and make its next opening slower: {}",
        e.chain()
    );
}

fn apply_entry(overlay: &Overlay, entry: &Entry) {
    match &entry.content {
        Content::Data(bytes) => overlay.write(entry.offset_bytes, bytes),
        Content::Zero { len_bytes } => overlay.zero(entry.offset_bytes, *len_bytes),
    };
}

/// Whether more records may change what is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum More {
    MayCome,
    None,
}

/// Publishes what is applied, a part at a time.
struct Publishes<'a> {
    url: &'a str,
    engine: &'a dyn Engine,
    overlay: &'a Overlay,
    options: &'a ReplayOptions,
    /// A part with a partial write to a block that is damaged where it is stored: a later record may write all of that block.
    held: Option<Arc<Frozen>>,
    /// All that was applied when it was held last, in bytes.
    held_bytes: u64,
    checkpoint: Option<Checkpoint>,
}

impl Publishes<'_> {
    /// Whether so much was applied that a part is published.
    fn is_due(&self) -> bool {
        self.overlay.total_bytes() > self.held_bytes + self.options.write_buffer_bytes / 2
    }

    /// Publishes all that was applied, unless it is held for what may come.
    async fn publish(&mut self, more: More) -> Result<(), VolumeError> {
        loop {
            let was_held = self.held.is_some();
            let frozen = self.held.take().unwrap_or_else(|| self.overlay.freeze());
            match publish(self.engine, self.overlay, &frozen, self.options).await {
                Ok(checkpoint) => self.checkpoint = checkpoint.or(self.checkpoint.take()),
                Err(VolumeError::PartOfDamage { .. }) if more == More::MayCome => {
                    self.held = Some(frozen);
                    self.held_bytes = self.overlay.total_bytes();
                    return Ok(());
                }
                Err(e) => return Err(self.not_of_wal(e)),
            }
            self.overlay.drop_frozen();
            self.held_bytes = 0;
            if !was_held {
                return Ok(());
            }
        }
    }

    /// What is damaged in the volume is no damage of the log, which is needed all the more: `discard_wal=yes` is not meant for it.
    fn not_of_wal(&self, e: VolumeError) -> VolumeError {
        match e {
            VolumeError::Corrupt { .. } => VolumeError::Shared(Arc::new(e)),
            VolumeError::PartOfDamage { .. } => VolumeError::Shared(Arc::new(VolumeError::Wal {
                url: self.url.to_owned(),
                reason: e.chain(),
                advice: ADVICE_DAMAGE,
            })),
            e => e,
        }
    }
}

async fn publish(
    engine: &dyn Engine,
    overlay: &Overlay,
    frozen: &Arc<Frozen>,
    options: &ReplayOptions,
) -> Result<Option<Checkpoint>, VolumeError> {
    let until = tokio::time::Instant::now() + options.io_timeout;
    loop {
        let published = async {
            complete_partial_blocks(engine, overlay, frozen, || {}).await?;
            engine.publish(frozen.clone(), Beside::default()).await
        };
        match published.await {
            Ok(checkpoint) => return Ok(checkpoint),
            Err(e @ (VolumeError::Fenced { .. } | VolumeError::PartOfDamage { .. })) => return Err(e),
            Err(e) if tokio::time::Instant::now() >= until => return Err(e),
            Err(e) => warn!(
                "a replay could not be published and is tried again: {}",
                e.chain()
            ),
        }
        tokio::time::sleep(RETRY_WAIT).await;
        // A store that fails for a moment fails this, too.
        while let Err(e) = engine.recover().await {
            if matches!(e, VolumeError::Fenced { .. }) || tokio::time::Instant::now() >= until {
                return Err(e);
            }
            tokio::time::sleep(RETRY_WAIT).await;
        }
    }
}
