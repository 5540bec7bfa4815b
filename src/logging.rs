//! Where the log goes: standard error as `RUST_LOG` says, and the system's log for a server in the background.

use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};

use hypernbd_volume::options::{LOG_FILTER_DEFAULT, LOG_MODULE_NOISY};
use log::{Level, LevelFilter, Log, Metadata, Record};

/// Set once the server has gone to the background, where standard error leads nowhere.
static IN_BACKGROUND: AtomicBool = AtomicBool::new(false);

/// Starts logging. Without `RUST_LOG` there are warnings and errors.
pub fn start() {
    let terminal = env_logger::Builder::new()
        .filter_module(LOG_MODULE_NOISY, LevelFilter::Error)
        .parse_env(env_logger::Env::default().default_filter_or(LOG_FILTER_DEFAULT))
        .build();
    let level = terminal.filter();
    // A second start, or a logger set by someone else in the process, leaves the first one in place.
    if log::set_boxed_logger(Box::new(Logger { terminal })).is_ok() {
        log::set_max_level(level);
    }
}

/// Looks where standard error leads now: nbdkit points it at the null device when it goes to the background.
pub fn after_fork() {
    IN_BACKGROUND.store(stderr_is_null_device(), Ordering::Relaxed);
}

struct Logger {
    terminal: env_logger::Logger,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.terminal.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.terminal.matches(record) {
            return;
        }
        if IN_BACKGROUND.load(Ordering::Relaxed) {
            to_system_log(record);
        } else {
            self.terminal.log(record);
        }
    }

    fn flush(&self) {
        self.terminal.flush();
    }
}

fn to_system_log(record: &Record<'_>) {
    let priority = match record.level() {
        Level::Error => libc::LOG_ERR,
        Level::Warn => libc::LOG_WARNING,
        Level::Info => libc::LOG_INFO,
        Level::Debug | Level::Trace => libc::LOG_DEBUG,
    };
    let text = format!("hypernbd: {}: {}", record.target(), record.args()).replace('\0', "\\0");
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
