//! Numbers that stand for the names of stored objects. The location map uses them, which does not know the format.

use hyperfile::meta_format::{BLOCK_PTR_MAX_CHECKPOINT, BlockPtrFormat};
use hyperfile::segment::Segment;
use hyperfile::{BlockPtr, SegmentId};

use super::inode;

/// The number of a segment object: its checkpoint number, and its part + 1, or 0 for a segment without parts.
pub(crate) fn object_of(segment: SegmentId) -> u64 {
    u64::from(segment.seq_id()) << 32 | segment.part_id().map_or(0, |p| u64::from(p) + 1)
}

/// The segment object with a number that [`object_of`] made.
pub(crate) fn segment_of(object: u64) -> SegmentId {
    let seq = (object >> 32) as u32;
    match object as u32 {
        0 => SegmentId::new(seq),
        part => SegmentId::with_part(seq, (part - 1) as u16),
    }
}

/// The number of the object that a pointer of the parted format leads into.
pub(crate) fn of_pointer(pointer: BlockPtr) -> u64 {
    object_of(BlockPtrFormat::decode(&pointer, &BlockPtrFormat::PartedSegment).0)
}

/// The object of part `part` of this checkpoint number, as a number.
pub(crate) fn part_of(cno: u64, part: u16) -> u64 {
    cno << 32 | (u64::from(part) + 1)
}

/// The checkpoint that the object of a number made by [`object_of`] belongs to.
pub(crate) fn cno_of(object: u64) -> u64 {
    object >> 32
}

/// The checkpoint that a pointer of the index leads to: the same bits in every format of pointers (hyperfile 0.14.0,
/// `meta_format.rs`).
pub(crate) fn cno_of_pointer(pointer: u64) -> u64 {
    pointer >> 32 & BLOCK_PTR_MAX_CHECKPOINT
}

/// The name of the object of a number made by [`object_of`], below the container's root.
pub(crate) fn name_of(object: u64) -> String {
    Segment::segid_to_staging_file_id(segment_of(object))
}

/// The number of the object with this name; `None` when it is not the name of a segment object.
pub(crate) fn of_name(name: &str) -> Option<u64> {
    let cno: u64 = name.get(..10)?.parse().ok()?;
    if !(1..=BLOCK_PTR_MAX_CHECKPOINT).contains(&cno) {
        return None;
    }
    let object = object_of(Segment::object_of_file_id(name)?);
    // A number can be written in several ways, and only one of them is a name.
    (name_of(object) == name).then_some(object)
}

/// The objects that may hold the whole inode of this checkpoint.
pub(crate) fn summaries_of(cno: u64) -> [u64; 2] {
    [cno << 32, cno << 32 | 1]
}

/// Whether the object holds the whole inode of its checkpoint: it is part 0, or the only one.
pub(crate) fn is_summary(object: u64) -> bool {
    object as u32 <= 1
}

/// Whether a name below the root is one the format uses: `inode`, `NNNNNNNNNN` or `NNNNNNNNNN.<part>`.
pub(crate) fn is_container_object(name: &str) -> bool {
    let is_number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let (segment, part) = name.split_once('.').unwrap_or((name, "0"));
    name == inode::NAME || (segment.len() == 10 && is_number(segment) && is_number(part))
}

#[cfg(test)]
mod tests {
    use hyperfile::meta_format::BlockPtrFormat;

    use super::*;

    #[test]
    fn names_and_numbers_are_one_to_one() {
        for (name, object) in [
            ("0000000007", 7 << 32),
            ("0000000007.0", 7 << 32 | 1),
            ("0000000007.12", 7 << 32 | 13),
        ] {
            assert_eq!(of_name(name), Some(object), "{name}");
            assert_eq!(name_of(object), name);
            assert_eq!(is_summary(object), !name.ends_with("12"));
        }
        for name in [
            "inode",
            "7",
            "0000000007.",
            "0000000007.00",
            "0000000007.x",
            "0000000000",
            "9999999999",
            "00000000070",
        ] {
            assert_eq!(of_name(name), None, "{name}");
        }
    }

    #[test]
    fn objects_name_segments_both_ways() {
        for s in [
            SegmentId::new(7),
            SegmentId::with_part(7, 0),
            SegmentId::with_part((1 << 30) - 1, 16383),
        ] {
            assert_eq!(segment_of(object_of(s)), s);
            assert_eq!(cno_of(object_of(s)), s.as_cno());
        }
    }

    #[test]
    fn every_format_of_pointers_names_the_checkpoint_in_the_same_place() {
        for format in [
            BlockPtrFormat::Flat,
            BlockPtrFormat::MicroGroup,
            BlockPtrFormat::PartedSegment,
            BlockPtrFormat::StreamSegment,
        ] {
            for cno in [1, 77, BLOCK_PTR_MAX_CHECKPOINT - 1] {
                let segment = SegmentId::with_part(cno as u32, 3);
                let pointer = BlockPtrFormat::encode(segment, 5 * 4096, 9, &format);
                assert_eq!(cno_of_pointer(pointer), cno, "{format:?}");
            }
        }
    }

    /// A larger part or place is refused where it is packed into a pointer, and never masked. The engine's code does it.
    #[test]
    fn a_part_and_a_place_end_before_their_bits_do() {
        let packed = |part: u16, offset: usize| {
            let segment = SegmentId::with_part(7, part);
            let encode = || BlockPtrFormat::encode(segment, offset, 9, &BlockPtrFormat::PartedSegment);
            std::panic::catch_unwind(encode).is_ok()
        };
        let (parts, bytes) = (1_u16 << 14, 1_usize << 30);
        assert!(packed(parts - 1, bytes - 4096));
        assert!(!packed(parts, 0) && !packed(0, bytes));
    }

    #[test]
    fn only_the_formats_own_names_are_deleted() {
        for name in ["inode", "0000000001", "0000000001.0", "1073741823.16383"] {
            assert!(is_container_object(name), "{name}");
        }
        for name in [
            "",
            "inode.bak",
            "000000001",
            "0000000001.",
            "0000000001.x",
            "a/0000000001",
            "notes.txt",
        ] {
            assert!(!is_container_object(name), "{name}");
        }
    }
}
