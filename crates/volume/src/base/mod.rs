//! The basic types that the whole crate uses: units, ids, errors. Nothing here knows a store or a container.

pub(crate) mod asks;
pub mod cgroup;
pub mod checkpoint_id;
pub mod checksum;
pub(crate) mod clock;
pub mod control;
pub mod counters;
pub mod descriptors;
pub(crate) mod error;
pub mod geometry;
pub mod ids;
pub mod linger;
pub mod ownership;
pub mod prices;
pub mod repeats;
pub mod single_flight;
pub mod store_error;
pub(crate) mod stored_text;
pub mod units;
pub mod url;
pub(crate) mod volume_id;
pub mod volume_name;
pub mod wal_place;
