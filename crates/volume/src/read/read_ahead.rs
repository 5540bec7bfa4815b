//! Read-ahead: what to read ahead of the clients' reads (pure: reads in, ranges out, no clock, no I/O).
//!
//! Each stream of reads has a window ahead of it. The window doubles as the stream goes on, up to a size that covers
//! the connection's latency. A client with many requests in flight sends the requests of one stream in any order, so a
//! read near the front of a stream belongs to it. Bytes that were read ahead and never requested count as waste. The
//! more waste there is, the longer a new stream must be before it gets a window.

use std::ops::Range;

/// Number of streams that are tracked at once. A new stream replaces the one that was unused for longest.
const STREAMS: usize = 16;
/// Size of a stream's first window.
const WINDOW_FIRST_BYTES: u64 = 256 << 10;
/// How far behind the front of a stream a read may be and still belong to it.
const BEHIND_BYTES: u64 = 32 << 20;
/// How many requests past the front of a stream a read may be and still belong to it. The requests in between are in
/// flight.
const IN_FLIGHT: u64 = 16;
/// Bytes in sequence after which a stream gets a window, while nothing is wasted.
const BELIEVED_BYTES: u64 = 128 << 10;
/// The largest factor by which waste raises that number.
const DOUBT_MAX: u64 = 64;

#[derive(Debug, Clone)]
struct Stream {
    /// End of the furthest read.
    front: u64,
    /// Bytes read in this stream, less those that it skipped.
    run_bytes: u64,
    /// Start of what was read ahead.
    ahead_from: u64,
    /// End of what was read ahead.
    ahead_until: u64,
    window_bytes: u64,
    /// When the stream was used last, to find the one that was unused for longest.
    used_at: u64,
}

/// Decides what to read ahead of the reads that it is told.
#[derive(Debug)]
pub struct Windows {
    streams: Vec<Stream>,
    window_max_bytes: u64,
    reads: u64,
    doubt: u64,
    tally: Tally,
}

/// What became of what was read ahead, in bytes. What is in neither of the other two is still waited for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Asked for.
    pub asked: u64,
    /// The front of its stream has gone past it.
    pub useful: u64,
    /// Its stream was forgotten before that.
    pub wasted: u64,
}

impl Windows {
    /// Tracks streams with windows of at most `window_max_bytes` each.
    pub fn new(window_max_bytes: u64) -> Self {
        Self {
            streams: Vec::new(),
            window_max_bytes,
            reads: 0,
            doubt: 1,
            tally: Tally::default(),
        }
    }

    /// Notes that a read begins. Returns the range to read ahead, if any, in bytes of the volume. It may reach past the
    /// volume's end.
    pub fn read(&mut self, offset_bytes: u64, len_bytes: u64) -> Option<Range<u64>> {
        self.reads += 1;
        let end = offset_bytes + len_bytes;
        let reach = len_bytes * IN_FLIGHT;
        let near =
            |s: &Stream| offset_bytes <= s.front + s.window_bytes.max(reach) && end + BEHIND_BYTES > s.front;
        let Some(at) = self.streams.iter().position(near) else {
            self.add(end, len_bytes);
            return None;
        };
        let (reads, window_max_bytes, believed) =
            (self.reads, self.window_max_bytes, BELIEVED_BYTES * self.doubt);
        let stream = &mut self.streams[at];
        stream.used_at = reads;
        if end <= stream.front {
            // The read was in flight when a later one arrived, or repeats an earlier one. It does not move the front.
            stream.run_bytes += len_bytes;
            return None;
        }
        // Skipped bytes count against the stream until they are read.
        let skipped = offset_bytes.saturating_sub(stream.front);
        stream.run_bytes = stream.run_bytes.saturating_sub(skipped) + len_bytes;
        let reached = stream.front.max(stream.ahead_from)..end.min(stream.ahead_until);
        self.tally.useful += reached.end.saturating_sub(reached.start);
        stream.front = end;
        if stream.run_bytes < believed || stream.ahead_until > end + stream.window_bytes / 2 {
            return None;
        }
        stream.window_bytes = (stream.window_bytes * 2).min(window_max_bytes);
        let ahead = end.max(stream.ahead_until)..end + stream.window_bytes;
        if stream.ahead_until <= end {
            stream.ahead_from = end;
        }
        stream.ahead_until = ahead.end.max(stream.ahead_until);
        self.tally.asked += ahead.end.saturating_sub(ahead.start);
        let was_useful = stream.run_bytes > 4 * stream.window_bytes;
        if was_useful {
            self.doubt = (self.doubt / 2).max(1);
        }
        (!ahead.is_empty()).then_some(ahead)
    }

    /// What became of what was read ahead since the last call.
    pub fn take_tally(&mut self) -> Tally {
        std::mem::take(&mut self.tally)
    }

    fn add(&mut self, front: u64, run_bytes: u64) {
        if self.streams.len() == STREAMS
            && let Some(oldest) = (0..STREAMS).min_by_key(|&i| self.streams[i].used_at)
        {
            let gone = self.streams.swap_remove(oldest);
            let wasted = gone.ahead_until.saturating_sub(gone.front);
            self.tally.wasted += wasted;
            if wasted > gone.run_bytes / 2 {
                self.doubt = (self.doubt * 2).min(DOUBT_MAX);
            }
        }
        self.streams.push(Stream {
            front,
            run_bytes,
            ahead_from: front,
            ahead_until: front,
            window_bytes: WINDOW_FIRST_BYTES / 2,
            used_at: self.reads,
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX: u64 = 16 << 20;

    /// Reads `offsets` and returns what was read ahead.
    fn run(windows: &mut Windows, offsets: impl Iterator<Item = u64>, len: u64) -> Vec<Range<u64>> {
        offsets.filter_map(|at| windows.read(at, len)).collect()
    }

    #[test]
    fn a_stream_is_read_ahead_once_and_without_gaps() {
        let mut windows = Windows::new(MAX);
        let ahead = run(&mut windows, (0..4096).map(|i| i << 16), 1 << 16);
        assert!(ahead[0].start <= 256 << 10, "begins early: {:?}", ahead[0]);
        for pair in ahead.windows(2) {
            assert_eq!(pair[0].end, pair[1].start);
        }
        let last = ahead.last().unwrap();
        assert!(
            last.end >= (4096 << 16) + MAX / 2,
            "keeps ahead by half a window at least"
        );
        assert!(last.end <= (4096 << 16) + MAX, "and by one at most");
    }

    #[test]
    fn many_streams_at_once_out_of_order() {
        let mut windows = Windows::new(MAX);
        // Eight streams, 16 requests in flight each, answered in reverse.
        let order = (0..64u64).flat_map(|batch| {
            (0..8u64).flat_map(move |s| {
                (0..16u64)
                    .rev()
                    .map(move |i| (s << 40) + ((batch * 16 + i) << 17))
            })
        });
        let ahead = run(&mut windows, order, 1 << 17);
        for s in 0..8u64 {
            let far = ahead
                .iter()
                .filter(|r| r.start >> 40 == s)
                .map(|r| r.end)
                .max()
                .unwrap();
            assert!(far >= (s << 40) + (64 << 21), "stream {s} reached {far:#x}");
        }
    }

    #[test]
    fn random_reads_are_left_alone() {
        let mut windows = Windows::new(MAX);
        let mut at = 1u64;
        let offsets = (0..20_000).map(|_| {
            at = at
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (at >> 20) % (1 << 28) * 4096
        });
        let bytes: u64 = run(&mut windows, offsets, 4096)
            .iter()
            .map(|r| r.end - r.start)
            .sum();
        assert!(
            bytes < 20_000 * 4096 / 20,
            "{bytes} bytes read ahead of 80 MB at random"
        );
    }

    #[test]
    fn waste_makes_later_streams_prove_themselves() {
        let mut windows = Windows::new(MAX);
        let mut wasted = Vec::new();
        for stream in 0..200u64 {
            // The stream ends right after its first read-ahead.
            let ahead = run(&mut windows, (0..3).map(|i| (stream << 36) + (i << 16)), 1 << 16);
            wasted.push(ahead.iter().map(|r| r.end - r.start).sum::<u64>());
        }
        assert!(wasted[0] > 0);
        assert_eq!(wasted[150..].iter().sum::<u64>(), 0);
    }

    proptest! {
        #[test]
        fn never_behind_the_read_and_never_more_than_a_window(
            reads in prop::collection::vec((0..200u64, 1..64u64), 1..300),
        ) {
            let mut windows = Windows::new(MAX);
            let mut asked = 0;
            for (at, len) in reads {
                let (at, len) = (at << 16, len << 12);
                let ahead = windows.read(at, len);
                asked += ahead.as_ref().map_or(0, |ahead| ahead.end - ahead.start);
                if let Some(ahead) = ahead {
                    prop_assert!(ahead.start >= at + len && ahead.end <= at + len + MAX);
                    prop_assert!(!ahead.is_empty());
                }
            }
            let waited_for: u64 = windows.streams.iter().map(|s| s.ahead_until.saturating_sub(s.front)).sum();
            let tally = windows.take_tally();
            prop_assert_eq!(tally.asked, asked);
            prop_assert_eq!(tally.useful + tally.wasted + waited_for, asked);
        }
    }
}
