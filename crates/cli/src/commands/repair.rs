//! `hypernbd repair URL --from REPLICA`.

use std::process::ExitCode;

use anyhow::Result;
use hypernbd_volume::VolumeError;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::repair::{self, Outcome, Repaired, Request};
use hypernbd_volume::url::VolumeUrl;
use tokio::runtime::Runtime;

use super::replicate::options_of;
use crate::output;
use crate::watch::{AtSignal, Watch};

/// The exit status when something is still wrong with the volume.
const PROBLEMS: u8 = 1;
/// The exit status when the volume could not be looked at, or not be repaired.
const NOT_DONE: u8 = 2;

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Exit status: 0 nothing is wrong any more, 1 something is, 2 the volume could not be checked or repaired."
)]
pub struct Args {
    /// The volume, whether a server has it or not
    pub url: VolumeUrl,

    /// A replica of the volume, its original or a copy of it: where objects are taken from
    #[arg(long, value_name = "URL")]
    pub from: VolumeUrl,

    /// Look for damage in the data too, all of which is read
    #[arg(long)]
    pub data: bool,

    /// Put back what can be; without this it is only said what could be
    #[arg(long)]
    pub write: bool,

    /// Address of the replica's store, when it is another one than the volume's
    #[arg(long, value_name = "URL")]
    pub from_endpoint_url: Option<String>,

    /// Region of the replica's bucket, when it is another one
    #[arg(long, value_name = "REGION")]
    pub from_region: Option<String>,

    /// Profile of the AWS configuration with the keys for the replica, and its address and region unless they are given
    #[arg(long, value_name = "NAME")]
    pub from_profile: Option<String>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Repairs, and says what became of what was wrong.
pub fn run(args: &Args, store: &StoreOptions, runtime: &Runtime) -> Result<ExitCode> {
    let from_options = options_of(
        store,
        args.from_endpoint_url.as_deref(),
        args.from_region.as_deref(),
        args.from_profile.as_deref(),
    )?;
    let request = Request {
        url: &args.url,
        store_options: store,
        from: &args.from,
        from_options: &from_options,
        is_data: args.data,
        is_written: args.write,
    };
    let watch = Watch::start(runtime, AtSignal::Stop)?;
    let repaired = runtime.block_on(repair::repair(&request, watch.control()));
    let stopped = watch.stopped();
    drop(watch);
    let repaired = match repaired {
        Ok(repaired) => repaired,
        Err(VolumeError::Closed) => {
            crate::complain("stopped; the same command goes on with what is left");
            return Ok(stopped);
        }
        Err(e) => {
            crate::complain(&e.chain());
            return Ok(ExitCode::from(NOT_DONE));
        }
    };
    match args.json {
        true => output::line(serde_json::to_string_pretty(&repaired)?)?,
        false => output::write(text(&repaired))?,
    }
    Ok(match repaired.is_whole() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(PROBLEMS),
    })
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
