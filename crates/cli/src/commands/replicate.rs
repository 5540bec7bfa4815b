//! `hypernbd replicate URL DEST`.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use hypernbd_volume::VolumeError;
use hypernbd_volume::options::{ServeOptions, StoreOptions};
use hypernbd_volume::replicate::{self, Replicated, Request};
use hypernbd_volume::units::{format_duration, format_size, parse_duration};
use hypernbd_volume::url::VolumeUrl;
use tokio::runtime::Runtime;

use crate::output;
use crate::watch::{AtSignal, Watch};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume, whether a server has it or not
    pub url: VolumeUrl,

    /// Where its replica is, or is to be: in another bucket, store or directory
    #[arg(value_name = "DEST")]
    pub to: VolumeUrl,

    /// Go on until stopped, beside whoever writes to the volume, and say after each pass how far behind the replica is
    #[arg(long)]
    pub follow: bool,

    /// With --follow: how often to look for new checkpoints, 1s or more
    #[arg(long, value_name = "TIME", value_parser = interval, default_value = "5s", requires = "follow")]
    pub interval: Duration,

    /// Take the volume from the server that holds it first, so that nothing more is published to it, then copy the rest
    #[arg(long, conflicts_with = "follow")]
    pub takeover: bool,

    /// Address of DEST's store, when it is another one than the volume's
    #[arg(long, value_name = "URL")]
    pub dest_endpoint_url: Option<String>,

    /// Region of DEST's bucket, when it is another one
    #[arg(long, value_name = "REGION")]
    pub dest_region: Option<String>,

    /// Profile of the AWS configuration with the keys for DEST, and its address and region unless they are given
    #[arg(long, value_name = "NAME")]
    pub dest_profile: Option<String>,

    /// Print JSON; with --follow one line a pass
    #[arg(long)]
    pub json: bool,
}

impl Args {
    /// How the replica's store is reached: as the volume's, but for what is said of it.
    fn to_options(&self, store: &StoreOptions) -> Result<StoreOptions> {
        options_of(
            store,
            self.dest_endpoint_url.as_deref(),
            self.dest_region.as_deref(),
            self.dest_profile.as_deref(),
        )
    }
}

/// Each look is requests to both stores.
const INTERVAL_MIN: Duration = Duration::from_secs(1);

/// Reads how often to look.
fn interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text).map_err(|error| error.to_string())?;
    match interval >= INTERVAL_MIN {
        true => Ok(interval),
        false => Err("each look is requests to both stores: give 1s or more".to_owned()),
    }
}

/// How another place's store is reached: as the volume's, but for what is said of it.
pub(super) fn options_of(
    store: &StoreOptions,
    endpoint_url: Option<&str>,
    region: Option<&str>,
    profile: Option<&str>,
) -> Result<StoreOptions> {
    // The same checks as for the volume's own.
    let mut given = ServeOptions::default();
    for (key, value) in [("endpoint_url", endpoint_url), ("region", region)] {
        if let Some(value) = value {
            given.set(key, value)?;
        }
    }
    let given = given.store()?;
    let mut options = store.clone();
    if let Some(profile) = profile {
        // It says what is not said here.
        (options.endpoint_url, options.region) = (None, None);
        options.profile = Some(profile.to_owned());
    }
    options.endpoint_url = given.endpoint_url.or(options.endpoint_url);
    options.region = given.region.or(options.region);
    Ok(options)
}

/// Replicates, and says how far the replica is.
pub fn run(args: &Args, store: &StoreOptions, runtime: &Runtime) -> Result<ExitCode> {
    let to_options = args.to_options(store)?;
    let request = Request {
        url: &args.url,
        store_options: store,
        to: &args.to,
        to_options: &to_options,
        takes_over: args.takeover,
        follows: args.follow.then_some(args.interval),
    };
    let watch = Watch::start(runtime, AtSignal::Stop)?;
    let mut told = None;
    let replicated = runtime.block_on(replicate::replicate(&request, watch.control(), |so_far| {
        if args.follow && is_news(told.as_ref(), so_far) {
            // A reader that has gone is told of at the end.
            drop(tell(args, so_far));
            told = Some(so_far.clone());
        }
    }));
    let stopped = watch.stopped();
    drop(watch);
    match replicated {
        Ok(done) if args.follow && told.is_some_and(|told| !is_news(Some(&told), &done)) => {
            Ok(ExitCode::SUCCESS)
        }
        Ok(done) => {
            tell(args, &done)?;
            match done.wal_left.filter(|_| !args.follow) {
                Some(log) => bail!(
                    "{0} was not closed cleanly, and its log {log} may hold flushed writes that its replica does not have: publish them \
                     with hypernbd wal replay {0}, or serve {0}, then replicate it again",
                    args.url
                ),
                None => Ok(ExitCode::SUCCESS),
            }
        }
        Err(VolumeError::Closed) => {
            crate::complain("stopped; the same command goes on where it stopped");
            Ok(stopped)
        }
        Err(e) => Err(e.into()),
    }
}

/// Whether there is something to say that was not said.
fn is_news(told: Option<&Replicated>, now: &Replicated) -> bool {
    told.is_none_or(|told| {
        (told.checkpoint, told.checkpoints, told.behind_checkpoints)
            != (now.checkpoint, now.checkpoints, now.behind_checkpoints)
            || told.wal_left != now.wal_left
    })
}

fn tell(args: &Args, done: &Replicated) -> Result<()> {
    match (args.json, args.follow) {
        (true, true) => output::line(serde_json::to_string(done)?),
        (true, false) => output::line(serde_json::to_string_pretty(done)?),
        (false, _) => output::line(text(done)),
    }
}

fn text(done: &Replicated) -> String {
    let state = match done.behind_checkpoints {
        0 => "as its original is published".to_owned(),
        1 => format!("1 checkpoint behind, by {}", seconds(done.behind_seconds)),
        count => format!("{count} checkpoints behind, by {}", seconds(done.behind_seconds)),
    };
    let state = match &done.wal_left {
        None => state,
        Some(log) => format!("{state}, but for flushed writes that may lie in the log {log} alone"),
    };
    let copied = &done.copied;
    let mut text = format!(
        "{} is at checkpoint {}, {state}: {} checkpoints and {} objects with {} were copied",
        done.url,
        done.checkpoint,
        done.checkpoints,
        copied.objects,
        format_size(copied.bytes)
    );
    for (bytes, what) in [
        (copied.verified_bytes, "compared with their check values"),
        (
            copied.copied_by_store_bytes,
            "copied by the store, with their check values",
        ),
        (
            copied.unverified_bytes,
            "without check values, and so compared by their length alone",
        ),
    ] {
        if bytes > 0 {
            text += &format!("; {} {what}", format_size(bytes));
        }
    }
    text
}

fn seconds(seconds: f64) -> String {
    format_duration(Duration::from_secs(seconds.round().max(0.0) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(more: &[&str]) -> Args {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: Args,
        }
        let words = ["x", "s3://bucket/a", "s3://other/a"];
        let line = <Line as clap::Parser>::try_parse_from(words.iter().chain(more));
        line.unwrap_or_else(|e| panic!("{e}")).args
    }

    #[test]
    fn there_is_a_pause_between_two_looks() {
        for text in ["0", "0s", "999ms"] {
            assert!(interval(text).unwrap_err().contains("1s"), "{text}");
        }
        assert_eq!(interval("1s"), Ok(INTERVAL_MIN));
        assert_eq!(args(&["--follow"]).interval, Duration::from_secs(5));
    }

    #[test]
    fn the_replicas_store_is_the_volumes_but_for_what_is_said_of_it() {
        let store = StoreOptions {
            endpoint_url: Some("http://here:1".into()),
            region: Some("eu-west-1".into()),
            ..StoreOptions::default()
        };
        let of = |more: &[&str]| args(more).to_options(&store).unwrap();
        assert_eq!(of(&[]), store);
        let other = of(&["--dest-endpoint-url", "https://there:2"]);
        assert_eq!(other.endpoint_url.as_deref(), Some("https://there:2"));
        assert_eq!(other.region, store.region);
        let other = of(&["--dest-profile", "there", "--dest-region", "eu-west-2"]);
        assert_eq!(
            (&other.endpoint_url, other.region.as_deref()),
            (&None, Some("eu-west-2"))
        );
        assert_eq!(other.profile.as_deref(), Some("there"));
        let wrong = args(&["--dest-endpoint-url", "there"])
            .to_options(&store)
            .unwrap_err();
        assert!(wrong.to_string().contains("http://HOST:PORT"), "{wrong}");
    }
}
