//! `hypernbd resize URL --size SIZE`.

use std::time::Duration;

use anyhow::{Result, bail};
use hypernbd_volume::admin::{self, AskedToGrow};
use hypernbd_volume::monitor::client::{self, ClientError};
use hypernbd_volume::monitor::control::ResizeArguments;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::{format_size, parse_duration, parse_size};
use hypernbd_volume::url::VolumeUrl;
use tokio::runtime::Handle;

use super::served;
use crate::flags::{check_size, lease, warn_of_size};
use crate::output;
use crate::watch::{AtSignal, Watch};

/// How long a server is waited for beyond a renewal of its lease.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume; while a server has it open, on any machine, it can be grown, which clients see when they connect again
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

    /// How long a server that can be asked only through the store is waited for, beyond a third of its lease_duration, but no less than two
    /// thirds of that [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub wait: Option<Duration>,
}

/// A new size for a volume.
#[derive(Debug, Clone, Copy)]
pub struct NewSize {
    /// In bytes.
    pub size_bytes: u64,
    /// Whether it may be smaller.
    pub shrink: bool,
    /// Whether the volume is taken from who holds it.
    pub takeover: bool,
    /// How long a server is waited for beyond a renewal of its lease.
    pub patience: Duration,
}

/// Resizes the volume and says so.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    check_size(args.size_bytes)?;
    let wanted = NewSize {
        size_bytes: args.size_bytes,
        shrink: args.allow_shrink,
        takeover: args.takeover,
        patience: args.wait.unwrap_or(PATIENCE),
    };
    let (before, after) = resize(&args.url, store, wanted).await?;
    output::line(format_args!(
        "resized {}: {} to {}",
        args.url,
        format_size(before),
        format_size(after)
    ))?;
    Ok(())
}

/// Resizes a volume; to a smaller size only where that is allowed. One that is served is grown by its server. Returns the old and the new
/// size, in bytes.
pub async fn resize(url: &VolumeUrl, store: &StoreOptions, wanted: NewSize) -> Result<(u64, u64)> {
    let NewSize {
        size_bytes,
        shrink,
        takeover,
        patience,
    } = wanted;
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
    let volume = served.as_ref().map(|lease| lease.volume_id);
    if let Some(place) = served::place(served.as_ref()) {
        let told: Result<ResizeArguments, _> =
            client::tell_of(&place, volume, "resize", &ResizeArguments { size_bytes }).await;
        match told {
            // What does not answer may be on its way out: the lease says what holds.
            Err(ClientError::Unreachable { .. } | ClientError::Foreign { .. }) => {}
            Err(ClientError::Refused { status: 404, .. }) => bail!(
                "the server of {url} is of an earlier release, which does not resize what it serves: stop it, then resize the volume"
            ),
            told => return Ok((before, told?.size_bytes)),
        }
    }
    // Through the store, whoever holds it wherever: its lease keeps everybody else from doing it.
    let is_held = served.is_some_and(|lease| lease.is_held());
    let unanswered = match is_held && size_bytes > before {
        true => match ask(url, store, size_bytes, patience).await? {
            Asked::Grown(after) => return Ok((before, after)),
            Asked::Nobody => None,
            Asked::NoAnswer(said) => Some(said),
        },
        false => None,
    };
    let resized = admin::resize(url, store, size_bytes, shrink, &lease(takeover)).await;
    let resized = match unanswered {
        Some(said) => resized.map_err(|e| anyhow::Error::from(e).context(said))?,
        None => resized?,
    };
    Ok((before, resized.size_bytes))
}

/// What became of asking the holder of a volume through the store, where that is no error.
enum Asked {
    /// To this size.
    Grown(u64),
    /// There is none.
    Nobody,
    /// It may have ended: the lease tells, when it is watched. With what is said if it does not.
    NoAnswer(String),
}

async fn ask(url: &VolumeUrl, store: &StoreOptions, size_bytes: u64, patience: Duration) -> Result<Asked> {
    let watch = Watch::on(&Handle::current(), AtSignal::Stop)?;
    let asked = admin::ask_to_grow(url, store, size_bytes, patience, watch.control()).await?;
    let size = format_size(size_bytes);
    match asked {
        AskedToGrow::Nobody if watch.control().is_stopped() => bail!("stopped; nothing was done"),
        AskedToGrow::NoAnswer { .. } if watch.control().is_stopped() => {
            bail!("stopped; the server of {url} is not asked any more, and has not grown it")
        }
        AskedToGrow::Nobody => Ok(Asked::Nobody),
        AskedToGrow::Grown { size_bytes, holder } => {
            log::info!("{url} was grown by {holder}");
            Ok(Asked::Grown(size_bytes))
        }
        AskedToGrow::Pending { request } => bail!(
            "{} has asked for {} already, and the server of {url} has not answered yet: give the command again once it has \
             (hypernbd info {url})",
            request.asked_by,
            format_size(request.size_bytes)
        ),
        AskedToGrow::Failed { why, holder } => {
            bail!("{holder} has {url} open, and did not grow it to {size}: {why}")
        }
        AskedToGrow::Ignored { holder } => bail!(
            "{holder} has {url} open, and renews its lease without an answer: it is of an earlier release, which does not grow what it \
             serves when it is asked through the store; stop it, then resize the volume"
        ),
        AskedToGrow::NoAnswer { holder, waited } => {
            let said = format!(
                "{holder} did not answer within {} s, and is not asked any more",
                waited.as_secs()
            );
            crate::complain(&format!("{said}; looking whether it still holds {url}"));
            Ok(Asked::NoAnswer(said))
        }
        AskedToGrow::Unfinished { holder } => bail!(
            "{holder} has begun to grow {url} to {size}, and how that ended was not waited for, or is not known: hypernbd info {url} says \
             which size it has"
        ),
        AskedToGrow::Stopped => {
            bail!("stopped; the server of {url} is not asked any more, and has not grown it")
        }
    }
}
