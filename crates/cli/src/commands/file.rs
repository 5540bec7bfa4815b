//! `hypernbd file …`: hypercli's verbs, with its arguments.

use anyhow::Result;
use hypernbd_volume::admin::{self, CreateOptions};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::parse_size;
use hypernbd_volume::url::VolumeUrl;

use super::delete::{self, Unasked};
use super::resize::{NewSize, PATIENCE, resize};
use super::{prune, rollback, space};
use crate::flags::block_size;

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a new volume of length 0
    CreateOpt(CreateOptArgs),
    /// Set a volume's length; a smaller one is refused (see resize)
    SetLen(SetLenArgs),
    /// Make a volume read as it did at an earlier checkpoint
    Rollback(rollback::Args),
    /// Remove the checkpoints that a volume's retention does not keep
    Prune(prune::Args),
    /// Show what a volume takes in its store
    Du(space::Args),
    /// Delete a volume; asks on a terminal only
    Delete(delete::Args),
}

/// Arguments of `create-opt`.
#[derive(Debug, clap::Args)]
pub struct CreateOptArgs {
    /// Where the volume is made; nothing may be there yet
    pub url: VolumeUrl,

    /// Size of the volume's blocks, for its whole life: a power of two, 4K or more
    #[arg(long = "data-block-size", value_name = "SIZE", value_parser = block_size,
          default_value_t = admin::DEFAULT_BLOCK_SIZE_BYTES)]
    pub data_block_size_bytes: u32,
}

/// Arguments of `set-len`.
#[derive(Debug, clap::Args)]
pub struct SetLenArgs {
    /// The volume; its server makes it longer while it has it open
    pub url: VolumeUrl,

    /// The new length
    #[arg(long = "size", value_name = "SIZE", value_parser = parse_size)]
    pub size_bytes: u64,

    /// Set it even while a server holds the volume; that server cannot write from then on
    #[arg(long)]
    pub takeover: bool,
}

/// Carries out a verb. Like hypercli these say nothing when all went well, but for `delete`.
pub async fn run(command: &Command, store: &StoreOptions) -> Result<()> {
    match command {
        Command::CreateOpt(args) => {
            let options = CreateOptions {
                size_bytes: 0,
                block_size_bytes: args.data_block_size_bytes,
            };
            admin::create(&args.url, store, &options).await?;
        }
        Command::SetLen(args) => {
            let wanted = NewSize {
                size_bytes: args.size_bytes,
                shrink: false,
                takeover: args.takeover,
                patience: PATIENCE,
            };
            resize(&args.url, store, wanted).await?;
        }
        Command::Prune(args) => prune::run(args, store).await?,
        Command::Du(args) => space::run(args, store).await?,
        Command::Rollback(args) => rollback::run(args, store).await?,
        Command::Delete(args) => delete::delete(args, store, Unasked::Delete).await?,
    }
    Ok(())
}
