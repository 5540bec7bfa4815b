//! Unpublished writes and when they are published.
//!
//! * [`generation`] (pure): one checkpoint's worth of writes at byte granularity.
//! * [`overlay`]: the active generation and the frozen one being published, behind their locks.
//! * [`state`] (pure): events in, actions out; decides freeze, publish, retry and flush completion.
//! * [`throttle`] (pure): how long a writer is slowed as the buffer fills.
//! * [`driver`]: the thin async shell that feeds the state machine and carries out what it decides.

mod complete;
pub mod driver;
pub mod generation;
pub mod overlay;
pub mod state;
pub mod throttle;
