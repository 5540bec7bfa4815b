//! What an opening asks before it serves: what is there, whether it is one history, and what the log has to say.
//!
//! * `inspect`: everything that an opening wants to know, asked for at once, before anything is written.
//! * [`history`]: whether checkpoint list, log and caches continue what the container has.
//! * [`recover_wal`]: the log of a volume is taken over; [`replay_wal`]: it is replayed, before the first client.

pub mod history;
pub(crate) mod inspect;
pub mod recover_wal;
pub mod replay_wal;
