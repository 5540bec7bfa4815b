//! `hypernbd info URL`.

use anyhow::Result;
use hypernbd_volume::admin::{self, VolumeInfo};
use hypernbd_volume::lease::{LeaseRecord, LeaseState};
use hypernbd_volume::meta::scrub_record::ScrubRecord;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;

use crate::output;

/// What it means that a log was not closed.
const LOG_OPEN: &str = "not closed cleanly or being served: what was flushed since the last checkpoint is there alone, where \
     other Hyperfile tools do not look";

/// Damaged places that are shown, at most.
const PLACES_SHOWN: usize = 10;

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
    let growth = info
        .lease
        .iter()
        .filter(|lease| lease.is_held())
        .filter_map(|lease| lease.growth.as_ref())
        .filter(|growth| growth.is_pending())
        .map(|growth| {
            let (size, asked) = (format_size(growth.size_bytes), output::time(growth.asked_ms));
            (
                "asked to grow",
                format!("to {size}, by {} {asked}", growth.asked_by),
            )
        });
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
        .chain(growth)
        .chain(counter)
        .chain(log)
        .chain(import)
        .chain(info.scrub.iter().flat_map(scrub))
        .chain(buffer)
        .chain(parent)
        .chain(replica)
        .chain(clones)
        .map(|(name, value)| format!("{name:<16} {value}\n"))
        .collect()
}

/// How far the scrub is, and what it found.
fn scrub(record: &ScrubRecord) -> Vec<(&'static str, String)> {
    let read = |verified_bytes, unverified_bytes| match unverified_bytes {
        0 => format!("{} as they were written", format_size(verified_bytes)),
        _ => format!(
            "{} as they were written, {} without check values",
            format_size(verified_bytes),
            format_size(unverified_bytes)
        ),
    };
    let last = record.last.map(|last| {
        let read = read(last.verified_bytes, last.unverified_bytes);
        format!("ended {}: {read}", output::time(last.ended_ms))
    });
    let pass = record.pass.map(|pass| {
        let read = read(pass.verified_bytes, pass.unverified_bytes);
        format!("under way since {}: {read}", output::time(pass.began_ms))
    });
    let places = record.damage.iter().take(PLACES_SHOWN);
    let places = places.map(|place| {
        let found = output::time(place.found_ms);
        ("damage", format!("{place}; found {found}"))
    });
    let more = (record.damage.len() as u64 + record.more).saturating_sub(PLACES_SHOWN as u64);
    let more = (more > 0).then(|| ("damage", format!("in {more} places more")));
    let passes = last.into_iter().chain(pass).map(|text| ("scrub", text));
    passes.chain(places).chain(more).collect()
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
            scrub: None,
            durability: "words".into(),
            lease: None,
            clone_of: None,
            replica_of: None,
            clones: Vec::new(),
        };
        let scrubbed = r#"{"version":1,"volume_id":"971042b2-deec-4714-b02c-8745cd37ad39",
            "last":{"began_ms":0,"ended_ms":0,"objects":1,"verified_bytes":1048576,"unverified_bytes":4096},
            "damage":[{"object":"vol/0000000001.0","offset_bytes":16384,"len_bytes":16384,"reason":"damaged",
            "is_newest_affected":true,"ranges":[{"offset_bytes":8192,"len_bytes":4096}],"affected_bytes":4096,"found_ms":0}],
            "more":2}"#;
        let scrub = Some(ScrubRecord::decode(scrubbed.as_bytes()).unwrap());
        let info = VolumeInfo { scrub, ..info };
        let table = table(&info);
        for line in [
            "volume           s3://bucket/vol/",
            "size             9.09 TiB (10000000000000 bytes)",
            "block size       64 KiB",
            "last checkpoint  none yet",
            "held by          nobody",
            "scrub            ended 1970-01-01 00:00:00.000 UTC: 1 MiB as they were written, 4 KiB without check values",
            "damage           vol/0000000001.0 at 16384 (16 KiB), 4 KiB of the volume from 8192 on: damaged; found 1970-01-01 00:00:00.000 UTC",
        ] {
            assert!(table.lines().any(|l| l == line), "{line}\nis not among\n{table}");
        }
    }
}
