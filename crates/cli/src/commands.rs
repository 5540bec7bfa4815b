//! One module a command.

pub mod buffer;
pub mod completions;
pub mod connect;
pub mod create;
pub mod delete;
pub mod file;
pub mod info;
pub mod nbdkit_args;
pub mod probe;
pub mod resize;
pub mod serve;
pub mod wal;
