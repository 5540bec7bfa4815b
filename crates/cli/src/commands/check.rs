//! `hypernbd check URL`.

use std::process::ExitCode;

use anyhow::Result;
use hypernbd_volume::check::{self, Problem, Report, Request};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::At;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;
use tokio::runtime::Runtime;

use crate::output;
use crate::watch::{AtSignal, Watch};

/// The exit status when something is wrong with the volume.
const PROBLEMS: u8 = 1;
/// The exit status when the volume could not be checked.
const NOT_CHECKED: u8 = 2;
/// Ranges shown of one problem, at most; with --json there are more.
const RANGES_SHOWN: usize = 5;

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit status: 0 nothing is wrong, 1 something is, 2 the volume could not be checked.")]
pub struct Args {
    /// The volume, whether a server has it or not
    pub url: VolumeUrl,

    /// Read every block of data too, and compare it with its check values
    #[arg(long)]
    pub data: bool,

    /// Add check values to objects that have none, as those of other programs and of earlier releases
    #[arg(long, requires = "data")]
    pub write: bool,

    /// Check only this checkpoint, as @NUMBER, @TIME, @-AGO or @NAME
    #[arg(long, value_name = "AT")]
    pub snapshot: Option<At>,

    /// Check only what was stored after this checkpoint
    #[arg(long, value_name = "AT")]
    pub since: Option<At>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Checks, and says what is wrong.
pub fn run(args: &Args, store: &StoreOptions, runtime: &Runtime) -> Result<ExitCode> {
    let request = Request {
        snapshot: args.snapshot.clone(),
        since: args.since.clone(),
        is_data: args.data,
        adds_check_values: args.write,
    };
    // There is nothing to leave in order.
    let watch = Watch::start(runtime, AtSignal::End)?;
    let checked = runtime.block_on(check::check(&args.url, store, &request, watch.control()));
    drop(watch);
    let report = match checked {
        Ok(report) => report,
        Err(e) => {
            crate::complain(&e.chain());
            return Ok(ExitCode::from(NOT_CHECKED));
        }
    };
    match args.json {
        true => output::line(serde_json::to_string_pretty(&report)?)?,
        false => output::write(text(&report))?,
    }
    Ok(match report.is_clean() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(PROBLEMS),
    })
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        text += &problem_text(problem);
    }
    for note in &report.notes {
        text += &format!("note: {note}\n");
    }
    text += &format!(
        "{}: {} checkpoints up to {}, {} index nodes, {} objects with {} of data\n",
        report.url,
        report.checkpoints,
        report.newest_checkpoint,
        report.index_nodes,
        report.objects,
        format_size(report.data_bytes)
    );
    if let (Some(verified), Some(unverified)) = (report.verified_bytes, report.unverified_bytes) {
        text += &format!("read and found to be what was written: {}", format_size(verified));
        if unverified > 0 {
            text += &format!(
                "; read, without check values to compare with: {}",
                format_size(unverified)
            );
        }
        text.push('\n');
    }
    text += &match report.problems.len() {
        0 => "nothing is wrong\n".to_owned(),
        1 => "1 problem\n".to_owned(),
        count => format!("{count} problems\n"),
    };
    text
}

fn problem_text(problem: &Problem) -> String {
    let mut text = format!("PROBLEM {}: {}\n", problem.object, problem.reason);
    if !problem.checkpoints.is_empty() {
        let run = |(first, last): &(u64, u64)| match first == last {
            true => first.to_string(),
            false => format!("{first} to {last}"),
        };
        let mut affected = format!(
            "  affects checkpoints {}",
            list(problem.checkpoints.iter().map(run))
        );
        if problem.is_newest_affected {
            affected += ", the newest";
        }
        if !problem.names.is_empty() {
            affected += &format!(" (named {})", list(problem.names.iter().map(ToString::to_string)));
        }
        if !problem.ranges.is_empty() {
            let range = |range: &check::Affected| {
                format!("{} at {}", format_size(range.len_bytes), range.offset_bytes)
            };
            affected += &format!(": {}", list(problem.ranges.iter().take(RANGES_SHOWN).map(range)));
            if problem.ranges.len() > RANGES_SHOWN {
                affected += &format!(", and {} ranges more", problem.ranges.len() - RANGES_SHOWN);
            }
        }
        text += &affected;
        text.push('\n');
    }
    text + &format!("  {}\n", problem.advice)
}

fn list(words: impl Iterator<Item = String>) -> String {
    words.collect::<Vec<_>>().join(", ")
}
