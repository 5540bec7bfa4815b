//! What was seen of a volume before its lease is taken.

use super::state::Stored;
use crate::base::checkpoint_id::InodeCheck;
use crate::base::volume_id::VolumeId;
use crate::format::stored_state::StoredState;
use crate::meta::origin::Origin;

/// What an open may start from that comes some time after a look: it holds as long as the lease is still that one,
/// because nobody changes or deletes a volume without taking the lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    pub(crate) volume_id: VolumeId,
    pub(crate) newest: StoredState,
    pub(crate) origin: Option<InodeCheck>,
    pub(crate) parent: Option<VolumeId>,
    pub(crate) lease: Stored,
    /// Where a clone comes from, which was seen to be there.
    pub(crate) clone_of: Option<Origin>,
}
