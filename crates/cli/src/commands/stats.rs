//! `hypernbd stats SERVER`.

use std::fmt::Write;

use anyhow::Result;
use hypernbd_volume::monitor::client;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::format_size;
use serde_json::Value;

use super::server;
use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume that a server on this machine holds, the path of one of the server's sockets, or the address of its metrics
    /// (http://HOST:PORT)
    pub server: String,

    /// Print all that is known as JSON, with times in seconds, and moments in milliseconds since 1970
    #[arg(long)]
    pub json: bool,
}

/// Says once what the server says of itself.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let place = server::place(&args.server, store).await?;
    let status: Value = client::ask(&place, "/status").await?;
    match args.json {
        true => output::line(serde_json::to_string_pretty(&status)?),
        false => output::write(text(&status)),
    }
}

/// What people look at first, a line each.
fn text(status: &Value) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<22}{value}");
    };
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    let size = |value: &Value| format_size(number(value));
    for problem in status["problems"].as_array().into_iter().flatten() {
        line("PROBLEM", problem.as_str().unwrap_or_default().to_owned());
    }
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    line("volume", word(&status["url"]));
    line("state", word(&status["state"]));
    line("connections", number(&status["connections"]).to_string());
    let volume = &status["volume"];
    if volume.is_object() {
        line("checkpoint", volume["checkpoint"].to_string());
        line("not durable", age(&volume["undurable_age_s"]));
        line("not published", age(&volume["unpublished_age_s"]));
        let buffer = &volume["buffer"];
        line(
            "write buffer",
            format!("{} of {}", size(&buffer["bytes"]), size(&buffer["limit_bytes"])),
        );
    }
    for (kind, of) in status["requests"].as_object().into_iter().flatten() {
        if number(&of["count"]) > 0 {
            let value = format!(
                "{} requests, {}, half within {}, 99 of 100 within {}, {} failed",
                number(&of["count"]),
                size(&of["bytes"]),
                duration(&of["p50_s"]),
                duration(&of["p99_s"]),
                number(&of["failures"])
            );
            line(kind, value);
        }
    }
    let store = &status["store"];
    let requests = store["requests"].as_object().into_iter().flatten();
    let requests: u64 = requests.map(|(_, of)| number(&of["count"])).sum();
    line(
        "store",
        format!(
            "{requests} requests, {} sent, {} received, about ${:.4}",
            size(&store["sent_bytes"]),
            size(&store["received_bytes"]),
            store["cost_dollars"].as_f64().unwrap_or_default()
        ),
    );
    text
}

/// The age of what waits.
fn age(value: &Value) -> String {
    match value.as_f64() {
        Some(age_s) => format!("since {age_s:.1} s"),
        None => "nothing".to_owned(),
    }
}

/// A duration in seconds, for people.
pub fn duration(value: &Value) -> String {
    match value.as_f64() {
        None => "more than 60 s".to_owned(),
        Some(s) if s >= 1.0 => format!("{s} s"),
        Some(s) if s >= 1e-3 => format!("{} ms", s * 1e3),
        Some(s) => format!("{} µs", (s * 1e6).round()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn problems_come_first() {
        let status = json!({
            "problems": ["it burns"], "url": "file:///v/", "state": "open", "connections": 2,
            "volume": {"checkpoint": 7, "undurable_age_s": 1.25, "unpublished_age_s": null,
                       "buffer": {"bytes": 1024, "limit_bytes": 1048576}},
            "requests": {"read": {"count": 3, "bytes": 4096, "p50_s": 0.001, "p99_s": null, "failures": 1},
                         "trim": {"count": 0}},
            "store": {"requests": {"get": {"count": 2}, "put": {"count": 3}}, "sent_bytes": 0, "received_bytes": 0,
                      "cost_dollars": 0.5},
        });
        let text = text(&status);
        assert!(text.starts_with("PROBLEM"), "{text}");
        for part in [
            "since 1.2 s",
            "nothing",
            "3 requests, 4 KiB, half within 1 ms, 99 of 100 within more than 60 s, 1 failed",
            "5 requests",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert!(!text.contains("trim"), "{text}");
    }
}
