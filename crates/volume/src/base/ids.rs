//! Numbers of generations and of flushes, and how a flush is answered.

/// Generations that may be frozen at a time.
pub const FROZEN_MAX: usize = 2;
/// How far the newest generation of an owner can be beyond the newest that it recorded as published: the frozen ones and
/// the active one. What it has on its way to the log is no further.
pub const GENERATIONS_AHEAD_MAX: u64 = FROZEN_MAX as u64 + 1;

/// Number of a generation; the first is 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GenerationId(pub u64);

/// A waiting flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlushId(pub u64);

/// Answer to a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlushAnswer {
    /// Everything the flush covers is durable.
    Durable,
    /// Not durable within the time allowed; the data is kept and retried.
    TimedOut,
    /// Another writer took the volume over; never durable through this server.
    Fenced,
}
