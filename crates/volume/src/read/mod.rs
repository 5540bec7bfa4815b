//! Reading published data.
//!
//! * `read_path`: one read from look-up to bytes: what the rest of this folder and the index do for it, and in which order.
//! * [`reader`]: reads stored bytes: from the cache, from a fetch under way, or with one of its own.
//! * [`coalesce`] (pure): what is read with one request.
//! * [`cache`]: pages of stored data, in memory and on a disk.
//! * [`priority_gate`]: who may ask the store next.
//! * [`hedge`] (pure): when a slow request is asked a second time.
//! * [`read_ahead`] (pure): what to read ahead.

pub mod cache;
pub(crate) mod cache_config;
pub mod coalesce;
pub mod hedge;
pub mod priority_gate;
pub mod read_ahead;
pub(crate) mod read_path;
pub mod reader;
