//! An opening that fails once the container is open leaves what it had of the machine to the next one.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use aws_sdk_s3::config::interceptors::BeforeTransmitInterceptorContextRef;
use aws_sdk_s3::config::{ConfigBag, Intercept, RuntimeComponents};
use hypernbd_volume::Volume;
use hypernbd_volume::options::{
    NodeCacheConfig, NodeCacheStrategy, ReadCacheConfig, ReadCacheDisk, StoreOptions, VolumeOptions,
};
use hypernbd_volume::store::hook::Hook;
use parking_lot::{Condvar, Mutex};

use crate::faults::{BoxError, LIMIT};
use crate::fixture::{Fixture, pattern};

const MIB: u64 = 1 << 20;

/// How far an opening is.
#[derive(Debug, Default, Clone, Copy)]
struct Course {
    /// Looks at an entry of the checkpoint list.
    entries_asked: usize,
    /// Data were asked for, which nobody but read-ahead does.
    is_read_ahead: bool,
    /// Data are answered.
    is_released: bool,
}

#[derive(Debug, Default)]
struct Opening {
    course: Mutex<Course>,
    changed: Condvar,
}

impl Opening {
    fn note(&self, change: impl FnOnce(&mut Course)) {
        change(&mut self.course.lock());
        self.changed.notify_all();
    }

    fn wait(&self, is_so: impl Fn(&Course) -> bool) {
        let wait = || {
            let mut course = self.course.lock();
            while !is_so(&course) {
                let waited = self.changed.wait_for(&mut course, LIMIT);
                assert!(!waited.timed_out(), "{course:?}");
            }
        };
        tokio::task::block_in_place(wait);
    }
}

/// Holds what is read ahead back, and refuses the entry of the newest checkpoint: the first time before the container is opened, where
/// nothing depends on it, and once more when something is being read ahead.
#[derive(Debug)]
struct Failing(Arc<Opening>);

impl Intercept for Failing {
    fn name(&self) -> &'static str {
        "a failing opening"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Self(opening) = self;
        let request = context.request();
        let path = request.uri().split('?').next().unwrap_or_default();
        let name = path.rsplit('/').next().unwrap_or_default();
        if request.method() != "GET" || !name.starts_with(|c: char| c.is_ascii_digit()) {
            return Ok(());
        }
        if path.contains(".meta/checkpoints/") {
            opening.note(|course| course.entries_asked += 1);
            if opening.course.lock().entries_asked > 1 {
                opening.wait(|course| course.is_read_ahead);
            }
            return Err("injected: refused".into());
        }
        if !path.contains(".meta/") {
            opening.note(|course| course.is_read_ahead = true);
            opening.wait(|course| course.is_released);
        }
        Ok(())
    }
}

fn is_unlocked(lock: &Path) -> bool {
    File::options().write(true).open(lock).unwrap().try_lock().is_ok()
}

#[test]
fn the_caches_of_an_opening_that_fails_are_the_next_ones() {
    let f = Fixture::new();
    f.create(32 * MIB, 4096);
    let volume = f.open();
    volume.write(0, &pattern(1, 4096), true).unwrap();
    volume.close(LIMIT).unwrap();

    let options = VolumeOptions {
        node_cache: Some(NodeCacheConfig {
            path: f.path_of("nodes"),
            size_bytes: 32 * MIB,
            strategy: NodeCacheStrategy::ReuseCache,
        }),
        read_cache: ReadCacheConfig {
            memory_bytes: 16 * MIB,
            disk: Some(ReadCacheDisk {
                dir: f.path_of("pages"),
                size_bytes: 64 * MIB,
            }),
        },
        ..VolumeOptions::default()
    };
    let opening = Arc::<Opening>::default();
    let failing = StoreOptions {
        hook: Hook::new(Failing(opening.clone())),
        ..StoreOptions::default()
    };
    let failed = f.run(Volume::open(&f.url, &failing, &options));
    let error = failed.err().expect("the entry is refused").chain();
    let course = *opening.course.lock();
    let are_free = [("pages", "lock"), ("nodes", "nodes.lock")].map(|(cache, lock)| {
        // Of the one volume there is.
        let of_volume = std::fs::read_dir(f.path_of(cache))
            .unwrap()
            .next()
            .unwrap()
            .unwrap();
        is_unlocked(&of_volume.path().join(lock))
    });
    // What was held back goes on before anything is said, so that the runtime can end.
    opening.note(|course| course.is_released = true);
    assert!(error.contains("refused"), "{error}");
    assert!(course.is_read_ahead, "{error}: {course:?}");
    assert_eq!(are_free, [true, true], "pages and nodes");

    let volume = f.run(Volume::open(&f.url, &f.store_options, &options)).unwrap();
    assert!(f.read(&volume, 0, 4096) == pattern(1, 4096));
    volume.close(LIMIT).unwrap();
}
