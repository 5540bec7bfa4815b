//! Coalescing: which pieces of stored objects are read with one request (pure).
//!
//! Blocks that were published together are in one object, in the order of their offsets in the volume. Neighbouring
//! blocks of a volume that was changed often are in many objects, and the blocks that a read needs of one object are
//! neighbours there, or nearly so. So pieces are sorted by object and offset, whatever their order in the volume. A gap
//! between two pieces is read with them as long as that costs less than a second request.

use std::ops::Range;

/// The cost of a request, in bytes that the connection could carry instead. With 2 Gbit/s, a round trip of 20 ms and 64
/// requests in flight it is 78 KiB. The processors of both ends cost about as much.
pub const REQUEST_COST_BYTES: u64 = 64 << 10;

/// Wanted bytes of one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The caller's number for the piece.
    pub number: usize,
    /// The object.
    pub object: u64,
    /// The wanted bytes, counted from the object's start; not empty.
    pub bytes: Range<u64>,
}

/// A request for bytes of one object.
#[derive(Debug, PartialEq, Eq)]
pub struct Span {
    /// The object.
    pub object: u64,
    /// The bytes from the first to the last wanted one.
    pub bytes: Range<u64>,
    /// The pieces that it serves, ascending.
    pub pieces: Vec<Piece>,
}

/// The requests for these pieces. No request is longer than `span_bytes_max`, unless a single piece is. Counting each
/// request's cost in bytes, they never transfer more than one request for each piece would.
pub fn spans(mut pieces: Vec<Piece>, span_bytes_max: u64) -> Vec<Span> {
    pieces.sort_unstable_by_key(|piece| (piece.object, piece.bytes.start, piece.bytes.end));
    let mut all: Vec<Span> = Vec::new();
    for piece in pieces {
        match all.last_mut() {
            Some(span)
                if span.object == piece.object
                    && piece.bytes.start.saturating_sub(span.bytes.end) < REQUEST_COST_BYTES
                    && piece.bytes.end.max(span.bytes.end) - span.bytes.start <= span_bytes_max =>
            {
                span.bytes.end = span.bytes.end.max(piece.bytes.end);
                span.pieces.push(piece);
            }
            _ => all.push(Span {
                object: piece.object,
                bytes: piece.bytes.clone(),
                pieces: vec![piece],
            }),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const K: u64 = 1024;
    const MOST: u64 = 512 * K;

    fn piece(object: u64, bytes: Range<u64>) -> Piece {
        Piece {
            number: 0,
            object,
            bytes,
        }
    }

    fn numbers(pieces: &[Piece]) -> Vec<Vec<usize>> {
        let numbered = pieces.iter().cloned().enumerate();
        let spans = spans(
            numbered
                .map(|(number, piece)| Piece { number, ..piece })
                .collect(),
            MOST,
        );
        let numbers = |span: &Span| span.pieces.iter().map(|piece| piece.number).collect();
        spans.iter().map(numbers).collect()
    }

    #[test]
    fn neighbours_in_the_store_are_read_together_in_whatever_order_they_come() {
        let at = |object, block: u64| piece(object, block * 4 * K..(block + 1) * 4 * K);
        assert_eq!(numbers(&[at(1, 3), at(1, 4)]), [vec![0, 1]]);
        assert_eq!(numbers(&[at(1, 5), at(2, 0), at(1, 3)]), [vec![2, 0], vec![1]]);
        assert_eq!(numbers(&[at(2, 4), at(1, 3)]), [[1], [0]], "two objects");
        assert_eq!(numbers(&[at(1, 3), at(1, 3)]), [vec![0, 1]], "wanted twice");
    }

    #[test]
    fn a_gap_is_read_while_it_costs_less_than_a_request() {
        let second = |gap: u64| piece(1, 8 * K + gap..12 * K + gap);
        let first = piece(1, 4 * K..8 * K);
        let cost = REQUEST_COST_BYTES;
        assert_eq!(numbers(&[first.clone(), second(cost - 1)]).len(), 1);
        assert_eq!(numbers(&[first, second(cost)]).len(), 2);
    }

    #[test]
    fn one_request_is_for_the_bytes_from_the_first_to_the_last() {
        let (first, second) = (piece(1, 10 * K..20 * K), piece(1, 30 * K..31 * K));
        let span = Span {
            object: 1,
            bytes: 10 * K..31 * K,
            pieces: vec![first.clone(), second.clone()],
        };
        assert_eq!(spans(vec![second, first], MOST), [span]);
    }

    proptest! {
        #[test]
        fn all_is_read_once_within_the_limits_and_for_no_more_than_one_by_one(
            wanted in proptest::collection::vec((0u64..3, 0u64..2000, 1u64..40), 1..80)
        ) {
            let pieces: Vec<Piece> = wanted
                .iter()
                .enumerate()
                .map(|(number, (object, at, len))| Piece {
                    number,
                    object: *object,
                    bytes: at * K..(at + len) * K,
                })
                .collect();
            let spans = spans(pieces.clone(), MOST);
            let mut seen: Vec<Piece> = spans.iter().flat_map(|span| span.pieces.clone()).collect();
            seen.sort_by_key(|piece| piece.number);
            prop_assert_eq!(&seen, &pieces);
            let len = |bytes: &Range<u64>| bytes.end - bytes.start;
            for span in &spans {
                prop_assert!(len(&span.bytes) <= MOST);
                for piece in &span.pieces {
                    prop_assert_eq!(piece.object, span.object);
                    prop_assert!(span.bytes.start <= piece.bytes.start && piece.bytes.end <= span.bytes.end);
                }
            }
            let cost: u64 = spans.iter().map(|span| len(&span.bytes) + REQUEST_COST_BYTES).sum();
            let one_by_one: u64 = pieces.iter().map(|piece| len(&piece.bytes) + REQUEST_COST_BYTES).sum();
            prop_assert!(cost <= one_by_one);
        }
    }
}
