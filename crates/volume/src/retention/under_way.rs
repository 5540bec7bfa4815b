//! Numbers under which copies are being stored that no checkpoint refers to yet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;

/// The numbers, and for each the checkpoint from which on the usage table tells what is needed of it; none while nobody knows. Clones
/// share them.
#[derive(Debug, Clone, Default)]
pub struct UnderWay(Arc<Mutex<BTreeMap<u64, Option<u64>>>>);

impl UnderWay {
    /// Copies are going to be stored under this number.
    pub fn begin(&self, number: u64) {
        self.0.lock().insert(number, None);
    }

    /// The checkpoint `cno` refers to them.
    pub fn published(&self, number: u64, cno: u64) {
        self.0.lock().insert(number, Some(cno));
    }

    /// A checkpoint that refers to them was sent, or not, after `newest` was published. The next one tells, because it is published once
    /// that is decided.
    pub fn sent(&self, number: u64, newest: u64) {
        self.published(number, newest.saturating_add(1));
    }

    /// No checkpoint will ever refer to them. Not to be said once a checkpoint was sent that does, unless it is known to be lost.
    pub fn given_up(&self, number: u64) {
        self.0.lock().remove(&number);
    }

    /// The numbers under which nothing may go, for a table that is at this checkpoint.
    pub fn at(&self, accounted: u64) -> BTreeSet<u64> {
        let mut numbers = self.0.lock();
        numbers.retain(|_, published| published.is_none_or(|cno| cno > accounted));
        numbers.keys().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_spared_until_its_checkpoint_is_accounted() {
        let numbers = UnderWay::default();
        numbers.begin(5);
        numbers.begin(6);
        numbers.begin(7);
        assert_eq!(numbers.at(100), BTreeSet::from([5, 6, 7]));
        numbers.published(5, 9);
        numbers.given_up(6);
        assert_eq!(numbers.at(8), BTreeSet::from([5, 7]));
        assert_eq!(numbers.at(9), BTreeSet::from([7]));
        numbers.sent(7, 10);
        assert_eq!(numbers.at(10), BTreeSet::from([7]), "nothing was published since");
        assert_eq!(numbers.at(11), BTreeSet::new());
    }
}
