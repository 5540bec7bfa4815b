//! A read/write block volume kept on S3 in the Hyperfile format.
//!
//! [`Volume`] is what an NBD server needs of a block device; [`admin`] is the life of a volume outside of serving it.
//! `docs/architecture.md` of the project has the map. This crate knows neither nbdkit nor a terminal.
#![deny(unsafe_code)]

pub mod admin;
pub mod buffer_file;
mod cache_state;
pub mod catalogue;
mod checksum;
mod clock;
pub mod counters;
mod disk;
pub mod durability;
pub mod engine;
mod error;
pub mod geometry;
pub mod history;
pub mod lease;
pub mod limits;
pub mod log;
pub mod options;
pub mod past;
pub mod read;
pub mod readers;
#[cfg(test)]
mod simulation;
pub mod store;
mod stored_text;
pub mod transfer;
pub mod units;
pub mod url;
mod volume;
mod volume_id;
pub mod writeback;

pub use error::{ErrorKind, VolumeError};
pub use url::VolumeUrl;
pub use volume::{Extent, ExtentKind, Volume};
pub use volume_id::VolumeId;
