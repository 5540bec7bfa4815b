//! Unpublished writes in memory: where they are held, how much memory they may take, and which of them the WAL lacks.
//!
//! * [`generation`] (pure): one checkpoint's worth of writes at byte granularity.
//! * [`overlay`]: the active generation and the frozen ones being published, behind their locks.
//! * [`wal_delta`] (pure): which changes the WAL does not have yet.
//! * [`quota`]: the room in the write buffer, and the writers that wait for it.
//! * [`throttle`] (pure): how long a writer is slowed as the buffer fills.
//! * [`policy`] (pure): every threshold, in one table.
//! * [`progress`]: whether the publish of a generation makes progress.
//! * [`backlog`]: how far durability is behind.

pub mod backlog;
pub mod generation;
pub mod overlay;
pub mod policy;
pub mod progress;
pub mod quota;
pub mod throttle;
pub mod wal_delta;
