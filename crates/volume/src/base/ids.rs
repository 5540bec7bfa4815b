//! Numbers of generations and flushes, and the answers to flushes.

/// The most generations that may be frozen at once.
pub const FROZEN_MAX: usize = 2;
/// How far the newest generation of an owner can be ahead of the newest one that it recorded as published: the frozen
/// generations and the active one. Its records in flight to the WAL are no further ahead.
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
