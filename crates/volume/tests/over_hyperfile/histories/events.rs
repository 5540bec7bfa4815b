//! What happens in a history.

use std::sync::Arc;

use futures::future::LocalBoxFuture;
use hypernbd_volume::admin::retention::{prune, set_policy};
use hypernbd_volume::admin::{self, CreateOptions, IfDamaged, rollback, wal};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::{self, At};
use hypernbd_volume::retention::Policy;
use hypernbd_volume::{ErrorKind, VolumeError};

use super::faults::Faults;
use super::line::Line;
use super::world::{Backup, LIMIT, Server, World, runtime};
use crate::fixture::pattern;
use crate::provenance::{copy_dir, restore};

const BLOCK: u64 = 4096;
/// With a short last block.
const SIZE: u64 = 64 * BLOCK + 512;
/// More requests than a verb makes, mostly.
const REQUESTS: u32 = 40;

impl World {
    /// Something happens.
    pub fn event(&mut self) {
        let at = self.random.usize(..self.places.len());
        let place = &self.places[at];
        match (&place.line, &place.server) {
            (None, _) => match self.random.u8(..3) {
                0 if self.copy_from(1 - at) => {}
                _ => self.create(at),
            },
            (Some(_), Some(_)) => match self.random.u8(..12) {
                0..4 => self.change(at),
                4..6 => self.flush(at),
                6 => self.publish_often(at),
                7 => self.close(at),
                8 => self.kill(at),
                9 => self.end_in_a_flush(at),
                10 => self.take_over(at),
                _ => self.read(at),
            },
            (Some(_), None) => match self.random.u8(..18) {
                0..5 => self.open(at, false),
                5 => self.open(at, true),
                6 => self.back_up(at),
                7 => self.restore(at),
                8 => self.restore_under_log(at),
                9..12 => self.name(at),
                12 | 13 => self.roll_back(at),
                14 => self.resize(at),
                15 | 16 => self.prune(at),
                _ => self.delete(at),
            },
        }
        if !self.stale.is_empty() && self.random.u8(..3) == 0 {
            let (at, server) = self.stale.pop().unwrap();
            self.assert_shut_out(&server, self.places[at].name);
            match self.random.bool() {
                true => self.stale.push((at, server)),
                false => server.kill(),
            }
        }
    }

    /// Runs a verb, which may be killed in the middle: `None` then.
    fn verb<R>(
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
    fn whole<R>(
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

    fn create(&mut self, at: usize) {
        let url = self.url(at);
        let options = CreateOptions {
            size_bytes: SIZE,
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
        let journal = self.path(&format!("journal-{}", self.places[at].name));
        let has_log = self.random.bool();
        let place = &mut self.places[at];
        place.line = Some(Line::known(vec![0; SIZE as usize]));
        place.names.clear();
        place.is_log_foreign = has_log && journal.exists();
        place.is_log_open = false;
        place.journal = has_log.then(|| Self::url_of(&journal));
    }

    /// Copies the volume at a place to the other, if it can be.
    fn copy_from(&mut self, from: usize) -> bool {
        if self.places[from].server.is_some() || self.places[from].line.is_none() {
            return false;
        }
        let to = 1 - from;
        let path = self.path(self.places[to].name);
        let _ = std::fs::remove_dir_all(&path);
        self.kill_stale(to);
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
            line.log_given_up();
        }
        let place = &mut self.places[to];
        (place.line, place.names) = (Some(line), names);
        (place.journal, place.is_log_foreign, place.is_log_open) = (None, false, false);
        place.is_buffer_left = false;
        self.seen.copied += 1;
        true
    }

    fn server(&self, at: usize) -> &Server {
        self.places[at].server.as_ref().unwrap()
    }

    /// Writes, zeroes or trims once; in one of four cases with a fault on the way.
    fn change(&mut self, at: usize) {
        if self.random.u8(..4) == 0 {
            self.places[at]
                .server
                .as_ref()
                .unwrap()
                .faults
                .arm(&mut self.random, 6);
        }
        let size = self.server(at).volume.size_bytes();
        let kind = self.random.u8(..6);
        let (offset, len) = match kind {
            // Of trims and zeroes whole blocks, and of writes anything.
            0 | 1 => {
                let (start, end) = (self.random.u64(..size / BLOCK), self.random.u64(..=size / BLOCK));
                (start.min(end) * BLOCK, start.abs_diff(end) * BLOCK)
            }
            _ => {
                let offset = self.random.u64(..size / 512) * 512;
                (offset, (self.random.u64(1..=64) * 512).min(size - offset))
            }
        };
        if len == 0 {
            return;
        }
        self.count += 1;
        let fua = self.random.u8(..4) == 0;
        let bytes = match kind {
            0 | 1 => vec![0; len as usize],
            _ => pattern(u64::from(self.count), len as usize),
        };
        let volume = self.server(at).volume.clone();
        let changed = match kind {
            0 => volume.trim(offset, len, fua),
            1 => volume.zero(offset, len, fua),
            _ => volume.write(offset, &bytes, fua),
        };
        drop(volume);
        self.tell(format!(
            "{}: {len} bytes at {offset}, kind {kind}, fua {fua}: {changed:?}",
            self.places[at].name
        ));
        let has_log = self.server(at).has_log;
        let line = self.places[at].line.as_mut().unwrap();
        // One that failed may have been made all the same.
        line.changed(|contents| contents[offset as usize..][..len as usize].copy_from_slice(&bytes));
        match changed {
            Ok(()) if fua => line.flushed(has_log),
            Ok(()) => {}
            Err(_) => {
                self.kill(at);
                self.places[at].is_buffer_left = false;
            }
        }
    }

    fn flush(&mut self, at: usize) {
        if self.random.u8(..4) == 0 {
            self.places[at]
                .server
                .as_ref()
                .unwrap()
                .faults
                .arm(&mut self.random, 6);
        }
        self.flush_once(at);
    }

    /// Flushes; a server that fails does not go on.
    fn flush_once(&mut self, at: usize) {
        let server = self.server(at);
        let (flushed, has_log) = (server.volume.flush(), server.has_log);
        self.tell(format!("{}: flush: {flushed:?}", self.places[at].name));
        match flushed {
            Ok(()) => self.places[at].line.as_mut().unwrap().flushed(has_log),
            Err(_) => self.kill(at),
        }
    }

    /// Publishes more than is always kept.
    fn publish_often(&mut self, at: usize) {
        for _ in 0..20 {
            if self.server(at).volume.flush().is_err() {
                return self.kill(at);
            }
            let has_log = self.server(at).has_log;
            self.places[at].line.as_mut().unwrap().flushed(has_log);
            self.change(at);
            if self.places[at].server.is_none() {
                return;
            }
        }
    }

    fn read(&mut self, at: usize) {
        let server = self.server(at);
        server.faults.disarm();
        let found = self.contents(server);
        assert!(
            found == **self.places[at].line.as_ref().unwrap().newest(),
            "{} does not read as it was written",
            self.places[at].name
        );
    }

    fn kill(&mut self, at: usize) {
        let server = self.places[at].server.take().unwrap();
        self.places[at].is_buffer_left = server.has_buffer_file;
        server.kill();
        self.tell(format!("{}: its server is killed", self.places[at].name));
        self.seen.killed += 1;
    }

    /// The server is killed in the middle of a flush, if there are as many requests.
    fn end_in_a_flush(&mut self, at: usize) {
        self.change(at);
        if self.places[at].server.is_none() {
            return;
        }
        let (requests, is_carried_out) = (self.random.u32(..8), self.random.bool());
        self.server(at).faults.end_after(requests, is_carried_out);
        self.flush_once(at);
        if self.places[at].server.is_some() {
            self.kill(at);
        }
    }

    /// Another server takes the volume over, while this one flushes and goes on afterwards.
    fn take_over(&mut self, at: usize) {
        // On one machine the journal's lock stays with a server that lives.
        if self.server(at).has_log {
            return self.kill(at);
        }
        self.change(at);
        let Some(old) = self.places[at].server.take() else {
            return;
        };
        if self.random.bool() {
            old.faults.arm(&mut self.random, 6);
        }
        self.places[at].is_taken_over = old.has_buffer_file;
        let (flushed, started) = std::thread::scope(|scope| {
            let flush = scope.spawn(|| old.volume.flush());
            let started = self.start(at, true);
            (flush.join().unwrap(), started)
        });
        self.places[at].is_taken_over = false;
        self.tell(format!(
            "{}: flush of the older owner: {flushed:?}",
            self.places[at].name
        ));
        if flushed.is_ok() {
            self.places[at].line.as_mut().unwrap().flushed(false);
        }
        self.adopt(at, started);
        self.stale.push((at, old));
        self.seen.takeovers += 1;
    }

    fn kill_stale(&mut self, at: usize) {
        let (of_it, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.stale)
            .into_iter()
            .partition(|(of, _)| *of == at);
        self.stale = others;
        for (_, server) in of_it {
            server.kill();
        }
    }

    fn back_up(&mut self, at: usize) {
        let path = self.path("backup");
        let _ = std::fs::remove_dir_all(&path);
        copy_dir(&self.path(self.places[at].name), &path);
        let place = &self.places[at];
        self.backup = Some(Backup {
            of: at,
            line: place.line.clone().unwrap(),
            names: place.names.clone(),
            path,
        });
        self.tell(format!("{} is backed up", self.places[at].name));
    }

    /// A backup is put back, and the log goes on from a later checkpoint.
    fn restore_under_log(&mut self, at: usize) {
        if self.places[at].journal.is_none() {
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
    fn restore(&mut self, at: usize) {
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
        let mut line = backup.line;
        // What was in the log alone then may have been published since, and the log emptied.
        line.log_given_up();
        let before = place.line.replace(line);
        place.replayed =
            before.filter(|before| Some(before.container()) == place.line.as_ref().map(Line::container));
        (place.is_log_foreign, place.is_log_open) = (true, true);
        place.is_buffer_left = false;
        self.seen.restored += 1;
        self.tell(format!(
            "{} is restored, as a whole: {is_whole}",
            self.places[at].name
        ));
    }

    /// Whether the newest state is in the container, and a log was closed.
    fn is_closed(&self, at: usize) -> bool {
        let place = &self.places[at];
        !place.is_log_open && !place.is_buffer_left && place.line.as_ref().is_some_and(Line::is_published)
    }

    fn name(&mut self, at: usize) {
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

    fn roll_back(&mut self, at: usize) {
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

    fn resize(&mut self, at: usize) {
        if !self.is_closed(at) {
            return;
        }
        let before = self.places[at].line.as_ref().unwrap().size_bytes();
        let blocks = before as u64 / BLOCK;
        let size = (blocks + self.random.u64(0..8)) * BLOCK + self.random.u64(1..8) * 512;
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
    fn prune(&mut self, at: usize) {
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

    /// Deletes the volume; a deletion that was killed is taken up again, or the volume is served once more if it is still one.
    fn delete(&mut self, at: usize) {
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
        place.names.clear();
    }
}
