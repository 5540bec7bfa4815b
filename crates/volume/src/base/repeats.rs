//! Lines of a log that repeat (pure: lines and time in, decisions out; no clock, no I/O).
//!
//! A store that is away makes the same failure a thousand times. The first few are said, the rest is counted, and the count is said
//! once the line has been quiet, or has gone on for long enough.

use std::collections::HashMap;

/// Times that a line is said before it is only counted.
const SAID: u64 = 3;
/// A line that is counted is said again after this time, and forgotten when it was quiet for as long.
const PERIOD_MS: u64 = 10_000;
/// Different lines that are remembered.
const LINES_MAX: usize = 256;

/// What is known of one line.
#[derive(Debug, Clone, Copy)]
struct Line {
    /// When its period began.
    began_ms: u64,
    /// How often it came in this period.
    count: u64,
}

/// What to do with a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Say it.
    Say,
    /// Say it, and that it came so many times more since it was said last.
    SayWith(u64),
    /// It is only counted.
    Count,
}

/// Tells lines that are new from those that repeat.
#[derive(Debug, Default)]
pub struct Repeats(HashMap<String, Line>);

impl Repeats {
    /// A line comes, at a time of a clock that only goes forward. Numbers in it count as the same: one failure at many offsets is one.
    pub fn on(&mut self, text: &str, now_ms: u64) -> Decision {
        let key = without_numbers(text);
        if let Some(line) = self.0.get_mut(&key) {
            if now_ms.saturating_sub(line.began_ms) < PERIOD_MS {
                line.count += 1;
                return match line.count <= SAID {
                    true => Decision::Say,
                    false => Decision::Count,
                };
            }
            let more = line.count.saturating_sub(SAID);
            // One that goes on is said once a period, not three times.
            *line = Line {
                began_ms: now_ms,
                count: if more > 0 { SAID } else { 1 },
            };
            return match more {
                0 => Decision::Say,
                more => Decision::SayWith(more),
            };
        }
        if self.0.len() >= LINES_MAX {
            self.0.clear();
        }
        let line = Line {
            began_ms: now_ms,
            count: 1,
        };
        self.0.insert(key, line);
        Decision::Say
    }

    /// Lines whose period is over and that were counted: their texts, and how often each came since it was said. They are forgotten.
    pub fn over(&mut self, now_ms: u64) -> Vec<(String, u64)> {
        let is_over = |line: &Line| now_ms.saturating_sub(line.began_ms) >= PERIOD_MS;
        let over = self.0.extract_if(|_, line| is_over(line));
        let counted = over.map(|(text, line)| (text, line.count.saturating_sub(SAID)));
        counted.filter(|(_, more)| *more > 0).collect()
    }
}

/// The text with a `#` for each number.
fn without_numbers(text: &str) -> String {
    let mut key = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_ascii_digit() {
            true if key.ends_with('#') => {}
            true => key.push('#'),
            false => key.push(c),
        }
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_is_said_a_few_times_and_then_counted() {
        let mut repeats = Repeats::default();
        let said = (0..40).map(|offset| repeats.on(&format!("a read at {offset} failed"), 5));
        let said: Vec<_> = said.collect();
        assert_eq!(said[..3], [Decision::Say; 3]);
        assert_eq!(said[3..], [Decision::Count; 37]);
        assert_eq!(repeats.on("a write failed", 5), Decision::Say, "another line");
        assert_eq!(repeats.over(5 + PERIOD_MS - 1), []);
        assert_eq!(
            repeats.over(5 + PERIOD_MS),
            [("a read at # failed".to_owned(), 37)]
        );
        assert_eq!(repeats.over(5 + PERIOD_MS), [], "once");
        assert_eq!(
            repeats.on("a read at 7 failed", 5 + PERIOD_MS),
            Decision::Say,
            "it is new again"
        );
    }

    #[test]
    fn one_that_goes_on_is_said_once_a_period_with_its_count() {
        let mut repeats = Repeats::default();
        for _ in 0..10 {
            repeats.on("x", 0);
        }
        assert_eq!(repeats.on("x", PERIOD_MS), Decision::SayWith(7));
        assert_eq!(repeats.on("x", PERIOD_MS), Decision::Count);
        assert_eq!(repeats.on("x", 2 * PERIOD_MS), Decision::SayWith(1));
        assert_eq!(repeats.over(3 * PERIOD_MS), []);
    }

    #[test]
    fn every_line_is_said_or_counted() {
        let mut repeats = Repeats::default();
        let (mut said, mut counted, mut told) = (0, 0, 0);
        for turn in 0..1000_u64 {
            match repeats.on("x 1", turn * 97) {
                Decision::Say => said += 1,
                Decision::SayWith(more) => {
                    said += 1;
                    told += more;
                }
                Decision::Count => counted += 1,
            }
        }
        told += repeats.over(u64::MAX).iter().map(|(_, more)| more).sum::<u64>();
        assert_eq!((said + counted, told), (1000, counted));
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut repeats = Repeats::default();
        for number in 0..10 * LINES_MAX {
            let letters: String = number
                .to_string()
                .bytes()
                .map(|digit| (digit + 49) as char)
                .collect();
            assert_eq!(repeats.on(&letters, 0), Decision::Say);
        }
        assert!(repeats.0.len() <= LINES_MAX);
    }
}
