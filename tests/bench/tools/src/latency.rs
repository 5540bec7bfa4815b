//! Latencies of a run and their summary.

use std::time::Duration;

use serde::Serialize;

/// Median, 99th percentile and worst of a set of latencies, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Half of the requests took no longer.
    pub p50_ms: f64,
    /// 99 of 100 requests took no longer.
    pub p99_ms: f64,
    /// The slowest request.
    pub worst_ms: f64,
}

/// Summarises `latencies` by nearest rank; `None` when there are none. Sorts the slice.
pub fn summarise(latencies: &mut [Duration]) -> Option<Summary> {
    latencies.sort_unstable();
    let rank = |percent: usize| {
        let position = (latencies.len() * percent).div_ceil(100);
        latencies
            .get(position.saturating_sub(1))
            .map(|latency| latency.as_secs_f64() * 1e3)
    };
    Some(Summary {
        p50_ms: rank(50)?,
        p99_ms: rank(99)?,
        worst_ms: rank(100)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_measured_has_no_summary() {
        assert_eq!(summarise(&mut []), None);
    }

    #[test]
    fn one_value_is_every_percentile() {
        let summary = summarise(&mut [Duration::from_millis(7)]).unwrap();
        assert_eq!(
            summary,
            Summary {
                p50_ms: 7.0,
                p99_ms: 7.0,
                worst_ms: 7.0
            }
        );
    }

    #[test]
    fn percentiles_are_nearest_ranks_of_the_sorted_values() {
        let mut latencies: Vec<_> = (1..=1000).rev().map(Duration::from_millis).collect();
        let summary = summarise(&mut latencies).unwrap();
        assert_eq!(
            summary,
            Summary {
                p50_ms: 500.0,
                p99_ms: 990.0,
                worst_ms: 1000.0
            }
        );
    }
}
