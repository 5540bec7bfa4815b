//! When and how unpublished writes are published: freeze, publish, retry, and the answers to flushes.
//!
//! * [`state`] (pure): events in, actions out; decides on freezes, publishes, retries and answers to flushes.
//! * [`machine`] (pure): joins that state machine and the WAL's group commit.
//! * [`handle`]: what writers and flushes ask of the checkpoint task.
//! * `task`: a thin async shell that feeds the state machine and carries out its actions.
//! * [`appender`]: a thin async shell around the WAL.
//! * `publisher`: one attempt to publish a generation.
//! * `fill_partial`: completes partly written blocks.

pub mod appender;
pub(crate) mod fill_partial;
pub mod handle;
pub mod machine;
#[cfg(test)]
pub(crate) mod machine_world;
mod publisher;
pub mod state;
mod task;
