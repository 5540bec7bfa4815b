//! How it looks: problems first, then what clients wait for, then the rest as far as there is room.

use hypernbd_volume::units::format_size;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Gauge, Paragraph, Row, Table, Wrap};
use serde_json::Value;

use super::Seen;
use crate::commands::stats::duration;

/// Share of the write buffer from which on writers are slowed down.
const SLOWED: f64 = 0.625;

pub fn draw(frame: &mut Frame<'_>, seen: &Seen) {
    let Some(status) = &seen.now else { return };
    let problems = problems(seen, status);
    let head = head(status);
    let (kinds, operations) = (requests(seen, status), operations(seen, status));
    let width = usize::from(frame.area().width).max(1);
    let lines = |text: &[Line<'_>]| {
        text.iter()
            .map(|line| line.width().div_ceil(width).max(1))
            .sum::<usize>() as u16
    };
    let areas = Layout::vertical([
        Constraint::Length(lines(&problems)),
        Constraint::Length(lines(&head)),
        Constraint::Length(1),
        Constraint::Length(kinds.len() as u16 + 1),
        Constraint::Length(operations.len() as u16 + 1),
        Constraint::Min(0),
        Constraint::Length(1),
    ]);
    let [
        problem_area,
        head_area,
        buffer_area,
        kind_area,
        operation_area,
        _,
        foot,
    ] = areas.areas(frame.area());
    let wrap = Wrap { trim: false };
    frame.render_widget(Paragraph::new(problems).wrap(wrap), problem_area);
    frame.render_widget(Paragraph::new(head).wrap(wrap), head_area);
    frame.render_widget(buffer(status), buffer_area);
    let columns = [
        Constraint::Length(10),
        Constraint::Length(9),
        Constraint::Length(12),
        Constraint::Length(9),
        Constraint::Length(9),
        Constraint::Length(8),
    ];
    let title = |name| {
        let names = [name, "a second", "bytes/s", "half", "99 %", "failed"];
        Row::new(names).style(Style::new().add_modifier(Modifier::REVERSED))
    };
    frame.render_widget(Table::new(kinds, columns).header(title("clients")), kind_area);
    frame.render_widget(
        Table::new(operations, columns).header(title("store")),
        operation_area,
    );
    frame.render_widget(
        Paragraph::new("q ends").style(Style::new().fg(Color::DarkGray)),
        foot,
    );
}

fn word(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

fn problems<'a>(seen: &Seen, status: &Value) -> Vec<Line<'a>> {
    let told = status["problems"].as_array().into_iter().flatten().map(word);
    let all = seen.failure.clone().into_iter().chain(told);
    let line = |text: String| Line::styled(text, Style::new().fg(Color::Red).add_modifier(Modifier::BOLD));
    all.map(line).collect()
}

fn head<'a>(status: &Value) -> Vec<Line<'a>> {
    let volume = &status["volume"];
    let age = |value: &Value| match value.as_f64() {
        Some(age_s) => format!("{age_s:.1} s"),
        None => "none".to_owned(),
    };
    let store = &status["store"];
    vec![
        Line::styled(word(&status["url"]), Style::new().add_modifier(Modifier::BOLD)),
        Line::from(vec![
            Span::raw("oldest write not durable: "),
            Span::styled(
                age(&volume["undurable_age_s"]),
                Style::new().add_modifier(Modifier::BOLD),
            ),
            Span::raw(format!(", not published: {}", age(&volume["unpublished_age_s"]))),
        ]),
        Line::from(format!(
            "{}, {} connections, checkpoint {}, epoch {}",
            word(&status["state"]),
            number(&status["connections"]),
            word(&volume["checkpoint"]),
            word(&status["lease"]["epoch"]),
        )),
        Line::from(format!(
            "published {}, failed {}; requests to the store about ${:.4}",
            number(&status["publishes"]["count"]),
            number(&status["publishes"]["failures"]),
            store["cost_dollars"].as_f64().unwrap_or_default(),
        )),
    ]
}

fn buffer<'a>(status: &Value) -> Gauge<'a> {
    let buffer = &status["volume"]["buffer"];
    let (bytes, limit_bytes) = (number(&buffer["bytes"]), number(&buffer["limit_bytes"]));
    let share = (bytes as f64 / limit_bytes.max(1) as f64).clamp(0.0, 1.0);
    let color = if share > SLOWED { Color::Red } else { Color::Green };
    Gauge::default()
        .gauge_style(Style::new().fg(color))
        .ratio(share)
        .label(format!(
            "write buffer {} of {}",
            format_size(bytes),
            format_size(limit_bytes)
        ))
}

fn requests<'a>(seen: &Seen, status: &Value) -> Vec<Row<'a>> {
    let all = status["requests"].as_object().into_iter().flatten();
    let used = all.filter(|(_, of)| number(&of["count"]) > 0);
    used.map(|(kind, of)| {
        Row::new([
            kind.clone(),
            format!("{:.1}", seen.rate(&format!("/requests/{kind}/count"))),
            format_size(seen.rate(&format!("/requests/{kind}/bytes")) as u64),
            duration(&of["p50_s"]),
            duration(&of["p99_s"]),
            number(&of["failures"]).to_string(),
        ])
    })
    .collect()
}

fn operations<'a>(seen: &Seen, status: &Value) -> Vec<Row<'a>> {
    let all = status["store"]["requests"].as_object().into_iter().flatten();
    let used = all.filter(|(_, of)| number(&of["count"]) > 0);
    let mut rows: Vec<Row<'_>> = used
        .map(|(operation, of)| {
            let failures = of["failures"].as_object().into_iter().flatten();
            let failed: u64 = failures.map(|(_, count)| number(count)).sum();
            Row::new([
                operation.clone(),
                format!("{:.1}", seen.rate(&format!("/store/requests/{operation}/count"))),
                String::new(),
                duration(&of["p50_s"]),
                duration(&of["p99_s"]),
                failed.to_string(),
            ])
        })
        .collect();
    for (name, pointer) in [
        ("sent", "/store/sent_bytes"),
        ("received", "/store/received_bytes"),
    ] {
        rows.push(Row::new([
            name.to_owned(),
            String::new(),
            format_size(seen.rate(pointer) as u64),
        ]));
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use serde_json::json;

    fn shown(width: u16, height: u16) -> String {
        let status = |now_ms: u64, count: u64| {
            json!({
                "now_ms": now_ms, "url": "s3://bucket/disk/", "state": "open", "connections": 3,
                "problems": ["the write buffer is 95 % full: writers are slowed down or wait"],
                "volume": {"checkpoint": 12, "undurable_age_s": 2.5, "unpublished_age_s": null,
                           "buffer": {"bytes": 973_u64 << 20, "limit_bytes": 1_u64 << 30}},
                "lease": {"epoch": 4}, "publishes": {"count": 7, "failures": 1},
                "requests": {"write": {"count": count, "bytes": count * 4096, "p50_s": 0.0001, "p99_s": 0.001, "failures": 0},
                             "trim": {"count": 0}},
                "store": {"requests": {"put": {"count": count, "p50_s": 0.05, "p99_s": null, "failures": {"server": 2}}},
                          "sent_bytes": count * 8192, "received_bytes": 0, "cost_dollars": 0.25},
            })
        };
        let mut seen = Seen::default();
        seen.take_in(Ok(status(1000, 0)));
        seen.take_in(Ok(status(2000, 256)));
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, &seen)).unwrap();
        let buffer = terminal.backend().buffer();
        let rows = buffer.content().chunks(usize::from(width));
        let text = |row: &[ratatui::buffer::Cell]| row.iter().map(|cell| cell.symbol()).collect::<String>();
        rows.map(|row| text(row) + "\n").collect()
    }

    #[test]
    fn problems_come_first_and_rates_are_shown() {
        let screen = shown(80, 24);
        let first = screen.lines().next().unwrap();
        assert!(first.starts_with("the write buffer is 95 % full"), "{screen}");
        for part in [
            "s3://bucket/disk/",
            "not durable: 2.5 s",
            "973 MiB of 1 GiB",
            "256.0",
            "1 MiB",
            "100 µs",
            "$0.2500",
        ] {
            assert!(screen.contains(part), "{part}\n{screen}");
        }
        assert!(!screen.contains("trim"), "{screen}");
    }

    #[test]
    fn a_small_terminal_shows_what_matters() {
        let screen = shown(40, 12);
        for part in ["the write buffer is 95 %", "not durable: 2.5 s", "write buffer"] {
            assert!(screen.contains(part), "{part}\n{screen}");
        }
    }
}
