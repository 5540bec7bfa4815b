//! `hypernbd prune URL`.

use anyhow::Result;
use hypernbd_volume::admin::retention;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;

use crate::flags::lease;
use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume; no server may have it open: one that has does this by itself
    pub url: VolumeUrl,

    /// Say what would go, and remove nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Prune even while a server holds the volume; that server cannot write from then on
    #[arg(long)]
    pub takeover: bool,
}

/// Removes what the volume's retention does not keep, and says how much that was.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    if args.dry_run {
        let going = retention::prune_preview(&args.url, store).await?;
        return output::line(format_args!(
            "{} checkpoints and {} objects with {} would go",
            going.checkpoints,
            going.objects,
            format_size(going.reclaimable_bytes + going.grace_bytes)
        ));
    }
    if retention::policy(&args.url, store).await?.is_none() {
        return output::line(format_args!(
            "every checkpoint of {0} is kept: say which are with hypernbd retention set {0}",
            args.url
        ));
    }
    let removed = retention::prune(&args.url, store, &lease(args.takeover)).await?;
    output::line(format_args!(
        "removed {} checkpoints and {} objects with {}",
        removed.checkpoints,
        removed.objects,
        format_size(removed.bytes)
    ))
}
