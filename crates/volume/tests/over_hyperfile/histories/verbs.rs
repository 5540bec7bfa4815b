//! Verbs of the command line, and what people do to a volume that is not served.

use std::sync::Arc;

use futures::future::LocalBoxFuture;
use hypernbd_volume::admin::compact::compact;
use hypernbd_volume::admin::retention::{prune, set_policy};
use hypernbd_volume::admin::{self, CreateOptions, IfDamaged, rollback, wal};
use hypernbd_volume::base::control::Control;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::{self, At};
use hypernbd_volume::retention::Policy;
use hypernbd_volume::{ErrorKind, VolumeError, WalPlace};

use super::faults::Faults;
use super::line::Line;
use super::world::{Backup, LIMIT, World, runtime};
use crate::provenance::{copy_dir, restore};

pub const BLOCK: u64 = 4096;
/// Mostly with a short last block.
const SIZE: u64 = 64 * BLOCK;
/// More requests than a verb makes, mostly.
const REQUESTS: u32 = 40;

impl World {
    /// Runs a verb, which may be killed in the middle: `None` then.
    pub fn verb<R>(
        &mut self,
        what: &str,
        verb: impl FnOnce(StoreOptions) -> LocalBoxFuture<'static, Result<R, VolumeError>>,
    ) -> Option<Result<R, VolumeError>> {
        let faults = Arc::<Faults>::default();
        if self.random.u8(..3) == 0 {
            faults.end_after(self.random.u32(..REQUESTS), self.random.bool());
        }
        let runtime = runtime();
        let ended = runtime.block_on(async {
            tokio::select! {
                biased;
                () = faults.died() => None,
                ended = verb(faults.options()) => Some(ended),
            }
        });
        runtime.shutdown_timeout(LIMIT);
        let ended = ended.filter(|ended| ended.is_ok() || !faults.is_dead());
        let how = match &ended {
            None => "killed".to_owned(),
            Some(Ok(_)) => "done".to_owned(),
            Some(Err(error)) => error.chain(),
        };
        self.tell(format!("{what}: {how}"));
        ended
    }

    /// Runs a verb that nobody kills.
    pub fn whole<R>(
        &mut self,
        what: &str,
        verb: impl Future<Output = Result<R, VolumeError>>,
    ) -> Result<R, VolumeError> {
        let runtime = runtime();
        let ended = runtime.block_on(verb);
        runtime.shutdown_timeout(LIMIT);
        let how = ended
            .as_ref()
            .map_or_else(VolumeError::chain, |_| "done".to_owned());
        self.tell(format!("{what}: {how}"));
        ended
    }

    pub fn create(&mut self, at: usize) {
        let url = self.url(at);
        let size_bytes = SIZE + self.random.u64(..2) * 512;
        let options = CreateOptions {
            size_bytes,
            block_size_bytes: BLOCK as u32,
        };
        let of = (url.clone(), options);
        let what = format!("create {}", self.places[at].name);
        let created = self.verb(&what, |store| {
            Box::pin(async move { admin::create(&of.0, &store, &of.1).await })
        });
        if !matches!(created, Some(Ok(_))) {
            let store = Faults::none();
            while let Err(error) = self.whole(&what, admin::create(&url, &store, &options)) {
                match error {
                    VolumeError::AlreadyExists { .. } if created.is_none() => break,
                    VolumeError::Leftovers { .. } => {
                        let lease = self.lease();
                        self.whole(
                            "delete what is left",
                            admin::delete(&url, &store, &lease, IfDamaged::Refuse),
                        )
                        .unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
                    }
                    error => panic!("{what}: {}", error.chain()),
                }
            }
        }
        let policy = Policy {
            keep_last: 1,
            ..Policy::default()
        };
        let (store, policy) = (Faults::none(), policy);
        self.whole("keep the last one", set_policy(&url, &store, Some(&policy)))
            .unwrap();
        self.made(at, Line::known(vec![0; size_bytes as usize]));
    }

    /// There is a new volume, which its servers may use a log for.
    pub fn made(&mut self, at: usize, line: Line) {
        let journal = self.path(&format!("journal-{}", self.places[at].name));
        let wal = match self.random.u8(..4) {
            0 => None,
            1 => Some(WalPlace::At(Self::url_of(&journal))),
            _ => Some(WalPlace::Beside),
        };
        let place = &mut self.places[at];
        place.line = Some(line);
        place.names.clear();
        place.is_log_foreign = matches!(wal, Some(WalPlace::At(_))) && journal.exists();
        place.is_wal_open = false;
        place.wal = wal;
    }

    /// Copies another volume to a place, if there is one that can be copied.
    pub fn copy_to(&mut self, to: usize) -> bool {
        let others: Vec<_> = (0..self.places.len())
            .filter(|&other| {
                let place = &self.places[other];
                other != to && place.server.is_none() && place.line.is_some() && !self.is_sharing(other)
            })
            .collect();
        if others.is_empty() {
            return false;
        }
        let from = others[self.random.usize(..others.len())];
        let path = self.path(self.places[to].name);
        self.kill_stale(to);
        let _ = std::fs::remove_dir_all(&path);
        assert!(!path.exists(), "what was there cannot be removed");
        copy_dir(&self.path(self.places[from].name), &path);
        self.tell(format!("{} is copied", self.places[from].name));
        let (line, names) = (self.places[from].line.clone(), self.places[from].names.clone());
        let (url, lease, store) = (self.url(to), self.lease(), Faults::none());
        let mut line = line.unwrap();
        // The original's log is not the copy's to use up.
        if self.random.bool() {
            self.whole(
                "replay the log of the original",
                wal::replay(&url, &store, None, &lease, false),
            )
            .unwrap_or_else(|e| panic!("{}", e.chain()));
        } else if self
            .whole("discard the log of the copy", wal::discard(&url, &store, &lease))
            .unwrap()
        {
            line.wal_given_up();
        }
        let wal = self.random.bool().then_some(WalPlace::Beside);
        let place = &mut self.places[to];
        (place.line, place.names) = (Some(line), names);
        (place.wal, place.is_log_foreign, place.is_wal_open) = (wal, false, false);
        place.is_buffer_left = false;
        self.seen.copied += 1;
        true
    }

    pub fn back_up(&mut self, at: usize) {
        if self.places[at].parent.is_some() {
            return self.check_names(at);
        }
        let path = self.path("backup");
        let _ = std::fs::remove_dir_all(&path);
        copy_dir(&self.path(self.places[at].name), &path);
        let place = &self.places[at];
        self.backup = Some(Backup {
            of: at,
            wal: place.wal.clone(),
            line: place.line.clone().unwrap(),
            names: place.names.clone(),
            path,
        });
        self.tell(format!("{} is backed up", self.places[at].name));
    }

    /// A backup is put back, and the log goes on from a later checkpoint.
    pub fn restore_under_wal(&mut self, at: usize) {
        if self.places[at].wal.is_none() || self.is_sharing(at) {
            return self.restore(at);
        }
        self.back_up(at);
        for _ in 0..2 {
            self.open(at, true);
            self.change(at);
            if self.places[at].server.is_some() {
                self.flush_once(at);
            }
            match self.random.bool() {
                true => self.close(at),
                false if self.places[at].server.is_some() => self.kill(at),
                false => {}
            }
        }
        self.restore(at);
    }

    /// A backup is put back: all of it, or the container alone.
    pub fn restore(&mut self, at: usize) {
        if self.is_sharing(at) {
            return self.check_names(at);
        }
        let Some(backup) = self.backup.take_if(|backup| backup.of == at) else {
            return self.back_up(at);
        };
        self.kill_stale(at);
        let is_whole = self.random.bool();
        restore(&backup.path, &self.path(self.places[at].name), |name| {
            is_whole || !name.starts_with("volume.meta")
        });
        let place = &mut self.places[at];
        place.names = match is_whole {
            true => backup.names,
            false => {
                let is_there = |name: &String, contents: &Arc<Vec<u8>>| {
                    place
                        .names
                        .get(name)
                        .is_some_and(|now| Arc::ptr_eq(now, contents))
                };
                backup
                    .names
                    .into_iter()
                    .filter(|(name, contents)| is_there(name, contents))
                    .collect()
            }
        };
        if is_whole {
            place.wal = backup.wal;
        }
        let mut line = backup.line;
        if is_whole && place.wal == Some(WalPlace::Beside) {
            // It was put back with the volume.
            (place.line, place.replayed, place.is_log_foreign) = (Some(line), None, false);
        } else {
            // What was in the log alone then may have been published since, and the log emptied.
            line.wal_given_up();
            let before = place.line.replace(line);
            // The log goes on from where it was left, however often something else is put back meanwhile.
            let continued = place.replayed.take().or(before);
            place.replayed =
                continued.filter(|line| Some(line.container()) == place.line.as_ref().map(Line::container));
            place.is_log_foreign = true;
        }
        place.is_wal_open = true;
        place.is_buffer_left = false;
        self.seen.restored += 1;
        self.tell(format!(
            "{} is restored, as a whole: {is_whole}",
            self.places[at].name
        ));
    }

    /// Whether the newest state is in the container, and a log was closed.
    pub fn is_closed(&self, at: usize) -> bool {
        let place = &self.places[at];
        !place.is_wal_open && !place.is_buffer_left && place.line.as_ref().is_some_and(Line::is_published)
    }

    pub fn name(&mut self, at: usize) {
        if !self.is_closed(at) {
            return self.check_names(at);
        }
        self.count += 1;
        let name = format!("n{}", self.count);
        let (url, of) = (self.url(at), name.parse().unwrap());
        let named = self.verb(&format!("name {} {name}", self.places[at].name), |store| {
            Box::pin(async move { past::create(&url, &store, &of, None).await })
        });
        let place = &mut self.places[at];
        let contents = place.line.as_ref().unwrap().newest();
        match named {
            None => {}
            Some(Ok(_)) => {
                place.names.insert(name, contents.clone());
            }
            // A volume that was made and not written has no checkpoint.
            Some(Err(VolumeError::NoCheckpoint { .. })) if contents.iter().all(|&byte| byte == 0) => {}
            Some(Err(error)) => panic!("{}", error.chain()),
        }
    }

    pub fn roll_back(&mut self, at: usize) {
        let names: Vec<_> = self.places[at].names.clone().into_iter().collect();
        if !self.is_closed(at) || names.is_empty() {
            return self.check_names(at);
        }
        let (name, contents) = names[self.random.usize(..names.len())].clone();
        let to: At = format!("@{name}").parse().unwrap();
        let (url, lease) = (self.url(at), self.lease());
        let rolled_back = self.verb(
            &format!("roll {} back to {name}", self.places[at].name),
            |store| Box::pin(async move { rollback::rollback(&url, &store, &to, &lease).await }),
        );
        if let Some(Err(error)) = &rolled_back {
            panic!("{}", error.chain());
        }
        let line = self.places[at].line.as_mut().unwrap();
        line.changed(|now| now.clone_from(&contents));
        if rolled_back.is_some() {
            line.published();
            self.seen.rolled_back += 1;
        }
    }

    pub fn resize(&mut self, at: usize) {
        if !self.is_closed(at) {
            return;
        }
        let before = self.places[at].line.as_ref().unwrap().size_bytes();
        let blocks = before as u64 / BLOCK;
        let size = (blocks + self.random.u64(0..8)) * BLOCK + self.random.u64(1..=8) * 512;
        let is_shrinking = size < before as u64;
        let (url, lease) = (self.url(at), self.lease());
        let resized = self.verb(&format!("resize {} to {size}", self.places[at].name), |store| {
            Box::pin(async move { admin::resize(&url, &store, size, is_shrinking, &lease).await })
        });
        if let Some(Err(error)) = &resized {
            panic!("{}", error.chain());
        }
        let line = self.places[at].line.as_mut().unwrap();
        line.changed(|now| now.resize(size as usize, 0));
        if resized.is_some() {
            line.published();
        }
    }

    /// Removes what is not kept, of a volume that has something of the kind or not.
    pub fn prune(&mut self, at: usize) {
        if self.random.bool() {
            self.open(at, true);
            self.publish_often(at);
            self.close(at);
        }
        if !self.is_closed(at) {
            return self.check_names(at);
        }
        let (url, lease) = (self.url(at), self.lease());
        let pruned = self.verb(&format!("prune {}", self.places[at].name), |store| {
            Box::pin(async move { prune(&url, &store, &lease).await })
        });
        if let Some(pruned) = pruned {
            let removed = pruned.unwrap_or_else(|e| panic!("{}", e.chain()));
            self.seen.removed += removed.objects as u32;
        }
        self.check_names(at);
    }

    /// Copies what is live out of objects that are mostly dead.
    pub fn compact(&mut self, at: usize) {
        if !self.is_closed(at) {
            return self.check_names(at);
        }
        let (url, lease) = (self.url(at), self.lease());
        let compacted = self.verb(&format!("compact {}", self.places[at].name), |store| {
            Box::pin(async move { compact(&url, &store, &lease, &Control::default()).await })
        });
        if let Some(compacted) = compacted {
            compacted.unwrap_or_else(|e| panic!("{}", e.chain()));
            self.seen.compacted += 1;
        }
        self.check_names(at);
    }

    /// Deletes the volume; a deletion that was killed is taken up again, or the volume is served once more if it is still one.
    pub fn delete(&mut self, at: usize) {
        let (url, lease) = (self.url(at), self.lease());
        let what = format!("delete {}", self.places[at].name);
        let of = (url.clone(), lease.clone());
        let deleted = self.verb(&what, |store| {
            Box::pin(async move { admin::delete(&of.0, &store, &of.1, IfDamaged::Refuse).await })
        });
        match deleted {
            Some(deleted) => {
                deleted.unwrap_or_else(|e| panic!("{what}: {}", e.chain()));
                self.seen.deleted += 1;
            }
            None => {
                self.seen.deletions_ended += 1;
                let is_there = self
                    .whole("look at it", admin::info(&url, &Faults::none()))
                    .is_ok();
                if is_there && self.random.bool() {
                    return self.open(at, true);
                }
                match self.random.bool() {
                    // `create` meets what is left.
                    true if !is_there => {}
                    _ => match self.whole(
                        &what,
                        admin::delete(&url, &Faults::none(), &lease, IfDamaged::Refuse),
                    ) {
                        Ok(_) => self.seen.deleted += 1,
                        Err(error) => {
                            assert!(error.kind() == ErrorKind::NotFound, "{what}: {}", error.chain())
                        }
                    },
                }
            }
        }
        let place = &mut self.places[at];
        (place.line, place.is_log_foreign) = (None, false);
        (place.is_buffer_left, place.replayed) = (false, None);
        place.parent = None;
        place.names.clear();
        // What is made here next is another volume, and a backup of this one would be a copy there.
        self.backup.take_if(|backup| backup.of == at);
    }
}
