//! When a volume that nobody uses is given back. Pure: the time comes with the events, and what is to be done is returned.
//!
//! ```text
//!            opened             due               published, and still nobody
//! (no volume) ────▶ open ─────────────▶ publishing ─────────────────────────▶ closing
//!      ▲              ▲                     │                                    │
//!      │              └─────────────────────┘                                    │
//!      │                  somebody came, or it failed                            │
//!      └─────────────────────────────────────────────────────────────────────────┘ closed
//! ```
//!
//! It is closed only once everything is published: a close that fails throws away what is not, where nothing on this machine keeps it.

use std::time::{Duration, Instant};

/// The longest time until what failed is tried again.
const AGAIN_MAX: Duration = Duration::from_secs(30);
/// The shortest one, where its room is wanted.
const AGAIN_LEAST: Duration = Duration::from_secs(1);
/// How long it takes at most to give back a volume, unless its store is slow.
const LEAVE_USUAL: Duration = Duration::from_secs(5);

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Nothing until this moment; without one, until something happens.
    Nothing(Option<Instant>),
    /// Everything is to be published. [`Linger::published`] follows.
    Publish,
}

/// Whether there is room for one volume more among those of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// There is.
    Free,
    /// There will be: a volume that nobody uses is given back for it.
    Soon,
    /// There is none: all that are open are used.
    None,
}

impl Room {
    /// Where so many may be open, `taken` are, and of these `leaving` are being given back or may be.
    pub fn of(most: usize, taken: usize, leaving: usize) -> Self {
        match (taken < most, leaving > 0) {
            (true, _) => Self::Free,
            (false, true) => Self::Soon,
            (false, false) => Self::None,
        }
    }
}

/// What there is of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Closed,
    /// It is given back at this moment, if there is one.
    Open {
        due: Option<Instant>,
    },
    /// Whether somebody has used it since that began.
    Publishing {
        is_wanted: bool,
    },
    Closing,
}

/// Whether a volume is used, and since when it is not.
#[derive(Debug)]
pub struct Linger {
    /// How long it stays open when nobody uses it; for ever without.
    after: Option<Duration>,
    /// Connections, those that wait for it too, and what the server was told to do with it.
    users: usize,
    phase: Phase,
    /// When it was opened, last left, last found not to be published, or begun to be given back.
    since: Option<Instant>,
    /// It was found not to be published: before this moment that is not tried again.
    again: Option<Instant>,
}

impl Linger {
    /// Of a volume that is not open, and stays open for this long after its last user; for ever without.
    pub fn new(after: Option<Duration>) -> Self {
        Self {
            after,
            users: 0,
            phase: Phase::Closed,
            since: None,
            again: None,
        }
    }

    /// When it is due, seen from now.
    fn due_after(&self, wait: Option<Duration>, now: Instant) -> Option<Instant> {
        let wait = wait.filter(|_| self.users == 0)?;
        now.checked_add(wait)
    }

    /// The volume is open now.
    pub fn opened(&mut self, now: Instant) {
        let due = self.due_after(self.after, now);
        self.phase = Phase::Open { due };
        (self.since, self.again) = (Some(now), None);
    }

    /// Somebody uses it, or waits for it.
    pub fn begin_use(&mut self) {
        self.users += 1;
        match &mut self.phase {
            Phase::Open { due } => *due = None,
            Phase::Publishing { is_wanted } => *is_wanted = true,
            Phase::Closed | Phase::Closing => {}
        }
    }

    /// Somebody uses it no more.
    pub fn end_use(&mut self, now: Instant) {
        self.users = self.users.saturating_sub(1);
        if let Phase::Open { .. } = self.phase {
            self.opened(now);
        }
    }

    /// Whether it is open and nobody uses it.
    pub fn may_leave(&self) -> bool {
        self.users == 0 && matches!(self.phase, Phase::Open { .. })
    }

    /// Of several that may leave, the one whose moment is the earliest goes first: the one that was left longest ago, and one that could
    /// not go when it was tried after all others.
    pub fn since(&self) -> Option<Instant> {
        self.since
    }

    /// A volume that nobody uses is given back at once, or soon if that has just failed: its room is wanted.
    pub fn hasten(&mut self, now: Instant) {
        if let Phase::Open { due } = &mut self.phase
            && self.users == 0
        {
            let at = self.again.map_or(now, |again| again.max(now));
            *due = Some(due.map_or(at, |due| due.min(at)));
        }
    }

    /// Whether it is being given back.
    pub fn is_leaving(&self) -> bool {
        matches!(
            self.phase,
            Phase::Publishing { is_wanted: false } | Phase::Closing
        )
    }

    /// Whether it is being given back, and not for so long that another one had better go instead.
    pub fn is_leaving_soon(&self, now: Instant) -> bool {
        let is_usual = |since: Instant| now.saturating_duration_since(since) < LEAVE_USUAL;
        self.is_leaving() && self.since.is_some_and(is_usual)
    }

    /// Whether nobody uses it, nor waits for it.
    pub fn is_unused(&self) -> bool {
        self.users == 0
    }

    /// What is to be done now.
    pub fn due(&mut self, now: Instant) -> Due {
        match self.phase {
            Phase::Open { due: Some(at) } if at <= now => {
                self.phase = Phase::Publishing { is_wanted: false };
                self.since = Some(now);
                Due::Publish
            }
            Phase::Open { due } => Due::Nothing(due),
            Phase::Closed | Phase::Publishing { .. } | Phase::Closing => Due::Nothing(None),
        }
    }

    /// Everything is published, or could not be. Whether the volume is to be closed; [`Self::closed`] follows then. Nobody may be given it
    /// in between.
    #[must_use]
    pub fn published(&mut self, is_all: bool, now: Instant) -> bool {
        let Phase::Publishing { is_wanted } = self.phase else {
            return false;
        };
        let is_unused = self.users == 0 && !is_wanted;
        if !is_all || !is_unused {
            self.since = Some(now);
        }
        self.again = (!is_all).then_some(now + AGAIN_LEAST);
        self.phase = match (is_all, is_unused) {
            (true, true) => Phase::Closing,
            (true, false) => Phase::Open {
                due: self.due_after(self.after, now),
            },
            (false, _) => Phase::Open {
                due: self.due_after(self.after.map(|after| after.min(AGAIN_MAX)), now),
            },
        };
        self.phase == Phase::Closing
    }

    /// The volume is closed.
    pub fn closed(&mut self) {
        self.phase = Phase::Closed;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(60);

    /// A volume that was opened by a user who has left, and the moment of that.
    fn left() -> (Linger, Instant) {
        let now = Instant::now();
        let mut linger = Linger::new(Some(AFTER));
        linger.begin_use();
        linger.opened(now);
        linger.end_use(now);
        (linger, now)
    }

    #[test]
    fn it_is_closed_a_while_after_the_last_user() {
        let (mut linger, now) = left();
        assert_eq!(linger.due(now), Due::Nothing(Some(now + AFTER)));
        assert_eq!(
            linger.due(now + AFTER - Duration::from_nanos(1)),
            Due::Nothing(Some(now + AFTER))
        );
        assert_eq!(linger.due(now + AFTER), Due::Publish);
        // Once is enough.
        assert_eq!(linger.due(now + 2 * AFTER), Due::Nothing(None));
        assert!(linger.published(true, now + AFTER));
        assert_eq!(linger.due(now + 3 * AFTER), Due::Nothing(None));
        linger.closed();
        assert_eq!(linger.due(now + 4 * AFTER), Due::Nothing(None));
    }

    #[test]
    fn nothing_is_due_while_anybody_uses_it() {
        let (mut linger, now) = left();
        linger.begin_use();
        linger.begin_use();
        linger.end_use(now);
        assert_eq!(linger.due(now + 10 * AFTER), Due::Nothing(None));
        // It counts from the last one.
        linger.end_use(now + AFTER);
        assert_eq!(linger.due(now + AFTER), Due::Nothing(Some(now + 2 * AFTER)));
    }

    #[test]
    fn one_that_nobody_waited_for_is_given_back() {
        let now = Instant::now();
        let mut linger = Linger::new(Some(AFTER));
        linger.begin_use();
        linger.end_use(now);
        assert_eq!(
            linger.due(now + AFTER),
            Due::Nothing(None),
            "there is nothing yet"
        );
        linger.opened(now + AFTER);
        assert_eq!(linger.due(now + 2 * AFTER), Due::Publish);
    }

    #[test]
    fn who_comes_while_it_is_published_keeps_it() {
        for stays in [true, false] {
            let (mut linger, now) = left();
            assert_eq!(linger.due(now + AFTER), Due::Publish);
            linger.begin_use();
            if !stays {
                // What this one has written may not be among what is published.
                linger.end_use(now + AFTER);
            }
            assert!(!linger.published(true, now + AFTER));
            let next = (!stays).then_some(now + 2 * AFTER);
            assert_eq!(linger.due(now + AFTER), Due::Nothing(next));
        }
    }

    #[test]
    fn one_that_cannot_publish_stays_open_and_is_tried_again() {
        let (mut linger, now) = left();
        for round in 0..3 {
            let at = now + AFTER + round * AGAIN_MAX;
            assert_eq!(linger.due(at), Due::Publish);
            assert!(!linger.published(false, at));
            assert_eq!(linger.due(at), Due::Nothing(Some(at + AGAIN_MAX)));
        }
        let at = now + AFTER + 3 * AGAIN_MAX;
        assert_eq!(linger.due(at), Due::Publish);
        assert!(linger.published(true, at));
    }

    #[test]
    fn who_waits_for_the_close_is_a_user_of_the_next_opening() {
        let (mut linger, now) = left();
        assert_eq!(linger.due(now + AFTER), Due::Publish);
        assert!(linger.published(true, now + AFTER));
        linger.begin_use();
        linger.closed();
        linger.opened(now + AFTER);
        assert_eq!(linger.due(now + 10 * AFTER), Due::Nothing(None));
    }

    #[test]
    fn without_a_time_it_stays_open() {
        let now = Instant::now();
        let mut linger = Linger::new(None);
        linger.begin_use();
        linger.opened(now);
        linger.end_use(now);
        assert_eq!(linger.due(now + 1000 * AFTER), Due::Nothing(None));
    }

    #[test]
    fn room_is_made_by_what_nobody_uses() {
        assert_eq!(Room::of(2, 1, 0), Room::Free);
        assert_eq!(Room::of(2, 2, 1), Room::Soon);
        assert_eq!(Room::of(2, 2, 0), Room::None);
        assert_eq!(Room::of(2, 3, 0), Room::None);
    }

    #[test]
    fn one_whose_room_is_wanted_goes_at_once_unless_it_is_used() {
        let (mut linger, now) = left();
        assert!(linger.may_leave());
        assert_eq!(linger.due(now), Due::Nothing(Some(now + AFTER)));
        linger.hasten(now);
        assert!(!linger.is_leaving());
        assert_eq!(linger.due(now), Due::Publish);
        assert!(linger.is_leaving() && linger.is_unused());
        linger.begin_use();
        assert!(!linger.is_leaving() && !linger.may_leave(), "somebody came");
        assert!(!linger.published(true, now));
        linger.hasten(now);
        assert_eq!(linger.due(now), Due::Nothing(None));
    }

    #[test]
    fn one_that_cannot_go_lets_others_go_first() {
        for after in [Some(AFTER), None] {
            let now = Instant::now();
            let open_since = |left: Instant| {
                let mut linger = Linger::new(after);
                linger.begin_use();
                linger.opened(now);
                linger.end_use(left);
                linger
            };
            let (mut stuck, other) = (open_since(now), open_since(now + AFTER / 4));
            assert!(stuck.since() < other.since(), "it was left longest ago");
            let wanted = now + AFTER / 2;
            stuck.hasten(wanted);
            assert_eq!(stuck.due(wanted), Due::Publish);
            assert!(!stuck.published(false, wanted));
            assert!(stuck.may_leave() && other.may_leave());
            assert!(other.since() < stuck.since(), "and cannot go");
            // Nor is it tried as often as somebody looks for room.
            stuck.hasten(wanted);
            assert_eq!(stuck.due(wanted), Due::Nothing(Some(wanted + AGAIN_LEAST)));
            stuck.hasten(wanted + AGAIN_LEAST / 2);
            assert_eq!(stuck.due(wanted + AGAIN_LEAST), Due::Publish);
        }
    }

    #[test]
    fn one_that_takes_long_to_go_is_not_waited_for() {
        let (mut linger, now) = left();
        linger.hasten(now);
        assert!(!linger.is_leaving_soon(now));
        assert_eq!(linger.due(now), Due::Publish);
        assert!(linger.is_leaving_soon(now));
        let late = now + LEAVE_USUAL;
        assert!(linger.is_leaving() && !linger.is_leaving_soon(late));
        assert!(linger.published(true, late));
        assert!(linger.is_leaving() && !linger.is_leaving_soon(late));
    }
}
