//! One module a command.

pub mod buffer;
pub mod check;
pub mod checkpoints;
pub mod clone;
pub mod completions;
pub mod connect;
pub mod create;
pub mod delete;
pub mod diff;
pub mod export;
pub mod file;
pub mod import;
pub mod info;
pub mod nbdkit_args;
pub mod probe;
pub mod prune;
pub mod resize;
pub mod restart;
pub mod retention;
pub mod rollback;
pub mod serve;
pub mod snapshot;
pub mod space;
pub mod supervise;
pub mod wal;
