//! `hypernbd`: the command line for the life of a volume.
#![deny(unsafe_code)]

mod commands;
mod flags;
mod image;
mod output;
mod watch;

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use commands::{
    attach, buffer, check, checkpoints, clone, compact, completions, control, create, delete, diff, export,
    file, import, info, man, probe, prune, repair, replicate, report, resize, restart, retention, rollback,
    serve, snapshot, space, stats, top, wal,
};
use flags::StoreFlags;
use hypernbd_volume::VolumeError;
use hypernbd_volume::options::{LOG_LEVEL_DEFAULT, LOG_MODULE_NOISY, LogWords};
use log::LevelFilter;

/// Block devices on S3, or in a local directory, for any NBD client.
#[derive(Debug, Parser)]
#[command(
    name = "hypernbd",
    version,
    propagate_version = true,
    max_term_width = 110,
    after_help = "URLs are s3://BUCKET/PREFIX/ or file:///PATH/. Sizes take K, M, G, T and P, powers of 1024."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    store: StoreFlags,
}

/// The commands.
#[derive(Debug, Subcommand)]
enum Command {
    /// Make a new, empty volume
    Create(create::Args),
    /// Serve a volume to NBD clients, until interrupted
    Serve(serve::Args),
    /// Make a block device of this machine of what a server serves; it outlives the server's restarts
    Attach(attach::Args),
    /// Take such a device away
    Detach(attach::DetachArgs),
    /// List such devices
    Attached(attach::ListArgs),
    /// Start a server anew under its clients, which need write_buffer_dir and to connect again
    Restart(restart::Args),
    /// Show once what a running server says of itself
    Stats(stats::Args),
    /// Watch what a running server says of itself, in a terminal
    Top(top::Args),
    /// Print what helps somebody else to see what is wrong: versions, parameters, numbers, the end of the log; no credential
    Report(report::Args),
    /// Tell a running server what to do
    #[command(subcommand)]
    Control(control::Command),
    /// Show what a volume is
    Info(info::Args),
    /// Try whether a store keeps what a volume needs of it
    Probe(probe::Args),
    /// Change a volume's size
    Resize(resize::Args),
    /// List a volume's checkpoints: every state that it was published in
    Checkpoints(checkpoints::Args),
    /// Give checkpoints names, list them, take them away
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Say which checkpoints are kept, and for how long
    #[command(subcommand)]
    Retention(retention::Command),
    /// Remove the checkpoints that a volume's retention does not keep, and their space
    Prune(prune::Args),
    /// Copy what is live out of objects that are mostly dead, so that they can go
    Compact(compact::Args),
    /// Make a volume read as it did at an earlier checkpoint; that can be undone
    Rollback(rollback::Args),
    /// Make a volume that begins as a checkpoint of another one, and shares its objects
    Clone(clone::Args),
    /// Show which ranges differ between two checkpoints
    Diff(diff::Args),
    /// Show what a volume takes in its store
    Space(space::Args),
    /// Look whether a volume is whole: everything is there, and is what was written
    Check(check::Args),
    /// Make a volume of an image: a file, a device or a pipe
    Import(import::Args),
    /// Write a volume, or an earlier checkpoint of it, to a file, a device or a pipe
    Export(export::Args),
    /// Keep a copy of a volume with all of its checkpoints in another place, and bring it up to date
    Replicate(replicate::Args),
    /// Put damaged and missing objects of a volume back from its replica or a copy
    Repair(repair::Args),
    /// Delete a volume with everything in it
    Delete(delete::Args),
    /// Look at a volume's write-ahead log, replay it, or give it up
    #[command(subcommand)]
    Wal(wal::Command),
    /// Look at the writes that a killed server left in write_buffer_dir, or give them up
    #[command(subcommand)]
    Buffer(buffer::Command),
    /// The same as hypercli's file commands: create-opt, set-len, rollback, prune, du, delete
    #[command(subcommand)]
    File(file::Command),
    /// Print a shell's completions for this command
    Completions(completions::Args),
    /// Write the manual pages of these commands to a directory, for an installation
    #[command(hide = true)]
    Man(man::Args),
}

/// The exit status of a command line that is none, as clap has it.
pub(crate) const USAGE: u8 = 2;

/// A command line that is wrong in a way that clap does not see.
#[derive(Debug)]
struct WrongUsage(String);

impl fmt::Display for WrongUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongUsage {}

/// A failure that ends the process with [`USAGE`].
pub(crate) fn wrong_usage(why: impl fmt::Display) -> anyhow::Error {
    anyhow::Error::new(WrongUsage(why.to_string()))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let words = LogWords::of_environment();
    let mut logger = logger();
    if let Ok(style) = std::env::var(env_logger::DEFAULT_WRITE_STYLE_ENV) {
        logger.parse_write_style(&style);
    }
    logger.parse_filters(&words.understood).init();
    if let Some(why) = words.wrong {
        log::warn!("{why}");
    }
    hypernbd_volume::descriptors::raise_limits();
    // Of these 1 says that something is wrong with the volume.
    let failure = match &cli.command {
        Command::Check(_) | Command::Repair(_) => ExitCode::from(USAGE),
        _ => ExitCode::FAILURE,
    };
    // Without the threads of a runtime: a relay lives long, and locks what it has in memory.
    let done = match &cli.command {
        Command::Attach(_) | Command::Detach(_) | Command::Attached(_) if !cli.store.pairs().is_empty() => {
            Err(wrong_usage(
                "attach, detach and attached reach no store: leave the store options to the command that serves the volume",
            ))
        }
        Command::Attach(args) => attach::run(args).map(|()| ExitCode::SUCCESS),
        Command::Detach(args) => attach::detach(args).map(|()| ExitCode::SUCCESS),
        Command::Attached(args) => attach::list(args).map(|()| ExitCode::SUCCESS),
        _ => run(cli),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            // A volume's failure writes out its causes itself, without the repetitions of the S3 client's.
            match error.downcast_ref::<VolumeError>() {
                Some(failure) => {
                    let (said, chain) = (error.to_string(), failure.chain());
                    // What a command says of it stands before.
                    match said == failure.to_string() {
                        true => complain(&chain),
                        false => complain(&format!("{said}: {chain}")),
                    }
                }
                None => complain(&format!("{error:#}")),
            }
            match error.is::<WrongUsage>() {
                true => ExitCode::from(USAGE),
                false => failure,
            }
        }
    }
}

/// The log before `RUST_LOG` is read: of what that does not name there are warnings and errors.
fn logger() -> env_logger::Builder {
    let mut builder = env_logger::Builder::new();
    builder
        .filter_level(LOG_LEVEL_DEFAULT)
        .filter_module(LOG_MODULE_NOISY, LevelFilter::Error);
    builder
}

/// Says it on standard error, which may be a terminal that is gone: that is no failure of its own.
fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "hypernbd: {text}");
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let store = match cli.store.options() {
        Ok(store) => store,
        Err(wrong) => {
            complain(&wrong.to_string());
            return Ok(ExitCode::from(USAGE));
        }
    };
    let runtime = tokio::runtime::Runtime::new()?;
    match cli.command {
        Command::Attach(_) | Command::Detach(_) | Command::Attached(_) => {}
        Command::Create(args) => runtime.block_on(create::run(&args, &store))?,
        Command::Serve(args) => return serve::run(&args, &cli.store, &runtime),
        Command::Restart(args) => runtime.block_on(restart::run(&args, &store))?,
        Command::Stats(args) => runtime.block_on(stats::run(&args, &store))?,
        Command::Top(args) => return top::run(&args, &store, &runtime),
        Command::Report(args) => runtime.block_on(report::run(&args, &store))?,
        Command::Control(command) => runtime.block_on(control::run(&command, &store))?,
        Command::Info(args) => runtime.block_on(info::run(&args, &store))?,
        Command::Probe(args) => runtime.block_on(probe::run(&args, &store))?,
        Command::Resize(args) => runtime.block_on(resize::run(&args, &store))?,
        Command::Checkpoints(args) => runtime.block_on(checkpoints::run(&args, &store))?,
        Command::Snapshot(command) => runtime.block_on(snapshot::run(&command, &store))?,
        Command::Retention(command) => runtime.block_on(retention::run(&command, &store))?,
        Command::Prune(args) => runtime.block_on(prune::run(&args, &store))?,
        Command::Compact(args) => return compact::run(&args, &store, &runtime),
        Command::Rollback(args) => runtime.block_on(rollback::run(&args, &store))?,
        Command::Clone(args) => runtime.block_on(clone::run(&args, &store))?,
        Command::Diff(args) => runtime.block_on(diff::run(&args, &store))?,
        Command::Space(args) => runtime.block_on(space::run(&args, &store))?,
        Command::Check(args) => return check::run(&args, &store, &runtime),
        Command::Import(args) => return import::run(&args, &store, &runtime),
        Command::Export(args) => return export::run(&args, &store, &runtime),
        Command::Replicate(args) => return replicate::run(&args, &store, &runtime),
        Command::Repair(args) => return repair::run(&args, &store, &runtime),
        Command::Delete(args) => runtime.block_on(delete::run(&args, &store))?,
        Command::Wal(command) => runtime.block_on(wal::run(&command, &store))?,
        Command::Buffer(command) => buffer::run(&command)?,
        Command::File(command) => runtime.block_on(file::run(&command, &store))?,
        Command::Completions(args) => completions::run::<Cli>(&args)?,
        Command::Man(args) => man::run::<Cli>(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_rust_log_does_not_name_is_logged_as_without_it() {
        for (words, target, level) in [
            ("", "hypernbd", LevelFilter::Warn),
            ("inof", "hypernbd", LevelFilter::Warn),
            ("hypernbd_volume=debug", "hypernbd", LevelFilter::Warn),
            ("hypernbd=debug", "hypernbd_volume::wal", LevelFilter::Debug),
            ("error", "hypernbd", LevelFilter::Error),
            ("off", "hypernbd", LevelFilter::Off),
            ("info", LOG_MODULE_NOISY, LevelFilter::Error),
            ("hyperfile::s3commons=info", LOG_MODULE_NOISY, LevelFilter::Info),
        ] {
            let logger = logger().parse_filters(words).build();
            let is_logged = |level: &log::Level| {
                let of = log::Metadata::builder().level(*level).target(target).build();
                log::Log::enabled(&logger, &of)
            };
            let most = log::Level::iter().filter(is_logged).max();
            let most = most.map_or(LevelFilter::Off, |most| most.to_level_filter());
            assert_eq!(most, level, "{words}: {target}");
        }
    }

    #[test]
    fn the_manual_page_names_every_command() {
        fn look_for(command: &clap::Command, words: &str, page: &str) {
            for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
                let words = format!("{words} {}", command.get_name());
                if command.has_subcommands() {
                    look_for(command, &words, page);
                } else {
                    let line = format!(r"\fB{}", words.replace('-', r"\-"));
                    assert!(
                        page.lines().any(|written| written.starts_with(&line)),
                        "docs/man/hypernbd.1 has no {words} in its SYNOPSIS"
                    );
                }
            }
        }
        let page = include_str!("../../../docs/man/hypernbd.1");
        look_for(&Cli::command(), "hypernbd", page);
    }

    #[test]
    fn the_seeds_lines_are_understood() {
        let cli = parse("hypernbd file create-opt --data-block-size 524288 s3://mybucket/root/of/backend/")
            .unwrap();
        let Command::File(file::Command::CreateOpt(args)) = cli.command else {
            panic!("another command")
        };
        assert_eq!(args.data_block_size_bytes, 524_288);
        assert_eq!(args.url.to_string(), "s3://mybucket/root/of/backend/");

        let cli =
            parse("hypernbd file set-len --size 10000000000000 s3://mybucket/root/of/backend/").unwrap();
        let Command::File(file::Command::SetLen(args)) = cli.command else {
            panic!("another command")
        };
        assert_eq!(args.size_bytes, 10_000_000_000_000);

        let cli = parse("hypernbd file delete s3://mybucket/root/of/backend/").unwrap();
        assert!(matches!(cli.command, Command::File(file::Command::Delete(args)) if !args.yes));
    }

    #[test]
    fn sizes_take_suffixes() {
        let cli = parse("hypernbd create s3://bucket/vol --size 10T --block-size 64K").unwrap();
        let Command::Create(args) = cli.command else {
            panic!("another command")
        };
        assert_eq!((args.size_bytes, args.block_size_bytes), (10 << 40, 65536));

        let error = parse("hypernbd create s3://bucket/vol --size 10X")
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("10X") && error.contains("as in 64K or 10T"),
            "{error}"
        );
        let error = parse("hypernbd create s3://bucket/vol --size 1T --block-size 8G")
            .unwrap_err()
            .to_string();
        assert!(error.contains("8G"), "{error}");
    }

    #[test]
    fn bad_urls_are_refused_before_anything_is_done() {
        for command in [
            "info",
            "delete",
            "serve",
            "file delete",
            "create --size 1G",
            "resize --size 1G",
        ] {
            let error = parse(&format!("hypernbd {command} s3://bucket/"))
                .unwrap_err()
                .to_string();
            assert!(error.contains("whole bucket"), "{command}: {error}");
        }
    }

    #[test]
    fn store_flags_stand_before_or_after_the_command() {
        for line in [
            "hypernbd --endpoint-url http://127.0.0.1:9000 --region eu-west-1 info s3://bucket/vol",
            "hypernbd info s3://bucket/vol --endpoint-url http://127.0.0.1:9000 --region eu-west-1",
            "hypernbd --region eu-west-1 info --endpoint-url=http://127.0.0.1:9000 s3://bucket/vol",
        ] {
            let store = parse(line).unwrap().store.options().unwrap();
            assert_eq!(
                store.endpoint_url.as_deref(),
                Some("http://127.0.0.1:9000"),
                "{line}"
            );
            assert_eq!(store.region.as_deref(), Some("eu-west-1"), "{line}");
        }
        let error = parse("hypernbd info s3://bucket/vol --path-style maybe")
            .unwrap()
            .store
            .options()
            .unwrap_err();
        assert!(error.to_string().contains("auto, yes or no"), "{error}");
    }
}
