//! `hypernbd space URL`.

use anyhow::Result;
use hypernbd_volume::admin::{Space, space};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;

use crate::output;

/// US dollars a GB (10^9 bytes) and month, for the first 50 TB of S3 Standard in us-east-1: <https://aws.amazon.com/s3/pricing/>
const PRICE_A_GB_MONTH: f64 = 0.023;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    pub url: VolumeUrl,

    /// What a GB (10^9 bytes) costs a month, in the currency that you like
    #[arg(long, value_name = "PRICE", default_value_t = PRICE_A_GB_MONTH, conflicts_with = "json")]
    pub price: f64,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Prints what the volume takes.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let space = space(&args.url, store).await?;
    if args.json {
        return output::line(serde_json::to_string_pretty(&space)?);
    }
    output::write(table(&space, &args.url, args.price))
}

fn table(space: &Space, url: &VolumeUrl, price: f64) -> String {
    let rows = [
        ("live", format_size(space.live_bytes)),
        ("shared", format_size(space.shared_bytes)),
        ("history", format_size(space.history_bytes)),
        ("reclaimable", format_size(space.reclaimable_bytes)),
        ("in grace", format_size(space.grace_bytes)),
        ("debt", format_size(space.debt_bytes)),
        (
            "stored",
            format!("{} in {} objects", format_size(space.stored_bytes), space.objects),
        ),
    ];
    let month = matches!(url, VolumeUrl::S3 { .. }).then(|| {
        let cost = space.stored_bytes as f64 / 1e9 * price;
        (
            "a month",
            format!("about {cost:.2} for the space, at {price} a GB"),
        )
    });
    let rows = rows.into_iter().chain(month);
    rows.map(|(name, value)| format!("{name:<12} {value}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_is_that_of_everything_stored() {
        let space = Space {
            live_bytes: 1 << 30,
            shared_bytes: 0,
            history_bytes: 1 << 20,
            reclaimable_bytes: 0,
            grace_bytes: 0,
            debt_bytes: 0,
            stored_bytes: 2_000_000_000,
            objects: 7,
        };
        let s3 = VolumeUrl::parse("s3://bucket/vol/").unwrap();
        let text = table(&space, &s3, 0.5);
        assert!(
            text.contains("1.86 GiB in 7 objects") && text.contains("about 1.00"),
            "{text}"
        );
        let file = VolumeUrl::parse("file:///srv/vol/").unwrap();
        assert!(!table(&space, &file, 0.5).contains("month"));
    }
}
