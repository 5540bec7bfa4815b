//! Clones and relocations, as they come in a history.

use std::sync::Arc;

use hypernbd_volume::admin::compact::compact;
use hypernbd_volume::admin::retention::set_policy;
use hypernbd_volume::admin::{self, IfDamaged};
use hypernbd_volume::base::control::Control;
use hypernbd_volume::past::At;
use hypernbd_volume::retention::Policy;
use hypernbd_volume::{VolumeError, WalPlace};

use super::faults::Faults;
use super::line::Line;
use super::verbs::BLOCK;
use super::world::{LIMIT, World, runtime};
use crate::fixture::pattern;

impl World {
    /// Whether the volume at the other place shares what this one has.
    pub fn has_clone(&self, at: usize) -> bool {
        self.places[1 - at].is_clone
    }

    /// Clones the volume at a place to the other, if it can be: what is published, or what has a name.
    pub fn clone_from(&mut self, from: usize) -> bool {
        let to = 1 - from;
        let names: Vec<_> = self.places[from].names.clone().into_iter().collect();
        let (at, contents) = match &self.places[from].line {
            _ if self.places[from].is_clone => return false,
            Some(_) if !names.is_empty() && (self.random.bool() || !self.is_closed(from)) => {
                let (name, contents) = names[self.random.usize(..names.len())].clone();
                (Some(format!("@{name}").parse::<At>().unwrap()), contents)
            }
            Some(line) if self.is_closed(from) && self.places[from].server.is_none() => {
                (None, line.newest().clone())
            }
            _ => return false,
        };
        self.kill_stale(to);
        let (url, new) = (self.url(from), self.url(to));
        let what = format!("clone {}, {at:?}", self.places[from].name);
        let of = (url.clone(), at.clone(), new.clone());
        let mut cloned = self.verb(&what, |store| {
            Box::pin(async move { admin::clone(&of.0, &store, of.1.as_ref(), &of.2).await })
        });
        let is_killed = cloned.is_none();
        // The parent may keep something for a clone that was never made, at a place that is not there any more.
        self.places[from].is_told_of_none |= is_killed;
        let store = Faults::none();
        loop {
            match cloned {
                Some(Ok(_)) => break,
                Some(Err(VolumeError::AlreadyExists { .. })) if is_killed => break,
                // A volume that was made and not written has no checkpoint.
                Some(Err(VolumeError::NoCheckpoint { .. })) if contents.iter().all(|&byte| byte == 0) => {
                    return false;
                }
                // Of this one or of another that was there.
                Some(Err(VolumeError::Leftovers { .. })) => {
                    let lease = self.lease();
                    let deleted = admin::delete(&new, &store, &lease, IfDamaged::Refuse);
                    self.whole("delete what is left", deleted)
                        .unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
                }
                Some(Err(error)) => panic!("{what}: {}", error.chain()),
                None => {}
            }
            cloned = Some(self.whole(&what, admin::clone(&url, &store, at.as_ref(), &new)));
        }
        let policy = Policy {
            keep_last: 1,
            ..Policy::default()
        };
        self.whole("keep the last one", set_policy(&new, &store, Some(&policy)))
            .unwrap();
        let journal = self.path(&format!("journal-{}", self.places[to].name));
        let has_log = self.random.bool();
        let place = &mut self.places[to];
        place.line = Some(Line::known(Vec::clone(&contents)));
        place.names.clear();
        (place.is_clone, place.is_buffer_left, place.replayed) = (true, false, None);
        (place.is_log_foreign, place.is_log_open) = (has_log && journal.exists(), false);
        place.log = has_log.then(|| WalPlace::At(Self::url_of(&journal)));
        self.seen.cloned += 1;
        true
    }

    /// Ends the sharing of the volume at a place, which is not served.
    pub fn flatten(&mut self, at: usize) {
        if !self.is_closed(at) || !self.places[at].is_clone {
            return;
        }
        let (url, lease) = (self.url(at), self.lease());
        let what = format!("flatten {}", self.places[at].name);
        let of = (url.clone(), lease.clone());
        let flattened = self.verb(&what, |store| {
            Box::pin(async move { admin::flatten(&of.0, &store, &of.1).await })
        });
        match flattened {
            Some(flattened) => drop(flattened.unwrap_or_else(|e| panic!("{what}: {}", e.chain()))),
            None => match self.whole(&what, admin::flatten(&url, &Faults::none(), &lease)) {
                Ok(_) => {}
                // All of it was done.
                Err(error) => assert!(
                    error.to_string().contains("is no clone"),
                    "{what}: {}",
                    error.chain()
                ),
            },
        }
        self.places[at].is_clone = false;
        self.seen.flattened += 1;
        self.check_names(at);
    }

    /// A volume that others share is never deleted; whatever became of that, it is served as before.
    pub fn try_to_delete_a_parent(&mut self, at: usize) {
        let (url, lease) = (self.url(at), self.lease());
        let deleted = self.verb(&format!("delete {}", self.places[at].name), |store| {
            Box::pin(async move { admin::delete(&url, &store, &lease, IfDamaged::Refuse).await })
        });
        if let Some(deleted) = deleted {
            let error = deleted.expect_err("a parent was deleted");
            assert!(
                matches!(error, VolumeError::HasClones { .. }),
                "{}",
                error.chain()
            );
            self.seen.kept_for_clones += 1;
        }
        self.open(at, true);
    }

    /// Relocates what is live in objects that are mostly dead, of a volume that has something of the kind or not. It may be killed at
    /// any request, or meet a fault at one.
    pub fn compact(&mut self, at: usize) {
        if self.random.bool() {
            self.open(at, true);
            self.scatter(at);
            self.close(at);
        }
        if !self.is_closed(at) {
            return self.check_names(at);
        }
        let (url, lease) = (self.url(at), self.lease());
        let what = format!("compact {}", self.places[at].name);
        let compacted = match self.random.bool() {
            true => self.verb(&what, |store| {
                let control = Control::default();
                Box::pin(async move { compact(&url, &store, &lease, &control).await })
            }),
            false => {
                let faults = Arc::<Faults>::default();
                faults.arm(&mut self.random, 30);
                let runtime = runtime();
                let (store, control) = (faults.options(), Control::default());
                let compacted = runtime.block_on(compact(&url, &store, &lease, &control));
                runtime.shutdown_timeout(LIMIT);
                self.seen.faults_met += faults.met();
                self.tell(format!("{what}, with {} faults: {compacted:?}", faults.met()));
                match compacted {
                    Err(_) if faults.met() > 0 => None,
                    compacted => Some(compacted),
                }
            }
        };
        if let Some(compacted) = compacted {
            let done = compacted.unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
            self.seen.relocated += done.objects as u32;
        }
        self.check_names(at);
        if self.random.bool() {
            self.open(at, true);
        }
    }

    /// Every object keeps a little that is live: single blocks all over the volume, a checkpoint each few.
    fn scatter(&mut self, at: usize) {
        for _ in 0..24 {
            for _ in 0..4 {
                let Some(server) = &self.places[at].server else {
                    return;
                };
                let blocks = server.volume.size_bytes() / BLOCK;
                if blocks == 0 {
                    return;
                }
                self.count += 1;
                let offset = self.random.u64(..blocks) * BLOCK;
                let bytes = pattern(u64::from(self.count), BLOCK as usize);
                let written = server.volume.write(offset, &bytes, false);
                let line = self.places[at].line.as_mut().unwrap();
                line.changed(|contents| contents[offset as usize..][..bytes.len()].copy_from_slice(&bytes));
                if written.is_err() {
                    self.kill(at);
                    self.places[at].is_buffer_left = false;
                    return;
                }
            }
            self.flush_once(at);
        }
    }
}
