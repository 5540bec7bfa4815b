//! `node_cache_config=TYPE,PATH,SIZE,STRATEGY`: the engine's cache of index nodes on a local disk.

use std::path::{Path, PathBuf};

use crate::base::units::{MIB, UnitError, parse_size};

/// The least size that the engine accepts, in bytes. Smaller sizes are raised to it.
pub const NODE_CACHE_LEAST_BYTES: u64 = 32 * MIB;
/// The default of `index_memory` in bytes: the index of 16 GiB of data in blocks of 4 KiB that were written in order.
pub const INDEX_MEMORY_DEFAULT_BYTES: u64 = 64 * MIB;

/// Configuration of the cache of index nodes on a local disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeCacheConfig {
    /// Absolute path of the directory, which is made when it is missing.
    pub path: PathBuf,
    /// Space on the disk in bytes; at least [`NODE_CACHE_LEAST_BYTES`].
    pub size_bytes: u64,
    /// What happens to the contents that an earlier run left.
    pub strategy: NodeCacheStrategy,
}

/// What a node cache does with the contents that an earlier run left in its directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeCacheStrategy {
    /// Keeps and uses them.
    ReuseCache,
    /// Keeps the files and drops their contents.
    ReuseSpace,
    /// Starts with an empty directory.
    Recreate,
}

/// A node cache configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeCacheError {
    /// The text does not have four fields.
    #[error("the form is TYPE,PATH,SIZE,STRATEGY, as in LocalDisk,/var/cache/hypernbd,1G,ReuseCache")]
    Form,
    /// The type is not the one supported type.
    #[error("\"{0}\" is not a type of cache; the only one is LocalDisk")]
    Type(String),
    /// The path could not be made absolute.
    #[error("\"{0}\" is not a usable path; write the absolute path of a directory")]
    Path(String),
    /// The size is not a valid size.
    #[error(transparent)]
    Size(#[from] UnitError),
    /// There is no such strategy.
    #[error("\"{0}\" is not a strategy; the strategies are ReuseCache, ReuseSpace, Recreate and Disabled")]
    Strategy(String),
}

impl NodeCacheConfig {
    /// Parses `TYPE,PATH,SIZE,STRATEGY`. The path may contain commas, and the size may have a suffix. Returns `None`
    /// for the strategy `Disabled`. When the size had to be raised, the second value is the requested size in bytes.
    ///
    /// # Errors
    /// [`NodeCacheError`], which names the field.
    pub fn parse(text: &str) -> Result<(Option<Self>, Option<u64>), NodeCacheError> {
        let (kind, rest) = text.split_once(',').ok_or(NodeCacheError::Form)?;
        let (rest, strategy) = rest.rsplit_once(',').ok_or(NodeCacheError::Form)?;
        let (path, size) = rest.rsplit_once(',').ok_or(NodeCacheError::Form)?;
        if kind != "LocalDisk" {
            return Err(NodeCacheError::Type(kind.to_string()));
        }
        let strategy = match strategy {
            "ReuseCache" => Some(NodeCacheStrategy::ReuseCache),
            "ReuseSpace" => Some(NodeCacheStrategy::ReuseSpace),
            "Recreate" => Some(NodeCacheStrategy::Recreate),
            "Disabled" => None,
            _ => return Err(NodeCacheError::Strategy(strategy.to_string())),
        };
        let asked_bytes = parse_size(size)?;
        let path = absolute(path).ok_or_else(|| NodeCacheError::Path(path.to_string()))?;
        let Some(strategy) = strategy else {
            return Ok((None, None));
        };
        let size_bytes = asked_bytes.max(NODE_CACHE_LEAST_BYTES);
        let raised_from = (size_bytes != asked_bytes).then_some(asked_bytes);
        Ok((
            Some(Self {
                path,
                size_bytes,
                strategy,
            }),
            raised_from,
        ))
    }
}

/// The absolute form of a path, which is needed because a server changes its directory. `None` for an empty path and
/// for the root directory.
pub(crate) fn absolute(path: &str) -> Option<PathBuf> {
    let path = std::path::absolute(path).ok()?;
    (path != Path::new("/")).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_size_is_the_engines() {
        assert_eq!(
            NODE_CACHE_LEAST_BYTES,
            hyperfile::node_cache::config::MIN_CAPACITY as u64
        );
    }

    #[test]
    fn sizes_below_the_least_are_raised() {
        let (config, raised_from) =
            NodeCacheConfig::parse("LocalDisk,/tmp/hypernbd/,16777216,Recreate").unwrap();
        let expected = NodeCacheConfig {
            path: "/tmp/hypernbd/".into(),
            size_bytes: NODE_CACHE_LEAST_BYTES,
            strategy: NodeCacheStrategy::Recreate,
        };
        assert_eq!((config, raised_from), (Some(expected), Some(16 * MIB)));
    }

    #[test]
    fn paths_are_made_absolute() {
        let (config, raised_from) = NodeCacheConfig::parse("LocalDisk,cache,64M,ReuseSpace").unwrap();
        let config = config.unwrap();
        assert_eq!(config.path, std::env::current_dir().unwrap().join("cache"));
        assert_eq!(config.strategy, NodeCacheStrategy::ReuseSpace);
        assert_eq!((config.size_bytes, raised_from), (64 * MIB, None));
    }

    #[test]
    fn disabled_is_no_cache() {
        assert_eq!(
            NodeCacheConfig::parse("LocalDisk,/tmp/x,1,Disabled"),
            Ok((None, None))
        );
    }

    #[test]
    fn bad_fields_are_named() {
        for (text, error) in [
            ("", NodeCacheError::Form),
            ("LocalDisk,/tmp/x,64M", NodeCacheError::Form),
            (
                "Memory,/tmp/x,64M,Recreate",
                NodeCacheError::Type("Memory".into()),
            ),
            ("LocalDisk,,64M,Recreate", NodeCacheError::Path("".into())),
            ("LocalDisk,/,64M,Recreate", NodeCacheError::Path("/".into())),
            (
                "LocalDisk,/tmp/x,big,Recreate",
                NodeCacheError::Size(UnitError::Size { value: "big".into() }),
            ),
            (
                "LocalDisk,/tmp/x,64M,recreate",
                NodeCacheError::Strategy("recreate".into()),
            ),
        ] {
            assert_eq!(NodeCacheConfig::parse(text), Err(error), "{text}");
        }
    }
}
