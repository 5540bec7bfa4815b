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
            output::line(said(&made, output::now_ms()))
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

/// A name that was given.
struct Made {
    snapshot: Snapshot,
    /// It was given to the newest published checkpoint, and no server has published anything for it.
    is_newest_found: bool,
}

/// What is said of it at the time `now_ms`. How old the newest published checkpoint is says how much may be missing in it.
fn said(made: &Made, now_ms: u64) -> String {
    let snapshot = &made.snapshot;
    let (name, cno) = (&snapshot.name, snapshot.checkpoint.cno);
    let time = output::time(snapshot.published_ms);
    if !made.is_newest_found {
        return format!("{name} is checkpoint {cno}, published {time}");
    }
    let age = match now_ms.checked_sub(snapshot.published_ms) {
        Some(age_ms) => output::ago(age_ms),
        None => "which is ahead of this machine's clock".to_owned(),
    };
    format!("{name} is checkpoint {cno}, the newest that is published: {time}, {age}")
}

/// Without a checkpoint it is the state of now: a server on this machine publishes what it has in memory first. Of one that cannot
/// be told the newest published state is taken, with a warning.
async fn create(args: &CreateArgs, store: &StoreOptions) -> Result<Made> {
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
            return find(args, store).await;
        }
        if let Some(control) = lease.control_here() {
            let arguments = SnapshotArguments {
                name: args.name.to_string(),
            };
            let (place, volume) = (ServerAddress::Unix(control.into()), Some(lease.volume_id));
            match client::tell_of(&place, volume, "snapshot", &arguments).await {
                Err(error @ (ClientError::Unreachable { .. } | ClientError::Foreign { .. })) => {
                    log::warn!("{:#}", anyhow::Error::from(error));
                }
                told => {
                    return Ok(Made {
                        snapshot: told?,
                        is_newest_found: false,
                    });
                }
            }
        }
        log::warn!(
            "{} serves {} and could not be told to publish first: the snapshot is of the newest checkpoint that it has published, and \
             what it has not published is not in it",
            lease.holder,
            args.url
        );
    }
    find(args, store).await
}

/// Names what is there, and tells no server.
async fn find(args: &CreateArgs, store: &StoreOptions) -> Result<Made> {
    Ok(Made {
        snapshot: past::create(&args.url, store, &args.name, args.at.as_ref()).await?,
        is_newest_found: args.at.is_none(),
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_that_was_found_is_told_with_its_age() {
        let snapshot = serde_json::json!({
            "name": "monday", "checkpoint": {"cno": 17, "check": "00000000000000ff"},
            "published_ms": 951_782_400_000_u64, "named_ms": 951_782_700_000_u64,
        });
        let mut made = Made {
            snapshot: serde_json::from_value(snapshot).unwrap(),
            is_newest_found: true,
        };
        let said_at = |made: &Made, ms: u64| said(made, 951_782_400_000 + ms);
        assert_eq!(
            said_at(&made, 300_000),
            "monday is checkpoint 17, the newest that is published: 2000-02-29 00:00:00.000 UTC, 5 min ago"
        );
        assert!(said(&made, 0).contains("ahead of this machine's clock"));
        made.is_newest_found = false;
        assert_eq!(
            said_at(&made, 0),
            "monday is checkpoint 17, published 2000-02-29 00:00:00.000 UTC"
        );
    }
}
