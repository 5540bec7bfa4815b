//! Reading published data.
//!
//! * `read_path`: the course of one read from look-up to bytes, through the parts below and the index.
//! * [`reader`]: reads stored bytes: from the cache, from a fetch in flight, or with a fetch of its own.
//! * [`coalesce`] (pure): which bytes are read with one request.
//! * [`cache`]: pages of stored data, in memory and on a local disk.
//! * `write_through` (pure): which published blocks enter it.
//! * [`priority_gate`]: which request goes to the store next.
//! * [`hedge`] (pure): when a slow request is sent a second time.
//! * [`read_ahead`] (pure): what to read ahead.

pub mod cache;
pub(crate) mod cache_config;
pub mod coalesce;
pub mod hedge;
pub mod priority_gate;
pub mod read_ahead;
pub(crate) mod read_path;
pub mod reader;
mod write_through;
