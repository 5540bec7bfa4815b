//! One writer: the lease `<root>.meta/lease`, which says who may write to a volume.
//!
//! The lease is for people and for the order of owners; the conditional writes of the container are the fence. What
//! makes them one (Invariant O1), for an old owner A and a new owner B:
//!
//! 1. B replaces the lease, and then, unless A had released it, rewrites the container's inode: whatever A had read of
//!    it before is stale from then on, and every publish of A is refused.
//! 2. *Adopt, then check*: whoever reads the stored inode to publish upon it (an open, a recovery after a failed
//!    publish) reads the lease afterwards, and goes on only when it is its own. Were A to adopt what B wrote, it would
//!    find B's lease. An open reads the lease while the container is opened; that counts where the state adopted is one
//!    that was read before. Whoever took over meanwhile has changed the state, if only by a nanosecond, and where it is
//!    another the lease is read once more.
//!
//! So nothing hangs on clocks: a server that was stopped for an hour, or could not renew its lease for one, may go on
//! if nobody took the volume over meanwhile, and is refused by the container if somebody did. A renewal that fails
//! proves nothing; one that finds another's lease ends the writing for good.
//!
//! [`state`] decides, [`Lease`] drives it with the store. Nothing here deletes the lease: a condition on a DELETE is
//! ignored by some stores.

mod host;
mod keeper;
#[cfg(test)]
mod model_tests;
pub(crate) mod options;
mod record;
pub(crate) mod sighting;
pub mod state;
#[cfg(test)]
pub(crate) mod tests;

pub use keeper::{BeforePut, Lease, load, probe};
pub(crate) use keeper::{NAME, new_token, stored};
pub use record::{Holder, LeaseRecord, LeaseState};
