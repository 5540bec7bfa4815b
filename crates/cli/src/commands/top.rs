//! `hypernbd top SERVER`: what a running server says of itself, again and again.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hypernbd_volume::monitor::client::{self, ClientError, ServerAddress};
use hypernbd_volume::options::StoreOptions;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::server;

mod screen;

/// How often the keyboard is looked at.
const KEY_POLL: Duration = Duration::from_millis(100);

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume that a server on this machine holds, the path of one of the server's sockets, or the address of its metrics
    /// (http://HOST:PORT)
    pub server: String,

    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub interval: u64,
}

/// What was said at one look, and at the one before, for what there is a second of.
#[derive(Debug, Default)]
pub struct Seen {
    before: Option<Value>,
    now: Option<Value>,
    /// Why there is nothing newer.
    failure: Option<String>,
}

impl Seen {
    fn take_in(&mut self, answer: Result<Value, ClientError>) {
        match answer {
            Ok(status) => {
                self.before = self.now.replace(status);
                self.failure = None;
            }
            Err(error) => self.failure = Some(format!("{:#}", anyhow::Error::from(error))),
        }
    }

    /// How much more of a number there is each second.
    fn rate(&self, pointer: &str) -> f64 {
        let (Some(before), Some(now)) = (&self.before, &self.now) else {
            return 0.0;
        };
        let at = |status: &Value| Some((status.pointer(pointer)?.as_f64()?, status["now_ms"].as_f64()?));
        match (at(before), at(now)) {
            // A server that began anew counts from 0.
            (Some((from, t0)), Some((to, t1))) if to >= from && t1 > t0 => (to - from) * 1e3 / (t1 - t0),
            _ => 0.0,
        }
    }
}

/// Shows it until the user has seen enough.
pub fn run(args: &Args, store: &StoreOptions, runtime: &Runtime) -> Result<()> {
    if !std::io::stdout().is_terminal() {
        bail!("standard output is no terminal: hypernbd stats says the same once, with --json for programs");
    }
    let place = runtime.block_on(server::place(&args.server, store))?;
    let mut seen = Seen::default();
    seen.take_in(Ok(runtime.block_on(client::ask(&place, "/status"))?));
    let mut terminal = ratatui::try_init()?;
    let watched = watch(args, &place, runtime, &mut seen, &mut terminal);
    ratatui::restore();
    watched
}

fn watch(
    args: &Args,
    place: &ServerAddress,
    runtime: &Runtime,
    seen: &mut Seen,
    terminal: &mut DefaultTerminal,
) -> Result<()> {
    let interval = Duration::from_secs(args.interval);
    let mut next = Instant::now() + interval;
    loop {
        terminal.draw(|frame| screen::draw(frame, seen))?;
        while Instant::now() < next {
            let wait = KEY_POLL.min(next.saturating_duration_since(Instant::now()));
            if !event::poll(wait)? {
                continue;
            }
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    _ => {}
                },
                Event::Resize(..) => {
                    terminal.draw(|frame| screen::draw(frame, seen))?;
                }
                _ => {}
            }
        }
        next += interval;
        seen.take_in(runtime.block_on(client::ask(place, "/status")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rates_are_of_the_servers_clock() {
        let mut seen = Seen::default();
        let status = |now_ms: u64, bytes: u64| json!({"now_ms": now_ms, "store": {"sent_bytes": bytes}});
        seen.take_in(Ok(status(1000, 50)));
        assert_eq!(seen.rate("/store/sent_bytes"), 0.0, "there is nothing before it");
        seen.take_in(Ok(status(3000, 250)));
        assert_eq!(seen.rate("/store/sent_bytes"), 100.0);
        assert_eq!(seen.rate("/nothing"), 0.0);
        seen.take_in(Ok(status(4000, 10)));
        assert_eq!(seen.rate("/store/sent_bytes"), 0.0, "another server");
    }
}
