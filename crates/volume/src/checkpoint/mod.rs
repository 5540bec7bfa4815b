//! When unpublished writes are published, and how: freeze, publish, retry, and the answers to flushes.
//!
//! * [`state`] (pure): events in, actions out; decides freeze, publish, retry and flush completion.
//! * [`machine`] (pure): the state machine and the log's group commit as one.
//! * [`handle`]: what writers and flushes ask of the driver.
//! * `task`: the driver, a thin async shell that feeds the state machine and carries out what it decides.
//! * [`appender`]: the thin shell around the log.
//! * `publisher`: one attempt to publish a generation.
//! * `fill_partial`: makes partly written blocks whole.

pub mod appender;
pub(crate) mod fill_partial;
pub mod handle;
pub mod machine;
#[cfg(test)]
pub(crate) mod machine_world;
mod publisher;
pub mod state;
mod task;
