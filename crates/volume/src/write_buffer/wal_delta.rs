//! The byte ranges of a generation that the WAL does not have yet (pure).
//!
//! Kept for each generation, but only when there is a WAL. Once a generation has more changes than one record may hold,
//! its changes are not followed any further: its flushes wait for its checkpoint, and the bookkeeping would only slow
//! the writes.

use std::ops::Range;

use rangemap::RangeSet;

use crate::wal::record::ENTRY_BYTES;

/// The ranges changed since they were last logged.
#[derive(Debug, Clone)]
pub struct WalDelta {
    data: RangeSet<u64>,
    zeros: RangeSet<u64>,
    /// An upper bound of the bytes that a record of all the ranges would take.
    cost_bytes: u64,
    limit_bytes: u64,
    is_too_large: bool,
}

impl WalDelta {
    /// An empty delta. With more than `limit_bytes` it becomes too large for a record.
    pub fn new(limit_bytes: u64) -> Self {
        Self {
            data: RangeSet::new(),
            zeros: RangeSet::new(),
            cost_bytes: 0,
            limit_bytes,
            is_too_large: false,
        }
    }

    /// Notes that these bytes were written.
    pub fn written(&mut self, range: Range<u64>) {
        if range.is_empty() || self.is_too_large {
            return;
        }
        self.cost_bytes += range.end - range.start + ENTRY_BYTES as u64;
        if !self.zeros.is_empty() {
            self.zeros.remove(range.clone());
        }
        self.data.insert(range);
        self.check_size();
    }

    /// Notes that these bytes were zeroed.
    pub fn zeroed(&mut self, range: Range<u64>) {
        if range.is_empty() || self.is_too_large {
            return;
        }
        // The range may also cut a range of data in two.
        self.cost_bytes += 2 * ENTRY_BYTES as u64;
        self.data.remove(range.clone());
        self.zeros.insert(range);
        self.check_size();
    }

    fn check_size(&mut self) {
        if self.cost_bytes <= self.limit_bytes {
            return;
        }
        // The bound counts overwritten bytes twice, so it is computed exactly here.
        let entries = (self.data.iter().count() + self.zeros.iter().count()) as u64;
        let data_bytes: u64 = self.data.iter().map(|r| r.end - r.start).sum();
        self.cost_bytes = data_bytes + entries * ENTRY_BYTES as u64;
        // The margin avoids that the exact size is computed again at every write.
        if self.cost_bytes > self.limit_bytes / 4 * 3 {
            self.is_too_large = true;
            self.data = RangeSet::new();
            self.zeros = RangeSet::new();
        }
    }

    /// Whether nothing changed.
    pub fn is_empty(&self) -> bool {
        !self.is_too_large && self.data.is_empty() && self.zeros.is_empty()
    }

    /// Whether there is more than one record may hold. Once it is too large, it stays so.
    pub fn is_too_large(&self) -> bool {
        self.is_too_large
    }

    /// Takes the ranges of data and those of zeros, disjoint and ascending each, and leaves the delta empty.
    pub fn take(&mut self) -> (Vec<Range<u64>>, Vec<Range<u64>>) {
        self.cost_bytes = 0;
        let data = std::mem::take(&mut self.data);
        let zeros = std::mem::take(&mut self.zeros);
        (data.into_iter().collect(), zeros.into_iter().collect())
    }

    /// An upper bound of the bytes that the WAL lacks; a lower bound once the delta is too large.
    pub fn data_bytes(&self) -> u64 {
        self.cost_bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_is_known_by_its_last_change(ops in prop::collection::vec((any::<bool>(), 0..200u64, 0..60u64), 0..40)) {
            let mut unlogged = WalDelta::new(1 << 30);
            let mut model = vec![' '; 300];
            for (is_data, at, len) in ops {
                let range = at..at + len;
                if is_data {
                    unlogged.written(range.clone());
                } else {
                    unlogged.zeroed(range.clone());
                }
                model[range.start as usize..range.end as usize].fill(if is_data { 'd' } else { 'z' });
            }
            let mut found = vec![' '; 300];
            let (data, zeros) = unlogged.take();
            for (ranges, kind) in [(data, 'd'), (zeros, 'z')] {
                for r in ranges {
                    found[r.start as usize..r.end as usize].fill(kind);
                }
            }
            prop_assert_eq!(found, model);
            prop_assert!(unlogged.is_empty());
        }
    }

    #[test]
    fn only_what_is_really_much_is_too_large() {
        let mut unlogged = WalDelta::new(100_000);
        for _ in 0..1000 {
            unlogged.written(0..4096);
            unlogged.zeroed(1 << 30..1 << 50);
        }
        assert!(!unlogged.is_too_large(), "the same block over and over is little");
        for at in 0..40 {
            unlogged.written(at * 8192..at * 8192 + 4096);
        }
        assert!(unlogged.is_too_large());
        assert!(!unlogged.is_empty(), "and does not pass for nothing");
        unlogged.take();
        assert!(
            unlogged.is_too_large(),
            "what was not followed cannot be logged later"
        );
    }
}
