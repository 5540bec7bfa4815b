//! `hypernbd prune URL`.

use std::time::Duration;

use anyhow::{Result, bail};
use hypernbd_volume::admin::retention;
use hypernbd_volume::monitor::control::{Gone, RetentionAnswer, RetentionArguments};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::units::{format_duration, format_size};
use hypernbd_volume::url::VolumeUrl;

use super::served;
use crate::flags::lease;
use crate::output;

/// Arguments.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The volume; a server on this machine that has it open does this for you, also with retention_interval=off
    pub url: VolumeUrl,

    /// Say what would go, and remove nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Prune even while a server holds the volume; that server cannot write from then on
    #[arg(long)]
    pub takeover: bool,

    /// Of a volume that is served: do not wait for what goes only once it has not been needed for the server's retention_grace
    #[arg(long, conflicts_with_all = ["dry_run", "takeover"])]
    pub no_wait: bool,
}

/// Removes what the volume's retention does not keep, and says how much that was.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    if args.dry_run {
        let going = retention::prune_preview(&args.url, store).await?;
        return output::line(format_args!(
            "{} checkpoints and {} objects with {} would go",
            going.checkpoints,
            going.objects,
            format_size(going.reclaimable_bytes + going.grace_bytes)
        ));
    }
    if retention::policy(&args.url, store).await?.is_none() {
        return output::line(format_args!(
            "every checkpoint of {0} is kept: say which are with hypernbd retention set {0}",
            args.url
        ));
    }
    let answer = match args.takeover {
        true => None,
        false => ask(args, store).await?,
    };
    if let Some(answer) = answer {
        return output::write(by_server(args, store, &answer).await?);
    }
    let removed = retention::prune(&args.url, store, &lease(args.takeover)).await?;
    output::write(gone(&Gone {
        checkpoints: removed.checkpoints,
        objects: removed.objects,
        bytes: removed.bytes,
    }))
}

/// Has the server that has the volume open on this machine, if there is one, remove what may go now.
async fn ask(args: &Args, store: &StoreOptions) -> Result<Option<RetentionAnswer>> {
    served::tell(&args.url, store, "retention", &RetentionArguments::default()).await
}

/// Waits for the rest that a server has found, unless that is not wanted, and says what went.
async fn by_server(args: &Args, store: &StoreOptions, first: &RetentionAnswer) -> Result<String> {
    if first.waiting == 0 || args.no_wait {
        return Ok(gone_and_waiting(first));
    }
    crate::complain(&format!(
        "{} checkpoints and objects go once they have not been needed for {}: waiting for that (--no-wait leaves them to a later round)",
        first.waiting,
        format_duration(grace(first))
    ));
    tokio::time::sleep(grace(first)).await;
    let Some(last) = ask(args, store).await? else {
        bail!(
            "the server of {0} has ended meanwhile: hypernbd prune {0} removes what is left",
            args.url
        );
    };
    Ok(gone_and_waiting(&RetentionAnswer {
        gone: together(first, &last),
        ..last
    }))
}

/// What went from the beginning of one answer's work to the end of another's, in rounds in between, too.
fn together(first: &RetentionAnswer, last: &RetentionAnswer) -> Gone {
    let since = |of: fn(&Gone) -> u64| {
        of(&first.gone) + of(&last.gone_since_start).saturating_sub(of(&first.gone_since_start))
    };
    Gone {
        checkpoints: since(|gone| gone.checkpoints),
        objects: since(|gone| gone.objects),
        bytes: since(|gone| gone.bytes),
    }
}

/// How long something must not have been needed before a server removes it.
pub fn grace(answer: &RetentionAnswer) -> Duration {
    Duration::from_millis(answer.grace_ms)
}

/// What a server has removed, and what goes later, for people.
pub fn gone_and_waiting(answer: &RetentionAnswer) -> String {
    let waiting = match answer.waiting {
        0 => String::new(),
        waiting => format!(
            "{waiting} more checkpoints and objects go once they have not been needed for {}\n",
            format_duration(grace(answer))
        ),
    };
    gone(&answer.gone) + &waiting
}

fn gone(gone: &Gone) -> String {
    format!(
        "removed {} checkpoints and {} objects with {}\n",
        gone.checkpoints,
        gone.objects,
        format_size(gone.bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(now: u64, since_start: u64, waiting: u64) -> RetentionAnswer {
        let gone = |count: u64| Gone {
            checkpoints: count,
            objects: count * 2,
            bytes: count << 20,
        };
        RetentionAnswer {
            is_done: true,
            gone: gone(now),
            waiting,
            grace_ms: 600_000,
            gone_since_start: gone(since_start),
        }
    }

    /// Five had gone before; the rounds in between took three, and the last one four.
    #[test]
    fn what_rounds_in_between_removed_counts() {
        let (first, last) = (answer(2, 7, 9), answer(4, 14, 1));
        let all = together(&first, &last);
        assert_eq!((all.checkpoints, all.objects, all.bytes), (9, 18, 9 << 20));
        // Another server counts anew.
        assert_eq!(together(&first, &answer(1, 1, 0)).checkpoints, 2);
    }

    #[test]
    fn what_waits_is_said_with_how_long() {
        assert_eq!(
            gone_and_waiting(&answer(14, 14, 0)),
            "removed 14 checkpoints and 28 objects with 14 MiB\n"
        );
        let text = gone_and_waiting(&answer(0, 0, 3));
        assert!(
            text.ends_with("3 more checkpoints and objects go once they have not been needed for 10m\n"),
            "{text}"
        );
    }
}
