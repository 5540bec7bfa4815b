//! Checks whether bytes are a valid node of a container's index (pure: no clock, no I/O).
//!
//! The format has no checksum for a node. Where an object carries checksums (`store/interceptors/window_checksums.rs`),
//! they decide. This check is for the other objects. It keeps bytes that no writer makes from the tree's code, which
//! trusts what it is given.

use hyperfile::meta_format::BlockPtrFormat;

/// Size of an index node in bytes. The format has no other size.
pub(crate) const NODE_BYTES: usize = 4096;
const HEADER_BYTES: usize = 8;
const SLOT_BYTES: usize = 8;
const FLAG_LARGE: u8 = 1;
const FLAG_LEAF: u8 = 2;
/// Level of a leaf.
pub(crate) const LEAF_LEVEL: u8 = 1;
const LEVEL_MAX: u8 = 14;

/// Checks that `node` has the layout of an index node, with ascending keys and pointers that name objects.
///
/// # Errors
/// A text that says what is wrong.
pub(crate) fn check(node: &[u8]) -> Result<(), String> {
    if node.len() != NODE_BYTES {
        return Err(format!("it has {} bytes", node.len()));
    }
    check_entries(node, 1)
}

/// As [`check`], for the root of an index, which is in the inode. It is a small node, or a list of pointers, one for
/// each block.
///
/// # Errors
/// A text that says what is wrong.
pub(super) fn check_root(root: &[u8]) -> Result<(), String> {
    if root[0] & FLAG_LARGE != 0 {
        return check_entries(root, 0);
    }
    for index in 0..(root.len() - HEADER_BYTES) / SLOT_BYTES {
        let pointer = slot(root, index);
        if !BlockPtrFormat::is_invalid_value(&pointer) && !names_data(pointer) {
            return Err(format!("its pointer {pointer:#x} names no object"));
        }
    }
    Ok(())
}

/// The level of a node that was checked: 1 for leaves.
pub(super) fn level(node: &[u8]) -> usize {
    usize::from(node[1])
}

/// The first key of a node that was checked.
pub(super) fn first_key(node: &[u8]) -> u64 {
    slot(node, 0)
}

fn check_entries(node: &[u8], count_min: usize) -> Result<(), String> {
    // The number of keys, and of values, that fit into the node.
    let capacity = (node.len() - HEADER_BYTES) / (2 * SLOT_BYTES);
    let (flags, level) = (node[0], node[1]);
    let count = usize::from(u16::from_le_bytes([node[2], node[3]]));
    let is_leaf = level == LEAF_LEVEL;
    if flags & !(FLAG_LARGE | FLAG_LEAF) != 0
        || !(LEAF_LEVEL..=LEVEL_MAX).contains(&level)
        || (flags & FLAG_LEAF != 0) != is_leaf
    {
        return Err(format!("its flags are {flags:#x} at level {level}"));
    }
    if !(count_min..=capacity).contains(&count) {
        return Err(format!("it claims {count} entries"));
    }
    for index in 0..count {
        if index > 0 && slot(node, index - 1) >= slot(node, index) {
            let (before, key) = (slot(node, index - 1), slot(node, index));
            return Err(format!("its keys {before} and {key} are out of order"));
        }
        let pointer = slot(node, capacity + index);
        let is_valid = names_an_object(pointer) || (is_leaf && names_data(pointer));
        if !is_valid {
            return Err(format!("its pointer {pointer:#x} names no object"));
        }
    }
    Ok(())
}

/// The contents of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    /// Its level: [`LEAF_LEVEL`] for a leaf.
    pub level: u8,
    /// Keys and pointers, ascending by key. In a leaf the pointers are blocks of data, elsewhere the nodes below.
    pub entries: Vec<(u64, u64)>,
}

/// Reads a node.
///
/// # Errors
/// What is wrong, as [`check`].
pub(crate) fn decode(node: &[u8]) -> Result<Node, String> {
    check(node)?;
    Ok(decode_checked(node))
}

/// Reads the root of an index, which the inode holds. A root that holds pointers alone is a leaf.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn decode_root(root: &[u8]) -> Result<Node, String> {
    check_root(root)?;
    if root[0] & FLAG_LARGE != 0 {
        return Ok(decode_checked(root));
    }
    let pointers =
        (0..(root.len() - HEADER_BYTES) / SLOT_BYTES).map(|index| (index as u64, slot(root, index)));
    Ok(Node {
        level: LEAF_LEVEL,
        entries: pointers
            .filter(|(_, pointer)| !BlockPtrFormat::is_invalid_value(pointer))
            .collect(),
    })
}

fn decode_checked(node: &[u8]) -> Node {
    let capacity = (node.len() - HEADER_BYTES) / (2 * SLOT_BYTES);
    let count = usize::from(u16::from_le_bytes([node[2], node[3]]));
    Node {
        level: node[1],
        entries: (0..count)
            .map(|index| (slot(node, index), slot(node, capacity + index)))
            .collect(),
    }
}

fn slot(node: &[u8], index: usize) -> u64 {
    let at = HEADER_BYTES + index * SLOT_BYTES;
    let mut bytes = [0; SLOT_BYTES];
    bytes.copy_from_slice(&node[at..at + SLOT_BYTES]);
    u64::from_le_bytes(bytes)
}

fn names_an_object(pointer: u64) -> bool {
    BlockPtrFormat::is_on_staging(&pointer) && BlockPtrFormat::decode_segid(&pointer).seq_id() != 0
}

fn names_data(pointer: u64) -> bool {
    BlockPtrFormat::is_zero_block(&pointer) || names_an_object(pointer)
}

#[cfg(test)]
mod tests {
    use hyperfile::SegmentId;

    use super::*;

    /// The number of keys, and of values, that fit into a node.
    const CAPACITY: usize = 255;

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
    #[test]
    fn roots_are_small_nodes_or_pointers_alone() {
        let mut empty = [0; 56];
        empty[0] = FLAG_LEAF;
        assert_eq!(check_root(&empty), Ok(()));
        let mut direct = empty;
        direct[16..24].copy_from_slice(&pointer(4).to_le_bytes());
        assert_eq!(check_root(&direct), Ok(()));
        direct[23] ^= 0x40;
        assert!(check_root(&direct).unwrap_err().contains("names no object"));
        let mut large = [0; 56];
        (large[0], large[1], large[2]) = (FLAG_LARGE, 2, 1);
        large[32..40].copy_from_slice(&pointer(4).to_le_bytes());
        assert_eq!(check_root(&large), Ok(()));
        large[1] = 130;
        assert!(check_root(&large).unwrap_err().contains("level 130"));
        (large[1], large[2]) = (2, 4);
        assert!(check_root(&large).unwrap_err().contains("4 entries"));
    }
}
