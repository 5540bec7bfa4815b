//! Text that comes from a store and may be shown to people.

use serde::{Deserialize, Deserializer};

/// The longest text that is kept, in characters.
const CHARS_MAX: usize = 1024;

/// Reads a string and keeps only characters that can be shown, because control characters could make a terminal or a
/// log show anything.
pub(crate) fn printable<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(clean(&text))
}

/// As [`printable`], for a string that may be missing.
pub(crate) fn printable_option<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.map(|text| clean(&text)))
}

fn clean(text: &str) -> String {
    let shown = |c: char| {
        if c.is_control() {
            char::REPLACEMENT_CHARACTER
        } else {
            c
        }
    };
    text.chars().take(CHARS_MAX).map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_would_obey_is_kept() {
        assert_eq!(clean("a host\u{e9}"), "a host\u{e9}");
        assert_eq!(
            clean("\u{1b}[2Jx\n\u{9b}y\u{7f}"),
            "\u{fffd}[2Jx\u{fffd}\u{fffd}y\u{fffd}"
        );
        assert_eq!(clean(&"x".repeat(5000)).len(), CHARS_MAX);
    }
}
