//! A line of the log as JSON, for programs and for `hypernbd report`.

use log::Level;
use serde::Serialize;

/// What a line says.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    level: String,
    target: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    volume: &'a str,
}

/// One object, in one line: `time` (UTC), `level`, `target`, `message`, and the volume's URL once it is known.
pub fn json(level: Level, target: &str, message: &str, volume: &str) -> String {
    let line = Line {
        time: jiff::Timestamp::now().to_string(),
        level: level.as_str().to_lowercase(),
        target,
        message,
        volume,
    };
    // Strings alone can always be written.
    serde_json::to_string(&line).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_object_whatever_it_says() {
        let message = "two\nlines, \"quoted\", a \u{1b}[31m and a \0";
        let line = json(Level::Warn, "hypernbd::x", message, "s3://bucket/disk/");
        assert!(!line.contains('\n') && !line.contains('\0'), "{line}");
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&read["message"], &read["level"]),
            (&message.into(), &"warn".into())
        );
        assert_eq!(read["volume"], "s3://bucket/disk/");
        assert!(read["time"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok());
        assert!(!json(Level::Info, "x", "y", "").contains("volume"));
    }
}
