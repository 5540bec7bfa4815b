//! The past of a volume: its checkpoints, names for them, and how people say which one they mean.
//!
//! Every checkpoint is a whole state of the volume, and none is ever changed. [`At`] is a person's word for one of them;
//! [`find`] tells which that is. Nothing here changes the container.

pub use crate::meta::snapshots::{Snapshot, SnapshotName};

mod at;
mod diff;
mod list;
mod snapshots;

pub use at::{At, AtError, Past};
pub(crate) use diff::between;
pub use diff::{ChangeKind, Changed, diff};
pub(crate) use list::list_by;
pub use list::{Listed, Point, find, list, time_text};
pub use snapshots::{create, delete, snapshots};
pub(crate) use snapshots::{free_name, put};
