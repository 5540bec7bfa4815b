//! `hypernbd probe URL`.

use anyhow::{Result, bail};
use hypernbd_volume::admin;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::url::VolumeUrl;

use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A place on the store; no volume need be there
    pub url: VolumeUrl,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Tries the store and shows what holds; fails when something does not.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let checks = admin::probe(&args.url, store).await?;
    if args.json {
        output::line(serde_json::to_string_pretty(&checks)?)?;
    } else {
        for check in &checks {
            let result = check.failure.as_deref().unwrap_or("yes");
            output::line(format_args!("{:<52} {result}", check.name))?;
        }
    }
    let failures = checks.iter().filter(|check| check.failure.is_some()).count();
    if failures > 0 {
        bail!(
            "this store is not safe for volumes: {failures} of {} checks failed",
            checks.len()
        );
    }
    Ok(())
}
