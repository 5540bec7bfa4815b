//! Counters and distributions, without locks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A number that is added to, or set.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds `more`. Beyond 2^64 it begins anew, as readers of counters expect.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn one(&self) {
        self.add(1);
    }

    /// Puts another number in its place.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

const MICROS: u64 = 1_000;
const MILLIS: u64 = 1_000_000;
const SECONDS: u64 = 1_000_000_000;

/// Upper ends of the classes of durations, in nanoseconds, ascending: from a write into memory to a request that waits for
/// a store which is away. What takes longer is in a class of its own.
pub const BOUNDS_NS: [u64; 21] = [
    10 * MICROS,
    25 * MICROS,
    50 * MICROS,
    100 * MICROS,
    250 * MICROS,
    500 * MICROS,
    MILLIS,
    2_500 * MICROS,
    5 * MILLIS,
    10 * MILLIS,
    25 * MILLIS,
    50 * MILLIS,
    100 * MILLIS,
    250 * MILLIS,
    500 * MILLIS,
    SECONDS,
    2_500 * MILLIS,
    5 * SECONDS,
    10 * SECONDS,
    25 * SECONDS,
    60 * SECONDS,
];

/// How long something took, each time.
#[derive(Debug, Default)]
pub struct Durations {
    classes: [Count; BOUNDS_NS.len()],
    longer: Count,
    sum_ns: Count,
}

impl Durations {
    /// It took this long once more.
    pub fn observe(&self, took: Duration) {
        let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let class = BOUNDS_NS.partition_point(|bound_ns| *bound_ns < took_ns);
        self.classes.get(class).unwrap_or(&self.longer).one();
        self.sum_ns.add(took_ns);
    }

    /// All of it now.
    pub fn distribution(&self) -> Distribution {
        let ends = BOUNDS_NS.iter().map(|bound_ns| *bound_ns as f64 / SECONDS as f64);
        let counts = self.classes.iter().map(Count::get);
        let mut classes: Vec<(f64, u64)> = ends.zip(counts).collect();
        classes.push((f64::INFINITY, self.longer.get()));
        Distribution {
            sum_s: self.sum_ns.get() as f64 / SECONDS as f64,
            classes,
        }
    }
}

/// How often something took how long.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribution {
    /// The upper end of each class in seconds, ascending, and how many durations fell into it. The last has no end.
    pub classes: Vec<(f64, u64)>,
    /// Sum of all durations, in seconds.
    pub sum_s: f64,
}

impl Distribution {
    /// How many durations there were.
    pub fn count(&self) -> u64 {
        self.classes.iter().map(|(_, count)| count).sum()
    }

    /// The upper end of the class that this share of the durations, of 0 to 1, is not above, in seconds. `None` when there were
    /// none, or when it is in the class without an end.
    pub fn quantile_s(&self, share: f64) -> Option<f64> {
        let wanted = (self.count() as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        let class = self.classes.iter().find(|(_, count)| {
            seen += count;
            seen >= wanted
        });
        class.map(|(end_s, _)| *end_s).filter(|end_s| end_s.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_fall_into_their_classes() {
        let durations = Durations::default();
        for micros in [0, 10, 11, 1_000, 60_000_000, 60_000_001] {
            durations.observe(Duration::from_micros(micros));
        }
        let all = durations.distribution();
        let at = |end_s: f64| all.classes.iter().find(|(end, _)| *end == end_s).unwrap().1;
        assert_eq!(
            (at(1e-5), at(2.5e-5), at(1e-3)),
            (2, 1, 1),
            "an end belongs to its class"
        );
        assert_eq!((at(60.0), at(f64::INFINITY)), (1, 1));
        assert_eq!(all.count(), 6);
        assert!((all.sum_s - 120.001_022).abs() < 1e-6, "{}", all.sum_s);
    }

    #[test]
    fn a_quantile_is_the_end_of_a_class() {
        let durations = Durations::default();
        assert_eq!(durations.distribution().quantile_s(0.5), None);
        for millis in 1..=100 {
            durations.observe(Duration::from_millis(millis));
        }
        let all = durations.distribution();
        assert_eq!(all.quantile_s(0.5), Some(0.05));
        assert_eq!(all.quantile_s(0.99), Some(0.1));
        assert_eq!(all.quantile_s(0.0), Some(0.001));
        durations.observe(Duration::from_secs(100));
        assert_eq!(
            durations.distribution().quantile_s(1.0),
            None,
            "there is no end to name"
        );
    }

    #[test]
    fn the_classes_ascend() {
        assert!(BOUNDS_NS.is_sorted());
    }
}
