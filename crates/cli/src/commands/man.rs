//! `hypernbd man DIR`: manual pages of the commands, for who installs them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory that the pages are written to; it must exist
    pub dir: PathBuf,
}

/// Writes a page for each command of the command line `C` and for each of theirs. The page of `C` itself, `hypernbd.1`, is
/// written by hand: it tells what no list of options does.
pub fn run<C: CommandFactory>(args: &Args) -> Result<()> {
    for (name, page) in pages(C::command())? {
        let path = args.dir.join(name);
        fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The pages, by the names of their files.
fn pages(command: Command) -> Result<Vec<(String, Vec<u8>)>> {
    let mut command = command.disable_help_subcommand(true);
    // Gives every command the options that all of them take.
    command.build();
    let mut pages = Vec::new();
    add_commands_of(&command, &mut pages)?;
    Ok(pages)
}

fn add_commands_of(command: &Command, pages: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        let man = Man::new(command.clone())
            .source(format!("Hypernbd {}", env!("CARGO_PKG_VERSION")))
            .manual("User commands");
        let mut page = Vec::new();
        man.render(&mut page)?;
        let mut see_also = Roff::new();
        see_also.control("SH", ["SEE ALSO"]);
        let others = [
            bold("hypernbd"),
            roman("(1), "),
            bold("nbdkit-hypernbd-plugin"),
            roman("(1)"),
        ];
        see_also.text(others).to_writer(&mut page)?;
        pages.push((man.get_filename(), page));
        add_commands_of(command, pages)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(command: Command) -> Vec<String> {
        pages(command)
            .unwrap()
            .into_iter()
            .map(|(name, _)| name)
            .collect()
    }

    #[test]
    fn every_command_has_a_page_and_no_hidden_one_has() {
        let command = Command::new("hypernbd")
            .subcommand(Command::new("file").subcommand(Command::new("create-opt")))
            .subcommand(
                Command::new("secret")
                    .hide(true)
                    .subcommand(Command::new("inner")),
            )
            .subcommand(Command::new("info"));
        assert_eq!(
            names(command),
            ["hypernbd-file.1", "hypernbd-file-create-opt.1", "hypernbd-info.1"]
        );
    }

    #[test]
    fn a_page_has_the_commands_own_options_and_those_of_all() {
        let command = Command::new("hypernbd")
            .arg(clap::Arg::new("region").long("region").global(true))
            .subcommand(
                Command::new("create")
                    .about("Make a volume")
                    .arg(clap::Arg::new("size").long("size").help("Its size")),
            );
        let (_, page) = pages(command).unwrap().remove(0);
        let page = String::from_utf8(page).unwrap();
        for part in [
            "Make a volume",
            "Its size",
            r"\-\-size",
            r"\-\-region",
            "SEE ALSO",
        ] {
            assert!(page.contains(part), "there is no {part}:\n{page}");
        }
    }

    #[test]
    fn nothing_is_written_to_a_directory_that_is_not_there() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(subcommand)]
            _command: Verb,
        }
        #[derive(clap::Subcommand)]
        enum Verb {
            Info,
        }
        let dir = tempfile::tempdir().unwrap();
        let args = Args {
            dir: dir.path().join("absent"),
        };
        let error = run::<Line>(&args).unwrap_err().to_string();
        assert!(error.contains("absent"), "{error}");
        assert!(!args.dir.exists());
    }
}
