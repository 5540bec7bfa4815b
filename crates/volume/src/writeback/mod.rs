//! Unpublished writes and when they are published.
//!
//! * [`generation`] (pure): one checkpoint's worth of writes at byte granularity.
//! * [`overlay`]: the active generation and the frozen one being published, behind their locks.
//! * [`state`] (pure): events in, actions out; decides freeze, publish, retry and flush completion.
//! * [`unlogged`] (pure): which changes a log does not have yet.
//! * [`machine`] (pure): the state machine and the log's group commit as one.
//! * [`throttle`] (pure): how long a writer is slowed as the buffer fills.
//! * [`driver`]: the thin async shell that feeds the state machine and carries out what it decides.

pub mod driver;
pub mod generation;
pub mod machine;
pub mod overlay;
pub mod state;
pub mod throttle;
pub mod unlogged;
