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
    /// Options, each followed by its value where that is an argument of its own.
    pub options: Vec<String>,
    /// Parameters.
    pub parameters: Vec<String>,
    /// Where nbdkit writes its process id, if the options say so.
    pub pid_file: Option<PathBuf>,
    /// Whether the options make the server read-only.
    pub read_only: bool,
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
            split.options.push(arg.clone());
            let (name, value) = split.option(arg);
            let Some(name) = name else { continue };
            let value = value.or_else(|| {
                let value = args.next()?;
                split.options.push(value.clone());
                Some(value.clone())
            });
            if matches!(name, "P" | "pidfile" | "pid-file") {
                split.pid_file = value.map(PathBuf::from);
            }
        }
        split
    }

    /// The name of an option that takes a value, and the value if it is in the same argument.
    fn option<'a>(&mut self, arg: &'a str) -> (Option<&'a str>, Option<String>) {
        if let Some(long) = arg.strip_prefix("--") {
            let (name, value) = match long.split_once('=') {
                Some((name, value)) => (name, Some(value.to_string())),
                None => (long, None),
            };
            self.read_only |= matches!(name, "readonly" | "read-only");
            return (LONG_WITH_VALUE.contains(&name).then_some(name), value);
        }
        // Several short options may share an argument; the first with a value takes what is left of it.
        let short = &arg[1..];
        for (at, c) in short.char_indices() {
            if SHORT_WITH_VALUE.contains(c) {
                let rest = &short[at + c.len_utf8()..];
                let value = (!rest.is_empty()).then(|| rest.to_string());
                return (Some(&short[at..at + c.len_utf8()]), value);
            }
            self.read_only |= c == 'r';
        }
        (None, None)
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
        assert_eq!(split("-p 1").pid_file, None);
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
}
