//! The plugin: where it is, and whether it is one that can go on where another one ends.

use std::env;
use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use hypernbd_volume::buffer_file::{BUFFER_FILE_KEY, BUFFER_FILE_VERSION};

/// As cargo builds it, beside the command line.
const BUILT: &str = "libhypernbd.so";
/// As nbdkit finds it by its name, in nbdkit's directory of plugins.
const INSTALLED: &str = "nbdkit-hypernbd-plugin.so";

/// The plugin: what `HYPERNBD_PLUGIN` names, or the one beside this program, or the one that this nbdkit would load by its name.
pub fn find(nbdkit: &OsStr) -> Result<PathBuf> {
    if let Some(path) = env::var_os("HYPERNBD_PLUGIN") {
        let path = PathBuf::from(path);
        if !path.is_file() {
            bail!(
                "HYPERNBD_PLUGIN={} is not a file: set it to the path of {BUILT}",
                path.display()
            );
        }
        return Ok(std::path::absolute(path)?);
    }
    let program = env::current_exe().context("cannot tell where this program is")?;
    let built = program.with_file_name(BUILT);
    if built.is_file() {
        return Ok(built);
    }
    let asked = std::process::Command::new(nbdkit).arg("--dump-config").output();
    let told = asked.map_err(|error| cannot_start(nbdkit, error))?.stdout;
    let installed = plugin_dir(&String::from_utf8_lossy(&told)).map(|dir| dir.join(INSTALLED));
    match installed {
        Some(path) if path.is_file() => Ok(path),
        other => bail!(
            "the plugin is neither at {} nor {}: install it (make install), build it (cargo build --release), or set \
             HYPERNBD_PLUGIN to its path",
            built.display(),
            other.map_or_else(
                || "in a directory that nbdkit names".to_string(),
                |path| format!("at {}", path.display())
            ),
        ),
    }
}

/// Whether the plugin that would be loaded now can read what the one that runs would leave.
pub fn check(nbdkit: &OsStr, plugin: &Path) -> Result<()> {
    let asked = std::process::Command::new(nbdkit)
        .arg(plugin)
        .arg("--dump-plugin")
        .output();
    let told = asked.map_err(|error| cannot_start(nbdkit, error))?.stdout;
    let wanted = format!("{BUFFER_FILE_KEY}={BUFFER_FILE_VERSION}");
    match String::from_utf8_lossy(&told).lines().any(|line| line == wanted) {
        true => Ok(()),
        false => bail!(
            "{} does not say that it reads the files of write_buffer_dir that this release writes ({wanted})",
            plugin.display()
        ),
    }
}

/// nbdkit could not be started; says how to get one.
pub fn cannot_start(nbdkit: &OsStr, error: std::io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        ErrorKind::NotFound => ": install nbdkit (apt install nbdkit), or set NBDKIT to its path",
        _ => "",
    };
    anyhow::Error::new(error).context(format!("cannot start {}{hint}", nbdkit.display()))
}

/// The directory of plugins, in what `nbdkit --dump-config` prints.
fn plugin_dir(config: &str) -> Option<&Path> {
    config
        .lines()
        .find_map(|line| line.strip_prefix("plugindir="))
        .map(Path::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nbdkits_directory_of_plugins_is_read() {
        let config =
            "name=nbdkit\nfilterdir=/usr/lib/nbdkit/filters\nplugindir=/usr/lib/nbdkit/plugins\ntls=yes\n";
        assert_eq!(plugin_dir(config), Some(Path::new("/usr/lib/nbdkit/plugins")));
        assert_eq!(plugin_dir("name=nbdkit\n"), None);
    }
}
