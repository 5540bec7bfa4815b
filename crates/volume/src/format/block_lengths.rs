//! How long blocks are stored. Pure.

use std::collections::HashMap;
use std::ops::Range;

use super::stored_state::StoredState;

/// How long blocks are stored: whole, but for the last one of a volume.
pub(crate) struct BlockLengths {
    block_size: u64,
    /// The lengths of blocks that were the last of a volume, the least of each.
    short: HashMap<u64, u64>,
}

impl BlockLengths {
    /// In these checkpoints.
    pub fn new(states: &[StoredState], block_size: u64) -> Self {
        let mut short: HashMap<u64, u64> = HashMap::new();
        for state in states {
            let len = state.size_bytes().checked_rem(block_size).unwrap_or(0);
            if len > 0 {
                let of = short.entry(state.size_bytes() / block_size).or_insert(len);
                *of = len.min(*of);
            }
        }
        Self { block_size, short }
    }

    /// The bytes that a block stored at this offset takes at least.
    pub fn stored_at(&self, block: u64, offset_bytes: u64) -> Range<u64> {
        let len = self.short.get(&block).copied().unwrap_or(self.block_size);
        offset_bytes..offset_bytes + len
    }
}
