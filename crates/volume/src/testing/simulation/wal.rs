//! The log of the simulation and its marker, and an opening with them: what `wal/s3.rs`, `meta/wal_marker.rs`, `open/recover_wal.rs`
//! and `volume/opening.rs` do, request by request.

use std::collections::{BTreeMap, BTreeSet};

use super::shells::{End, Engine, Identity};
use super::store::{Answer, Body, Key};
use crate::base::ids::GENERATIONS_AHEAD_MAX;
use crate::checkpoint::machine_world::{Cells, Record, seal};
use crate::checkpoint::state::PublishEnd;
use crate::wal::RecordId;
use crate::wal::record::{self, Content};
use crate::wal::replay::{Replay, numbers_to_seal};

/// The marker as its owner wrote it last.
pub struct Marker {
    watermark: u64,
    version: u64,
}

impl Marker {
    async fn take(me: &Identity, found: Option<(u64, u64)>) -> Result<Self, End> {
        let watermark = found.map_or(0, |f| f.0);
        let body = Body::Marker {
            epoch: me.epoch,
            watermark,
            is_clean: false,
        };
        match me.client.put(Key::Marker, body, found.map(|f| f.1)).await {
            Answer::Stored(version) => Ok(Self { watermark, version }),
            _ => Err(End),
        }
    }

    pub async fn update(&mut self, me: &Identity, generation: u64, is_clean: bool) -> Result<(), End> {
        let watermark = self.watermark.max(generation);
        let body = Body::Marker {
            epoch: me.epoch,
            watermark,
            is_clean,
        };
        let version = match me.client.put(Key::Marker, body.clone(), Some(self.version)).await {
            Answer::Stored(version) => version,
            Answer::Refused => match me.client.get(Key::Marker).await {
                Some((there, version)) if there == body => version,
                _ => return Err(End),
            },
            _ => return Err(End),
        };
        *self = Self { watermark, version };
        Ok(())
    }
}

/// `wal/s3.rs`: the log as its owner knows it.
#[derive(Default)]
pub struct Wal {
    found: BTreeSet<RecordId>,
    pub first_sequence: u64,
    /// Groups stored, with the highest generation of each.
    pub stored: BTreeMap<RecordId, u64>,
    /// Seals in older owners' parts.
    seals: BTreeSet<RecordId>,
}

impl Wal {
    async fn list(me: &Identity) -> BTreeSet<RecordId> {
        let keys = me.client.list(true).await.into_iter();
        keys.filter_map(|k| match k {
            Key::Record(id) => Some(id),
            _ => None,
        })
        .collect()
    }

    async fn read(&mut self, me: &Identity, id: RecordId) -> Result<Record, End> {
        let Some((Body::Record(record), _)) = me.client.get(Key::Record(id)).await else {
            // It was removed while it was read.
            return Err(End);
        };
        if !record.is_seal {
            self.stored.insert(id, record.newest().0);
        } else if id.epoch < me.epoch {
            self.seals.insert(id);
        }
        Ok(record)
    }

    async fn create_seal(&mut self, me: &Identity, id: RecordId) -> Result<bool, End> {
        let body = Body::Record(seal(me.epoch as u32));
        match me.client.put(Key::Record(id), body, None).await {
            Answer::Stored(_) => {
                if id.epoch < me.epoch {
                    self.seals.insert(id);
                }
                Ok(true)
            }
            Answer::Refused => Ok(false),
            _ => Err(End),
        }
    }

    async fn open(me: &Identity, expected: Option<(u64, u64, bool)>) -> Result<Self, End> {
        let mut wal = Self::default();
        if expected.is_some() && Self::list(me).await.is_empty() {
            // Its owner may have ended it cleanly since the marker was read.
            if me.marker().await == expected {
                me.violate("L2: the log that the marker tells of is empty".into());
            }
            return Err(End);
        }
        loop {
            let found = Self::list(me).await;
            if let Some(found) = wal.seal(me, found).await? {
                wal.found = found;
                break;
            }
        }
        let (epoch, sequence) = (me.epoch, 1);
        if !wal.create_seal(me, RecordId { epoch, sequence }).await? {
            return Err(End);
        }
        wal.first_sequence = sequence + 1;
        Ok(wal)
    }

    /// `None` when an older owner was faster somewhere.
    async fn seal(
        &mut self,
        me: &Identity,
        mut found: BTreeSet<RecordId>,
    ) -> Result<Option<BTreeSet<RecordId>>, End> {
        let mut parts: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for id in &found {
            parts.entry(id.epoch).or_default().push(id.sequence);
        }
        if parts.keys().any(|epoch| *epoch >= me.epoch) {
            return Err(End);
        }
        for (epoch, numbers) in parts {
            let sequence = numbers[numbers.len() - 1];
            let tail = self.read(me, RecordId { epoch, sequence }).await?;
            if !me.defences.seals || tail.is_seal && u64::from(tail.owner) > epoch {
                continue;
            }
            for sequence in numbers_to_seal(&numbers) {
                let id = RecordId { epoch, sequence };
                if !self.create_seal(me, id).await? {
                    return Ok(None);
                }
                found.insert(id);
            }
        }
        Ok(Some(found))
    }

    /// What is above the watermark, and the newest generation.
    async fn replay(&mut self, me: &Identity, watermark: u64) -> Result<(Cells, u64), End> {
        let mut replay = Replay::new(watermark);
        let mut cells = Cells::new();
        for id in self.found.clone() {
            let stored = self.read(me, id).await?;
            let group = record::Record {
                epoch: u64::from(stored.owner),
                ..stored.group(id.sequence)
            };
            let entries = replay.next(id, group).map_err(|e| {
                me.violate(format!("L2: a sound log is refused: {e}"));
                End
            })?;
            for entry in entries {
                if let Content::Data(value) = &entry.content {
                    let value = u64::from_le_bytes(value[..].try_into().expect("a number"));
                    cells.insert(entry.offset_bytes as u8, value);
                }
            }
        }
        Ok((cells, replay.newest_generation()))
    }

    /// Groups of this owner and older ones that are published up to `generation`.
    pub fn old(&self, epoch: u64, generation: u64, acknowledged: u64) -> Vec<Key> {
        let is_old = |(id, newest): &(&RecordId, &u64)| {
            **newest <= generation && (id.epoch < epoch || id.sequence < acknowledged)
        };
        let old = self.stored.iter().filter(is_old);
        old.map(|(id, _)| Key::Record(*id)).collect()
    }

    /// The clean end: `OpenWal::finish`.
    pub async fn finish(
        &self,
        me: &Identity,
        marker: &mut Marker,
        generation: u64,
        is_older_alive: bool,
    ) -> Result<(), End> {
        marker.update(me, generation, true).await?;
        let mut all = Self::list(me).await;
        all.retain(|id| !(is_older_alive && self.seals.contains(id)));
        if me.defences.end {
            all.retain(|id| id.epoch <= me.epoch);
        }
        me.delete(all.into_iter().map(Key::Record).collect()).await?;
        if !me.defences.end {
            me.delete(vec![Key::Marker]).await?;
        }
        Ok(())
    }
}

/// What an opening leads to.
pub struct Opened {
    pub engine: Engine,
    pub wal: Wal,
    pub marker: Marker,
    /// The newest generation used.
    pub generation: u64,
}

/// `open/recover_wal.rs` and `volume/opening.rs`, once the lease is taken.
pub async fn open(me: &Identity) -> Result<Opened, End> {
    let found = me.marker().await;
    let mut wal = Wal::open(me, found.filter(|f| !f.2)).await?;
    let mut marker = Marker::take(me, found.map(|f| (f.0, f.1))).await?;
    let mut engine = Engine::open(me).await?;
    let watermark = me
        .take_up(engine.published.cno)
        .await?
        .max(found.map_or(0, |f| f.0));
    let (cells, newest) = wal.replay(me, watermark).await?;
    let beyond = if me.defences.raise {
        GENERATIONS_AHEAD_MAX
    } else {
        0
    };
    let mut generation = watermark;
    if !cells.is_empty() {
        generation = newest + beyond;
        let mut attempt = 0;
        while let Err(end) = engine.publish(me, &cells, generation, attempt).await {
            if end == PublishEnd::Fenced {
                return Err(End);
            }
            attempt += 1;
        }
    } else if !wal.found.is_empty() && me.defences.raise {
        generation = watermark + beyond;
        marker.update(me, generation, false).await?;
    }
    let _ = me.delete(wal.old(me.epoch, generation, 0)).await;
    Ok(Opened {
        engine,
        wal,
        marker,
        generation,
    })
}
