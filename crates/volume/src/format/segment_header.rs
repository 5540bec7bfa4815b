//! Segment headers: checks whether bytes are a valid one.

use hyperfile::ondisk::SegmentHeader;

use super::node::NODE_BYTES;

/// Decodes the header of an object of `object_bytes` from the object's first bytes.
///
/// # Errors
/// A text that says what is wrong.
pub(crate) fn decode_header(bytes: &[u8], object_bytes: u64) -> Result<SegmentHeader, String> {
    let bytes = bytes.get(..SegmentHeader::size());
    let header = SegmentHeader::from_slice(bytes.ok_or("it is too short for a segment")?);
    check_claims(&header, object_bytes)?;
    Ok(header)
}

/// Checks that an object of `object_bytes` can hold the index that its header claims, because the engine allocates as
/// much memory as the header says.
pub(crate) fn check_claims(header: &SegmentHeader, object_bytes: u64) -> Result<(), String> {
    if !header.has_magic() {
        return Err("it does not begin as a segment does".into());
    }
    if u32::from(header.s_meta_blk_shift) != NODE_BYTES.ilog2() {
        return Err(format!(
            "its header claims index nodes of 2^{} bytes",
            header.s_meta_blk_shift
        ));
    }
    let index_bytes = u64::from(header.s_nmetablk) << header.s_meta_blk_shift;
    let claimed = (header.aligned_ss_bytes() as u64).saturating_add(index_bytes);
    if claimed > object_bytes {
        return Err(format!(
            "its header claims an index of {claimed} bytes, the object has {object_bytes}"
        ));
    }
    Ok(())
}
