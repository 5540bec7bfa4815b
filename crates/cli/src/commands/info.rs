//! `hypernbd info URL`.

use anyhow::Result;
use hypernbd_volume::admin::{self, VolumeInfo};
use hypernbd_volume::lease::LeaseRecord;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;

use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    pub url: VolumeUrl,

    /// Print JSON, with sizes in bytes and times in milliseconds since 1970
    #[arg(long)]
    pub json: bool,
}

/// Prints what the volume is.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let info = admin::info(&args.url, store).await?;
    if args.json {
        output::line(serde_json::to_string_pretty(&info)?)?;
    } else {
        output::write(table(&info))?;
    }
    Ok(())
}

fn table(info: &VolumeInfo) -> String {
    let checkpoint = match info.last_checkpoint {
        0 => "none yet".to_string(),
        number => format!("{number}, {}", utc(info.modified_ms / 1000)),
    };
    let rows = [
        ("volume", info.url.clone()),
        (
            "id",
            info.volume_id.map_or_else(
                || "none until it is first served for writing".to_string(),
                |id| id.to_string(),
            ),
        ),
        (
            "size",
            format!("{} ({} bytes)", format_size(info.size_bytes), info.size_bytes),
        ),
        ("block size", format_size(info.block_size_bytes.into())),
        ("written", format!("{} at most", format_size(info.mapped_bytes))),
        ("last checkpoint", checkpoint),
        ("format", info.format.clone()),
        ("durability", info.durability.clone()),
        ("held by", held_by(info.lease.as_ref())),
    ];
    let counter = info.nearest_end.filter(|counter| counter.percent() > 0);
    let counter = counter.map(|counter| {
        let used = format!("{} % of all {} are used", counter.percent(), counter.name);
        ("nearest end", used)
    });
    let log = info
        .wal_url
        .iter()
        .map(|url| ("log", format!("{url}, not closed cleanly or being served")));
    rows.into_iter()
        .chain(counter)
        .chain(log)
        .map(|(name, value)| format!("{name:<16} {value}\n"))
        .collect()
}

fn held_by(lease: Option<&LeaseRecord>) -> String {
    match lease {
        Some(lease) if lease.is_held() => format!(
            "{}, since {}, epoch {}",
            lease.holder,
            utc(lease.taken_ms / 1000),
            lease.epoch
        ),
        _ => "nobody".to_string(),
    }
}

/// A time in seconds since 1970 as date and time of day. The calendar is Howard Hinnant's `civil_from_days`:
/// <https://howardhinnant.github.io/date_algorithms.html>
fn utc(seconds: u64) -> String {
    let (days, second_of_day) = (seconds / 86400, seconds % 86400);
    // Years start in March here, so that a leap day is the last of its year; eras are of 400 years.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc_dates() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_799, "2000-02-29 23:59:59 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_767_225_599, "2025-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(utc(seconds), expected);
        }
    }

    #[test]
    fn the_table_is_for_people() {
        let info = VolumeInfo {
            url: "s3://bucket/vol/".into(),
            volume_id: None,
            size_bytes: 10_000_000_000_000,
            block_size_bytes: 65536,
            format: "Parted".into(),
            last_checkpoint: 0,
            checkpoint_numbers_used: 0,
            checkpoint_numbers_max: (1 << 30) - 1,
            nearest_end: None,
            modified_ms: 0,
            mapped_bytes: 0,
            wal_url: None,
            durability: "words".into(),
            lease: None,
        };
        let table = table(&info);
        for line in [
            "volume           s3://bucket/vol/",
            "size             9.09 TiB (10000000000000 bytes)",
            "block size       64 KiB",
            "last checkpoint  none yet",
            "held by          nobody",
        ] {
            assert!(table.lines().any(|l| l == line), "{line}\nis not among\n{table}");
        }
    }
}
