//! `hypernbd compact URL`.

use std::process::ExitCode;

use anyhow::Result;
use hypernbd_volume::admin::compact::{Compacted, compact};
use hypernbd_volume::admin::retention;
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::retention::Survey;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::flags::lease;
use crate::output;
use crate::watch::{AtSignal, Watch};

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume; no server may have it open: one with compaction=auto does this by itself
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
    let done = runtime.block_on(compact(&args.url, store, &lease(args.takeover), watch.control()));
    let stopped = watch.stopped();
    drop(watch);
    let done = done?;
    let survey = runtime.block_on(retention::prune_preview(&args.url, store))?;
    let report = Report::new(done, &survey);
    match args.json {
        true => output::line(serde_json::to_string_pretty(&report)?)?,
        false => output::write(text(&report, &args.url))?,
    }
    Ok(if done.is_stopped {
        stopped
    } else {
        ExitCode::SUCCESS
    })
}

fn text(report: &Report, url: &VolumeUrl) -> String {
    let mut text = match report.is_stopped {
        true => "stopped: what was copied until then is in place\n".to_owned(),
        false => String::new(),
    };
    text += &format!(
        "copied {} that was live out of {} objects with {}\n",
        format_size(report.copied_bytes),
        report.objects,
        format_size(report.object_bytes)
    );
    text += &format!(
        "{} can go now (hypernbd prune {url}); the rest of those objects once no checkpoint that needs them is kept\n",
        format_size(report.reclaimable_bytes)
    );
    text
}
