//! The volumes of a history, their servers, and what is known of both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypernbd_volume::base::control::Control;
use hypernbd_volume::check::{self, Kind, Problem, Request};
use hypernbd_volume::options::{
    Compaction, LeaseOptions, NodeCacheConfig, NodeCacheStrategy, ReadCacheConfig, ReadCacheDisk,
    VolumeOptions,
};
use hypernbd_volume::past::Past;
use hypernbd_volume::{ErrorKind, Volume, VolumeError, VolumeUrl, WalPlace};
use tokio::runtime::Runtime;

use super::faults::Faults;
use super::line::{Contents, Line, Since};

const MIB: u64 = 1 << 20;
/// Longer than anything takes.
pub const LIMIT: Duration = Duration::from_secs(60);
/// How long a request of a server tries: one fault is survived, and an end is noticed soon.
const IO_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a server may take to start, with what an earlier one left.
const START_LIMIT: Duration = Duration::from_secs(300);

/// What happened.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen {
    pub opened: u32,
    pub logged_beside: u32,
    pub killed: u32,
    pub faults_met: u32,
    pub takeovers: u32,
    pub takeovers_with_log: u32,
    pub refused_after_takeover: u32,
    pub deleted: u32,
    pub deletions_ended: u32,
    pub copied: u32,
    pub restored: u32,
    pub logs_refused: u32,
    pub rolled_back: u32,
    pub names_read: u32,
    pub removed: u32,
    pub held_up: u32,
    pub compacted: u32,
    pub cloned: u32,
    pub flattened: u32,
    pub deletions_refused: u32,
    pub grown: u32,
}

impl Seen {
    fn all(&mut self) -> [(&'static str, &mut u32); 21] {
        [
            ("opened", &mut self.opened),
            (
                "opened with a log beside the volume that may have records",
                &mut self.logged_beside,
            ),
            ("killed", &mut self.killed),
            ("faults met", &mut self.faults_met),
            ("takeovers", &mut self.takeovers),
            ("takeovers of a server with a log", &mut self.takeovers_with_log),
            ("refused after a takeover", &mut self.refused_after_takeover),
            ("deleted", &mut self.deleted),
            ("deletions that ended early", &mut self.deletions_ended),
            ("copied", &mut self.copied),
            ("restored", &mut self.restored),
            ("logs refused", &mut self.logs_refused),
            ("rolled back", &mut self.rolled_back),
            ("names read", &mut self.names_read),
            ("objects removed", &mut self.removed),
            ("flushes held up over a takeover", &mut self.held_up),
            ("compacted", &mut self.compacted),
            ("cloned", &mut self.cloned),
            ("flattened", &mut self.flattened),
            ("deletions refused", &mut self.deletions_refused),
            ("grown", &mut self.grown),
        ]
    }

    pub fn add(&mut self, other: &Self) {
        let mut other = *other;
        for ((_, sum), (_, more)) in self.all().into_iter().zip(other.all()) {
            *sum += *more;
        }
    }

    pub fn has_everything(mut self) -> bool {
        self.all().into_iter().all(|(_, times)| *times > 0)
    }

    pub fn assert_everything(mut self) {
        for (what, times) in self.all() {
            assert!(*times > 0, "never: {what}");
        }
    }
}

/// A server in this process, with a runtime of its own: that ends with it.
pub struct Server {
    pub volume: Arc<Volume>,
    pub faults: Arc<Faults>,
    pub has_wal: bool,
    pub has_buffer_file: bool,
    runtime: Runtime,
}

impl Server {
    /// Ends it, as if it were killed, and waits until nothing of it runs any more.
    pub fn kill(self) {
        drop(self.volume);
        self.runtime.shutdown_timeout(LIMIT);
    }
}

/// What may be at a URL.
pub struct Place {
    pub name: &'static str,
    /// What the volume may read as; none when there is no volume.
    pub line: Option<Line>,
    pub server: Option<Server>,
    /// The place of the volume that this one, a clone, shares objects of.
    pub parent: Option<usize>,
    /// What has a name, and how it reads.
    pub names: BTreeMap<String, Contents>,
    /// The log that its servers use: a journal, or one beside the volume.
    pub wal: Option<WalPlace>,
    /// As `line`, should the log be replayed over a container that was put back to where that log begins.
    pub replayed: Option<Line>,
    /// Whether the log may be that of another history.
    pub is_log_foreign: bool,
    /// Whether the log may hold what is not published.
    pub is_wal_open: bool,
    /// Whether the last server, which was killed, left everything that it answered in its write buffer's file.
    pub is_buffer_left: bool,
    /// Whether a server is being taken over that uses the write buffer's file.
    pub is_taken_over: bool,
}

/// A backup of a place.
pub struct Backup {
    pub of: usize,
    pub wal: Option<WalPlace>,
    pub line: Line,
    pub names: BTreeMap<String, Contents>,
    pub path: PathBuf,
}

pub struct World {
    pub random: fastrand::Rng,
    pub dir: tempfile::TempDir,
    pub places: Vec<Place>,
    /// Servers of volumes that were taken over, and the place where those are.
    pub stale: Vec<(usize, Server)>,
    pub backup: Option<Backup>,
    pub seen: Seen,
    /// Numbers for what is written and named.
    pub count: u32,
    /// Told when something fails.
    story: Vec<String>,
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.story.join("\n"));
        }
    }
}

pub fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
}

impl World {
    pub fn new(seed: u64) -> Self {
        let place = |name| Place {
            name,
            line: None,
            server: None,
            parent: None,
            names: BTreeMap::new(),
            wal: None,
            replayed: None,
            is_log_foreign: false,
            is_wal_open: false,
            is_buffer_left: false,
            is_taken_over: false,
        };
        Self {
            random: fastrand::Rng::with_seed(seed),
            dir: tempfile::tempdir().unwrap(),
            places: vec![place("one"), place("two"), place("three")],
            stale: Vec::new(),
            backup: None,
            seen: Seen::default(),
            count: 0,
            story: Vec::new(),
        }
    }

    pub fn tell(&mut self, what: String) {
        self.story.push(what);
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn url_of(path: &Path) -> VolumeUrl {
        VolumeUrl::parse(&format!("file://{}/", path.display())).unwrap()
    }

    pub fn url(&self, at: usize) -> VolumeUrl {
        Self::url_of(&self.path(self.places[at].name))
    }

    pub fn lease(&self) -> LeaseOptions {
        LeaseOptions {
            takeover: true,
            ..LeaseOptions::default()
        }
    }

    fn options(
        &mut self,
        at: usize,
        takeover: bool,
        discard_wal: bool,
        has_buffer_file: bool,
    ) -> VolumeOptions {
        let (is_removing, has_caches) = (self.random.bool(), self.random.u8(..3) > 0);
        let buffer = self.path(&format!("buffer-{}", self.places[at].name));
        // A log beside the volume is found by who asks for none, too.
        let asks = self.random.u8(..4) > 0;
        let wal = self.places[at].wal.clone();
        VolumeOptions {
            wal: wal.filter(|wal| asks || *wal != WalPlace::Beside),
            discard_wal,
            write_buffer_bytes: 8 * MIB,
            write_buffer_dir: has_buffer_file.then_some(buffer),
            io_timeout: IO_TIMEOUT,
            // Nothing is published unless it is asked for.
            checkpoint_interval: Duration::from_secs(3600),
            node_cache: has_caches.then(|| NodeCacheConfig {
                path: self.path("nodes"),
                size_bytes: 32 * MIB,
                strategy: NodeCacheStrategy::ReuseCache,
            }),
            read_cache: ReadCacheConfig {
                // Little, so that what is read goes to the disk.
                memory_bytes: MIB / 8,
                disk: has_caches.then(|| ReadCacheDisk {
                    dir: self.path("pages"),
                    size_bytes: 64 * MIB,
                }),
            },
            lease: LeaseOptions {
                takeover,
                ..LeaseOptions::default()
            },
            compaction: match self.random.bool() {
                true => Compaction::Auto,
                false => Compaction::Off,
            },
            // Never, or as often and as early as can be.
            retention_interval: is_removing.then_some(Duration::from_millis(20)),
            retention_grace: Duration::ZERO,
            ..VolumeOptions::default()
        }
    }

    /// Starts a server, past what may be in its way, and looks that the volume reads as it may.
    pub fn open(&mut self, at: usize, takeover: bool) {
        let server = self.start(at, takeover);
        self.adopt(at, server);
    }

    /// Starts a server of a volume that is there; and from when on its contents are right.
    pub fn start(&mut self, at: usize, takeover: bool) -> (Server, Since) {
        let url = self.url(at);
        let mut since = Since::Flushed;
        let mut takeover = takeover;
        // A file in use stays with the server that lives.
        let is_in_use = self.stale.iter().any(|(of, _)| *of == at) || self.places[at].is_taken_over;
        let has_buffer_file = self.places[at].is_buffer_left || !is_in_use && self.random.bool();
        let began = Instant::now();
        let mut is_faulty = self.random.u8(..3) == 0;
        loop {
            assert!(
                began.elapsed() < START_LIMIT,
                "{}: no server starts",
                self.places[at].name
            );
            let faults = Arc::<Faults>::default();
            if is_faulty {
                faults.arm(&mut self.random, 20);
            }
            let options = self.options(at, takeover, since == Since::Published, has_buffer_file);
            let was_open = self.places[at].is_wal_open;
            self.places[at].is_wal_open |= options.wal.is_some();
            let runtime = runtime();
            let opened = runtime.block_on(Volume::open(&url, &faults.options(), &options));
            faults.disarm();
            self.seen.faults_met += faults.met();
            let error = match opened {
                Ok(volume) => {
                    self.seen.opened += 1;
                    let is_beside = self.places[at].wal == Some(WalPlace::Beside);
                    self.seen.logged_beside += u32::from(was_open && is_beside);
                    let has_wal = options.wal.is_some();
                    self.tell(format!(
                        "{} is served, log: {has_wal}, buffer file: {has_buffer_file}",
                        self.places[at].name
                    ));
                    let server = Server {
                        volume,
                        faults,
                        has_wal,
                        has_buffer_file,
                        runtime,
                    };
                    return (server, since);
                }
                Err(error) => error,
            };
            runtime.shutdown_timeout(LIMIT);
            self.tell(format!(
                "{} is not served: {}",
                self.places[at].name,
                error.chain()
            ));
            match error {
                _ if is_faulty => is_faulty = false,
                VolumeError::Held { .. } if !takeover => takeover = true,
                VolumeError::Timeout { .. } => {}
                VolumeError::Wal { .. } if self.places[at].is_log_foreign && since == Since::Flushed => {
                    self.seen.logs_refused += 1;
                    since = Since::Published;
                }
                error => panic!("{}: {}", self.places[at].name, error.chain()),
            }
        }
    }

    /// Looks at what a server that was just started reads, and lets it serve.
    pub fn adopt(&mut self, at: usize, (server, since): (Server, Since)) {
        let found = self.contents(&server);
        let place = &mut self.places[at];
        let since = match std::mem::take(&mut place.is_buffer_left) {
            true => Since::Answered,
            false => since,
        };
        let line = place.line.as_mut().expect("there is no volume");
        let replayed = place.replayed.take().filter(|_| since == Since::Flushed);
        if let Some(mut replayed) = replayed
            && replayed.found(found.clone(), since).is_ok()
        {
            *line = replayed;
        }
        if let Err(wrong) = line.found(found, since) {
            panic!("{} reads as {wrong}", place.name);
        }
        place.is_log_foreign = false;
        place.server = Some(server);
    }

    pub fn contents(&self, server: &Server) -> Vec<u8> {
        let mut out = vec![0xEE; server.volume.size_bytes() as usize];
        let began = Instant::now();
        // Servers here give up soon, and the machine may be slow.
        while let Err(error) = server.volume.read(0, &mut out) {
            let is_slow = error.kind() == ErrorKind::Timeout && began.elapsed() < LIMIT;
            assert!(is_slow, "{}", error.chain());
        }
        out
    }

    /// Looks that everything that has a name reads as it must.
    pub fn check_names(&mut self, at: usize) {
        let url = self.url(at);
        let names: Vec<_> = self.places[at].names.clone().into_iter().collect();
        for (name, want) in names {
            let runtime = runtime();
            let options = VolumeOptions {
                read_only: true,
                ..VolumeOptions::default()
            };
            let what: Past = format!("@{name}").parse().unwrap();
            let store = Faults::none();
            let past = Volume::open_past(&url, &store, &options, &what);
            let past = runtime
                .block_on(past)
                .unwrap_or_else(|e| panic!("{}@{name}: {}", self.places[at].name, e.chain()));
            let mut out = vec![0xEE; past.size_bytes() as usize];
            past.read(0, &mut out).unwrap();
            assert!(
                out == *want,
                "{}@{name} reads as something else",
                self.places[at].name
            );
            past.close(LIMIT).unwrap();
            drop(past);
            runtime.shutdown_timeout(LIMIT);
            self.seen.names_read += 1;
        }
    }

    /// A server that was taken over must not acknowledge anything more.
    pub fn assert_shut_out(&mut self, server: &Server, name: &str) {
        let write = server.volume.write(0, &[0xBB; 4096], false);
        let flushed = write.and_then(|()| server.volume.flush());
        let error = flushed.expect_err("acknowledged after the takeover");
        self.tell(format!("the older owner of {name}: {}", error.chain()));
        assert!(
            matches!(
                error.kind(),
                ErrorKind::Fenced | ErrorKind::Timeout | ErrorKind::Store | ErrorKind::NotFound
            ),
            "{}",
            error.chain()
        );
        self.seen.refused_after_takeover += 1;
    }

    /// Everything is served once more, without a fault, and ended well.
    pub fn end(&mut self) {
        for (at, server) in std::mem::take(&mut self.stale) {
            self.assert_shut_out(&server, self.places[at].name);
            server.kill();
        }
        for at in 0..self.places.len() {
            if let Some(server) = self.places[at].server.take() {
                server.kill();
            }
            if self.places[at].line.is_none() {
                continue;
            }
            self.check_names(at);
            self.open(at, true);
            self.close(at);
            let server = self.start(at, false);
            self.adopt(at, server);
            self.close(at);
            self.check(at);
        }
    }

    /// Nothing of what the volume needs is missing, damaged or forgotten.
    fn check(&mut self, at: usize) {
        let (url, control) = (self.url(at), Control::default());
        let store = Faults::none();
        let request = Request::with_data();
        let checked = check::check(&url, &store, &request, &control);
        let report = runtime().block_on(checked).unwrap();
        // A container that was put back alone stands among names of the history that was left, and `check` says so.
        let names = &self.places[at].names;
        let is_left = |problem: &Problem| {
            let name = problem.object.split_once("snapshots/").map(|(_, name)| name);
            problem.kind == Kind::Contradiction && name.is_some_and(|name| !names.contains_key(name))
        };
        let problems: Vec<_> = report.problems.iter().filter(|p| !is_left(p)).collect();
        assert!(problems.is_empty(), "{}: {problems:?}", self.places[at].name);
    }

    /// Ends a server well, if it can.
    pub fn close(&mut self, at: usize) {
        let Some(server) = self.places[at].server.take() else {
            return;
        };
        let met = server.faults.met();
        let closed = server.volume.close(LIMIT);
        let is_whole = server.faults.met() == met;
        self.tell(format!("{} is closed: {closed:?}", self.places[at].name));
        if closed.is_ok()
            && let Some(line) = &mut self.places[at].line
        {
            line.published();
            // Where the marker of the log could not be put, the next owner looks at the log once more.
            self.places[at].is_wal_open &= !is_whole;
        }
        server.kill();
    }
}
