//! Which of many small ranges are read with one request: those whose bytes are stored near each other (pure).
//!
//! Blocks lie in an object in ascending order, but blocks that were published together need not be neighbours: what lies
//! side by side in the store says more than what lies side by side in the volume.

use std::ops::Range;

use crate::read::reader::Stored;

/// What lies between two ranges is read with them when it is no more than this: it costs less than a request.
const JOIN_OVER_BYTES: u64 = 64 << 10;
/// The most that is read at once, which bounds the memory that many such reads take.
const JOINED_BYTES_MAX: u64 = 512 << 10;

/// A request for bytes of one object.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// From the first to the last of the bytes wanted.
    pub stored: Stored,
    /// What for: the number that each part came with, and the bytes of the object.
    pub parts: Vec<(usize, Range<u64>)>,
}

/// The requests for these pieces.
pub(super) fn spans(mut pieces: Vec<(usize, Stored)>) -> Vec<Span> {
    pieces.sort_unstable_by_key(|(_, s)| (s.object, s.wanted.start));
    let mut all: Vec<Span> = Vec::new();
    for (number, piece) in pieces {
        let part = (number, piece.wanted.clone());
        match all.last_mut() {
            Some(Span { stored, parts })
                if stored.object == piece.object
                    && piece.wanted.start.saturating_sub(stored.wanted.end) <= JOIN_OVER_BYTES
                    && piece.wanted.end - stored.wanted.start <= JOINED_BYTES_MAX =>
            {
                stored.run.end = stored.run.end.max(piece.run.end);
                stored.wanted.end = stored.wanted.end.max(piece.wanted.end);
                parts.push(part);
            }
            _ => all.push(Span {
                stored: piece,
                parts: vec![part],
            }),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1024;

    fn piece(object: u64, block: u64, wanted: Range<u64>) -> Stored {
        let start = block * 64 * K;
        Stored {
            object,
            run: start..start + 64 * K,
            wanted: start + wanted.start..start + wanted.end,
        }
    }

    fn numbers(pieces: Vec<Stored>) -> Vec<Vec<usize>> {
        let spans = spans(pieces.into_iter().enumerate().collect());
        let numbers = |span: &Span| span.parts.iter().map(|(number, _)| *number).collect();
        spans.iter().map(numbers).collect()
    }

    #[test]
    fn neighbours_in_the_store_are_read_together() {
        let whole = || 0..64 * K;
        // Neighbours; one block between; two; another object.
        assert_eq!(
            numbers(vec![piece(1, 3, whole()), piece(1, 4, whole())]),
            [vec![0, 1]]
        );
        assert_eq!(
            numbers(vec![piece(1, 5, whole()), piece(1, 3, whole())]),
            [vec![1, 0]]
        );
        assert_eq!(
            numbers(vec![piece(1, 3, whole()), piece(1, 6, whole())]),
            [[0], [1]]
        );
        assert_eq!(
            numbers(vec![piece(2, 4, whole()), piece(1, 3, whole())]),
            [[1], [0]]
        );
    }

    #[test]
    fn one_request_is_for_the_bytes_from_the_first_to_the_last() {
        let pieces = vec![(7, piece(1, 3, 4 * K..64 * K)), (9, piece(1, 4, 0..60 * K))];
        let wanted: Vec<_> = pieces.iter().map(|(n, p)| (*n, p.wanted.clone())).collect();
        let span = Span {
            stored: Stored {
                object: 1,
                run: 3 * 64 * K..5 * 64 * K,
                wanted: (3 * 64 + 4) * K..(4 * 64 + 60) * K,
            },
            parts: wanted,
        };
        assert_eq!(spans(pieces), [span]);
    }

    #[test]
    fn none_is_larger_than_the_most_and_nothing_is_left_out() {
        let pieces: Vec<_> = (0..40).map(|block| piece(1, block, 0..63 * K)).collect();
        let spans = spans(pieces.iter().cloned().enumerate().collect());
        let len = |span: &Span| span.stored.wanted.end - span.stored.wanted.start;
        assert!(spans.len() > 1 && spans.iter().all(|s| len(s) <= JOINED_BYTES_MAX));
        let parts = spans.into_iter().flat_map(|s| s.parts).map(|(_, wanted)| wanted);
        assert!(parts.eq(pieces.into_iter().map(|p| p.wanted)));
    }
}
