//! The configuration of the read cache.

use std::path::PathBuf;

use crate::base::units::MIB;

/// Configuration of the cache of published data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadCacheConfig {
    /// Memory, in bytes; 0 for no cache.
    pub memory_bytes: u64,
    /// The local disk that holds more pages than memory, if there is one.
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

/// Space for a read cache on a local disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadCacheDisk {
    /// Absolute path of a directory, which is made when it is missing. Each volume has a directory of its own in it.
    pub dir: PathBuf,
    /// The space in bytes.
    pub size_bytes: u64,
}
