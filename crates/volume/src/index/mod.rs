//! The published index: the place of each block, looked up without the owner thread.
//!
//! * [`location_map`] (pure): where blocks lie, as extents, in bounded memory.
//! * `lookup`: looks up what the map does not know, below the newest published root.
//! * `walk`: a stored index, leaf by leaf.
//! * `loader`: index nodes from the store, checked; `checksums`: the check values that they are proved by.
//! * [`cache`], `cache_files`, `cache_config`: index nodes in memory and on a disk.
//! * `relocation`: what of some objects an index refers to, and its change to where that was copied; `origins`: where copies were
//!   written first.
//! * `diff`: what differs between two indexes; `usage`: what one refers to.

pub mod cache;
pub(crate) mod cache_config;
mod cache_files;
pub(crate) mod checksums;
pub(crate) mod diff;
pub(crate) mod inspect;
pub(crate) mod loader;
pub mod location_map;
pub(crate) mod lookup;
pub(crate) mod origins;
pub mod relocation;
pub(crate) mod usage;
pub(crate) mod walk;
