//! Reading everything that a served volume needs, once an interval, to find damage before a client does.
//!
//! A *pass* reads every object that some kept checkpoint needs, whole, in the order of their numbers, and compares it with its check
//! values. It asks the store for one thing at a time, at the lowest class and at a bounded rate, and nothing that it reads enters a
//! cache. How far it is, and what it found, is kept beside the volume (`meta/scrub_record.rs`), so that the next server goes on there.
//! Nothing of the volume is changed.
//!
//! *What is wrong is looked at first, what needs it is listed afterwards.* Retention removes the entry of a checkpoint before the objects
//! that only this one needs. So an object that is missing, and that a checkpoint needs which is listed after that was seen, is damage,
//! whatever retention and compaction do meanwhile.
//!
//! * `schedule` (pure): what is done next, and when.
//! * `needed`: what the kept checkpoints need, and whether it is there.
//! * `impact`: whether anything needs what is wrong, and what of the volume that is.
//! * `damage` (pure): the damaged places that are known.
//! * `keeper`: the scrub of a served volume.

mod damage;
mod impact;
mod keeper;
mod needed;
mod schedule;

pub(crate) use keeper::{Keeper, Work};
