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

use world::{Seen, World};

const HISTORIES: u64 = 32;
/// They mostly wait.
const HISTORIES_BESIDE_EACH_OTHER: u64 = 4;
/// Things that happen in one history.
const EVENTS: usize = 50;

/// Says which history it was.
struct Naming(u64);

impl Drop for Naming {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("a history failed: HYPERNBD_HISTORY_SEED={}", self.0);
        }
    }
}

fn run(seed: u64) -> Seen {
    let _naming = Naming(seed);
    let mut world = World::new(seed);
    for _ in 0..EVENTS {
        world.event();
    }
    world.end();
    world.seen
}

#[test]
fn histories_keep_what_was_flushed() {
    if let Ok(seed) = std::env::var("HYPERNBD_HISTORY_SEED") {
        run(seed.parse().expect("HYPERNBD_HISTORY_SEED is a number"));
        return;
    }
    let histories = std::env::var("HYPERNBD_HISTORIES")
        .map_or(HISTORIES, |n| n.parse().expect("HYPERNBD_HISTORIES is a number"));
    let all = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..HISTORIES_BESIDE_EACH_OTHER)
            .map(|first| {
                let seeds = (first..histories).step_by(HISTORIES_BESIDE_EACH_OTHER as usize);
                scope.spawn(|| seeds.map(run).collect::<Vec<_>>())
            })
            .collect();
        let mut all = Seen::default();
        for thread in threads {
            for seen in thread.join().expect("a history failed") {
                all.add(&seen);
            }
        }
        all
    });
    // A history in which nothing happens shows nothing.
    all.assert_everything();
}
