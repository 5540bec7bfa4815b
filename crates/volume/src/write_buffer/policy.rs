//! Every threshold of the write buffer, in one table (pure).
//!
//! | fill | what follows |
//! |---|---|
//! | 1/16 of the buffer in the active generation | it is worth a publish beside one that is under way |
//! | 1/8 | a streaming generation is published: waiting would gain nothing, and the connection is in use early |
//! | 1/2 | any other generation is published; a change larger than the buffer is admitted once as much is free |
//! | 1/2, streaming 1/3 | the active generation's share: beyond it writers are slowed as by a full buffer |
//! | 5/8 of the buffer, all generations together | writers are slowed, more and more over the next eighth |
//! | 7/8 | one writer may be slowed for as long as a publish takes |

/// The thresholds for a buffer of one size.
#[derive(Debug, Clone, Copy)]
pub struct BufferPolicy {
    capacity_bytes: u64,
}

impl BufferPolicy {
    /// For a write buffer of `capacity_bytes`.
    pub fn new(capacity_bytes: u64) -> Self {
        Self { capacity_bytes }
    }

    /// What the buffer may take, in bytes.
    pub fn capacity_bytes(self) -> u64 {
        self.capacity_bytes
    }

    /// Whether an active generation of this size is published before it reaches its age.
    pub fn is_large_enough(self, active_bytes: u64, is_streaming: bool) -> bool {
        active_bytes >= self.capacity_bytes / if is_streaming { 8 } else { 2 }
    }

    /// Whether the active generation passed another eighth of the buffer. Its size is checked then, and not at every write.
    pub fn has_passed_eighth(self, active_bytes: u64, added_bytes: u64) -> bool {
        let eighths = |bytes: u64| bytes / self.eighth_bytes();
        eighths(active_bytes) > eighths(active_bytes - added_bytes)
    }

    /// Whether an active generation of this size is worth a publish beside the one that is under way. A smaller one would only delay
    /// the next.
    pub fn is_worth_overlap(self, active_bytes: u64) -> bool {
        active_bytes >= self.capacity_bytes / 16
    }

    /// The room that a publish beside another takes for the bytes that its uploads copy, of `in_flight_bytes` at most.
    pub fn copied_bytes(self, in_flight_bytes: u64) -> u64 {
        in_flight_bytes.min(self.capacity_bytes / 8)
    }

    /// The fill that slows writers: of the whole buffer, or of the active generation's share, whichever is fuller.
    ///
    /// The active generation gets half of the buffer. If it could take all that a small frozen generation leaves, small and large
    /// generations would alternate, and a large one makes writers wait long. A streaming generation gets a third, because it is
    /// frozen before the generation ahead of it is published.
    pub fn fill_bytes(self, total_bytes: u64, active_bytes: u64, is_streaming: bool) -> u64 {
        let shares = if is_streaming { 3 } else { 2 };
        total_bytes.max(active_bytes.saturating_mul(shares))
    }

    /// The fill in bytes above which writers are slowed.
    pub fn soft_bytes(self) -> u64 {
        self.capacity_bytes / 8 * 5
    }

    /// How much of the full delay applies at this fill: from 0 at [`Self::soft_bytes`] to 1 an eighth of the buffer above it.
    pub fn delay_share(self, fill_bytes: u64) -> f64 {
        let above = fill_bytes.saturating_sub(self.soft_bytes());
        (above as f64 / self.eighth_bytes() as f64).min(1.0)
    }

    /// Whether so little is free that one writer may be slowed for as long as a publish takes.
    pub fn is_scarce(self, fill_bytes: u64) -> bool {
        fill_bytes > self.capacity_bytes / 8 * 7
    }

    /// The room that a change of this size waits for. One that is larger than the buffer is admitted once half of it is free.
    pub fn needed_bytes(self, change_bytes: u64) -> u64 {
        change_bytes.min(self.capacity_bytes / 2)
    }

    fn eighth_bytes(self) -> u64 {
        (self.capacity_bytes / 8).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: u64 = 512 << 20;

    #[test]
    fn a_stream_is_published_early_and_scattered_writes_late() {
        let policy = BufferPolicy::new(CAPACITY);
        assert!(
            policy.is_large_enough(CAPACITY / 8, true) && !policy.is_large_enough(CAPACITY / 8 - 1, true)
        );
        assert!(
            policy.is_large_enough(CAPACITY / 2, false) && !policy.is_large_enough(CAPACITY / 2 - 1, false)
        );
        // What is published alone is worth a publish beside another, too.
        assert!(policy.is_worth_overlap(CAPACITY / 16) && !policy.is_worth_overlap(CAPACITY / 16 - 1));
    }

    #[test]
    fn the_size_is_looked_at_at_each_eighth() {
        let policy = BufferPolicy::new(CAPACITY);
        assert!(policy.has_passed_eighth(CAPACITY / 8, 1));
        assert!(!policy.has_passed_eighth(CAPACITY / 8 - 1, 1));
        assert!(!policy.has_passed_eighth(CAPACITY / 8 + 4096, 4096));
        assert!(policy.has_passed_eighth(CAPACITY, CAPACITY));
    }

    #[test]
    fn the_delay_rises_over_one_eighth() {
        let policy = BufferPolicy::new(CAPACITY);
        assert_eq!(policy.delay_share(policy.soft_bytes()), 0.0);
        assert_eq!(policy.delay_share(policy.soft_bytes() + CAPACITY / 16), 0.5);
        assert_eq!(policy.delay_share(policy.soft_bytes() + CAPACITY / 8), 1.0);
        assert_eq!(policy.delay_share(CAPACITY), 1.0);
        assert!(policy.is_scarce(CAPACITY / 8 * 7 + 1) && !policy.is_scarce(CAPACITY / 8 * 7));
    }

    #[test]
    fn a_generation_beyond_its_share_counts_as_a_full_buffer() {
        let policy = BufferPolicy::new(CAPACITY);
        assert_eq!(policy.fill_bytes(10, CAPACITY / 2, false), CAPACITY);
        assert_eq!(policy.fill_bytes(10, CAPACITY / 3, true), CAPACITY / 3 * 3);
        assert_eq!(policy.fill_bytes(CAPACITY, 10, false), CAPACITY);
    }

    #[test]
    fn a_change_larger_than_the_buffer_is_admitted() {
        let policy = BufferPolicy::new(CAPACITY);
        assert_eq!(policy.needed_bytes(CAPACITY * 4), CAPACITY / 2);
        assert_eq!(policy.needed_bytes(4096), 4096);
        assert_eq!(policy.copied_bytes(u64::MAX), CAPACITY / 8);
        assert_eq!(policy.copied_bytes(1), 1);
    }
}
