//! `hypernbd info URL`.

use anyhow::Result;
use hypernbd_volume::admin::{self, VolumeInfo};
use hypernbd_volume::lease::{LeaseRecord, LeaseState};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;

use crate::output;

/// What it means that a log was not closed.
const LOG_OPEN: &str = "not closed cleanly or being served: what was flushed since the last checkpoint is there alone, where \
     other Hyperfile tools do not look";

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
        number => format!("{number}, {}", output::time(info.modified_ms)),
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
        .map(|url| ("log", format!("{url}, {LOG_OPEN}")));
    let unclean = info
        .lease
        .iter()
        .filter(|lease| lease.state != LeaseState::Released);
    let import = info.import.iter().map(|import| {
        let text = format!(
            "of {}, not finished: the volume is half made",
            import.source_name()
        );
        ("import", text)
    });
    let buffer = unclean
        .filter_map(|lease| lease.write_buffer_dir.as_ref())
        .map(|dir| {
            let text = format!("in {dir} on the holder's machine: hypernbd buffer show {dir}");
            ("write buffer", text)
        });
    let parent = info.clone_of.iter().map(|parent| {
        let text = format!("{} at checkpoint {}", parent.url, parent.checkpoint);
        ("clone of", text)
    });
    let replica = info.replica_of.iter().map(|original| {
        let text = format!(
            "{}, volume {}; until it is opened for writing",
            original.url, original.volume_id
        );
        ("replica of", text)
    });
    let clones = info.clones.iter().map(|clone| {
        let place = clone
            .url
            .clone()
            .unwrap_or_else(|| format!("volume {}", clone.volume_id));
        ("clone", format!("{place} of checkpoint {}", clone.checkpoint))
    });
    rows.into_iter()
        .chain(counter)
        .chain(log)
        .chain(import)
        .chain(buffer)
        .chain(parent)
        .chain(replica)
        .chain(clones)
        .map(|(name, value)| format!("{name:<16} {value}\n"))
        .collect()
}

fn held_by(lease: Option<&LeaseRecord>) -> String {
    match lease {
        Some(lease) if lease.is_of_killed() => format!(
            "nobody: {} was killed, epoch {}; the next server takes it at once",
            lease.holder, lease.epoch
        ),
        Some(lease) if lease.is_held() => format!(
            "{}, since {}, epoch {}",
            lease.holder,
            output::time(lease.taken_ms),
            lease.epoch
        ),
        _ => "nobody".to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            import: None,
            durability: "words".into(),
            lease: None,
            clone_of: None,
            replica_of: None,
            clones: Vec::new(),
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
