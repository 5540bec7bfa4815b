//! The write-ahead log: a flush in one PUT, or in one fdatasync.
//!
//! * [`record`] (pure): framing of record groups.
//! * [`replay`] (pure): what is applied when a volume is opened, and where the end of a log is sealed.
//! * [`group_commit`] (pure): which flush is made durable by which group.

pub mod group_commit;
pub mod record;
pub mod replay;
