//! `hypernbd snapshot create|list|delete URL`.

use anyhow::Result;
use hypernbd_volume::admin;
use hypernbd_volume::monitor::client::{self, ClientError, ServerAddress};
use hypernbd_volume::monitor::control::SnapshotArguments;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::{self, At, Snapshot, SnapshotName};
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

    /// The checkpoint, as @NUMBER, @TIME, @-AGO or @NAME. If it is left out, the state of now, with all that a server on this
    /// machine was sent; of a server elsewhere the newest that it has published
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
            let made = create(args, store).await?;
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

/// Without a checkpoint it is the state of now: a server on this machine publishes what it has in memory first. Of one that cannot
/// be told the newest published state is taken, with a warning.
async fn create(args: &CreateArgs, store: &StoreOptions) -> Result<Snapshot> {
    if args.at.is_none()
        && let Some(lease) = admin::info(&args.url, store).await?.lease
        && lease.is_held()
    {
        if lease.is_of_killed() {
            log::warn!(
                "{} was killed: what it flushed to a log alone is not in the snapshot; hypernbd wal replay {} publishes that",
                lease.holder,
                args.url
            );
            return Ok(past::create(&args.url, store, &args.name, None).await?);
        }
        if let Some(control) = lease.control_here() {
            let arguments = SnapshotArguments {
                name: args.name.to_string(),
            };
            match client::tell(&ServerAddress::Unix(control.into()), "snapshot", &arguments).await {
                Err(error @ (ClientError::Unreachable { .. } | ClientError::Foreign { .. })) => {
                    log::warn!("{:#}", anyhow::Error::from(error));
                }
                told => return Ok(told?),
            }
        }
        log::warn!(
            "{} serves {} and could not be asked: what it has not published is not in the snapshot",
            lease.holder,
            args.url
        );
    }
    Ok(past::create(&args.url, store, &args.name, args.at.as_ref()).await?)
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
