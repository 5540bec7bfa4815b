//! `hypernbd repair URL`, in one of its ways.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use hypernbd_volume::VolumeError;
use hypernbd_volume::base::control::Control;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::repair::{self, How, Newest, Outcome, Repaired, Request, WayBack};
use hypernbd_volume::units::{format_duration, format_size};
use hypernbd_volume::url::VolumeUrl;
use tokio::runtime::Runtime;

use super::replicate::options_of;
use crate::flags::lease;
use crate::output;
use crate::watch::{AtSignal, Watch};

/// The exit status when something is still wrong with the volume.
const PROBLEMS: u8 = 1;
/// The exit status when the volume could not be looked at, or not be repaired.
const NOT_DONE: u8 = 2;

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(
    group = clap::ArgGroup::new("way").required(true).args(["from", "from_versions", "rebuild_list", "to_newest_whole"]),
    after_help = "Exit status: 0 nothing is wrong any more, 1 something is, 2 the volume could not be checked or repaired."
)]
pub struct Args {
    /// The volume, whether a server has it or not
    pub url: VolumeUrl,

    /// A replica of the volume, its original or a copy of it: where objects are taken from
    #[arg(long, value_name = "URL")]
    pub from: Option<VolumeUrl>,

    /// Take objects from the versions that the bucket keeps of them
    #[arg(long)]
    pub from_versions: bool,

    /// Write entries of the list of checkpoints again that are missing or damaged; no server may have the volume then
    #[arg(long)]
    pub rebuild_list: bool,

    /// Go back to the newest checkpoint that is whole; the state before stays, with a name; no server may have the volume then
    #[arg(long)]
    pub to_newest_whole: bool,

    /// Look for damage in the data too, all of which is read
    #[arg(long)]
    pub data: bool,

    /// Do it; without this it is only said what could be done
    #[arg(long)]
    pub write: bool,

    /// Address of the replica's store, when it is another one than the volume's
    #[arg(long, value_name = "URL", requires = "from")]
    pub from_endpoint_url: Option<String>,

    /// Region of the replica's bucket, when it is another one
    #[arg(long, value_name = "REGION", requires = "from")]
    pub from_region: Option<String>,

    /// Profile of the AWS configuration with the keys for the replica, and its address and region unless they are given
    #[arg(long, value_name = "NAME", requires = "from")]
    pub from_profile: Option<String>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What came of a repair.
enum Done {
    Repaired(Repaired),
    Newest(Newest),
}

/// Repairs, and says what became of what was wrong.
pub fn run(args: &Args, store: &StoreOptions, runtime: &Runtime) -> Result<ExitCode> {
    let from_options = options_of(
        store,
        args.from_endpoint_url.as_deref(),
        args.from_region.as_deref(),
        args.from_profile.as_deref(),
    )?;
    let watch = Watch::start(runtime, AtSignal::Stop)?;
    let done = runtime.block_on(repaired(args, store, &from_options, watch.control()));
    let stopped = watch.stopped();
    drop(watch);
    let done = match done {
        Ok(done) => done,
        Err(VolumeError::Closed) => {
            crate::complain("stopped; the same command goes on with what is left");
            return Ok(stopped);
        }
        Err(e) => {
            crate::complain(&e.chain());
            return Ok(ExitCode::from(NOT_DONE));
        }
    };
    let (json, text, is_whole) = match &done {
        Done::Repaired(repaired) => (
            serde_json::to_string_pretty(repaired)?,
            text(repaired),
            repaired.is_whole(),
        ),
        Done::Newest(newest) => (
            serde_json::to_string_pretty(newest)?,
            newest_text(args, newest),
            !matches!(newest, Newest::Damaged(WayBack { done: None, .. })),
        ),
    };
    match args.json {
        true => output::line(json)?,
        false => output::write(text)?,
    }
    Ok(match is_whole {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(PROBLEMS),
    })
}

/// Repairs in the way that was asked for: the command line has exactly one.
async fn repaired(
    args: &Args,
    store: &StoreOptions,
    from_options: &StoreOptions,
    control: &Control,
) -> Result<Done, VolumeError> {
    let how = How {
        is_data: args.data,
        is_written: args.write,
    };
    let lease = lease(false);
    if let Some(from) = &args.from {
        let request = Request {
            url: &args.url,
            store_options: store,
            from,
            from_options,
            is_data: how.is_data,
            is_written: how.is_written,
        };
        return repair::repair(&request, control).await.map(Done::Repaired);
    }
    if args.to_newest_whole {
        let newest = repair::to_newest_whole(&args.url, store, &lease, how, control).await;
        return newest.map(Done::Newest);
    }
    let repaired = match args.rebuild_list {
        true => repair::rebuild_list(&args.url, store, &lease, how, control).await,
        false => repair::from_versions(&args.url, store, how, control).await,
    };
    repaired.map(Done::Repaired)
}

fn newest_text(args: &Args, newest: &Newest) -> String {
    let url = &args.url;
    let way = match newest {
        Newest::Whole(number) => {
            return format!(
                "the newest checkpoint of {url}, {number}, is whole: there is nothing to go back from\n"
            );
        }
        Newest::Damaged(way) => way,
    };
    // Rounded up, to minutes where seconds say no more.
    let undone_s = way
        .newest_published_ms
        .saturating_sub(way.published_ms)
        .div_ceil(1000);
    let undone_s = match undone_s {
        0..=600 => undone_s,
        longer => longer.next_multiple_of(60),
    };
    let what = format!(
        "the newest whole checkpoint of {url} is {}, published {}, with {}; checkpoints {} to {} are undone: {} of changes, with {} stored",
        way.to,
        output::time(way.published_ms),
        format_size(way.size_bytes),
        way.to + 1,
        way.newest,
        format_duration(Duration::from_secs(undone_s)),
        format_size(way.undone_bytes),
    );
    match &way.done {
        None => format!("{what}\n--write goes back to it; the state before stays, with a name\n"),
        Some(done) => format!(
            "{what}\nwent back to it as checkpoint {}; the state before is the snapshot {}\n",
            done.number, done.before
        ),
    }
}

fn text(repaired: &Repaired) -> String {
    let mut text = String::new();
    let (mut mended, mut possible) = (0, 0);
    for found in &repaired.found {
        let problem = &found.problem;
        let (word, more) = match &found.outcome {
            Outcome::Mended => {
                mended += 1;
                ("MENDED", format!("put back from {}", repaired.from))
            }
            Outcome::Possible => {
                possible += 1;
                ("FOUND", format!("--write puts it back from {}", repaired.from))
            }
            Outcome::Left(reason) => ("LEFT", format!("{reason}; {}", problem.advice)),
        };
        text += &format!("{word} {}: {}\n  {more}\n", problem.object, problem.reason);
    }
    let left = match &repaired.left {
        Some(left) => left.len(),
        None => repaired.found.len(),
    };
    text + &match (left, mended, possible) {
        (0, 0, _) => "nothing is wrong\n".to_owned(),
        (0, ..) => format!("{mended} objects were put back; nothing is wrong any more\n"),
        (_, _, 0) => format!(
            "{mended} objects were put back; problems that are left: {left} (hypernbd check {} tells of them)\n",
            repaired.url
        ),
        _ => format!("{possible} of {left} problems can be mended; nothing was changed\n"),
    }
}
