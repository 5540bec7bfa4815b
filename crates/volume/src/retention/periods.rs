//! Hours, days, weeks and months of UTC, each with a number that ascends with time. Pure.

use jiff::Timestamp;
use jiff::civil::Date;
use jiff::tz::TimeZone;

/// An hour, in milliseconds.
const HOUR_MS: u64 = 3_600_000;
/// A day of UTC, in milliseconds.
pub(super) const DAY_MS: u64 = 24 * HOUR_MS;
/// 1970-01-01 was a Thursday, and ISO 8601 weeks begin on Monday.
const DAYS_BEFORE_THURSDAY: u64 = 3;

/// A kind of period of which a rule keeps the last checkpoint each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Period {
    /// From one full hour to the next.
    Hour,
    /// From midnight to midnight.
    Day,
    /// From Monday to Monday.
    Week,
    /// From the first of a month to the first of the next.
    Month,
}

impl Period {
    /// The number of the period that a time lies in. The time is in milliseconds since 1970-01-01 UTC.
    pub fn at(self, ms: u64) -> u64 {
        match self {
            Self::Hour => ms / HOUR_MS,
            Self::Day => ms / DAY_MS,
            Self::Week => (ms / DAY_MS + DAYS_BEFORE_THURSDAY) / 7,
            Self::Month => month_of(ms),
        }
    }

    /// When the period with this number begins, in milliseconds since 1970-01-01 UTC; [`u64::MAX`] for a month after the year 9999.
    pub fn start(self, number: u64) -> u64 {
        match self {
            Self::Hour => number.saturating_mul(HOUR_MS),
            Self::Day => number.saturating_mul(DAY_MS),
            Self::Week => number
                .saturating_mul(7)
                .saturating_sub(DAYS_BEFORE_THURSDAY)
                .saturating_mul(DAY_MS),
            Self::Month => start_of_month(number).unwrap_or(u64::MAX),
        }
    }
}

/// Months since the year 0, so that they ascend over years.
fn month_of(ms: u64) -> u64 {
    let time = i64::try_from(ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok())
        .unwrap_or(Timestamp::MAX);
    let date = time.to_zoned(TimeZone::UTC).date();
    u64::try_from(i64::from(date.year()) * 12 + i64::from(date.month())).unwrap_or(0)
}

/// When the month with this number of [`month_of`] begins; `None` when no date is written so.
fn start_of_month(number: u64) -> Option<u64> {
    // January has the number after a multiple of twelve.
    let before = number.checked_sub(1)?;
    let year = i16::try_from(before / 12).ok()?;
    let month = i8::try_from(before % 12 + 1).ok()?;
    let first = Date::new(year, month, 1).ok()?.to_zoned(TimeZone::UTC).ok()?;
    u64::try_from(first.timestamp().as_millisecond()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_begins_where_the_one_before_ends() {
        for period in [Period::Hour, Period::Day, Period::Week, Period::Month] {
            let first = period.at(1_795_341_600_000);
            for number in first..first + 500 {
                let start = period.start(number);
                assert_eq!(period.at(start), number, "{period:?}");
                assert_eq!(period.at(start - 1), number - 1, "{period:?}");
            }
            assert!(period.start(u64::MAX) > 1 << 62, "{period:?}");
        }
    }

    #[test]
    fn weeks_begin_on_monday_and_months_on_their_first() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap().as_millisecond() as u64;
        let start = |period: Period, text| period.start(period.at(at(text)));
        let sunday = "2026-02-01T08:00:00Z";
        assert_eq!(start(Period::Week, sunday), at("2026-01-26T00:00:00Z"));
        assert_eq!(start(Period::Month, sunday), at("2026-02-01T00:00:00Z"));
        assert_eq!(
            start(Period::Month, "2026-12-31T23:59:59.999Z"),
            at("2026-12-01T00:00:00Z")
        );
    }
}
