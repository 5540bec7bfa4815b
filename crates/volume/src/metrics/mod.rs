//! What a volume counts while it is served: plain counters, which every room below the public face adds to.
//!
//! * [`count`]: counters and distributions of durations.
//! * [`requests`]: what clients ask for.
//! * [`store`]: what the store is asked for, and what that costs.
//! * [`work`]: publishes, the log, caches, read-ahead, the lease, space, the scrub, damage.
//!
//! Nothing here knows how the numbers are shown. There is one set a served volume, handed on with
//! [`StoreOptions`](crate::options::StoreOptions) and [`Store`](crate::store::Store); a set that nobody shows costs the same few
//! atomic additions.

use std::ops::Deref;
use std::sync::Arc;

pub mod address;
pub mod count;
pub mod requests;
pub mod store;
pub mod work;

use requests::Requests;
use store::StoreRequests;
use work::{Caches, Damage, LeaseKept, Publishes, ReadAhead, Scrub, Space, Wal};

/// All that is counted of one volume.
#[derive(Debug, Default)]
pub struct Counted {
    /// What clients asked for.
    pub requests: Requests,
    /// What the store was asked for.
    pub store: StoreRequests,
    /// Publishes of generations.
    pub publishes: Publishes,
    /// Appends to the log.
    pub wal: Wal,
    /// Where what was read was found.
    pub caches: Caches,
    /// What was read ahead of clients.
    pub read_ahead: ReadAhead,
    /// The lease.
    pub lease: LeaseKept,
    /// What the volume takes in its store.
    pub space: Space,
    /// The scrub.
    pub scrub: Scrub,
    /// Stored bytes that are not those that were written.
    pub damage: Damage,
}

/// Handle to what is counted of one volume. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Arc<Counted>);

impl Deref for Metrics {
    type Target = Counted;

    fn deref(&self) -> &Counted {
        &self.0
    }
}

/// Options that a handle is handed on with say the same whatever it has counted.
impl PartialEq for Metrics {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Metrics {}
