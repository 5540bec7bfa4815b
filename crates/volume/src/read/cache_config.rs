//! The cache of published data, as it is set.

use std::path::PathBuf;

use crate::base::units::MIB;

/// Cache of published data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadCacheConfig {
    /// Memory, in bytes; 0 for no cache.
    pub memory_bytes: u64,
    /// A disk below it.
    pub disk: Option<ReadCacheDisk>,
}

impl Default for ReadCacheConfig {
    fn default() -> Self {
        Self {
            memory_bytes: 256 * MIB,
            disk: None,
        }
    }
}

/// Room for a read cache on a local disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadCacheDisk {
    /// Absolute path of a directory, made when it is missing; each volume has its own below it.
    pub dir: PathBuf,
    /// Room in bytes.
    pub size_bytes: u64,
}
