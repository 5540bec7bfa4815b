//! What happens in a history.

use hypernbd_volume::{VolumeError, WalPlace};

use super::faults::Faults;
use super::verbs::BLOCK;
use super::world::{Server, World};
use crate::fixture::pattern;

/// Lets the request go on that stands still, also after a panic: its runtime would wait for it for ever.
struct Released<'a>(&'a Faults);

impl Drop for Released<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl World {
    /// Something happens.
    pub fn event(&mut self) {
        let at = self.random.usize(..self.places.len());
        let place = &self.places[at];
        match (&place.line, &place.server) {
            (None, _) => match self.random.u8(..8) {
                0 | 1 if self.copy_to(at) => {}
                2..6 if self.clone_to(at) => {}
                _ => self.create(at),
            },
            (Some(_), Some(_)) => match self.random.u8(..13) {
                0..4 => self.change(at),
                4..6 => self.flush(at),
                6 => self.publish_often(at),
                7 => self.close(at),
                8 => self.kill(at),
                9 => self.end_in_a_flush(at),
                10 => match self.random.bool() {
                    true => self.take_over(at),
                    false => self.take_over_in_a_flush(at),
                },
                11 => self.grow(at),
                _ => self.read(at),
            },
            // That is rare otherwise.
            (Some(_), None) if self.has_clones(at) && self.random.u8(..3) == 0 => self.refuse_to_delete(at),
            (Some(_), None) if !place.names.is_empty() && self.random.u8(..4) == 0 => self.roll_back(at),
            (Some(_), None) if place.parent.is_some() && self.random.u8(..3) == 0 => self.flatten(at),
            (Some(_), None) => match self.random.u8(..22) {
                0..5 => self.open(at, false),
                5 => self.open(at, true),
                6 => self.back_up(at),
                7 => self.restore(at),
                8 => self.restore_under_wal(at),
                9..12 => self.name(at),
                12 | 13 => self.roll_back(at),
                14 => self.resize(at),
                15 | 16 => self.prune(at),
                17 | 18 => self.compact(at),
                19 | 20 => self.flatten(at),
                _ if self.has_clones(at) => self.refuse_to_delete(at),
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

    pub fn server(&self, at: usize) -> &Server {
        self.places[at].server.as_ref().unwrap()
    }

    /// In one of four cases one of its server's next requests fails.
    fn arm_sometimes(&mut self, at: usize) {
        if self.random.u8(..4) == 0
            && let Some(server) = &self.places[at].server
        {
            server.faults.arm(&mut self.random, 6);
        }
    }

    /// Writes, zeroes or trims once; in one of four cases with a fault on the way.
    pub fn change(&mut self, at: usize) {
        self.arm_sometimes(at);
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
        let has_wal = self.server(at).has_wal;
        let line = self.places[at].line.as_mut().unwrap();
        // One that failed may have been made all the same.
        line.changed(|contents| contents[offset as usize..][..len as usize].copy_from_slice(&bytes));
        match changed {
            Ok(()) if fua => line.flushed(has_wal),
            Ok(()) => {}
            Err(_) => {
                self.kill(at);
                self.places[at].is_buffer_left = false;
            }
        }
    }

    fn flush(&mut self, at: usize) {
        self.arm_sometimes(at);
        self.flush_once(at);
    }

    /// Flushes; a server that fails does not go on.
    pub fn flush_once(&mut self, at: usize) {
        let server = self.server(at);
        let (flushed, has_wal) = (server.volume.flush(), server.has_wal);
        self.tell(format!("{}: flush: {flushed:?}", self.places[at].name));
        match flushed {
            Ok(()) => self.places[at].line.as_mut().unwrap().flushed(has_wal),
            Err(_) => self.kill(at),
        }
    }

    /// Publishes more than is always kept.
    pub fn publish_often(&mut self, at: usize) {
        for _ in 0..20 {
            if self.server(at).volume.flush().is_err() {
                return self.kill(at);
            }
            let has_wal = self.server(at).has_wal;
            self.places[at].line.as_mut().unwrap().flushed(has_wal);
            self.change(at);
            if self.places[at].server.is_none() {
                return;
            }
        }
    }

    /// Makes the volume larger while it is served, with everything published: in one of four cases with a fault on the way.
    fn grow(&mut self, at: usize) {
        let size = self.server(at).volume.size_bytes();
        if !size.is_multiple_of(BLOCK) {
            return self.read(at);
        }
        if self.server(at).volume.publish().is_err() {
            return self.kill(at);
        }
        self.places[at].line.as_mut().unwrap().published();
        self.arm_sometimes(at);
        let larger = size + self.random.u64(1..8) * BLOCK;
        let grown = self.server(at).volume.grow(larger);
        self.tell(format!(
            "{}: {size} grows to {larger}: {grown:?}",
            self.places[at].name
        ));
        let line = self.places[at].line.as_mut().unwrap();
        line.changed(|contents| contents.resize(larger as usize, 0));
        if grown.is_err() {
            // It may have been made all the same.
            self.kill(at);
            self.places[at].is_buffer_left = false;
            return;
        }
        line.published();
        self.seen.grown += 1;
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

    pub fn kill(&mut self, at: usize) {
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
        let Some(old) = self.about_to_be_taken_over(at) else {
            return;
        };
        if self.random.bool() {
            old.faults.arm(&mut self.random, 6);
        }
        let (flushed, started) = std::thread::scope(|scope| {
            let flush = scope.spawn(|| old.volume.flush());
            let started = self.start(at, true);
            (flush.join().unwrap(), started)
        });
        self.flushed_before(at, &flushed, old.has_wal);
        self.adopt(at, started);
        self.taken_over(at, old);
    }

    /// Another server takes the volume over and publishes, while a request of this one's flush stands still.
    fn take_over_in_a_flush(&mut self, at: usize) {
        let Some(old) = self.about_to_be_taken_over(at) else {
            return;
        };
        old.faults.hold(&mut self.random, self.count % 6);
        let released = Released(&old.faults);
        let before = self.places[at].line.as_ref().unwrap().newest().clone();
        std::thread::scope(|scope| {
            let flush = scope.spawn(|| old.volume.flush());
            old.faults.wait_for_held(|| flush.is_finished());
            let started = self.start(at, true);
            if flush.is_finished() {
                self.seen.held_up += u32::from(old.faults.is_held());
                self.flushed_before(at, &flush.join().unwrap(), old.has_wal);
                self.adopt(at, started);
                return;
            }
            self.adopt(at, started);
            let is_found = *self.places[at].line.as_ref().unwrap().newest() == before;
            self.change(at);
            if self.places[at].server.is_some() {
                self.flush_once(at);
            }
            old.faults.release();
            let flushed = flush.join().unwrap();
            self.tell(format!("{}: held up, {flushed:?}", self.places[at].name));
            assert!(
                flushed.is_err() || is_found,
                "acknowledged, and the new owner does not have it"
            );
            self.seen.held_up += 1;
        });
        drop(released);
        self.taken_over(at, old);
        if self.places[at].server.is_some() {
            self.read(at);
        }
    }

    /// The server of a place that another is to take over, with something to flush; none where that cannot be.
    fn about_to_be_taken_over(&mut self, at: usize) -> Option<Server> {
        // On one machine the journal's lock stays with a server that lives.
        if self.server(at).has_wal && self.places[at].wal != Some(WalPlace::Beside) {
            self.kill(at);
            return None;
        }
        self.change(at);
        let old = self.places[at].server.take()?;
        self.places[at].is_taken_over = old.has_buffer_file;
        Some(old)
    }

    /// The older owner's flush ended this way, before it was looked what the new one reads.
    fn flushed_before(&mut self, at: usize, flushed: &Result<(), VolumeError>, is_logged: bool) {
        self.tell(format!(
            "{}: flush of the older owner: {flushed:?}",
            self.places[at].name
        ));
        if flushed.is_ok() {
            self.places[at].line.as_mut().unwrap().flushed(is_logged);
        }
    }

    fn taken_over(&mut self, at: usize, old: Server) {
        self.places[at].is_taken_over = false;
        self.seen.takeovers += 1;
        self.seen.takeovers_with_log += u32::from(old.has_wal);
        self.stale.push((at, old));
    }

    pub fn kill_stale(&mut self, at: usize) {
        let (of_it, others): (Vec<_>, Vec<_>) = std::mem::take(&mut self.stale)
            .into_iter()
            .partition(|(of, _)| *of == at);
        self.stale = others;
        for (_, server) in of_it {
            server.kill();
        }
    }
}
