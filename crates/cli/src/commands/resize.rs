//! `hypernbd resize URL --size SIZE`.

use anyhow::{Result, bail};
use hypernbd_volume::admin;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::{format_size, parse_size};
use hypernbd_volume::url::VolumeUrl;

use crate::flags::lease;
use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume; no server may have it open
    pub url: VolumeUrl,

    /// The new size of the device
    #[arg(long = "size", value_name = "SIZE", value_parser = parse_size)]
    pub size_bytes: u64,

    /// Allow a smaller size: what is past the new end is gone, but for earlier checkpoints
    #[arg(long)]
    pub allow_shrink: bool,

    /// Resize even while a server holds the volume; that server cannot write from then on
    #[arg(long)]
    pub takeover: bool,
}

/// Resizes the volume and says so.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let (before, after) = resize(
        &args.url,
        store,
        args.size_bytes,
        args.allow_shrink,
        args.takeover,
    )
    .await?;
    output::line(format_args!(
        "resized {}: {} to {}",
        args.url,
        format_size(before),
        format_size(after)
    ))?;
    Ok(())
}

/// Resizes a volume; to a smaller size only where that is allowed. Returns the old and the new size, in bytes.
pub async fn resize(
    url: &VolumeUrl,
    store: &StoreOptions,
    size_bytes: u64,
    shrink: bool,
    takeover: bool,
) -> Result<(u64, u64)> {
    let before = admin::info(url, store).await?.size_bytes;
    if size_bytes < before && !shrink {
        bail!(
            "{url} has {}: shrinking it to {} loses everything past the new end; if that is meant: \
             hypernbd resize {url} --size {size_bytes} --allow-shrink",
            format_size(before),
            format_size(size_bytes),
        );
    }
    Ok((
        before,
        admin::resize(url, store, size_bytes, shrink, &lease(takeover))
            .await?
            .size_bytes,
    ))
}
