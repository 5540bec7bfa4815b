//! The buffer file: a local copy of the write buffer that survives the server.
//!
//! An answer to a write says that every client sees it, not that it is durable; a server that is killed takes with it what was
//! answered and not flushed, and a client that connects again goes on over the hole. With `write_buffer_dir` every change is
//! also written to a file, which is never synced: it survives the process and not the machine. The next server on this
//! machine applies what the file holds, in order, before its first client.
//!
//! | file | what it is |
//! |---|---|
//! | [`format`] | what the file looks like. Pure |
//! | [`file`] | how a file is made, found and read back |
//! | [`dir`] | whose the directory is; what an earlier server left in it is recovered, or set aside |
//! | [`left`] | what lies in such directories, for people |
//! | [`kept`] | the file while the volume is served: where each change goes, and which of them are published |
//!
//! Rules:
//!
//! 1. Changes get their order, and their generation, under the lock of the overlay that takes them in. An answer comes after
//!    the entry is written.
//! 2. A generation's entries count until its publish succeeded. To apply them again after that is harmless as long as all later
//!    ones are applied too, and they are: chunks are used again in the order of the generations, behind the floor.
//! 3. They are applied only upon the very state that the server which answered them left: when no lease but its own, or that of
//!    a server which was to recover them, came before this owner's. Every other owner may have gone on without them.

mod dir;
mod file;
mod format;
mod kept;
mod left;

pub(crate) use dir::BufferDir;
pub(crate) use file::Recovered;
pub(crate) use format::{Kind, check_head};
pub(crate) use kept::{Kept, NoRoom, Ticket};
pub use left::{Left, discard, look};

/// The version of the files that this release writes and reads.
pub const BUFFER_FILE_VERSION: u32 = format::VERSION;
/// The name of that version in what the plugin says of itself.
pub const BUFFER_FILE_KEY: &str = "hypernbd_buffer_file_version";
