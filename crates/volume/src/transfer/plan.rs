//! What is copied next: pieces of data, and runs of zeros. Pure.

use std::ops::Range;

use super::checksum::is_zero;
use super::image::Run;
use crate::base::units::GIB;

/// The longest run of zeros at once: between two of them a copy can be stopped, and gets further on.
const ZEROS_MAX_BYTES: u64 = GIB;

/// A part of an image that one thread copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// Where it is.
    pub range: Range<u64>,
    /// Whether it may hold anything but zeros.
    pub is_data: bool,
}

/// Divides an image into parts, from its start to its end, each byte in one of them. Each begins at a multiple of the unit.
#[derive(Debug)]
pub(super) struct Plan {
    at: u64,
    size_bytes: u64,
    unit_bytes: u64,
    data_max_bytes: u64,
}

impl Plan {
    /// Of an image of `size_bytes`. The unit and the largest part of data are powers of two, the second at least the first.
    pub fn new(size_bytes: u64, unit_bytes: u64, data_max_bytes: u64) -> Self {
        debug_assert!(unit_bytes.is_power_of_two() && data_max_bytes.is_power_of_two());
        Self {
            at: 0,
            size_bytes,
            unit_bytes,
            data_max_bytes: data_max_bytes.max(unit_bytes),
        }
    }

    /// Where the next part begins; `None` at the end.
    pub fn at(&self) -> Option<u64> {
        (self.at < self.size_bytes).then_some(self.at)
    }

    /// The next part. `run` is what the image has at [`Self::at`].
    pub fn next(&mut self, run: Run) -> Part {
        let at = self.at;
        let zeros_end = match run.end_bytes >= self.size_bytes {
            true => self.size_bytes,
            false => run.end_bytes - run.end_bytes % self.unit_bytes,
        };
        // Zeros that share their unit with data are read like it.
        let is_data = run.is_data || zeros_end <= at;
        let end = if is_data {
            let run_end = if run.is_data { run.end_bytes } else { at + 1 };
            let run_end = run_end.min(self.size_bytes).next_multiple_of(self.unit_bytes);
            run_end.min(at - at % self.data_max_bytes + self.data_max_bytes)
        } else {
            zeros_end.min(at + ZEROS_MAX_BYTES)
        };
        self.at = end.min(self.size_bytes);
        Part {
            range: at..self.at,
            is_data,
        }
    }
}

/// The runs of `bytes` that are all zeros and those that are not, in units of `unit_bytes` (the last one may be short), in order.
pub(super) fn zero_runs(bytes: &[u8], unit_bytes: usize) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    let mut at = 0;
    for unit in bytes.chunks(unit_bytes) {
        let (end, zero) = (at + unit.len(), is_zero(unit));
        match runs.last_mut() {
            Some((run, is_zero)) if *is_zero == zero => run.end = end,
            _ => runs.push((at..end, zero)),
        }
        at = end;
    }
    runs
}

#[cfg(test)]
// A list of ranges may have one.
#[allow(clippy::single_range_in_vec_init)]
mod tests {
    use super::*;

    const UNIT: u64 = 64 << 10;
    const MOST: u64 = 4 << 20;

    /// All parts of an image whose data are these ranges.
    fn parts(size_bytes: u64, data: &[Range<u64>]) -> Vec<Part> {
        let mut plan = Plan::new(size_bytes, UNIT, MOST);
        let mut parts = Vec::new();
        while let Some(at) = plan.at() {
            let run = match data.iter().find(|range| range.end > at) {
                Some(range) if range.start <= at => Run {
                    end_bytes: range.end,
                    is_data: true,
                },
                Some(range) => Run {
                    end_bytes: range.start,
                    is_data: false,
                },
                None => Run {
                    end_bytes: size_bytes,
                    is_data: false,
                },
            };
            parts.push(plan.next(run));
        }
        parts
    }

    #[test]
    fn every_byte_is_in_one_part_and_no_data_in_zeros() {
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..300 {
            let size = rng.u64(1..64 << 20);
            let mut data = Vec::new();
            let mut at = 0;
            while at < size {
                let (gap_max, len_max) = (1 << rng.u32(1..24), 1 << rng.u32(1..24));
                let start = at + rng.u64(0..gap_max);
                let end = start + rng.u64(1..len_max);
                if start < size {
                    data.push(start..end.min(size));
                }
                at = end + 1;
            }
            let parts = parts(size, &data);
            let mut end = 0;
            for part in &parts {
                assert_eq!(part.range.start, end);
                assert!(part.range.end > end && part.range.start % UNIT == 0);
                end = part.range.end;
                if part.is_data {
                    assert!(part.range.start / MOST == (part.range.end - 1) / MOST);
                } else {
                    let hit = data
                        .iter()
                        .find(|d| d.start < part.range.end && d.end > part.range.start);
                    assert_eq!(hit, None, "{part:?} of {size}");
                }
            }
            assert_eq!(end, size);
        }
    }

    #[test]
    fn holes_are_skipped_whole() {
        let tib = 1_u64 << 40;
        let found = parts(10 * tib, &[5 * tib..5 * tib + 1000]);
        let data: Vec<_> = found.iter().filter(|part| part.is_data).collect();
        assert_eq!(data.len(), 1);
        assert_eq!(data[0].range, 5 * tib..5 * tib + UNIT);
        assert!(found.len() < 11_000, "{}", found.len());
    }

    #[test]
    fn an_image_ends_where_it_ends() {
        assert_eq!(parts(0, &[]), []);
        let whole = |is_data| Part {
            range: 0..1000,
            is_data,
        };
        assert_eq!(parts(1000, &[0..1000]), [whole(true)]);
        assert_eq!(parts(1000, &[]), [whole(false)]);
        assert_eq!(parts(1000, &[999..1000]), [whole(true)]);
    }

    #[test]
    fn runs_of_zeros() {
        assert_eq!(zero_runs(&[], 4), []);
        assert_eq!(zero_runs(&[0; 9], 4), [(0..9, true)]);
        let bytes = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
        assert_eq!(
            zero_runs(&bytes, 4),
            [(0..4, false), (4..12, true), (12..13, false)]
        );
    }
}
