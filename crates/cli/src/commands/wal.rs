//! `hypernbd wal info|replay|discard URL`.

use anyhow::Result;
use hypernbd_volume::admin::wal;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::url::VolumeUrl;

use crate::flags::lease;
use crate::output;

/// The commands for a volume's write-ahead log.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Show whether a log holds writes that are not published
    Info(InfoArgs),
    /// Publish what a log holds, and remove it; the log of the volume that this one is a copy of stays
    Replay(ReplayArgs),
    /// Give a log up, with the writes flushed to it since the last checkpoint
    Discard(DiscardArgs),
}

/// Arguments of `wal info`.
#[derive(Debug, clap::Args)]
pub struct InfoArgs {
    /// The volume
    pub url: VolumeUrl,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `wal replay`.
#[derive(Debug, clap::Args)]
pub struct ReplayArgs {
    /// The volume; no server may have it open
    pub url: VolumeUrl,

    /// The log, where it is not the one the volume names
    #[arg(long, value_name = "URL")]
    pub wal_url: Option<VolumeUrl>,

    /// Replay even while a server holds the volume; that server cannot write from then on
    #[arg(long)]
    pub takeover: bool,

    /// The volume was moved, and is no copy: the log is its own
    #[arg(long)]
    pub adopt: bool,
}

/// Arguments of `wal discard`.
#[derive(Debug, clap::Args)]
pub struct DiscardArgs {
    /// The volume; no server may have it open
    pub url: VolumeUrl,

    /// Discard without asking
    #[arg(long)]
    pub yes: bool,

    /// Discard even while a server holds the volume; that server cannot write from then on
    #[arg(long)]
    pub takeover: bool,
}

/// Carries a command out.
pub async fn run(command: &Command, store: &StoreOptions) -> Result<()> {
    match command {
        Command::Info(args) => info(args, store).await,
        Command::Replay(args) => {
            let lease = lease(args.takeover);
            let was_there = wal::replay(&args.url, store, args.wal_url.as_ref(), &lease, args.adopt).await?;
            output::line(match was_there {
                true => "the log is published",
                false => "there is no log to replay",
            })
        }
        Command::Discard(args) => discard(args, store).await,
    }
}

async fn info(args: &InfoArgs, store: &StoreOptions) -> Result<()> {
    let info = wal::info(&args.url, store).await?;
    if args.json {
        return output::line(serde_json::to_string_pretty(&info)?);
    }
    let Some(log) = &info.wal else {
        return output::line(format_args!("{} has no log with unpublished writes", info.url));
    };
    let records = info.records.map_or(String::new(), |n| format!("records  {n}\n"));
    output::write(format_args!(
        "volume   {} ({})\nlog      {}\nhost     {}\n{records}\
         The log is in use, or its server was killed: it may hold flushed writes that are not published.\n\
         The next server replays it, and so does hypernbd wal replay; other Hyperfile tools do not see it.\n",
        info.url,
        log.volume_id,
        info.address.as_deref().unwrap_or(&log.url),
        log.host
    ))
}

async fn discard(args: &DiscardArgs, store: &StoreOptions) -> Result<()> {
    let info = wal::info(&args.url, store).await;
    // A log that cannot be looked at is the very one to discard.
    if let Ok(wal::WalInfo { wal: None, .. }) = info {
        return output::line("there is no log to discard");
    }
    output::line(format_args!(
        "discarding the log of {} loses the writes that were flushed to it since the last checkpoint",
        args.url
    ))?;
    output::confirm(
        args.yes,
        "Discard it?",
        "discard the log",
        "nothing was discarded",
    )?;
    wal::discard(&args.url, store, &lease(args.takeover)).await?;
    output::line("the log is given up")
}
