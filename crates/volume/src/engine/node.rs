//! Whether bytes can be a node of a container's index (pure: no clock, no I/O).
//!
//! The format has no checksum for a node. Where an object carries check values (`store/seal.rs`) they decide; this is for
//! the others, and keeps the tree's code, which trusts what it is given, from anything that no writer makes.

use hyperfile::meta_format::BlockPtrFormat;

/// Size of an index node in bytes; the format has no other.
pub(super) const NODE_BYTES: usize = 4096;
const HEADER_BYTES: usize = 8;
const SLOT_BYTES: usize = 8;
/// Keys, and values, that a node has room for.
const CAPACITY: usize = (NODE_BYTES - HEADER_BYTES) / (2 * SLOT_BYTES);
const FLAG_LARGE: u8 = 1;
const FLAG_LEAF: u8 = 2;
const LEAF_LEVEL: u8 = 1;
const LEVEL_MAX: u8 = 14;

/// Looks whether `node` is laid out as an index node is, with ascending keys and pointers that name objects.
///
/// # Errors
/// What is wrong.
pub(super) fn check(node: &[u8]) -> Result<(), String> {
    if node.len() != NODE_BYTES {
        return Err(format!("it has {} bytes", node.len()));
    }
    let (flags, level) = (node[0], node[1]);
    let count = usize::from(u16::from_le_bytes([node[2], node[3]]));
    let is_leaf = level == LEAF_LEVEL;
    if flags & !(FLAG_LARGE | FLAG_LEAF) != 0
        || !(LEAF_LEVEL..=LEVEL_MAX).contains(&level)
        || (flags & FLAG_LEAF != 0) != is_leaf
    {
        return Err(format!("its flags are {flags:#x} at level {level}"));
    }
    if !(1..=CAPACITY).contains(&count) {
        return Err(format!("it claims {count} entries"));
    }
    let slot = |index: usize| {
        let at = HEADER_BYTES + index * SLOT_BYTES;
        let mut bytes = [0; SLOT_BYTES];
        bytes.copy_from_slice(&node[at..at + SLOT_BYTES]);
        u64::from_le_bytes(bytes)
    };
    for index in 0..count {
        if index > 0 && slot(index - 1) >= slot(index) {
            return Err(format!(
                "its keys {} and {} are out of order",
                slot(index - 1),
                slot(index)
            ));
        }
        let pointer = slot(CAPACITY + index);
        let is_zero_block = is_leaf && BlockPtrFormat::is_zero_block(&pointer);
        let names_an_object =
            BlockPtrFormat::is_on_staging(&pointer) && BlockPtrFormat::decode_segid(&pointer).seq_id() != 0;
        if !is_zero_block && !names_an_object {
            return Err(format!("its pointer {pointer:#x} names no object"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use hyperfile::SegmentId;

    use super::*;

    fn node(level: u8, entries: &[(u64, u64)]) -> Vec<u8> {
        let mut node = vec![0; NODE_BYTES];
        node[0] = if level == LEAF_LEVEL { FLAG_LEAF } else { 0 };
        node[1] = level;
        node[2..4].copy_from_slice(&(entries.len() as u16).to_le_bytes());
        for (index, (key, pointer)) in entries.iter().enumerate() {
            let (keys, values) = (HEADER_BYTES, HEADER_BYTES + CAPACITY * SLOT_BYTES);
            node[keys + index * 8..][..8].copy_from_slice(&key.to_le_bytes());
            node[values + index * 8..][..8].copy_from_slice(&pointer.to_le_bytes());
        }
        node
    }

    fn pointer(cno: u32) -> u64 {
        BlockPtrFormat::encode(
            SegmentId::with_part(cno, 0),
            4096,
            0,
            &BlockPtrFormat::PartedSegment,
        )
    }

    #[test]
    fn nodes_are_told_from_what_no_writer_makes() {
        let zero = BlockPtrFormat::new_zero_block();
        let full: Vec<_> = (0..CAPACITY as u64).map(|key| (key, pointer(3))).collect();
        for good in [
            node(1, &[(7, pointer(1))]),
            node(1, &[(0, zero), (5, pointer(2))]),
            node(2, &[(0, pointer(1)), (255, pointer(9))]),
            node(1, &full),
        ] {
            assert_eq!(check(&good), Ok(()));
        }
        let mut too_many = node(1, &full);
        too_many[2] = too_many[2].wrapping_add(1);
        let mut strange_flag = node(1, &[(7, pointer(1))]);
        strange_flag[0] |= 0x40;
        let mut other_level = node(1, &[(7, pointer(1))]);
        other_level[1] = 3;
        for (bad, why) in [
            (vec![0; NODE_BYTES], "level 0"),
            (vec![0xFF; NODE_BYTES], "flags"),
            (vec![0; 100], "100 bytes"),
            (node(15, &[(7, pointer(1))]), "level 15"),
            (node(1, &[]), "0 entries"),
            (too_many, "entries"),
            (strange_flag, "flags"),
            (other_level, "level 3"),
            (node(1, &[(7, pointer(1)), (7, pointer(1))]), "out of order"),
            (node(1, &[(9, pointer(1)), (7, pointer(1))]), "out of order"),
            (node(1, &[(7, 0)]), "names no object"),
            (node(1, &[(7, pointer(0))]), "names no object"),
            (node(2, &[(7, zero)]), "names no object"),
        ] {
            let found = check(&bad).unwrap_err();
            assert!(found.contains(why), "{found}");
        }
    }
}
