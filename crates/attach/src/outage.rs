//! Whether the server is away, and what of it is worth a line in the log. Pure: the time comes in.
//!
//! A link that comes up and dies at once is no end of an outage: only an answer is. An outage is told of by one line when it begins, one
//! for each new reason, and one at its end. When outages follow each other fast, some are left out, and counted.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// So many outages in a row are told of.
const CREDIT_MAX: u32 = 5;
/// One more for each of these that has passed.
const CREDIT_EVERY: Duration = Duration::from_secs(60);
/// So many reasons of one outage are told of: some hold numbers, and no two are alike.
const REASONS_MAX: usize = 8;

#[derive(Debug)]
struct Away {
    since: Instant,
    why: String,
    reasons: BTreeSet<String>,
    is_told: bool,
}

/// The outage that there is, if there is one.
#[derive(Debug)]
pub(crate) struct Outage {
    away: Option<Away>,
    credit: u32,
    credited: Instant,
    left_out: u64,
}

impl Outage {
    /// There is none.
    pub(crate) fn none(now: Instant) -> Self {
        Self {
            away: None,
            credit: CREDIT_MAX,
            credited: now,
            left_out: 0,
        }
    }

    /// Since when there is one.
    pub(crate) fn since(&self) -> Option<Instant> {
        self.away.as_ref().map(|away| away.since)
    }

    /// Why, as was last seen.
    pub(crate) fn why(&self) -> Option<&str> {
        self.away.as_ref().map(|away| &*away.why)
    }

    /// There is no link, for this reason. Gives what is to be said.
    pub(crate) fn lost(&mut self, why: &str, now: Instant) -> Option<String> {
        let away = self.away.get_or_insert_with(|| Away {
            since: now,
            why: String::new(),
            reasons: BTreeSet::new(),
            is_told: false,
        });
        why.clone_into(&mut away.why);
        if !away.is_told {
            return self.tell(now);
        }
        let is_new = away.reasons.len() < REASONS_MAX && away.reasons.insert(why.to_owned());
        is_new.then(|| format!("still no link: {why}"))
    }

    /// Time has passed. Gives what is to be said: of an outage that was not told of at its beginning, and lasts.
    pub(crate) fn tell(&mut self, now: Instant) -> Option<String> {
        let away = self.away.as_mut().filter(|away| !away.is_told)?;
        let passed = now.saturating_duration_since(self.credited);
        let earned = (passed.as_secs() / CREDIT_EVERY.as_secs()) as u32;
        self.credit = self.credit.saturating_add(earned).min(CREDIT_MAX);
        self.credited += CREDIT_EVERY * earned;
        self.credit = self.credit.checked_sub(1)?;
        away.is_told = true;
        away.reasons.insert(away.why.clone());
        let left_out = match std::mem::take(&mut self.left_out) {
            0 => String::new(),
            many => format!(" (after {many} times of which nothing was said)"),
        };
        let next = match self.credit {
            0 => "; the link comes and goes: the next times are not said",
            _ => "",
        };
        Some(format!("no link: {}; requests wait{left_out}{next}", away.why))
    }

    /// How long until there may be something to say.
    pub(crate) fn next_tell(&self, now: Instant) -> Option<Duration> {
        self.away.as_ref().filter(|away| !away.is_told)?;
        Some((self.credited + CREDIT_EVERY).saturating_duration_since(now))
    }

    /// The server has answered. Gives how long it was away, if that is to be said.
    pub(crate) fn over(&mut self, now: Instant) -> Option<Duration> {
        let away = self.away.take()?;
        self.left_out += u64::from(!away.is_told);
        away.is_told.then(|| now.saturating_duration_since(away.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn one_outage_is_one_however_often_a_link_comes_up_and_dies() {
        let begin = Instant::now();
        let mut outage = Outage::none(begin);
        let mut lines = Vec::new();
        for second in 0..1000 {
            let why = ["it ended", "refused"][second as usize % 2];
            lines.extend(outage.lost(why, begin + SECOND * second));
            assert_eq!((outage.since(), outage.why()), (Some(begin), Some(why)));
        }
        assert_eq!(
            lines,
            ["no link: it ended; requests wait", "still no link: refused"]
        );
        assert_eq!(outage.over(begin + SECOND * 1000), Some(SECOND * 1000));
        assert_eq!((outage.since(), outage.over(begin)), (None, None));
    }

    #[test]
    fn reasons_that_are_never_alike_are_not_all_said() {
        let begin = Instant::now();
        let mut outage = Outage::none(begin);
        let said = (0..1000).filter_map(|number| outage.lost(&format!("request {number}"), begin));
        assert_eq!(said.count(), REASONS_MAX);
    }

    #[test]
    fn outages_that_follow_each_other_fast_are_counted_and_a_last_one_that_lasts_is_said() {
        let begin = Instant::now();
        let mut outage = Outage::none(begin);
        let mut lines = Vec::new();
        for _ in 0..100 {
            let line = outage.lost("it ended", begin);
            // What was said to begin is said to end.
            assert_eq!(outage.over(begin).is_some(), line.is_some());
            lines.extend(line);
        }
        assert_eq!(lines.len(), CREDIT_MAX as usize);
        assert!(lines[4].ends_with("the next times are not said"), "{lines:?}");
        assert_eq!(outage.lost("it ended", begin), None);
        assert_eq!(outage.next_tell(begin), Some(CREDIT_EVERY));
        assert_eq!(outage.tell(begin + CREDIT_EVERY - SECOND), None);
        let line = outage.tell(begin + CREDIT_EVERY).unwrap();
        assert!(line.contains("after 95 times"), "{line}");
        assert_eq!(outage.next_tell(begin + CREDIT_EVERY), None);
        assert_eq!(outage.over(begin + CREDIT_EVERY), Some(CREDIT_EVERY));
    }
}
