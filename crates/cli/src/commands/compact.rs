//! `hypernbd compact URL`.

use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use hypernbd_volume::admin::compact::{Compacted, compact};
use hypernbd_volume::admin::retention;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::retention::Survey;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;
use serde::Serialize;
use serde_json::json;
use tokio::runtime::Runtime;

use super::served;
use crate::flags::lease;
use crate::output;
use crate::watch::{AtSignal, Watch};

/// How often it is looked whether a signal came while a server compacts.
const SIGNAL_POLL: Duration = Duration::from_millis(100);

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume; a server on this machine that has it open does this for you, also with compaction=off
    pub url: VolumeUrl,

    /// Say what would be copied, and change nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Compact even while a server holds the volume; that server cannot write from then on
    #[arg(long)]
    pub takeover: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What was done, or would be. In bytes.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Report {
    /// Objects that are mostly dead.
    objects: u64,
    object_bytes: u64,
    /// What is live in them.
    copied_bytes: u64,
    checkpoints: u64,
    /// Whether it was stopped before its end.
    is_stopped: bool,
    /// How far what is stored is beyond what it should be.
    debt_bytes: u64,
    /// What nobody needs, and goes with the next rounds of a server or `prune`.
    reclaimable_bytes: u64,
}

impl Report {
    fn new(done: Compacted, survey: &Survey) -> Self {
        Self {
            objects: done.objects,
            object_bytes: done.object_bytes,
            copied_bytes: done.copied_bytes,
            checkpoints: done.checkpoints,
            is_stopped: done.is_stopped,
            debt_bytes: survey.debt.over_bytes(),
            reclaimable_bytes: survey.reclaimable_bytes + survey.grace_bytes,
        }
    }
}

/// Compacts, and says what was moved and what goes then.
pub fn run(args: &Args, store: &StoreOptions, runtime: &Runtime) -> Result<ExitCode> {
    if runtime.block_on(retention::policy(&args.url, store))?.is_none() {
        let why = format!(
            "every checkpoint of {0} is kept, so no space would come back: say which are with hypernbd retention set {0}",
            args.url
        );
        match args.json {
            true => {
                crate::complain(&why);
                output::line(serde_json::to_string_pretty(&Report::default())?)?;
            }
            false => output::line(why)?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    if args.dry_run {
        let survey = runtime.block_on(retention::prune_preview(&args.url, store))?;
        let would = Compacted {
            objects: survey.victims,
            object_bytes: survey.victim_bytes,
            copied_bytes: survey.copied_bytes,
            ..Compacted::default()
        };
        let report = Report::new(would, &survey);
        match args.json {
            true => output::line(serde_json::to_string_pretty(&report)?)?,
            false => output::line(format_args!(
                "{} that is live would be copied out of {} objects with {}",
                format_size(report.copied_bytes),
                report.objects,
                format_size(report.object_bytes)
            ))?,
        }
        return Ok(ExitCode::SUCCESS);
    }
    let watch = Watch::start(runtime, AtSignal::Stop)?;
    let asked = match args.takeover {
        true => Asked::Nobody,
        false => runtime.block_on(ask(&args.url, store, &watch))?,
    };
    let done = match asked {
        Asked::Nobody => runtime.block_on(compact(&args.url, store, &lease(args.takeover), watch.control())),
        Asked::Done(done) => Ok(done),
        Asked::Stopped => {
            crate::complain(
                "the server gives up the copy that is under way; what it had moved before is in place",
            );
            return Ok(watch.stopped());
        }
    };
    let stopped = watch.stopped();
    drop(watch);
    let done = done?;
    let survey = runtime.block_on(retention::prune_preview(&args.url, store))?;
    let report = Report::new(done, &survey);
    match args.json {
        true => output::line(serde_json::to_string_pretty(&report)?)?,
        false => output::write(text(&done, &report, &args.url))?,
    }
    Ok(if done.is_stopped {
        stopped
    } else {
        ExitCode::SUCCESS
    })
}

/// What became of asking the volume's server.
enum Asked {
    /// There is none on this machine.
    Nobody,
    /// It has done it.
    Done(Compacted),
    /// A signal came first.
    Stopped,
}

/// Has the volume compacted by the server that has it open on this machine, if there is one.
async fn ask(url: &VolumeUrl, store: &StoreOptions, watch: &Watch) -> Result<Asked> {
    let nothing = json!({});
    let told = served::tell::<Compacted>(url, store, "compact", &nothing);
    let mut told = pin!(told);
    loop {
        tokio::select! {
            told = &mut told => return Ok(told?.map_or(Asked::Nobody, Asked::Done)),
            () = tokio::time::sleep(SIGNAL_POLL) => {}
        }
        if watch.control().is_stopped() {
            // The server ends it once this process hangs up.
            return Ok(Asked::Stopped);
        }
    }
}

/// What was moved, for people.
pub fn moved(done: &Compacted) -> String {
    format!(
        "copied {} that was live out of {} objects with {}\n",
        format_size(done.copied_bytes),
        done.objects,
        format_size(done.object_bytes)
    )
}

fn text(done: &Compacted, report: &Report, url: &VolumeUrl) -> String {
    let mut text = match report.is_stopped {
        true => "stopped: what was copied until then is in place\n".to_owned(),
        false => String::new(),
    };
    text += &moved(done);
    text += &format!(
        "{} can go now (hypernbd prune {url}); the rest of those objects once no checkpoint that needs them is kept\n",
        format_size(report.reclaimable_bytes)
    );
    text
}
