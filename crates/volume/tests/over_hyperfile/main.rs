//! Volumes over the real engine and an in-process store.

// The layout of the nested futures of the engine and the SDK is deep.
#![recursion_limit = "256"]

mod asked_growth;
mod bit_flips;
mod busy_store;
mod check;
mod check_values;
mod clones;
mod clones_at_risk;
mod compaction;
mod completion;
mod container;
mod damage;
mod every_answer;
mod failed_opening;
mod faults;
mod fixture;
mod flatten;
mod gets;
mod histories;
mod history;
mod kept_index;
mod lease;
mod limits;
mod overlap;
mod pair;
mod provenance;
mod recovery;
mod recovery_race;
mod repair;
mod repair_list;
mod replicas;
mod replicas_at_risk;
mod resize;
mod retention;
mod scattered;
mod scrub;
mod sub_block;
mod wal_among_others;
mod wal_beside;
