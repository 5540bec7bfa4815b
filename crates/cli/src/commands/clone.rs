//! `hypernbd clone URL[AT] URL2`.

use anyhow::{Context, Result, bail};
use hypernbd_volume::VolumeError;
use hypernbd_volume::admin::{self, Cloned, Flattened};
use hypernbd_volume::options::StoreOptions;
use hypernbd_volume::past::At;
use hypernbd_volume::units::format_size;
use hypernbd_volume::url::VolumeUrl;

use serde_json::json;

use super::served;
use crate::flags::lease;
use crate::output;
use crate::wrong_usage;

/// Arguments.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "hypernbd clone [OPTIONS] <URL> [AT] <URL2>\n       hypernbd clone [OPTIONS] --flatten <URL2>"
)]
pub struct Args {
    /// The volume, which a server may have open; the checkpoint to begin as, as @NUMBER, @TIME, @-AGO or @NAME, behind a space or
    /// a slash, or none for the newest published; and where the clone goes
    #[arg(value_name = "URL [AT] URL2", required_unless_present = "flatten")]
    pub words: Vec<String>,

    /// Copy all objects on the store's side, so that the new volume shares nothing
    #[arg(long)]
    pub full: bool,

    /// End the sharing of this clone: what it shares is copied on the store's side. A server on this machine that has it open does this for
    /// you, beside its clients; one elsewhere must be asked there, or stopped
    #[arg(long, value_name = "URL2", conflicts_with_all = ["words", "full"])]
    pub flatten: Option<VolumeUrl>,

    /// Flatten even while a server holds the clone; that server cannot write from then on
    #[arg(long, requires = "flatten")]
    pub takeover: bool,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A volume, with or without a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The volume.
    pub url: VolumeUrl,
    /// The checkpoint that stands behind it.
    pub at: Option<At>,
}

/// Reads `URL` or `URL@AT`, with a slash between them.
fn source(text: &str) -> Result<Source, String> {
    let parted = text.rsplit_once('/').filter(|(_, last)| last.starts_with('@'));
    let (url, at) = match parted {
        None => (text, None),
        Some((url, at)) => (url, Some(at.parse::<At>().map_err(|e| e.to_string())?)),
    };
    let url = url.parse::<VolumeUrl>().map_err(|e| e.to_string())?;
    Ok(Source { url, at })
}

/// What a clone is made of, and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wanted {
    source: Source,
    to: VolumeUrl,
}

impl Wanted {
    fn of(words: &[String]) -> Result<Self> {
        let (from, at, to) = match words {
            [from, to] => (from, None, to),
            [from, at, to] => (from, Some(at.parse::<At>()?), to),
            _ => bail!("write hypernbd clone URL [AT] URL2"),
        };
        let mut source = source(from).map_err(anyhow::Error::msg)?;
        source.at = match (source.at, at) {
            (Some(a), Some(b)) => bail!("two checkpoints are named, {a} and {b}: leave one out"),
            (at, None) | (None, at) => at,
        };
        let to = to.parse().context("where the clone is to go")?;
        Ok(Self { source, to })
    }
}

/// Makes the clone, or ends its sharing, and says what it is.
pub async fn run(args: &Args, store: &StoreOptions) -> Result<()> {
    if let Some(url) = &args.flatten {
        return flatten(args, url, store).await;
    }
    let Wanted { source, to } =
        Wanted::of(&args.words).map_err(|error| wrong_usage(format_args!("{error:#}")))?;
    let made = match args.full {
        false => admin::clone(&source.url, store, source.at.as_ref(), &to).await?,
        true => admin::clone_full(&source.url, store, source.at.as_ref(), &to).await?,
    };
    told(&made, args)
}

async fn flatten(args: &Args, url: &VolumeUrl, store: &StoreOptions) -> Result<()> {
    let asked = match args.takeover {
        true => None,
        false => served::tell::<Flattened>(url, store, "flatten", &json!({})).await?,
    };
    let done = match asked {
        Some(done) => done,
        None => match admin::flatten(url, store, &lease(args.takeover)).await {
            // It may be copied beside its clients there.
            Err(held @ VolumeError::Held { .. }) => Err(held).context(format!(
                "{url} is served, and its server is not asked from here: give this command on the machine of that server, which copies \
                 beside its clients (one of many volumes is told by POST /v1/flatten?volume=NAME), or stop the server first"
            ))?,
            done => done?,
        },
    };
    if args.json {
        return output::line(serde_json::to_string_pretty(&done)?);
    }
    output::line(flattened(&done))
}

/// What was done, for people.
pub fn flattened(done: &Flattened) -> String {
    format!(
        "{} shares nothing with {} any more: {} objects with {} were copied",
        done.url,
        done.parent,
        done.objects,
        format_size(done.bytes)
    )
}

fn told(made: &Cloned, args: &Args) -> Result<()> {
    if args.json {
        return output::line(serde_json::to_string_pretty(made)?);
    }
    output::line(format_args!(
        "{} is a {} of {} at checkpoint {}, published {}, with {}",
        made.url,
        if args.full { "copy" } else { "clone" },
        made.parent,
        made.checkpoint,
        output::time(made.published_ms),
        format_size(made.size_bytes)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_may_stand_right_behind_the_volume() {
        let url = VolumeUrl::parse("s3://bucket/a/b/").unwrap();
        for (text, at) in [
            ("s3://bucket/a/b", None),
            ("s3://bucket/a/b/", None),
            ("s3://bucket/a/b/@17", Some("@17")),
            ("s3://bucket/a/b/@-15m", Some("@-15m")),
            ("s3://bucket/a/b/@golden.1", Some("@golden.1")),
        ] {
            let at = at.map(|at| at.parse().unwrap());
            assert_eq!(source(text), Ok(Source { url: url.clone(), at }), "{text}");
        }
        for text in ["s3://bucket/@17", "s3://bucket/a/@", "bucket"] {
            assert!(source(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_checkpoint_stands_between_two_volumes_or_behind_the_first() {
        let of = |words: &[&str]| Wanted::of(&words.iter().map(ToString::to_string).collect::<Vec<_>>());
        let wanted = of(&["s3://bucket/p", "@17", "s3://bucket/c"]).unwrap();
        assert_eq!(wanted, of(&["s3://bucket/p/@17", "s3://bucket/c/"]).unwrap());
        assert_eq!(wanted.source.at, Some(At::Number(17)));
        assert_eq!(of(&["s3://bucket/p", "s3://bucket/c"]).unwrap().source.at, None);
        for words in [
            &["s3://bucket/p/@17", "@18", "s3://bucket/c"][..],
            &["s3://bucket/p", "17", "s3://bucket/c"],
            &["s3://bucket/p", "s3://bucket/"],
            &["s3://bucket/p"],
        ] {
            assert!(of(words).is_err(), "{words:?}");
        }
    }
}
