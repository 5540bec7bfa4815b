//! What a user adds to nbdkit's command line, told apart: its options with their values, and parameters of filters.

use std::path::PathBuf;

/// nbdkit's short options that take a value.
const SHORT_WITH_VALUE: &str = "DegiPptUu";

/// nbdkit's long options that take a value.
const LONG_WITH_VALUE: &[&str] = &[
    "debug",
    "export",
    "export-name",
    "exportname",
    "filter",
    "group",
    "ip-addr",
    "ipaddr",
    "log",
    "mask-handshake",
    "pid-file",
    "pidfile",
    "port",
    "run",
    "selinux-label",
    "threads",
    "time-out",
    "timeout",
    "tls",
    "tls-certificates",
    "tls-psk",
    "unix",
    "user",
];

/// The added arguments. nbdkit takes options before the plugin, and parameters, its filters' too, after it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct NbdkitArgs {
    /// Options, each followed by its value where that is an argument of its own; without those that say where to listen.
    pub options: Vec<String>,
    /// Parameters.
    pub parameters: Vec<String>,
    /// Where nbdkit writes its process id, if the options say so.
    pub pid_file: Option<PathBuf>,
    /// Whether the options make the server read-only.
    pub read_only: bool,
    /// Whether the options shut out clients without TLS.
    pub requires_tls: bool,
    /// Socket to listen on.
    pub socket: Option<PathBuf>,
    /// Address to listen on.
    pub bind: Option<String>,
    /// TCP port to listen on.
    pub port: Option<String>,
}

impl NbdkitArgs {
    /// Tells the arguments apart.
    pub fn new(args: &[String]) -> Self {
        let mut split = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            if !arg.starts_with('-') {
                split.parameters.push(arg.clone());
                continue;
            }
            split.read_only |= is_read_only(arg);
            let Some((name, value)) = option_with_value(arg) else {
                split.options.push(arg.clone());
                continue;
            };
            let next = if value.is_none() { args.next() } else { None };
            let value = value.map(str::to_owned).or_else(|| next.cloned());
            // Behind other short options in one argument it cannot be taken out.
            let is_alone = arg.starts_with("--") || arg[1..].starts_with(name);
            match name {
                // With "-" nbdkit chooses a socket by itself.
                "U" | "unix" if is_alone && value.as_deref() != Some("-") => {
                    split.socket = value.map(PathBuf::from);
                    continue;
                }
                "i" | "ipaddr" | "ip-addr" if is_alone => {
                    split.bind = value;
                    continue;
                }
                "p" | "port" if is_alone => {
                    split.port = value;
                    continue;
                }
                "P" | "pidfile" | "pid-file" => split.pid_file = value.map(PathBuf::from),
                "tls" => split.requires_tls = value.as_deref() == Some("require"),
                _ => {}
            }
            split.options.push(arg.clone());
            split.options.extend(next.cloned());
        }
        split
    }
}

/// The name of an option that takes a value, and the value if it is in the same argument.
fn option_with_value(arg: &str) -> Option<(&str, Option<&str>)> {
    if let Some(long) = arg.strip_prefix("--") {
        let (name, value) = match long.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (long, None),
        };
        return LONG_WITH_VALUE.contains(&name).then_some((name, value));
    }
    // Several short options may share an argument; the first with a value takes what is left of it.
    let short = &arg[1..];
    let (at, c) = short
        .char_indices()
        .find(|(_, c)| SHORT_WITH_VALUE.contains(*c))?;
    let (name, rest) = short[at..].split_at(c.len_utf8());
    Some((name, (!rest.is_empty()).then_some(rest)))
}

fn is_read_only(arg: &str) -> bool {
    match arg.strip_prefix("--") {
        Some(long) => matches!(long, "readonly" | "read-only"),
        None => {
            let flags = arg[1..].chars().take_while(|c| !SHORT_WITH_VALUE.contains(*c));
            flags.into_iter().any(|c| c == 'r')
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(line: &str) -> NbdkitArgs {
        NbdkitArgs::new(&line.split(' ').map(String::from).collect::<Vec<_>>())
    }

    #[test]
    fn options_keep_their_values() {
        for (line, options, parameters) in [
            ("--filter cow", "--filter cow", ""),
            ("-t 4 a=b", "-t 4", "a=b"),
            ("-t4 a=b", "-t4", "a=b"),
            ("-vt 4 a=b", "-vt 4", "a=b"),
            (
                "--filter=log logfile=/tmp/log",
                "--filter=log",
                "logfile=/tmp/log",
            ),
            ("-v a=b --threads 4 c=d", "-v --threads 4", "a=b c=d"),
            ("--newstyle a=b", "--newstyle", "a=b"),
            ("-t", "-t", ""),
        ] {
            let split = split(line);
            assert_eq!(split.options.join(" "), options, "{line}");
            assert_eq!(split.parameters.join(" "), parameters, "{line}");
        }
    }

    #[test]
    fn the_pid_file_is_known() {
        for line in [
            "-P a/pid",
            "-Pa/pid",
            "-vP a/pid",
            "--pidfile a/pid",
            "--pid-file=a/pid",
        ] {
            assert_eq!(split(line).pid_file, Some("a/pid".into()), "{line}");
        }
        assert_eq!(split("-D 1").pid_file, None);
    }

    #[test]
    fn where_to_listen_is_taken_out() {
        let listens = split("-U /run/s -v");
        assert_eq!(
            (listens.socket, listens.options),
            (Some("/run/s".into()), vec!["-v".into()])
        );
        for line in ["-p 1 --ipaddr=::1", "-p1 -i ::1", "--port 1 --ip-addr ::1"] {
            let listens = split(line);
            assert_eq!(
                (listens.port.as_deref(), listens.bind.as_deref()),
                (Some("1"), Some("::1"))
            );
            assert!(listens.options.is_empty(), "{line}");
        }
        let own = split("-U -");
        assert_eq!((own.socket, own.options.join(" ")), (None, "-U -".to_owned()));
    }

    #[test]
    fn tls_is_known_where_it_is_required() {
        for (line, required) in [
            ("--tls=require", true),
            ("--tls require", true),
            ("--tls=on", false),
        ] {
            assert_eq!(split(line).requires_tls, required, "{line}");
        }
    }

    #[test]
    fn read_only_is_known() {
        for (line, read_only) in [
            ("-r", true),
            ("-vr", true),
            ("--readonly", true),
            ("-Dr", false),
            ("-P -r", false),
        ] {
            assert_eq!(split(line).read_only, read_only, "{line}");
        }
    }

    #[test]
    fn the_last_pid_file_counts() {
        let of = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|word| word.to_string()).collect();
            NbdkitArgs::new(&words).pid_file
        };
        assert_eq!(of(&["nbdkit", "--foreground"]), None);
        assert_eq!(of(&["nbdkit", "--pidfile=/a", "-P", "b"]), Some("b".into()));
        assert_eq!(
            of(&["nbdkit", "--pidfile=/a", "--pidfile", "c"]),
            Some("c".into())
        );
        assert_eq!(of(&["nbdkit", "--pidfile=/a", "-Pd"]), Some("d".into()));
    }
}
