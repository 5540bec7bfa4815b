//! `hypernbd snapshot create|list|delete URL`.

use anyhow::Result;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::{self, At, SnapshotName};
use hypernbd_volume::url::VolumeUrl;

use crate::output;

/// The commands for names of checkpoints.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Give a checkpoint a name
    Create(CreateArgs),
    /// List the names
    List(ListArgs),
    /// Take a name away; the checkpoint stays
    Delete(DeleteArgs),
}

/// Arguments of `snapshot create`.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// The volume
    pub url: VolumeUrl,

    /// The name: letters, digits, '.', '_' and '-', the first a letter
    pub name: SnapshotName,

    /// The checkpoint, as @NUMBER, @TIME, @-AGO or @NAME; the newest published if it is left out
    pub at: Option<At>,
}

/// Arguments of `snapshot list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// The volume
    pub url: VolumeUrl,

    /// Print JSON, with times in milliseconds since 1970
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `snapshot delete`.
#[derive(Debug, clap::Args)]
pub struct DeleteArgs {
    /// The volume
    pub url: VolumeUrl,

    /// The name
    pub name: SnapshotName,
}

/// Carries a command out.
pub async fn run(command: &Command, store: &StoreOptions) -> Result<()> {
    match command {
        Command::Create(args) => {
            let made = past::create(&args.url, store, &args.name, args.at.as_ref()).await?;
            output::line(format_args!(
                "{} is checkpoint {}, published {}",
                made.name,
                made.checkpoint.cno,
                output::time(made.published_ms)
            ))
        }
        Command::List(args) => list(args, store).await,
        Command::Delete(args) => {
            past::delete(&args.url, store, &args.name).await?;
            output::line(format_args!(
                "the name {} is gone; the checkpoint stays",
                args.name
            ))
        }
    }
}

async fn list(args: &ListArgs, store: &StoreOptions) -> Result<()> {
    let snapshots = past::snapshots(&args.url, store).await?;
    if args.json {
        return output::line(serde_json::to_string_pretty(&snapshots)?);
    }
    let rows = snapshots.iter().map(|snapshot| {
        format!(
            "{:<40}  {:>10}  {}\n",
            snapshot.name.to_string(),
            snapshot.checkpoint.cno,
            output::time(snapshot.published_ms)
        )
    });
    let head = format!("{:<40}  {:>10}  {}\n", "NAME", "CHECKPOINT", "TIME");
    output::write(std::iter::once(head).chain(rows).collect::<String>())
}
