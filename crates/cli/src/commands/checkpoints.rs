//! `hypernbd checkpoints URL`.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::{self, At, Listed};
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;

use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    pub url: VolumeUrl,

    /// Only those published at this time or later, as in 2026-11-22T10:00:00Z or -15m
    #[arg(long, value_name = "TIME", value_parser = time, allow_hyphen_values = true)]
    pub since: Option<u64>,

    /// Only those published at this time or before
    #[arg(long, value_name = "TIME", value_parser = time, allow_hyphen_values = true)]
    pub until: Option<u64>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Reads a time, in milliseconds since 1970-01-01 UTC: with or without the `@` that stands before it elsewhere.
pub fn time(text: &str) -> Result<u64> {
    let at = format!("@{}", text.strip_prefix('@').unwrap_or(text));
    match at.parse() {
        Ok(At::Time(ms)) => Ok(ms),
        Ok(At::Ago(ago)) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            Ok(u64::try_from(now.saturating_sub(ago).as_millis()).unwrap_or(u64::MAX))
        }
        _ => bail!("write a time as in 2026-11-22T10:00:00Z, or how long ago as in -15m"),
    }
}

/// Prints the checkpoints.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let since = args.since.unwrap_or(0);
    let until = args.until.unwrap_or(u64::MAX);
    let listed = past::list(&args.url, store, since, until).await?;
    if args.json {
        return output::line(serde_json::to_string_pretty(&listed)?);
    }
    let head = format!(
        "{:>10}  {:<23}  {:>10}  {:>10}  {:<24}  NAMES\n",
        "NUMBER", "TIME", "SIZE", "WRITTEN", "KEPT BY"
    );
    let rows: String = listed.iter().map(row).collect();
    output::write(head + &rows)
}

fn row(listed: &Listed) -> String {
    let names: Vec<String> = listed.names.iter().map(ToString::to_string).collect();
    let kept_by: Vec<String> = listed.kept_by.iter().map(ToString::to_string).collect();
    let kept_by = match kept_by.is_empty() {
        true => "nothing: it goes".to_owned(),
        false => kept_by.join(","),
    };
    let row = format!(
        "{:>10}  {:<23}  {:>10}  {:>10}  {kept_by:<24}  {}",
        listed.cno,
        output::time(listed.time),
        format_size(listed.size_bytes),
        format_size(listed.written_bytes),
        names.join(", ")
    );
    row.trim_end().to_owned() + "\n"
}
