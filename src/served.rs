//! The volume that is served: closed, being opened, open, or being given back, and who uses it.
//!
//! Nothing here blocks: it is called under the lock around what all connections share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hypernbd_volume::admin::Sighting;
use hypernbd_volume::linger::{Due, Linger};
use hypernbd_volume::monitor::{Now, State};
use hypernbd_volume::options::{ServeConfig, VolumeOptions};
use hypernbd_volume::past::Past;
use hypernbd_volume::volume_name::VolumeName;
use hypernbd_volume::{Volume, VolumeError};
use tokio::runtime::Runtime;
use tokio::sync::Notify;

use crate::closing::Closing;
use crate::opening::{Opening, Waiter};
use crate::past_exports::PastExports;

/// Which of the volumes of a server; `None` where it has one.
pub type Name = Option<VolumeName>;

/// What a connection finds.
pub enum Look {
    /// What it asked for.
    Open(Arc<Volume>),
    /// It has to wait, and look again.
    Wait(Wait),
}

/// What a connection waits for.
pub enum Wait {
    /// The opening.
    Opening(Waiter),
    /// The end of the close, which an opening follows.
    Closing(Arc<Closing>),
    /// Room for it: a volume that nobody uses is given back.
    Room,
}

impl Wait {
    /// What came of it; `None` if it has not ended within this time.
    pub fn wait(&self, longest: Duration) -> Option<Result<(), Arc<VolumeError>>> {
        match self {
            Self::Opening(opening) => opening.wait(longest).map(|opened| opened.map(drop)),
            Self::Closing(closing) => closing.wait(longest).then_some(Ok(())),
            // Whether there is any is looked at each time.
            Self::Room => {
                std::thread::sleep(longest);
                Some(Ok(()))
            }
        }
    }
}

/// What is to be given back.
pub enum GiveBack {
    /// Nothing until this moment; without one, until something happens.
    At(Option<Instant>),
    /// This volume, once everything of it is published: [`ServedVolume::published`] follows.
    Now(Arc<Volume>),
}

/// What is left of volumes at the end of the server.
#[derive(Default)]
pub struct Left {
    /// What is open.
    pub open: Vec<Arc<Volume>>,
    /// What is being opened.
    pub opening: Vec<Opening>,
    /// Closes under way.
    pub closing: Vec<Arc<Closing>>,
}

/// A volume and its users.
pub struct ServedVolume {
    config: Arc<ServeConfig>,
    /// The volume open for writing. While there is one, every connection uses it, so that all see the same bytes.
    read_write: Option<Arc<Volume>>,
    /// The volume opened for read-only connections only (`nbdkit -r`): it asks the store for no write.
    read_only: Option<Arc<Volume>>,
    /// Openings that have not ended, or whose end nobody saw yet: for writing, and for reading only. A connection waits for
    /// one without the lock around all this, which the end of the server wants.
    opening: [Option<Opening>; 2],
    /// Connections that wait for the one for reading only.
    readers_waiting: usize,
    /// What was seen of the volume before the fork, so that the first opening need not look, or watch its lease, again.
    sighting: Option<Sighting>,
    /// An opening for writing was begun before.
    was_opened: bool,
    /// An opening for writing has succeeded. The volume may have been another server's since.
    was_had: bool,
    connections: usize,
    /// When the volume open for writing is given back.
    linger: Linger,
    /// The close of the volume that is being given back.
    closing: Option<Arc<Closing>>,
    /// Checkpoints that clients read.
    pub past: PastExports,
    /// Why the last opening failed, once a connection was told so.
    failure: Option<String>,
}

impl ServedVolume {
    /// A volume that nobody has asked for yet.
    pub fn new(config: Arc<ServeConfig>, sighting: Option<Sighting>) -> Self {
        Self {
            linger: Linger::new(config.lease_linger),
            config,
            read_write: None,
            read_only: None,
            opening: [None, None],
            readers_waiting: 0,
            sighting,
            was_opened: false,
            was_had: false,
            connections: 0,
            closing: None,
            past: PastExports::default(),
            failure: None,
        }
    }

    /// Its parameters.
    pub fn config(&self) -> &Arc<ServeConfig> {
        &self.config
    }

    /// A connection begins to wait for the volume; [`Self::waited`] follows.
    pub fn begin_waiting(&mut self, readonly: bool) {
        self.readers_waiting += usize::from(readonly);
        self.linger.begin_use();
    }

    /// A connection waits no more: it is connected, or has given up. An opening for reading that nobody waits for is given up: what it
    /// shows would be old when the next client comes. Gives what it has opened already, to be closed.
    pub fn waited(&mut self, readonly: bool, is_connected: bool) -> Option<Arc<Volume>> {
        if !is_connected {
            self.linger.end_use(Instant::now());
        }
        if !readonly {
            return None;
        }
        self.readers_waiting = self.readers_waiting.saturating_sub(1);
        if self.readers_waiting > 0 {
            return None;
        }
        let Some(opening) = self.opening[usize::from(true)].take() else {
            // It may have been taken in before this one could look.
            return self.read_only.take_if(|_| self.connections == 0);
        };
        opening.give_up();
        match opening.ended()? {
            Ok(volume) => Some(volume),
            Err(e) => {
                self.failure = Some(e.chain());
                None
            }
        }
    }

    /// Takes in the openings that have ended.
    fn settle(&mut self, now: Instant) {
        for is_readonly in [false, true] {
            let slot = &mut self.opening[usize::from(is_readonly)];
            let Some(opened) = slot.as_ref().and_then(Opening::ended) else {
                continue;
            };
            *slot = None;
            self.failure = opened.as_ref().err().map(|e| e.chain());
            match opened {
                Ok(volume) if is_readonly => self.read_only = Some(volume),
                Ok(volume) => {
                    self.read_write = Some(volume);
                    self.was_had = true;
                    self.linger.opened(now);
                }
                // Who waited for it knows; the next one tries again.
                Err(_) => {}
            }
        }
    }

    /// The volume for a connection, if it is open; else what it waits for: an opening is begun if there is none. The lease names `control`,
    /// and `alarm` goes off when the opening ends.
    pub fn look(
        &mut self,
        readonly: bool,
        runtime: &Runtime,
        control: Option<&str>,
        alarm: &Arc<Notify>,
    ) -> Look {
        self.settle(Instant::now());
        let open = self
            .read_write
            .as_ref()
            .or(self.read_only.as_ref().filter(|_| readonly));
        if let Some(volume) = open {
            self.connections += 1;
            return Look::Open(Arc::clone(volume));
        }
        if let Some(closing) = self.closing.as_ref().filter(|_| !readonly) {
            return Look::Wait(Wait::Closing(closing.clone()));
        }
        let opening = match self.opening[usize::from(readonly)].take() {
            Some(opening) => opening,
            None => {
                let options = self.options_of_opening(readonly, control);
                let (config, alarm) = (self.config.clone(), alarm.clone());
                let open = move || async move { Volume::open(&config.url, &config.store, &options).await };
                Opening::begin(runtime, open, move || alarm.notify_one())
            }
        };
        let waiter = opening.waiter();
        self.opening[usize::from(readonly)] = Some(opening);
        Look::Wait(Wait::Opening(waiter))
    }

    /// How the volume is opened now.
    fn options_of_opening(&mut self, readonly: bool, control: Option<&str>) -> VolumeOptions {
        let mut options = VolumeOptions {
            read_only: readonly,
            ..self.config.volume.clone()
        };
        // What was seen before the fork tells nothing of a volume that was had since.
        options.lease.sighting = self.sighting.clone().filter(|_| !self.was_had);
        options.lease.is_retry = !readonly && std::mem::replace(&mut self.was_opened, true);
        options.lease.control = control.map(str::to_owned);
        if self.was_had {
            // Said of the volume as it was at the start. By now another server may have it, or have left what was flushed in its log.
            options.lease.takeover = false;
            options.discard_wal = false;
            options.adopt = false;
        }
        options
    }

    /// A connection has ended. After the last one there may be nobody left who would flush: a checkpoint starts. A volume open
    /// read-only is given, to be closed, so that the next connection sees what its writer has published meanwhile.
    pub fn disconnect(&mut self) -> Option<Arc<Volume>> {
        self.connections = self.connections.saturating_sub(1);
        self.linger.end_use(Instant::now());
        if self.connections > 0 {
            return None;
        }
        if let Some(volume) = &self.read_write {
            volume.checkpoint_soon();
        }
        self.read_only.take()
    }

    /// Something is done with the volume that is no connection; [`Self::end_use`] follows.
    pub fn begin_use(&mut self) {
        self.linger.begin_use();
    }

    /// See [`Self::begin_use`].
    pub fn end_use(&mut self) {
        self.linger.end_use(Instant::now());
    }

    /// What is to be given back now.
    pub fn give_back_due(&mut self, now: Instant) -> GiveBack {
        self.settle(now);
        match (self.linger.due(now), &self.read_write) {
            (Due::Nothing(next), _) => GiveBack::At(next),
            (Due::Publish, Some(volume)) => GiveBack::Now(volume.clone()),
            (Due::Publish, None) => {
                self.linger.closed();
                GiveBack::At(None)
            }
        }
    }

    /// Everything of the volume is published, or could not be. Whether it is to be closed now, which nobody is given any more: then what
    /// others wait for until [`Self::closed`].
    pub fn published(&mut self, is_all: bool, now: Instant) -> Option<Arc<Closing>> {
        if !self.linger.published(is_all, now) {
            return None;
        }
        self.read_write = None;
        let closing = Arc::<Closing>::default();
        self.closing = Some(closing.clone());
        Some(closing)
    }

    /// The volume that was given back is closed.
    pub fn closed(&mut self) {
        self.closing = None;
        self.linger.closed();
    }

    /// How many volumes it has open: itself, also while that is begun or ended, and checkpoints of it.
    pub fn open_count(&self) -> usize {
        let is_open =
            self.open().is_some() || self.opening.iter().any(Option::is_some) || self.closing.is_some();
        usize::from(is_open) + self.past.count()
    }

    /// Whether it is open and nobody uses it.
    pub fn may_leave(&self) -> bool {
        self.linger.may_leave()
    }

    /// Of several that may leave, the one whose moment is the earliest goes first.
    pub fn since(&self) -> Option<Instant> {
        self.linger.since()
    }

    /// It is given back at once, unless somebody uses it.
    pub fn hasten(&mut self, now: Instant) {
        self.linger.hasten(now);
    }

    /// Whether it is being given back.
    pub fn is_leaving(&self) -> bool {
        self.linger.is_leaving()
    }

    /// Whether it is being given back, and not for so long that another one had better go instead.
    pub fn is_leaving_soon(&self, now: Instant) -> bool {
        self.linger.is_leaving_soon(now)
    }

    /// Whether nothing would be lost with it.
    pub fn is_forgettable(&self) -> bool {
        self.linger.is_unused() && self.open_count() == 0 && self.past.is_unused()
    }

    /// Whether it can be had without opening anything more.
    pub fn has_room(&self, at: Option<&Past>) -> bool {
        match at {
            Some(at) => self.past.has(at),
            None => self.open_count() > self.past.count(),
        }
    }

    /// Whether no client uses it.
    pub fn is_idle(&self) -> bool {
        self.connections == 0 && self.past.is_unused()
    }

    /// The volume as it is, if it is open.
    pub fn open(&self) -> Option<&Arc<Volume>> {
        self.read_write.as_ref().or(self.read_only.as_ref())
    }

    /// What a client has that asked for this checkpoint, or for the volume as it is.
    pub fn opened(&self, at: Option<&Past>) -> Option<&Arc<Volume>> {
        match at {
            Some(at) => self.past.get(at),
            None => self.open(),
        }
    }

    /// What is served now, for who asks.
    pub fn now(&self) -> Now {
        let ended: Vec<_> = self.opening.iter().flatten().map(Opening::ended).collect();
        let volume = self.open().cloned();
        let failed = ended.iter().flatten().find_map(|opened| opened.as_ref().err());
        let failure = failed.map(|e| e.chain()).or_else(|| self.failure.clone());
        let state = match failure {
            _ if volume.is_some() => State::Open,
            _ if ended.iter().any(Option::is_none) => State::Opening,
            _ if self.closing.is_some() => State::Closing,
            Some(why) => State::Failed(why),
            None => State::Waiting,
        };
        Now {
            state,
            volume,
            connections: self.connections as u64,
        }
    }

    /// Gives what is left of it at the end of the server.
    pub fn end(self, left: &mut Left) {
        let (past, past_opening) = self.past.end();
        let own = [self.read_write, self.read_only];
        left.open.extend(own.into_iter().flatten().chain(past));
        left.opening
            .extend(self.opening.into_iter().flatten().chain(past_opening));
        left.closing.extend(self.closing);
    }
}
