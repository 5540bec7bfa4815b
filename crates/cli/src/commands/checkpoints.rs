//! `hypernbd checkpoints URL`.

use anyhow::{Result, bail};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::{self, At, Listed};
use hypernbd_volume::retention::Until;
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
            let ago_ms = u64::try_from(ago.as_millis()).unwrap_or(u64::MAX);
            Ok(output::now_ms().saturating_sub(ago_ms))
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
        "{:>10}  {:<27}  {:>10}  {:>10}  {:<24}  {:<27}  NAMES\n",
        "NUMBER", "TIME", "SIZE", "WRITTEN", "KEPT BY", "KEPT UNTIL"
    );
    let now_ms = output::now_ms();
    let rows: String = listed.iter().map(|listed| row(listed, now_ms)).collect();
    output::write(head + &rows)
}

/// Until when a checkpoint is kept, at the time `now_ms`.
fn kept_until(until: Option<Until>, now_ms: u64) -> String {
    match until {
        None => "-".to_owned(),
        Some(Until::Ever) => "for ever".to_owned(),
        Some(Until::InUse) => "while in use".to_owned(),
        Some(Until::Newest(count)) => format!("while among the newest {count}"),
        Some(Until::Time(ms)) if ms <= now_ms => "the next checkpoint".to_owned(),
        Some(Until::Time(ms)) => output::time(ms),
    }
}

fn row(listed: &Listed, now_ms: u64) -> String {
    let names: Vec<String> = listed.names.iter().map(ToString::to_string).collect();
    let kept_by: Vec<String> = listed.kept_by.iter().map(ToString::to_string).collect();
    let kept_by = match kept_by.is_empty() {
        true => "nothing: it goes".to_owned(),
        false => kept_by.join(","),
    };
    let row = format!(
        "{:>10}  {:<27}  {:>10}  {:>10}  {kept_by:<24}  {:<27}  {}",
        listed.cno,
        output::time(listed.time),
        format_size(listed.size_bytes),
        format_size(listed.written_bytes),
        kept_until(listed.kept_until, now_ms),
        names.join(", ")
    );
    row.trim_end().to_owned() + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_has_passed_is_the_next_checkpoint() {
        let until = |until| kept_until(Some(until), 951_782_400_000);
        assert_eq!(until(Until::Time(951_782_400_001)), "2000-02-29 00:00:00.001 UTC");
        assert_eq!(until(Until::Time(951_782_400_000)), "the next checkpoint");
        assert_eq!(until(Until::Newest(16)), "while among the newest 16");
        assert_eq!(until(Until::Ever), "for ever");
        assert_eq!(until(Until::InUse), "while in use");
        assert_eq!(kept_until(None, 0), "-");
    }
}
