//! A single writer: the lease `<root>.meta/lease` says which owner may write to a volume.
//!
//! The lease informs people and orders the owners. The conditional writes of the container are the fence. Two rules
//! join them (Invariant O1). For an old owner A and a new owner B:
//!
//! 1. B replaces the lease. Then, unless A had released it, B rewrites the container's inode. Whatever A had read of
//!    the inode is stale from then on, and every publish of A is refused.
//! 2. *Adopt, then check*: an owner that reads the stored inode in order to publish on top of it (at an open, or at a
//!    recovery after a failed publish) reads the lease afterwards, and goes on only when the lease is its own. If A
//!    adopted an inode that B wrote, A would then find B's lease. An open reads the lease while the container is being
//!    opened. That read is enough when the adopted state is one that had been read before. An owner that took over
//!    meanwhile has changed the state, if only by a nanosecond; so when the adopted state is a different one, the lease
//!    is read once more.
//!
//! So nothing depends on clocks. A server that was stopped for an hour, or could not renew its lease for an hour, may
//! go on if nobody took the volume over meanwhile. If somebody did, the container refuses its writes. A renewal that
//! fails proves nothing; a renewal that finds another owner's lease ends all writing for good.
//!
//! A lease also carries the request of somebody elsewhere that its holder grows the volume (`growth.rs`). That is the one write of a lease by
//! anybody but its owner: it changes neither token nor epoch nor state, and is stored over the lease that was read or not at all.
//!
//! A place that is copied to is held by its lease, or by its label before there is one (`holding.rs`).
//!
//! [`state`] decides, and [`Lease`] carries the decisions out on the store. Nothing here deletes the lease, because
//! some stores ignore a condition on a DELETE.

mod grower;
mod growth;
mod holding;
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

pub(crate) use grower::Grow;
pub use growth::{GrowthRequest, GrowthStage};
pub(crate) use growth::{Outlook, outlook};
pub(crate) use holding::Holding;
pub(crate) use host::asker;
pub use keeper::{BeforePut, Lease, load, probe};
pub(crate) use keeper::{NAME, new_token, put_request, stored};
pub use record::{Holder, LeaseRecord, LeaseState};
