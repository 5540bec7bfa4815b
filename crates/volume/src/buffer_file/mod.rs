//! The buffer file: a local copy of the write buffer that survives the server.
//!
//! An answer to a write says that every client sees the write, not that it is durable. When a server is killed, the
//! answered writes that were not flushed are lost with it, and a client that connects again goes on as if they were
//! there. With `write_buffer_dir` every change is also written to a file. The file is never synced, so it survives the
//! process and not the machine. The next server on this machine applies the file's changes, in order, before it serves
//! its first client.
//!
//! | file | what it is |
//! |---|---|
//! | [`format`] | the format of the file. Pure |
//! | [`file`] | how a file is made, found and read back |
//! | [`dir`] | which volume the directory belongs to, and how changes of an earlier server are recovered or set aside |
//! | [`left`] | the contents of such directories, for people |
//! | [`kept`] | the file while the volume is served: the place of each change, and which changes are published |
//!
//! Rules:
//!
//! 1. Changes get their order, and their generation, under the overlay's lock when they are added to it. A change is
//!    answered after its entry is written.
//! 2. The entries of a generation count until its publish has succeeded. Applying them once more afterwards is harmless
//!    as long as all later entries are applied too. They are, because chunks are used again in the order of the
//!    generations, and only once the stored floor covers them.
//! 3. Entries are applied only on top of the very state that was left by the server that answered them. That is so when
//!    the lease before this owner's was that server's own, or one of a server that was to recover the entries. Any
//!    other owner may have written to the volume without them.

mod dir;
mod file;
mod format;
mod kept;
mod left;

pub(crate) use dir::{BufferDir, is_left_empty};
pub(crate) use file::Recovered;
pub(crate) use format::{Kind, check_head};
pub(crate) use kept::{Kept, NoRoom, Ticket};
pub use left::{Left, discard, is_kept, look};

/// The version of the files that this release writes and reads.
pub const BUFFER_FILE_VERSION: u32 = format::VERSION;
/// The key under which the plugin reports that version.
pub const BUFFER_FILE_KEY: &str = "hypernbd_buffer_file_version";
