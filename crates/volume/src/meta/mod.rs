//! What a volume keeps beside its container, in `<root>.meta/`, and files elsewhere that name one of its checkpoints.
//!
//! * [`label`]: the identity of the volume, `<root>.meta/volume`.
//! * [`checkpoint_list`]: the published checkpoints, `<root>.meta/checkpoints/<cno>`.
//! * [`wal_marker`]: says that the volume has a WAL, `<root>.meta/wal`.
//! * [`import_record`]: how far an import has come, `<root>.meta/import`.
//! * [`scrub_record`]: how far the scrub is, and the damage that it found, `<root>.meta/scrub`.
//! * [`snapshots`]: names of checkpoints, `<root>.meta/snapshots/<name>`.
//! * `cache_state`: the newest checkpoint that the contents of a local cache may come from.

pub(crate) mod cache_state;
pub mod checkpoint_list;
pub(crate) mod children;
pub mod import_record;
pub mod label;
mod lost_label;
pub(crate) mod origin;
pub mod scrub_record;
pub mod snapshots;
pub mod wal_marker;
