//! `hypernbd attach URI [DEVICE]`, `hypernbd detach DEVICE`, `hypernbd attached`.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use clap::value_parser;
use hypernbd_attach::{Attached, Options, READY_VARIABLE, Uri};
use serde_json::json;

use crate::output;

const HOLD_DEFAULT_MIB: u32 = 64;
/// More than any machine should keep out of its own page cache.
const HOLD_MAX_MIB: i64 = 16 << 10;

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What a server listens on: nbd://HOST[:PORT][/EXPORT] or nbd+unix:///[EXPORT]?socket=PATH; with TLS nbds, and
    /// tls-certificates=DIR after the '?'
    pub uri: Uri,

    /// The device, such as /dev/nbd3; the next that is free if none is named
    pub device: Option<String>,

    /// Make a link /dev/hypernbd/NAME to it, by udev
    #[arg(long)]
    pub name: Option<String>,

    /// The device's block size in bytes, 512 to 4096; the export's if it is not given
    #[arg(long, value_name = "BYTES")]
    pub block_size: Option<u32>,

    /// Hold up to so much of what the server has answered and not flushed, and send it again to the next server
    #[arg(long, value_name = "MIB", default_value_t = HOLD_DEFAULT_MIB, value_parser = value_parser!(u32).range(..=HOLD_MAX_MIB))]
    pub hold: u32,

    /// Let requests fail when the server has been away for so long; without it they wait for ever
    #[arg(long, value_name = "SECONDS")]
    pub dead_after: Option<u32>,

    /// Wait so long for a server that is not there yet
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub wait: u32,

    /// Stay in the foreground, for systemd
    #[arg(long)]
    pub foreground: bool,

    /// Take whoever connects to this socket for the kernel, for tests
    #[arg(long, value_name = "PATH", hide = true, requires = "foreground")]
    pub kernel_socket: Option<PathBuf>,
}

/// Arguments of `detach`.
#[derive(Debug, clap::Args)]
pub struct DetachArgs {
    /// The device, its name, or the URI that it was attached with
    pub device: String,

    /// Take it away from whoever uses it, and even if its server is away: what was not flushed is lost
    #[arg(long)]
    pub force: bool,

    /// Give up when the server answers nothing for so long while what was written is flushed
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub wait: u32,

    /// What detach runs beside itself: claims the device, flushes it, and keeps it until standard input ends
    #[arg(long, hide = true)]
    pub hold_flushed: bool,
}

/// Arguments of `attached`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Print JSON, with times in seconds since 1970
    #[arg(long)]
    pub json: bool,

    /// Ask the server of this device, named as for detach, whether its export has grown; the device gets the new size in use
    #[arg(long, value_name = "DEVICE", conflicts_with = "json")]
    pub refresh: Option<String>,
}

/// Attaches, in the background unless told otherwise.
pub fn run(args: &Args) -> Result<()> {
    if !args.foreground && std::env::var_os(READY_VARIABLE).is_none() {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(in_foreground(std::env::args_os().skip(1)));
        return output::line(hypernbd_attach::in_background(&mut command)?);
    }
    hypernbd_attach::attach(&Options {
        uri: args.uri.clone(),
        device: args.device.clone(),
        name: args.name.clone(),
        block_size: args.block_size,
        hold_bytes: (args.hold as usize) << 20,
        dead_after: args.dead_after.map(|seconds| Duration::from_secs(seconds.into())),
        wait: Duration::from_secs(args.wait.into()),
        kernel_socket: args.kernel_socket.clone(),
    })?;
    Ok(())
}

/// The words of a command line that is to stay in the foreground. Behind a `--` the option would be an argument.
fn in_foreground(mut words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let verb = words.next();
    verb.into_iter()
        .chain([OsString::from("--foreground")])
        .chain(words)
        .collect()
}

/// Detaches.
pub fn detach(args: &DetachArgs) -> Result<()> {
    if args.hold_flushed {
        return Ok(hypernbd_attach::hold_flushed(&args.device)?);
    }
    let silence_max = Duration::from_secs(args.wait.into());
    let device = hypernbd_attach::detach(&args.device, args.force, silence_max)?;
    output::line(format_args!("{device} is detached"))
}

/// Lists what is attached, or has a device look whether its export has grown.
pub fn list(args: &ListArgs) -> Result<()> {
    if let Some(device) = &args.refresh {
        return refresh(device);
    }
    let all = hypernbd_attach::attached()?;
    if args.json {
        let all: Vec<_> = all.iter().map(as_json).collect();
        return output::line(serde_json::to_string_pretty(&all)?);
    }
    if all.is_empty() {
        return output::line("nothing is attached");
    }
    let mut text = format!(
        "{:<12} {:<16} {:<16} {:<24} SERVER\n",
        "DEVICE", "BYTES", "NAME", "SINCE"
    );
    for one in &all {
        let state = match (&one.lost, one.is_alive()) {
            (_, false) => "; its relay is gone: detach it".to_owned(),
            (Some(why), true) => format!("; away since {} ({why})", output::time(1000 * one.link_since)),
            (None, true) => match (&one.not_grown, one.export_size) {
                (Some(why), Some(size)) if one.size < Some(size) => {
                    format!("; its export has {size} bytes ({why})")
                }
                (Some(why), _) => format!("; whether its export has grown cannot be seen ({why})"),
                (None, _) => String::new(),
            },
        };
        let size = size(one);
        let name = one.name.as_deref().unwrap_or("-");
        let since = output::time(1000 * one.since);
        text += &format!(
            "{:<12} {size:<16} {name:<16} {since:<24} {}{state}\n",
            one.device, one.uri
        );
    }
    output::write(text)
}

fn refresh(device: &str) -> Result<()> {
    let (before, now) = hypernbd_attach::refresh(device)?;
    output::line(match before.size == now.size {
        true => format!("{} has {} bytes, as before", now.device, size(&now)),
        false => format!(
            "{} has {} bytes now, and had {}",
            now.device,
            size(&now),
            size(&before)
        ),
    })
}

fn size(one: &Attached) -> String {
    one.size.map_or_else(|| "-".to_owned(), |bytes| bytes.to_string())
}

fn as_json(one: &Attached) -> serde_json::Value {
    json!({
        "device": one.device,
        "name": one.name,
        "uri": one.uri,
        "size": one.size,
        "export_size": one.export_size,
        "not_grown_by": one.not_grown,
        "pid": one.pid,
        "since": one.since,
        "relay_is_alive": one.is_alive(),
        "link_is_up": one.lost.is_none(),
        "link_since": one.link_since,
        "link_lost_by": one.lost,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_stands_right_behind_the_verb() {
        let words = ["attach", "--", "nbd://h"].map(OsString::from);
        assert_eq!(
            in_foreground(words.into_iter()),
            ["attach", "--foreground", "--", "nbd://h"].map(OsString::from)
        );
    }
}
