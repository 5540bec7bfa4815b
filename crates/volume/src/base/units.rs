//! Sizes and durations as people write them, and sizes as people read them.

use std::time::Duration;

/// One kibibyte, in bytes.
pub const KIB: u64 = 1 << 10;
/// One mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;
/// One gibibyte, in bytes.
pub const GIB: u64 = 1 << 30;

/// Suffix letters of sizes. Each stands for 1024 times the previous one.
const SIZE_LETTERS: &str = "KMGTPE";

/// A size or duration that could not be understood. The text names the value and what is accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// Not of the form number plus optional suffix.
    #[error(
        "\"{value}\" is not a size: write a number of bytes, or a number with K, M, G, T or P, as in 64K or 10T"
    )]
    Size {
        /// The text that was given.
        value: String,
    },
    /// A fraction that does not come out as whole bytes.
    #[error("\"{value}\" is not a whole number of bytes: use a smaller unit")]
    FractionOfByte {
        /// The text that was given.
        value: String,
    },
    /// More than 64 bits hold.
    #[error("\"{value}\" is too large")]
    TooLarge {
        /// The text that was given.
        value: String,
    },
    /// Not of the form number plus optional unit of time.
    #[error(
        "\"{value}\" is not a duration: write seconds, or a number with ms, s, min, h or d, as in 500ms or 5s"
    )]
    Duration {
        /// The text that was given.
        value: String,
    },
}

/// Reads a size in bytes: `4096`, `64K`, `1.5G`, `512MiB`, `10 TB`. Suffixes are powers of 1024 in either case,
/// with or without `B` or `iB`.
///
/// # Errors
/// [`UnitError`] when the text is no size, is not a whole number of bytes, or does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let value = || text.to_string();
    let (number, suffix) = split_number(text);
    let multiplier = size_multiplier(suffix).ok_or_else(|| UnitError::Size { value: value() })?;
    let (digits, scale) = parse_decimal(number).ok_or_else(|| UnitError::Size { value: value() })?;
    let scaled = digits
        .checked_mul(multiplier.into())
        .ok_or_else(|| UnitError::TooLarge { value: value() })?;
    if !scaled.is_multiple_of(scale) {
        return Err(UnitError::FractionOfByte { value: value() });
    }
    u64::try_from(scaled / scale).map_err(|_| UnitError::TooLarge { value: value() })
}

/// Writes a size for people, with at most two decimals: `512 MiB`, `9.09 TiB`, `17 bytes`.
pub fn format_size(size_bytes: u64) -> String {
    if size_bytes < KIB {
        return if size_bytes == 1 {
            "1 byte".to_string()
        } else {
            format!("{size_bytes} bytes")
        };
    }
    let power = size_bytes.ilog2() / 10;
    let letter = SIZE_LETTERS.as_bytes()[power as usize - 1] as char;
    let hundredths = (u128::from(size_bytes) * 100) >> (10 * power);
    let text = format!("{}.{:02}", hundredths / 100, hundredths % 100);
    format!("{} {letter}iB", text.trim_end_matches('0').trim_end_matches('.'))
}

/// Reads a duration: `500ms`, `5s`, `2m` or `2min`, `1h`, `7d`, `1.5s`; a bare number is seconds.
///
/// # Errors
/// [`UnitError`] when the text is no duration or does not fit.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let bad = || UnitError::Duration {
        value: text.to_string(),
    };
    let (number, suffix) = split_number(text);
    let unit_ns: u128 = match suffix {
        "ms" => 1_000_000,
        "" | "s" => 1_000_000_000,
        "m" | "min" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        "d" => 86_400_000_000_000,
        _ => return Err(bad()),
    };
    let (digits, scale) = parse_decimal(number).ok_or_else(bad)?;
    let too_large = || UnitError::TooLarge {
        value: text.to_string(),
    };
    let total_ns = digits.checked_mul(unit_ns).ok_or_else(too_large)? / scale;
    Ok(Duration::from_nanos(
        u64::try_from(total_ns).map_err(|_| too_large())?,
    ))
}

/// Writes a duration in the largest unit that keeps it whole, readable by [`parse_duration`]: `5s`, `1500ms`, `2m`.
pub fn format_duration(duration: Duration) -> String {
    let ms = duration.as_millis();
    match ms {
        0 => "0s".to_string(),
        _ if ms > 86_400_000 && ms.is_multiple_of(86_400_000) => format!("{}d", ms / 86_400_000),
        _ if ms.is_multiple_of(3_600_000) => format!("{}h", ms / 3_600_000),
        _ if ms.is_multiple_of(60_000) => format!("{}m", ms / 60_000),
        _ if ms.is_multiple_of(1_000) => format!("{}s", ms / 1_000),
        _ => format!("{ms}ms"),
    }
}

/// Splits `12.5 MiB` into `12.5` and `MiB`.
fn split_number(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// A decimal number as an integer and the power of ten it was multiplied by. At most nine decimals.
fn parse_decimal(text: &str) -> Option<(u128, u128)> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if whole.is_empty() || whole.len() > 20 || fraction.len() > 9 || text.ends_with('.') {
        return None;
    }
    let digits = format!("{whole}{fraction}").parse().ok()?;
    Some((digits, 10u128.pow(fraction.len() as u32)))
}

/// The bytes a size suffix stands for: 1 for none or `B`, powers of 1024 for the letters.
fn size_multiplier(suffix: &str) -> Option<u64> {
    let suffix = suffix.to_ascii_uppercase();
    let mut rest = suffix.chars();
    let Some(first) = rest.next() else { return Some(1) };
    if suffix == "B" {
        return Some(1);
    }
    let power = SIZE_LETTERS.find(first)? as u32 + 1;
    matches!(rest.as_str(), "" | "B" | "IB").then(|| 1u64 << (10 * power))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_in_every_spelling() {
        for (text, expected) in [
            ("0", 0),
            ("17", 17),
            ("512B", 512),
            ("64K", 65536),
            ("64k", 65536),
            ("512MiB", 512 << 20),
            ("512MB", 512 << 20),
            ("1.5G", 3 << 29),
            (" 10 TiB ", 10 << 40),
            ("2p", 2 << 50),
            ("10000000000000", 10_000_000_000_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn bad_sizes_are_refused_and_named() {
        for text in [
            "", "K", "-1", "10X", "1.2.3K", "0x10", "1e9", "10 10", "1.", ".5K", "10Ki", "10TBB", "１０",
        ] {
            let error = parse_size(text).unwrap_err();
            assert_eq!(
                error,
                UnitError::Size {
                    value: text.to_string()
                },
                "{text}"
            );
            assert!(error.to_string().contains(&format!("\"{text}\"")));
        }
        assert_eq!(
            parse_size("1.1K"),
            Err(UnitError::FractionOfByte { value: "1.1K".into() })
        );
        for text in ["16E", "18446744073709551616", "99999999999999999999P"] {
            assert_eq!(parse_size(text), Err(UnitError::TooLarge { value: text.into() }));
        }
    }

    #[test]
    fn sizes_for_people() {
        for (size, expected) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (65536, "64 KiB"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
            (10 << 40, "10 TiB"),
            (10_000_000_000_000, "9.09 TiB"),
            (u64::MAX, "15.99 EiB"),
        ] {
            assert_eq!(format_size(size), expected);
        }
    }

    #[test]
    fn durations() {
        for (text, expected_ms) in [
            ("5", 5000),
            ("5s", 5000),
            ("500ms", 500),
            ("2m", 120_000),
            ("2min", 120_000),
            ("1h", 3_600_000),
            ("1.5s", 1500),
            ("0", 0),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(expected_ms)),
                "{text}"
            );
        }
        for text in ["", "s", "5 days", "-5", "5S.", "1..5"] {
            assert_eq!(
                parse_duration(text),
                Err(UnitError::Duration { value: text.into() }),
                "{text}"
            );
        }
        assert_eq!(
            parse_duration("99999999999999h"),
            Err(UnitError::TooLarge {
                value: "99999999999999h".into()
            })
        );
    }

    #[test]
    fn durations_read_back_what_was_written() {
        for ms in [0, 1, 500, 1500, 5000, 60_000, 90_000, 3_600_000] {
            let duration = Duration::from_millis(ms);
            assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }
        assert_eq!(format_duration(Duration::from_secs(5)), "5s");
        assert_eq!(format_duration(Duration::from_secs(24 * 3600)), "24h");
        assert_eq!(format_duration(Duration::from_secs(7 * 24 * 3600)), "7d");
    }
}
