//! Names of stored objects as numbers, for the location map, which knows nothing of the format.

use hyperfile::SegmentId;

use super::inode;

/// A segment object as a number: its checkpoint number, and part + 1, or 0 for a segment without parts.
pub(crate) fn object_of(segment: SegmentId) -> u64 {
    u64::from(segment.seq_id()) << 32 | segment.part_id().map_or(0, |p| u64::from(p) + 1)
}

/// The segment object of a number made by [`object_of`].
pub(crate) fn segment_of(object: u64) -> SegmentId {
    let seq = (object >> 32) as u32;
    match object as u32 {
        0 => SegmentId::new(seq),
        part => SegmentId::with_part(seq, (part - 1) as u16),
    }
}

/// The checkpoint that the object of a number made by [`object_of`] belongs to.
pub(crate) fn cno_of(object: u64) -> u64 {
    object >> 32
}

/// Whether a name below the root is one the format uses: `inode`, `NNNNNNNNNN` or `NNNNNNNNNN.<part>`.
pub(crate) fn is_container_object(name: &str) -> bool {
    let is_number = |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_digit());
    let (segment, part) = name.split_once('.').unwrap_or((name, "0"));
    name == inode::NAME || (segment.len() == 10 && is_number(segment) && is_number(part))
}

#[cfg(test)]
mod tests {
    use super::*;

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
