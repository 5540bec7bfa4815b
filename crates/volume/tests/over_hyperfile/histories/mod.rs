//! Histories of several volumes and owners over the real engine: one seed is one history.
//!
//! Volumes are made, served, pruned, compacted, killed, taken over while their older owner goes on, deleted and made anew at the same
//! place, copied, cloned, flattened, restored from a backup and rolled back, over a store that fails requests and processes that end at any of them; caches, journals
//! and write buffer directories stay where they are meanwhile, and logs beside the volumes go with them. What must hold:
//!
//! * What a flush covered is there at the next opening, and the volume reads as at one moment since that flush. Nothing else is
//!   ever read: not what another volume or another history left in a cache, a journal or a write buffer.
//! * Once a volume was taken over, the older owner acknowledges nothing that its successor does not have, and changes nothing.
//! * A log is refused only where it may continue another history. Given up, the volume reads as it was published.
//! * What has a name reads as when it was named.
//! * A clone reads as what it began as and what was written to it, whatever is removed, compacted or rolled back in its parent; a volume
//!   with clones is not deleted.
//!
//! A failure names its seed; `HYPERNBD_HISTORY_SEED=<seed>` runs that history alone,
//! and `HYPERNBD_HISTORIES=<number>` as many as that.

mod clones;
mod events;
mod faults;
mod line;
mod verbs;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use world::{Seen, World};

const HISTORIES: u64 = 40;
/// They mostly wait.
const HISTORIES_BESIDE_EACH_OTHER: u64 = 4;
/// Things that happen in one history.
const EVENTS: usize = 50;

/// Runs one history; what went wrong is told with its seed.
fn run(seed: u64) -> Result<Seen, String> {
    let history = AssertUnwindSafe(|| {
        let mut world = World::new(seed);
        for _ in 0..EVENTS {
            world.event();
        }
        world.end();
        world.seen
    });
    catch_unwind(history).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()));
        format!("HYPERNBD_HISTORY_SEED={seed}: {}", text.unwrap_or_default())
    })
}

#[test]
fn histories_keep_what_was_flushed() {
    if let Ok(seed) = std::env::var("HYPERNBD_HISTORY_SEED") {
        let seen = run(seed.parse().expect("HYPERNBD_HISTORY_SEED is a number"));
        assert_eq!(seen.map(drop), Ok(()));
        return;
    }
    let histories = std::env::var("HYPERNBD_HISTORIES")
        .map_or(HISTORIES, |n| n.parse().expect("HYPERNBD_HISTORIES is a number"));
    let mut all = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..HISTORIES_BESIDE_EACH_OTHER)
            .map(|first| {
                let seeds = (first..histories).step_by(HISTORIES_BESIDE_EACH_OTHER as usize);
                scope.spawn(|| seeds.map(run).collect::<Vec<_>>())
            })
            .collect();
        let (mut all, mut failed) = (Seen::default(), Vec::new());
        for ended in threads.into_iter().flat_map(|thread| thread.join().unwrap()) {
            match ended {
                Ok(seen) => all.add(&seen),
                Err(how) => failed.push(how),
            }
        }
        assert!(failed.is_empty(), "{}", failed.join("\n"));
        all
    });
    // What is rare may not have come, as the order of requests is the machine's: some more histories look for it.
    for seed in histories..4 * histories {
        if all.has_everything() {
            break;
        }
        match run(seed) {
            Ok(seen) => all.add(&seen),
            Err(how) => panic!("{how}"),
        }
    }
    eprintln!("{all:?}");
    // A history in which nothing happens shows nothing.
    all.assert_everything();
}
