//! Where the log goes: standard error as `RUST_LOG` says, and the system's log for a server in the background.
//!
//! What repeats is summarised, and the last lines are kept for `hypernbd report`.

use std::collections::VecDeque;
use std::ffi::CString;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use hypernbd_volume::monitor::log_lines;
use hypernbd_volume::options::{LOG_LEVEL_DEFAULT, LOG_MODULE_NOISY, LogFormat, LogWords};
use hypernbd_volume::repeats::{Decision, Repeats};
use log::{Level, LevelFilter, Log, Metadata, Record};
use once_cell::sync::{Lazy, OnceCell};

/// Lines that are kept.
const KEPT: usize = 200;

/// Set once the server has gone to the background, where standard error leads nowhere.
static IN_BACKGROUND: AtomicBool = AtomicBool::new(false);

/// What is logged, and how it looks on a terminal.
static TERMINAL: OnceCell<RwLock<env_logger::Logger>> = OnceCell::new();

/// How lines look, and which volume they are about, once that is known.
static FORMAT: OnceCell<(LogFormat, String)> = OnceCell::new();

/// What was said so far.
static SAID: Lazy<Mutex<Said>> = Lazy::new(|| {
    Mutex::new(Said {
        began: Instant::now(),
        repeats: Repeats::default(),
        kept: VecDeque::new(),
    })
});

struct Said {
    began: Instant,
    repeats: Repeats,
    kept: VecDeque<String>,
}

/// Starts logging. Of what `RUST_LOG` does not name there are warnings and errors.
pub fn start() {
    let terminal = built(&LogWords::of_environment());
    let level = terminal.filter();
    // A second start, or a logger set by someone else in the process, leaves the first one in place.
    if TERMINAL.set(RwLock::new(terminal)).is_ok() && log::set_boxed_logger(Box::new(Logger)).is_ok() {
        log::set_max_level(level);
    }
}

/// From now on lines look so, and are about this volume.
pub fn set_format(format: LogFormat, url: String) {
    let _ = FORMAT.set((format, url));
}

/// Tells of a `RUST_LOG` that was mistyped. Called once it is known how lines look.
pub fn tell_of_unknown_words() {
    if let Some(why) = LogWords::of_environment().wrong {
        log::warn!("{why}");
    }
}

fn built(words: &LogWords) -> env_logger::Logger {
    let mut builder = env_logger::Builder::new();
    // One directive alone would silence whatever it is not about.
    builder
        .filter_level(LOG_LEVEL_DEFAULT)
        .filter_module(LOG_MODULE_NOISY, LevelFilter::Error)
        .parse_filters(&words.understood);
    if let Ok(style) = std::env::var(env_logger::DEFAULT_WRITE_STYLE_ENV) {
        builder.parse_write_style(&style);
    }
    builder.build()
}

/// From now on logs what `filter` says, in the words of `RUST_LOG`.
///
/// # Errors
/// When it is no filter.
pub fn set(filter: &str) -> Result<(), String> {
    let words = LogWords::read(filter);
    if let Some(why) = &words.wrong {
        return Err(why.clone());
    }
    let terminal = built(&words);
    let level = terminal.filter();
    if let Some(known) = TERMINAL.get() {
        *known.write().unwrap_or_else(PoisonError::into_inner) = terminal;
        log::set_max_level(level);
    }
    Ok(())
}

fn terminal() -> Option<RwLockReadGuard<'static, env_logger::Logger>> {
    Some(TERMINAL.get()?.read().unwrap_or_else(PoisonError::into_inner))
}

/// Looks where standard error leads now: nbdkit points it at the null device when it goes to the background.
pub fn after_fork() {
    IN_BACKGROUND.store(stderr_is_null_device(), Ordering::Relaxed);
}

/// The last lines, the oldest first.
pub fn last_lines() -> Vec<String> {
    let said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    said.kept.iter().cloned().collect()
}

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        terminal().is_some_and(|terminal| terminal.enabled(metadata))
    }

    fn log(&self, record: &Record<'_>) {
        let Some(terminal) = terminal().filter(|terminal| terminal.matches(record)) else {
            return;
        };
        let text = record.args().to_string();
        let (decision, over) = {
            let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
            let now_ms = said.began.elapsed().as_millis() as u64;
            let over = said.repeats.over(now_ms);
            // What is no failure is said as often as it is.
            let decision = match record.level() <= Level::Warn {
                true => said.repeats.on(&text, now_ms),
                false => Decision::Say,
            };
            (decision, over)
        };
        for (text, more) in over {
            let summary = format!("and {more} more: {text}");
            say(&terminal, Level::Warn, module_path!(), &summary);
        }
        match decision {
            Decision::Say => say(&terminal, record.level(), record.target(), &text),
            Decision::SayWith(more) => {
                let text = format!("{text} (and {more} more)");
                say(&terminal, record.level(), record.target(), &text);
            }
            Decision::Count => {}
        }
    }

    fn flush(&self) {
        if let Some(terminal) = terminal() {
            terminal.flush();
        }
    }
}

/// Writes a line where it belongs, and keeps it.
fn say(terminal: &env_logger::Logger, level: Level, target: &str, text: &str) {
    let (format, url) = FORMAT
        .get()
        .map_or((LogFormat::Text, ""), |(format, url)| (*format, url));
    let line = log_lines::json(level, target, text, url);
    let in_background = IN_BACKGROUND.load(Ordering::Relaxed);
    match (format, in_background) {
        (LogFormat::Json, true) => to_system_log(level, &line),
        (LogFormat::Json, false) => {
            // In one piece. A terminal that is gone is nobody's concern.
            let _ = std::io::stderr().lock().write_all(format!("{line}\n").as_bytes());
        }
        (LogFormat::Text, true) => to_system_log(level, &format!("{target}: {text}")),
        (LogFormat::Text, false) => terminal.log(
            &Record::builder()
                .level(level)
                .target(target)
                .args(format_args!("{text}"))
                .build(),
        ),
    }
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.kept.len() >= KEPT {
        said.kept.pop_front();
    }
    said.kept.push_back(line);
}

fn to_system_log(level: Level, text: &str) {
    let priority = match level {
        Level::Error => libc::LOG_ERR,
        Level::Warn => libc::LOG_WARNING,
        Level::Info => libc::LOG_INFO,
        Level::Debug | Level::Trace => libc::LOG_DEBUG,
    };
    let text = format!("hypernbd: {text}").replace('\0', "\\0");
    let Ok(text) = CString::new(text) else { return };
    // SAFETY: the format takes one string, and both are valid C strings.
    unsafe { libc::syslog(libc::LOG_DAEMON | priority, c"%s".as_ptr(), text.as_ptr()) };
}

fn stderr_is_null_device() -> bool {
    let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `fstat` fills the struct whenever it answers 0, and it is read only then.
    let status = unsafe {
        if libc::fstat(libc::STDERR_FILENO, status.as_mut_ptr()) != 0 {
            return false;
        }
        status.assume_init()
    };
    status.st_mode & libc::S_IFMT == libc::S_IFCHR && status.st_rdev == libc::makedev(1, 3)
}
