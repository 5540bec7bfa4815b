//! `hypernbd top SERVER`: what a running server says of itself, again and again.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hypernbd_volume::monitor::client::{self, ClientError, ServerAddress};
use hypernbd_volume::options::StoreOptions;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use rustix::process::Signal;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};

use super::server;
use super::supervise::is_ignored;

mod screen;

/// How often the keyboard is looked at.
const KEY_POLL: Duration = Duration::from_millis(100);
/// A shell's exit status for the end by a signal, without the signal's number.
const SIGNALLED: i32 = 128;

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

/// The number of the signal that told it to end; 0 until one has. The terminal is to be given back then, too.
type Told = tokio::sync::watch::Receiver<i32>;

fn listen(runtime: &Runtime) -> Result<Told> {
    let (tell, told) = tokio::sync::watch::channel(0);
    let tell = Arc::new(tell);
    let _guard = runtime.enter();
    for kind in [SignalKind::terminate(), SignalKind::hangup()] {
        if kind == SignalKind::hangup() && is_ignored(Signal::HUP) {
            continue;
        }
        let (mut signals, tell) = (signal(kind)?, tell.clone());
        runtime.spawn(async move {
            if signals.recv().await.is_some() {
                tell.send_replace(kind.as_raw_value());
            }
        });
    }
    Ok(told)
}

/// Shows it until the user has seen enough, or a signal comes: then it ends as a shell has it for that.
pub fn run(args: &Args, store: &StoreOptions, runtime: &Runtime) -> Result<ExitCode> {
    if !std::io::stdout().is_terminal() {
        bail!("standard output is no terminal: hypernbd stats says the same once, with --json for programs");
    }
    let place = runtime.block_on(server::place(&args.server, store))?;
    let mut seen = Seen::default();
    seen.take_in(Ok(runtime.block_on(client::ask(&place, "/status"))?));
    let mut told = listen(runtime)?;
    let mut terminal = ratatui::try_init()?;
    let watched = watch(args, &place, runtime, &mut seen, &mut terminal, &mut told);
    // A terminal that has gone takes nothing back.
    let _ = ratatui::try_restore();
    watched?;
    Ok(match *told.borrow() {
        0 => ExitCode::SUCCESS,
        signal => ExitCode::from(u8::try_from(SIGNALLED + signal).unwrap_or(u8::MAX)),
    })
}

fn watch(
    args: &Args,
    place: &ServerAddress,
    runtime: &Runtime,
    seen: &mut Seen,
    terminal: &mut DefaultTerminal,
    told: &mut Told,
) -> Result<()> {
    let interval = Duration::from_secs(args.interval);
    let mut next = Instant::now() + interval;
    loop {
        terminal.draw(|frame| screen::draw(frame, seen))?;
        while Instant::now() < next {
            if *told.borrow() != 0 {
                return Ok(());
            }
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
        let answer = runtime.block_on(async {
            tokio::select! {
                answer = client::ask(place, "/status") => Some(answer),
                _ = told.changed() => None,
            }
        });
        match answer {
            Some(answer) => seen.take_in(answer),
            None => return Ok(()),
        }
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
