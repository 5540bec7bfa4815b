//! The volumes of the process: one for as long as it runs, or those of many that somebody uses or has just used.
//!
//! Nothing here blocks: it is called under the lock around what all connections share. Of many volumes so many may be open at once as
//! have room in the server's memory; one that nobody uses makes room for the next at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use hypernbd_volume::Volume;
use hypernbd_volume::admin::Sighting;
use hypernbd_volume::linger::Room;
use hypernbd_volume::monitor::{Now, State};
use hypernbd_volume::options::ServeConfig;

use crate::served::{GiveBack, Name, ServedVolume};

/// The volumes of the process.
pub struct Registry {
    config: Arc<ServeConfig>,
    volumes: HashMap<Name, ServedVolume>,
}

impl Registry {
    /// Of a server with these parameters, of whose one volume this was seen before the fork.
    pub fn new(config: Arc<ServeConfig>, sighting: Option<Sighting>) -> Self {
        let mut volumes = HashMap::new();
        if config.volumes_open.is_none() {
            volumes.insert(None, ServedVolume::new(config.clone(), sighting));
        }
        Self { config, volumes }
    }

    /// The volume of this name, as if nobody had asked for it where that is so.
    ///
    /// # Errors
    /// Why none of this name can be.
    pub fn volume(&mut self, name: &Name) -> Result<&mut ServedVolume, String> {
        if !self.volumes.contains_key(name) {
            let Some(name) = name else {
                return Err("this server has many volumes, and none is named".to_owned());
            };
            let own = self.config.of_volume(name).map_err(|e| e.to_string())?;
            let volume = ServedVolume::new(Arc::new(own), None);
            self.volumes.insert(Some(name.clone()), volume);
        }
        self.volumes
            .get_mut(name)
            .ok_or_else(|| "it was put there above".to_owned())
    }

    /// The volume of this name, if somebody uses it or has just used it.
    pub fn get(&self, name: &Name) -> Option<&ServedVolume> {
        self.volumes.get(name)
    }

    /// As [`Self::get`].
    pub fn get_mut(&mut self, name: &Name) -> Option<&mut ServedVolume> {
        self.volumes.get_mut(name)
    }

    /// Whether another volume, or checkpoint of one, may be opened. What nobody uses is given back now, where that makes room.
    pub fn make_room(&mut self, now: Instant) -> Room {
        let Some(most) = self.config.volumes_open else {
            return Room::Free;
        };
        let taken = self.volumes.values().map(ServedVolume::open_count).sum();
        let leaving = self.volumes.values().filter(|volume| volume.is_leaving()).count();
        let is_soon = self.volumes.values().any(|volume| volume.is_leaving_soon(now));
        let unused = self.volumes.values_mut().filter(|volume| volume.may_leave());
        let longest = unused.min_by_key(|volume| volume.since());
        let found = Room::of(most, taken, leaving + usize::from(longest.is_some()));
        if let (Room::Soon, false, Some(volume)) = (found, is_soon, longest) {
            volume.hasten(now);
        }
        found
    }

    /// Forgets the volumes of many that nobody uses and that are closed.
    pub fn tidy(&mut self) {
        if self.config.volumes_open.is_some() {
            self.volumes.retain(|_, volume| !volume.is_forgettable());
        }
    }

    /// What is to be given back now, and the moment of what comes next, if that is known.
    pub fn give_back_due(&mut self, now: Instant) -> (Vec<(Name, Arc<Volume>)>, Option<Instant>) {
        let (mut due, mut next): (_, Option<Instant>) = (Vec::new(), None);
        for (name, volume) in &mut self.volumes {
            match volume.give_back_due(now) {
                GiveBack::At(at) => next = [next, at].into_iter().flatten().min(),
                GiveBack::Now(volume) => due.push((name.clone(), volume)),
            }
        }
        self.tidy();
        (due, next)
    }

    /// Whether no client uses any.
    pub fn is_idle(&self) -> bool {
        self.volumes.values().all(ServedVolume::is_idle)
    }

    /// What is served now.
    pub fn now(&self) -> Now {
        if let Some(only) = self.volumes.get(&None) {
            return only.now();
        }
        let all = self.named();
        let has = |state: State| all.iter().any(|(_, now)| now.state == state);
        let state = match () {
            () if has(State::Open) => State::Open,
            () if has(State::Opening) => State::Opening,
            () if has(State::Closing) => State::Closing,
            () => State::Waiting,
        };
        Now {
            state,
            volume: None,
            connections: all.iter().map(|(_, now)| now.connections).sum(),
        }
    }

    /// What is served now of each of many volumes, by name.
    pub fn named(&self) -> Vec<(String, Now)> {
        let named = self.volumes.iter();
        let named = named.filter_map(|(name, volume)| Some((name.as_ref()?.to_string(), volume.now())));
        let mut named: Vec<_> = named.collect();
        named.sort_by(|(a, _), (b, _)| a.cmp(b));
        named
    }

    /// All of them, at the end of the server.
    pub fn end(self) -> impl Iterator<Item = ServedVolume> {
        self.volumes.into_values()
    }
}
