//! Unpublished writes and when they are published.
//!
//! * [`generation`] (pure): one checkpoint's worth of writes at byte granularity.
//! * [`overlay`]: the active generation and the frozen ones being published, behind their locks.
//! * [`state`] (pure): events in, actions out; decides freeze, publish, retry and flush completion.
//! * [`unlogged`] (pure): which changes a log does not have yet.
//! * [`machine`] (pure): the state machine and the log's group commit as one.
//! * [`throttle`] (pure): how long a writer is slowed as the buffer fills.
//! * [`pressure`]: the room in the write buffer.
//! * [`progress`]: whether a publish gets on.
//! * `complete`: makes partly written blocks whole.
//! * `publish`: one attempt to publish a generation.
//! * [`appender`]: the thin shell around the log.
//! * [`backlog`]: how far durability is behind.
//! * [`driver`]: what writers and flushes ask of the driver.
//! * `task`: the driver, a thin async shell that feeds the state machine and carries out what it decides.

pub mod appender;
pub mod backlog;
pub(crate) mod complete;
pub mod driver;
pub mod generation;
pub mod machine;
#[cfg(test)]
pub(crate) mod machine_world;
pub mod overlay;
pub mod pressure;
pub mod progress;
pub(crate) mod publish;
pub mod state;
mod task;
pub mod throttle;
pub mod unlogged;
