//! For tests only: an engine in memory, one that fails on demand, and a simulation of all that decides.
//!
//! * [`memory_engine`]: the model that a volume is compared with.
//! * [`fault_engine`]: wraps any engine and makes it fail.
//! * `simulation`: volume, log and lease over a faulty store; one seed is one history.

pub mod fault_engine;
pub mod memory_engine;
#[cfg(test)]
mod simulation;
