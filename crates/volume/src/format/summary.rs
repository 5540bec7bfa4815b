//! What an object of the parted format says of its own content: which blocks lie in it, and where its index nodes are. Pure.
//!
//! An object's summary names what was written to it, not what is live in it: only an index can tell that.

use std::ops::Range;

use hyperfile::ondisk::SegmentHeader;

use super::node::{self, NODE_BYTES};
use super::segment_header::decode_header;

/// Bytes of one entry: a block and its pointer (hyperfile 0.14.0, `ondisk.rs`).
const ENTRY_BYTES: usize = 16;

/// What lies in one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Summary {
    /// Where its nodes of the index are, in bytes from its start.
    pub nodes: Range<u64>,
    /// The blocks in it, with the pointer that an index has while it refers to them.
    pub blocks: Vec<(u64, u64)>,
}

/// Bytes that summary and nodes take at most in an object of `object_bytes` with blocks of `block_bytes`, if it has few nodes: what to
/// ask for at first.
pub(crate) fn likely_bytes(object_bytes: u64, block_bytes: u64) -> u64 {
    let entries = (object_bytes / block_bytes.max(1)).saturating_mul(ENTRY_BYTES as u64);
    entries.saturating_add(16 * NODE_BYTES as u64).min(object_bytes)
}

/// The bytes that summary and nodes of an object take, which begins with `bytes`.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn needed_bytes(bytes: &[u8], object_bytes: u64) -> Result<u64, String> {
    header(bytes, object_bytes).map(|(_, nodes)| nodes.end)
}

fn header(bytes: &[u8], object_bytes: u64) -> Result<(SegmentHeader, Range<u64>), String> {
    let header = decode_header(bytes, object_bytes)?;
    if header.is_stream() {
        return Err("it is of the stream format".into());
    }
    let summary_bytes = (SegmentHeader::size() as u64)
        .saturating_add(u64::from(header.s_ndatablk).saturating_mul(ENTRY_BYTES as u64));
    if summary_bytes > u64::from(header.s_bytes) {
        return Err(format!(
            "its header claims {} blocks in a summary of {} bytes",
            header.s_ndatablk, header.s_bytes
        ));
    }
    let start = header.aligned_ss_bytes() as u64;
    let end = start + (u64::from(header.s_nmetablk) << header.s_meta_blk_shift);
    Ok((header, start..end))
}

/// The summary of an object that begins with `bytes`, which must reach to the end of its nodes.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn decode(bytes: &[u8], object_bytes: u64) -> Result<Summary, String> {
    let (header, nodes) = header(bytes, object_bytes)?;
    let first = SegmentHeader::size();
    let entries = bytes.get(first..first + header.s_ndatablk as usize * ENTRY_BYTES);
    let entries = entries.ok_or("it ends within its summary")?;
    let number = |bytes: &[u8]| {
        bytes
            .iter()
            .rev()
            .fold(0, |high, byte| high << 8 | u64::from(*byte))
    };
    let blocks = entries
        .chunks_exact(ENTRY_BYTES)
        .map(|entry| (number(&entry[..8]), number(&entry[8..])));
    Ok(Summary {
        nodes,
        blocks: blocks.collect(),
    })
}

/// The nodes in `bytes`, an object's node region: where each is from its start, its level (1 for leaves) and its first key. What is no
/// node is passed over.
pub(crate) fn nodes(bytes: &[u8]) -> impl Iterator<Item = (u64, usize, u64)> {
    let all = bytes.chunks_exact(NODE_BYTES).enumerate();
    all.filter(|(_, bytes)| node::check(bytes).is_ok())
        .map(|(at, bytes)| {
            (
                (at * NODE_BYTES) as u64,
                node::level(bytes),
                node::first_key(bytes),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An object with these blocks.
    fn object(blocks: &[(u64, u64)], nodes: u32) -> Vec<u8> {
        let mut header = SegmentHeader::new();
        header.s_meta_blk_shift = 12;
        header.s_data_blk_shift = 12;
        header.s_nmetablk = nodes;
        header.s_ndatablk = blocks.len() as u32;
        header.s_bytes = (SegmentHeader::size() + blocks.len() * ENTRY_BYTES) as u32;
        let mut bytes = vec![0; header.aligned_ss_bytes() + nodes as usize * NODE_BYTES];
        header.write_to(&mut bytes);
        for (at, (block, pointer)) in blocks.iter().enumerate() {
            let place = SegmentHeader::size() + at * ENTRY_BYTES;
            bytes[place..place + 8].copy_from_slice(&block.to_le_bytes());
            bytes[place + 8..place + 16].copy_from_slice(&pointer.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn a_summary_tells_blocks_and_nodes() {
        let blocks: Vec<(u64, u64)> = (0..500).map(|at| (at * 3, 1 << 62 | at)).collect();
        let bytes = object(&blocks, 2);
        let len = bytes.len() as u64;
        assert_eq!(needed_bytes(&bytes[..4096], len), Ok(len));
        let summary = decode(&bytes, len).unwrap();
        assert_eq!(summary.blocks, blocks);
        assert_eq!(summary.nodes, len - 8192..len);
        assert!(likely_bytes(len + 500 * 4096, 4096) >= len);
    }

    #[test]
    fn a_summary_that_cannot_be_is_refused() {
        let bytes = object(&[(1, 2); 300], 1);
        let len = bytes.len() as u64;
        assert!(decode(&bytes[..4096], len).unwrap_err().contains("within"));
        assert!(decode(&bytes, len - 1).unwrap_err().contains("claims"));
        let mut header = SegmentHeader::read_from(&bytes);
        header.s_ndatablk += 1;
        let mut changed = bytes.clone();
        header.write_to(&mut changed);
        assert!(decode(&changed, len).unwrap_err().contains("301 blocks"));
    }
}
