//! Reading published data.
//!
//! * [`location`] (pure): where each block lies, as extents, in bounded memory.

pub mod location;
