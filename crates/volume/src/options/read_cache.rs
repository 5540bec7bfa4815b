//! `cache_memory`, `cache_dir` and `cache_disk`: the cache of published data.

use std::path::PathBuf;

use super::OptionError;
use crate::base::units::{GIB, MIB};
use crate::read::cache_config::ReadCacheDisk;

/// The least memory of a read cache that is not off.
pub const CACHE_MEMORY_LEAST_BYTES: u64 = 16 * MIB;
/// The least room on a disk.
pub const CACHE_DISK_LEAST_BYTES: u64 = 64 * MIB;
/// The room on a disk when none is given.
const CACHE_DISK_DEFAULT_BYTES: u64 = 10 * GIB;

/// The disk that `cache_dir` and `cache_disk` name together.
pub(super) fn disk(
    memory_bytes: u64,
    dir: Option<PathBuf>,
    size_bytes: Option<u64>,
) -> Result<Option<ReadCacheDisk>, OptionError> {
    let Some(dir) = dir else {
        return match size_bytes {
            None => Ok(None),
            Some(_) => Err(OptionError::Missing {
                key: "cache_disk",
                reason: "needs cache_dir, the directory to use",
            }),
        };
    };
    if memory_bytes == 0 {
        return Err(OptionError::Missing {
            key: "cache_dir",
            reason: "needs cache_memory: what is read from the disk passes through it",
        });
    }
    Ok(Some(ReadCacheDisk {
        dir,
        size_bytes: size_bytes.unwrap_or(CACHE_DISK_DEFAULT_BYTES),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_needs_a_directory_and_memory() {
        let dir = || Some(PathBuf::from("/c"));
        assert_eq!(disk(MIB, None, None).unwrap(), None);
        let found = disk(MIB, dir(), None).unwrap().unwrap();
        assert_eq!((found.dir, found.size_bytes), (PathBuf::from("/c"), 10 * GIB));
        assert_eq!(disk(MIB, dir(), Some(GIB)).unwrap().unwrap().size_bytes, GIB);
        assert!(
            disk(MIB, None, Some(GIB))
                .unwrap_err()
                .to_string()
                .contains("cache_dir")
        );
        assert!(
            disk(0, dir(), None)
                .unwrap_err()
                .to_string()
                .contains("cache_memory")
        );
    }
}
