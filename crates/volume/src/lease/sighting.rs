//! What an inspection saw of a volume before its lease is taken.

use super::state::Stored;
use crate::base::checkpoint_id::InodeCheck;
use crate::base::volume_id::VolumeId;
use crate::format::stored_state::StoredState;
use crate::meta::origin::Origin;

/// The result of an inspection, from which a later open may start. It stays valid as long as the lease is unchanged,
/// because nobody changes or deletes a volume without taking the lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    pub(crate) volume_id: VolumeId,
    pub(crate) newest: StoredState,
    pub(crate) origin: Option<InodeCheck>,
    pub(crate) parent: Option<VolumeId>,
    pub(crate) lease: Stored,
    /// Whether records of a WAL beside the volume are to be replayed.
    pub(crate) has_wal_beside: bool,
    /// Where a clone comes from, which was seen to be there.
    pub(crate) clone_of: Option<Origin>,
}
