//! `hypernbd buffer show|discard DIR`.

use std::path::PathBuf;

use anyhow::Result;
use hypernbd_volume::buffer_file::{self, Left};
use hypernbd_volume::units::format_size;

use crate::output;

/// The commands for the directory that is given as write_buffer_dir.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Show what servers that were killed left there: writes that were answered and not published
    Show(ShowArgs),
    /// Give up what is left there
    Discard(DiscardArgs),
}

/// Arguments of `buffer show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The directory
    pub dir: PathBuf,

    /// Print JSON, with sizes in bytes
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `buffer discard`.
#[derive(Debug, clap::Args)]
pub struct DiscardArgs {
    /// The directory; no server may use it
    pub dir: PathBuf,

    /// Discard without asking
    #[arg(long)]
    pub yes: bool,
}

/// Carries a command out.
pub fn run(command: &Command) -> Result<()> {
    match command {
        Command::Show(args) => show(args),
        Command::Discard(args) => discard(args),
    }
}

fn show(args: &ShowArgs) -> Result<()> {
    let left = buffer_file::look(&args.dir)?;
    if args.json {
        return output::line(serde_json::to_string_pretty(&left)?);
    }
    if left.is_empty() {
        return output::line(format_args!("nothing is left in {}", args.dir.display()));
    }
    output::write(left.iter().map(table).collect::<Vec<_>>().join("\n"))
}

fn table(left: &Left) -> String {
    let volume = match (&left.volume_id, &left.url) {
        (Some(id), Some(url)) => format!("{url} ({id})"),
        _ => "unknown".to_owned(),
    };
    let changes = match &left.damage {
        Some(damage) => format!("cannot be read: {damage}"),
        None => format!("{}, of {} in all", left.changes, format_size(left.bytes)),
    };
    let what = match left.is_set_aside {
        true => "set aside: the volume went on without them, and no server will apply them",
        false => {
            "the next server of the volume on this machine applies them if no other has it before; or one serves it now"
        }
    };
    format!(
        "file     {}\nvolume   {volume}\nchanges  {changes}\n{what}\n",
        left.path.display()
    )
}

fn discard(args: &DiscardArgs) -> Result<()> {
    let left = buffer_file::look(&args.dir)?;
    if left.is_empty() {
        return output::line(format_args!("nothing is left in {}", args.dir.display()));
    }
    output::write(left.iter().map(table).collect::<Vec<_>>().join("\n"))?;
    output::line("discarding them loses these writes")?;
    output::confirm(args.yes, "Discard them?", "discard them", "nothing was discarded")?;
    buffer_file::discard(&args.dir)?;
    output::line("they are given up")
}
