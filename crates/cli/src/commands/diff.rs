//! `hypernbd diff URL AT AT`.

use anyhow::Result;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::{self, At, ChangeKind, Changed};
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;

use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    pub url: VolumeUrl,

    /// The checkpoint to compare with, as @NUMBER, @TIME, @-AGO or @NAME
    pub from: At,

    /// The checkpoint whose ranges are shown
    pub to: At,

    /// Show only how much it is
    #[arg(long)]
    pub stat: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Prints what differs.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let changed = past::diff(&args.url, store, &args.from, &args.to).await?;
    let sum = |kind| -> u64 {
        let of_kind = changed.iter().filter(|range| range.kind == kind);
        of_kind.map(|range| range.len_bytes).sum()
    };
    let (data, zero) = (sum(ChangeKind::Data), sum(ChangeKind::Zero));
    if args.stat {
        return match args.json {
            true => output::line(serde_json::json!({
                "ranges": changed.len(), "data_bytes": data, "zero_bytes": zero,
            })),
            false => output::line(format_args!(
                "{} differ: {} of data, {} of zeros",
                match changed.len() {
                    1 => "1 range".to_owned(),
                    n => format!("{n} ranges"),
                },
                format_size(data),
                format_size(zero)
            )),
        };
    }
    if args.json {
        return output::line(serde_json::to_string_pretty(&changed)?);
    }
    let head = format!("{:>20}  {:>20}  KIND\n", "OFFSET", "LENGTH");
    output::write(
        std::iter::once(head)
            .chain(changed.iter().map(row))
            .collect::<String>(),
    )
}

fn row(range: &Changed) -> String {
    let kind = match range.kind {
        ChangeKind::Data => "data",
        ChangeKind::Zero => "zero",
    };
    format!("{:>20}  {:>20}  {kind}\n", range.offset_bytes, range.len_bytes)
}
