//! A long piece of work on a terminal: the bar that shows how far it is, and the signals that stop it.

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Result;
use hypernbd_volume::transfer::{Control, Phase};
use hypernbd_volume::units::format_size;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rustix::process::Signal;
use tokio::runtime::{Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use crate::commands::supervise::is_ignored;

/// How often the bar is brought up to date.
const REDRAW: Duration = Duration::from_millis(200);
const TEMPLATE: &str = "{prefix} [{wide_bar}] {percent:>3}%, {bytes} of {total_bytes}, {msg}, {eta} left";
/// A shell's exit status for the end by a signal, without the signal's number.
const SIGNALLED: i32 = 128;

/// What the first signal does. The second one ends the process at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AtSignal {
    /// The work is told to stop, and leaves things in order.
    Stop,
    /// The process ends: there is nothing to leave in order.
    End,
}

/// Watches a piece of work until it is dropped.
pub struct Watch {
    control: Arc<Control>,
    signal: Arc<AtomicI32>,
    is_over: Arc<AtomicBool>,
    bar: Option<JoinHandle<()>>,
}

impl Watch {
    /// Shows a bar on standard error, where that is a terminal, and listens for signals.
    pub fn start(runtime: &Runtime, at_signal: AtSignal) -> Result<Self> {
        Self::on(runtime.handle(), at_signal)
    }

    /// As [`Self::start`], for who is on the runtime already.
    pub fn on(runtime: &Handle, at_signal: AtSignal) -> Result<Self> {
        let control = Arc::new(Control::default());
        let number = Arc::new(AtomicI32::new(0));
        let is_over = Arc::new(AtomicBool::new(false));
        listen(
            runtime,
            at_signal,
            control.clone(),
            number.clone(),
            is_over.clone(),
        )?;
        let bar = std::io::stderr().is_terminal().then(|| {
            let (control, is_over) = (control.clone(), is_over.clone());
            std::thread::spawn(move || show(&control, &is_over))
        });
        Ok(Self {
            control,
            signal: number,
            is_over,
            bar,
        })
    }

    /// What the work is watched and stopped by.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// The exit status of work that was stopped: as a shell has it for the end by the signal.
    pub fn stopped(&self) -> ExitCode {
        let status = SIGNALLED + self.signal.load(Ordering::Acquire);
        ExitCode::from(u8::try_from(status).unwrap_or(1))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
        if let Some(bar) = self.bar.take() {
            let _ = bar.join();
        }
    }
}

fn listen(
    runtime: &Handle,
    at_signal: AtSignal,
    control: Arc<Control>,
    number: Arc<AtomicI32>,
    is_over: Arc<AtomicBool>,
) -> Result<()> {
    let _guard = runtime.enter();
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ];
    for kind in kinds {
        if kind == SignalKind::hangup() && is_ignored(Signal::HUP) {
            continue;
        }
        let mut signals = signal(kind)?;
        let (control, number, is_over) = (control.clone(), number.clone(), is_over.clone());
        runtime.spawn(async move {
            while signals.recv().await.is_some() {
                let earlier = number.swap(kind.as_raw_value(), Ordering::AcqRel);
                // What follows a piece of work that is over is not told to stop.
                if earlier != 0 || at_signal == AtSignal::End || is_over.load(Ordering::Acquire) {
                    std::process::exit(SIGNALLED + kind.as_raw_value());
                }
                control.stop();
                crate::complain("stopping; again to stop at once, and leave things as they are");
            }
        });
    }
    Ok(())
}

/// Draws until the work is over.
fn show(control: &Control, is_over: &AtomicBool) {
    let style = ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
    let mut shown: Option<(Phase, Instant, ProgressBar)> = None;
    while !is_over.load(Ordering::Acquire) {
        let phase = control.phase();
        if phase != Phase::Preparing && shown.as_ref().is_none_or(|(of, ..)| *of != phase) {
            if let Some((.., bar)) = shown.take() {
                bar.finish_and_clear();
            }
            let bar =
                ProgressBar::with_draw_target(Some(control.total_bytes()), ProgressDrawTarget::stderr());
            bar.set_style(style.clone());
            bar.set_prefix(match phase {
                Phase::Verifying => "verifying",
                Phase::Checking => "checking",
                _ => "copying",
            });
            shown = Some((phase, Instant::now(), bar));
        }
        if let Some((_, since, bar)) = &shown {
            let seconds = since.elapsed().as_secs_f64().max(0.001);
            bar.set_message(rate(control.data_bytes(), seconds));
            bar.set_position(control.settled_bytes());
        }
        std::thread::sleep(REDRAW);
    }
    if let Some((.., bar)) = shown {
        bar.finish_and_clear();
    }
}

/// A rate for people.
pub fn rate(bytes: u64, seconds: f64) -> String {
    format!("{}/s", format_size((bytes as f64 / seconds.max(0.001)) as u64))
}
