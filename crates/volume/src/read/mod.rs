//! Reading published data.
//!
//! * [`location`] (pure): where each block lies, as extents, in bounded memory.
//! * [`reader`]: reads stored bytes: from the cache, from a fetch under way, or with one of its own.
//! * [`coalesce`] (pure): what is read with one request.
//! * [`cache`]: pages of stored data, in memory and on a disk.
//! * [`single_flight`]: one fetch for all who want the same bytes.
//! * [`gate`]: who may ask the store next.
//! * [`hedge`] (pure): when a slow request is asked a second time.
//! * [`window`] (pure): what to read ahead.

pub mod cache;
pub mod coalesce;
pub mod gate;
pub mod hedge;
pub mod location;
pub mod reader;
pub mod window;
