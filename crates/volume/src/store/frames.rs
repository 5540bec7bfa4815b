//! Bytes as they arrived: in many pieces, which are not copied together.

use std::ops::Range;

use bytes::{Buf, Bytes};

/// A run of bytes in pieces. All clones share the pieces.
#[derive(Debug, Clone, Default)]
pub struct Frames {
    /// Each piece with the offset of its end.
    pieces: Vec<(usize, Bytes)>,
}

impl Frames {
    /// Takes all bytes of `from`. Copies nothing if `from` is made of [`Bytes`].
    pub fn take(mut from: impl Buf) -> Self {
        let mut pieces = Vec::new();
        let mut end = 0;
        while from.has_remaining() {
            let piece = from.copy_to_bytes(from.chunk().len());
            end += piece.len();
            pieces.push((end, piece));
        }
        Self { pieces }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.pieces.last().map_or(0, |(end, _)| *end)
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The pieces that make up `range`, in order; `None` when it reaches past the end.
    pub fn slices(&self, range: Range<usize>) -> Option<impl Iterator<Item = &[u8]>> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let first = self.pieces.partition_point(|(end, _)| *end <= range.start);
        let slices = self.pieces[first..].iter().map_while(move |(end, piece)| {
            let start = end - piece.len();
            let from = range.start.max(start);
            let until = range.end.min(*end);
            (from < until).then(|| &piece[from - start..until - start])
        });
        Some(slices)
    }

    /// The bytes of `range`, shared; `None` when it reaches past the end.
    pub fn part(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let mut pieces = Vec::new();
        let mut done = 0;
        for (end, piece) in &self.pieces {
            let start = end - piece.len();
            let (from, until) = (range.start.max(start), range.end.min(*end));
            if from < until {
                done += until - from;
                pieces.push((done, piece.slice(from - start..until - start)));
            }
        }
        Some(Self { pieces })
    }

    /// Fills `to` with the bytes from `at` on; `false` when there are too few.
    pub fn copy_to(&self, at: usize, to: &mut [u8]) -> bool {
        let Some(slices) = self.slices(at..at.saturating_add(to.len())) else {
            return false;
        };
        let mut done = 0;
        for slice in slices {
            to[done..done + slice.len()].copy_from_slice(slice);
            done += slice.len();
        }
        true
    }

    /// All bytes in one piece. They are copied if there are several pieces.
    pub fn together(self) -> Bytes {
        match self.pieces.as_slice() {
            [(_, one)] => one.clone(),
            _ => self.to_vec(0, self.len()).unwrap_or_default().into(),
        }
    }

    /// A copy of `len` bytes from `at` on; `None` when there are too few.
    pub fn to_vec(&self, at: usize, len: usize) -> Option<Vec<u8>> {
        let mut copy = Vec::with_capacity(len);
        self.slices(at..at.checked_add(len)?)?
            .for_each(|slice| copy.extend_from_slice(slice));
        Some(copy)
    }
}

impl FromIterator<u8> for Frames {
    fn from_iter<I: IntoIterator<Item = u8>>(bytes: I) -> Self {
        Self::from(bytes.into_iter().collect::<Vec<u8>>())
    }
}

impl From<Vec<u8>> for Frames {
    fn from(bytes: Vec<u8>) -> Self {
        Self::take(Bytes::from(bytes))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_read_like_one(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..9),
            at in 0..80usize,
            len in 0..80usize,
        ) {
            let whole: Vec<u8> = pieces.concat();
            let mut chained: Box<dyn Buf> = Box::new(Bytes::new());
            for piece in pieces {
                chained = Box::new(chained.chain(Bytes::from(piece)));
            }
            let frames = Frames::take(chained);
            prop_assert_eq!(frames.len(), whole.len());
            let expected = whole.get(at..at + len).map(<[u8]>::to_vec);
            let mut copied = vec![0; len];
            prop_assert_eq!(frames.copy_to(at, &mut copied), expected.is_some());
            if let Some(expected) = &expected {
                prop_assert_eq!(&copied, expected);
            }
            prop_assert_eq!(frames.to_vec(at, len), expected);
        }
    }
}
