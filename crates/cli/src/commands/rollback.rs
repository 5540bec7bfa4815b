//! `hypernbd rollback URL AT`.

use anyhow::Result;
use hypernbd_volume::admin::rollback;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::At;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;

use crate::flags::lease;
use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume; no server may have it open
    pub url: VolumeUrl,

    /// The checkpoint to go back to, as @NUMBER, @TIME, @-AGO or @NAME
    pub at: At,

    /// Roll back without asking
    #[arg(long)]
    pub yes: bool,

    /// Roll back even while a server holds the volume; that server cannot write from then on
    #[arg(long)]
    pub takeover: bool,
}

/// Rolls the volume back, after saying what that undoes.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let (to, newest) = rollback::look(&args.url, store, &args.at).await?;
    output::line(format_args!(
        "{} will read as at checkpoint {}, published {}, with {}; it undoes checkpoints {} to {}, the newest published {}, \
         which stay reachable",
        args.url,
        to.number(),
        output::time(to.published_ms),
        format_size(to.size_bytes()),
        to.number() + 1,
        newest.number(),
        output::time(newest.published_ms)
    ))?;
    output::confirm(args.yes, "Roll back?", "roll back", "nothing was changed")?;
    let done = rollback::rollback_to(&args.url, store, to, &lease(args.takeover)).await?;
    output::line(format_args!(
        "rolled back to checkpoint {} as checkpoint {}; the state before is the snapshot {}",
        done.to.number(),
        done.number,
        done.before
    ))
}
