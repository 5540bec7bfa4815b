//! Command-line flags made from the one table of parameters, and readers for values.

use clap::{Arg, ArgMatches, Command, Error, FromArgMatches};
use hypernbd_volume::options::{
    LeaseOptions, OPTIONS, OptionError, OptionGroup, OptionSpec, ServeOptions, StoreOptions,
};
use hypernbd_volume::units::{UnitError, parse_size};

/// What parameters are called by that are either.
const YES_OR_NO: &str = "yes|no";
/// What is read as either; another word behind such a flag is no value of it.
const YES_OR_NO_WORDS: [&str; 8] = ["yes", "no", "true", "false", "on", "off", "1", "0"];

/// The smallest unit of a block device.
const SECTOR_BYTES: u64 = 512;

/// Flags of the parameters in one group, as the pairs of key and value that were given.
#[derive(Debug, Clone, Default)]
struct OptionFlags(Vec<(&'static str, String)>);

/// How the store is reached: flags of every command.
#[derive(Debug, Clone, Default)]
pub struct StoreFlags(OptionFlags);

/// How a volume is served: flags of `serve`.
#[derive(Debug, Clone)]
pub struct ServeFlags(OptionFlags);

impl StoreFlags {
    /// What was given, as key and value.
    pub fn pairs(&self) -> &[(&'static str, String)] {
        &self.0.0
    }

    /// What was given, checked.
    pub fn options(&self) -> Result<StoreOptions, OptionError> {
        let mut options = ServeOptions::default();
        for (key, value) in self.pairs() {
            options.set(key, value)?;
        }
        options.store()
    }
}

impl ServeFlags {
    /// What was given, as key and value.
    pub fn pairs(&self) -> &[(&'static str, String)] {
        &self.0.0
    }
}

fn specs(group: OptionGroup) -> impl Iterator<Item = &'static OptionSpec> {
    OPTIONS.iter().filter(move |spec| spec.group == group)
}

fn augment(command: Command, group: OptionGroup, heading: &'static str) -> Command {
    specs(group).fold(command, |command, spec| {
        let arg = Arg::new(spec.key)
            .long(spec.key.replace('_', "-"))
            .value_name(spec.value_name)
            .help(format!("{} [default: {}]", spec.help, spec.default))
            .help_heading(heading)
            .global(group == OptionGroup::Store);
        // The other spellings of docs/parameters.md.
        let alias = spec
            .alias
            .map(|alias| [alias.to_owned(), alias.replace('_', "-")]);
        let others = [spec.key.to_owned()]
            .into_iter()
            .chain(alias.into_iter().flatten());
        let arg = others
            .filter(|name| *name != spec.key.replace('_', "-"))
            .fold(arg, Arg::alias);
        // A word that may be left out: such a flag alone says yes.
        let arg = match spec.value_name == YES_OR_NO {
            true => arg
                .num_args(0..=1)
                .default_missing_value("yes")
                .value_parser(YES_OR_NO_WORDS)
                .hide_possible_values(true),
            false => arg,
        };
        command.arg(arg)
    })
}

fn collect(matches: &ArgMatches, group: OptionGroup) -> OptionFlags {
    let given =
        specs(group).filter_map(|spec| Some((spec.key, matches.get_one::<String>(spec.key)?.clone())));
    OptionFlags(given.collect())
}

/// Implements clap's traits for flags of one group.
macro_rules! flags_of_group {
    ($flags:ident, $group:expr, $heading:literal) => {
        impl clap::Args for $flags {
            fn augment_args(command: Command) -> Command {
                augment(command, $group, $heading)
            }

            fn augment_args_for_update(command: Command) -> Command {
                Self::augment_args(command)
            }
        }

        impl FromArgMatches for $flags {
            fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
                Ok(Self(collect(matches, $group)))
            }

            fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
                *self = Self::from_arg_matches(matches)?;
                Ok(())
            }
        }
    };
}

flags_of_group!(StoreFlags, OptionGroup::Store, "Store options");
flags_of_group!(ServeFlags, OptionGroup::Serve, "Volume options");

/// How a command that changes a volume takes its lease.
pub fn lease(takeover: bool) -> LeaseOptions {
    LeaseOptions {
        takeover,
        ..LeaseOptions::default()
    }
}

/// Reads a block size, in bytes. Which sizes the format takes is checked where the volume is made.
pub fn block_size(text: &str) -> Result<u32, UnitError> {
    u32::try_from(parse_size(text)?).map_err(|_| UnitError::TooLarge {
        value: text.to_string(),
    })
}

/// Refuses the size of a device that holds nothing.
pub fn check_size(size_bytes: u64) -> anyhow::Result<()> {
    anyhow::ensure!(
        size_bytes > 0,
        "a volume of 0 bytes holds nothing: give a size, as in --size 10G"
    );
    Ok(())
}

/// Warns of a size that clients see otherwise.
pub fn warn_of_size(size_bytes: u64) {
    if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        log::warn!(
            "{size_bytes} bytes are no multiple of {SECTOR_BYTES}: block devices are, so QEMU sees a larger disk and nbd-client a smaller one"
        );
    }
}

/// Reads `KEY=VALUE`.
pub fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text
        .split_once('=')
        .ok_or("write KEY=VALUE, as in write_buffer=1G")?;
    Ok((key.to_string(), value.to_string()))
}
