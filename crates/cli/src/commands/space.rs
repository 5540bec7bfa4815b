//! `hypernbd space URL`.

use anyhow::Result;
use hypernbd_volume::admin::{SnapshotSpace, Space, space};
use hypernbd_volume::base::prices;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;
use serde::Serialize;

use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume
    pub url: VolumeUrl,

    /// What a GB (10^9 bytes) costs a month, in the currency that you like; without it, what AWS asks for S3 Standard, in US dollars
    #[arg(long, value_name = "PRICE", value_parser = price, default_value_t = prices::STORED_GB_MONTH_DOLLARS)]
    pub price: f64,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What is printed as JSON.
#[derive(Debug, Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    space: &'a Space,
    /// What the space costs a month, in the currency of the price; `None` of a volume in a directory.
    cost_a_month: Option<f64>,
}

/// Reads a price.
fn price(text: &str) -> Result<f64, String> {
    let price = text.parse::<f64>().ok();
    let price = price.filter(|price| price.is_finite() && *price >= 0.0);
    price.ok_or_else(|| "write a number that is not below 0, as in 0.023".to_owned())
}

/// Prints what the volume takes.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    let space = space(&args.url, store).await?;
    if args.json {
        let report = Report {
            space: &space,
            cost_a_month: cost_a_month(&space, &args.url, args.price),
        };
        return output::line(serde_json::to_string_pretty(&report)?);
    }
    output::write(table(&space, &args.url, args.price))
}

fn cost_a_month(space: &Space, url: &VolumeUrl, price: f64) -> Option<f64> {
    matches!(url, VolumeUrl::S3 { .. }).then(|| prices::cost_a_month(space.stored_bytes, price))
}

fn held_alone(snapshot: &SnapshotSpace) -> String {
    let names: Vec<String> = snapshot.names.iter().map(|name| format!("@{name}")).collect();
    format!(
        "{} held by {} alone",
        format_size(snapshot.alone_bytes),
        names.join(" ")
    )
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
    let month = cost_a_month(space, url, price).map(|cost| {
        (
            "a month",
            format!("about {cost:.2} for the space, at {price} a GB"),
        )
    });
    let snapshots = space.snapshots.iter().flatten();
    let snapshots = snapshots.map(|snapshot| ("snapshot", held_alone(snapshot)));
    let rows = rows.into_iter().chain(month).chain(snapshots);
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
            snapshots: Some(vec![SnapshotSpace {
                cno: 3,
                names: vec!["monday".parse().unwrap(), "one".parse().unwrap()],
                alone_bytes: 1 << 20,
            }]),
        };
        let s3 = VolumeUrl::parse("s3://bucket/vol/").unwrap();
        let text = table(&space, &s3, 0.5);
        assert!(
            text.contains("1.86 GiB in 7 objects") && text.contains("about 1.00"),
            "{text}"
        );
        assert!(text.contains("1 MiB held by @monday @one alone"), "{text}");
        let file = VolumeUrl::parse("file:///srv/vol/").unwrap();
        assert!(!table(&space, &file, 0.5).contains("month"));
        let json = |url| {
            let report = Report {
                space: &space,
                cost_a_month: cost_a_month(&space, url, 0.5),
            };
            serde_json::to_value(&report).unwrap()
        };
        assert_eq!(json(&s3)["cost_a_month"], 1.0);
        assert_eq!(json(&s3)["stored_bytes"], 2_000_000_000_u64);
        assert_eq!(json(&s3)["snapshots"][0]["alone_bytes"], 1 << 20);
        assert!(json(&file)["cost_a_month"].is_null());
    }

    #[test]
    fn a_price_is_a_number() {
        assert_eq!(price("0.5"), Ok(0.5));
        for text in ["-1", "NaN", "inf", "1 dollar", ""] {
            assert!(price(text).is_err(), "{text}");
        }
    }
}
