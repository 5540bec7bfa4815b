//! `hypernbd control flush|compact|flatten|retention|shutdown|set SERVER`.

use anyhow::Result;
use hypernbd_volume::admin::Flattened;
use hypernbd_volume::admin::compact::Compacted;
use hypernbd_volume::monitor::client;
use hypernbd_volume::monitor::control::{RetentionAnswer, RetentionArguments, Settings, ShutdownArguments};
use hypernbd_volume::options::StoreOptions;
use serde_json::{Value, json};

use super::{clone, compact, prune, server};
use crate::output;

/// What a running server can be told to do.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make everything durable that was written
    Flush(ServerArgs),
    /// Copy what is live out of objects that are mostly dead, also with compaction=off
    Compact(ServerArgs),
    /// End the sharing of a clone: what it shares is copied to where it is
    Flatten(ServerArgs),
    /// Remove what the volume's retention does not keep, as far as it may go now, also with retention_interval=off
    Retention(ServerArgs),
    /// End the server
    Shutdown(ShutdownArgs),
    /// Change what may change while it runs
    Set(SetArgs),
}

/// Which server.
#[derive(Debug, clap::Args)]
pub struct ServerArgs {
    /// The volume that a server on this machine holds, or the path of one of the server's sockets
    pub server: String,
}

/// Arguments of `control shutdown`.
#[derive(Debug, clap::Args)]
pub struct ShutdownArgs {
    #[command(flatten)]
    server: ServerArgs,

    /// Wait until the last client has gone; without it clients that are connected get errors
    #[arg(long)]
    when_idle: bool,
}

/// Arguments of `control set`.
#[derive(Debug, clap::Args)]
pub struct SetArgs {
    #[command(flatten)]
    server: ServerArgs,

    /// What is logged, as in RUST_LOG: info, or hypernbd_volume=debug
    #[arg(long, value_name = "FILTER", required_unless_present = "checkpoint_interval")]
    log: Option<String>,

    /// Longest time from a write to the start of its checkpoint, of what is written from now on
    #[arg(long, value_name = "TIME")]
    checkpoint_interval: Option<String>,
}

/// Carries a command out.
pub async fn run(command: &Command, store: &StoreOptions) -> Result<()> {
    match command {
        Command::Flush(args) => {
            let place = server::place(&args.server, store).await?;
            let _: Value = client::tell(&place, "flush", &json!({})).await?;
            output::line("everything that was written is durable")
        }
        Command::Compact(args) => {
            let place = server::place(&args.server, store).await?;
            let done: Compacted = client::tell(&place, "compact", &json!({})).await?;
            output::write(compact::moved(&done))
        }
        Command::Flatten(args) => {
            let place = server::place(&args.server, store).await?;
            let done: Flattened = client::tell(&place, "flatten", &json!({})).await?;
            output::line(clone::flattened(&done))
        }
        Command::Retention(args) => {
            let place = server::place(&args.server, store).await?;
            let answer: RetentionAnswer =
                client::tell(&place, "retention", &RetentionArguments::default()).await?;
            output::write(prune::gone_and_waiting(&answer))
        }
        Command::Shutdown(args) => {
            let place = server::place(&args.server.server, store).await?;
            let arguments = ShutdownArguments {
                when_idle: args.when_idle,
            };
            let told: Value = client::tell(&place, "shutdown", &arguments).await?;
            let connections = told["connections"].as_u64().unwrap_or_default();
            match args.when_idle && connections > 0 {
                true => output::line(format_args!(
                    "the server ends once its clients have gone; there are {connections} connections"
                )),
                false => output::line("the server ends"),
            }
        }
        Command::Set(args) => {
            let place = server::place(&args.server.server, store).await?;
            let settings = Settings {
                log: args.log.clone(),
                checkpoint_interval: args.checkpoint_interval.clone(),
            };
            let _: Value = client::tell(&place, "set", &settings).await?;
            output::line("set")
        }
    }
}
