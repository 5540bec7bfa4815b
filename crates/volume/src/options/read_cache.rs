//! `cache_memory`, `cache_dir` and `cache_disk`: the cache of published data.

use std::path::PathBuf;

use super::OptionError;
use crate::base::units::{GIB, MIB};
use crate::index::cache_config::{NODE_CACHE_LEAST_BYTES, NodeCacheConfig, NodeCacheStrategy};
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

/// The part of the room that the index takes: the index of blocks of 4 KiB is less than a hundredth of the data, and each publish
/// stores some of it anew.
const NODES_PART: u64 = 16;

/// Room for the index's nodes beside the data, taken from that. The directory is the same: the files have other names.
pub(super) fn part_for_nodes(disk: &mut ReadCacheDisk) -> NodeCacheConfig {
    let size_bytes = (disk.size_bytes / NODES_PART).max(NODE_CACHE_LEAST_BYTES);
    disk.size_bytes -= size_bytes;
    NodeCacheConfig {
        path: disk.dir.clone(),
        size_bytes,
        strategy: NodeCacheStrategy::ReuseCache,
    }
}

// Both have at least two of the units in which a disk is taken and reclaimed.
const _: () = assert!(CACHE_DISK_LEAST_BYTES >= 2 * NODE_CACHE_LEAST_BYTES);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_and_index_share_the_room() {
        for (room, nodes) in [(64 * MIB, 32 * MIB), (512 * MIB, 32 * MIB), (10 * GIB, 640 * MIB)] {
            let mut disk = disk(MIB, Some("/c".into()), Some(room)).unwrap().unwrap();
            let config = part_for_nodes(&mut disk);
            assert_eq!((config.size_bytes, disk.size_bytes), (nodes, room - nodes));
            assert_eq!(config.path, disk.dir);
        }
    }

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
