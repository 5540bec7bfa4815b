//! `hypernbd serve URL`: nbdkit on the plugin, in the foreground.

use std::env;
use std::ffi::OsString;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hypernbd_volume::WalPlace;
use hypernbd_volume::admin;
use hypernbd_volume::buffer_file;
use hypernbd_volume::monitor::NBD_URI;
use hypernbd_volume::options::durability::{Durability, LOSS_FILE};
use hypernbd_volume::options::{ServeConfig, ServeOptions, find_option};
use hypernbd_volume::url::VolumeUrl;
use tokio::process::Command;
use tokio::runtime::Runtime;

use super::connect::{Address, Clients};
use super::nbdkit_args::NbdkitArgs;
use super::note::Note;
use super::plugin;
use super::supervise::{Checked, Supervised};
use crate::flags::{ServeFlags, StoreFlags, key_value};
use crate::wrong_usage;

/// How long the store may take to tell that a next server could start.
const REACH_MAX: Duration = Duration::from_secs(20);

/// The plugin's parameter that `--wal` sets.
const WAL_KEY: &str = "backend_wal_url";
/// The one that `--takeover` sets.
const TAKEOVER_KEY: &str = "takeover";

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume; it must exist
    pub url: VolumeUrl,

    /// Serve every volume directly below the URL, each as an export by its name
    #[arg(long)]
    pub volumes: bool,

    /// Address to listen on; there is no password and no encryption, so keep it where you trust everyone
    #[arg(long, value_name = "ADDRESS", default_value_t = Ipv4Addr::LOCALHOST.into(), conflicts_with = "socket")]
    pub bind: IpAddr,

    /// TCP port to listen on
    #[arg(long, value_name = "PORT", default_value_t = 10809, conflicts_with = "socket", value_parser = clap::value_parser!(u16).range(1..))]
    pub port: u16,

    /// Listen on a Unix socket instead
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// Serve read-only: clients cannot write, and nothing on the store is changed
    #[arg(short, long)]
    pub read_only: bool,

    /// The write-ahead log, with which a flush is one request: auto, beside the volume; off; or a place of its own, as
    /// --backend-wal-url has it [default: auto on S3, off in a directory]
    #[arg(long, value_name = "off|auto|URL", conflicts_with = WAL_KEY)]
    pub wal: Option<String>,

    /// Log what happens to the volume; twice: every request as well
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,

    /// Set a parameter of the plugin by its name; may be repeated
    #[arg(short, long = "option", value_name = "KEY=VALUE", value_parser = key_value)]
    pub options: Vec<(String, String)>,

    #[command(flatten)]
    flags: ServeFlags,

    /// Further options for nbdkit, and parameters of its filters, as in: -- --filter=log logfile=/tmp/log
    #[arg(last = true, value_name = "NBDKIT ARGUMENT")]
    pub nbdkit_args: Vec<String>,
}

/// Serves until nbdkit ends, and ends as it did; with a failure where writes were lost, of which nbdkit's status tells nothing.
pub fn run(args: &Args, store: &StoreFlags, runtime: &Runtime) -> Result<ExitCode> {
    let added = NbdkitArgs::new(&args.nbdkit_args);
    let read_only = args.read_only || added.read_only;
    let parameters = parameters(args, &added, store);
    let behind = of_plugin(&added).map(|(key, value)| (key.to_owned(), value.to_owned()));
    let config = check(&parameters.iter().cloned().chain(behind).collect::<Vec<_>>())?;
    if read_only && config.volume.lease.takeover {
        return Err(wrong_usage(
            "a server that is read-only takes the volume from nobody: leave --takeover away, or -r",
        ));
    }
    let address = address(args, &added)?;
    let nbdkit = env::var_os("NBDKIT").unwrap_or_else(|| OsString::from("nbdkit"));
    let plugin = plugin::find(&nbdkit)?;
    let (pid, loss) = (Note::new("pid")?, Note::new("loss")?);
    // nbdkit writes one such file: the one of the last option, which is the user's.
    let pid_file = added.pid_file.clone().unwrap_or_else(|| pid.path());

    let clients = Clients {
        read_only,
        tls: added.requires_tls,
    };
    let announcement = announcement(&address, &config, clients);
    let mut is_first = true;
    let mut start = || {
        // Also after a restart: a server that was killed leaves its socket behind.
        if let Address::Unix(socket) = &address {
            remove_dead_socket(socket)?;
        }
        let mut command = Command::new(&nbdkit);
        command
            .args(nbdkit_args(args, &address, &pid_file))
            .args(&added.options)
            .arg(&plugin)
            .args(of_this_start(is_first, &parameters, &added.parameters));
        if args.verbose > 0 && env::var_os("RUST_LOG").is_none_or(|words| words.is_empty()) {
            command.env("RUST_LOG", "hypernbd=info,hypernbd_volume=info");
        }
        command.env(LOSS_FILE, loss.path());
        command.env(NBD_URI, address.uri(added.requires_tls));
        // A group of its own: Ctrl-C reaches nbdkit once, from here.
        command.process_group(0).kill_on_drop(true);
        is_first = false;
        command
            .spawn()
            .map_err(|error| plugin::cannot_start(&nbdkit, error))
    };
    let check = || -> Checked<'_> {
        Box::pin(async {
            let (nbdkit, plugin) = (nbdkit.clone(), plugin.clone());
            tokio::task::spawn_blocking(move || plugin::check(&nbdkit, &plugin)).await??;
            // What runs may outlast a store that is away; what would follow it cannot start then.
            let reached = async {
                match config.volumes_open {
                    Some(_) => admin::volumes_below(&config.url, &config.store).await.map(drop),
                    None => admin::info(&config.url, &config.store).await.map(drop),
                }
            };
            let reached = tokio::time::timeout(REACH_MAX, reached).await;
            reached
                .with_context(|| format!("the store has not answered within {} s", REACH_MAX.as_secs()))??;
            if let Some(dir) = &config.volume.write_buffer_dir
                && !buffer_file::is_kept(dir)?
            {
                bail!(
                    "the server could not write its write buffer's file in {}, and a kill would lose what was answered and not \
                     flushed: disconnect the clients, stop it and start it again",
                    dir.display()
                );
            }
            Ok(())
        })
    };
    let supervised = Supervised {
        start: &mut start,
        check: &check,
        pid_file: &pid_file,
        announcement: &announcement,
        // Whether each of many has its file is not looked at.
        can_restart: config.volume.write_buffer_dir.is_some() && config.volumes_open.is_none() && !read_only,
    };
    let status = runtime.block_on(supervised.run())?;
    if status.success() && loss.is_written() {
        bail!(
            "the volume could not be closed, and writes after the last flush or checkpoint may be lost: see the log"
        );
    }
    Ok(exit_code(status))
}

/// Everything for the plugin, as key and value.
fn parameters(args: &Args, added: &NbdkitArgs, store: &StoreFlags) -> Vec<(String, String)> {
    let key = if args.volumes { "volumes" } else { "backend_url" };
    let url = (key.to_string(), args.url.to_string());
    let flags = store.pairs().iter().chain(args.flags.pairs());
    let flags = flags.map(|(key, value)| (key.to_string(), value.clone()));
    let mut given: Vec<_> = std::iter::once(url)
        .chain(flags)
        .chain(args.options.iter().cloned())
        .collect();
    given.extend(wal(args, added, &given).map(|value| (WAL_KEY.to_string(), value)));
    given
}

/// What `--wal` says. Where nobody says anything of the log, a volume on S3 gets one beside it.
fn wal(args: &Args, added: &NbdkitArgs, given: &[(String, String)]) -> Option<String> {
    let is_wal = |key: &str| find_option(&key.replace('-', "_")).is_some_and(|spec| spec.key == WAL_KEY);
    let given = given.iter().map(|(key, _)| key.as_str());
    let is_named = given.chain(of_plugin(added).map(|(key, _)| key)).any(is_wal);
    let is_writable = !args.read_only && !added.read_only;
    let is_wanted = matches!(args.url, VolumeUrl::S3 { .. }) && is_writable && !is_named;
    let by_default = is_wanted.then(|| WalPlace::Beside.to_string());
    args.wal.clone().or(by_default)
}

/// The plugin's parameters among those that stand behind `--`, which go to nbdkit as they are.
fn of_plugin(added: &NbdkitArgs) -> impl Iterator<Item = (&str, &str)> {
    let given = added.parameters.iter().filter_map(|given| given.split_once('='));
    given.filter(|(key, _)| find_option(&key.replace('-', "_")).is_some())
}

/// The parameters of one start. A takeover was asked for once: what follows the first server may have lost the volume since.
fn of_this_start(is_first: bool, ours: &[(String, String)], behind: &[String]) -> Vec<String> {
    let ours = ours.iter().map(|(key, value)| format!("{key}={value}"));
    let is_takeover = |given: &String| {
        let key = given.split_once('=').map_or(given.as_str(), |(key, _)| key);
        find_option(&key.replace('-', "_")).is_some_and(|spec| spec.key == TAKEOVER_KEY)
    };
    let all = ours.chain(behind.iter().cloned());
    all.filter(|given| is_first || !is_takeover(given)).collect()
}

/// The plugin's own check, before anything is started.
fn check(parameters: &[(String, String)]) -> Result<ServeConfig> {
    let mut options = ServeOptions::default();
    for (key, value) in parameters {
        options.set(key, value)?;
    }
    Ok(options.finish()?)
}

/// Where to listen: nbdkit's own options come before ours.
fn address(args: &Args, added: &NbdkitArgs) -> Result<Address> {
    let is_tcp_named = added.bind.is_some() || added.port.is_some();
    let socket = added
        .socket
        .as_ref()
        .or(args.socket.as_ref().filter(|_| !is_tcp_named));
    let Some(socket) = socket else {
        let bind = match &added.bind {
            Some(bind) => bind
                .parse()
                .with_context(|| format!("{bind} is no address to listen on: write one of this machine"))?,
            None => args.bind,
        };
        let port = match &added.port {
            Some(port) => port.parse().with_context(|| format!("{port} is no TCP port"))?,
            None => args.port,
        };
        return Ok(Address::Tcp(SocketAddr::new(bind, port)));
    };
    let socket =
        std::path::absolute(socket).with_context(|| format!("{} is no usable path", socket.display()))?;
    remove_dead_socket(&socket)?;
    Ok(Address::Unix(socket))
}

/// A server that was killed leaves its socket behind, and the next one could not listen on it.
fn remove_dead_socket(socket: &Path) -> Result<()> {
    let Ok(metadata) = std::fs::symlink_metadata(socket) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        bail!(
            "{} exists and is no socket: choose another path",
            socket.display()
        );
    }
    match UnixStream::connect(socket) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => std::fs::remove_file(socket)
            .with_context(|| format!("cannot remove the dead socket {}", socket.display())),
        _ => bail!(
            "a server is listening on {} already: stop it, or choose another path",
            socket.display()
        ),
    }
}

fn nbdkit_args(args: &Args, address: &Address, pid_file: &Path) -> Vec<String> {
    let mut list = vec!["--foreground".to_string(), "--exit-with-parent".to_string()];
    list.push(format!("--pidfile={}", pid_file.display()));
    list.extend(address.nbdkit_args());
    if args.read_only {
        list.push("--readonly".to_string());
    }
    if args.verbose > 1 {
        list.push("--verbose".to_string());
    }
    list
}

fn announcement(address: &Address, config: &ServeConfig, clients: Clients) -> String {
    let what = if clients.read_only {
        "read"
    } else {
        "read and write"
    };
    let warning = match address.is_reachable_from_outside() && !clients.tls {
        true => format!(
            "Whoever reaches this address can {what} the volume{s}: there is no password and no encryption.\n",
            s = if config.volumes_open.is_some() { "s" } else { "" }
        ),
        false => String::new(),
    };
    let durability = Durability::of(&config.url, config.volume.wal.as_ref());
    let durability = match (clients.read_only, config.volumes_open) {
        (true, _) => String::new(),
        (false, None) => format!("On this volume {}.\n", durability.sentence()),
        (false, Some(_)) => format!("On each volume {}.\n", durability.sentence()),
    };
    if config.volumes_open.is_some() {
        return format!(
            "Serving the volumes below {url} on {uri} until Ctrl-C.\n{warning}{durability}\n\
             Connect from another terminal; NAME is a volume's, NAME@AT an earlier state of it:\n\n{lines}\n",
            url = config.url,
            uri = address.uri(clients.tls),
            lines = address.connect_lines_of_many(clients),
        );
    }
    format!(
        "Serving {url} on {uri} until Ctrl-C.\n{warning}{durability}\n\
         Connect from another terminal:\n\n{lines}\n",
        url = config.url,
        uri = address.uri(clients.tls),
        lines = address.connect_lines(config.volume.io_timeout, clients),
    )
}

/// As a shell reports it: the exit status, or 128 and the signal's number.
fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_dead_socket_is_removed_and_a_live_one_kept() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        remove_dead_socket(&socket).unwrap();

        let listener = UnixListener::bind(&socket).unwrap();
        let error = remove_dead_socket(&socket).unwrap_err().to_string();
        assert!(error.contains("already") && socket.exists(), "{error}");

        drop(listener);
        remove_dead_socket(&socket).unwrap();
        assert!(!socket.exists());
    }

    #[test]
    fn other_files_are_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "data").unwrap();
        assert!(
            remove_dead_socket(&file)
                .unwrap_err()
                .to_string()
                .contains("no socket")
        );
        assert!(file.exists());
    }

    fn serve_args(line: &str) -> Args {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let url = ["file:///v/"].into_iter().filter(|_| !line.starts_with("s3://"));
        let words = ["serve"].into_iter().chain(url).chain(line.split_whitespace());
        <Line as clap::Parser>::parse_from(words).args
    }

    #[test]
    fn a_volume_on_s3_gets_a_log_unless_something_is_said_of_it() {
        for (line, expected) in [
            ("", None),
            ("--wal auto", Some("auto")),
            ("s3://bucket/v", Some("auto")),
            ("s3://bucket/v --wal off", Some("off")),
            ("s3://bucket/v --wal s3://bucket/log/", Some("s3://bucket/log/")),
            ("s3://bucket/v --backend-wal-url off", None),
            ("s3://bucket/v -o backend-wal-uri=off", None),
            ("s3://bucket/v -- --filter=log backend_wal_url=off", None),
            ("s3://bucket/v -- --filter=log logfile=/tmp/log", Some("auto")),
            ("s3://bucket/v -r", None),
            ("s3://bucket/v -- -r", None),
        ] {
            let args = serve_args(line);
            let given = args
                .flags
                .pairs()
                .iter()
                .map(|(key, value)| (key.to_string(), value.clone()));
            let given: Vec<_> = given.chain(args.options.iter().cloned()).collect();
            let wal = wal(&args, &NbdkitArgs::new(&args.nbdkit_args), &given);
            assert_eq!(wal.as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn nbdkits_own_words_for_where_to_listen_come_first() {
        for (line, expected) in [
            ("", "nbd://127.0.0.1:10809"),
            ("-- -p 7788", "nbd://127.0.0.1:7788"),
            ("--port 1 -- -i ::1 --port=7788", "nbd://[::1]:7788"),
            ("--socket /run/a -- -p 7788", "nbd://127.0.0.1:7788"),
            (
                "-- -U /no-such-directory/s",
                "nbd+unix:///?socket=/no-such-directory/s",
            ),
        ] {
            let args = serve_args(line);
            let address = address(&args, &NbdkitArgs::new(&args.nbdkit_args)).unwrap();
            assert_eq!(address.uri(false), expected, "{line}");
        }
        for line in ["-- -p x", "-- -i somewhere"] {
            let args = serve_args(line);
            assert!(
                address(&args, &NbdkitArgs::new(&args.nbdkit_args)).is_err(),
                "{line}"
            );
        }
    }

    #[test]
    fn the_announcement_fits_what_clients_may_do() {
        let config = check(&[("backend_url".into(), "file:///v/".into())]).unwrap();
        let address = Address::Tcp("192.0.2.1:1".parse().unwrap());
        let of = |read_only, tls| announcement(&address, &config, Clients { read_only, tls });
        assert!(
            of(false, false).contains("can read and write the volume")
                && of(false, false).contains("a flush")
        );
        assert!(of(true, false).contains("can read the volume") && !of(true, false).contains("a flush"));
        assert!(!of(false, true).contains("no encryption") && of(false, true).contains("nbds://192.0.2.1:1"));
    }

    #[test]
    fn many_volumes_are_announced_with_the_way_to_each() {
        let args = serve_args("--volumes");
        let given = parameters(&args, &NbdkitArgs::new(&[]), &StoreFlags::default());
        assert_eq!(given[0], ("volumes".to_owned(), "file:///v/".to_owned()));
        let config = check(&given).unwrap();
        for (address, listed, asked) in [
            (
                Address::Tcp("127.0.0.1:7788".parse().unwrap()),
                "nbdinfo --list nbd://127.0.0.1:7788\n",
                "nbd://127.0.0.1:7788/NAME",
            ),
            (
                Address::Unix("/run/all".into()),
                "nbdinfo --list 'nbd+unix:///?socket=/run/all'\n",
                "nbd+unix:///NAME?socket=/run/all",
            ),
        ] {
            let text = announcement(&address, &config, Clients::default());
            assert!(text.contains("the volumes below file:///v/"), "{text}");
            assert!(text.contains(listed) && text.contains(asked), "{text}");
        }
    }

    #[test]
    fn a_server_that_follows_another_takes_nothing_over() {
        let ours = [("backend_url", "file:///v/"), ("takeover", "yes")];
        let ours = ours.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let behind = ["takeover=yes", "logfile=/takeover"].map(str::to_owned);
        assert_eq!(of_this_start(true, &ours, &behind).len(), 4);
        let later = of_this_start(false, &ours, &behind);
        assert_eq!(later, ["backend_url=file:///v/", "logfile=/takeover"]);
    }

    #[test]
    fn the_exit_status_is_passed_on() {
        for (raw, code) in [(0, 0), (3 << 8, 3), (15, 143)] {
            assert_eq!(exit_code(ExitStatus::from_raw(raw)), ExitCode::from(code));
        }
    }
}
