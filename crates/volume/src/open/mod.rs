//! What an opening finds out before it serves: what is stored, whether it is one history, and what the WAL holds.
//!
//! * `inspect`: everything that an opening needs to know, requested at once, before anything is written.
//! * [`history`]: whether checkpoint list, WAL and caches continue what the container has.
//! * [`recover_wal`]: takes over the WAL of a volume; [`replay_wal`]: replays it, before the first client.

pub mod history;
pub(crate) mod inspect;
pub mod recover_wal;
pub mod replay_wal;
