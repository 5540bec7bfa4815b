//! `hypernbd retention set|show|unset URL`.

use std::time::Duration;

use anyhow::{Result, bail};
use hypernbd_volume::admin::{self, retention};
use hypernbd_volume::monitor::client::{self, ClientError};
use hypernbd_volume::monitor::control::{Gone, RetentionAnswer, RetentionArguments};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::Listed;
use hypernbd_volume::retention::Policy;
use hypernbd_volume::units::{format_size, parse_duration};
use hypernbd_volume::url::VolumeUrl;

use super::{prune, served};
use crate::output;
use crate::wrong_usage;

/// The commands for how long checkpoints are kept.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Say which checkpoints are kept; the newest and those with names always are
    Set(SetArgs),
    /// Show which checkpoints are kept
    Show(ShowArgs),
    /// Keep every checkpoint
    Unset(UnsetArgs),
}

/// Arguments of `retention set`.
#[derive(Debug, clap::Args)]
pub struct SetArgs {
    /// The volume; a server may have it open
    pub url: VolumeUrl,

    /// Keep this many of the newest
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_last: u32,

    /// Keep all that are not older than the newest by more than this, as in 90min, 24h or 7d
    #[arg(long, value_name = "TIME", value_parser = keep_within)]
    pub keep_within: Option<Duration>,

    /// Keep the last one of each of this many hours that have any
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_hourly: u32,

    /// The same of days
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_daily: u32,

    /// The same of weeks
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_weekly: u32,

    /// The same of months
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_monthly: u32,

    /// List what would go, and set nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `retention show`.
#[derive(Debug, clap::Args)]
pub struct ShowArgs {
    /// The volume
    pub url: VolumeUrl,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `retention unset`.
#[derive(Debug, clap::Args)]
pub struct UnsetArgs {
    /// The volume; a server may have it open
    pub url: VolumeUrl,
}

/// Reads what `--keep-within` says. Whoever knows restic means months by `m`: read as minutes, nearly everything would go.
fn keep_within(text: &str) -> Result<Duration, String> {
    let within = parse_duration(text).map_err(|error| error.to_string())?;
    match text.trim_end().strip_suffix('m') {
        None => Ok(within),
        Some(number) => Err(format!(
            "m is months in restic: write {0}min for minutes, and months in days, as in 180d",
            number.trim()
        )),
    }
}

/// Carries a command out.
pub async fn run(command: &Command, store: &StoreOptions) -> Result<()> {
    match command {
        Command::Set(args) => set(args, store).await,
        Command::Show(args) => {
            let policy = retention::policy(&args.url, store).await?;
            if args.json {
                return output::line(serde_json::to_string_pretty(&policy)?);
            }
            output::line(policy.unwrap_or_default())
        }
        Command::Unset(args) => {
            let going = retention::set_policy(&args.url, store, None).await?;
            warn_of(&going)?;
            output::line(format_args!("every checkpoint of {} is kept", args.url))
        }
    }
}

async fn set(args: &SetArgs, store: &StoreOptions) -> Result<()> {
    let within = args.keep_within.unwrap_or_default();
    let policy = Policy {
        keep_last: args.keep_last,
        keep_within_ms: u64::try_from(within.as_millis()).unwrap_or(u64::MAX),
        keep_hourly: args.keep_hourly,
        keep_daily: args.keep_daily,
        keep_weekly: args.keep_weekly,
        keep_monthly: args.keep_monthly,
    };
    if policy.is_empty() {
        return Err(wrong_usage(format_args!(
            "name what is kept, as in --keep-within 7d or --keep-daily 30; hypernbd retention unset {} keeps everything",
            args.url
        )));
    }
    if args.dry_run {
        let going = retention::preview(&args.url, store, &policy).await?;
        if args.json {
            return output::line(serde_json::to_string_pretty(&going)?);
        }
        return output::write(table(&going));
    }
    let going = retention::set_policy(&args.url, store, Some(&policy)).await?;
    let answer = told(&args.url, store).await;
    if args.json {
        if let Some(warning) = warning_of(&going) {
            log::warn!("{warning}");
        }
        return output::line(serde_json::to_string_pretty(&policy)?);
    }
    warn_of(&going)?;
    output::line(format_args!("{} keeps {policy}", args.url))?;
    match answer {
        Some(answer) => output::write(prune::gone_and_waiting(&answer)),
        None => Ok(()),
    }
}

/// Lets the server that has the volume open on this machine go by the new rules at once. They are set: without its answer it does so with
/// its next round. `None` where there is none, or nothing goes by them.
async fn told(url: &VolumeUrl, store: &StoreOptions) -> Option<RetentionAnswer> {
    let answer = tell(url, store).await;
    match answer {
        Ok(answer) => answer.filter(|answer| answer.gone != Gone::default() || answer.waiting > 0),
        Err(error) => {
            log::warn!("the server of {url} goes by the new rules with its next round: {error:#}");
            None
        }
    }
}

async fn tell(url: &VolumeUrl, store: &StoreOptions) -> Result<Option<RetentionAnswer>> {
    let lease = admin::lease_of(url, store).await?;
    let Some(place) = served::place(lease.as_ref()) else {
        return Ok(None);
    };
    let volume = lease.map(|lease| lease.volume_id);
    let arguments = RetentionArguments {
        only_if_automatic: true,
    };
    match client::tell_of(&place, volume, "retention", &arguments).await {
        Ok(answer) => Ok(Some(answer)),
        // It may be on its way out.
        Err(ClientError::Unreachable { .. }) => Ok(None),
        Err(ClientError::Refused { status: 404, .. }) => {
            bail!("it is of an earlier release, which cannot be told of them")
        }
        Err(error) => Err(error.into()),
    }
}

/// What the policy before had decided may be done still.
fn warning_of(going: &[u64]) -> Option<String> {
    let first = going.first()?;
    Some(format!(
        "{} checkpoints, from {first} on, were being removed before, and may go",
        going.len()
    ))
}

fn warn_of(going: &[u64]) -> Result<()> {
    warning_of(going).map_or(Ok(()), output::line)
}

fn table(going: &[Listed]) -> String {
    let rows = going.iter().map(|listed| {
        format!(
            "{:>10}  {:<20}  {:>10}\n",
            listed.cno,
            output::time(listed.time),
            format_size(listed.written_bytes)
        )
    });
    let head = format!("{:>10}  {:<20}  {:>10}\n", "NUMBER", "TIME", "WRITTEN");
    let sum = format!("{} checkpoints would go\n", going.len());
    std::iter::once(head).chain(rows).chain([sum]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_m_is_neither_minutes_nor_months() {
        for text in ["6m", "6 m", "1.5m"] {
            let refused = keep_within(text).unwrap_err();
            assert!(refused.contains("min") && refused.contains("180d"), "{refused}");
        }
        assert_eq!(keep_within("90min"), Ok(Duration::from_secs(90 * 60)));
        assert_eq!(keep_within("7d"), Ok(Duration::from_secs(7 * 86_400)));
        assert!(keep_within("6x").unwrap_err().contains("min"));
    }

    #[test]
    fn what_is_shown_of_a_policy_is_taken_back() {
        for ms in [1, 1500, 90_000, 90 * 60_000, 24 * 3_600_000, 7 * 86_400_000] {
            let policy = Policy {
                keep_within_ms: ms,
                ..Policy::default()
            };
            let shown = policy.to_string();
            let within = shown.strip_prefix("--keep-within ").unwrap();
            assert_eq!(keep_within(within), Ok(Duration::from_millis(ms)), "{shown}");
        }
    }
}
