//! Copying what is live out of objects that are mostly dead, so that they can go.
//!
//! *Copy, then flip.* Blocks are copied off to the side, under a checkpoint number that the owner has set aside; nobody refers to the
//! copies then. The flip is one checkpoint of the owner's, in which every block that is still where it was copied from has the place of
//! its copy. A block that a client changed meanwhile keeps what the client wrote. Nothing is removed here: what no kept checkpoint needs
//! any more goes with the rounds of `retention/`, after the time of grace, as everything does.
//!
//! Whatever fails leaves copies that nobody refers to, and those go as what failed publishes leave does.
//!
//! * `pace` (pure): how fast, by how much space is taken for nothing, and when to look again.
//! * `relocation`: one relocation, from victims to flip.
//! * `schedule` (pure): when a served volume is looked at, and how many relocations may follow each other.
//! * `keeper`: the relocations of a served volume, those that it makes by itself and those that it is asked for.

mod keeper;
mod pace;
mod relocation;
mod schedule;

use serde::{Deserialize, Serialize};

pub(crate) use keeper::{Keeper, Work};
pub use pace::Pace;
pub use relocation::{Flip, Ground, Moved};

/// What a compaction did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compacted {
    /// Objects that what was live was copied out of: none has anything live any more.
    pub objects: u64,
    /// Their bytes.
    pub object_bytes: u64,
    /// Bytes that were copied.
    pub copied_bytes: u64,
    /// Checkpoints that it made.
    pub checkpoints: u64,
    /// Whether it was told to stop before its end. What it had done by then is done.
    pub is_stopped: bool,
}

impl Compacted {
    /// One more relocation.
    pub(crate) fn add(&mut self, moved: &Moved) {
        self.objects += moved.objects;
        self.object_bytes += moved.object_bytes;
        self.copied_bytes += moved.bytes;
        self.checkpoints += u64::from(moved.checkpoint > 0);
    }
}
