//! Checkpoints of the volume that clients read, under the names that they gave them.
//!
//! While one connection reads a checkpoint, others that ask for the same name get the same one, also where the name is a time ago:
//! a client that opens several connections must see the same bytes on all of them.

use std::collections::HashMap;
use std::sync::Arc;

use hypernbd_volume::Volume;
use hypernbd_volume::options::ServeConfig;
use hypernbd_volume::past::{self, Past, Snapshot};
use tokio::runtime::Runtime;

use crate::opening::Opening;
use crate::served::{Look, Wait};

/// A checkpoint, being opened or open.
#[derive(Default)]
struct Slot {
    opening: Option<Opening>,
    volume: Option<Arc<Volume>>,
    connections: usize,
    /// Connections that wait for it.
    waiting: usize,
}

impl Slot {
    fn is_unused(&self) -> bool {
        self.connections == 0 && self.waiting == 0
    }
}

/// All of them.
#[derive(Default)]
pub struct PastExports {
    slots: HashMap<String, Slot>,
}

impl PastExports {
    /// A connection begins to wait for a checkpoint; [`Self::waited`] must follow.
    pub fn wait(&mut self, at: &Past) {
        self.slots.entry(at.to_string()).or_default().waiting += 1;
    }

    /// A connection waits no more: it has its checkpoint, or has given up. The volume to be closed, when nobody uses it: the next
    /// one that asks for this name may mean another checkpoint.
    pub fn waited(&mut self, at: &Past) -> Option<Arc<Volume>> {
        let slot = self.slots.get_mut(&at.to_string())?;
        slot.waiting = slot.waiting.saturating_sub(1);
        self.remove_unused(at)
    }

    fn remove_unused(&mut self, at: &Past) -> Option<Arc<Volume>> {
        let name = at.to_string();
        if !self.slots.get(&name)?.is_unused() {
            return None;
        }
        let slot = self.slots.remove(&name)?;
        if let Some(opening) = slot.opening {
            opening.give_up();
            // It may have opened what nobody has taken.
            return slot.volume.or_else(|| opening.ended()?.ok());
        }
        slot.volume
    }

    /// The checkpoint for a new connection, if it is open; else its opening, begun if there is none.
    pub fn connect(&mut self, runtime: &Runtime, config: &Arc<ServeConfig>, at: &Past) -> Look {
        let slot = self.slots.entry(at.to_string()).or_default();
        if let Some(opened) = slot.opening.as_ref().and_then(Opening::ended) {
            slot.opening = None;
            // Who waited for one that failed knows; this one tries again.
            slot.volume = opened.ok();
        }
        if let Some(volume) = &slot.volume {
            slot.connections += 1;
            return Look::Open(volume.clone());
        }
        let (at, config) = (at.clone(), config.clone());
        let open =
            move || async move { Volume::open_past(&config.url, &config.store, &config.volume, &at).await };
        let opening = slot
            .opening
            .get_or_insert_with(|| Opening::begin(runtime, open, || ()));
        Look::Wait(Wait::Opening(opening.waiter()))
    }

    /// A connection has ended. The volume to be closed, when it was the last one.
    pub fn disconnect(&mut self, at: &Past) -> Option<Arc<Volume>> {
        let slot = self.slots.get_mut(&at.to_string())?;
        slot.connections = slot.connections.saturating_sub(1);
        self.remove_unused(at)
    }

    /// A checkpoint, if it is open.
    pub fn get(&self, at: &Past) -> Option<&Arc<Volume>> {
        self.slots.get(&at.to_string())?.volume.as_ref()
    }

    /// How many are open, or being opened.
    pub fn count(&self) -> usize {
        let has_any = |slot: &&Slot| slot.volume.is_some() || slot.opening.is_some();
        self.slots.values().filter(has_any).count()
    }

    /// Whether this one is open, or being opened.
    pub fn has(&self, at: &Past) -> bool {
        let slot = self.slots.get(&at.to_string());
        slot.is_some_and(|slot| slot.volume.is_some() || slot.opening.is_some())
    }

    /// Whether no client uses any.
    pub fn is_unused(&self) -> bool {
        self.slots.is_empty()
    }

    /// What is open, and what is being opened.
    pub fn end(self) -> (Vec<Arc<Volume>>, Vec<Opening>) {
        let slots = self.slots.into_values();
        let (open, opening): (Vec<_>, Vec<_>) = slots.map(|slot| (slot.volume, slot.opening)).unzip();
        (
            open.into_iter().flatten().collect(),
            opening.into_iter().flatten().collect(),
        )
    }
}

/// A snapshot as the name of an export, and what a client is told of it.
pub fn described(snapshot: &Snapshot) -> (String, String) {
    let published = past::time_text(snapshot.published_ms);
    let description = format!("checkpoint {}, published {published}", snapshot.checkpoint.cno);
    (format!("@{}", snapshot.name), description)
}
