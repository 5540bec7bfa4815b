//! The past of a volume: its checkpoints, their names, and the ways in which people name one.
//!
//! Every checkpoint is a whole state of the volume, and none is ever changed. [`At`] is a person's name for one of
//! them, and [`find`] finds that checkpoint. Nothing here changes the container.

pub use crate::meta::snapshots::{Snapshot, SnapshotName};

mod at;
mod diff;
pub mod export_name;
mod list;
mod snapshots;

pub use at::{At, AtError, Past};
pub(crate) use diff::between;
pub use diff::{ChangeKind, Changed, diff};
pub use list::{Listed, Point, find, list, time_text};
pub(crate) use list::{list_by, state_of};
pub use snapshots::{create, delete, snapshots};
pub(crate) use snapshots::{free_name, put};
