//! The checksum of an image: SHA-256 over what is not zero in it. Pure.
//!
//! A checksum of every byte would cost as much for the zeros of a thin volume of 10 TiB as for 10 TiB of data. So it is made of
//! pieces of 64 KiB, the last one filled up with zeros: for each piece that is not all zeros, in their order, its offset in
//! bytes (8 bytes, the most significant first) and its SHA-256 (32 bytes); the SHA-256 of all that is the checksum. Zeros at
//! the end do not change it, so an image and the larger volume that it was written to have the same one.

use std::fmt::Write;

use sha2::{Digest, Sha256};

/// The name of this kind of checksum, as it is printed before it.
pub const CHECKSUM_NAME: &str = "sha256-64k";
/// Size of a piece in bytes.
pub const PIECE_BYTES: u64 = 64 << 10;

static ZEROS: [u8; PIECE_BYTES as usize] = [0; PIECE_BYTES as usize];

/// Whether all of it is zeros.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    // A comparison of memory, which is fast in every build.
    bytes.chunks(ZEROS.len()).all(|part| part == &ZEROS[..part.len()])
}

/// A piece that is not all zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PieceDigest {
    offset_bytes: u64,
    sha256: [u8; 32],
}

/// The digests of the pieces of `bytes`, which begin at `offset_bytes`, a multiple of [`PIECE_BYTES`]; a piece cut off by the end is
/// filled up with zeros.
pub(super) fn digests(offset_bytes: u64, bytes: &[u8]) -> Vec<PieceDigest> {
    debug_assert!(offset_bytes.is_multiple_of(PIECE_BYTES));
    let pieces = (offset_bytes..)
        .step_by(PIECE_BYTES as usize)
        .zip(bytes.chunks(PIECE_BYTES as usize));
    pieces
        .filter(|(_, piece)| !is_zero(piece))
        .map(|(offset_bytes, piece)| {
            let mut hasher = Sha256::new();
            hasher.update(piece);
            hasher.update(&ZEROS[piece.len()..]);
            PieceDigest {
                offset_bytes,
                sha256: hasher.finalize().into(),
            }
        })
        .collect()
}

/// A checksum that is being made.
#[derive(Debug, Clone, Default)]
pub(super) struct Checksum(Sha256);

impl Checksum {
    /// Takes in the next pieces, in the order of their offsets.
    pub fn add(&mut self, pieces: &[PieceDigest]) {
        for piece in pieces {
            self.0.update(piece.offset_bytes.to_be_bytes());
            self.0.update(piece.sha256);
        }
    }

    /// The checksum as it is printed: its kind, a colon, 64 hexadecimal digits.
    pub fn text(self) -> String {
        let mut text = format!("{CHECKSUM_NAME}:");
        for byte in self.0.finalize() {
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> String {
        let mut sum = Checksum::default();
        sum.add(&digests(0, bytes));
        sum.text()
    }

    /// As docs/transfer.md tells anyone to compute it.
    fn by_hand(bytes: &[u8]) -> String {
        let mut whole = Vec::new();
        for (number, piece) in bytes.chunks(65536).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                let mut piece = piece.to_vec();
                piece.resize(65536, 0);
                whole.extend((number as u64 * 65536).to_be_bytes());
                whole.extend(Sha256::digest(&piece));
            }
        }
        let hex: String = Sha256::digest(&whole)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        format!("sha256-64k:{hex}")
    }

    #[test]
    fn it_is_what_the_documentation_says() {
        let mut rng = fastrand::Rng::with_seed(5);
        for len in [0, 1, 65535, 65536, 65537, 300_000] {
            let mut bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(len).collect();
            assert_eq!(of(&bytes), by_hand(&bytes), "{len}");
            if len > 200_000 {
                bytes[65536..131_072].fill(0);
                assert_eq!(of(&bytes), by_hand(&bytes));
            }
        }
        // Computed with Python's hashlib.
        assert_eq!(
            of(&[]),
            "sha256-64k:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }

    #[test]
    fn every_bit_and_every_place_counts_and_zeros_at_the_end_do_not() {
        let mut bytes = vec![7_u8; 200_000];
        let whole = of(&bytes);
        for at in [0, 65535, 65536, 199_999] {
            bytes[at] ^= 1;
            assert_ne!(of(&bytes), whole, "{at}");
            bytes[at] ^= 1;
        }
        let mut moved = vec![0_u8; 65536];
        moved.extend(&bytes);
        assert_ne!(of(&moved), whole);
        bytes.resize(1 << 20, 0);
        assert_eq!(of(&bytes), whole);
    }

    #[test]
    fn parts_give_what_the_whole_gives() {
        let bytes: Vec<u8> = (0..400_000_u32).map(|n| (n % 251) as u8).collect();
        let mut sum = Checksum::default();
        for (number, part) in bytes.chunks(131_072).enumerate() {
            sum.add(&digests(number as u64 * 131_072, part));
        }
        assert_eq!(sum.text(), of(&bytes));
    }

    #[test]
    fn zeros_are_told_from_what_is_not() {
        let mut bytes = vec![0; 200_001];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in [0, 65536, 200_000] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }
}
