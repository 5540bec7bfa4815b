//! The checksum of WAL records and of stored objects. Pure.

use crc_fast::CrcAlgorithm;

/// CRC-32C (Castagnoli), as in iSCSI (RFC 3720).
pub fn crc32c(bytes: &[u8]) -> u32 {
    // The result of a 32-bit algorithm.
    crc_fast::checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}
