//! A read/write block volume kept on S3 in the Hyperfile format.
//!
//! [`Volume`] is what an NBD server needs of a block device; [`admin`] is the life of a volume outside of serving it.
//! `docs/architecture.md` of the project has the map. This crate knows neither nbdkit nor a terminal.
#![deny(unsafe_code)]

pub mod admin;
pub mod base;
pub mod buffer_file;
pub mod check;
pub mod checkpoint;
pub mod compaction;
mod disk;
pub mod engine;
mod flatten;
pub(crate) mod format;
pub mod index;
pub mod lease;
pub mod meta;
pub mod metrics;
pub mod monitor;
pub mod open;
pub mod options;
pub mod past;
pub mod read;
pub mod readers;
pub mod repair;
pub mod replicate;
pub mod retention;
mod scrub;
pub mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transfer;
mod volume;
pub mod wal;
pub mod write_buffer;

pub use base::error::{ErrorKind, VolumeError};
pub use base::url::VolumeUrl;
pub use base::volume_id::VolumeId;
pub use base::wal_place::WalPlace;
pub use base::{cgroup, counters, descriptors, geometry, linger, repeats, units, url, volume_name};
pub use volume::{Extent, ExtentKind, Volume};
