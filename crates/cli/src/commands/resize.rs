//! `hypernbd resize URL --size SIZE`.

use anyhow::{Result, bail};
use hypernbd_volume::admin;
use hypernbd_volume::monitor::client::{self, ClientError};
use hypernbd_volume::monitor::control::ResizeArguments;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::{format_size, parse_size};
use hypernbd_volume::url::VolumeUrl;

use super::served;
use crate::flags::{check_size, lease, warn_of_size};
use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume; while a server on this machine has it open it can be grown, which clients see when they connect again
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
    check_size(args.size_bytes)?;
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

/// Resizes a volume; to a smaller size only where that is allowed. One that is served on this machine is grown by its server. Returns the
/// old and the new size, in bytes.
pub async fn resize(
    url: &VolumeUrl,
    store: &StoreOptions,
    size_bytes: u64,
    shrink: bool,
    takeover: bool,
) -> Result<(u64, u64)> {
    warn_of_size(size_bytes);
    let info = admin::info(url, store).await?;
    let before = info.size_bytes;
    if size_bytes < before && !shrink {
        bail!(
            "{url} has {}: shrinking it to {} loses everything past the new end; if that is meant: \
             hypernbd resize {url} --size {size_bytes} --allow-shrink",
            format_size(before),
            format_size(size_bytes),
        );
    }
    // Also where it is stored with that size already: its server may not know yet.
    let is_grown = size_bytes >= before && !takeover;
    let served = info.lease.filter(|_| is_grown);
    if let Some(place) = served::place(served.as_ref()) {
        let told: Result<ResizeArguments, _> =
            client::tell(&place, "resize", &ResizeArguments { size_bytes }).await;
        match told {
            // What does not answer may be on its way out: the lease says what holds.
            Err(ClientError::Unreachable { .. } | ClientError::Foreign { .. }) => {}
            Err(ClientError::Refused { status: 404, .. }) => bail!(
                "the server of {url} is of an earlier release, which does not resize what it serves: stop it, then resize the volume"
            ),
            told => return Ok((before, told?.size_bytes)),
        }
    }
    Ok((
        before,
        admin::resize(url, store, size_bytes, shrink, &lease(takeover))
            .await?
            .size_bytes,
    ))
}
