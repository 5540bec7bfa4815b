//! The plugin's parameters, from nbdkit's command line.

use std::io::Write;
use std::sync::Mutex;

use hypernbd_volume::buffer_file::{BUFFER_FILE_KEY, BUFFER_FILE_VERSION};
use hypernbd_volume::options::durability::Durability;
use hypernbd_volume::options::{OptionError, ServeConfig, ServeOptions, ThreadModelOption, config_help};
use nbdkit::{Result, ThreadModel};
use once_cell::sync::{Lazy, OnceCell};

use crate::{errno, logging, nbdkit_ext};

/// What has been read so far; nbdkit gives one parameter a call.
static GIVEN: Lazy<Mutex<ServeOptions>> = Lazy::new(Mutex::default);

/// What was read in the end.
static CONFIG: OnceCell<ServeConfig> = OnceCell::new();

/// The configuration; `None` until [`complete`], and when nbdkit only asks for `--help` or `--dump-plugin`.
pub fn config() -> Option<&'static ServeConfig> {
    CONFIG.get()
}

/// Whether the server has many volumes, each by its name.
pub fn is_of_many() -> bool {
    config().is_some_and(|config| config.volumes_open.is_some())
}

/// One line a parameter, for `nbdkit --help`.
pub fn help() -> &'static str {
    static HELP: Lazy<String> = Lazy::new(config_help);
    &HELP
}

/// Takes in one parameter.
pub fn set(key: &str, value: &str) -> Result<()> {
    let mut given = GIVEN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    given.set(key, value).map_err(refused)
}

/// Checks the whole.
pub fn complete() -> Result<()> {
    let given = std::mem::take(&mut *GIVEN.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    let config = given.finish().map_err(refused)?;
    logging::set_format(config.log_format, config.url.to_string());
    logging::tell_of_unknown_words();
    for warning in &config.warnings {
        log::warn!("{warning}");
    }
    CONFIG
        .set(config)
        .map_err(|_| errno::error(libc::EINVAL, "the parameters were completed twice"))
}

/// Parallel, unless told otherwise or the server at hand would abort with it.
pub fn thread_model() -> ThreadModel {
    if is_parallel() {
        return ThreadModel::Parallel;
    }
    let asked = config().map(|config| config.thread_model).unwrap_or_default();
    if asked == ThreadModelOption::Auto && config().is_some() {
        log::warn!(
            "this nbdkit is older than 1.34 and would abort when a client disconnects with requests in flight: \
             each connection's requests are served one by one; use a newer nbdkit for full speed"
        );
    }
    ThreadModel::SerializeRequests
}

/// Whether a connection's requests are served several at a time.
pub fn is_parallel() -> bool {
    match config().map(|config| config.thread_model).unwrap_or_default() {
        ThreadModelOption::Parallel => true,
        ThreadModelOption::SerializeRequests => false,
        ThreadModelOption::Auto => nbdkit_ext::survives_disconnects(),
    }
}

/// Extra lines for `--dump-plugin`.
pub fn dump() {
    let classes =
        Durability::ALL.map(|class| format!("hypernbd_durability_{}={}\n", class.name(), class.sentence()));
    let text = format!(
        "hypernbd_version={}\n{BUFFER_FILE_KEY}={BUFFER_FILE_VERSION}\n{}",
        env!("CARGO_PKG_VERSION"),
        classes.concat()
    );
    // A reader that has gone, as in `| head`, is no reason to panic.
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn refused(error: OptionError) -> nbdkit::Error {
    errno::error(libc::EINVAL, error.to_string())
}
