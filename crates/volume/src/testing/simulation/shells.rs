//! What the shells around the machines do, request by request: `engine/owner/mod.rs`, `engine/fence.rs`, `meta/checkpoint_list.rs`,
//! `checkpoint/publisher.rs` and an append to the log, over the store of the simulation.

use super::store::{Answer, Body, Client, Inode, Key, Request};
use crate::checkpoint::machine_world::{Cells, Record};
use crate::checkpoint::state::PublishEnd;
use crate::lease::LeaseRecord;
use crate::wal::RecordId;
use crate::wal::group_commit::AppendEnd;

/// What keeps older owners out and flushed writes in; each is taken out in a test of its own.
#[derive(Debug, Clone, Copy)]
pub struct Defences {
    /// A takeover rewrites the inode.
    pub rewrite: bool,
    /// After adopting the stored inode the lease is checked.
    pub check: bool,
    /// An opening seals the log.
    pub seals: bool,
    /// An opening raises the watermark beyond what an older owner may have on its way.
    pub raise: bool,
    /// A clean end leaves the marker and what later owners have in the log.
    pub end: bool,
}

/// It cannot go on: another owner has the volume, or the store failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End;

/// What one owner knows of itself.
#[derive(Clone)]
pub struct Identity {
    pub client: Client,
    pub token: String,
    pub epoch: u64,
    pub defences: Defences,
}

impl Identity {
    pub fn violate(&self, what: String) {
        self.client.network.borrow_mut().store.violate(what);
    }

    pub async fn lease(&self) -> Option<(LeaseRecord, u64)> {
        match self.client.get(Key::Lease).await {
            Some((Body::Lease(record), version)) => Some((record, version)),
            _ => None,
        }
    }

    async fn check(&self) -> Result<(), PublishEnd> {
        if !self.defences.check {
            return Ok(());
        }
        match self.lease().await {
            Some((record, _)) if record.token == self.token => Ok(()),
            _ => Err(PublishEnd::Fenced),
        }
    }

    async fn inode(&self) -> (Inode, u64) {
        match self.client.get(Key::Inode).await {
            Some((Body::Inode(inode), version)) => (inode, version),
            other => unreachable!("{other:?} under the inode's name"),
        }
    }

    /// The watermark in the marker, its version, and whether it tells of a clean end.
    pub async fn marker(&self) -> Option<(u64, u64, bool)> {
        match self.client.get(Key::Marker).await {
            Some((
                Body::Marker {
                    watermark, is_clean, ..
                },
                version,
            )) => Some((watermark, version, is_clean)),
            _ => None,
        }
    }

    /// `engine/fence.rs`.
    pub async fn rewrite_inode(&self) -> Result<(), End> {
        loop {
            let (inode, version) = self.inode().await;
            let mtime = inode.mtime + 1;
            let body = Body::Inode(Inode { mtime, ..inode });
            match self.client.put(Key::Inode, body, Some(version)).await {
                Answer::Stored(_) => return Ok(()),
                Answer::Refused => {}
                _ => return Err(End),
            }
        }
    }

    /// `catalogue::take_up`.
    pub async fn take_up(&self, cno: u64) -> Result<u64, End> {
        if cno == 0 {
            return Ok(0);
        }
        loop {
            if let Some((_, generation, _)) = self.entry(cno).await {
                return Ok(generation);
            }
            let older = self.client.list(false).await.into_iter().filter_map(|k| match k {
                Key::Entry(older) if older < cno => Some(older),
                _ => None,
            });
            let generation = match older.max() {
                Some(older) => self.entry(older).await.map_or(0, |e| e.1),
                None => 0,
            };
            let entry = Body::Entry {
                epoch: self.epoch,
                generation,
                is_repaired: true,
            };
            match self.client.put(Key::Entry(cno), entry, None).await {
                Answer::Stored(_) => return Ok(generation),
                Answer::Refused => {}
                _ => return Err(End),
            }
        }
    }

    async fn entry(&self, cno: u64) -> Option<(u64, u64, bool)> {
        match self.client.get(Key::Entry(cno)).await {
            Some((
                Body::Entry {
                    epoch,
                    generation,
                    is_repaired,
                },
                _,
            )) => Some((epoch, generation, is_repaired)),
            _ => None,
        }
    }

    /// `Watermarks::published`, of a publish that made a checkpoint.
    async fn record(&self, cno: u64, generation: u64) -> Result<(), PublishEnd> {
        let entry = Body::Entry {
            epoch: self.epoch,
            generation,
            is_repaired: false,
        };
        match self.client.put(Key::Entry(cno), entry, None).await {
            Answer::Stored(_) => Ok(()),
            Answer::Refused if self.entry(cno).await == Some((self.epoch, generation, false)) => Ok(()),
            Answer::Refused => Err(PublishEnd::Fenced),
            _ => Err(PublishEnd::Failed),
        }
    }

    /// `S3Wal::append`.
    pub async fn append(&self, sequence: u64, record: Record) -> AppendEnd {
        let key = Key::Record(RecordId {
            epoch: self.epoch,
            sequence,
        });
        match self.client.put(key, Body::Record(record.clone()), None).await {
            Answer::Stored(_) => AppendEnd::Durable,
            Answer::Refused => match self.client.get(key).await {
                Some((Body::Record(there), _)) if there == record => AppendEnd::Durable,
                _ => AppendEnd::Fenced,
            },
            _ => AppendEnd::Failed,
        }
    }

    /// Objects that are not needed any more; those left are no harm.
    pub async fn delete(&self, keys: Vec<Key>) -> Result<(), End> {
        for key in keys {
            if !matches!(self.client.ask(Request::Delete(key)).await, Answer::Deleted) {
                return Err(End);
            }
        }
        Ok(())
    }
}

/// The container as its owner has it.
pub struct Engine {
    pub published: Inode,
    version: u64,
    attempted: Vec<(u64, u64)>,
    /// What is published while its record is still missing.
    unrecorded: Option<(u64, u64)>,
}

impl Engine {
    /// Adopt, then check.
    pub async fn open(me: &Identity) -> Result<Self, End> {
        let (published, version) = me.inode().await;
        me.check().await.map_err(|_| End)?;
        Ok(Self {
            published,
            version,
            attempted: Vec::new(),
            unrecorded: None,
        })
    }

    /// `checkpoint/publisher.rs`.
    pub async fn publish(
        &mut self,
        me: &Identity,
        cells: &Cells,
        generation: u64,
        attempt: u32,
    ) -> Result<(), PublishEnd> {
        let cno = match self.unrecorded.filter(|(id, _)| *id == generation) {
            Some((_, cno)) => cno,
            None => {
                if attempt > 0 {
                    self.recover(me).await?;
                }
                self.store(me, cells).await?;
                self.unrecorded = Some((generation, self.published.cno));
                self.published.cno
            }
        };
        me.record(cno, generation).await?;
        self.unrecorded = None;
        Ok(())
    }

    async fn store(&mut self, me: &Identity, cells: &Cells) -> Result<(), PublishEnd> {
        let mut inode = self.published.clone();
        inode.cells.extend(cells);
        inode.cno += 1;
        inode.mtime = me.client.random.pick(4);
        self.attempted.push((inode.cno, inode.mtime));
        let put = Request::Put {
            key: Key::Inode,
            body: Body::Inode(inode.clone()),
            expected: Some(self.version),
            publisher: Some(me.epoch),
        };
        let Answer::Stored(version) = me.client.ask(put).await else {
            return Err(PublishEnd::Failed);
        };
        self.attempted.clear();
        (self.published, self.version) = (inode, version);
        Ok(())
    }

    fn is_own(&self, stored: &Inode) -> bool {
        (stored.cno, stored.mtime) == (self.published.cno, self.published.mtime)
            || stored.cno > self.published.cno && self.attempted.iter().any(|a| a.1 == stored.mtime)
    }

    /// `engine/owner/mod.rs`, after a publish that failed.
    async fn recover(&mut self, me: &Identity) -> Result<(), PublishEnd> {
        me.check().await?;
        if !self.is_own(&me.inode().await.0) {
            return Err(PublishEnd::Fenced);
        }
        let (adopted, version) = me.inode().await;
        if !self.is_own(&adopted) {
            return Err(PublishEnd::Fenced);
        }
        me.check().await?;
        if (adopted.cno, adopted.mtime) != (self.published.cno, self.published.mtime) {
            self.attempted.clear();
        }
        (self.published, self.version) = (adopted, version);
        Ok(())
    }
}
