//! What a volume keeps beside its container, in `<root>.meta/`, and what is kept elsewhere and names one of its checkpoints.
//!
//! * [`label`]: who the volume is, `<root>.meta/volume`.
//! * [`checkpoint_list`]: the published checkpoints, `<root>.meta/checkpoints/<cno>`.
//! * [`wal_marker`]: that the volume has a log, `<root>.meta/wal`.
//! * [`import_record`]: how far an import is, `<root>.meta/import`.
//! * [`snapshots`]: names of checkpoints, `<root>.meta/snapshots/<name>`.
//! * `cache_state`: up to which checkpoint a cache on a local disk goes.

pub(crate) mod cache_state;
pub mod checkpoint_list;
pub(crate) mod children;
pub mod import_record;
pub mod label;
pub(crate) mod origin;
pub mod snapshots;
pub mod wal_marker;
