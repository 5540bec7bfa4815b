//! `hypernbd delete URL`.

use std::io::IsTerminal;

use anyhow::{Result, bail};
use hypernbd_volume::admin::{self, IfDamaged};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;

use crate::flags::lease;
use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume; no server may have it open
    pub url: VolumeUrl,

    /// Delete without asking
    #[arg(long)]
    pub yes: bool,

    /// Delete even while a server holds the volume; that server fails from then on
    #[arg(long)]
    pub takeover: bool,

    /// Delete even where damage hides whether a server holds the volume; make sure that none does
    #[arg(long)]
    pub damaged: bool,
}

/// What to do where nobody can be asked, since standard input is no terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unasked {
    /// Delete nothing.
    Refuse,
    /// Go ahead.
    Delete,
}

/// Deletes the volume, after asking.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    delete(args, store, Unasked::Refuse).await
}

/// Names what would be destroyed, asks unless told not to, deletes.
pub async fn delete(args: &Args, store: &StoreOptions, unasked: Unasked) -> Result<()> {
    let plan = admin::delete_plan(&args.url, store).await?;
    output::line(format_args!(
        "{} is a device of {}, stored as {} objects with {}",
        plan.url,
        format_size(plan.size_bytes),
        plan.objects,
        format_size(plan.bytes)
    ))?;
    if !args.yes && !confirmed(unasked)? {
        bail!("nothing was deleted");
    }
    let if_damaged = if args.damaged {
        IfDamaged::Delete
    } else {
        IfDamaged::Refuse
    };
    let done = admin::delete(&args.url, store, &lease(args.takeover), if_damaged).await?;
    output::line(format_args!(
        "deleted {}: {} objects, {}",
        args.url,
        done.plan.objects,
        format_size(done.plan.bytes)
    ))?;
    if done.is_kept_as_versions {
        output::line(format_args!(
            "the bucket keeps versions: these bytes stay in it, and are paid for, until a lifecycle rule removes versions \
             that are not current (docs/s3-compatibility.md)"
        ))?;
    }
    Ok(())
}

fn confirmed(unasked: Unasked) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        if unasked == Unasked::Delete {
            return Ok(true);
        }
        bail!("there is no terminal to ask on: add --yes to delete this volume");
    }
    output::is_answered_yes("Delete it for good, with every checkpoint?")
}
